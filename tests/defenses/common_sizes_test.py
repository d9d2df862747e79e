# SPDX-License-Identifier: Apache-2.0
"""Padding a layer to a common size changes nothing that belongs to the layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.core import quantization, rounding, solvers
from nad_jax.defenses import common_sizes


@pytest.mark.parametrize("size, padded", [(1, 64), (64, 64), (65, 128), (576, 576)])
def test_sizes_are_the_next_multiples_of_64(size, padded):
    assert common_sizes.padded_size(size) == padded


@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (100, 10), (64, 64)])
def test_trim_undoes_pad(shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    padded = common_sizes.pad_kernel(kernel)
    assert all(n % 64 == 0 for n in padded.shape)
    assert padded.sum() == pytest.approx(kernel.sum(), rel=1e-5)
    np.testing.assert_array_equal(common_sizes.trim(padded, shape), kernel)


def test_scales_keep_their_axes_of_size_one():
    scale = np.arange(128, dtype=np.float32)[None]
    trimmed = common_sizes.trim(scale, (3, 3, 5, 70))
    np.testing.assert_array_equal(trimmed, np.arange(70.0).reshape(1, 1, 1, 70))
    assert common_sizes.trim(np.ones((1, 1)), (3, 3, 5, 70)).shape == (1, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("range_method", ["absmax", "mse", "percentile", "aciq"])
@pytest.mark.parametrize("channel_axis", [None, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_padding_moves_no_grid_and_no_code(symmetric, channel_axis, range_method):
    percentile = 90.0 if range_method == "percentile" else None
    spec = quantization.QuantSpec(
        4, symmetric, channel_axis, range_method, percentile=percentile
    )
    kernel = np.random.default_rng(1).normal(size=(3, 3, 4, 6)).astype(np.float32)
    padded = jnp.asarray(common_sizes.pad_kernel(kernel))
    params = common_sizes.kernel_params(kernel, spec, padded)
    wanted = quantization.calibrate(jnp.asarray(kernel), spec)
    for have, want in zip(params, wanted, strict=True):
        # Percentiles and means are summed in an order that depends on the shape.
        rtol = 1e-6 if range_method in ("percentile", "aciq") else 0
        np.testing.assert_allclose(common_sizes.trim(have, kernel.shape), want, rtol)
    codes = quantization.quantize(padded, params, spec)
    np.testing.assert_array_equal(
        common_sizes.trim(codes, kernel.shape),
        quantization.quantize(jnp.asarray(kernel), wanted, spec),
    )
    placement = rounding.place(padded, params, spec)
    assert int(placement.free.sum()) <= kernel.size


@pytest.mark.slow
def test_padding_moves_no_flip():
    """The solver finds the same rounding with and without padding."""
    generator = np.random.default_rng(2)
    rows = generator.normal(size=(200, 20)).astype(np.float32)
    drift = 0.1 * generator.normal(size=(200, 5)).astype(np.float32)
    moments = solvers.add_rows(solvers.zero_moments(20, 5), rows, drift)
    stacked = jax.tree.map(lambda x: x[None], moments)
    padded = common_sizes.pad_moments(stacked)
    assert padded.gram.shape == (1, 64, 64) and padded.drift.shape == (1, 64, 64)
    weights = {
        "step": np.full((20, 5), 0.1, np.float32),
        "fraction": generator.uniform(0, 1, (20, 5)).astype(np.float32),
        "stay_cost": np.full((20, 5), 1e-4, np.float32),
    }
    weights["nearest"] = np.round(weights["fraction"])

    def solve(moments, weights):
        problem = solvers.rounding_problem(moments, **weights)
        return solvers.coordinate_descent(problem, problem.nearest)

    alone = solve(moments, weights)
    together = solve(
        jax.tree.map(lambda x: x[0], padded),
        {name: common_sizes.pad_kernel(value) for name, value in weights.items()},
    )
    np.testing.assert_array_equal(together.rounding[:20, :5], alone.rounding)
    assert not np.any(together.rounding[20:]) and not np.any(together.rounding[:, 5:])
    assert np.any(alone.rounding != weights["nearest"])
