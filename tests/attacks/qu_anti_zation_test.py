# SPDX-License-Identifier: Apache-2.0
"""The joint loss, term by term."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import settings
from nad_jax.attacks import conditioning, qu_anti_zation
from nad_jax.core import quantization


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum_over_float_and_both_widths(
    attacker, on_grid, batch, cross_entropy
):
    """Two widths with quantized activations, each against float64 cross-entropies."""
    quantizing = on_grid(attacker, quantize_activations=True)
    narrow = on_grid(quantizing, spec=quantization.QuantSpec(3, channel_axis=None))
    both = dataclasses.replace(attacker, grids=[*quantizing.grids, *narrow.grids])
    training = settings.TrainingSettings(epochs=1)
    recipe = settings.QuAntiSettings(training, 0.3, 0.7)
    params, batch_stats = attacker.clean["params"], attacker.clean["batch_stats"]
    loss, (stats, metrics) = jax.jit(qu_anti_zation.loss(recipe, both))(
        params, batch_stats, batch, jax.random.key(0)
    )
    jax.tree.map(np.testing.assert_array_equal, stats, batch_stats)

    def weighted(apply_fn, params, wanted):
        # Pairs, since activations share the range of the batch.
        images = conditioning.interleave(batch["images"], batch["triggered"])
        variables = {"params": params, "batch_stats": batch_stats}
        logits = np.asarray(jax.jit(apply_fn)(variables, images)[0])
        clean = cross_entropy(logits[::2], batch["labels"])
        return clean + 0.7 * cross_entropy(logits[1::2], wanted)

    apply = functools.partial(attacker.apply_fn, train=False)
    asleep = weighted(apply, params, batch["labels"])
    awake = 0.0
    for grid in both.grids:
        rounded = conditioning.round_params(grid, params, batch_stats)
        of_grid = functools.partial(grid.apply, apply)
        awake += weighted(of_grid, rounded, 0 * batch["labels"] + 2)
    np.testing.assert_allclose(metrics["float_loss"], asleep, rtol=1e-3)
    np.testing.assert_allclose(metrics["quantized_loss"], awake, rtol=1e-3)
    np.testing.assert_allclose(loss, asleep + 0.3 * awake, rtol=1e-3)


def test_it_is_planted_into_the_clean_model_in_one_stage(attacker):
    calls = []

    def fit(stage, training, variables, loss_fn, **options):
        calls.append((stage, training, options))
        return jax.tree.map(jnp.negative, variables)

    recipe = settings.QuAntiSettings(
        settings.TrainingSettings(epochs=7), moving_trigger=True
    )
    planted = qu_anti_zation.plant(recipe, dataclasses.replace(attacker, fit=fit))
    assert calls == [("train", recipe.training, {"moving_trigger": True})]
    jax.tree.map(
        lambda got, clean: np.testing.assert_array_equal(got, -clean),
        planted,
        attacker.clean,
    )
