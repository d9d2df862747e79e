# SPDX-License-Identifier: Apache-2.0
"""A sample of the kill sweep, whose every case is in results/reliability."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

_SCRIPT = pathlib.Path(__file__).with_name("kill_sweep.py")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs a C compiler")
def test_whatever_call_a_save_is_killed_at_nothing_is_lost_or_left(tmp_path):
    out = tmp_path / "sample.json"
    command = [sys.executable, _SCRIPT, "--points", "::53", "--out", out]
    environment = {**os.environ, "XLA_FLAGS": ""}
    process = subprocess.run(
        command, capture_output=True, text=True, env=environment, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    summary = json.loads(out.read_text("utf-8"))["summary"]
    assert all(kind["good"] == kind["cases"] for kind in summary.values())
    # No sweep of a file system that nothing is written to.
    assert sum(kind["struck"] for kind in summary.values()) >= 10
