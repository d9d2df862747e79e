# SPDX-License-Identifier: Apache-2.0
"""The driver, with sides that are scripts of a few lines: no JAX, no PyTorch."""

import json
import sys

import pytest

from benchmarks import cases, machine, protocol, run

SIDE = """
import json, sys, time
sys.path.insert(0, {root!r})
from benchmarks import protocol
channel = protocol.Channel()
print("chatter on the standard output")
log = open({log!r}, "a")
log.write("start {who}\\n"); log.flush()
if {who!r} == "broken":
    print("it does not fit", file=sys.stderr); sys.exit(3)
channel.ready(versions={{}}, threads=1, **{facts})
if {once}:
    sys.exit()
while channel.next():
    log.write("{who}\\n"); log.flush()
    channel.done({seconds})
"""


@pytest.fixture
def idle(monkeypatch):
    """Neighbours as the test says, one reading after another, then none."""
    readings = []

    class Watch:
        def lap(self):
            cores = readings.pop(0) if readings else 0.0
            return machine.Usage(cores, 0.0, "cc1 7" if cores else "")

    monkeypatch.setattr(machine, "Watch", Watch)
    monkeypatch.setattr(run, "_SECONDS_TO_LOOK", 0.0)
    monkeypatch.setattr(run, "_SECONDS_TO_WAIT", 1.0)
    # The real wait is in units of that second.
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    return readings


@pytest.fixture
def sides(monkeypatch, tmp_path):
    """Sides by name; what they do goes to a log, in order."""
    known = {}

    def add(who, *, seconds=1.0, once=False, **facts):
        known[who] = SIDE.format(
            root=str(run.ROOT),
            log=str(tmp_path / "log"),
            who=who,
            seconds=seconds,
            once=once,
            facts=facts,
        )

    def start(self, who, side):
        self._count += 1
        return protocol.Child(
            [sys.executable, "-c", known[side.task]],
            log=self._work / f"{self._count}.log",
            environment={},
            folder=run.ROOT,
        )

    monkeypatch.setattr(run.Bench, "start", start)
    return add


def _case(timing="units", *, theirs=("b",), **options):
    return cases.Case(
        "fake",
        timing,
        "seconds",
        (cases.Side("plain", "a"),),
        tuple(cases.Side(f"variant {t}", t, options) for t in theirs),
    )


def _main(monkeypatch, tmp_path, case, *arguments):
    monkeypatch.setattr(cases, "build", lambda **_: {"fake": case})
    return run.main(["--case=fake", f"--out={tmp_path / 'out'}", *arguments])


def _lines(tmp_path):
    return (tmp_path / "log").read_text().split("\n")[:-1]


def _written(tmp_path):
    return json.loads((tmp_path / "out" / "fake.json").read_text("utf-8"))


def test_sides_work_in_turn_and_the_file_tells(monkeypatch, tmp_path, idle, sides):
    sides("a", seconds=2.0)
    sides("b", seconds=12.0)
    sides("c", seconds=5.0)
    case = _case(theirs=("b", "c"))
    assert _main(monkeypatch, tmp_path, case, "--rounds=3") == 0
    assert _lines(tmp_path) == ["start a", "start b", "start c", *["a", "b", "c"] * 3]
    written = _written(tmp_path)
    assert [row["ratio"] for row in written["cases"]] == [6.0, 2.5]
    assert [row["strongest"] for row in written["cases"]] == [False, True]
    assert written["cases"][0]["runs"]["ours"] == [2.0] * 3
    assert written["cases"][0]["memory_ratio"] > 0
    assert written["command"] == (
        "python -m benchmarks.run --case=fake --rounds=3 --out=DIR"
    )
    assert {"machine", "versions", "threads", "load_average_before"} <= set(written)


def test_a_larger_batch_counts_for_as_many_units(monkeypatch, tmp_path, idle, sides):
    sides("a", seconds=1.0)
    sides("b", seconds=8.0)
    assert _main(monkeypatch, tmp_path, _case(batches=4)) == 0
    assert _written(tmp_path)["cases"][0]["ratio"] == 2.0


@pytest.mark.slow
def test_processes_are_started_anew_and_warmed_once(monkeypatch, tmp_path, idle, sides):
    sides("a", once=True)
    sides("b", once=True)
    assert _main(monkeypatch, tmp_path, _case("processes"), "--rounds=2") == 0
    assert _lines(tmp_path) == [f"start {who}" for who in "aabab"]
    assert len(_written(tmp_path)["cases"][0]["runs"]["ours"]) == 2


@pytest.mark.slow
def test_extrapolated_seconds_are_added_and_marked(monkeypatch, tmp_path, idle, sides):
    sides("a")
    sides("b", extra_seconds=1000.0)
    assert _main(monkeypatch, tmp_path, _case("processes"), "--rounds=1") == 0
    row = _written(tmp_path)["cases"][0]
    assert row["extrapolated"] and 1000 < row["theirs_seconds"] < 1100
    assert row["ours_seconds"] < 100


def test_a_busy_machine_is_refused_in_one_line(
    monkeypatch, tmp_path, idle, sides, capsys
):
    idle.append(1.5)
    assert _main(monkeypatch, tmp_path, _case()) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "1.50 cores (cc1 7 most)" in said
    assert not (tmp_path / "out").exists()


def test_a_run_beside_a_neighbour_is_refused_too(
    monkeypatch, tmp_path, idle, sides, capsys
):
    sides("a")
    sides("b")
    idle.extend([0.0, 0.0, 0.7])
    assert _main(monkeypatch, tmp_path, _case()) == 2
    assert "0.70 cores" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_with_patience_a_disturbed_run_is_repeated(monkeypatch, tmp_path, idle, sides):
    sides("a")
    sides("b")
    idle.extend([0.9, 0.0, 0.05, 0.7])  # At first busy, then idle; b disturbed once.
    assert _main(monkeypatch, tmp_path, _case(), "--rounds=1", "--patience=5") == 0
    assert _lines(tmp_path) == ["start a", "start b", "a", "b", "b"]
    assert _written(tmp_path)["other_cores_worst"] == 0.05


def test_a_side_that_fails_is_one_line(monkeypatch, tmp_path, idle, sides, capsys):
    sides("a")
    sides("broken")
    assert _main(monkeypatch, tmp_path, _case(theirs=("broken",))) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "it does not fit" in said


def test_a_variant_without_a_compiler_is_left_out(monkeypatch, tmp_path, idle, sides):
    sides("a")
    sides("b")
    sides("broken")
    case = cases.Case(
        "fake",
        "units",
        "seconds",
        (cases.Side("plain", "a"),),
        (cases.Side("b", "b"), cases.Side("c", "broken", {"compiled": True})),
    )
    assert _main(monkeypatch, tmp_path, case, "--rounds=1") == 0
    assert [row["variant"] for row in _written(tmp_path)["cases"]] == ["b"]


@pytest.mark.parametrize("names", [[], ["--case=nonsense"]])
def test_an_unknown_case_lists_the_known(names, capsys):
    assert run.main(names) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nad_step" in said


def test_every_case_has_both_sides_and_tasks_that_exist():
    from benchmarks.ours.__main__ import TASKS as ours
    from benchmarks.theirs.__main__ import TASKS as theirs

    for case in cases.build().values():
        assert case.timing in cases.TIMINGS
        assert {side.task for side in case.ours} <= set(ours)
        assert {side.task for side in case.theirs} <= set(theirs)
        assert any("shipped" in side.variant for side in case.theirs[:1]) or (
            case.name == "help"
        )
