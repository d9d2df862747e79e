# SPDX-License-Identifier: Apache-2.0
"""Choosing, weight by weight, the grid point below or the one above.

A weight w on a grid with step s stands between two grid points. Write

    w / s + zero_point = lower + fraction,      lower integer, 0 <= fraction < 1.

A *rounding* is one number per weight: 0 takes `lower`, 1 takes `lower + 1`, and
anything between is a soft choice that an optimiser may move. Nearest rounding is one
choice among 2**n; the defences in this package pick another.

Three rules, each pinned by a test:

* **Ties** go to the even multiple of s, as `quantization.quantize` does.
* **Exact grid points** (fraction within `GRID_TOLERANCE` of 0 or 1) are pinned: moving
  them would add a full step of error where there was none.
* **Clipped weights** (outside the grid's range) are pinned to the end point: there is
  no second grid point to choose.

Shapes: everything has the shape of the weight. V (rounding logits) and h(V) (soft
rounding) are the letters of AdaRound and EFRAP.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from nad_jax import errors
from nad_jax.core import quantization

# In steps. A float32 division of two 8-bit magnitudes is off by up to 1.5e-5 steps,
# codes written as floats and calibrated anew by less than 8e-5; an attacker's usual
# margin from a tie is 1e-3.
GRID_TOLERANCE = 1e-4


class Placement(NamedTuple):
    """Where each weight stands between its two grid points.

    Attributes:
      lower: int32 code below the weight (the weight's own code where pinned).
      fraction: float32 in [0, 1), distance to `lower` in steps; 0 where pinned.
      nearest: float32 in {0, 1}, the rounding that `quantization.quantize` makes.
      free: bool, False where pinned (exact grid point or clipped).
    """

    lower: jax.Array
    fraction: jax.Array
    nearest: jax.Array
    free: jax.Array


def place(
    weights: jax.Array,
    params: quantization.QuantParams,
    spec: quantization.QuantSpec,
) -> Placement:
    """Locates every weight between its two grid points.

    Args:
      weights: float, any shape.
      params: The grid, broadcastable to `weights`.
      spec: Its width and sign.

    Gradients: none (`stop_gradient`); differentiate with respect to a rounding.
    """
    steps = quantization.divide(jax.lax.stop_gradient(weights), params.scale)
    rounded = jnp.round(steps)
    on_grid = jnp.abs(steps - rounded) < GRID_TOLERANCE
    below = jnp.where(on_grid, rounded, jnp.floor(steps))
    zero_point = params.zero_point.astype(jnp.float32)
    inside = (below + zero_point >= spec.qmin) & (below + zero_point < spec.qmax)
    free = inside & ~on_grid
    lower = jnp.clip(below + zero_point, spec.qmin, spec.qmax)
    zero = jnp.zeros_like(steps)
    return Placement(
        lower=lower.astype(jnp.int32),
        fraction=jnp.where(free, steps - below, zero),
        nearest=jnp.where(free, rounded - below, zero),
        free=free,
    )


def nearest_rounding(placement: Placement) -> jax.Array:
    """Rounding in {0, 1} of the nearest grid point, ties to even."""
    return placement.nearest


def flipped_rounding(placement: Placement) -> jax.Array:
    """The other grid point everywhere: `1 - nearest`, except where pinned."""
    return jnp.where(placement.free, 1.0 - placement.nearest, 0.0)


def stochastic_rounding(key: jax.Array, placement: Placement) -> jax.Array:
    """Up with probability `fraction`: unbiased, E[rounded weight] = weight."""
    draws = jax.random.uniform(key, placement.fraction.shape, jnp.float32)
    return threshold_rounding(draws, placement)


def threshold_rounding(thresholds: jax.Array, placement: Placement) -> jax.Array:
    """Up where `fraction` exceeds the weight's own threshold in [0, 1]."""
    return (placement.fraction > thresholds).astype(jnp.float32)


def rounding_logits(
    placement: Placement, *, stretch: float = 0.0, limit: float = 12.0
) -> jax.Array:
    """Logits V with `soft_rounding(V) = fraction`: soft rounding starts at the weight.

    `V = ln(q / (1 - q))` with `q = (fraction + stretch) / (1 + 2 * stretch)`, clipped
    to [-limit, limit]. At an exact grid point the unclipped value of a plain sigmoid
    would be -inf; here it is -limit, and the weight is pinned anyway.
    """
    tiny = jnp.finfo(jnp.float32).tiny
    share = (placement.fraction + stretch) / (1.0 + 2.0 * stretch)
    logits = jnp.log(jnp.maximum(share, tiny)) - jnp.log1p(-share)
    return jnp.clip(logits, -limit, limit)


def soft_rounding(logits: jax.Array, *, stretch: float = 0.0) -> jax.Array:
    """h(V) in [0, 1]: a sigmoid stretched to [-stretch, 1 + stretch] and clipped.

    EFRAP's public code uses 0, i.e. a plain sigmoid, which never reaches 0 or 1;
    AdaRound uses 0.1, which does. Gradients: zero where the stretched sigmoid is
    clipped.
    """
    stretched = (1.0 + 2.0 * stretch) * jax.nn.sigmoid(logits) - stretch
    return jnp.clip(stretched, 0.0, 1.0)


def hard_rounding(logits: jax.Array) -> jax.Array:
    """The decision, float32 in {0, 1}: 1 where V >= 0. No gradient."""
    return (logits >= 0).astype(jnp.float32)


def rounded_weights(
    placement: Placement, rounding: jax.Array, params: quantization.QuantParams
) -> jax.Array:
    """float32 weights `scale * (lower + rounding - zero_point)`.

    Args:
      placement: From `place`.
      rounding: In [0, 1], soft or hard; ignored where the weight is pinned.
      params: The grid that `placement` was made with.

    Gradients: linear in `rounding`, 0 where pinned.
    """
    if rounding.shape != placement.lower.shape:
        raise errors.InputError(
            f"rounding has shape {rounding.shape}, the weights {placement.lower.shape}"
        )
    up = jnp.where(placement.free, rounding, jnp.zeros_like(rounding))
    below = (placement.lower - params.zero_point).astype(jnp.float32)
    return params.scale * (below + up)


def codes(
    placement: Placement, rounding: jax.Array, spec: quantization.QuantSpec
) -> jax.Array:
    """Integer codes (int8 or uint8) of a hard rounding in {0, 1}."""
    up = jnp.where(placement.free, rounding, jnp.zeros_like(rounding))
    return (placement.lower + up.astype(jnp.int32)).astype(spec.dtype)


def rounding_error(
    weights: jax.Array,
    placement: Placement,
    params: quantization.QuantParams,
) -> jax.Array:
    """Signed error of nearest rounding `w - nearest(w)`, weight units.

    Zero where the weight is pinned: EFRAP's public code counts the clipping error of
    out-of-range weights too, although no rounding can change it.
    """
    nearest = rounded_weights(placement, placement.nearest, params)
    error = weights.astype(jnp.float32) - nearest
    return jnp.where(placement.free, error, jnp.zeros_like(error))


def flip_rate(placement: Placement, rounding: jax.Array) -> jax.Array:
    """Share of all weights (pinned ones included) not rounded to nearest; in [0, 1].

    0 for a tensor without weights.
    """
    flipped = (rounding != placement.nearest) & placement.free
    return jnp.sum(flipped.astype(jnp.float32)) / jnp.float32(max(flipped.size, 1))
