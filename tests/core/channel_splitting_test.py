# SPDX-License-Identifier: Apache-2.0
"""Outlier channel splitting against a greedy one in float64 NumPy."""

import jax
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.core import channel_splitting, quantization

SPEC = quantization.QuantSpec(4)
AFFINE = quantization.QuantSpec(4, symmetric=False, channel_axis=None)
WEIGHTS = np.random.default_rng(0).laplace(size=(3, 12, 6)).astype(np.float32)

split = jax.jit(channel_splitting.split_codes, static_argnames=("spec", "num_splits"))


def split_by_hand(weights, num_splits):
    """Copies of each input channel, list of (owner, values), split in plain halves."""
    copies = [(i, np.float64(weights[:, i])) for i in range(weights.shape[1])]
    for _ in range(num_splits):
        at = int(np.argmax([np.abs(values).max() for _, values in copies]))
        owner, values = copies[at]
        copies[at] = owner, values / 2
        copies.append((owner, values / 2))
    return copies


@pytest.mark.parametrize("num_splits", [1, 5])
def test_the_range_is_that_of_the_halves(num_splits):
    _, params = split(WEIGHTS, SPEC, num_splits=num_splits)
    copies = [values for _, values in split_by_hand(WEIGHTS, num_splits)]
    largest = np.abs(np.stack(copies, 1)).max(axis=(0, 1))
    np.testing.assert_allclose(params.scale[0, 0], largest / 7, rtol=1e-6)
    # The first split is of the largest weight, so some grid must have become finer.
    assert np.any(largest < np.abs(WEIGHTS).max(axis=(0, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [SPEC, AFFINE])
def test_the_copies_add_up_to_nearest_rounding_on_the_finer_grid(spec):
    codes, params = split(WEIGHTS, spec, num_splits=4)
    steps = np.float64(WEIGHTS) / np.float64(params.scale)
    found = np.asarray(codes) - np.asarray(params.zero_point)
    # Where a copy is almost at a tie, it may go the other way.
    assert np.mean(found == np.round(steps)) > 0.99
    assert np.max(np.abs(found - steps)) < 1
    # Which single codes of that grid could not hold.
    nearest = quantization.calibrate(WEIGHTS, spec)
    assert np.all(params.scale <= nearest.scale) and np.any(codes > spec.qmax)


def test_no_split_is_nearest_rounding():
    codes, params = split(WEIGHTS, SPEC, num_splits=0)
    plain = quantization.calibrate(WEIGHTS, SPEC)
    np.testing.assert_array_equal(params.scale, plain.scale)
    np.testing.assert_array_equal(codes, quantization.quantize(WEIGHTS, plain, SPEC))


def test_a_copy_may_be_split_again():
    weights = np.array([[16.0], [3.0]], np.float32)  # 16 -> 8, 8 -> 4, 4, 8 -> 4 x 4
    _, params = split(weights, SPEC, num_splits=3)
    assert float(params.scale[0, 0]) == pytest.approx(4 / 7)
    # All four belong to the input they came from, wherever it stands.
    codes, params = split(weights[[1, 0, 1]], SPEC, num_splits=3)
    steps = weights[[1, 0, 1]] / np.asarray(params.scale)
    np.testing.assert_allclose(codes, steps, atol=0.51)


@pytest.mark.parametrize(("shape", "splits"), [((4,), 1), ((4, 4), -1)])
def test_what_cannot_be_split_is_refused(shape, splits):
    with pytest.raises(errors.InputError, match=r"\[..., inputs, outputs\]"):
        channel_splitting.split_codes(np.zeros(shape), SPEC, num_splits=splits)


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_input_of_hundreds_of_copies_keeps_its_weight(symmetric):
    """Its code is a sum that 16 bits would not hold."""
    weights = np.random.default_rng(0).normal(size=(512, 4), scale=0.1)
    weights = weights.astype(np.float32)
    weights[5] = 1000.0
    spec = quantization.QuantSpec(8, symmetric, -1)
    codes, params = split(weights, spec, num_splits=512)
    assert codes.dtype == np.int32 and np.max(codes) > 2**15
    values = quantization.dequantize(codes, params)
    # Each copy is off by half a step of its own 255 at most.
    np.testing.assert_allclose(values[5], 1000.0, rtol=4e-3)
