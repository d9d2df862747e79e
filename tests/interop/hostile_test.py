# SPDX-License-Identifier: Apache-2.0
"""Every hand-made bad file is refused in one line, quickly and in little memory."""

import resource
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import hostile
import pytest
from hostile_case import Case

from nad_jax import errors
from nad_jax.interop import reader

# Processor seconds. No case takes 2 on a quiet machine; a busy host takes its share.
SECONDS = 8.0
MEGABYTES = 300
QUICK = [case for case in hostile.CASES if case not in hostile.BOMBS]


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "model.bin"


@pytest.mark.parametrize("case", hostile.CASES, ids=lambda case: case.name)
def test_refused_in_one_line_for_the_right_reason(path: Path, case: Case):
    path.write_bytes(case.make())
    began = time.process_time()
    with pytest.raises(errors.InputError) as caught:
        reader.read_checkpoint(path)
    seconds = time.process_time() - began
    message = str(caught.value)
    assert case.words in message
    assert len(message.splitlines()) == 1
    assert message.isascii() and message.isprintable()
    assert len(message) < 600
    assert seconds < SECONDS


@pytest.mark.slow
def test_there_are_enough_of_them_and_all_differ():
    assert len(hostile.CASES) >= 150
    assert len({case.name for case in hostile.CASES}) == len(hostile.CASES)
    assert len({case.make() for case in QUICK}) == len(QUICK)


@pytest.mark.slow
def test_what_a_file_declares_is_not_allocated(path: Path):
    """A few hundred bytes never cost more than a few megabytes."""
    for case in QUICK:
        data = case.make()
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with pytest.raises(errors.InputError):
                reader.read_checkpoint(path)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 * len(data) + 2 * 2**20, case.name


def _resident_growth(folder: str) -> None:
    """Reads the bombs in a process of its own; prints what they cost at most."""
    target = Path(folder) / "bomb"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in sorted(Path(folder).glob("*.bin")):
        bomb.rename(target)
        try:
            reader.read_checkpoint(target)
        except errors.InputError:
            continue
        raise AssertionError(bomb)
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


@pytest.mark.slow
def test_bombs_cost_little_resident_memory(tmp_path):
    for index, case in enumerate(hostile.BOMBS):
        (tmp_path / f"{index}.bin").write_bytes(case.make())
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < MEGABYTES


if __name__ == "__main__":
    _resident_growth(sys.argv[1])
