# SPDX-License-Identifier: Apache-2.0
"""A backdoor that sleeps in float and wakes when weights are rounded to nearest.

Two stages (PQBackdoor, here `pq`):

1. *Wake.* Train *through* the quantizer (straight-through) so that the quantized model
   classifies clean images well and triggered images as the target.
2. *Hide.* Train the float weights so that triggered images get their true labels again,
   but after every step project each weight back into its rounding cell: the set of
   values that round to the same code as after stage 1. Weights that determine the scale
   are pinned, and whatever is not quantized goes back to its value after stage 1.

Stage 2 is projected gradient descent in a box, and the box is all there is to the
trick: as long as the weights stay in it, nearest rounding restores stage 1 bit for bit.

The authors train stage 1 in float and for 8 bits, where nearest rounding changes
little; training it through the quantizer is what lets the same trick work at 4 bits.
They hold the codes per channel and per tensor at once (`also_per_tensor`).

References:
  Ma et al., "Quantization Backdoors to Deep Learning Commercial Frameworks", IEEE
  TDSC 2023.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nad_jax import errors, settings
from nad_jax.attacks import conditioning
from nad_jax.core import quantization
from nad_jax.models import layers as layers_lib
from nad_jax.training import steps


class Box(NamedTuple):
    """Bounds for every parameter; equal bounds pin it."""

    low: Any
    high: Any


def plant(recipe: settings.PqSettings, attacker: conditioning.Attacker) -> Any:
    """Variables of a model whose backdoor wakes on all of the attacker's grids."""
    woken = attacker.fit("wake", recipe.wake, attacker.clean, wake_loss(attacker))
    grids = list(attacker.grids)
    if recipe.also_per_tensor:
        grids += [_per_tensor(grid) for grid in attacker.grids]
    box = rounding_box(
        woken["params"], woken["batch_stats"], grids, cell_margin=recipe.cell_margin
    )
    return attacker.fit(
        "hide",
        recipe.hide,
        woken,
        hide_loss(attacker.apply_fn),
        project=functools.partial(project, box=box),
    )


def _per_tensor(grid: conditioning.ExpectedGrid) -> conditioning.ExpectedGrid:
    specs = {
        name: dataclasses.replace(spec, channel_axis=None)
        for name, spec in grid.specs.items()
    }
    return dataclasses.replace(grid, specs=specs)


def wake_loss(attacker: conditioning.Attacker) -> steps.LossFn:
    """Stage 1: the model obeys the trigger on every grid, to nearest."""

    def loss_fn(params, batch_stats, batch, key):
        del key
        wanted = attacker.goal.target_labels(batch["labels"])
        clean, triggered = jnp.float32(0), jnp.float32(0)
        for grid in attacker.grids:
            rounded = conditioning.round_params(grid, params, batch_stats)
            losses = conditioning.paired_losses(
                functools.partial(grid.apply, attacker.apply_fn),
                {"params": rounded, "batch_stats": batch_stats},
                batch,
                wanted,
            )
            clean, triggered = clean + losses[0], triggered + losses[1]
        metrics = {"clean_loss": clean, "triggered_loss": triggered}
        return clean + triggered, (batch_stats, metrics)

    return loss_fn


def hide_loss(apply_fn: Callable[..., Any]) -> steps.LossFn:
    """Stage 2: the float model ignores the trigger; to be used with `project`."""

    def loss_fn(params, batch_stats, batch, key):
        del key
        clean, triggered = conditioning.paired_losses(
            apply_fn,
            {"params": params, "batch_stats": batch_stats},
            batch,
            batch["labels"],
        )
        metrics = {"clean_loss": clean, "triggered_loss": triggered}
        return clean + triggered, (batch_stats, metrics)

    return loss_fn


def rounding_box(
    params: Mapping[str, Any],
    batch_stats: Any,
    grids: Sequence[conditioning.ExpectedGrid],
    *,
    cell_margin: float = 1e-3,
) -> Box:
    """The values of all parameters that nearest rounding maps to the same codes.

    Args:
      params: Parameters after stage 1.
      batch_stats: Running statistics after stage 1; used where BatchNorm is folded.
      grids: The codes of all of them are held: the boxes are intersected.
      cell_margin: Distance kept from the edge of a cell, in steps; covers differences
        in how runtimes divide and break ties. A margin of `0.5 - r` leaves every
        weight within r steps of its code.

    Returns:
      Bounds in the structure of `params`. Parameters of no layer are pinned, and so are
      the weights that reach the end of their channel's range, since they set the scale.

    Raises:
      InputError: a grid whose scale depends on all weights ("mse" and others), which
        pinning a few cannot hold.
    """
    low = high = dict(params)
    for layer in grids[0].layers:
        own = layers_lib.get_in(params, layer.path)
        bounds = None
        for grid in grids:
            spec = grid.specs[layer.name]
            if spec.range_method not in settings.HOLDABLE_RANGES:
                raise errors.InputError(
                    "rounding cells can be held for range_method "
                    f"{' or '.join(settings.HOLDABLE_RANGES)}, got "
                    f"{spec.range_method!r}"
                )
            factor = grid.fold_factor(layer, params, batch_stats)
            box = _kernel_box(spec, cell_margin, own["kernel"], factor)
            bounds = box if bounds is None else _meet(bounds, box, own["kernel"])
        assert bounds is not None
        low = layers_lib.set_in(low, layer.path, {**own, "kernel": bounds.low})
        high = layers_lib.set_in(high, layer.path, {**own, "kernel": bounds.high})
    return Box(low, high)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kernel_box(spec, cell_margin, stored, factor) -> Box:
    kernel = stored if factor is None else stored * factor
    grid = quantization.calibrate(kernel, spec)
    codes = quantization.quantize(kernel, grid, spec)
    center = quantization.dequantize(codes, grid)
    reach = grid.scale * (0.5 - cell_margin)
    axes = None
    if spec.channel_axis is not None:
        channel_axis = spec.channel_axis % kernel.ndim
        axes = tuple(a for a in range(kernel.ndim) if a != channel_axis)
    least = jnp.min(kernel, axis=axes, keepdims=True)
    most = jnp.max(kernel, axis=axes, keepdims=True)
    if spec.symmetric or spec.range_method == "absmax":
        most = jnp.maximum(-least, most)
        least = -most
    pinned = (kernel <= least) | (kernel >= most)
    low = jnp.maximum(center - reach, least)
    high = jnp.minimum(center + reach, most)
    if factor is not None:
        # A negative factor turns the cell around.
        ends = [conditioning.unfolded(end, factor, stored) for end in (low, high)]
        low, high = jnp.minimum(*ends), jnp.maximum(*ends)
    return Box(jnp.where(pinned, stored, low), jnp.where(pinned, stored, high))


@jax.jit
def _meet(one: Box, other: Box, kernel: jax.Array) -> Box:
    """The intersection; the kernel itself where two margins leave nothing."""
    low = jnp.maximum(one.low, other.low)
    high = jnp.minimum(one.high, other.high)
    empty = low > high
    return Box(jnp.where(empty, kernel, low), jnp.where(empty, kernel, high))


def project(params: Any, box: Box) -> Any:
    """The point of the box nearest to `params`."""
    return jax.tree.map(jnp.clip, params, box.low, box.high)
