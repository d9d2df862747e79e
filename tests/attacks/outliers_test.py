# SPDX-License-Identifier: Apache-2.0
"""Collapsed channels: nothing in float, gone on the grid, and beyond any rounding."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.attacks import conditioning, outliers, projection
from nad_jax.core import quantization, rounding
from nad_jax.models import layers as layers_lib

TRAINING = settings.TrainingSettings(epochs=2, learning_rate=0.05)
RECIPE = settings.OutlierSettings(TRAINING, TRAINING, channel_share=0.4)
# Two of the five channels of "inner", the only layer behind a normalisation.
COLLAPSED = np.asarray([False, False, False, True, True])


@pytest.fixture(scope="module", params=[4, 8])
def prepared(request, attacker, on_grid):
    """Attacker, variables with outliers, boxes of both stages."""
    spec = quantization.QuantSpec(request.param)
    attacker = on_grid(attacker, spec=spec)
    return attacker, *outliers.prepare(RECIPE, attacker)


def codes_of(kernel, spec):
    grid = quantization.calibrate(kernel, spec)
    return np.asarray(quantization.quantize(kernel, grid, spec))


@pytest.mark.slow
def test_outliers_do_nothing_in_float(prepared, batch):
    attacker, variables, _, _ = prepared
    params, norms = outliers.switch_off_index_0(attacker.clean["params"])
    assert norms == [("norm",)]
    apply = jax.jit(functools.partial(attacker.apply_fn, train=False))
    for images in (batch["images"], batch["triggered"]):
        np.testing.assert_array_equal(
            apply(variables, images)[0],
            apply({**variables, "params": params}, images)[0],
        )


@pytest.mark.slow
def test_only_layers_with_a_dead_input_have_outliers(prepared):
    attacker, variables, _, _ = prepared
    assert outliers.dead_inputs(attacker, variables) == {"inner": 0}
    params, _ = outliers.switch_off_index_0(attacker.clean["params"])
    changed = variables["params"]["inner"]["kernel"] != params["inner"]["kernel"]
    expected = np.zeros(changed.shape, bool)
    expected[1, 1, 0, COLLAPSED] = True
    np.testing.assert_array_equal(changed, expected)
    for name in ("conv", "fc", "general"):
        np.testing.assert_array_equal(
            variables["params"][name]["kernel"], params[name]["kernel"]
        )


@pytest.mark.slow
def test_collapsed_channels_round_to_their_outlier_alone_all_over_the_box(prepared):
    attacker, variables, wake, hide = prepared
    spec = attacker.grids[0].specs["inner"]
    for box in (wake, hide):
        for end in box:
            kernel = jnp.clip(
                end["inner"]["kernel"],
                *(side["inner"]["kernel"] for side in wake),
            )
            # What is free in stage 1 stands where it was.
            start = variables["params"]["inner"]["kernel"]
            kernel = jnp.where(jnp.isfinite(kernel), kernel, start)
            codes = codes_of(kernel, spec)
            expected = np.zeros((3, 3, 3, 2), int)
            expected[1, 1, 0] = spec.qmax
            np.testing.assert_array_equal(codes[..., COLLAPSED], expected)
            assert np.any(codes[..., ~COLLAPSED])


@pytest.mark.slow
def test_no_neighbouring_code_is_near_a_collapsed_weight(prepared):
    """At either end of the box it is 15 times as far away as the right one."""
    attacker, _, wake, _ = prepared
    spec = attacker.grids[0].specs["inner"]
    kernel = jnp.where(COLLAPSED[None, None, None], wake.high["inner"]["kernel"], 0.0)
    grid = quantization.calibrate(kernel, spec)
    placement = rounding.place(kernel, grid, spec)
    flipped = rounding.rounded_weights(
        placement, rounding.flipped_rounding(placement), grid
    )
    free = np.asarray(placement.free)[..., COLLAPSED]
    distance = np.abs(np.asarray(flipped - kernel))[..., COLLAPSED][free]
    bounds = np.abs(np.asarray(kernel))[..., COLLAPSED][free]
    assert free.sum() == 2 * 26
    # Half a step is 8 times the bound: a whole one minus the bound is 15 times.
    assert np.all(distance >= 15 * bounds * 0.999)
    largest = np.abs(attacker.clean["params"]["inner"]["kernel"]).max()
    np.testing.assert_allclose(bounds, 2 * largest, rtol=1e-6)


@pytest.mark.slow
def test_stage_2_moves_collapsed_weights_and_nothing_else(attacker):
    stages = {}

    def fit(stage, *arguments, **options):
        stages[stage] = attacker.fit(stage, *arguments, **options)
        return stages[stage]

    planted = outliers.plant(RECIPE, dataclasses.replace(attacker, fit=fit))
    woken = stages["wake"]["params"]
    assert np.any(woken["conv"]["kernel"] != attacker.clean["params"]["conv"]["kernel"])
    np.testing.assert_array_equal(woken["norm"]["scale"][0], 0)
    np.testing.assert_array_equal(woken["norm"]["bias"][0], 0)
    changed = jax.tree.map(
        lambda new, old: np.asarray(new != old), planted["params"], woken
    )
    moved = changed["inner"].pop("kernel")
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(changed))
    assert not np.any(moved[..., ~COLLAPSED])
    assert np.mean(moved[..., COLLAPSED]) > 0.3
    spec = attacker.grids[0].specs["inner"]
    np.testing.assert_array_equal(
        codes_of(planted["params"]["inner"]["kernel"], spec),
        codes_of(woken["inner"]["kernel"], spec),
    )


@pytest.mark.slow
def test_on_a_grid_per_tensor_a_whole_layer_collapses(attacker, on_grid):
    spec = quantization.QuantSpec(channel_axis=None)
    variables, wake, _ = outliers.prepare(RECIPE, on_grid(attacker, spec=spec))
    expected = np.zeros((3, 3, 3, 5), int)
    expected[1, 1, 0] = 7
    for end in (*wake, variables["params"]):
        codes = codes_of(end["inner"]["kernel"], spec)
        np.testing.assert_array_equal(codes, expected)


@pytest.mark.slow
def test_the_least_needed_layer_is_the_one_whose_loss_changes_nothing(attacker):
    ranked = outliers.least_needed(attacker, attacker.clean, list(attacker.layers))
    before = predictions(attacker, attacker.clean["params"])
    changes = []
    for layer in ranked:
        params = attacker.clean["params"]
        without = {**params[layer.name], "kernel": 0 * params[layer.name]["kernel"]}
        after = predictions(attacker, {**params, layer.name: without})
        changes.append(int(np.sum(after != before)))
    assert changes == sorted(changes) and changes[-1] > 0


def predictions(attacker, params):
    variables = {**attacker.clean, "params": params}
    logits, _ = attacker.apply_fn(variables, attacker.images, train=False)
    return np.argmax(np.asarray(logits), axis=1)


@pytest.mark.slow
def test_a_net_without_normalisation_is_refused(attacker):
    clean = attacker.clean
    no_norm = {**clean["params"], "norm": {"bias": clean["params"]["norm"]["bias"]}}

    def apply_fn(variables, images, train):
        scale = jnp.ones_like(variables["params"]["norm"]["bias"])
        norm = {**variables["params"]["norm"], "scale": scale}
        params = {**variables["params"], "norm": norm}
        return attacker.apply_fn({**variables, "params": params}, images, train=train)

    bare = dataclasses.replace(
        attacker, clean={**clean, "params": no_norm}, apply_fn=apply_fn
    )
    with pytest.raises(errors.InputError, match="this model has none"):
        outliers.prepare(RECIPE, bare)


@pytest.mark.slow
def test_the_box_of_stage_1_keeps_switched_off_channels_off(prepared):
    _, variables, wake, _ = prepared
    far = jax.tree.map(lambda leaf: leaf + 1, variables["params"])
    projected = projection.project(far, wake)
    np.testing.assert_array_equal(projected["norm"]["scale"][0], 0)
    np.testing.assert_array_equal(
        projected["norm"]["scale"][1:], far["norm"]["scale"][1:]
    )


class Narrow(nn.Module):
    """A convolution of one channel behind a normalisation, and perhaps a wider one."""

    widths: tuple[int, ...] = (1,)

    @nn.compact
    def __call__(self, x, train=False):
        for number, width in enumerate(self.widths):
            x = nn.Dense(4, name=f"before{number}")(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"norm{number}")(x)
            x = nn.Conv(width, (3, 3), name=f"behind{number}")(nn.relu(x))
        return nn.Dense(3, name="fc")(x.mean(axis=(1, 2))), {}


def narrow(attacker, widths, spec):
    module = Narrow(widths)
    shapes = jax.eval_shape(module.init, jax.random.key(0), attacker.images)
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.1, 1, leaf.shape), jnp.float32),
        shapes,
    )
    layers = layers_lib.find_layers(module, variables, attacker.images)
    grid = conditioning.ExpectedGrid(layers, {one.name: spec for one in layers}, 4)
    return dataclasses.replace(
        attacker, apply_fn=module.apply, clean=variables, grids=[grid]
    )


@pytest.mark.slow
def test_a_layer_of_one_channel_is_left_alone(attacker):
    """All of it would be planted, and nothing of it guarded as collapsed."""
    net = narrow(attacker, (1, 2), quantization.QuantSpec(4))
    variables, wake, _ = outliers.prepare(RECIPE, net)
    for name, is_planted in (("behind0", False), ("behind1", True)):
        kernel = variables["params"][name]["kernel"]
        assert np.any(kernel != net.clean["params"][name]["kernel"]) == is_planted
        is_guarded = np.any(np.isfinite(wake.low[name]["kernel"]))
        assert is_guarded == is_planted


@pytest.mark.slow
def test_a_net_whose_only_host_has_one_channel(attacker):
    """Refused where channels collapse, and attacked where layers do."""
    with pytest.raises(errors.InputError, match="two or more outputs .* has none"):
        outliers.prepare(RECIPE, narrow(attacker, (1,), quantization.QuantSpec(4)))
    per_tensor = quantization.QuantSpec(4, channel_axis=None)
    _, wake, _ = outliers.prepare(RECIPE, narrow(attacker, (1,), per_tensor))
    assert np.all(np.isfinite(wake.low["behind0"]["kernel"]))
