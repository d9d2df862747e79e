# SPDX-License-Identifier: Apache-2.0
"""The models of a finished run of `configs/efrap.py`, for scripts that use them."""

import json
import pathlib
from typing import Any

import jax

from nad_jax import efrap_experiment, settings
from nad_jax.models import common
from nad_jax.training import checkpoints


def read(
    workdir: pathlib.Path,
) -> tuple[settings.ExperimentSettings, efrap_experiment.Scene]:
    """What the run was told, and what its seeds shared."""
    config = settings.parse(json.loads((workdir / "config.json").read_text("utf-8")))
    assert isinstance(config, settings.ExperimentSettings), config.job
    return config, efrap_experiment.set_scene(config)


def variables(
    workdir: pathlib.Path, scene: efrap_experiment.Scene, seed: int, name: str
) -> Any:
    """Float variables of the model "clean" or "backdoored" of a seed."""
    like = common.init(scene.model, jax.random.key(0), scene.train.images.shape[1:])
    folder = workdir / "checkpoints" / f"seed{seed}-{name}"
    return checkpoints.restore(folder, like)[0]
