# SPDX-License-Identifier: Apache-2.0
"""Uniform quantization: ranges, integer codes, and floats on the integer grid.

    codes = clip(round(x / scale) + zero_point, qmin, qmax)
    x_hat = scale * (codes - zero_point)

Conventions shared by every function here:

* `round` is round half to even, the rule of `jnp.round`, PyTorch and ONNX Runtime;
  `/` is the quotient that NumPy computes in float32 (see `divide`).
* A symmetric grid is signed, with `zero_point` 0, and usually *narrow*:
  `[-(2**(b-1) - 1), 2**(b-1) - 1]`; a wide one has one code more below. An affine grid
  is unsigned: `[0, 2**b - 1]`. Both bounds inclusive.
* Ranges always contain 0, so that zero (padding, dead channels) is on the grid.
* `scale` and `zero_point` keep the rank of the tensor (size 1 on reduced axes), so
  they broadcast without thought. A channel of zeros gets scale 1.

Which rounding to take *instead of* nearest is the subject of `nad_jax.core.rounding`.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp

from nad_jax import errors
from nad_jax.core import quant_spec
from nad_jax.core.quant_spec import QuantSpec

# Joint shrink factors tried by range_method="mse". Weights: 1.00 ... 0.21, as the
# per-channel observer of EFRAP's public code. Activations: 1.00 ... 0.06.
WEIGHT_SHRINKS = tuple(1.0 - 0.01 * i for i in range(80))
ACTIVATION_SHRINKS = tuple(1.0 - 0.01 * i for i in range(95))

# Half widths by bits that minimise the expected squared error of clipping and rounding,
# in standard deviations of a normal and in mean absolute deviations of a Laplace
# distribution (Banner et al., "Post training 4-bit quantization of convolutional
# networks for rapid-deployment", NeurIPS 2019, eq. 10 and 12).
_NORMAL_WIDTHS = {2: 1.71, 3: 2.15, 4: 2.56, 5: 2.94, 6: 3.29, 7: 3.62, 8: 3.92}
_LAPLACE_WIDTHS = {2: 2.83, 3: 3.90, 4: 5.03, 5: 6.20, 6: 7.41, 7: 8.65, 8: 9.90}


class QuantParams(NamedTuple):
    """Scale and offset of a grid, broadcastable to the tensor they belong to.

    Attributes:
      scale: float32 > 0, value of one step.
      zero_point: int32 code that stands for 0.0; all zeros on a symmetric grid.
    """

    scale: jax.Array
    zero_point: jax.Array


def divide(x: jax.Array, divisor: jax.Array) -> jax.Array:
    """The float32 quotient `x / divisor`, correctly rounded as IEEE 754 has it.

    XLA turns division by a broadcast value into multiplication by its reciprocal, which
    is off by a last bit half of the time: ties would not be ties, and NumPy or ONNX
    Runtime would not reproduce the codes.

    Args:
      x: float, any shape.
      divisor: float32, broadcastable to `x`.
    """
    x = x.astype(jnp.float32)
    # The same quotient by a tensor of x's shape, also where `vmap` batches x alone.
    return x / jnp.where(jnp.isnan(x), x, divisor)


def params_from_range(low, high, spec: QuantSpec) -> QuantParams:
    """Grid whose end points represent `[low, high]`, widened to contain 0.

    Args:
      low: float, smallest value to represent; any shape.
      high: float, largest value, same shape.
      spec: The grid. A symmetric one covers `max(|low|, |high|)` on both sides.
    """
    low = jnp.minimum(jnp.asarray(low, jnp.float32), jnp.float32(0))
    high = jnp.maximum(jnp.asarray(high, jnp.float32), jnp.float32(0))
    if spec.symmetric:
        scale = divide(jnp.maximum(-low, high), jnp.float32(spec.steps_per_side))
    else:
        # The width of [-3e38, 3e38] is not a float32, and 0 * inf not a number.
        width = jnp.minimum(high - low, jnp.finfo(jnp.float32).max)
        scale = divide(width, jnp.float32(spec.qmax))
    # An empty range, or one so small that the division underflows: any positive
    # step represents what lies in it equally well. Whether values lie beyond it is the
    # caller's business (`_percentile_range`).
    scale = jnp.where(scale > jnp.finfo(jnp.float32).tiny, scale, jnp.float32(1))
    if spec.symmetric:
        return QuantParams(scale, jnp.zeros(scale.shape, jnp.int32))
    zero_point = jnp.clip(jnp.round(divide(-low, scale)), spec.qmin, spec.qmax)
    return QuantParams(scale, zero_point.astype(jnp.int32))


def calibrate(
    x: jax.Array, spec: QuantSpec, *, shrinks: tuple[float, ...] = WEIGHT_SHRINKS
) -> QuantParams:
    """Scale and zero point for `x`, by the range method of `spec`.

    Args:
      x: float tensor of any rank.
      spec: The grid; `spec.channel_axis` decides how many scales there are.
      shrinks: Factors tried by "mse", most inclusive first; ties keep the earlier.

    Returns:
      `QuantParams` of x's rank, float32 and int32.

    Raises:
      InputError: `spec.channel_axis` is not an axis of `x`.

    Gradients: none; calibration is a measurement (`stop_gradient` on x).
    """
    return params_from_range(*_range(x, spec, shrinks), spec)


def _range(x, spec: QuantSpec, shrinks: tuple[float, ...]):
    """Range `(low, high)` by the range method of `spec`, low <= 0 <= high."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32)
    if spec.channel_axis is None:
        axes = tuple(range(x.ndim))
    else:
        if not -x.ndim <= spec.channel_axis < x.ndim:
            raise errors.InputError(
                f"channel_axis {spec.channel_axis} is not an axis of a tensor of "
                f"shape {x.shape}"
            )
        axes = tuple(a for a in range(x.ndim) if a != spec.channel_axis % x.ndim)
    low = jnp.min(x, axis=axes, keepdims=True, initial=0.0)
    high = jnp.max(x, axis=axes, keepdims=True, initial=0.0)
    largest = jnp.maximum(-low, high)
    if spec.range_method == "histogram":
        raise errors.InputError(
            "range_method histogram measures activations; for weights take one of "
            f"{', '.join(quant_spec.WEIGHT_RANGE_METHODS)}"
        )
    if spec.range_method == "percentile" and x.size:
        return _percentile_range(x, low, high, spec, axes)
    if spec.symmetric or spec.range_method == "absmax":
        low, high = -largest, largest
    # Errors in units of the range: the square of 1e-25 is 0 in float32, of 1e25 inf.
    unit = jnp.where(largest > jnp.finfo(jnp.float32).tiny, largest, jnp.float32(1))

    def error(low, high):
        params = params_from_range(low, high, spec)
        missed = (fake_quant(x, params, spec) - x) / unit
        return jnp.mean(jnp.square(missed), axis=axes, keepdims=True)

    if spec.range_method == "aciq" and x.size:
        normal, laplace = (
            (least * unit, most * unit)
            for least, most in _aciq_ranges(
                x / unit, low / unit, high / unit, spec, axes
            )
        )
        fits = error(*laplace) < error(*normal)
        low = jnp.where(fits, laplace[0], normal[0])
        return low, jnp.where(fits, laplace[1], normal[1])
    if spec.range_method != "mse":
        return low, high
    factors = jnp.asarray(shrinks, jnp.float32)
    errors_by_factor = jax.lax.map(lambda f: error(low * f, high * f), factors)
    # argmin returns the first of equal errors.
    shrink = factors[jnp.argmin(errors_by_factor, axis=0)]
    return low * shrink, high * shrink


def _percentile_range(x, low, high, spec: QuantSpec, axes):
    """The range between quantiles; `(low, high)` where that has no step and x has."""
    assert spec.percentile is not None
    share = jnp.float32(spec.percentile / 100)

    def quantile(values, share):
        return jnp.quantile(values, share, axis=axes, keepdims=True)

    if spec.symmetric:
        most = quantile(jnp.abs(x), share)
        least = -most
    else:
        least, most = quantile(x, 1 - share), quantile(x, share)
    # Nearly all values may be 0. A step of 1, which an empty range gets, would have
    # nothing to do with the others: whether they vanish would depend on their unit.
    smallest = jnp.finfo(jnp.float32).tiny * (spec.qmax - spec.qmin)
    is_empty = jnp.maximum(-least, most) <= smallest
    return jnp.where(is_empty, low, least), jnp.where(is_empty, high, most)


def _aciq_ranges(x, low, high, spec: QuantSpec, axes):
    """Ranges fit for a normal and for a Laplace distribution, never beyond the data."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    # Around 0 where the grid is.
    center = jnp.zeros_like(mean) if spec.symmetric else mean
    away = x - center
    bits = int(spec.bits)
    deviation = jnp.sqrt(jnp.mean(jnp.square(away), axis=axes, keepdims=True))
    absolute = jnp.mean(jnp.abs(away), axis=axes, keepdims=True)
    for width in (deviation * _NORMAL_WIDTHS[bits], absolute * _LAPLACE_WIDTHS[bits]):
        yield jnp.maximum(center - width, low), jnp.minimum(center + width, high)


def quantize(x: jax.Array, params: QuantParams, spec: QuantSpec) -> jax.Array:
    """Codes of the grid points nearest to `x`, ties to even; int8 or uint8."""
    codes = jnp.clip(_unclipped_codes(x, params), spec.qmin, spec.qmax)
    return codes.astype(spec.dtype)


def _unclipped_codes(x, params):
    steps = jnp.round(divide(x, params.scale))
    return steps + params.zero_point.astype(jnp.float32)


def dequantize(codes: jax.Array, params: QuantParams) -> jax.Array:
    """float32 values of integer codes: `scale * (codes - zero_point)`."""
    steps = codes.astype(jnp.int32) - params.zero_point
    return params.scale * steps.astype(jnp.float32)


@jax.custom_jvp
def straight_through(x: jax.Array, x_quantized: jax.Array) -> jax.Array:
    """`x_quantized` in value, `x` in gradient (Bengio et al., 2013)."""
    del x
    return x_quantized


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return primals[1], tangents[0]


def fake_quant(x: jax.Array, params: QuantParams, spec: QuantSpec) -> jax.Array:
    """`x` moved to the nearest grid points, still float and differentiable.

    Equal to `dequantize(quantize(x, params, spec), params)` in value and in x's dtype.

    Gradients: straight-through where the nearest code exists, 0 where it is clipped;
    the end points of the range count as inside, with up to half a step beyond them.
    The grid itself (`params`) is held constant.

    Example:
      >>> spec = QuantSpec(bits=4, channel_axis=None)
      >>> x = jnp.array([-1.75, 0.3, 0.4])  # 1.75 is 7 steps of 0.25
      >>> fake_quant(x, calibrate(x, spec), spec).tolist()
      [-1.75, 0.25, 0.5]
    """
    params = jax.lax.stop_gradient(params)
    on_grid = dequantize(quantize(x, params, spec), params)
    # Decided on codes: clipping x itself would leave the weight that sets the scale
    # with the gradient 1, 1/2 or 0, depending on the last bit of the scale.
    codes = _unclipped_codes(x, params)
    representable = (codes >= spec.qmin) & (codes <= spec.qmax)
    x_float = x.astype(jnp.float32)
    moving = jnp.where(representable, x_float, jax.lax.stop_gradient(x_float))
    return straight_through(moving, on_grid).astype(x.dtype)


def calibrate_activations(
    batches: jax.Array, spec: QuantSpec, *, ema: float = 0.9
) -> QuantParams:
    """Per-tensor grid for activations: the range of each batch, averaged over batches.

    Every batch yields the range of `spec.range_method`; the ranges are combined by an
    exponential moving average, new = ema * old + (1 - ema) * batch, the first batch
    starting it (the observer of EFRAP's public code with range_method="mse").

    Args:
      batches: float `[num_batches, n]`, a sample of each batch's values.
      spec: A per-tensor grid (`channel_axis=None`).
      ema: Weight of the past, in [0, 1).

    Raises:
      InputError: `spec` is per channel, `batches` is not two-dimensional, or `ema` is
        out of range.
    """
    if spec.channel_axis is not None or batches.ndim != 2:
        raise errors.InputError(
            "calibrate_activations takes a per-tensor spec and values "
            f"[num_batches, n], got channel_axis={spec.channel_axis} and shape "
            f"{batches.shape}"
        )
    if not isinstance(ema, jax.core.Tracer) and not 0 <= ema < 1:
        raise errors.InputError(f"ema must be in [0, 1), got {ema}")
    # One row is one tensor: calibrating along axis 0 gives each its own range.
    rows = dataclasses.replace(spec, channel_axis=0)
    # Ranges, not grids: the grid of a batch of zeros has an arbitrary scale of 1.
    lows, highs = _range(batches, rows, ACTIVATION_SHRINKS)
    age = jnp.arange(batches.shape[0] - 1, -1, -1, dtype=jnp.float32)
    is_first = age == batches.shape[0] - 1
    share = jnp.where(is_first, jnp.float32(1), jnp.float32(1.0 - ema))
    weights = (jnp.float32(ema) ** age * share)[:, None]
    return params_from_range(jnp.sum(weights * lows), jnp.sum(weights * highs), spec)
