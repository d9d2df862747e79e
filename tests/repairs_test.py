# SPDX-License-Identifier: Apache-2.0
"""Rows of repairs; a teacher from a file is read first, and stays the same file."""

import contextlib
import dataclasses

import numpy as np
import pytest

from configs import efrap as efrap_config
from configs import nad as nad_config
from nad_jax import efrap_experiment, errors, nad_experiment, repairs, settings, zoo
from nad_jax import workdir as workdir_lib
from nad_jax.data import sources
from nad_jax.defenses import base, nad

# Variant of a config, the section with its repairs, and what runs it.
JOBS = {
    "nad": (nad_config.get_config("smoke"), "defense", nad_experiment),
    "efrap": (efrap_config.get_config("controls+smoke"), "repairs", efrap_experiment),
}


class CameToTheData(Exception):
    """What a run loads before it trains."""


@pytest.fixture(params=JOBS)
def run(request, tmp_path, monkeypatch):
    """Runs an experiment whose teacher is a file, as far as its data."""
    sections, name, experiment = JOBS[request.param]
    config = settings.parse(sections.to_dict())
    repairs = dataclasses.replace(getattr(config, name), teacher=str(tmp_path / "file"))
    config = dataclasses.replace(config, **{name: repairs})

    def load(*arguments, **options):
        raise CameToTheData

    monkeypatch.setattr(sources, "load", load)

    def run():
        workdir = workdir_lib.Workdir(tmp_path / "run", {})
        with contextlib.closing(workdir):
            experiment.run(config, workdir)

    return run


def test_a_file_that_is_no_model_is_refused_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "file").write_bytes(b"no model")
    with pytest.raises(errors.InputError, match="file"):
        run()


def test_another_file_in_the_same_workdir_is_refused(run, monkeypatch):
    hashes = iter(["1" * 64, "1" * 64, "2" * 64])
    monkeypatch.setattr(zoo, "read_net", lambda path: (None, next(hashes)))
    for _ in range(2):
        with pytest.raises(CameToTheData):
            run()
    with pytest.raises(errors.InputError, match="belongs to another teacher"):
        run()


@pytest.mark.parametrize(
    ("row", "radius", "has_logits"),
    [("nad", 0.0, False), ("nad_sam", 0.25, False), ("nad_sam_kd", 0.25, True)],
)
def test_the_rows_that_distil_differ_in_radius_and_logits(
    tmp_path, monkeypatch, row, radius, has_logits
):
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    logits = settings.LogitSettings(weight=0.5, temperature=3.0)
    defense = dataclasses.replace(
        config.defense, sharpness_radius=0.25, victim_logits=logits
    )
    net = base.Net(None, {"params": {"w": np.ones(2, np.float32)}})
    seen = {}

    def make_teacher(victim, data, tuning, **options):
        return base.Defended(victim.variables, ({"loss": 0.0},))

    def run(victim, data, tuning, nad_settings, **options):
        seen.update(options, radius=tuning.sharpness_radius)
        return base.Defended(victim.variables, ({"loss": 0.0},))

    monkeypatch.setattr(nad, "make_teacher", make_teacher)
    monkeypatch.setattr(nad, "run", run)
    with contextlib.closing(workdir_lib.Workdir(tmp_path / "run", {})) as workdir:
        patient = repairs.Patient("backdoored", 0, net, None, None)
        repairs.Stages(defense, workdir, patient).repair(row)
    assert seen["radius"] == radius
    assert seen["victim_logits"] == (logits if has_logits else None)


@pytest.mark.parametrize("field", ["weight", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_logits_that_cannot_count_are_refused_by_name(field, value):
    sections = nad_config.get_config("smoke").to_dict()
    sections["defense"]["victim_logits"][field] = value
    with pytest.raises(errors.InputError, match=f"victim_logits.{field} must be > 0"):
        settings.parse(sections)
