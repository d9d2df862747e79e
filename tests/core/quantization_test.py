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


def study(x, calibration_values, cotangent, spec) -> Study:
    """All there is to know of `x` on the grid of other values, as NumPy arrays."""
    return jax.device_get(_study(x, calibration_values, cotangent, spec))


@jax.jit(static_argnums=3)
def _study(x, calibration_values, cotangent, spec):
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
    # The rule is about multiples of the step: an odd zero point makes the codes odd.
    params = quantization.QuantParams(jnp.full(1, 0.5), jnp.full(1, 3, jnp.int32))
    codes = quantization.quantize(x, params, Spec(4, False))
    np.testing.assert_array_equal(codes, np.add(even, 3))


@pytest.mark.parametrize("symmetric", [True, False])
def test_ties_are_ties_on_a_grid_of_any_scale(symmetric):
    """Half steps that float32 represents exactly; a reciprocal would miss some."""
    spec = Spec(8, symmetric)
    odd = np.arange(2001, 2001 + 2 * 300, 2)
    scale = np.ldexp(odd, -14).astype(np.float32)[None]
    zero_point = 0 if symmetric else 100
    below = np.arange(spec.qmin, spec.qmax)[:, None] - zero_point
    x = ((below + 0.5) * scale).astype(np.float32)
    np.testing.assert_array_equal(x, (below + 0.5) * np.float64(scale))
    params = quantization.QuantParams(scale, np.full((1, 300), zero_point, np.int32))
    codes = jax.jit(quantization.quantize, static_argnums=2)(x, params, spec)
    even = np.where(below % 2 == 0, below, below + 1) + zero_point
    np.testing.assert_array_equal(codes, np.broadcast_to(even, x.shape))


@few
@hypothesis.given(
    x=matrices,
    spec=strategies.sampled_from(SOME_SPECS),
    exponent=strategies.integers(-120, 120),
)
def test_codes_are_those_of_float32_numpy(x, spec, exponent):
    """IEEE division and half-even rounding leave nothing to choose, bit for bit."""
    # The grid comes from other values: most of x is clipped, or falls on one point.
    measured = np.ldexp(normal(exponent + 200, 6, 3), exponent)
    result = study(x, measured, np.ones_like(x), spec)
    scale, zero_point = result.params
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)  # as XLA on CPU
    with np.errstate(over="ignore"):
        codes = np.round(x / scale) + zero_point.astype(np.float32)
    codes = np.clip(codes, spec.qmin, spec.qmax)
    np.testing.assert_array_equal(result.codes, codes)
    values = scale * (codes - zero_point).astype(np.float32)
    np.testing.assert_array_equal(result.values, values)


# --- ranges ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["absmax", "minmax"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("axis", [None, -1, 1])
def test_calibration_matches_the_definition_in_float64(axis, symmetric, method):
    x = normal(1, 3, 4, 5) + np.float32(0.3)
    spec = Spec(4 if symmetric else 8, symmetric, axis, method)
    params = calibrate(x, spec)
    shape = [1, 1, 1]
    if axis is not None:
        shape[axis] = x.shape[axis]
    assert params.scale.shape == params.zero_point.shape == tuple(shape)
    assert params.scale.dtype == jnp.float32
    assert params.zero_point.dtype == jnp.int32
    low, high = measured_range(x, spec)
    scale, _ = grid_of_range(low, high, spec)
    np.testing.assert_allclose(params.scale, scale, rtol=1e-6)
    if symmetric:  # one division, so NumPy's float32 has the same last bit
        largest = np.maximum(-low, high).astype(np.float32)
        np.testing.assert_array_equal(params.scale, largest / np.float32(spec.qmax))
    # Not equality with round(): a range symmetric around 0 is a tie.
    offset = 0.0 if symmetric else np.minimum(low, 0.0) / scale
    assert np.all(np.abs(offset + np.asarray(params.zero_point)) <= 0.5 + 1e-4)


@pytest.mark.parametrize(
    ("low", "high", "spec", "scale", "zero_point"),
    [
        (-1.0, 2.0, Spec(2, False), 1.0, 1),
        (-1.0, 14.0, Spec(4, True), 2.0, 0),
        (-21.0, 14.0, Spec(4, True), 3.0, 0),
        (3.0, 6.0, Spec(2, False), 2.0, 0),  # widened to [0, 6]
        (-6.0, -3.0, Spec(2, False), 2.0, 3),  # widened to [-6, 0]
        (0.0, 0.0, Spec(2, False), 1.0, 0),
    ],
)
def test_a_grid_by_hand(low, high, spec, scale, zero_point):
    params = quantization.params_from_range(low, high, spec)
    assert (params.scale.item(), params.zero_point.item()) == (scale, zero_point)


def test_minmax_is_absmax_on_a_symmetric_grid():
    x = normal(2, 6, 3)
    minmax, absmax = (Spec(8, range_method=name) for name in ("minmax", "absmax"))
    assert_same_params(calibrate(x, minmax), calibrate(x, absmax))


@pytest.mark.parametrize(
    "spec",
    [
        Spec(4, True, -1, "mse"),
        Spec(4, False, -1, "mse"),
        Spec(2, False, None, "mse"),
    ],
)
def test_mse_takes_the_best_of_all_shrinks(spec):
    """Every shrink tried one by one in float64."""
    x = np.random.default_rng(0).standard_t(3, (200, 3)).astype(np.float32)
    wide, axes = x.astype(np.float64), reduced_axes(x, spec)
    low, high = wide.min(axes, keepdims=True), wide.max(axes, keepdims=True)
    scales, mistakes = [], []
    for i in range(80):
        shrink = 1 - 0.01 * i
        grid = grid_of_range(low * shrink, high * shrink, spec)
        missed = np.square(nearest_on_grid(wide, *grid, spec) - wide)
        scales.append(grid[0])
        mistakes.append(missed.mean(axes, keepdims=True))
    best = np.argmin(mistakes, 0)[None]
    assert np.all(best > 0), "a heavy tail must be worth clipping"
    params = calibrate(x, spec)
    np.testing.assert_allclose(
        params.scale, np.take_along_axis(np.array(scales), best, 0)[0], rtol=1e-5
    )


def test_mse_keeps_the_earlier_of_two_equal_shrinks():
    # Grid {-s, 0, s}: s = 1 loses 0.5 to the tie, s = 0.5 loses 0.5 to clipping.
    x, spec = jnp.array([1.0, 0.5]), Spec(2, True, None, "mse")
    for shrinks in ((1.0, 0.5), (0.5, 1.0)):
        params = calibrate(x, spec, shrinks=jnp.array(shrinks))
        assert params.scale.item() == shrinks[0]


def test_the_shrinks_are_those_of_the_observers():
    weights = quantization.WEIGHT_SHRINKS
    activations = quantization.ACTIVATION_SHRINKS
    assert (len(weights), len(activations)) == (80, 95)
    for factors, last in ((weights, 0.21), (activations, 0.06)):
        np.testing.assert_allclose(factors, np.linspace(1, last, len(factors)))


@pytest.mark.parametrize(
    "spec", [Spec(4, True, -1, "mse"), Spec(4, False, -1, "mse"), Spec(8, False)]
)
def test_calibration_commutes_with_powers_of_two(spec):
    """No range method looks at the unit of the weights, however tiny or huge."""
    x = normal(3, 200, 3)
    params = jax.device_get(calibrate(x, spec))
    for exponent in (-110, -70, -1, 65, 110):
        scaled = calibrate(np.ldexp(x, exponent), spec)
        np.testing.assert_array_equal(scaled.scale, np.ldexp(params.scale, exponent))
        np.testing.assert_array_equal(scaled.zero_point, params.zero_point)


@few
@hypothesis.given(x=matrices, spec=strategies.sampled_from(SOME_SPECS))
def test_any_finite_tensor_gets_a_usable_grid(x, spec):
    result = study(x, x, np.ones_like(x), spec)
    scale, zero_point = result.params
    assert np.all(np.isfinite(scale)) and np.all(scale > 0)
    for codes in (zero_point, result.codes):
        assert np.all((codes >= spec.qmin) & (codes <= spec.qmax))
    assert np.all(np.isfinite(result.values))
    assert np.all(np.isin(result.gradient, [0.0, 1.0]))
    zeros = study(np.zeros_like(x), x, np.ones_like(x), spec)
    np.testing.assert_array_equal(zeros.values, 0.0)


@few
@hypothesis.given(
    x=numpy_strategies.arrays(np.float32, (6, 3), elements=ordinary_floats),
    spec=strategies.sampled_from(SOME_SPECS),
    covered=strategies.sampled_from([1.0, 0.5]),
)
def test_nearest_is_within_half_a_step_unless_clipped(x, spec, covered):
    result = study(x, x * np.float32(covered), np.ones_like(x), spec)
    scale, zero_point = map(np.float64, result.params)
    low, high = scale * (spec.qmin - zero_point), scale * (spec.qmax - zero_point)
    half = 0.5 * np.broadcast_to(scale, x.shape) * (1 + 1e-4)
    inside = (x >= low) & (x <= high)
    assert np.all(np.abs(np.float64(result.values) - x)[inside] <= half[inside])
    ends = np.where(x < low, low, high)[~inside]
    np.testing.assert_allclose(result.values[~inside], ends, rtol=1e-5)
    if covered == 1.0:  # the zero point is rounded, which shifts the range of x
        assert np.all((x >= low - half) & (x <= high + half))


def test_zero_channels_and_channels_below_float32_get_scale_one():
    x = np.tile(np.float32([[0.0, 1e-40, 3.0], [0.0, -1e-38, -1.5]]), (3, 1))
    for spec in (Spec(8), Spec(4, False, -1, "minmax"), Spec(4, True, -1, "mse")):
        params = jax.device_get(calibrate(x, spec))
        rounded = jax.device_get(fake_quant(x, params, spec))
        np.testing.assert_array_equal(params.scale[0, :2], 1.0)
        np.testing.assert_array_equal(params.zero_point[0, :2], 0)
        np.testing.assert_array_equal(rounded[:, :2], 0.0)
        assert params.scale[0, 2] < 0.7


def test_a_range_too_wide_for_float32_gives_finite_values():
    spec = Spec(4, False, -1, "minmax")
    x = np.resize(np.float32([-3e38, 3e38, 1.0, 2.0]), (6, 3))
    result = study(x, x, np.ones_like(x), spec)
    assert np.all(np.isfinite(result.params.scale))
    assert np.all(np.isfinite(result.values))


@pytest.mark.parametrize("method", quantization.RANGE_METHODS)
def test_a_tensor_without_values_gets_scale_one(method):
    spec = Spec(range_method=method)
    params = calibrate(jnp.zeros((0, 3)), spec)
    np.testing.assert_array_equal(params.scale, np.ones((1, 3)))
    no_channels = calibrate(jnp.zeros((3, 0)), spec)
    assert no_channels.scale.shape == (1, 0)
    assert fake_quant(jnp.zeros((0, 3)), params, spec).shape == (0, 3)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_floats_are_measured_and_quantized_as_float32(dtype):
    spec = Spec(4, False, -1, "minmax")
    x = normal(4, 6, 3).astype(dtype)
    ones = np.ones_like(x)
    narrow = study(x, x, ones, spec)
    wide = study(*(part.astype(np.float32) for part in (x, x, ones)), spec)
    assert narrow.gradient.dtype == dtype
    for left, right in zip(jax.tree.leaves(narrow), jax.tree.leaves(wide), strict=True):
        np.testing.assert_array_equal(np.float32(left), np.float32(right))
    rounded = fake_quant(x, narrow.params, spec)
    assert rounded.dtype == dtype
    np.testing.assert_array_equal(rounded, wide.values.astype(dtype))


# --- fake_quant and its gradient -----------------------------------------------------


@few
@hypothesis.given(x=matrices, spec=strategies.sampled_from(SOME_SPECS))
def test_fake_quant_is_dequantized_quantize_bit_for_bit(x, spec):
    result = study(x, x, np.ones_like(x), spec)
    rounded = fake_quant(x, result.params, spec)
    np.testing.assert_array_equal(rounded, result.values)


@few
@hypothesis.given(seed=seeds, spec=strategies.sampled_from(SOME_SPECS))
def test_the_gradient_is_straight_through_except_where_clipped(seed, spec):
    x, cotangent = normal(seed, 2, 6, 3)
    result = study(x, x * np.float32(0.5), cotangent, spec)
    scale, zero_point = map(np.float64, result.params)
    codes = np.round(x / scale) + zero_point
    inside = (codes >= spec.qmin) & (codes <= spec.qmax)
    np.testing.assert_array_equal(result.gradient, np.where(inside, cotangent, 0.0))


@pytest.mark.parametrize("spec", SOME_SPECS)
def test_the_weights_that_set_the_scale_keep_their_gradient(spec):
    """scale * qmax misses the largest weight by a last bit, up or down, by luck."""
    for seed in range(100):
        x, cotangent = normal(seed, 2, 6, 3)
        result = study(x, x, cotangent, spec)
        np.testing.assert_array_equal(result.gradient, cotangent)


def test_zeros_after_a_relu_keep_their_gradient():
    x, cotangent = normal(5, 2, 6, 3)
    x = np.maximum(x, 0)
    result = study(x, x, cotangent, Spec(4, False, -1, "minmax"))
    np.testing.assert_array_equal(result.gradient, cotangent)


def test_no_gradient_reaches_the_grid():
    x, spec = normal(6, 6, 3), Spec(8)

    def through_grid(scale, calibration_values):
        grid = quantization.calibrate(calibration_values, spec)
        grid = grid._replace(scale=grid.scale * scale)
        return jnp.sum(quantization.fake_quant(x, grid, spec) + grid.scale)

    gradients = jax.jit(jax.grad(through_grid, argnums=(0, 1)))(1.0, x)
    # What is left is the gradient of the bare `grid.scale`.
    each_row = 6 * np.sum(np.abs(x).max(0)) / 127
    np.testing.assert_allclose(gradients[0], each_row, rtol=1e-6)
    np.testing.assert_array_equal(gradients[1], 0.0)


def test_straight_through_takes_value_and_gradient_from_different_arguments():
    def square(x, rounded):
        return quantization.straight_through(x, rounded) ** 2

    value, gradients = jax.value_and_grad(square, argnums=(0, 1))(1.4, 1.0)
    assert (value, gradients) == (1.0, (2.0, 0.0))
    _, tangent = jax.jvp(square, (1.4, 1.0), (3.0, 5.0))
    assert tangent == 6.0


def test_transformations_compose():
    """jit, vmap and grad, alone and together, see the same numbers."""
    spec, x = Spec(4, False, -1, "minmax"), normal(7, 3, 6, 2)

    def loss(x):
        params = quantization.calibrate(x, spec)
        return jnp.sum(quantization.fake_quant(x, params, spec) ** 2)

    gradient = jax.jit(jax.grad(loss))
    one_by_one = [gradient(part) for part in x]
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(x), one_by_one)


def test_eager_and_compiled_agree_bit_for_bit():
    x = normal(8, 6, 3)
    for spec in SOME_SPECS:
        compiled = study(x, x, np.ones_like(x), spec)
        params = quantization.calibrate(jnp.asarray(x), spec)
        assert_same_params(params, compiled.params)
        codes = quantization.quantize(jnp.asarray(x), params, spec)
        np.testing.assert_array_equal(codes, compiled.codes)


def test_shards_are_calibrated_like_tensors_of_their_own():
    spec, x = Spec(4, True, -1, "mse"), normal(8, 8, 6, 3)
    mesh = jax.make_mesh((8,), ("device",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("device")
    on_devices = jax.shard_map(
        lambda x: quantization.calibrate(x, spec),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
    )
    scales = jax.device_get(jax.jit(on_devices)(x.reshape(48, 3)).scale)
    for part, scale in zip(x, scales, strict=True):
        np.testing.assert_array_equal(calibrate(part, spec).scale[0], scale)


def test_float32_is_kept_where_x64_is_enabled():
    x, spec = normal(9, 6, 3), Spec(4, True, -1, "mse")
    params = jax.device_get(calibrate(x, spec))
    with jax.enable_x64(True):
        again = calibrate(x.astype(np.float64), spec)
        assert (again.scale.dtype, again.zero_point.dtype) == ("float32", "int32")
        assert_same_params(again, params)
        assert fake_quant(x.astype(np.float64), params, spec).dtype == jnp.float64
        per_tensor = Spec(8, False, None, "minmax")
        assert calibrate_activations(x, per_tensor).scale.dtype == jnp.float32


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


@pytest.mark.parametrize(
    "spec",
    [
        Spec(4, True, None, "absmax"),
        Spec(8, False, None, "minmax"),
        Spec(4, False, None, "mse"),
    ],
)
def test_activation_ranges_are_averaged_like_a_numpy_ema(spec):
    batches = normal(10, 6, 64) + np.float32(0.4)
    for ema in (0.9, 0.5):
        params = calibrate_activations(batches, spec, ema=ema)
        scale, zero_point = ema_of_ranges(batches, spec, ema)
        assert params.scale.shape == params.zero_point.shape == ()
        np.testing.assert_allclose(params.scale, scale, rtol=1e-5)
        assert params.zero_point.item() == zero_point


@pytest.mark.parametrize(
    ("ema", "high"), [(0.9, 0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4), (0.5, 2.75), (0, 4)]
)
def test_the_average_by_hand(ema, high):
    batches = jnp.array([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    spec = Spec(2, False, None, "minmax")
    params = calibrate_activations(batches, spec, ema=ema)
    assert params.scale.item() == pytest.approx(high / 3)


def test_one_batch_is_calibrated_by_itself():
    batch, spec = normal(11, 1, 50), Spec(8, False, None, "minmax")
    alone = jax.tree.map(np.squeeze, jax.device_get(calibrate(batch, spec)))
    assert_same_params(alone, calibrate_activations(batch, spec))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_dead_batch_counts_as_an_empty_range(symmetric):
    """Its grid has the scale 1, which must not enter the average of the ranges."""
    batches = jnp.array([[0.0, 0.0], [0.0, 0.1]])
    spec = Spec(4, symmetric, None, "minmax")
    params = calibrate_activations(batches, spec)
    assert params.scale.item() == pytest.approx(0.1 * 0.1 / spec.qmax)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_no_activations_at_all_give_scale_one(shape):
    spec = Spec(8, False, None, "minmax")
    params = calibrate_activations(jnp.zeros(shape), spec)
    assert (params.scale, params.zero_point) == (1.0, 0)


@pytest.mark.parametrize(
    ("shape", "spec"), [((2, 4), Spec(8)), ((4,), Spec(8, channel_axis=None))]
)
def test_activations_need_a_per_tensor_grid_and_two_axes(shape, spec):
    with pytest.raises(errors.InputError, match="per-tensor .* shape"):
        quantization.calibrate_activations(jnp.ones(shape), spec)
