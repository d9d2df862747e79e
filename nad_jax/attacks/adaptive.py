# SPDX-License-Identifier: Apache-2.0
"""Two attackers who know EFRAP; both are weight projection with one thing changed.

`adaptive_eot` trains for the expectation over roundings. EFRAP turns weights away from
nearest, so in both stages a freshly drawn rounding (all flipped, or stochastic, with
equal chances) has to obey the trigger as well, while the float model must not:

    wake    nearest -> target  +  w E over roundings of [rounded -> target]
    hide    float -> true      +  w E over roundings of [rounded -> target]

`adaptive_small_error` leaves nothing to hold on to. EFRAP pays for weights by their
rounding error, so stage 2 keeps every weight within `largest_error` steps of its code:
flipping one costs nearly a whole step and wins next to nothing.

References:
  Athalye et al., "Synthesizing Robust Adversarial Examples", ICML 2018 (expectation
  over transformations).
  Li et al., "Nearest is Not Dearest", CVPR 2024 (the defence they know).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import settings
from nad_jax.attacks import conditioning, projection
from nad_jax.core import quantization, rounding
from nad_jax.models import layers as layers_lib
from nad_jax.training import steps


def plant_eot(
    recipe: settings.AdaptiveEotSettings, attacker: conditioning.Attacker
) -> Any:
    """Variables of a model trained against flipped and stochastic roundings."""
    woken = attacker.fit(
        "wake",
        recipe.wake,
        attacker.clean,
        with_drawn_roundings(
            projection.wake_loss(attacker), attacker, recipe.drawn_weight
        ),
    )
    box = projection.rounding_box(
        woken["params"],
        woken["batch_stats"],
        attacker.grids,
        cell_margin=recipe.cell_margin,
    )
    return attacker.fit(
        "hide",
        recipe.hide,
        woken,
        with_drawn_roundings(
            projection.hide_loss(attacker.apply_fn), attacker, recipe.drawn_weight
        ),
        project=functools.partial(projection.project, box=box),
    )


def with_drawn_roundings(
    loss: steps.LossFn, attacker: conditioning.Attacker, weight: float
) -> steps.LossFn:
    """`loss` plus `weight` times the loss of a drawn rounding that obeys the trigger.

    Args:
      loss: Of one stage.
      attacker: Its grids are rounded on.
      weight: Of the expectation over roundings, >= 0.
    """

    def loss_fn(params, batch_stats, batch, key):
        total, (_, metrics) = loss(params, batch_stats, batch, key)
        wanted = attacker.goal.target_labels(batch["labels"])
        drawn = jnp.float32(0)
        for number, grid in enumerate(attacker.grids):
            rounded = conditioning.round_params(
                grid,
                params,
                batch_stats,
                round_kernel=drawn_rounding(
                    jax.random.fold_in(key, number), grid.layers
                ),
            )
            drawn = drawn + sum(
                conditioning.paired_losses(
                    functools.partial(grid.apply, attacker.apply_fn),
                    {"params": rounded, "batch_stats": batch_stats},
                    batch,
                    wanted,
                )
            )
        return total + weight * drawn, (batch_stats, {**metrics, "drawn_loss": drawn})

    return loss_fn


def drawn_rounding(
    key: jax.Array, layers: Sequence[layers_lib.Layer]
) -> conditioning.RoundKernel:
    """One draw for a whole model: all weights flipped, or all stochastic.

    Gradients: straight-through.
    """
    kind_key, threshold_key = jax.random.split(key)
    is_flipped = jax.random.bernoulli(kind_key)
    # Drawn in one go: a generator for each layer would take minutes to compile.
    ends = np.cumsum([math.prod(layer.geometry.kernel_shape) for layer in layers])
    draws = jax.random.uniform(threshold_key, (int(ends[-1]),), jnp.float32)
    thresholds = jnp.split(draws, ends[:-1].tolist())

    def round_kernel(kernel, grid, spec, index):
        placement = rounding.place(kernel, grid, spec)
        chosen = jnp.where(
            is_flipped,
            rounding.flipped_rounding(placement),
            rounding.threshold_rounding(
                thresholds[index].reshape(kernel.shape), placement
            ),
        )
        on_grid = rounding.rounded_weights(placement, chosen, grid)
        return quantization.straight_through(kernel, on_grid.astype(kernel.dtype))

    return round_kernel


def plant_small_error(
    recipe: settings.SmallErrorSettings, attacker: conditioning.Attacker
) -> Any:
    """Variables of a model whose weights all lie close to their codes."""
    return projection.plant(
        settings.PqSettings(
            wake=recipe.wake, hide=recipe.hide, cell_margin=0.5 - recipe.largest_error
        ),
        attacker,
    )
