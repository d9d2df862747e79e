# SPDX-License-Identifier: Apache-2.0
"""A receipt names what has changed, in a form that other tools read too."""

import subprocess

import pytest

from nad_jax.training import receipts, records


@pytest.fixture
def step(tmp_path):
    folder = tmp_path / "7"
    (folder / "inner").mkdir(parents=True)
    (folder / "a").write_bytes(b"one")
    (folder / "inner" / "b c").write_bytes(b"two")
    receipts.write(folder)
    return folder


def test_files_as_they_were_are_fine_and_nothing_is_left_beside(step):
    receipts.check(step)
    assert [path.name for path in step.parent.iterdir()] == ["7"]


def test_sha256sum_reads_it(step):
    """All lines but the seal, which is the last."""
    body = (step / "SHA256SUMS").read_bytes()[:-64]
    checked = subprocess.run(
        ["sha256sum", "-c", "-"], input=body, cwd=step, capture_output=True
    )
    assert checked.returncode == 0 and checked.stdout.count(b": OK") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda step: (step / "a").write_bytes(b"onf"), "sha256 of file a differs"),
        (lambda step: (step / "a").unlink(), "file a is missing"),
        (lambda step: (step / "x").touch(), "file x is not expected"),
        (lambda step: (step / "SHA256SUMS").write_bytes(b""), "file SHA256SUMS"),
    ],
)
def test_every_change_has_a_name(step, change, message):
    change(step)
    with pytest.raises(records.DamagedStep, match=message):
        receipts.check(step)
