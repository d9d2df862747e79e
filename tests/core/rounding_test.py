# SPDX-License-Identifier: Apache-2.0
import math
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as numpy_strategies

from nad_jax import errors
from nad_jax.core import quantization, rounding

Spec = quantization.QuantSpec
EIGHT, FOUR, AFFINE = SPECS = [Spec(8), Spec(4), Spec(4, False, -1, "minmax")]
SHAPE = (6, 3)

few = hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, database=None
)
seeds = strategies.integers(0, 2**31)
any_weights = numpy_strategies.arrays(
    np.float32,
    SHAPE,
    elements=strategies.floats(allow_nan=False, allow_infinity=False, width=32),
)


class Study(NamedTuple):
    """All there is to know of weights on a grid.

    `rounded` holds codes, weights and flip rate of nearest, flipped and `other`.
    """

    params: Any
    placement: Any
    nearest: Any
    flipped: Any
    logits: Any
    soft: Any
    hard: Any
    error: Any
    soft_weights: Any
    quantized: Any
    rounded: Any


def study_one(spec, weights, params, other) -> Study:
    placement = rounding.place(weights, params, spec)
    nearest = rounding.nearest_rounding(placement)
    flipped = rounding.flipped_rounding(placement)
    logits = rounding.rounding_logits(placement)
    soft = rounding.soft_rounding(logits)
    roundings = {"nearest": nearest, "flipped": flipped, "other": other}
    return Study(
        params,
        placement,
        nearest,
        flipped,
        logits,
        soft,
        rounding.hard_rounding(logits),
        rounding.rounding_error(weights, placement, params),
        rounding.rounded_weights(placement, soft, params),
        (
            quantization.quantize(weights, params, spec),
            quantization.fake_quant(weights.astype(jnp.float32), params, spec),
        ),
        {
            name: (
                rounding.codes(placement, value, spec),
                rounding.rounded_weights(placement, value, params),
                rounding.flip_rate(placement, value),
            )
            for name, value in roundings.items()
        },
    )


# Compiling is what these tests spend their time on: all grids at once, one shape.
@jax.jit
def _study(weights, grids, other):
    return [
        study_one(spec, weights, params, other)
        for spec, params in zip(SPECS, grids, strict=True)
    ]


@jax.jit
def _calibrate(weights):
    return [quantization.calibrate(weights, spec) for spec in SPECS]


def study(weights, grids, other):
    """Pairs of a spec and the `Study` on its grid, as NumPy arrays."""
    results = jax.device_get(_study(weights, grids, other))
    return list(zip(SPECS, results, strict=True))


def grids_of(weights):
    """One grid per spec that represents `weights`."""
    return jax.device_get(_calibrate(weights))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def coins(seed, *shape):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)


def ordinary(seed, covered=1.0):
    """Weights on grids of `covered` times themselves, and a random rounding."""
    weights = normal(seed, *SHAPE)
    grids = grids_of(weights * np.float32(covered))
    return weights, study(weights, grids, coins(seed, *SHAPE))


def unit_grid(zero_point=0):
    """Steps of 1: weights are written in steps."""
    return quantization.QuantParams(
        np.ones((1, 3), np.float32), np.full((1, 3), zero_point, np.int32)
    )


def in_steps(weights, spec, zero_point=0, other=0.0) -> Study:
    """`Study` of a list of weights written in steps, `other` for each of them."""
    padded = np.zeros(SHAPE, np.float32)
    padded.flat[: len(weights)] = weights
    rounding_value = np.full(SHAPE, other, np.float32)
    results = study(padded, [unit_grid(zero_point)] * len(SPECS), rounding_value)
    return jax.tree.map(
        lambda x: x.flatten()[: len(weights)] if np.shape(x) == SHAPE else x,
        dict(results)[spec],
    )


def place_by_hand(weight, scale, zero_point, spec):
    """One weight in Python floats: (lower, fraction, nearest, free)."""
    steps = float(weight) / float(scale)
    top = round(steps)  # half to even, like the grid
    if abs(steps - top) < 1e-4:
        return min(max(top + zero_point, spec.qmin), spec.qmax), 0.0, 0.0, False
    below = math.floor(steps)
    if below + zero_point < spec.qmin:
        return spec.qmin, 0.0, 0.0, False
    if below + zero_point >= spec.qmax:
        return spec.qmax, 0.0, 0.0, False
    return below + zero_point, steps - below, float(top - below), True


# --- place ---------------------------------------------------------------------------


@pytest.mark.slow
@hypothesis.settings(few, max_examples=20)
@hypothesis.given(seed=seeds, covered=strategies.sampled_from([1.0, 0.6]))
def test_every_weight_is_placed_as_by_hand(seed, covered):
    weights, results = ordinary(seed, covered)
    for spec, (params, placement, *_) in results:
        scale, zero_point = (np.broadcast_to(p, SHAPE) for p in params)
        for index in np.ndindex(SHAPE):
            steps = float(weights[index]) / float(scale[index])
            if abs(steps % 0.5) < 2e-5:
                continue  # float64 may see the other side of a tie
            lower, fraction, nearest, free = place_by_hand(
                weights[index], scale[index], int(zero_point[index]), spec
            )
            assert placement.lower[index] == lower
            assert placement.free[index] == free
            assert abs(placement.fraction[index] - fraction) < 2e-5
            assert placement.nearest[index] == nearest


@pytest.mark.slow
@few
@hypothesis.given(weights=any_weights, seed=seeds)
def test_nearest_is_what_the_quantizer_does_bit_for_bit(weights, seed):
    """For any finite weights, on their own grid and on one that clips most of them."""
    for calibration_weights in (weights, normal(seed, *SHAPE)):
        grids = grids_of(calibration_weights)
        for _, result in study(weights, grids, coins(seed, *SHAPE)):
            codes, values, flip_rate = result.rounded["nearest"]
            np.testing.assert_array_equal(codes, result.quantized[0])
            np.testing.assert_array_equal(values, result.quantized[1])
            assert flip_rate == 0.0


@pytest.mark.slow
@few
@hypothesis.given(weights=any_weights, seed=seeds)
def test_everything_is_finite_for_any_finite_weights(weights, seed):
    grids = grids_of(normal(seed, *SHAPE))
    for spec, result in study(weights, grids, coins(seed, *SHAPE)):
        for leaf in jax.tree.leaves(result):
            assert np.all(np.isfinite(leaf))
        fraction = result.placement.fraction
        assert np.all((fraction >= 0) & (fraction < 1))
        for codes, _, flip_rate in result.rounded.values():
            assert np.all((codes >= spec.qmin) & (codes <= spec.qmax))
            assert 0 <= flip_rate <= 1


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds, covered=strategies.sampled_from([1.0, 0.6]))
def test_any_rounding_takes_the_floor_or_the_ceiling(seed, covered):
    weights, results = ordinary(seed, covered)
    for spec, result in results:
        scale, zero_point = result.params
        steps = weights / np.float64(scale)
        free = result.placement.free
        for name in ("nearest", "flipped", "other"):
            codes, values, _ = result.rounded[name]
            taken = codes.astype(np.int64) - zero_point
            neighbour = (taken == np.floor(steps)) | (taken == np.ceil(steps))
            assert np.all(neighbour[free])
            missed = np.abs(values - np.float64(weights)) / scale
            assert np.all(missed[free] < 1.0)
            end = (codes == spec.qmin) | (codes == spec.qmax)
            assert np.all((missed < 2e-4)[~free & ~end])
            np.testing.assert_allclose(values, np.float64(scale) * taken, rtol=1e-6)
        taken_up = result.rounded["other"][0] - result.placement.lower
        np.testing.assert_array_equal(taken_up, coins(seed, *SHAPE) * free)


@pytest.mark.slow
@pytest.mark.parametrize(("spec", "zero_point"), [(FOUR, 0), (AFFINE, 3)])
def test_ties_go_to_the_even_multiple_of_the_step(spec, zero_point):
    weights = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5]
    result = in_steps(weights, spec, zero_point)
    np.testing.assert_array_equal(result.placement.fraction, 0.5)
    np.testing.assert_array_equal(result.nearest, [0, 1, 0, 1, 0, 1])
    even = jnp.round(jnp.array(weights))
    np.testing.assert_array_equal(result.rounded["nearest"][1], even)
    np.testing.assert_array_equal(result.rounded["nearest"][1], [0, 2, 2, 0, -2, -2])
    np.testing.assert_array_equal(result.rounded["flipped"][1], [1, 1, 3, -1, -1, -3])


@pytest.mark.slow
def test_exact_grid_points_are_pinned():
    """All codes, on grids of many scales, and again after measuring the grid anew."""
    specs = [Spec(8, symmetric, -1, "minmax") for symmetric in (True, False)]
    random = np.random.default_rng(0)
    scale = np.exp(random.uniform(-30, 30, (1, 200))).astype(np.float32)
    all_codes, grids = [], []
    for spec in specs:
        codes = np.resize(np.arange(spec.qmin, spec.qmax + 1), 256)
        all_codes.append(codes.astype(np.int32)[:, None])
        last = 0 if spec.symmetric else spec.qmax
        zero_point = random.integers(0, last, (1, 200), np.int32, endpoint=True)
        grids.append(quantization.QuantParams(scale, zero_point))

    @jax.jit
    def placed(all_codes, grids):
        results = []
        for spec, codes, params in zip(specs, all_codes, grids, strict=True):
            weights = quantization.dequantize(codes, params)
            for grid in (params, quantization.calibrate(weights, spec)):
                placement = rounding.place(weights, grid, spec)
                flipped = rounding.flipped_rounding(placement)
                results.append((codes, placement, flipped))
        return results

    for codes, placement, flipped in jax.device_get(placed(all_codes, grids)):
        assert not placement.free.any()
        lower = placement.lower
        np.testing.assert_array_equal(lower, np.broadcast_to(codes, lower.shape))
        np.testing.assert_array_equal(placement.fraction, 0)
        np.testing.assert_array_equal(flipped, 0)


def test_the_tolerance_leaves_an_attackers_margin_free():
    """1e-3 of a step from a grid point or from a tie is a choice, 5e-5 is not."""
    offsets = [5e-5, -5e-5, 1e-3, -1e-3, 0.499, 0.501]
    placement = in_steps([3 + offset for offset in offsets], FOUR).placement
    np.testing.assert_array_equal(placement.free, [False, False] + [True] * 4)
    np.testing.assert_array_equal(placement.lower, [3, 3, 3, 2, 3, 3])
    np.testing.assert_array_equal(placement.nearest, [0, 0, 0, 1, 0, 1])


@pytest.mark.parametrize(
    ("spec", "zero_point", "low"), [(FOUR, 0, -7), (AFFINE, 8, -8)]
)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_clipped_weights_are_pinned_to_the_end_points(spec, zero_point, low, value):
    weights = [7.0, 7.3, 8.0, 1e30, low, low - 0.3, low - 1, -1e30]
    ends = np.array([7] * 4 + [low] * 4)
    result = in_steps(weights, spec, zero_point, other=value)
    assert not result.placement.free.any()
    for name in ("nearest", "flipped", "other"):
        codes, values, flip_rate = result.rounded[name]
        np.testing.assert_array_equal(values, ends)
        np.testing.assert_array_equal(codes, ends + zero_point)
        assert flip_rate == 0.0
    np.testing.assert_array_equal(result.error, 0.0)


def test_the_last_cell_below_the_end_point_is_free():
    placement = in_steps([6.0002, 6.9998, -6.0002, -6.9998], FOUR).placement
    assert placement.free.all()
    np.testing.assert_array_equal(placement.lower, [6, 6, -7, -7])


def test_zero_channels_are_pinned_to_the_code_of_zero():
    zeros = np.zeros(SHAPE, np.float32)
    for _, result in study(zeros, grids_of(zeros), np.ones_like(zeros)):
        assert not result.placement.free.any()
        for codes, values, _ in result.rounded.values():
            np.testing.assert_array_equal(codes, 0)
            np.testing.assert_array_equal(values, 0.0)


def assert_same(left, right):
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_bfloat16_weights_are_placed_like_their_float32_values():
    weights = normal(1, *SHAPE).astype(jnp.bfloat16)
    wide = weights.astype(np.float32)
    params = grids_of(wide)[1]

    @jax.jit
    def place(weights):
        placement = rounding.place(weights, params, FOUR)
        return placement, rounding.rounding_error(weights, placement, params)

    assert_same(place(weights), place(wide))


# --- roundings -----------------------------------------------------------------------


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds)
def test_flipped_is_the_opposite_of_nearest_except_where_pinned(seed):
    for _, result in ordinary(seed, 0.8)[1]:
        free = result.placement.free
        np.testing.assert_array_equal((result.flipped + result.nearest)[free], 1.0)
        np.testing.assert_array_equal(result.flipped[~free], 0.0)
        assert result.rounded["flipped"][2] == pytest.approx(free.mean())
        steps = result.rounded["flipped"][0] - result.rounded["nearest"][0].astype(int)
        np.testing.assert_array_equal(np.abs(steps), free)


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds)
def test_flip_rate_counts_weights_that_left_nearest(seed):
    for _, result in ordinary(seed, 0.8)[1]:
        codes, _, flip_rate = result.rounded["other"]
        moved = np.mean(codes != result.quantized[0])
        assert flip_rate == pytest.approx(moved)


@pytest.mark.slow
def test_no_weight_of_an_empty_tensor_is_flipped():
    empty = np.zeros((0, 3), np.float32)

    @jax.jit
    def flip_rate(weights):
        return rounding.flip_rate(rounding.place(weights, unit_grid(), FOUR), weights)

    assert flip_rate(empty) == 0.0


@pytest.mark.slow
def test_stochastic_rounding_is_unbiased():
    """The mean of 5,000 draws, against six standard errors of each weight."""
    draws = 5_000
    weights = [0.1, 0.5, 0.9, -0.1, 2.03, -3.97, 3.0, 9.0, -9.0]
    placement = in_steps(weights, FOUR).placement
    many = jax.tree.map(lambda x: np.tile(x, (draws, 1)), placement)

    @jax.jit
    def draw(seed):
        up = rounding.stochastic_rounding(jax.random.key(seed), many)
        unit = jax.tree.map(lambda x: x[:, :1], unit_grid())
        return up, rounding.rounded_weights(many, up, unit)

    up, rounded = jax.device_get(draw(0))
    assert up.dtype == np.float32
    assert np.all((up == 0) | (up == 1))
    fraction = np.float64(placement.fraction)
    error = np.sqrt(fraction * (1 - fraction) / draws)
    assert np.all(error[:6] > 0) and np.all(error[6:] == 0)
    bias = np.mean(rounded, 0, np.float64) - np.clip(weights, -7, 7)
    assert np.all(np.abs(bias) <= 6 * error + 1e-5)
    np.testing.assert_array_equal(draw(0)[0], up)
    assert np.any(np.asarray(draw(1)[0]) != up)


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds)
def test_soft_rounding_starts_at_the_weight(seed):
    weights, results = ordinary(seed)
    for _, result in results:
        free, fraction = result.placement.free, result.placement.fraction
        sigmoid = 1 / (1 + np.exp(-np.float64(result.logits)))
        np.testing.assert_allclose(sigmoid[free], fraction[free], atol=1e-6)
        np.testing.assert_allclose(result.soft, sigmoid, atol=1e-6)
        scale = np.broadcast_to(result.params.scale, SHAPE)
        missed = np.abs(result.soft_weights - weights)
        assert np.all(missed[free] <= 2e-5 * scale[free])
        # Grid points: no logit is infinite, and the decision is the grid point.
        np.testing.assert_array_equal(result.logits[~free], -12.0)
        np.testing.assert_array_equal(result.hard[~free], 0.0)


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds)
def test_hardening_at_the_start_gives_nearest_rounding(seed):
    """Except at exact ties, where V = 0 goes up and nearest to the even side."""
    for _, result in ordinary(seed, 0.8)[1]:
        no_tie = result.placement.fraction != 0.5
        np.testing.assert_array_equal(result.hard[no_tie], result.nearest[no_tie])


def test_a_logit_of_zero_goes_up():
    result = in_steps([0.5, 1.5], FOUR)
    np.testing.assert_array_equal(result.logits, 0.0)
    np.testing.assert_array_equal(result.hard, 1.0)
    logits = np.float32([-1e-9, -0.0, 1e-9])
    hard = jax.jit(rounding.hard_rounding)(logits)
    np.testing.assert_array_equal(hard, [0, 1, 1])


def test_logits_stay_within_their_limit():
    result = in_steps([0.0002, 0.25, 0.75, 0.9998, 2.0], FOUR)
    limited = jax.jit(lambda p: rounding.rounding_logits(p, limit=3.0))
    odds = math.log(3.0)
    expected = [-3, -odds, odds, 3, -3]
    np.testing.assert_allclose(limited(result.placement), expected, rtol=1e-6)
    expected = [-math.log(0.9998 / 0.0002), -odds, odds, math.log(0.9998 / 0.0002), -12]
    np.testing.assert_allclose(result.logits, expected, rtol=1e-4)


@pytest.mark.slow
def test_soft_rounding_and_its_slope_by_hand():
    """The slope of a stretched sigmoid vanishes where it is clipped."""

    def heights_and_slopes(logits, stretch):
        def height(logit):
            return rounding.soft_rounding(logit, stretch=stretch)

        return height(logits), jax.vmap(jax.grad(height))(logits)

    odds = math.log(3.0)
    logits = np.float32([-30.0, -odds, 0.0, odds, 30.0])
    compiled = jax.jit(heights_and_slopes)
    plain, slopes = compiled(logits, 0.0)
    np.testing.assert_allclose(plain, [0, 0.25, 0.5, 0.75, 1], atol=1e-7)
    np.testing.assert_allclose(slopes, [0, 3 / 16, 1 / 4, 3 / 16, 0], atol=1e-7)
    stretched, slopes = compiled(logits, 0.1)
    np.testing.assert_allclose(stretched, [0, 0.2, 0.5, 0.8, 1], atol=1e-7)
    np.testing.assert_allclose(slopes, [0, 0.225, 0.3, 0.225, 0], atol=1e-7)
    assert (stretched[0], stretched[-1]) == (0.0, 1.0)
    assert (slopes[0], slopes[-1]) == (0.0, 0.0)
    # AdaRound's stretch saturates at moderate logits, the plain sigmoid does not.
    logits = np.float32([-5.0, 5.0, -9.0, 9.0, 0.0])
    np.testing.assert_array_equal(compiled(logits, 0.1)[1][:4], 0.0)
    assert np.all(np.asarray(compiled(logits, 0.0)[1]) > 0)


# --- weights and codes ---------------------------------------------------------------


def test_the_gradient_of_rounded_weights_is_the_step_where_free():
    """Also with pinned weights beside: their logits must not poison the others."""
    weights, results = ordinary(4, 0.8)
    result = dict(results)[AFFINE]
    free, cotangent = result.placement.free, normal(5, *SHAPE)
    assert 0 < free.sum() < free.size

    def weighted(chosen):
        values = rounding.rounded_weights(result.placement, chosen, result.params)
        return jnp.sum(cotangent * values)

    def weighted_soft(logits):
        return weighted(rounding.soft_rounding(logits))

    @jax.jit
    def gradients(chosen, logits):
        return jax.grad(weighted)(chosen), jax.grad(weighted_soft)(logits)

    hard, soft = gradients(coins(4, *SHAPE), result.logits)
    expected = np.where(free, cotangent * result.params.scale, 0.0)
    np.testing.assert_allclose(hard, expected, rtol=1e-6)
    fraction = result.placement.fraction
    expected = expected * fraction * (1 - fraction)
    np.testing.assert_allclose(soft, expected, rtol=1e-4, atol=1e-8)


def test_weights_get_no_gradient_through_their_placement():
    @jax.jit
    @jax.grad
    def gradient(weights):
        placement = rounding.place(weights, unit_grid(), FOUR)
        logits = rounding.rounding_logits(placement)
        return jnp.sum(placement.fraction + rounding.soft_rounding(logits))

    np.testing.assert_array_equal(gradient(np.float32([[0.3, 2.0, 9.0]])), 0.0)


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds)
def test_codes_and_weights_tell_the_same_story(seed):
    for spec, result in ordinary(seed, 0.8)[1]:
        scale, zero_point = result.params
        for codes, values, _ in result.rounded.values():
            assert codes.dtype == (np.int8 if spec.symmetric else np.uint8)
            steps = (codes.astype(np.int32) - zero_point).astype(np.float32)
            np.testing.assert_array_equal(values, scale * steps)


def test_8_bit_codes_use_all_of_their_storage():
    weights = np.array([-127.0, -126.4, 126.4, 127.0])
    for other, codes in ((0, [-127, -127, 126, 127]), (1, [-127, -126, 127, 127])):
        result = in_steps(weights, EIGHT, other=other)
        np.testing.assert_array_equal(result.rounded["other"][0], codes)
    affine, weights = Spec(8, False), np.float32([[0.0, 0.3, 254.6, 255.0]])

    @jax.jit
    def codes_above(weights, params):
        placement = rounding.place(weights, params, affine)
        return rounding.codes(placement, jnp.ones(weights.shape), affine)

    unit = jax.tree.map(lambda x: x[:, :1], unit_grid())
    codes = jax.device_get(codes_above(weights, unit))
    np.testing.assert_array_equal(codes, [[0, 1, 255, 255]])
    assert codes.dtype == np.uint8


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds)
def test_rounding_error_is_signed_and_zero_where_pinned(seed):
    weights, results = ordinary(seed, 0.8)
    for _, result in results:
        free = result.placement.free
        exact = np.float64(weights) - result.quantized[1]
        # The compiler may fuse product and difference: a last bit of the weight.
        missed = np.abs(result.error - exact)
        assert np.all(missed[free] <= 2**-23 * np.abs(weights)[free])
        np.testing.assert_array_equal(result.error[~free], 0.0)
        half = 0.5 * np.broadcast_to(result.params.scale, SHAPE)
        assert np.all(np.abs(result.error) <= half * (1 + 1e-4))


def test_a_rounding_of_another_shape_is_refused():
    result = in_steps([0.5], FOUR)
    with pytest.raises(errors.InputError, match=r"\(3,\), the weights \(1,\)"):
        rounding.rounded_weights(result.placement, jnp.ones(3), result.params)


def test_placing_commutes_with_permuting_and_with_scaling():
    weights, chosen = normal(5, *SHAPE), coins(5, *SHAPE)
    grids, order = grids_of(weights), np.array([2, 0, 1])
    moved = jax.tree.map(lambda x: x[:, order], (weights, grids, chosen))
    halves = [grid._replace(scale=grid.scale / 2) for grid in grids]
    for (_, before), (_, permuted), (_, halved) in zip(
        study(weights, grids, chosen),
        study(*moved),
        study(weights / 2, halves, chosen),
        strict=True,
    ):
        permuted_before = jax.tree.map(lambda x: x[:, order], before.placement)
        assert_same(permuted_before, permuted.placement)
        assert_same(before.placement, halved.placement)


@pytest.mark.slow
def test_vmap_places_each_weight_tensor_on_its_own_grid():
    weights = normal(6, 2, *SHAPE)
    grids = [grids_of(part)[0] for part in weights]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *grids)

    @jax.jit
    @jax.vmap
    def place(weights, params):
        return rounding.place(weights, params, EIGHT)

    together = jax.device_get(place(weights, stacked))
    for i in range(2):
        alone = study(weights[i], [grids[i]] * 3, coins(6, *SHAPE))[0][1]
        assert_same(alone.placement, jax.tree.map(lambda x, i=i: x[i], together))


@pytest.mark.slow
def test_float32_is_kept_where_x64_is_enabled():
    weights, chosen = normal(7, *SHAPE), coins(7, *SHAPE)
    grids = grids_of(weights)
    expected = [result for _, result in study(weights, grids, chosen)]
    draw = jax.jit(rounding.stochastic_rounding)
    with jax.enable_x64(True):
        results = study(weights.astype(np.float64), grids, chosen)
        drawn = draw(jax.random.key(0), expected[0].placement)
    assert drawn.dtype == jnp.float32
    assert_same([result for _, result in results], expected)


@pytest.mark.slow
def test_threshold_rounding_goes_up_above_the_threshold_only():
    placement = rounding.Placement(
        lower=jnp.zeros(4, jnp.int32),
        fraction=jnp.array([0.2, 0.5, 0.8, 0.0]),
        nearest=jnp.zeros(4),
        free=jnp.array([True, True, True, False]),
    )
    up = rounding.threshold_rounding(jnp.array([0.5, 0.5, 0.5, 0.0]), placement)
    assert up.tolist() == [0.0, 0.0, 1.0, 0.0]
