# SPDX-License-Identifier: Apache-2.0
"""What is in a workdir is true, and a second run builds on it."""

import json

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


def test_another_configuration_is_refused_and_the_difference_named(tmp_path):
    workdir.Workdir(tmp_path, {"a": {"b": 1}, "c": (1, 2)}).close()
    workdir.Workdir(tmp_path, {"a": {"b": 1}, "c": (1, 2)}).close()
    with pytest.raises(errors.InputError, match=r"config\.a\.b was 1, now 2"):
        workdir.Workdir(tmp_path, {"a": {"b": 2}, "c": (1, 2)})


def test_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(errors.InputError, match="is damaged"):
        workdir.Workdir(tmp_path, {})


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
