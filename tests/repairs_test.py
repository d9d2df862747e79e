# SPDX-License-Identifier: Apache-2.0
"""A teacher from a file costs no training if it is bad, and stays the same file."""

import contextlib
import dataclasses

import pytest

from configs import efrap as efrap_config
from configs import nad as nad_config
from nad_jax import efrap_experiment, errors, nad_experiment, settings, zoo
from nad_jax import workdir as workdir_lib
from nad_jax.data import sources

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
