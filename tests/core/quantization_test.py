# SPDX-License-Identifier: Apache-2.0
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as numpy_strategies

from nad_jax import errors
from nad_jax.core import quantization

Spec = quantization.QuantSpec
BITS = range(2, 9)
SOME_SPECS = [Spec(8), Spec(4, False, -1, "minmax"), Spec(2, True, None)]

# Compiling is what these tests spend their time on: few functions, few shapes.
calibrate = jax.jit(quantization.calibrate, static_argnums=(1,))
calibrate_activations = jax.jit(quantization.calibrate_activations, static_argnums=1)
fake_quant = jax.jit(quantization.fake_quant, static_argnums=2)


class Study(NamedTuple):
    params: quantization.QuantParams
    codes: jax.Array
    values: jax.Array
    gradient: jax.Array


@jax.jit(static_argnums=3)
def study(x, calibration_values, cotangent, spec):
    """All there is to know of `x` on the grid of other values."""
    params = quantization.calibrate(calibration_values, spec)
    codes = quantization.quantize(x, params, spec)
    _, pullback = jax.vjp(lambda x: quantization.fake_quant(x, params, spec), x)
    (gradient,) = pullback(cotangent)
    return Study(params, codes, quantization.dequantize(codes, params), gradient)


@jax.jit(static_argnums=2)
def round_trip(codes, params, spec):
    values = quantization.dequantize(codes, params)
    return values, quantization.quantize(values, params, spec)

few = hypothesis.settings(
    max_examples=80, deadline=None, derandomize=True, database=None
)
seeds = strategies.integers(0, 2**31)
any_floats = strategies.floats(allow_nan=False, allow_infinity=False, width=32)
ordinary_floats = strategies.floats(-8, 8, width=32)
matrices = numpy_strategies.arrays(np.float32, (6, 3), elements=any_floats)


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def reduced_axes(x, spec):
    """Axes that share one scale, spelled out."""
    if spec.channel_axis is None:
        return tuple(range(x.ndim))
    axes = list(range(x.ndim))
    del axes[spec.channel_axis]
    return tuple(axes)


def grid_of_range(low, high, spec):
    """Scale and zero point in float64, from the definition."""
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    if spec.symmetric:
        scale = np.maximum(-low, high) / (2 ** (spec.bits - 1) - 1)
        return scale, np.zeros_like(scale)
    scale = (high - low) / (2**spec.bits - 1)
    return scale, np.round(-low / scale)


def nearest_on_grid(x, scale, zero_point, spec):
    last = 2 ** (spec.bits - 1) - 1 if spec.symmetric else 2**spec.bits - 1
    first = -last if spec.symmetric else 0
    codes = np.clip(np.round(x / scale) + zero_point, first, last)
    return scale * (codes - zero_point)


def measured_range(x, spec):
    """`absmax` and `minmax` in float64."""
    x, axes = x.astype(np.float64), reduced_axes(x, spec)
    if spec.range_method == "absmax":
        high = np.abs(x).max(axes, keepdims=True)
        return -high, high
    return x.min(axes, keepdims=True), x.max(axes, keepdims=True)


def assert_same_params(left, right):
    np.testing.assert_array_equal(left.scale, right.scale)
    np.testing.assert_array_equal(left.zero_point, right.zero_point)


# --- the grid ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_a_symmetric_grid_is_narrow_and_an_affine_one_unsigned(bits):
    symmetric, affine = Spec(bits, True), Spec(bits, False)
    half = {2: 1, 3: 3, 4: 7, 5: 15, 6: 31, 7: 63, 8: 127}[bits]
    assert (symmetric.qmin, symmetric.qmax) == (-half, half)
    assert (affine.qmin, affine.qmax) == (0, 2 * half + 1)
    for spec in (symmetric, affine):
        storage = jnp.iinfo(spec.dtype)
        assert storage.bits == 8
        assert storage.min <= spec.qmin and spec.qmax <= storage.max


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.5, True, "4", None])
def test_a_width_outside_2_to_8_is_refused_and_printed(bits):
    with pytest.raises(errors.InputError, match="2 to 8") as caught:
        Spec(bits)
    assert repr(bits) in str(caught.value)


def test_an_unknown_range_method_is_answered_with_the_known_ones():
    with pytest.raises(errors.InputError, match="absmax, minmax, mse, got 'max'"):
        Spec(range_method="max")


@pytest.mark.parametrize("axis", [2, -3])
def test_a_channel_axis_that_does_not_exist_is_refused(axis):
    with pytest.raises(errors.InputError, match=r"channel_axis -?\d .* \(2, 3\)"):
        quantization.calibrate(jnp.ones((2, 3)), Spec(channel_axis=axis))


def test_a_numpy_integer_is_a_width():
    spec = Spec(np.int64(4), False)
    x = jnp.array([0.0, 7.5, 15.0])
    params = quantization.QuantParams(jnp.ones(1), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(quantization.quantize(x, params, spec), [0, 8, 15])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_every_code_survives_the_way_to_floats_and_back(bits, symmetric):
    spec = Spec(bits, symmetric)
    codes = np.resize(np.arange(spec.qmin, spec.qmax + 1), 256)[:, None]
    scale = np.array([[1e-30, 1e-3, 0.1, 1 / 3, 0.7, 1.0, 3e4, 1e30]], np.float32)
    zero_point = np.resize([0] if symmetric else [0, 1, spec.qmax // 2, spec.qmax], 8)
    params = quantization.QuantParams(
        jnp.asarray(scale), jnp.asarray(zero_point[None], jnp.int32)
    )
    stored = jnp.asarray(np.broadcast_to(codes, (codes.size, 8)), spec.dtype)
    values, back = round_trip(stored, params, spec)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, scale * (codes - zero_point), rtol=1e-6)
    assert back.dtype == (jnp.int8 if symmetric else jnp.uint8)
    np.testing.assert_array_equal(back, stored)


def test_ties_go_to_the_even_multiple_of_the_step():
    x = jnp.array([0.25, 0.75, 1.25, -0.25, -0.75, -1.25])  # 0.5, 1.5, 2.5 steps
    even = [0, 2, 2, 0, -2, -2]
    params = quantization.QuantParams(jnp.full(1, 0.5), jnp.zeros(1, jnp.int32))
    np.testing.assert_array_equal(quantization.quantize(x, params, Spec(4)), even)
    np.testing.assert_array_equal(jnp.round(x / 0.5), even)
    # The rule is about multiples of the step: an odd zero point moves even codes to odd
    params = quantization.QuantParams(jnp.full(1, 0.5), jnp.full(1, 3, jnp.int32))
    codes = quantization.quantize(x, params, Spec(4, False))
    np.testing.assert_array_equal(codes, np.add(even, 3))


@few
@hypothesis.given(
    x=matrices, spec=strategies.sampled_from(SOME_SPECS), magnitude=any_floats
)
def test_codes_are_those_of_float32_numpy(x, spec, magnitude):
    """IEEE division and half-even rounding leave nothing to choose, bit for bit."""
    scale = np.maximum(np.abs(np.float32(magnitude)), np.float32(1e-30))
    zero_point = 0 if spec.symmetric else (spec.qmax + 1) // 2
    params = quantization.QuantParams(
        jnp.full((1, 1), scale), jnp.full((1, 1), zero_point, jnp.int32)
    )
    with np.errstate(over="ignore"):
        codes = np.clip(np.round(x / scale) + zero_point, spec.qmin, spec.qmax)
    np.testing.assert_array_equal(quantize(x, params, spec), codes)


# --- ranges ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["absmax", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, -1, 0, 1])
def test_calibration_matches_the_definition_in_float64(axis, symmetric, method):
    x = normal(1, 3, 4, 5) + np.float32(0.3)
    for bits in (2, 4, 8):
        spec = Spec(bits, symmetric, axis, method)
        params = quantization.calibrate(jnp.asarray(x), spec)
        shape = [1, 1, 1]
        if axis is not None:
            shape[axis] = x.shape[axis]
        assert params.scale.shape == params.zero_point.shape == tuple(shape)
        assert params.scale.dtype == jnp.float32
        assert params.zero_point.dtype == jnp.int32
        low, high = measured_range(x, spec)
        scale, _ = grid_of_range(low, high, spec)
        np.testing.assert_allclose(params.scale, scale, rtol=1e-6)
        # |.| <= 1/2, not equality with round(): a range symmetric around 0 is a tie.
        offset = np.minimum(low, 0.0) / scale if not symmetric else 0.0
        assert np.all(np.abs(offset + np.asarray(params.zero_point)) <= 0.5 + 1e-4)


def test_a_grid_by_hand():
    params = quantization.params_from_range(-1.0, 2.0, Spec(2, False))
    assert (float(params.scale), int(params.zero_point)) == (1.0, 1)
    params = quantization.params_from_range(-1.0, 14.0, Spec(4, True))
    assert (float(params.scale), int(params.zero_point)) == (2.0, 0)
    # Widened to contain 0: [3, 6] becomes [0, 6], and [-6, -3] becomes [-6, 0].
    params = quantization.params_from_range(3.0, 6.0, Spec(2, False))
    assert (float(params.scale), int(params.zero_point)) == (2.0, 0)
    params = quantization.params_from_range(-6.0, -3.0, Spec(2, False))
    assert (float(params.scale), int(params.zero_point)) == (2.0, 3)


def test_minmax_is_absmax_on_a_symmetric_grid():
    x = jnp.asarray(normal(2, 6, 4))
    assert_same_params(
        quantization.calibrate(x, Spec(4, range_method="minmax")),
        quantization.calibrate(x, Spec(4, range_method="absmax")),
    )


@pytest.mark.parametrize("axis", [None, -1])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_mse_takes_the_best_of_all_shrinks(bits, symmetric, axis):
    """Every shrink tried one by one in float64."""
    spec = Spec(bits, symmetric, axis, "mse")
    x = np.random.default_rng(bits).standard_t(3, (200, 3)).astype(np.float32)
    wide, axes = x.astype(np.float64), reduced_axes(x, spec)
    low, high = wide.min(axes, keepdims=True), wide.max(axes, keepdims=True)
    scales, mistakes = [], []
    for i in range(80):
        shrink = 1 - 0.01 * i
        grid = grid_of_range(low * shrink, high * shrink, spec)
        missed = np.square(nearest_on_grid(wide, *grid, spec) - wide)
        scales.append(grid[0])
        mistakes.append(missed.mean(axes, keepdims=True))
    params = calibrate(jnp.asarray(x), spec)
    best = np.argmin(mistakes, 0)[None]
    np.testing.assert_allclose(
        params.scale, np.take_along_axis(np.array(scales), best, 0)[0], rtol=1e-5
    )
    assert np.all(best > 0), "a heavy tail must be worth clipping"
    grid = (np.float64(params.scale), np.float64(params.zero_point))
    missed = np.square(nearest_on_grid(wide, *grid, spec) - wide)
    assert np.all(missed.mean(axes, keepdims=True) <= np.min(mistakes, 0) * (1 + 1e-4))


@pytest.mark.parametrize("shrinks", [(1.0, 0.5), (0.5, 1.0)])
def test_mse_keeps_the_earlier_of_two_equal_shrinks(shrinks):
    # Grid {-s, 0, s}: s = 1 loses 0.5 to the tie, s = 0.5 loses 0.5 to clipping.
    x = jnp.array([1.0, 0.5])
    spec = Spec(2, True, None, "mse")
    params = quantization.calibrate(x, spec, shrinks=shrinks)
    assert params.scale.item() == shrinks[0]


def test_the_shrinks_are_those_of_the_observers():
    weights = quantization.WEIGHT_SHRINKS
    activations = quantization.ACTIVATION_SHRINKS
    assert (len(weights), len(activations)) == (80, 95)
    for factors, last in ((weights, 0.21), (activations, 0.06)):
        np.testing.assert_allclose(factors, np.linspace(1, last, len(factors)))


@pytest.mark.parametrize("method", quantization.RANGE_METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_calibration_commutes_with_powers_of_two(symmetric, method):
    """No range method looks at the unit of the weights, however tiny or huge."""
    x, spec = jnp.asarray(normal(3, 300, 2)), Spec(4, symmetric, -1, method)
    params = calibrate(x, spec)
    for exponent in (-110, -70, -1, 65, 110):
        scaled = calibrate(jnp.ldexp(x, exponent), spec)
        np.testing.assert_array_equal(scaled.scale, jnp.ldexp(params.scale, exponent))
        np.testing.assert_array_equal(scaled.zero_point, params.zero_point)


@few
@hypothesis.given(x=matrices, spec=strategies.sampled_from(SOME_SPECS))
def test_any_finite_tensor_gets_a_usable_grid(x, spec):
    params = calibrate(x, spec)
    assert np.all(np.isfinite(params.scale)) and np.all(params.scale > 0)
    assert np.all(params.zero_point >= spec.qmin)
    assert np.all(params.zero_point <= spec.qmax)
    codes = quantize(x, params, spec)
    assert np.all((codes >= spec.qmin) & (codes <= spec.qmax))
    assert np.all(np.isfinite(dequantize(codes, params)))
    zeros = fake_quant(np.zeros_like(x), params, spec)
    np.testing.assert_array_equal(zeros, 0.0)


@few
@hypothesis.given(
    x=numpy_strategies.arrays(np.float32, (5, 3), elements=ordinary_floats),
    spec=strategies.sampled_from(SOME_SPECS),
    method=strategies.sampled_from(["absmax", "minmax"]),
    clip=strategies.sampled_from([1.0, 0.5]),
)
def test_nearest_is_within_half_a_step_unless_clipped(x, spec, method, clip):
    spec = Spec(spec.bits, spec.symmetric, spec.channel_axis, method)
    params = quantization.calibrate(jnp.asarray(x * np.float32(clip)), spec)
    scale, zero_point = np.float64(params.scale), np.int64(params.zero_point)
    low, high = scale * (spec.qmin - zero_point), scale * (spec.qmax - zero_point)
    rounded = np.float64(fake_quant(x, params, spec))
    half = 0.5 * scale * (1 + 1e-4)
    inside = (x >= low) & (x <= high)
    assert np.all(np.abs(rounded - x)[inside] <= np.broadcast_to(half, x.shape)[inside])
    ends = np.where(x < low, low, high)[~inside]
    np.testing.assert_allclose(rounded[~inside], ends, rtol=1e-5)
    if clip == 1.0:  # the range of x itself reaches half a step further at most
        assert np.all((x >= low - half) & (x <= high + half))


def test_zero_channels_and_channels_below_float32_get_scale_one():
    x = jnp.array([[0.0, 1e-40, 3.0], [0.0, -1e-38, -1.5]])
    for spec in (Spec(8), Spec(8, False), Spec(8, False, -1, "mse")):
        params = calibrate(x, spec)
        np.testing.assert_array_equal(params.scale[0, :2], 1.0)
        np.testing.assert_array_equal(fake_quant(x, params, spec)[:, :2], 0.0)
        assert params.scale[0, 2] < 0.1


def test_a_range_too_wide_for_float32_gives_finite_values():
    x, spec = jnp.array([-3e38, 3e38, 1.0]), Spec(8, False, None, "minmax")
    params = calibrate(x, spec)
    assert np.all(np.isfinite(params.scale))
    assert np.all(np.isfinite(fake_quant(x, params, spec)))


@pytest.mark.parametrize("method", quantization.RANGE_METHODS)
def test_a_tensor_without_values_gets_scale_one(method):
    params = quantization.calibrate(jnp.zeros((0, 3)), Spec(range_method=method))
    np.testing.assert_array_equal(params.scale, np.ones((1, 3)))
    no_channels = quantization.calibrate(jnp.zeros((3, 0)), Spec())
    assert no_channels.scale.shape == (1, 0)
    codes = quantization.quantize(jnp.zeros((0, 3)), params, Spec())
    assert (codes.shape, codes.dtype) == ((0, 3), jnp.int8)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_measured_and_quantized_as_float32(dtype):
    x = jnp.asarray(normal(4, 16, 3), dtype)
    wide = x.astype(jnp.float32)
    for spec in (Spec(8), Spec(4, False, -1, "minmax")):
        params = calibrate(x, spec)
        assert_same_params(params, calibrate(wide, spec))
        np.testing.assert_array_equal(
            quantize(x, params, spec), quantize(wide, params, spec)
        )
        rounded = fake_quant(x, params, spec)
        assert rounded.dtype == dtype
        expected = fake_quant(wide, params, spec).astype(dtype)
        np.testing.assert_array_equal(
            rounded.astype(jnp.float32), expected.astype(jnp.float32)
        )


# --- fake_quant and its gradient -----------------------------------------------------


@few
@hypothesis.given(x=matrices, spec=strategies.sampled_from(SOME_SPECS))
def test_fake_quant_is_dequantized_quantize_bit_for_bit(x, spec):
    params = calibrate(x, spec)
    expected = dequantize(quantize(x, params, spec), params)
    np.testing.assert_array_equal(fake_quant(x, params, spec), expected)
    x = jnp.asarray(x)
    np.testing.assert_array_equal(quantization.fake_quant(x, params, spec), expected)


@few
@hypothesis.given(seed=seeds, spec=strategies.sampled_from(SOME_SPECS))
def test_the_gradient_is_straight_through_except_where_clipped(seed, spec):
    x, cotangent = normal(seed, 6, 3), normal(seed + 1, 6, 3)
    params = calibrate(x * np.float32(0.5), spec)
    codes = np.round(x / np.float64(params.scale)) + np.int64(params.zero_point)
    inside = (codes >= spec.qmin) & (codes <= spec.qmax)
    value, gradient = weighted_gradient(x, params, cotangent, spec)
    np.testing.assert_array_equal(gradient, np.where(inside, cotangent, 0.0))
    np.testing.assert_array_equal(value, fake_quant(x, params, spec))


@jax.jit(static_argnums=3)
def weighted_gradient(x, params, cotangent, spec):
    value, pullback = jax.vjp(lambda x: quantization.fake_quant(x, params, spec), x)
    return value, pullback(cotangent)[0]


def test_the_weights_that_set_the_scale_keep_their_gradient():
    """scale * qmax misses the largest weight by a last bit, up or down, by luck."""
    x = jnp.asarray(normal(5, 9, 500))
    for spec in (Spec(8), Spec(4, False, -1, "minmax")):
        params = calibrate(x, spec)
        _, gradient = weighted_gradient(x, params, jnp.ones_like(x), spec)
        np.testing.assert_array_equal(gradient, 1.0)


def test_zeros_after_a_relu_keep_their_gradient():
    spec = Spec(4, False, None, "minmax")
    x = jnp.array([0.0, 0.0, 0.4, 1.0])
    _, gradient = weighted_gradient(x, calibrate(x, spec), jnp.ones_like(x), spec)
    np.testing.assert_array_equal(gradient, 1.0)


def test_no_gradient_reaches_the_grid():
    x = jnp.asarray(normal(6, 4, 2))

    def through_scale(scale):
        params = quantization.QuantParams(scale, jnp.zeros((1, 1), jnp.int32))
        return jnp.sum(quantization.fake_quant(x, params, Spec(4)))

    def through_range(x):
        return jnp.sum(quantization.calibrate(x, Spec(4)).scale)

    assert jax.grad(through_scale)(jnp.full((1, 1), 0.3)) == 0.0
    np.testing.assert_array_equal(jax.grad(through_range)(x), 0.0)


def test_straight_through_takes_value_and_gradient_from_different_arguments():
    def square(x, rounded):
        return quantization.straight_through(x, rounded) ** 2

    value, gradients = jax.value_and_grad(square, argnums=(0, 1))(1.4, 1.0)
    assert (value, gradients) == (1.0, (2.0, 0.0))
    _, tangent = jax.jvp(square, (1.4, 1.0), (3.0, 5.0))
    assert tangent == 6.0


def test_transformations_compose():
    """jit, vmap and grad, alone and together, see the same numbers."""
    spec, x = Spec(4, False, -1, "minmax"), jnp.asarray(normal(7, 3, 6, 2))

    def loss(x):
        return jnp.sum(fake_quant(x, quantization.calibrate(x, spec), spec) ** 2)

    one_by_one = [jax.grad(loss)(part) for part in x]
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(x), one_by_one)


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_calibration_is_the_same_under_jit_vmap_and_shard_map(method):
    spec, x = Spec(4, False, -1, method), jnp.asarray(normal(8, 8, 20, 3))
    each = [quantization.calibrate(x[0], spec), quantization.calibrate(x[7], spec)]
    many = jax.jit(jax.vmap(lambda x: quantization.calibrate(x, spec)))(x)
    mesh = jax.make_mesh((8,), ("i",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("i")
    spread = jax.shard_map(
        lambda x: quantization.calibrate(x, spec),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
    )
    spread = jax.jit(spread)(x.reshape(160, 3))
    for index, alone in zip((0, 7), each, strict=True):
        assert_same_params(alone, jax.tree.map(lambda p: p[index], many))
        shard = jax.tree.map(lambda p: p[index : index + 1], spread)
        assert_same_params(alone, shard)


def test_float32_is_kept_where_x64_is_enabled():
    x = jnp.asarray(normal(9, 6, 2))
    spec = Spec(4, False, -1, "mse")
    params = quantization.calibrate(x, spec)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.float64(x))
        for values in (x, wide):
            again = quantization.calibrate(values, spec)
            assert (again.scale.dtype, again.zero_point.dtype) == ("float32", "int32")
            assert_same_params(again, params)
        assert quantization.fake_quant(wide, params, spec).dtype == jnp.float64
        per_tensor = Spec(4, False, None, "mse")
        grid = quantization.calibrate_activations(x, per_tensor)
        assert grid.scale.dtype == jnp.float32


# --- activations ---------------------------------------------------------------------


def ema_of_ranges(batches, spec, ema):
    """Batch after batch, in float64."""
    low = high = None
    for batch in batches.astype(np.float64):
        batch_low, batch_high = min(batch.min(), 0.0), max(batch.max(), 0.0)
        if spec.symmetric or spec.range_method == "absmax":
            batch_high = max(-batch_low, batch_high)
            batch_low = -batch_high
        if spec.range_method == "mse":
            tried = []
            for i in range(95):
                ends = batch_low * (1 - 0.01 * i), batch_high * (1 - 0.01 * i)
                rounded = nearest_on_grid(batch, *grid_of_range(*ends, spec), spec)
                tried.append((np.mean(np.square(rounded - batch)), i, ends))
            batch_low, batch_high = min(tried)[2]
        low = batch_low if low is None else ema * low + (1 - ema) * batch_low
        high = batch_high if high is None else ema * high + (1 - ema) * batch_high
    return grid_of_range(low, high, spec)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", quantization.RANGE_METHODS)
def test_activation_ranges_are_averaged_like_a_numpy_ema(method, symmetric):
    spec = Spec(4, symmetric, None, method)
    batches = normal(10, 6, 64) + np.float32(0.4)
    for ema in (0.9, 0.5):
        params = quantization.calibrate_activations(jnp.asarray(batches), spec, ema=ema)
        scale, zero_point = ema_of_ranges(batches, spec, ema)
        assert params.scale.shape == params.zero_point.shape == ()
        np.testing.assert_allclose(params.scale, scale, rtol=1e-5)
        if method != "absmax":  # where the zero point of an affine grid is a tie
            assert params.zero_point.item() == zero_point


def test_the_average_by_hand():
    batches = jnp.array([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    spec = Spec(2, False, None, "minmax")
    for ema, high in ((0.9, 0.9 * (0.9 + 0.2) + 0.4), (0.5, 2.75), (0.0, 4.0)):
        params = quantization.calibrate_activations(batches, spec, ema=ema)
        assert params.scale.item() == pytest.approx(high / 3)


def test_one_batch_is_calibrated_by_itself():
    batch = jnp.asarray(normal(11, 1, 50))
    for method in ("absmax", "minmax"):
        spec = Spec(8, False, None, method)
        alone = quantization.calibrate(batch[0], spec)
        params = quantization.calibrate_activations(batch, spec)
        assert_same_params(jax.tree.map(jnp.squeeze, alone), params)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dead_batch_counts_as_an_empty_range(symmetric):
    """Its grid has the scale 1, which must not enter the average of the ranges."""
    batches = jnp.array([[0.0, 0.0], [0.0, 0.1]])
    spec = Spec(4, symmetric, None, "minmax")
    params = quantization.calibrate_activations(batches, spec)
    assert params.scale.item() == pytest.approx(0.1 * 0.1 / spec.qmax)


def test_no_activations_at_all_give_scale_one():
    for shape in ((0, 4), (3, 0)):
        params = quantization.calibrate_activations(
            jnp.zeros(shape), Spec(8, False, None, "minmax")
        )
        assert (params.scale, params.zero_point) == (1.0, 0)


def test_activations_need_a_per_tensor_grid_and_two_axes():
    bad = [((2, 4), Spec(8)), ((4,), Spec(8, channel_axis=None))]
    for shape, spec in bad:
        with pytest.raises(errors.InputError, match="per-tensor .* shape"):
            quantization.calibrate_activations(jnp.ones(shape), spec)


def test_the_grids_of_all_kinds_of_ranges_represent_what_they_measured():
    """End to end, in float64: no method leaves weights further than its worst case."""
    x = normal(12, 64, 4)
    for bits, symmetric, axis, method in itertools.product(
        (4, 8), (True, False), (None, -1), ("absmax", "minmax")
    ):
        spec = Spec(bits, symmetric, axis, method)
        params = quantization.calibrate(jnp.asarray(x), spec)
        missed = np.abs(np.float64(quantization.fake_quant(x, params, spec)) - x)
        # Half a step of rounding; at the ends, half a step of the zero point.
        assert np.all(missed <= np.float64(params.scale) * (1.0 + 1e-4))
