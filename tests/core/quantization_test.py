# SPDX-License-Identifier: Apache-2.0
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies
from hypothesis.extra import numpy as numpy_strategies

from nad_jax import errors
from nad_jax.core import quant_spec, quantization

Spec = quantization.QuantSpec
BITS = range(2, 9)
SOME_SPECS = [Spec(8), Spec(4, False, -1, "minmax"), Spec(2, True, None)]

calibrate = jax.jit(quantization.calibrate, static_argnums=1)
calibrate_activations = jax.jit(quantization.calibrate_activations, static_argnums=1)
fake_quant = jax.jit(quantization.fake_quant, static_argnums=2)


def for_all(specs, function):
    """One call of `function(spec, *arguments)` per spec, compiled together.

    Compiling is what these tests spend their time on: few functions, few shapes.
    """
    compiled = jax.jit(lambda *args: [function(spec, *args) for spec in specs])

    def call(*args):
        return jax.device_get(compiled(*args))

    call.compiled = compiled
    return call


class Study(NamedTuple):
    """All there is to know of a tensor on the grid of other values."""

    params: Any
    codes: Any
    values: Any
    gradient: Any


def study_one(spec, x, calibration_values, cotangent) -> Study:
    params = quantization.calibrate(calibration_values, spec)
    codes = quantization.quantize(x, params, spec)
    _, pullback = jax.vjp(lambda x: quantization.fake_quant(x, params, spec), x)
    (gradient,) = pullback(cotangent)
    return Study(params, codes, quantization.dequantize(codes, params), gradient)


_study = for_all(SOME_SPECS, study_one)


def study(x, calibration_values=None, cotangent=None):
    """Pairs of a spec and the `Study` of `x` on its grid, as NumPy arrays."""
    calibration_values = x if calibration_values is None else calibration_values
    cotangent = np.ones_like(x) if cotangent is None else cotangent
    results = _study(x, calibration_values, cotangent)
    return list(zip(SOME_SPECS, results, strict=True))


few = hypothesis.settings(
    max_examples=50, deadline=None, derandomize=True, database=None
)
seeds = strategies.integers(0, 2**31)
# Just below the largest float32, where qmax * scale may round to infinity.
huge = float(np.float32(3e38))
any_floats = strategies.floats(-huge, huge, width=32)
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
    with pytest.raises(errors.InputError, match="absmax, minmax, mse, .*, got 'max'"):
        Spec(range_method="max")


@pytest.mark.parametrize("axis", [2, -3])
def test_a_channel_axis_that_does_not_exist_is_refused(axis):
    with pytest.raises(errors.InputError, match=r"channel_axis -?\d .* \(2, 3\)"):
        quantization.calibrate(jnp.ones((2, 3)), Spec(channel_axis=axis))


def test_a_numpy_integer_is_a_width():
    for symmetric in (True, False):
        ours, plain = Spec(np.int64(4), symmetric), Spec(4, symmetric)
        assert type(ours.qmin) is type(ours.qmax) is int
        assert (ours.qmin, ours.qmax) == (plain.qmin, plain.qmax)


@pytest.mark.slow
def test_every_code_survives_the_way_to_floats_and_back():
    specs = [Spec(bits, symmetric) for bits in BITS for symmetric in (True, False)]
    scale = np.array([[1e-30, 1e-3, 0.1, 1 / 3, 0.7, 1.0, 3e4, 1e30]], np.float32)
    stored, params = [], []
    for spec in specs:
        codes = np.resize(np.arange(spec.qmin, spec.qmax + 1), 256)[:, None]
        last = 0 if spec.symmetric else spec.qmax
        zero_point = np.resize([0, last and 1, last // 2, last], (1, 8))
        stored.append(np.broadcast_to(codes, (256, 8)).astype(spec.dtype))
        params.append(quantization.QuantParams(scale, zero_point.astype(np.int32)))

    @jax.jit
    def round_trip(stored, params):
        values = list(map(quantization.dequantize, stored, params))
        return values, list(map(quantization.quantize, values, params, specs))

    for spec, codes, grid, values, back in zip(
        specs, stored, params, *jax.device_get(round_trip(stored, params)), strict=True
    ):
        assert values.dtype == np.float32
        exact = scale * (codes.astype(np.float64) - grid.zero_point)
        np.testing.assert_allclose(values, exact, rtol=1e-6)
        assert back.dtype == (np.int8 if spec.symmetric else np.uint8)
        np.testing.assert_array_equal(back, codes)


def test_ties_go_to_the_even_multiple_of_the_step():
    x = np.float32([0.25, 0.75, 1.25, -0.25, -0.75, -1.25])  # 0.5, 1.5, 2.5 steps
    specs, zero_points = [Spec(4), Spec(4, False)], [0, 3]
    # The rule is about multiples of the step: an odd zero point makes the codes odd.

    @jax.jit
    def codes_of(x):
        codes = []
        for spec, zero_point in zip(specs, zero_points, strict=True):
            zero_point = jnp.full(1, zero_point, jnp.int32)
            grid = quantization.QuantParams(jnp.full(1, 0.5), zero_point)
            codes.append(quantization.quantize(x, grid, spec))
        return jnp.round(x / 0.5), codes

    rounded, codes = jax.device_get(codes_of(x))
    even = [0, 2, 2, 0, -2, -2]
    np.testing.assert_array_equal(rounded, even)
    for zero_point, found in zip(zero_points, codes, strict=True):
        np.testing.assert_array_equal(found, np.add(even, zero_point))


def test_ties_are_ties_on_a_grid_of_any_scale():
    """Half steps that float32 represents exactly; a reciprocal would miss some."""
    zero_point = 100
    scale = np.ldexp(np.arange(2001, 2601, 2), -14).astype(np.float32)[None]
    below = np.arange(0, 255)[:, None] - zero_point
    x = ((below + 0.5) * scale).astype(np.float32)
    np.testing.assert_array_equal(x, (below + 0.5) * np.float64(scale))
    params = quantization.QuantParams(scale, np.full((1, 300), zero_point, np.int32))
    codes_of = for_all([Spec(8, False)], lambda s, *a: quantization.quantize(*a, s))
    even = np.where(below % 2 == 0, below, below + 1) + zero_point
    (codes,) = codes_of(x, params)
    np.testing.assert_array_equal(codes, np.broadcast_to(even, x.shape))
    # Values and grids that arrive in a batch meet the same arithmetic.
    (codes,) = jax.vmap(codes_of.compiled, (0, None))(x[None], params)
    np.testing.assert_array_equal(codes[0], np.broadcast_to(even, x.shape))


@pytest.mark.slow
@few
@hypothesis.given(x=matrices, exponent=strategies.integers(-120, 120))
def test_codes_are_those_of_float32_numpy(x, exponent):
    """IEEE division and half-even rounding leave nothing to choose, bit for bit."""
    # The grid comes from other values: most of x is clipped, or falls on one point.
    measured = np.ldexp(normal(exponent + 200, 6, 3), exponent)
    results = study(x, measured)
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)  # as XLA on CPU
    for spec, result in results:
        scale, zero_point = result.params
        with np.errstate(over="ignore"):
            codes = np.round(x / scale) + zero_point.astype(np.float32)
        codes = np.clip(codes, spec.qmin, spec.qmax)
        np.testing.assert_array_equal(result.codes, codes)
        values = scale * (codes - zero_point).astype(np.float32)
        np.testing.assert_array_equal(result.values, values)


# --- ranges ------------------------------------------------------------------------


@pytest.mark.slow
def test_calibration_matches_the_definition_in_float64():
    x = normal(1, 3, 4, 5) + np.float32(0.3)
    specs = [
        Spec(4, True, None, "absmax"),
        Spec(4, True, 1, "minmax"),
        Spec(8, False, -1, "minmax"),
        Spec(8, False, 0, "absmax"),
        Spec(3, False, None, "minmax"),
    ]
    calibrate_all = for_all(specs, lambda s, x: quantization.calibrate(x, s))
    for spec, params in zip(specs, calibrate_all(x), strict=True):
        shape = [1, 1, 1]
        if spec.channel_axis is not None:
            shape[spec.channel_axis] = x.shape[spec.channel_axis]
        assert params.scale.shape == params.zero_point.shape == tuple(shape)
        assert (params.scale.dtype, params.zero_point.dtype) == ("float32", "int32")
        low, high = measured_range(x, spec)
        scale, _ = grid_of_range(low, high, spec)
        np.testing.assert_allclose(params.scale, scale, rtol=1e-6)
        if spec.symmetric:  # one division, so NumPy's float32 has the same last bit
            largest = np.maximum(-low, high).astype(np.float32)
            qmax = np.float32(spec.qmax)
            np.testing.assert_array_equal(params.scale, largest / qmax)
        # Not equality with round(): a range symmetric around 0 is a tie.
        offset = 0.0 if spec.symmetric else np.minimum(low, 0.0) / scale
        assert np.all(np.abs(offset + params.zero_point) <= 0.5 + 1e-4)


@pytest.mark.slow
def test_grids_by_hand():
    cases = [
        (-1.0, 2.0, Spec(2, False), 1.0, 1),
        (-1.0, 14.0, Spec(4, True), 2.0, 0),
        (-21.0, 14.0, Spec(4, True), 3.0, 0),
        (3.0, 6.0, Spec(2, False), 2.0, 0),  # widened to [0, 6]
        (-6.0, -3.0, Spec(2, False), 2.0, 3),  # widened to [-6, 0]
        (0.0, 0.0, Spec(2, False), 1.0, 0),
    ]

    @jax.jit
    def grids():
        return [quantization.params_from_range(*case[:3]) for case in cases]

    for case, params in zip(cases, grids(), strict=True):
        assert (params.scale.item(), params.zero_point.item()) == case[3:]


def test_minmax_is_absmax_on_a_symmetric_grid():
    specs = [Spec(8, range_method=name) for name in ("minmax", "absmax")]
    both = for_all(specs, lambda s, x: quantization.calibrate(x, s))
    assert_same_params(*both(normal(2, 6, 3)))


MSE_SPECS = [Spec(4, True, -1, "mse"), Spec(2, False, None, "mse")]
calibrate_by_mse = for_all(MSE_SPECS, lambda s, x: quantization.calibrate(x, s))


@pytest.mark.slow
def test_mse_takes_the_best_of_all_shrinks():
    """Every shrink tried one by one in float64."""
    x = np.random.default_rng(0).standard_t(3, (200, 3)).astype(np.float32)
    for spec, params in zip(MSE_SPECS, calibrate_by_mse(x), strict=True):
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
        expected = np.take_along_axis(np.array(scales), best, 0)[0]
        np.testing.assert_allclose(params.scale, expected, rtol=1e-5)


@pytest.mark.slow
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


@pytest.mark.slow
def test_calibration_commutes_with_powers_of_two():
    """Trying shrinks does not see the unit of the weights, however tiny or huge."""
    x = normal(3, 200, 3)
    plain = calibrate_by_mse(x)
    for exponent in (-110, -70, -1, 65, 110):
        for params, scaled in zip(
            plain, calibrate_by_mse(np.ldexp(x, exponent)), strict=True
        ):
            expected = np.ldexp(params.scale, exponent)
            np.testing.assert_array_equal(scaled.scale, expected)
            np.testing.assert_array_equal(scaled.zero_point, params.zero_point)


@pytest.mark.slow
@few
@hypothesis.given(x=matrices)
def test_any_finite_tensor_gets_a_usable_grid(x):
    for (spec, result), (_, zeros) in zip(
        study(x), study(np.zeros_like(x), x), strict=True
    ):
        scale, zero_point = result.params
        assert np.all(np.isfinite(scale)) and np.all(scale > 0)
        for codes in (zero_point, result.codes):
            assert np.all((codes >= spec.qmin) & (codes <= spec.qmax))
        assert np.all(np.isfinite(result.values))
        assert np.all(np.isin(result.gradient, [0.0, 1.0]))
        np.testing.assert_array_equal(zeros.values, 0.0)


@pytest.mark.slow
@few
@hypothesis.given(
    x=numpy_strategies.arrays(np.float32, (6, 3), elements=ordinary_floats),
    covered=strategies.sampled_from([1.0, 0.5]),
)
def test_nearest_is_within_half_a_step_unless_clipped(x, covered):
    for spec, result in study(x, x * np.float32(covered)):
        scale, zero_point = map(np.float64, result.params)
        low, high = scale * (spec.qmin - zero_point), scale * (spec.qmax - zero_point)
        half = 0.5 * np.broadcast_to(scale, x.shape) * (1 + 1e-4)
        inside = (x >= low) & (x <= high)
        assert np.all(np.abs(np.float64(result.values) - x)[inside] <= half[inside])
        ends = np.where(x < low, low, high)[~inside]
        np.testing.assert_allclose(result.values[~inside], ends, rtol=1e-5)
        if covered == 1.0:  # the zero point is rounded, which shifts the range of x
            assert np.all((x >= low - half) & (x <= high + half))


@pytest.mark.slow
def test_zero_channels_and_channels_below_float32_get_scale_one():
    x = np.tile(np.float32([[0.0, 1e-40, 3.0], [0.0, -1e-38, -1.5]]), (3, 1))
    for spec, result in study(x):
        if spec.channel_axis is not None:
            np.testing.assert_array_equal(result.params.scale[0, :2], 1.0)
            np.testing.assert_array_equal(result.params.zero_point[0, :2], 0)
            assert result.params.scale[0, 2] < 0.7
        np.testing.assert_array_equal(result.values[:, :2], 0.0)
    tall = np.tile(x[:2], (100, 1))
    for spec, params in zip(MSE_SPECS, calibrate_by_mse(tall), strict=True):
        if spec.channel_axis is not None:
            np.testing.assert_array_equal(params.scale[0, :2], 1.0)


def test_a_range_too_wide_for_float32_gives_finite_values():
    for _, result in study(np.resize(np.float32([-3e38, 3e38, 1.0, 2.0]), (6, 3))):
        assert np.all(np.isfinite(result.params.scale))
        assert np.all(np.isfinite(result.values))


@pytest.mark.slow
def test_a_tensor_without_values_gets_scale_one():
    named = set(quant_spec.RANGE_METHODS) - {"percentile", "histogram"}
    specs = [Spec(range_method=name) for name in sorted(named)]
    specs.append(Spec(range_method="percentile", percentile=99.0))
    calibrate_all = for_all(specs, lambda s, x: quantization.calibrate(x, s))
    for params in calibrate_all(np.zeros((0, 3), np.float32)):
        np.testing.assert_array_equal(params.scale, np.ones((1, 3)))
    for params in calibrate_all(np.zeros((3, 0), np.float32)):
        assert params.scale.shape == (1, 0)


@pytest.mark.slow
def test_narrow_floats_are_measured_and_quantized_as_float32():
    dtype = jnp.bfloat16
    x = normal(4, 6, 3).astype(dtype)
    wide = study(x.astype(np.float32))
    for (spec, left), (_, right) in zip(study(x), wide, strict=True):
        assert left.gradient.dtype == dtype
        leaves = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        for narrow, expected in leaves:
            np.testing.assert_array_equal(np.float32(narrow), np.float32(expected))
        if spec == SOME_SPECS[0]:
            rounded = fake_quant(x, left.params, spec)
            assert rounded.dtype == dtype
            np.testing.assert_array_equal(rounded, right.values.astype(dtype))


# --- fake_quant and its gradient -----------------------------------------------------


@pytest.mark.slow
@few
@hypothesis.given(x=matrices)
def test_fake_quant_is_dequantized_quantize_bit_for_bit(x):
    results = study(x)
    rounded = fake_quant_on_grids(x, [result.params for _, result in results])
    for values, (_, result) in zip(rounded, results, strict=True):
        np.testing.assert_array_equal(values, result.values)


@jax.jit
def fake_quant_on_grids(x, grids):
    return [
        quantization.fake_quant(x, params, spec)
        for params, spec in zip(grids, SOME_SPECS, strict=True)
    ]


@few
@hypothesis.given(seed=seeds)
def test_the_gradient_is_straight_through_except_where_clipped(seed):
    x, cotangent = normal(seed, 2, 6, 3)
    for spec, result in study(x, x * np.float32(0.5), cotangent):
        scale, zero_point = map(np.float64, result.params)
        codes = np.round(x / scale) + zero_point
        inside = (codes >= spec.qmin) & (codes <= spec.qmax)
        np.testing.assert_array_equal(result.gradient, np.where(inside, cotangent, 0))


def test_the_weights_that_set_the_scale_keep_their_gradient():
    """scale * qmax misses the largest weight by a last bit, up or down, by luck."""
    for seed in range(100):
        x, cotangent = normal(seed, 2, 6, 3)
        for _, result in study(x, x, cotangent):
            np.testing.assert_array_equal(result.gradient, cotangent)


def test_zeros_after_a_relu_keep_their_gradient():
    x, cotangent = normal(5, 2, 6, 3)
    for _, result in study(np.maximum(x, 0), np.maximum(x, 0), cotangent):
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

    @jax.jit
    def derivatives(x, rounded):
        backward = jax.value_and_grad(square, argnums=(0, 1))(x, rounded)
        return backward, jax.jvp(square, (x, rounded), (3.0, 5.0))[1]

    (value, gradients), tangent = jax.device_get(derivatives(1.4, 1.0))
    assert (value, gradients, tangent) == (1.0, (2.0, 0.0), 6.0)


@pytest.mark.slow
def test_transformations_compose():
    """jit, vmap and grad, alone and together, see the same numbers."""
    spec, x = Spec(4, False, -1, "minmax"), normal(7, 3, 6, 2)

    def loss(x):
        params = quantization.calibrate(x, spec)
        return jnp.sum(quantization.fake_quant(x, params, spec) ** 2)

    gradient = jax.jit(jax.grad(loss))
    one_by_one = [gradient(part) for part in x]
    np.testing.assert_array_equal(jax.jit(jax.vmap(jax.grad(loss)))(x), one_by_one)


@pytest.mark.slow
def test_eager_and_compiled_agree_bit_for_bit():
    x = normal(8, 6, 3)
    for spec, compiled in study(x):
        params = quantization.calibrate(jnp.asarray(x), spec)
        assert_same_params(params, compiled.params)
        codes = quantization.quantize(jnp.asarray(x), params, spec)
        np.testing.assert_array_equal(codes, compiled.codes)
        rounded = quantization.fake_quant(jnp.asarray(x), params, spec)
        np.testing.assert_array_equal(rounded, compiled.values)


@pytest.mark.slow
def test_shards_are_calibrated_like_tensors_of_their_own():
    spec, x = MSE_SPECS[0], normal(8, 8, 200, 3)
    mesh = jax.make_mesh((8,), ("device",), (jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("device")
    on_devices = jax.shard_map(
        lambda x: quantization.calibrate(x, spec),
        mesh=mesh,
        in_specs=rows,
        out_specs=rows,
    )
    scales = jax.device_get(jax.jit(on_devices)(x.reshape(1600, 3)).scale)
    for part, scale in zip(x, scales, strict=True):
        np.testing.assert_array_equal(calibrate_by_mse(part)[0].scale[0], scale)


@pytest.mark.slow
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


# --- ranges that cut off the ends -----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("axis", [None, -1])
def test_a_percentile_range_leaves_out_its_share_at_each_end(axis):
    x = normal(50, 7, 400, 3)
    affine, symmetric = for_all(
        [Spec(8, sign, axis, "percentile", percentile=95.0) for sign in (False, True)],
        lambda spec, x: quantization.calibrate(x, spec),
    )(x)
    axes = None if axis is None else (0, 1)
    wide = np.float64(x)
    low = np.quantile(wide, 0.05, axis=axes, keepdims=True)
    high = np.quantile(wide, 0.95, axis=axes, keepdims=True)
    np.testing.assert_allclose(affine.scale, (high - low) / 255, rtol=1e-5)
    np.testing.assert_array_equal(affine.zero_point, np.round(-low / affine.scale))
    magnitude = np.quantile(np.abs(wide), 0.95, axis=axes, keepdims=True)
    np.testing.assert_allclose(symmetric.scale, magnitude / 127, rtol=1e-5)


def sparse(values, *, size=400):
    """A column of zeros but for a few values."""
    x = np.zeros((size, 1), np.float32)
    x[: len(values), 0] = values
    return x


@pytest.mark.parametrize("unit", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_percentile_that_leaves_zeros_alone_gives_the_whole_range(symmetric, unit):
    """Three weights of 400 are not 0; the 99th percentile is."""
    spec = Spec(4, symmetric, -1, "percentile", percentile=99.0)
    few, many, none = sparse([0.4, -0.3, 0.2]), sparse([0.4] * 40), sparse([])
    x = np.float32(unit) * np.concatenate([few, many, none], axis=1)
    scale = np.asarray(calibrate(x, spec).scale)[0] / [unit, unit, 1.0]
    widest = 0.4 / 7 if symmetric else 0.7 / 15
    alone = 0.4 / 7 if symmetric else 0.4 / 15
    np.testing.assert_allclose(scale, [widest, alone, 1.0], rtol=1e-5)
    values = fake_quant(x, calibrate(x, spec), spec)
    assert np.abs(values - x)[:, 0].max() <= 0.51 * widest * unit


def test_a_percentile_of_sparse_activations_gives_the_whole_range():
    spec = Spec(8, False, None, "percentile", percentile=99.0)
    batches = np.concatenate([sparse([2.0]), sparse([3.0]), sparse([])], axis=1).T
    params = calibrate_activations(batches, spec)
    # 0.9 of the past: (0.9 * 2 + 0.1 * 3) * 0.9 + 0.1 * 0
    assert 255 * params.scale.item() == pytest.approx(0.9 * 2.1, rel=1e-5)


def _expected_error(width, bits, density, reach):
    """Of clipping at `width` deviations and rounding, by a sum over the density."""
    x = np.linspace(0, reach, 400_001)
    clipped = np.square(np.maximum(x - width, 0)) * density(x)
    return 2 * clipped.sum() * (x[1] - x[0]) + width**2 / (3 * 4**bits)


@pytest.mark.parametrize("bits", BITS)
def test_the_widths_of_aciq_have_the_least_expected_error(bits):
    laplace = quantization._LAPLACE_WIDTHS[bits]
    normal_ = quantization._NORMAL_WIDTHS[bits]
    for width, density in (
        (laplace, lambda x: np.exp(-x) / 2),
        (normal_, lambda x: np.exp(-x * x / 2) / np.sqrt(2 * np.pi)),
    ):
        best = _expected_error(width, bits, density, 40.0)
        for other in (width - 0.02, width + 0.02):
            assert best < _expected_error(other, bits, density, 40.0)


@pytest.mark.slow
def test_aciq_takes_the_distribution_that_fits_and_never_leaves_the_data():
    random = np.random.default_rng(0)
    columns = [random.normal(size=20_000), random.laplace(size=20_000)]
    columns.append(np.where(random.random(20_000) < 0.5, -1.0, 1.0))
    x = np.stack(columns, axis=1).astype(np.float32)
    (params,) = for_all([Spec(4, True, -1, "aciq")], study_params)(x)
    widths = np.squeeze(params.scale) * 7
    deviation, absolute = np.std(x[:, 0]), np.mean(np.abs(x[:, 1]))
    assert widths[0] == pytest.approx(2.56 * deviation, rel=1e-3)
    assert widths[1] == pytest.approx(5.03 * absolute, rel=1e-3)
    assert widths[2] == 1.0  # 2.56 deviations would be wasted


def study_params(spec, x):
    return quantization.calibrate(x, spec)


def test_a_histogram_range_is_for_activations():
    with pytest.raises(errors.InputError, match="histogram measures activations"):
        quantization.calibrate(jnp.ones((3, 2)), Spec(range_method="histogram"))


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


@pytest.mark.slow
def test_activation_ranges_are_averaged_like_a_numpy_ema():
    specs = [
        Spec(4, True, None, "absmax"),
        Spec(8, False, None, "minmax"),
        Spec(4, False, None, "mse"),
    ]
    calibrate_all = for_all(
        specs, lambda s, x, ema: quantization.calibrate_activations(x, s, ema=ema)
    )
    batches = normal(10, 6, 64) + np.float32(0.4)
    for ema in (0.9, 0.5):
        for spec, params in zip(specs, calibrate_all(batches, ema), strict=True):
            scale, zero_point = ema_of_ranges(batches, spec, ema)
            assert params.scale.shape == params.zero_point.shape == ()
            np.testing.assert_allclose(params.scale, scale, rtol=1e-5)
            assert params.zero_point == zero_point


@pytest.mark.slow
def test_the_average_by_hand():
    """Default, other and no memory; and a batch of zeros, whose range is empty.

    The grid of a tensor of zeros has the scale 1, which must not enter the average.
    """
    batches = np.float32([[0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    dead_first = np.float32([[0.0, 0.0], [0.0, 0.0], [0.0, 0.1]])
    affine, symmetric = (Spec(4, sign, None, "minmax") for sign in (False, True))

    @jax.jit
    def scales(batches, dead_first):
        average = quantization.calibrate_activations
        return [
            average(batches, affine).scale,
            average(batches, affine, ema=0.5).scale,
            average(batches, affine, ema=0.0).scale,
            average(dead_first, affine).scale,
            average(dead_first, symmetric).scale,
        ]

    expected = [
        (0.9 * (0.9 * 1 + 0.1 * 2) + 0.1 * 4) / 15,
        (0.5 * (0.5 * 1 + 0.5 * 2) + 0.5 * 4) / 15,
        4 / 15,
        0.1 * 0.1 / 15,
        0.1 * 0.1 / 7,
    ]
    np.testing.assert_allclose(scales(batches, dead_first), expected, rtol=1e-6)


@pytest.mark.slow
def test_one_batch_is_calibrated_by_itself():
    spec, batch = Spec(8, False, None, "minmax"), normal(11, 1, 50)

    @jax.jit
    def both(batch):
        alone = quantization.calibrate(batch[0], spec)
        return jax.tree.map(jnp.squeeze, alone), quantization.calibrate_activations(
            batch, spec
        )

    assert_same_params(*jax.device_get(both(batch)))


def test_no_activations_at_all_give_scale_one():
    spec = Spec(8, False, None, "minmax")
    for shape in ((0, 4), (3, 0)):
        params = calibrate_activations(np.zeros(shape, np.float32), spec)
        assert (params.scale.item(), params.zero_point.item()) == (1.0, 0)


@pytest.mark.parametrize(
    ("shape", "spec"), [((2, 4), Spec(8)), ((4,), Spec(8, channel_axis=None))]
)
def test_activations_need_a_per_tensor_grid_and_two_axes(shape, spec):
    with pytest.raises(errors.InputError, match="per-tensor .* shape"):
        quantization.calibrate_activations(jnp.ones(shape), spec)


@pytest.mark.parametrize("ema", [float("nan"), -0.1, 1.0, np.float32(1.5)])
def test_the_weight_of_the_past_is_a_share_below_one(ema):
    spec = Spec(8, False, None, "minmax")
    with pytest.raises(errors.InputError, match=rf"^ema .* \[0, 1\), got {ema}$"):
        quantization.calibrate_activations(jnp.ones((2, 4)), spec, ema=ema)
