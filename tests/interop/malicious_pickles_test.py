# SPDX-License-Identifier: Apache-2.0
"""No pickle that tries to run code runs any, wherever in a file it stands."""

import contextlib
import copyreg
import json
import subprocess
import sys
from pathlib import Path

import good_files as good
import malicious_pickles
import pytest
from malicious_pickles import ATTACKS, Attack

from nad_jax import errors
from nad_jax.interop import reader

STORAGES = {"0": good.storage("float32", (1,))}
HARMLESS = good.program({"w": good.Tensor("0", "float32", 1, (1,), (1,))})

PLACES = {
    "alone": lambda attack: attack,
    "zip": lambda attack: good.zip_file(attack, STORAGES),
    "legacy": lambda attack: good.legacy_file(attack, STORAGES),
    "legacy magic": lambda attack: good.legacy_file(HARMLESS, STORAGES, magic=attack),
    "legacy protocol": lambda attack: good.legacy_file(
        HARMLESS, STORAGES, protocol=attack
    ),
    "legacy system": lambda attack: good.legacy_file(HARMLESS, STORAGES, system=attack),
    "legacy keys": lambda attack: good.legacy_file(HARMLESS, STORAGES, keys=attack),
}

# What reading a file may do besides computing: open that file.
_events: list[tuple[str, object]] = []
_watching = False


def _watch(event: str, arguments: tuple) -> None:
    if _watching:
        _events.append((event, arguments[0] if arguments else None))


@pytest.fixture(scope="module", autouse=True)
def audited():
    # An audit hook cannot be removed; it is switched off instead.
    sys.addaudithook(_watch)


@contextlib.contextmanager
def watched():
    global _watching
    _events.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("attacks")


@pytest.fixture
def registered():
    """os.system under number 240 of the extension registry, as EXT1 would find it."""
    copyreg.add_extension("os", "system", 240)
    yield
    copyreg.remove_extension("os", "system", 240)


def refuse(path: Path) -> str:
    """Reads `path`, which must be refused; returns the message."""
    try:
        with watched():
            reader.read_checkpoint(path)
    except errors.InputError as error:
        return str(error)
    pytest.fail("accepted")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_attack_is_refused_and_nothing_runs(folder, registered, attack, place):
    canary, path = folder / "canary", folder / "model.pth"
    path.write_bytes(PLACES[place](attack.make(str(canary))))
    message = refuse(path)
    assert len(message.splitlines()) == 1
    assert not canary.exists()
    opened = {argument for event, argument in _events if event == "open"}
    assert opened <= {str(path)}
    assert {event for event, _ in _events} <= {"open", "builtins.id"}


def test_there_are_enough_attacks():
    assert len(ATTACKS) >= 30
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS)


def _fire(folder: str) -> None:
    """Unpickles every live attack with the stdlib; prints which canaries appeared."""
    import io
    import os
    import pickle
    import time

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, pid: object) -> object:
            return pid

    copyreg.add_extension("os", "system", 240)
    paths = {}
    for index, attack in enumerate(ATTACKS):
        if attack.live:
            paths[attack.name] = os.path.join(folder, f"canary{index}")
            stream = io.BytesIO(attack.make(paths[attack.name]))
            with contextlib.suppress(Exception), contextlib.redirect_stdout(None):
                Unpickler(stream).load()
    # os.popen returns before its command has run.
    time.sleep(0.5)
    print(json.dumps([name for name, path in paths.items() if os.path.exists(path)]))


@pytest.mark.slow
def test_the_live_attacks_do_work_on_the_stdlib(tmp_path):
    """Otherwise the absence of canaries above would prove nothing."""
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    fired = json.loads(done.stdout.splitlines()[-1])
    assert fired == [attack.name for attack in ATTACKS if attack.live]
    assert len(fired) >= 30


def test_an_attack_is_named_with_its_offset(tmp_path):
    path = tmp_path / "m"
    attack = Attack("x", malicious_pickles.called("os", "system", str))
    path.write_bytes(PLACES["legacy"](attack.make("x")))
    data = path.read_bytes()
    message = refuse(path)
    assert "global 'os.system' is not accepted" in message
    assert f"(at byte {data.index(b'cos')})" in message


if __name__ == "__main__":
    _fire(sys.argv[1])
