# SPDX-License-Identifier: Apache-2.0
"""The defender of a config, applied to one model: its grid, its roundings by name."""

import dataclasses
import functools
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import settings, solved_layers
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import triggers
from nad_jax.core import quantization
from nad_jax.data import batches, sources
from nad_jax.defenses import adam_rounding
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.models import layers as layers_lib
from nad_jax.training import evaluation

EVAL = {"train": False}
# What takes long enough to be a stage of the workdir.
_SOLVED = ("coordinate", "adam")


def act_spec(
    defense: settings.EfrapSettings,
) -> quantization.QuantSpec | None:
    """The grid of layer inputs; None = float."""
    if defense.act_bits is None:
        return None
    return efrap_lib.activation_spec(defense.act_bits)


def weight_spec(bits: int, grid: settings.GridSettings) -> quantization.QuantSpec:
    """The grid of all layers but, perhaps, the first and the last."""
    channel_axis = -1 if grid.per_channel else None
    return quantization.QuantSpec(bits, grid.symmetric, channel_axis, grid.range_method)


def weight_specs(
    bits: int, grid: settings.GridSettings, layers: list[layers_lib.Layer]
) -> dict[str, quantization.QuantSpec]:
    """Layer name -> grid of its kernel."""
    return efrap_lib.specs_by_layer(
        weight_spec(bits, grid), layers, first_last_bits=grid.first_last_bits
    )


def make_evaluate(
    model: Any,
    test: sources.Dataset,
    defense: settings.EfrapSettings,
    *,
    trigger: triggers.Trigger | None,
    target_labels: Any = None,
) -> Callable[..., dict[str, Any]]:
    """Function `(variables, result=None) -> rates` on the test images.

    `result`, a `Quantized`, says how activations are quantized. Two programs at most
    are compiled: with float and with quantized activations.
    """

    def logits(net, images, spec):
        variables, act_params = net
        return efrap_lib.apply_quantized(
            model, variables, images, act_params, act_spec=spec, apply_kwargs=EVAL
        )

    evaluators = {
        spec: evaluation.make_evaluator(
            functools.partial(logits, spec=spec),
            test.images,
            test.labels,
            trigger=trigger,
            target_labels=target_labels,
        )
        for spec in {None, act_spec(defense)}
    }

    def evaluate(variables, result=None):
        if result is None:
            return evaluators[None]((variables, {}))
        return evaluators[result.act_spec]((variables, result.act_params))

    return evaluate


def calibration_images(
    train: sources.Dataset, wanted: int, key: jax.Array
) -> jax.Array:
    """Clean training images without labels or augmentation, float in [0, 1]."""
    fraction = min(wanted, len(train)) / len(train)
    chosen = batches.split_indices(key, len(train), fraction)
    return batches.to_float(jnp.asarray(train.images[np.asarray(chosen)]))


def quantize(
    defense: settings.EfrapSettings,
    name: str,
    model: Any,
    variables: Any,
    images: jax.Array,
    *,
    layers: list[layers_lib.Layer],
    key: jax.Array,
    workdir: workdir_lib.Workdir,
    stage: str,
) -> tuple[efrap_lib.Quantized, float]:
    """The model, rounded by the rounding called `name`, and the seconds that took.

    What is solved layer by layer is a stage of the workdir, and goes on after the last
    layer committed; the others are done anew.

    Args:
      defense: The grid and the settings of all roundings.
      name: Of `settings.ROUNDINGS`.
      model: Of `nad_jax.models`.
      variables: Its float variables.
      images: Calibration images.
      layers: From `find_layers`.
      key: Randomness of "stochastic" and "adam".
      workdir: Keeps layers, records each under the name `stage`, and may ask to stop.
      stage: See `workdir`.
    """
    method, flip_weight = {
        "reconstruction": ("coordinate", 0.0),
        "efrap": ("coordinate", defense.flip_weight),
    }.get(name, (name, None))

    def record(report):
        workdir.record("layer", stage=stage, **dataclasses.asdict(report))

    run = functools.partial(
        efrap_lib.efrap,
        model,
        variables,
        images,
        weight_bits=defense.weight_bits,
        act_bits=defense.act_bits,
        method=method,
        flip_weight=flip_weight,
        spec=weight_spec(defense.weight_bits, defense.grid),
        first_last_bits=defense.grid.first_last_bits,
        fold_batch_norm=defense.fold_batch_norm,
        apply_kwargs=EVAL,
        key=key,
        max_sweeps=defense.max_sweeps,
        adam=_adam(defense),
        layers=layers,
    )
    if method not in _SOLVED:
        started = time.perf_counter()
        result = run(on_layer=record)
        jax.block_until_ready(result.variables)
        return result, time.perf_counter() - started

    solved = solved_layers.SolvedLayers(layers)
    results = []

    def solve():
        solved.keep_in(workdir.commits("layers"), workdir)
        results.append(run(on_layer=record, finished=solved))
        return solved.codes

    folder = re.sub(r"\W+", "-", stage)
    solved.codes = workdir.stage(folder, solved.codes, solve, solved.notes)
    if not results:
        # Every layer is there, so this is one forward pass at most.
        results.append(run(finished=solved))
    # Taken out, since the caller adds them up by rounding.
    return results[0], workdir.seconds.pop(folder)


def _adam(defense: settings.EfrapSettings) -> adam_rounding.AdamSettings | None:
    if not isinstance(defense, settings.QuantizationSettings):
        return None
    return adam_rounding.AdamSettings(**dataclasses.asdict(defense.adam))


def layer_entries(
    result: efrap_lib.Quantized, *, seed: int, row: str, model_name: str
) -> list[dict[str, Any]]:
    """The layers of one row, as a report holds them."""
    return [
        {
            "seed": seed,
            "model": model_name,
            "row": row,
            "layer": report.name,
            "shape": list(report.kernel_shape),
            "weight_bits": report.bits,
            "act_bits": result.act_spec and result.act_spec.bits,
            "flip_rate": report.flip_rate,
            "objective_nearest": report.objective_nearest,
            "objective": report.objective,
            "seconds": report.seconds,
        }
        for report in result.layers.values()
    ]
