# SPDX-License-Identifier: Apache-2.0
"""Each example runs as its reader would run it, and ends in an improvement."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"


def _printed(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env={**os.environ, "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    return [[float(share) for share in re.findall(r"([\d.]+)%", x)] for x in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["nad_in_plain_jax.py", "nad_in_nnx.py"])
def test_nad_takes_the_backdoor_and_leaves_the_accuracy(name):
    (acc_before, asr_before), (acc_after, asr_after) = _printed(name)
    assert asr_before > 90 and asr_after < 60
    assert acc_after > acc_before - 5


@pytest.mark.slow
def test_efrap_rounds_better_than_nearest():
    (nearest,), (learnt,) = _printed("efrap_in_a_foreign_loop.py")
    assert learnt > nearest + 5


def test_examples_fit_on_a_page():
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
