# SPDX-License-Identifier: Apache-2.0
"""A sample of the byte damage, whose every case is in results/reliability."""

import json
import pathlib
import subprocess
import sys

import pytest

_SCRIPT = pathlib.Path(__file__).with_name("byte_damage.py")


@pytest.mark.slow
def test_cuts_and_flips_in_every_file_are_seen_and_named(tmp_path):
    out = tmp_path / "sample.json"
    command = [sys.executable, _SCRIPT, "--points", "::61", "--out", out]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    report = json.loads(out.read_text("utf-8"))
    assert len(report["cases"]) > 70
    for kind in ("cut", "flip"):
        summary = report["summary"][kind]
        assert summary["named"] == summary["detected"] == summary["cases"] > 20
    assert report["summary"]["unsealed"]["right_values"] > 5
