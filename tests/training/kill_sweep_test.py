# SPDX-License-Identifier: Apache-2.0
"""A sample of the kill sweep, whose every case is in results/reliability."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

_SCRIPT = pathlib.Path(__file__).with_name("kill_sweep.py")
sys.path.insert(0, str(_SCRIPT.parent))

import kill_sweep  # noqa: E402

_GOOD = {"killed": True, "intact": True, "lost": False, "litter": 0}


@pytest.mark.parametrize(
    "change",
    [
        {"killed": False},
        {"killed_before": False},
        {"intact": False},
        {"lost": True},
        {"litter": 1},
        {"said": "OSError"},
        {"error": "the judge ended"},
    ],
)
def test_what_makes_a_case_bad(change):
    case = {"kind": "double", "number": 1, **_GOOD}
    assert kill_sweep.is_good(case) and not kill_sweep.is_good(case | change)
    assert kill_sweep.is_good(case | {"kind": "full", "killed": False})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lose"),
    [
        ("overwriting", "2"),
        ("stage", "checkpoints/work.unfinished/two"),
        ("stage", "checkpoints"),
        ("report", "report.json"),
        ("artefact", "model"),
    ],
)
def test_a_writer_that_loses_what_it_has_committed_is_found(tmp_path, kind, lose):
    committed = []
    kill_sweep.prepare(kind, tmp_path, committed.append)
    lost = tmp_path / lose
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert kill_sweep.judge(kind, str(tmp_path), committed)["lost"]


@pytest.mark.slow
def test_commits_on_disk_count_where_their_writer_could_not_tell(tmp_path):
    kill_sweep.prepare("stage", tmp_path, lambda _: None)
    newest = tmp_path / "checkpoints" / "work.unfinished" / "two" / "2"
    (newest / "SHA256SUMS").write_bytes(b"")
    assert kill_sweep.judge("stage", str(tmp_path), [])["lost"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="the shim needs a C compiler")
def test_whatever_call_a_save_is_killed_at_nothing_is_lost_or_left(tmp_path):
    out = tmp_path / "sample.json"
    command = [sys.executable, _SCRIPT, "--points", "::53", "--out", out]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    summary = json.loads(out.read_text("utf-8"))["summary"]
    assert all(kind["good"] == kind["cases"] for kind in summary.values())
    # No sweep of a file system that nothing is written to.
    assert sum(kind["struck"] for kind in summary.values()) >= 10
    assert all(
        counts["struck"] == counts["cases"]
        for kind, counts in summary.items()
        if kind != "full"
    )
