# SPDX-License-Identifier: Apache-2.0
import math
from typing import NamedTuple

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
    max_examples=80, deadline=None, derandomize=True, database=None
)
seeds = strategies.integers(0, 2**31)
any_spec = strategies.sampled_from(SPECS)
any_weights = numpy_strategies.arrays(
    np.float32,
    SHAPE,
    elements=strategies.floats(allow_nan=False, allow_infinity=False, width=32),
)


class Study(NamedTuple):
    params: quantization.QuantParams
    placement: rounding.Placement
    nearest: jax.Array
    flipped: jax.Array
    logits: jax.Array
    soft: jax.Array
    hard: jax.Array
    error: jax.Array
    soft_weights: jax.Array
    quantized: tuple[jax.Array, jax.Array]
    rounded: dict[str, tuple[jax.Array, jax.Array, jax.Array]]


def study(weights, params, other, spec) -> Study:
    """All there is to know of weights on a grid, as NumPy arrays.

    `rounded` holds codes, weights and flip rate of nearest, flipped and `other`.
    """
    return jax.device_get(_study(weights, params, other, spec))


# Compiling is what these tests spend their time on: one function, one shape.
@jax.jit(static_argnums=3)
def _study(weights, params, other, spec):
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


def grid_of(weights, spec):
    return jax.device_get(_calibrate(weights, spec))


_calibrate = jax.jit(quantization.calibrate, static_argnums=1)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def coins(seed, *shape):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(np.float32)


def ordinary(seed, spec, covered=1.0):
    """Weights on the grid of `covered` times themselves, and a random rounding."""
    weights = normal(seed, *SHAPE)
    params = grid_of(weights * np.float32(covered), spec)
    return weights, study(weights, params, coins(seed, *SHAPE), spec)


def unit_grid(zero_point=0):
    """Steps of 1: weights are written in steps."""
    return quantization.QuantParams(
        np.ones((1, 3), np.float32), np.full((1, 3), zero_point, np.int32)
    )


def in_steps(weights, spec, zero_point=0, other=0.0) -> Study:
    """`study` of a list of weights written in steps, `other` for each of them."""
    padded = np.zeros(SHAPE, np.float32)
    padded.flat[: len(weights)] = weights
    rounding_value = np.full(SHAPE, other, np.float32)
    result = study(padded, unit_grid(zero_point), rounding_value, spec)
    return jax.tree.map(
        lambda x: x.flatten()[: len(weights)] if np.shape(x) == SHAPE else x, result
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


@hypothesis.settings(few, max_examples=30)
@hypothesis.given(
    seed=seeds, spec=any_spec, covered=strategies.sampled_from([1.0, 0.6])
)
def test_every_weight_is_placed_as_by_hand(seed, spec, covered):
    weights, result = ordinary(seed, spec, covered)
    scale, zero_point = (np.broadcast_to(p, SHAPE) for p in result.params)
    placement = result.placement
    for index in np.ndindex(SHAPE):
        steps = float(weights[index]) / float(scale[index])
        if abs(steps % 0.5) < 2e-5:
            continue  # float64 may see the other side of a tie
        lower, fraction, nearest, free = place_by_hand(
            weights[index], scale[index], int(zero_point[index]), spec
        )
        assert placement.lower[index] == lower
        assert placement.free[index] == free
        assert placement.fraction[index] == pytest.approx(fraction, abs=2e-5)
        assert placement.nearest[index] == nearest


@few
@hypothesis.given(weights=any_weights, spec=any_spec, seed=seeds)
def test_nearest_is_what_the_quantizer_does_bit_for_bit(weights, spec, seed):
    """For any finite weights, on their own grid and on one that clips most of them."""
    for calibration_weights in (weights, normal(seed, *SHAPE)):
        params = grid_of(calibration_weights, spec)
        result = study(weights, params, coins(seed, *SHAPE), spec)
        codes, values, flip_rate = result.rounded["nearest"]
        np.testing.assert_array_equal(codes, result.quantized[0])
        np.testing.assert_array_equal(values, result.quantized[1])
        assert flip_rate == 0.0


@few
@hypothesis.given(weights=any_weights, spec=any_spec, seed=seeds)
def test_everything_is_finite_for_any_finite_weights(weights, spec, seed):
    params = grid_of(normal(seed, *SHAPE), spec)
    result = study(weights, params, coins(seed, *SHAPE), spec)
    for leaf in jax.tree.leaves(result):
        assert np.all(np.isfinite(leaf))
    assert np.all((result.placement.fraction >= 0) & (result.placement.fraction < 1))
    for codes, _, flip_rate in result.rounded.values():
        assert np.all((codes >= spec.qmin) & (codes <= spec.qmax))
        assert 0 <= flip_rate <= 1


@few
@hypothesis.given(
    seed=seeds, spec=any_spec, covered=strategies.sampled_from([1.0, 0.6])
)
def test_any_rounding_takes_the_floor_or_the_ceiling(seed, spec, covered):
    weights, result = ordinary(seed, spec, covered)
    scale, zero_point = result.params
    steps = weights / np.float64(scale)
    free = result.placement.free
    for name in ("nearest", "flipped", "other"):
        codes, values, _ = result.rounded[name]
        taken = codes.astype(np.int64) - zero_point
        floor_or_ceiling = (taken == np.floor(steps)) | (taken == np.ceil(steps))
        assert np.all(floor_or_ceiling[free])
        missed = np.abs(values - np.float64(weights)) / scale
        assert np.all(missed[free] < 1.0)
        end = (codes == spec.qmin) | (codes == spec.qmax)
        assert np.all((missed < 2e-4)[~free & ~end])
        np.testing.assert_allclose(values, np.float64(scale) * taken, rtol=1e-6)
    taken_up = result.rounded["other"][0] - result.placement.lower
    np.testing.assert_array_equal(taken_up, coins(seed, *SHAPE) * free)


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


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 8])
def test_exact_grid_points_are_pinned(bits, symmetric):
    """All codes, on grids of many scales, and again after measuring the grid anew."""
    spec = Spec(bits, symmetric, -1, "minmax")
    codes = np.resize(np.arange(spec.qmin, spec.qmax + 1), 256)[:, None]
    random = np.random.default_rng(bits)
    scale = np.exp(random.uniform(-30, 30, (1, 100))).astype(np.float32)
    first = 0 if symmetric else random.integers(0, spec.qmax, (1, 100), endpoint=True)
    zero_point = np.broadcast_to(first, (1, 100)).astype(np.int32)
    params = quantization.QuantParams(jnp.asarray(scale), jnp.asarray(zero_point))

    @jax.jit
    def pinned_and_replaced(params):
        weights = params.scale * (codes - params.zero_point).astype(jnp.float32)
        own = quantization.calibrate(weights, spec)
        placements = [rounding.place(weights, grid, spec) for grid in (params, own)]
        return [
            (p.free, p.lower, p.fraction, rounding.flipped_rounding(p))
            for p in placements
        ]

    for free, lower, fraction, flipped in jax.device_get(pinned_and_replaced(params)):
        assert not free.any()
        np.testing.assert_array_equal(lower, np.broadcast_to(codes, lower.shape))
        np.testing.assert_array_equal(fraction, 0)
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
    weights = np.zeros(SHAPE, np.float32)
    for spec in (EIGHT, AFFINE):
        grid = grid_of(weights, spec)
        result = study(weights, grid, np.ones(SHAPE, np.float32), spec)
        assert not result.placement.free.any()
        for codes, values, _ in result.rounded.values():
            np.testing.assert_array_equal(codes, 0)
            np.testing.assert_array_equal(values, 0.0)


def test_bfloat16_weights_are_placed_like_their_float32_values():
    weights = normal(1, *SHAPE).astype(jnp.bfloat16)
    wide = weights.astype(np.float32)
    params = grid_of(wide, AFFINE)
    narrow = study(weights, params, coins(1, *SHAPE), AFFINE)
    wide = study(wide, params, coins(1, *SHAPE), AFFINE)
    for left, right in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


# --- roundings -----------------------------------------------------------------------


@few
@hypothesis.given(seed=seeds, spec=any_spec)
def test_flipped_is_the_opposite_of_nearest_except_where_pinned(seed, spec):
    _, result = ordinary(seed, spec, 0.8)
    free = result.placement.free
    np.testing.assert_array_equal((result.flipped + result.nearest)[free], 1.0)
    np.testing.assert_array_equal(result.flipped[~free], 0.0)
    assert result.rounded["flipped"][2] == pytest.approx(free.mean())
    steps = result.rounded["flipped"][0] - result.rounded["nearest"][0].astype(int)
    np.testing.assert_array_equal(np.abs(steps), free)


@few
@hypothesis.given(seed=seeds, spec=any_spec)
def test_flip_rate_counts_weights_that_left_nearest(seed, spec):
    weights, result = ordinary(seed, spec, 0.8)
    codes, _, flip_rate = result.rounded["other"]
    moved = np.mean(codes != result.quantized[0])
    assert flip_rate == pytest.approx(moved)


def test_no_weight_of_an_empty_tensor_is_flipped():
    empty = np.zeros((0, 3), np.float32)
    for _, values, flip_rate in study(empty, unit_grid(), empty, FOUR).rounded.values():
        assert values.shape == (0, 3)
        assert flip_rate == 0.0


def test_stochastic_rounding_is_unbiased():
    """The mean of 20,000 draws, against six standard errors of each weight."""
    draws = 20_000
    weights = [0.1, 0.5, 0.9, -0.1, 2.03, -3.97, 3.0, 9.0, -9.0]
    placement = in_steps(weights, FOUR).placement
    many = jax.tree.map(lambda x: np.tile(x, (draws, 1)), placement)

    @jax.jit
    def draw(key):
        up = rounding.stochastic_rounding(key, many)
        unit = jax.tree.map(lambda x: x[:, :1], unit_grid())
        return up, rounding.rounded_weights(many, up, unit)

    up, rounded = jax.device_get(draw(jax.random.key(0)))
    assert up.dtype == np.float32
    assert np.all((up == 0) | (up == 1))
    fraction = np.float64(placement.fraction)
    error = np.sqrt(fraction * (1 - fraction) / draws)
    assert np.all(error[:6] > 0) and np.all(error[6:] == 0)
    bias = np.mean(rounded, 0, np.float64) - np.clip(weights, -7, 7)
    assert np.all(np.abs(bias) <= 6 * error + 1e-5)
    np.testing.assert_array_equal(draw(jax.random.key(0))[0], up)
    assert np.any(np.asarray(draw(jax.random.key(1))[0]) != up)


@few
@hypothesis.given(seed=seeds, spec=any_spec)
def test_soft_rounding_starts_at_the_weight(seed, spec):
    weights, result = ordinary(seed, spec)
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


@few
@hypothesis.given(seed=seeds, spec=any_spec)
def test_hardening_at_the_start_gives_nearest_rounding(seed, spec):
    """Except at exact ties, where V = 0 goes up and nearest to the even side."""
    _, result = ordinary(seed, spec, 0.8)
    no_tie = result.placement.fraction != 0.5
    np.testing.assert_array_equal(result.hard[no_tie], result.nearest[no_tie])


def test_a_logit_of_zero_goes_up():
    result = in_steps([0.5, 1.5], FOUR)
    np.testing.assert_array_equal(result.logits, 0.0)
    np.testing.assert_array_equal(result.hard, 1.0)
    logits = jnp.array([-1e-9, -0.0, 1e-9])
    np.testing.assert_array_equal(rounding.hard_rounding(logits), [0, 1, 1])


def test_logits_stay_within_their_limit():
    result = in_steps([0.0002, 0.25, 0.75, 0.9998, 2.0], FOUR)
    limited = jax.jit(lambda p: rounding.rounding_logits(p, limit=3.0))
    odds = math.log(3.0)
    expected = [-3, -odds, odds, 3, -3]
    np.testing.assert_allclose(limited(result.placement), expected, rtol=1e-6)
    expected = [-math.log(0.9998 / 0.0002), -odds, odds, math.log(0.9998 / 0.0002), -12]
    np.testing.assert_allclose(result.logits, expected, rtol=1e-4)


def test_soft_rounding_by_hand():
    logits = jnp.array([-30.0, -math.log(3.0), 0.0, math.log(3.0), 30.0])
    plain = rounding.soft_rounding(logits)
    np.testing.assert_allclose(plain, [0, 0.25, 0.5, 0.75, 1], atol=1e-7)
    stretched = rounding.soft_rounding(logits, gamma=-0.1, zeta=1.1)
    np.testing.assert_allclose(stretched, [0, 0.2, 0.5, 0.8, 1], atol=1e-7)
    assert (stretched[0], stretched[-1]) == (0.0, 1.0)


def test_the_gradient_of_soft_rounding_vanishes_where_it_is_clipped():
    @jax.jit
    def slope(logits, gamma, zeta):
        def height(logits):
            return jnp.sum(rounding.soft_rounding(logits, gamma=gamma, zeta=zeta))

        return jax.grad(height)(logits)

    logits = jnp.array([-5.0, 0.0, 5.0])
    np.testing.assert_allclose(slope(logits, -0.1, 1.1), [0, 1.2 / 4, 0], rtol=1e-6)
    tail = math.exp(-5.0) / (1 + math.exp(-5.0)) ** 2
    np.testing.assert_allclose(slope(logits, 0.0, 1.0), [tail, 0.25, tail], rtol=1e-5)


# --- weights and codes ---------------------------------------------------------------


def test_the_gradient_of_rounded_weights_is_the_step_where_free():
    """Also with pinned weights beside: their logits must not poison the others."""
    weights, result = ordinary(4, AFFINE, 0.8)
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


@few
@hypothesis.given(seed=seeds, spec=any_spec)
def test_codes_and_weights_tell_the_same_story(seed, spec):
    _, result = ordinary(seed, spec, 0.8)
    for codes, values, _ in result.rounded.values():
        assert codes.dtype == (np.int8 if spec.symmetric else np.uint8)
        scale, zero_point = result.params
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


@few
@hypothesis.given(seed=seeds, spec=any_spec)
def test_rounding_error_is_signed_and_zero_where_pinned(seed, spec):
    weights, result = ordinary(seed, spec, 0.8)
    free = result.placement.free
    exact = np.float64(weights) - result.quantized[1]
    scale = np.broadcast_to(np.float64(result.params.scale), SHAPE)
    # The compiler may fuse multiplication and subtraction: a last bit of the weight.
    missed = np.abs(result.error - exact)
    assert np.all(missed[free] <= 2**-23 * np.abs(weights)[free])
    np.testing.assert_array_equal(result.error[~free], 0.0)
    assert np.all(np.abs(result.error) <= 0.5 * scale * (1 + 1e-4))


def test_a_rounding_of_another_shape_is_refused():
    _, result = ordinary(0, FOUR)
    with pytest.raises(errors.InputError, match=r"\(3,\), the weights \(6, 3\)"):
        rounding.rounded_weights(result.placement, jnp.ones(3), result.params)


def test_placing_commutes_with_permuting_and_with_scaling():
    weights, chosen = normal(5, *SHAPE), coins(5, *SHAPE)
    order = np.array([2, 0, 1])
    for spec in (EIGHT, AFFINE):
        params = grid_of(weights, spec)
        before = study(weights, params, chosen, spec).placement
        moved = jax.tree.map(lambda x: x[:, order], (weights, params, chosen))
        moved = study(*moved, spec).placement
        halved = params._replace(scale=params.scale / 2)
        halved = study(weights / 2, halved, chosen, spec).placement
        for left, right in zip(before, moved, strict=True):
            np.testing.assert_array_equal(left[:, order], right)
        for left, right in zip(before, halved, strict=True):
            np.testing.assert_array_equal(left, right)


def test_vmap_places_each_weight_tensor_on_its_own_grid():
    weights, chosen = normal(6, 2, *SHAPE), coins(6, 2, *SHAPE)
    grids = [grid_of(part, EIGHT) for part in weights]
    stacked = jax.tree.map(lambda *parts: np.stack(parts), *grids)
    together = jax.vmap(lambda w, g, c: _study(w, g, c, EIGHT))(
        weights, stacked, chosen
    )
    together = jax.tree.leaves(jax.device_get(together))
    for i in range(2):
        alone = study(weights[i], grids[i], chosen[i], EIGHT)
        for left, right in zip(jax.tree.leaves(alone), together, strict=True):
            np.testing.assert_array_equal(left, right[i])


def test_float32_is_kept_where_x64_is_enabled():
    weights, chosen = normal(7, *SHAPE), coins(7, *SHAPE)
    params = grid_of(weights, EIGHT)
    expected = study(weights, params, chosen, EIGHT)
    draw = jax.jit(rounding.stochastic_rounding)
    with jax.enable_x64(True):
        values = study(weights.astype(np.float64), params, chosen, EIGHT)
        drawn = draw(jax.random.key(0), expected.placement)
    assert drawn.dtype == jnp.float32
    left, right = jax.tree.leaves(values), jax.tree.leaves(expected)
    for value, known in zip(left, right, strict=True):
        assert value.dtype == known.dtype
        np.testing.assert_array_equal(value, known)
