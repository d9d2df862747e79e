# SPDX-License-Identifier: Apache-2.0
"""What is in a workdir is true, and a second run builds on it."""

import contextlib
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, workdir


def test_lines_of_metrics_are_whole_and_in_order(tmp_path):
    run = workdir.Workdir(tmp_path / "run", {"a": 1})
    for step in range(3):
        run.record("epoch", step=step, loss=np.float32(0.5))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
    run.close()


def _keep(run, stage="work"):
    run.stage(stage, np.zeros(1), lambda: np.ones(1))


def test_another_configuration_is_refused_and_the_difference_named(tmp_path):
    run = workdir.Workdir(tmp_path, {"a": {"b": 1}, "c": (1, 2)})
    _keep(run)
    run.close()
    workdir.Workdir(tmp_path, {"a": {"b": 1}, "c": (1, 2)}).close()
    with pytest.raises(errors.InputError) as caught:
        workdir.Workdir(tmp_path, {"a": {"b": 2, "new": 3}, "d": None})
    assert (
        "(config.a.b was 1, now 2; config.a.new was absent, now 3; "
        "config.c was [1, 2], now absent; config.d was absent, now None)"
    ) in str(caught.value)
    # A refusal leaves no lock behind, and everything as it was.
    workdir.Workdir(tmp_path, {"a": {"b": 1}, "c": (1, 2)}).close()


def _commit(run):
    def compute():
        run.commits("part, seed 0").save(1, np.zeros(1), {})
        raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        run.stage("work", np.zeros(1), compute)


def test_a_folder_belongs_to_whom_it_keeps_something_of(tmp_path):
    """A command that failed on a typo may be repeated without it."""
    run = workdir.Workdir(tmp_path / "run", {"name": "typo"})
    run.check_input("data", "a" * 64)
    run.record("row", value=1)
    run.close()
    run = workdir.Workdir(tmp_path / "run", {"name": "right"})
    config = tmp_path / "run" / "config.json"
    assert json.loads(config.read_text("utf-8")) == {"name": "right"}
    # What another configuration has read binds nobody.
    run.check_input("data", "b" * 64)
    run.close()


@pytest.mark.parametrize("kept", ["stage", "commit", *workdir.RESULTS])
def test_whatever_is_kept_belongs_to_its_configuration(tmp_path, kept):
    run = workdir.Workdir(tmp_path, {"name": "one"})
    if kept in workdir.RESULTS:
        (tmp_path / kept).write_text("{}")
    else:
        {"stage": _keep, "commit": _commit}[kept](run)
    run.close()
    with pytest.raises(errors.InputError, match="config.name was 'one', now 'two'"):
        workdir.Workdir(tmp_path, {"name": "two"})
    workdir.Workdir(tmp_path, {"name": "one"}).close()


def test_another_file_under_the_same_name_is_refused(tmp_path):
    for _ in range(2):
        run = workdir.Workdir(tmp_path, {})
        run.check_input("checkpoint", "a" * 64)
        run.check_input("data", "b" * 64)
        run.close()
    run = workdir.Workdir(tmp_path, {})
    with pytest.raises(errors.InputError, match="belongs to another checkpoint .*aaa"):
        run.check_input("checkpoint", "c" * 64)
    run.check_input("data", "b" * 64)
    run.close()


def test_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.InputError, match="is damaged"):
        workdir.Workdir(tmp_path, {})


@pytest.mark.parametrize("content", ["{", "[1]", '{"checkpoint": 1}', "[" * 100_000])
def test_a_damaged_record_of_inputs_is_refused(tmp_path, content):
    (tmp_path / "inputs.json").write_text(content)
    run = workdir.Workdir(tmp_path, {})
    with pytest.raises(errors.InputError, match="inputs.json is damaged"):
        run.check_input("checkpoint", "a" * 64)
    run.close()


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
def test_a_record_that_cannot_be_read_is_one_line(tmp_path, monkeypatch, name):
    read_text = pathlib.Path.read_text

    def denied(path, *arguments):
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *arguments)

    (tmp_path / name).write_text("{}")
    monkeypatch.setattr(pathlib.Path, "read_text", denied)
    with pytest.raises(errors.InputError, match=f"cannot read .*{name}: Permission"):
        run = workdir.Workdir(tmp_path, {})
        with contextlib.closing(run):
            run.check_input("checkpoint", "a" * 64)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.InputError, match="cannot be written"):
        workdir.Workdir(tmp_path / "file" / "run", {})


def test_a_finished_stage_is_not_computed_again(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return {"x": jnp.arange(3.0)}

    like = {"x": jnp.zeros(3)}
    for _ in range(2):
        run = workdir.Workdir(tmp_path, {})
        result = run.stage("work", like, compute)
        np.testing.assert_array_equal(result["x"], [0.0, 1.0, 2.0])
        assert run.seconds["work"] >= 0
        run.close()
    assert len(calls) == 1


def test_a_damaged_stage_is_refused_in_one_line_and_not_used(tmp_path):
    run = workdir.Workdir(tmp_path, {})
    run.stage("work", {"x": jnp.zeros(500)}, lambda: {"x": jnp.arange(500.0)})
    damaged = 0
    for path in (tmp_path / "checkpoints").rglob("*"):
        if path.is_file() and path.stat().st_size > 200:
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 0xFF
            path.write_bytes(data)
            damaged += 1
    assert damaged
    with pytest.raises(errors.InputError) as caught:
        run.stage("work", {"x": jnp.zeros(500)}, lambda: pytest.fail("computed"))
    assert "\n" not in str(caught.value)
    run.close()


def test_a_stop_request_prevents_the_next_stage(tmp_path):
    run = workdir.Workdir(tmp_path, {}, should_stop=lambda: True)
    with pytest.raises(workdir.Interrupted):
        run.stage("work", {}, lambda: pytest.fail("computed"))
    run.close()


def test_two_processes_in_one_workdir_are_one_too_many(tmp_path):
    run = workdir.Workdir(tmp_path, {})
    run.record("row", value=1)
    with pytest.raises(errors.InputError, match=f"in use by process {os.getpid()} on"):
        workdir.Workdir(tmp_path, {})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 1
    run.close()
    workdir.Workdir(tmp_path, {}).close()


@pytest.mark.slow
def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = (
        "import os, sys; from nad_jax import workdir\n"
        "run = workdir.Workdir(sys.argv[1], {})\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    assert killed.returncode == -9 and (tmp_path / "lock").read_text()
    workdir.Workdir(tmp_path, {}).close()


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path):
    workdir.Workdir(tmp_path, {}).close()
    (tmp_path / ".report.json.0123456789ab.tmp").write_text("{")
    (tmp_path / "notes.tmp").write_text("the user's")
    run = workdir.Workdir(tmp_path, {})
    assert sorted(path.name for path in tmp_path.glob("*.tmp")) == ["notes.tmp"]
    (tmp_path / ".model.safetensors.01234567.tmp").write_text("at work")
    with pytest.raises(errors.InputError, match="in use"):
        workdir.Workdir(tmp_path, {})
    assert (tmp_path / ".model.safetensors.01234567.tmp").exists()
    run.close()


def test_lines_of_a_restored_stage_stand_where_they_stood(tmp_path):
    """Twice the same command: the same file, though nothing is computed again."""

    def compute(run):
        run.record("epoch", loss=0.1)
        return {"x": jnp.ones(2)}

    for _ in range(2):
        run = workdir.Workdir(tmp_path, {})
        run.record("row", name="before")
        run.stage("work", {"x": jnp.zeros(2)}, lambda run=run: compute(run))
        run.record("row", name="after")
        run.close()
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == ["row", "epoch", "row"]


def test_a_stage_is_not_charged_for_what_is_timed_apart(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(workdir.time, "perf_counter", lambda: now)

    def compute():
        nonlocal now
        now += 3.0
        with run.timed("evaluate"):
            now += 20.0
        now += 1.0
        return np.ones(1)

    run = workdir.Workdir(tmp_path, {})
    with run.timed("evaluate"):
        now += 100.0
    run.stage("work", np.zeros(1), compute)
    run.close()
    assert run.seconds == {"evaluate": 120.0, "work": 4.0}


def test_a_commit_brings_lines_and_seconds_back(tmp_path):
    """Lines after it are cut; parts that follow see those of the parts before."""
    like = np.zeros(1)

    def first(run):
        run.record("epoch", part=1)
        run.commits("one").save(1, like, {})
        run.record("epoch", part=2)
        run.commits("two").save(1, like, {"note": 3})
        run.record("epoch", part="lost")
        raise KeyboardInterrupt

    run = workdir.Workdir(tmp_path, {})
    run.record("row")
    with pytest.raises(KeyboardInterrupt):
        run.stage("work", like, lambda: first(run))
    run.close()

    def second(run):
        run.record("epoch", part="stale")
        assert run.commits("one").restore(like) is not None
        tree, metadata = run.commits("two").restore(like)
        assert metadata == {"note": 3}
        run.record("epoch", part=3)
        return tree

    run = workdir.Workdir(tmp_path, {})
    run.record("row")
    run.stage("work", like, lambda: second(run))
    run.close()
    lines = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [line.get("part") for line in lines] == [None, 1, 2, 3]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["work"]


def test_a_full_disk_is_one_line_and_what_was_committed_stays(tmp_path):
    run = workdir.Workdir(tmp_path, {})
    run.stage("work", np.zeros(1), lambda: np.ones(1))
    run._metrics.close()
    run._metrics = open("/dev/full", "wb")
    with pytest.raises(errors.InputError, match="No space left on device; what was"):
        run.record("row")
    run.close()
    run = workdir.Workdir(tmp_path, {})
    assert run.stage("work", np.zeros(1), pytest.fail) == np.ones(1)
    run.close()


def test_a_refused_command_leaves_the_metrics_of_a_finished_run(tmp_path):
    run = workdir.Workdir(tmp_path, {})
    run.check_input("checkpoint", "a" * 64)
    run.record("row", value=1)
    run.close()
    for value in (1, 2):
        run = workdir.Workdir(tmp_path, {})
        with pytest.raises(errors.InputError):
            run.check_input("checkpoint", "b" * 64)
        run.close()
        line = (tmp_path / "metrics.jsonl").read_text("utf-8")
        assert json.loads(line) == {"kind": "row", "value": value}
        run = workdir.Workdir(tmp_path, {})
        run.record("row", value=2)
        run.close()


def test_folders_of_different_numbers_are_different():
    numbers = [-1, 1, 0.1, 1.0, 10, 2**32 - 1]
    folders = [workdir.folder_name(f"efrap, clean, seed {n}") for n in numbers]
    assert len(set(folders)) == len(numbers)
    assert not any(set(folder) & set("/ ,") for folder in folders)


def _origin(commit, jaxlib="0.10.1", devices=2):
    return {"git_commit": commit, "versions": {"jaxlib": jaxlib}, "devices": devices}


def test_stages_know_every_run_that_had_a_part_in_them(tmp_path, capsys):
    like = np.zeros(1)

    def begin(run):
        run.commits("part").save(1, like, {})
        raise KeyboardInterrupt

    def go_on(run):
        return run.commits("part").restore(like)[0]

    origins = [_origin("a"), _origin("b"), _origin("c", devices=1)]
    for origin, compute in zip(origins, (begin, go_on, None), strict=True):
        run = workdir.Workdir(tmp_path, {}, origin=origin)
        with contextlib.suppress(KeyboardInterrupt):
            run.stage("work", like, lambda compute=compute, run=run: compute(run))
        run.close()
    assert run.origins() == [origins[2], *origins[:2]]
    said = capsys.readouterr().out
    # Another commit alone may well give the same bits.
    (warning,) = [line for line in said.splitlines() if line.startswith("warning:")]
    assert (
        "work was computed with jaxlib 0.10.1 on 2 devices, this is jaxlib 0.10.1 on 1"
    ) in warning


def test_a_part_has_one_name_and_needs_a_stage(tmp_path):
    run = workdir.Workdir(tmp_path, {})
    with pytest.raises(RuntimeError, match="no stage is open"):
        run.commits("part")

    def compute():
        run.commits("part")
        run.commits("part")

    with pytest.raises(RuntimeError, match="has a part 'part' already"):
        run.stage("work", np.zeros(1), compute)
    run.close()
