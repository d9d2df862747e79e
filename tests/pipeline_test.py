# SPDX-License-Identifier: Apache-2.0
"""A report tells of all the code that its numbers come from."""

import contextlib
import dataclasses

import numpy as np
import pytest

from configs import efrap as config_file
from nad_jax import errors, pipeline, settings, workdir
from nad_jax.report import schema

CONFIG = settings.parse(config_file.get_config("smoke").to_dict())
_ROW = schema.Row(
    name="float",
    model="backdoored",
    seed=0,
    weight_bits=None,
    act_bits=None,
    acc=0.5,
    asr=None,
    ra=None,
    acc_count=2,
    asr_count=None,
    flip_rate=None,
    seconds=0.0,
)


def _origin(commit):
    return {"git_commit": commit, "versions": {"jaxlib": "0.10.1"}, "devices": 1}


def _report(path, earlier=None):
    run = workdir.Workdir(path, dataclasses.asdict(CONFIG), origin=_origin("now"))
    with contextlib.closing(run):
        if earlier is not None:
            like = np.zeros(2)
            config = dataclasses.replace(CONFIG, victim_workdir=str(earlier))
            restored = pipeline.EarlierRun(config, run).stage("work", like, None)
            assert restored.tolist() == [1.0, 1.0]
        return pipeline.write_report(
            CONFIG,
            run,
            rows=[_ROW],
            claims=(),
            canary={"passed": True},
            figures=None,
        )


@pytest.mark.slow
def test_stages_of_another_commit_are_told_of(tmp_path):
    assert "made_by" not in _report(tmp_path / "alone")
    with contextlib.closing(
        workdir.Workdir(
            tmp_path / "earlier", dataclasses.asdict(CONFIG), origin=_origin("then")
        )
    ) as run:
        run.stage("work", np.zeros(2), lambda: np.ones(2))
    report = _report(tmp_path / "late", tmp_path / "earlier")
    assert report["made_by"] == [_origin("now"), _origin("then")]
    assert any("2 setups" in note for note in report["notes"])
    assert not list((tmp_path / "earlier").rglob("*.tmp"))


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, "one", True])
def test_a_trigger_is_drawn_from_a_seed_that_is_one(seed):
    choice = settings.TriggerSettings("blend", {"alpha": 0.5, "seed": seed})
    with pytest.raises(errors.InputError, match="config.attack.trigger.seed must be 0"):
        pipeline.build_trigger(choice, (4, 4, 1))


def test_where_there_is_no_checkout_the_variable_names_the_commit(monkeypatch):
    monkeypatch.setenv("NAD_JAX_COMMIT", "0123")
    unknown = pipeline.git_commit.__wrapped__
    monkeypatch.setenv("PATH", "")
    assert unknown() == "0123"
    monkeypatch.delenv("NAD_JAX_COMMIT")
    assert unknown() is None


def test_the_origin_is_what_numbers_depend_on():
    origin = pipeline.origin()
    assert origin["versions"]["jaxlib"] and origin["devices"] >= 1
    assert origin["git_commit"] == pipeline.git_commit()
