# SPDX-License-Identifier: Apache-2.0
"""Grids that an attacker expects, labels they want, batches they train on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import settings
from nad_jax.attacks import conditioning, projection, triggers
from nad_jax.core import quantization
from nad_jax.data import batches
from nad_jax.models import layers as layers_lib


def test_goals_name_the_labels_the_attacker_wants(attacker):
    labels = jnp.asarray([0, 1, 2], jnp.int32)
    every = dataclasses.replace(attacker.goal, label_mode="all_to_all")
    np.testing.assert_array_equal(attacker.goal.target_labels(labels), [2, 2, 2])
    np.testing.assert_array_equal(every.target_labels(labels), [1, 2, 0])


@pytest.mark.slow
@pytest.mark.parametrize("fold", [False, True])
def test_rounded_parameters_are_on_the_grid_and_pass_gradients_through(
    attacker, on_grid, fold
):
    """Where BatchNorm is folded, kernel times factor is on the grid."""
    attacker = on_grid(attacker, fold_batch_norm=fold)
    params, batch_stats = attacker.clean["params"], attacker.clean["batch_stats"]

    def loss(params):
        rounded = conditioning.round_params(attacker.grids[0], params, batch_stats)
        # A different slope for every weight.
        return sum(
            jnp.sum(leaf * jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape))
            for name in ("conv", "inner", "fc")
            for leaf in [rounded[name]["kernel"]]
        ), rounded

    (_, rounded), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert jax.tree.structure(rounded) == jax.tree.structure(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(rounded):
        layer, name = (key.key for key in path)
        expected = np.asarray(params[layer][name], np.float64)
        if layer in ("conv", "inner", "fc") and name == "kernel":
            factor = 1.0
            if fold and layer == "conv":
                variance = np.asarray(batch_stats["norm"]["var"], np.float64)
                scale = np.asarray(params["norm"]["scale"], np.float64)
                factor = scale / np.sqrt(variance + 1e-5)
            axes = tuple(range(expected.ndim - 1))
            step = np.abs(expected * factor).max(axis=axes, keepdims=True) / 7
            expected = step * np.round(expected * factor / step) / factor
            # Weights at the very end of the range count as inside it.
            np.testing.assert_allclose(
                gradient[layer][name],
                np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape),
                rtol=1e-5,
                atol=1e-5,
            )
        np.testing.assert_allclose(leaf, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def with_dead_channel(attacker, on_grid):
    """Grid per tensor with BatchNorm folded, and variables with a scale of 0.

    The kernel of that channel is the largest, so it would decide the range.
    """
    spec = quantization.QuantSpec(channel_axis=None)
    grid = on_grid(attacker, fold_batch_norm=True, spec=spec).grids[0]
    params = attacker.clean["params"]
    norm = {**params["norm"], "scale": jnp.asarray([0.0, -0.5, 2.0])}
    kernel = params["conv"]["kernel"].at[..., 0].multiply(100.0)
    conv = {**params["conv"], "kernel": kernel}
    return grid, {**attacker.clean, "params": {**params, "norm": norm, "conv": conv}}


@pytest.mark.slow
def test_an_attacker_folds_as_the_defender_does(with_dead_channel):
    """Channels that BatchNorm switches off decide no range, and stay as they are."""
    grid, variables = with_dead_channel
    params, batch_stats = variables["params"], variables["batch_stats"]
    spec = grid.specs["conv"]

    def folded(params):
        variables = {"params": params, "batch_stats": batch_stats}
        folded = layers_lib.fold_batch_norm(variables, list(grid.layers))
        return folded["params"]["conv"]["kernel"]

    kernel = params["conv"]["kernel"]
    factor = grid.fold_factor(grid.layers[0], params, batch_stats)
    np.testing.assert_array_equal(kernel * factor, folded(params))
    rounded = conditioning.round_params(grid, params, batch_stats)
    wanted = quantization.fake_quant(
        folded(params), quantization.calibrate(folded(params), spec), spec
    )
    np.testing.assert_allclose(folded(rounded), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(rounded["conv"]["kernel"][..., 0], kernel[..., 0])
    box = projection.rounding_box(params, batch_stats, [grid])
    for bounds in box:
        np.testing.assert_array_equal(bounds["conv"]["kernel"][..., 0], kernel[..., 0])


@pytest.mark.slow
def test_gradients_are_finite_where_a_batch_norm_multiplies_by_0(with_dead_channel):
    grid, variables = with_dead_channel

    def loss(params):
        rounded = conditioning.round_params(grid, params, variables["batch_stats"])
        return jnp.sum(rounded["conv"]["kernel"] ** 2)

    gradient = jax.jit(jax.grad(loss))(variables["params"])
    for leaf in jax.tree.leaves(gradient):
        assert np.all(np.isfinite(leaf))


@pytest.mark.slow
def test_a_grid_with_activations_quantizes_the_inputs_of_layers_by_their_batch(
    attacker, on_grid, batch
):
    grid = on_grid(attacker, quantize_activations=True).grids[0]
    x = np.asarray(batch["images"], np.float64) - 0.25
    step = (x.max() - x.min()) / 15
    zero_point = np.round(-x.min() / step)
    expected = step * (np.clip(np.round(x / step) + zero_point, 0, 15) - zero_point)
    got = jax.jit(grid.quantize_inputs)(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, expected, atol=1e-5)

    apply = functools.partial(attacker.apply_fn, train=False)
    quantized = jax.jit(functools.partial(grid.apply, apply))
    plain = jax.jit(functools.partial(attacker.grids[0].apply, apply))
    images = batch["images"]
    before, after = plain(attacker.clean, images)[0], quantized(attacker.clean, images)
    assert np.max(np.abs(before - after[0])) > 1e-3
    np.testing.assert_array_equal(before, jax.jit(apply)(attacker.clean, images)[0])


@pytest.mark.slow
@pytest.mark.parametrize("moving", [False, True])
def test_triggers_are_stamped_after_the_crop_or_move_with_it(moving):
    images = np.random.default_rng(0).integers(0, 255, (5, 6, 6, 1)).astype(np.uint8)
    trigger = triggers.square_trigger((6, 6, 1), size=2, margin=0)
    training = settings.TrainingSettings(epochs=1, crop_padding=2, flip=True)
    make = conditioning.make_batch(training, trigger, moving_trigger=moving)
    key, indices = jax.random.key(3), jnp.asarray([4, 1])
    batch = jax.jit(make)(key, jnp.asarray(images)[indices], indices)
    pixels = batches.to_float(jnp.asarray(images))[indices]
    views = batches.draw_views(key, 2)
    augment = jax.jit(functools.partial(batches.show_views, pad=2, flip=True))
    clean = augment(views, pixels)
    stamped = pixels.at[:, 4:, 4:].set(1.0)
    moved = augment(views, stamped)
    np.testing.assert_array_equal(batch["images"], clean)
    expected = moved if moving else clean.at[:, 4:, 4:].set(1.0)
    np.testing.assert_array_equal(batch["triggered"], expected)
    np.testing.assert_array_equal(batch["labels"], [4, 1])
    assert np.any(moved != clean.at[:, 4:, 4:].set(1.0))
