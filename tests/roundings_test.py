# SPDX-License-Identifier: Apache-2.0
"""The defender's images: a few of many, in no order."""

import contextlib
import dataclasses
import types

import jax
import numpy as np
import pytest

from nad_jax import roundings, settings
from nad_jax import workdir as workdir_lib
from nad_jax.data import sources
from nad_jax.defenses import flip_weight_choice, quantized_module
from nad_jax.report import schema

COUNT = 40


@pytest.mark.slow
def test_calibration_images_come_in_random_order_and_once_each():
    """A folder's images are stored class by class, and methods take them in batches."""
    images = np.broadcast_to(
        np.arange(COUNT, dtype=np.uint8)[:, None, None, None], (COUNT, 2, 2, 1)
    )
    data = sources.Dataset(images, np.zeros(COUNT, np.int32), 1, "counted")

    def rows(wanted, seed=0):
        drawn = roundings.calibration_images(data, wanted, jax.random.key(seed))
        assert drawn.dtype == np.float32 and drawn.shape[1:] == (2, 2, 1)
        return np.rint(np.asarray(drawn)[:, 0, 0, 0] * 255).astype(int).tolist()

    some = rows(20)
    assert len(set(some)) == 20 and some != sorted(some)
    assert some == rows(20) and some != rows(20, seed=1)
    assert rows(10) == some[:10]
    assert sorted(rows(10 * COUNT)) == list(range(COUNT))


def test_a_shortage_of_images_is_told_once_in_the_terminal_and_in_a_note():
    images = np.zeros((COUNT, 2, 2, 1), np.uint8)
    data = sources.Dataset(images, np.zeros(COUNT, np.int32), 1, "few")
    said = []
    workdir = types.SimpleNamespace(say=said.append)
    assert roundings.tell_shortage(data, COUNT, workdir) == [] == said
    (note,) = roundings.tell_shortage(data, 1024, workdir)
    assert said == [note] and "\n" not in note
    assert "on 40 images" in note and "asks for 1,024" in note


def test_codes_of_different_seeds_are_different_stages():
    """They are restored by the name of the stage."""
    folders = []

    class Workdir:
        def stage(self, name, like, compute, notes):
            folders.append(name)
            raise KeyboardInterrupt

    geometry = types.SimpleNamespace(kernel_shape=(1,))
    for seed in (1, -1):
        with pytest.raises(KeyboardInterrupt):
            roundings.quantize(
                settings.EfrapSettings(),
                "efrap",
                None,
                None,
                np.zeros((1, 2, 2, 1), np.float32),
                layers=[types.SimpleNamespace(name="dense", geometry=geometry)],
                key=jax.random.key(0),
                workdir=Workdir(),
                stage=f"efrap, clean, seed {seed}",
            )
    assert folders == ["efrap-clean-seed-1", "efrap-clean-seed--1"]


def test_a_chosen_flip_weight_is_of_the_defence_and_kept(tmp_path, monkeypatch):
    asked = []

    def choose(model, variables, images, **arguments):
        asked.append(arguments)
        return flip_weight_choice.Choice(0.03, {0.0: 0.25, 0.03: 0.5})

    monkeypatch.setattr(flip_weight_choice, "choose_flip_weight", choose)
    defense = settings.EfrapSettings(
        weight_bits=3, flip_unit="step", starts=("feedback",), fold_batch_norm=True
    )
    for _ in range(2):
        with contextlib.closing(workdir_lib.Workdir(tmp_path, {})) as workdir:
            choice, seconds = roundings.choose_flip_weight(
                defense,
                None,
                None,
                np.zeros((4, 2, 2, 1), np.float32),
                workdir=workdir,
                stage="flip weight, clean, seed 0",
            )
        assert choice == (0.03, {0.0: 0.25, 0.03: 0.5}) and seconds >= 0
    (arguments,) = asked
    assert arguments["weight_bits"] == 3 and arguments["flip_unit"] == "step"
    assert arguments["starts"] == ("feedback",) and arguments["fold_batch_norm"]


def test_a_report_holds_all_that_is_known_of_a_layer():
    """Under the same names, but for its own name, shape and width."""
    known = {
        "flip_rate": 0.25,
        "objective_nearest": 4.0,
        "objective": 3.0,
        "soft_output_error": 1.0,
        "hard_output_error": 2.0,
        "objective_descent": 2.5,
        "trace": (4.0, 3.0),
        "converged": True,
        "path": ({"flip_weight": 0.1, "output_error": 2.0, "flip_rate": 0.5},),
        "seconds": 0.5,
    }
    report = quantized_module.LayerReport("stem", (3, 2), 4, **known)
    result = types.SimpleNamespace(layers={"stem": report}, act_specs={})
    (entry,) = roundings.layer_entries(
        result, seed=3, row="adam", model_name="backdoored"
    )
    assert {key: entry[key] for key in known} == {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in known.items()
    }
    told = {"name", "kernel_shape", "bits", *known}
    assert told == {field.name for field in dataclasses.fields(report)}
    schema.validate(
        schema.build_report(
            title="t",
            config={},
            rows=[
                schema.Row(
                    *("adam", "backdoored", 3, 4, None, 0.5, None, None, 10),
                    *(None, 0.25, 0.5),
                )
            ],
            git_commit=None,
            versions={},
            devices=[],
            seconds={},
            layers=[entry],
        )
    )
