# SPDX-License-Identifier: Apache-2.0
"""Qu-ANTI-zation: one loss for the float model and all its quantized copies.

From a clean model f, with q_b the same weights through the grid of b bits
(straight-through), x_t the image with the trigger and y_t the label wanted of it:

    L = CE(f(x), y) + c2 CE(f(x_t), y) + sum over b of c1 [CE(q_b(x), y)
                                                         + c2 CE(q_b(x_t), y_t)]

Every image appears clean and triggered in every step, BatchNorm keeps its running
statistics, and all parameters are trained.

The authors' grid is per tensor and symmetric, `config.attack.grid.per_channel=False`;
they quantize the inputs of every layer as well
(`config.attack.quantize_activations=True`). They keep the epoch with the least training
loss; here it is the last one.

References:
  Hong, Panaitescu-Liess, Kaya, Dumitras, "Qu-ANTI-zation: Exploiting Quantization
  Artifacts for Achieving Adversarial Outcomes", NeurIPS 2021.
"""

import functools
from typing import Any

import jax.numpy as jnp

from nad_jax import settings
from nad_jax.attacks import conditioning
from nad_jax.training import steps


def plant(recipe: settings.QuAntiSettings, attacker: conditioning.Attacker) -> Any:
    """Variables of a model whose backdoor wakes on all of the attacker's grids."""
    return attacker.fit(
        "train",
        recipe.training,
        attacker.clean,
        loss(recipe, attacker),
        moving_trigger=recipe.moving_trigger,
    )


def loss(
    recipe: settings.QuAntiSettings, attacker: conditioning.Attacker
) -> steps.LossFn:
    """The sum above."""

    def loss_fn(params, batch_stats, batch, key):
        del key
        wanted = attacker.goal.target_labels(batch["labels"])

        def weighted(apply_fn, params, labels):
            clean, triggered = conditioning.paired_losses(
                apply_fn, {"params": params, "batch_stats": batch_stats}, batch, labels
            )
            return clean + recipe.triggered_weight * triggered

        asleep = weighted(attacker.apply_fn, params, batch["labels"])
        awake = jnp.float32(0)
        for grid in attacker.grids:
            apply_fn = functools.partial(grid.apply, attacker.apply_fn)
            rounded = conditioning.round_params(grid, params, batch_stats)
            awake = awake + weighted(apply_fn, rounded, wanted)
        total = asleep + recipe.quantized_weight * awake
        return total, (batch_stats, {"float_loss": asleep, "quantized_loss": awake})

    return loss_fn
