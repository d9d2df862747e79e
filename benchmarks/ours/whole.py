# SPDX-License-Identifier: Apache-2.0
"""Whole repairs, from a checkpoint and images to a checkpoint."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from benchmarks import protocol
from benchmarks.ours import files, start
from configs import vet
from nad_jax import settings
from nad_jax.core import quantization
from nad_jax.data import batches
from nad_jax.defenses import base, nad
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.interop import name_maps
from nad_jax.training import sharding

_VICTIM = "victim"


def erase(channel: protocol.Channel, options: dict) -> None:
    """NAD with the recipe of configs/vet.py on all of the clean images."""
    facts = start.facts()
    folder = pathlib.Path(options["work"])
    config = recipe_of_vet()
    training, recipe = config.training, config.nad
    if "epochs" in options:
        training = dataclasses.replace(training, epochs=options["epochs"])
        recipe = dataclasses.replace(recipe, teacher_epochs=options["teacher_epochs"])
    net = files.read_net(folder / _VICTIM, "wrn_16_1")
    images, labels = files.read_data(options["work"], "clean")
    defended = nad.run(
        base.Net(net.model, net.variables),
        base.CleanData(images, labels, images[:0], labels[:0]),
        settings.TuningSettings(training, patience=config.patience),
        recipe,
        key=jax.random.key(config.seed),
    )
    arrays = name_maps.as_found(defended.variables, net.names)
    safetensors.numpy.save_file(arrays, folder / "ours_repaired")
    channel.ready(
        file="ours_repaired",
        epochs=training.epochs,
        teacher_epochs=recipe.teacher_epochs,
        **facts,
    )


def recipe_of_vet() -> settings.VetSettings:
    """configs/vet.py."""
    sections = vet.get_config().to_dict()
    # Parsing wants a checkpoint and nothing here reads that one.
    config = settings.parse({**sections, "checkpoint": _VICTIM})
    assert isinstance(config, settings.VetSettings)
    return config


def efrap(channel: protocol.Channel, options: dict) -> None:
    """4 bits, 8 in the first and last layer, on the grid of the reference."""
    facts = start.facts()
    folder = pathlib.Path(options["work"])
    net = files.read_net(folder / _VICTIM, options["arch"])
    images, _ = files.read_data(options["work"], "clean")
    calibration = batches.to_float(jnp.asarray(images[: options["images"]]))
    result = efrap_lib.efrap(
        net.model,
        net.variables,
        calibration,
        weight_bits=4,
        first_last_bits=8,
        spec=quantization.QuantSpec(symmetric=False, range_method="mse"),
        apply_kwargs={"train": False},
        mesh=sharding.mesh_for_batch(options["images"]),
    )
    arrays = name_maps.as_found(result.variables, net.names)
    safetensors.numpy.save_file(
        {name: np.ascontiguousarray(array) for name, array in arrays.items()},
        folder / "ours_rounded",
    )
    channel.ready(file="ours_rounded", **facts)
