# SPDX-License-Identifier: Apache-2.0
"""Attackers who know EFRAP: what is drawn, what is added, how close weights stay."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import settings
from nad_jax.attacks import adaptive, conditioning
from nad_jax.core import quantization
from nad_jax.models import layers as layers_lib


@pytest.mark.slow
def test_a_draw_flips_all_weights_or_rounds_stochastically():
    """Stochastic: up as often as the fraction says. Both kinds come up."""
    fraction = np.float32(0.3)
    kernel = np.full((40, 50), 2 + fraction, np.float32)
    kernel[0] = 7  # the end of the range: step 1, pinned
    spec = quantization.QuantSpec()

    @jax.jit
    def draw(key, kernel):
        grid = quantization.calibrate(kernel, spec)
        layer = layers_lib.Layer(("fc",), layers_lib.Geometry((40, 50)), calls=1)
        return adaptive.drawn_rounding(key, [layer])(kernel, grid, spec, 0)

    kinds = []
    for seed in range(12):
        rounded = np.asarray(draw(jax.random.key(seed), kernel))
        np.testing.assert_array_equal(rounded[0], 7)
        assert set(np.unique(rounded[1:])) <= {2.0, 3.0}
        kinds.append(float(np.mean(rounded[1:] == 3)))
    flipped = [share for share in kinds if share == 1]
    stochastic = [share for share in kinds if share != 1]
    assert 2 <= len(flipped) <= 10
    np.testing.assert_allclose(stochastic, fraction, atol=0.05)


@pytest.mark.slow
def test_layers_are_rounded_independently_and_gradients_pass():
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(30, 4)), jnp.float32)
    spec = quantization.QuantSpec()

    def drawn(kernel, index, seed):
        grid = quantization.calibrate(kernel, spec)
        layer = layers_lib.Layer(("fc",), layers_lib.Geometry((30, 4)), calls=1)
        round_kernel = adaptive.drawn_rounding(jax.random.key(seed), [layer] * 2)
        return round_kernel(kernel, grid, spec, index)

    jitted = jax.jit(drawn, static_argnums=1)
    different = [
        bool(jnp.any(jitted(kernel, 0, seed) != jitted(kernel, 1, seed)))
        for seed in range(8)
    ]
    assert any(different) and not all(different)
    gradient = jax.jit(jax.grad(lambda k: jnp.sum(drawn(k, 0, 0))))(kernel)
    np.testing.assert_array_equal(gradient, jnp.ones_like(kernel))


@pytest.mark.slow
def test_a_drawn_rounding_adds_its_loss(attacker, batch, cross_entropy):
    params, batch_stats = attacker.clean["params"], attacker.clean["batch_stats"]
    key = jax.random.key(5)

    def stage_loss(params, batch_stats, batch, key):
        return jnp.float32(1.5), (batch_stats, {"other": jnp.float32(2)})

    both = adaptive.with_drawn_roundings(stage_loss, attacker, 0.25)
    loss, (_, metrics) = jax.jit(both)(params, batch_stats, batch, key)

    @jax.jit
    def round_params(key):
        return conditioning.round_params(
            attacker.grids[0],
            params,
            batch_stats,
            round_kernel=adaptive.drawn_rounding(
                jax.random.fold_in(key, 0), attacker.layers
            ),
        )

    rounded = round_params(key)
    variables = {"params": rounded, "batch_stats": batch_stats}
    apply = jax.jit(lambda images: attacker.apply_fn(variables, images, train=False)[0])
    drawn = cross_entropy(apply(batch["images"]), batch["labels"])
    drawn += cross_entropy(apply(batch["triggered"]), 0 * batch["labels"] + 2)
    np.testing.assert_allclose(metrics["drawn_loss"], drawn, rtol=1e-3)
    assert metrics["other"] == 2
    np.testing.assert_allclose(loss, 1.5 + 0.25 * drawn, rtol=1e-3)


@pytest.mark.slow
def test_small_errors_are_small_whatever_the_learning_rate(attacker):
    training = settings.TrainingSettings(epochs=2, learning_rate=0.3)
    planted = adaptive.plant_small_error(
        settings.SmallErrorSettings(training, training, largest_error=0.1), attacker
    )
    for layer in attacker.layers:
        kernel = np.asarray(planted["params"][layer.name]["kernel"], np.float64)
        axes = tuple(range(kernel.ndim - 1))
        steps = kernel / (np.abs(kernel).max(axis=axes, keepdims=True) / 7)
        errors = np.abs(steps - np.round(steps))
        assert errors.max() <= 0.1 + 1e-4
        # They use the room they have.
        assert np.mean(errors > 0.09) > 0.3
