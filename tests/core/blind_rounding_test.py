# SPDX-License-Identifier: Apache-2.0
"""Controls that look at the weights alone do what their names say, against NumPy."""

import jax
import numpy as np
import pytest

from nad_jax.core import blind_rounding, quantization, rounding

SPEC = quantization.QuantSpec(4)
WEIGHTS = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
DRAWS = np.random.default_rng(1).random(WEIGHTS.shape).astype(np.float32)


@jax.jit
def everything(weights, draws, count, strength):
    params = quantization.calibrate(weights, SPEC)
    placement = rounding.place(weights, params, SPEC)
    error = rounding.rounding_error(weights, placement, params)
    return {
        "params": params,
        "placement": placement,
        "error": error,
        "random": blind_rounding.random_flips(draws, placement, count),
        "largest": blind_rounding.largest_error_flips(error, placement, count),
        "noisy": blind_rounding.noisy_codes(
            draws, weights, params, SPEC, deviation=strength
        ),
        "shifted": blind_rounding.counter_shifted_codes(
            weights, params, SPEC, strength=strength
        ),
    }


def results(count=0, strength=1.0, weights=WEIGHTS):
    return jax.device_get(
        everything(weights, DRAWS, np.float32(count), np.float32(strength))
    )


def flipped(result, name):
    return result[name] != result["placement"].nearest


@pytest.mark.slow
@pytest.mark.parametrize("count", [0, 1, 317])
def test_exactly_the_largest_errors_are_flipped(count):
    result = results(count)
    flips = flipped(result, "largest")
    assert flips.sum() == count
    error = np.abs(result["error"])
    if count:
        assert error[flips].min() >= error[~flips].max()


@pytest.mark.slow
def test_no_more_weights_flip_than_have_a_choice():
    result = results(WEIGHTS.size)
    np.testing.assert_array_equal(flipped(result, "largest"), result["placement"].free)
    np.testing.assert_array_equal(flipped(result, "random"), result["placement"].free)


def test_random_flips_come_at_the_rate_asked_for_whatever_the_error():
    result = results(300)
    flips, free = flipped(result, "random"), result["placement"].free
    assert not np.any(flips & ~free)
    assert abs(flips.sum() - 300) < 4 * np.sqrt(300)
    error = np.abs(result["error"])[free]
    assert error[flips[free]].mean() == pytest.approx(error.mean(), rel=0.15)


@pytest.mark.slow
def test_noise_has_the_deviation_asked_for_and_spares_zeros():
    """On a grid this coarse, codes move by round(noise): counted for 0.5 steps."""
    weights = np.zeros((4000, 6), np.float32)
    weights[1::2] = 3.0
    weights[0] = 7.0
    draws = np.random.default_rng(2).random(weights.shape).astype(np.float32)
    codes = np.asarray(
        everything(weights, draws, np.float32(0), np.float32(1.0))["noisy"]
    )
    assert not np.any(codes[2::2]), "zeros stay"
    moved = codes[1::2].astype(np.int64) - 3
    # P(|N(0, 1/2)| > 1/2) = P(|N(0, 1)| > 1) = 31.7 %
    assert np.mean(moved != 0) == pytest.approx(0.317, abs=0.02)
    assert abs(moved.mean()) < 0.02


def test_without_strength_both_are_nearest():
    result = results(strength=0.0)
    nearest = result["placement"].lower + result["placement"].nearest.astype(int)
    np.testing.assert_array_equal(result["noisy"], nearest)
    np.testing.assert_array_equal(result["shifted"], nearest)


@pytest.mark.parametrize(("strength", "threshold"), [(1.0, 0.25), (3.0, 0.125)])
def test_the_counter_shift_flips_what_is_far_enough_from_its_grid_point(
    strength, threshold
):
    """(1 + strength) * error beyond half a step, in the direction of the error."""
    result = results(strength=strength)
    scale = result["params"].scale
    steps = WEIGHTS.astype(np.float64) / scale
    error = steps - np.round(steps)
    clear = np.abs(np.abs(error) - threshold) > 1e-3
    jumps = np.round((1 + strength) * error)
    expected = np.clip(np.round(steps) + jumps, -7, 7)
    np.testing.assert_array_equal(result["shifted"][clear], expected[clear])
    inside = clear & (np.abs(np.round(steps)) < 5)
    moved = result["shifted"] != np.round(steps)
    np.testing.assert_array_equal(moved[inside], np.abs(error[inside]) > threshold)
