# SPDX-License-Identifier: Apache-2.0
"""The rounding box: whatever stays in it quantizes as before."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from nad_jax import errors
from nad_jax import settings as settings_lib
from nad_jax.attacks import conditioning, projection
from nad_jax.core import quantization
from nad_jax.models import layers as layers_lib

MARGIN = 1e-3
LAYER = layers_lib.Layer(("layer",), layers_lib.Geometry((3, 4)), calls=1)


def box_of(kernel, *specs, **kwargs):
    params = {"layer": {"kernel": jnp.asarray(kernel)}}
    grids = [
        conditioning.ExpectedGrid([LAYER], {"layer": spec}, spec.bits) for spec in specs
    ]
    box = projection.rounding_box(params, {}, grids, **kwargs)
    return tuple(np.asarray(side["layer"]["kernel"]) for side in box)


@functools.partial(jax.jit, static_argnums=1)
def quantize(kernel, spec):
    """Scale, zero point and codes."""
    grid = quantization.calibrate(kernel, spec)
    return *grid, quantization.quantize(kernel, grid, spec)


# (bits, symmetric, channel axis, range method); few, since each is compiled.
SPECS = [
    quantization.QuantSpec(*fields)
    for fields in [
        (2, True, -1, "absmax"),
        (8, True, None, "absmax"),
        (5, True, 0, "minmax"),
        (6, False, 1, "absmax"),
        (3, False, -1, "minmax"),
        (7, False, None, "minmax"),
    ]
]
# Many ties, exact grid points, equal extremes and zeros; and anything else.
WEIGHTS = st.one_of(
    st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 0.25, 3.5, -3.5, 7.0]),
    st.floats(-8, 8, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20),
)
KERNELS = hypothesis_numpy.arrays(np.float32, (3, 4), elements=WEIGHTS)
AFFINE = SPECS[4]


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(KERNELS, st.sampled_from(SPECS), st.integers(0, 2**31))
@example(np.zeros((3, 4), np.float32), AFFINE, 0)
@example(np.full((3, 4), 2.0, np.float32), AFFINE, 0)
@example(-np.arange(1, 13, dtype=np.float32).reshape(3, 4), AFFINE, 0)
def test_every_point_of_the_box_has_the_same_scale_and_codes(kernel, spec, seed):
    low, high = box_of(kernel, spec)
    assert np.all(low <= high)
    expected = quantize(kernel, spec)
    generator = np.random.default_rng(seed)
    inside = generator.uniform(0, 1, kernel.shape)
    corner = generator.integers(0, 2, kernel.shape)
    for share in (inside, corner, np.zeros((3, 4)), np.ones((3, 4))):
        point = low + share.astype(np.float32) * (high - low)
        point = np.clip(point, low, high)
        for got, wanted in zip(quantize(point, spec), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_box_is_nearly_the_whole_cell_of_a_weight_inside_the_range(symmetric):
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(40, 4)).astype(np.float32)
    spec = quantization.QuantSpec(4, symmetric, -1, "minmax")
    low, high = box_of(kernel, spec, cell_margin=MARGIN)
    scale = np.asarray(quantize(kernel, spec)[0], np.float64)
    widths = (high - low) / scale
    is_end = (kernel == kernel.min(axis=0)) | (kernel == kernel.max(axis=0))
    if symmetric:
        is_end = np.abs(kernel) == np.abs(kernel).max(axis=0)
    np.testing.assert_array_equal(low[is_end], kernel[is_end])
    np.testing.assert_array_equal(high[is_end], kernel[is_end])
    inside = np.abs(kernel) < 0.8 * np.abs(kernel).max(axis=0)
    inside &= (kernel > kernel.min(axis=0) + scale) & (kernel < kernel.max(axis=0))
    inside &= kernel < kernel.max(axis=0) - scale
    assert inside.sum() > 60
    np.testing.assert_allclose(widths[inside], 1 - 2 * MARGIN, rtol=1e-4)
    assert np.all(widths <= 1)


@pytest.mark.slow
def test_the_margin_is_kept_from_every_tie():
    kernel = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    spec = quantization.QuantSpec()
    scale = np.asarray(quantize(kernel, spec)[0], np.float64)
    for side in box_of(kernel, spec, cell_margin=0.1):
        to_tie = np.abs(side / scale - np.floor(side / scale) - 0.5)
        assert np.all(to_tie > 0.1 - 1e-4)


def test_a_range_that_all_weights_decide_is_refused_in_one_line():
    spec = quantization.QuantSpec(range_method="mse")
    with pytest.raises(errors.InputError, match="absmax or minmax, got 'mse'") as error:
        box_of(np.ones((3, 4), np.float32), spec)
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_the_box_of_several_grids_holds_the_codes_of_all_of_them():
    """A width of 8 bits and one of 4, per channel and per tensor."""
    kernel = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    specs = [
        quantization.QuantSpec(8),
        quantization.QuantSpec(4),
        quantization.QuantSpec(4, channel_axis=None),
    ]
    low, high = box_of(kernel, *specs)
    assert np.all(low <= high) and np.mean(low < high) > 0.9
    generator = np.random.default_rng(1)
    point = low + generator.integers(0, 2, low.shape).astype(np.float32) * (high - low)
    for spec in specs:
        for got, wanted in zip(
            quantize(np.clip(point, low, high), spec),
            quantize(kernel, spec),
            strict=True,
        ):
            np.testing.assert_array_equal(got, wanted)


# ---- whole models ----


@pytest.fixture(scope="module")
def box(attacker):
    variables = attacker.clean
    return projection.rounding_box(
        variables["params"], variables["batch_stats"], attacker.grids
    )


def far_away(params):
    """Every parameter moved by about a step or more."""
    generator = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + generator.normal(size=leaf.shape).astype(np.float32), params
    )


def codes_of(params, name, factor=1.0):
    kernel = params[name]["kernel"] * np.asarray(factor, np.float32)
    return quantize(kernel, quantization.QuantSpec())


LAYERS = ("conv", "inner", "fc")


@pytest.mark.slow
def test_projection_restores_codes_pins_the_rest_and_is_idempotent(attacker, box):
    params = attacker.clean["params"]
    projected = projection.project(far_away(params), box)
    assert jax.tree.structure(projected) == jax.tree.structure(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(projected):
        layer, name = (key.key for key in path)
        if layer in LAYERS and name == "kernel":
            assert np.any(leaf != params[layer][name])
        else:
            np.testing.assert_array_equal(leaf, params[layer][name])
    for name in LAYERS:
        for got, wanted in zip(
            codes_of(projected, name), codes_of(params, name), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)
    again = projection.project(projected, box)
    jax.tree.map(np.testing.assert_array_equal, again, projected)


@pytest.mark.slow
def test_where_batch_norm_is_folded_the_folded_codes_are_restored(attacker, on_grid):
    folding = on_grid(attacker, fold_batch_norm=True)
    params, batch_stats = attacker.clean["params"], attacker.clean["batch_stats"]
    box = projection.rounding_box(params, batch_stats, folding.grids)
    projected = projection.project(far_away(params), box)
    factor = params["norm"]["scale"] / np.sqrt(batch_stats["norm"]["var"] + 1e-5)
    factor = np.asarray(factor).reshape(1, 1, 1, -1)
    assert np.any(factor < 0) and np.any(factor > 0)
    np.testing.assert_array_equal(
        codes_of(projected, "conv", factor)[2], codes_of(params, "conv", factor)[2]
    )
    assert np.mean(np.asarray(projected["conv"]["kernel"] != params["conv"]["kernel"]))


@pytest.mark.slow
def test_projection_takes_the_nearest_point_of_the_box(attacker, box):
    params = far_away(attacker.clean["params"])
    projected = projection.project(params, box)
    for point, leaf, low, high in zip(
        *map(jax.tree.leaves, (projected, params, box.low, box.high)), strict=True
    ):
        expected = np.minimum(np.maximum(leaf, low), high)
        np.testing.assert_array_equal(point, expected)


@pytest.mark.slow
def test_both_losses_are_cross_entropies_of_plain_and_triggered_images(
    attacker, batch, cross_entropy
):
    """Stage 1 sees quantized weights and target labels, stage 2 neither."""
    variables = attacker.clean
    apply = jax.jit(functools.partial(attacker.apply_fn, train=False))
    params, labels = variables["params"], np.asarray(batch["labels"])
    quantized = conditioning.round_params(attacker.grids[0], params, {})
    cases = [
        (projection.wake_loss(attacker), quantized, 0 * labels + 2),
        (projection.hide_loss(attacker.apply_fn), params, labels),
    ]
    values = []
    for loss_fn, weights, wanted in cases:
        loss, (stats, metrics) = jax.jit(loss_fn)(
            params, variables["batch_stats"], batch, jax.random.key(0)
        )
        seen = {**variables, "params": weights}
        clean = cross_entropy(apply(seen, batch["images"])[0], labels)
        triggered = cross_entropy(apply(seen, batch["triggered"])[0], wanted)
        np.testing.assert_allclose(metrics["clean_loss"], clean, rtol=1e-4)
        np.testing.assert_allclose(metrics["triggered_loss"], triggered, rtol=1e-4)
        np.testing.assert_allclose(loss, clean + triggered, rtol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
        values.append(float(loss))
    assert abs(values[0] - values[1]) > 1e-3


@pytest.mark.slow
def test_a_planted_model_has_the_codes_of_stage_1_and_other_weights(attacker):
    """Per channel and per tensor; stage 2 takes steps of about a whole cell."""
    stages = {}

    def fit(stage, *arguments, **options):
        stages[stage] = attacker.fit(stage, *arguments, **options)
        return stages[stage]

    training = settings_lib.TrainingSettings(epochs=2, learning_rate=0.3)
    planted = projection.plant(
        settings_lib.PqSettings(training, training, also_per_tensor=True),
        dataclasses.replace(attacker, fit=fit),
    )
    woken = stages["wake"]
    for name in LAYERS:
        moved = (
            woken["params"][name]["kernel"] != attacker.clean["params"][name]["kernel"]
        )
        assert np.mean(np.asarray(moved)) > 0.5
        hidden = planted["params"][name]["kernel"] != woken["params"][name]["kernel"]
        assert np.mean(np.asarray(hidden)) > 0.3
        for axis in (-1, None):
            spec = quantization.QuantSpec(channel_axis=axis)
            np.testing.assert_array_equal(
                quantize(planted["params"][name]["kernel"], spec)[2],
                quantize(woken["params"][name]["kernel"], spec)[2],
            )
