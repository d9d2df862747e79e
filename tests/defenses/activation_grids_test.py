# SPDX-License-Identifier: Apache-2.0
"""Layer inputs are measured as the grid says."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.core import grids, histogram_range
from nad_jax.defenses import activation_grids, efrap

# 64 images in two batches of 32; one extreme each, where no even sample would look.
INPUTS = np.random.default_rng(0).uniform(0, 1, (64, 40, 40, 3)).astype(np.float32)
INPUTS[3, 17, 29, 1], INPUTS[50, 5, 11, 2] = -1.0, 3.0


def measured(grid, bits):
    params = activation_grids.measure(
        jnp.asarray(INPUTS), grid, bits, num_images=len(INPUTS)
    )
    return float(params.scale.squeeze()), int(params.zero_point.squeeze())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "bits", "scale", "zero_point"),
    # Range -1 to 3 in 255 or 15 steps; a quarter of them lies below zero.
    [("onnxruntime", 8, 4 / 255, 64), ("litert", 4, 4 / 15, 4)],
)
def test_extremes_are_those_of_all_values(preset, bits, scale, zero_point):
    assert measured(grids.GRIDS[preset], bits) == (pytest.approx(scale), zero_point)


@pytest.mark.slow
def test_ranges_of_batches_are_averaged():
    """0.75 * [-1, 1] + 0.25 * [0, 3], up to the ends of the uniform values."""
    grid = grids.Grid(act_range_method="minmax", act_ema=0.75)
    scale, zero_point = measured(grid, 8)
    assert scale == pytest.approx((0.75 * 2 + 0.25 * 3) / 255, rel=1e-3)
    assert zero_point == round(0.75 / scale)


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "top"), [("fbgemm", 127), ("qnnpack", 255)])
def test_pytorch_searches_256_codes_and_fbgemm_uses_half_of_them(preset, top):
    scale, zero_point = measured(grids.GRIDS[f"pytorch_{preset}"], 8)
    # The sample misses both extremes, so the range is nearly that of the bulk.
    assert scale == pytest.approx(1 / top, rel=0.02) and zero_point == 0
    values = np.asarray(INPUTS[0])
    low, high = histogram_range.histogram_range(values, codes=256)
    params = activation_grids.measure(
        jnp.asarray(values[None]), grids.GRIDS[f"pytorch_{preset}"], 8, num_images=1
    )
    expected = (max(high, 0) - min(low, 0)) / top
    assert float(params.scale) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_percentile_cuts_both_ends():
    grid = grids.Grid(act_range_method="percentile", act_percentile=90.0, act_ema=None)
    inputs = jnp.linspace(-1.0, 1.0, 32 * 25).reshape(32, 25)
    params = activation_grids.measure(inputs, grid, 8, num_images=32)
    assert float(params.scale.squeeze()) == pytest.approx(1.6 / 255, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["minmax", "mse", "histogram"])
def test_positions_merged_into_the_first_axis_are_their_images(method):
    """64 images are two batches, not 64 of which the last decide."""
    inputs = np.random.default_rng(0).uniform(0, 1, (64, 32, 5)).astype(np.float32)
    inputs[:32] *= 10.0
    grid = grids.Grid(act_range_method=method, act_ema=0.9)
    params, merged = (
        activation_grids.measure(jnp.asarray(x), grid, 8, num_images=64)
        for x in (inputs, inputs.reshape(-1, 5))
    )
    assert float(merged.scale.squeeze()) == float(params.scale.squeeze())
    if method == "minmax":
        top = 0.9 * inputs[:32].max() + 0.1 * inputs[32:].max()
        assert 255 * float(merged.scale.squeeze()) == pytest.approx(top, rel=1e-5)


@pytest.mark.slow
def test_rows_of_no_whole_number_of_images_count_as_images():
    """70 rows of 64 images are two batches of 35."""
    grid = grids.Grid(act_range_method="minmax", act_ema=0.9)
    inputs = jnp.concatenate([jnp.full((35, 2), 10.0), jnp.ones((35, 2))])
    params = activation_grids.measure(inputs, grid, 8, num_images=64)
    assert 255 * float(params.scale.squeeze()) == pytest.approx(9.1, rel=1e-5)


class Tokens(nn.Module):
    """A layer and a sum that see positions merged into the first axis, or not."""

    merges: bool

    @nn.compact
    def __call__(self, x):
        y = x.reshape(-1, x.shape[-1]) if self.merges else x
        y = y + nn.Dense(y.shape[-1], name="dense")(y)
        return y.reshape(x.shape)


@pytest.mark.slow
def test_a_reshape_before_a_layer_changes_no_grid():
    images = np.random.default_rng(0).uniform(0, 1, (64, 32, 5)).astype(np.float32)
    images[:32] *= 10.0
    dense = {"kernel": 2 * jnp.eye(5), "bias": jnp.zeros(5)}
    merged, plain = (
        efrap.efrap(
            Tokens(merges),
            {"params": {"dense": dense}},
            jnp.asarray(images),
            method="nearest",
            act_bits=8,
            quantize_sums=True,
        ).act_params
        for merges in (True, False)
    )
    assert set(plain) == {"dense", "sum0/left", "sum0/right"}
    for name, params in plain.items():
        assert float(merged[name].scale.squeeze()) == pytest.approx(
            float(params.scale.squeeze()), rel=1e-6
        )


@pytest.mark.parametrize(("rows", "shape"), [((4, 12), (4, 20)), ((4, 6), (1, 50))])
def test_calls_are_joined_by_image_where_they_can_be(rows, shape):
    """Four images; a row of 5 values is a position of one of them, or of none."""
    calls = [jnp.full((count, 5), count, jnp.float32) for count in rows]
    joined = activation_grids.join_calls(calls, num_images=4)
    assert joined.shape == shape
    for row in np.asarray(joined):
        values, counts = np.unique(row, return_counts=True)
        np.testing.assert_array_equal(values, rows)
        np.testing.assert_array_equal(counts, 5 * np.asarray(rows) // shape[0])
