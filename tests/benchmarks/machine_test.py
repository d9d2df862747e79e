# SPDX-License-Identifier: Apache-2.0
"""Processor time of the neighbours, from a /proc made up for the test."""

import os

import pytest

from benchmarks import machine, run

TICKS = os.sysconf("SC_CLK_TCK")


def _proc(folder, processes, *, busy, stolen=0.0):
    """A /proc with those processes: pid -> (name, parent, own seconds, reaped)."""
    folder.mkdir()
    words = [busy, 0, 0, 1000, 500, 0, 0, stolen]
    line = " ".join(str(round(seconds * TICKS)) for seconds in words)
    (folder / "stat").write_text(f"cpu  {line} 7 7\ncpu0 1 2 3\n", "ascii")
    (folder / "version").write_text("no process", "ascii")
    for pid, (name, parent, own, reaped) in processes.items():
        (folder / str(pid)).mkdir()
        fields = [
            "S",
            parent,
            *[0] * 9,
            round(own * TICKS),
            0,
            round(reaped * TICKS),
            0,
        ]
        text = f"{pid} ({name}) {' '.join(map(str, fields))} 20 0\n"
        (folder / str(pid) / "stat").write_text(text, "utf-8")
    return machine.read_times(folder)


def _at(times, clock):
    return machine.Times(clock, times.busy, times.stolen, times.processes)


def test_own_processes_their_children_and_the_dead_ones_are_not_neighbours(tmp_path):
    before = _proc(
        tmp_path / "a", {1: ("init", 0, 1, 0), 10: ("driver", 1, 2, 0)}, busy=50
    )
    after = _proc(
        tmp_path / "b",
        {
            1: ("init", 0, 1, 0),
            10: ("driver", 1, 3, 4),  # 1 s itself, 4 s of a child that has ended
            11: ("side", 10, 5, 0),
            12: ("helper", 11, 2, 0),
            20: ("odd) name (", 1, 6, 0),
            21: ("cc1", 1, 2, 0),
        },
        busy=50 + 1 + 4 + 5 + 2 + 6 + 2,
        stolen=3,
    )
    seen = machine.usage(_at(before, 0.0), _at(after, 10.0), own=10)
    assert seen.other_cores == pytest.approx(0.8)
    assert seen.stolen_cores == pytest.approx(0.3)
    assert seen.busiest == "odd) name ( 20"


def test_an_idle_machine_has_no_busiest_process(tmp_path):
    processes = {1: ("init", 0, 1, 0), 10: ("driver", 1, 2, 0)}
    before = _proc(tmp_path / "a", processes, busy=50)
    after = _proc(tmp_path / "b", processes, busy=50)
    seen = machine.usage(_at(before, 0.0), _at(after, 1.0), own=10)
    assert seen == machine.Usage(0.0, 0.0, "")


def test_the_real_proc_can_be_read():
    times = machine.read_times()
    assert times.busy > 0 and os.getpid() in times.processes
    assert machine.describe()["cores"] >= 1


@pytest.mark.parametrize(
    ("other", "stolen", "kept"),
    [(0.1, 0.25, True), (0.11, 0.0, False), (0.0, 0.26, False)],
)
def test_a_run_beside_neighbours_or_robbed_by_the_host_is_not_kept(
    monkeypatch, other, stolen, kept
):
    class Watch:
        def lap(self):
            return machine.Usage(other, stolen, "cc1 21")

    monkeypatch.setattr(machine, "Watch", Watch)
    quiet = run.Quiet(limit=0.1, stolen_limit=0.25, patience=0.0)
    if kept:
        assert quiet.run(lambda: "done") == "done"
        assert (quiet.worst, quiet.stolen) == (other, stolen)
        return
    with pytest.raises(run.Refused, match=f"{other:.2f} cores .cc1 21 .*{stolen:.2f}"):
        quiet.run(lambda: "done")
    assert (quiet.worst, quiet.stolen) == (0.0, 0.0)
