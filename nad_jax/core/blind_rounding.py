# SPDX-License-Identifier: Apache-2.0
"""Roundings that look at the weights alone: the cheap controls of every defence.

Each is a few lines, and each should be beaten by whatever costs more. They come in two
kinds: those that choose between the two neighbours of a weight give a rounding as
`nad_jax.core.rounding` has it; those that move the weight first and then take nearest
give codes, since a weight may end several steps from where it was.
"""

import jax
import jax.numpy as jnp

from nad_jax.core import quantization, rounding


def flip(placement: rounding.Placement, flips: jax.Array) -> jax.Array:
    """Nearest, but the other neighbour where `flips` is true and there is one."""
    return jnp.where(flips & placement.free, 1.0 - placement.nearest, placement.nearest)


def random_flips(
    draws: jax.Array, placement: rounding.Placement, num_flips: jax.Array | float
) -> jax.Array:
    """Rounding with about `num_flips` weights flipped, whichever.

    Args:
      draws: Uniform in [0, 1), one per weight.
      placement: From `place`.
      num_flips: Expected number; all free weights if there are fewer.
    """
    free = jnp.maximum(jnp.sum(placement.free.astype(jnp.float32)), 1.0)
    return flip(placement, draws < num_flips / free)


def largest_error_flips(
    error: jax.Array, placement: rounding.Placement, num_flips: jax.Array | float
) -> jax.Array:
    """Rounding with the `num_flips` weights flipped that nearest moves furthest.

    Args:
      error: From `rounding_error`, signed.
      placement: From `place`.
      num_flips: Rounded to a whole number; never more than there are free weights.
    """
    magnitude = jnp.where(placement.free, jnp.abs(error), -1.0).ravel()
    order = jnp.argsort(-magnitude)
    first = jnp.arange(order.size, dtype=jnp.float32) < jnp.round(num_flips)
    flips = jnp.zeros(order.shape, bool).at[order].set(first)
    return flip(placement, flips.reshape(error.shape))


def noisy_codes(
    draws: jax.Array,
    weights: jax.Array,
    params: quantization.QuantParams,
    spec: quantization.QuantSpec,
    *,
    deviation: jax.Array | float,
) -> jax.Array:
    """Codes of nearest rounding after Gaussian noise; zeros stay zeros.

    Args:
      draws: Uniform in [0, 1), one per weight.
      weights: float.
      params: The grid of the weights as they were.
      spec: Its description.
      deviation: Of the noise, in half steps: 1 is half the width of a rounding cell.
    """
    tiny = jnp.finfo(jnp.float32).eps
    normal = jax.scipy.special.ndtri(jnp.clip(draws, tiny, 1.0 - tiny))
    noise = 0.5 * deviation * params.scale * normal
    return quantization.quantize(
        jnp.where(weights == 0.0, weights, weights + noise), params, spec
    )


def counter_shifted_codes(
    weights: jax.Array,
    params: quantization.QuantParams,
    spec: quantization.QuantSpec,
    *,
    strength: jax.Array | float,
) -> jax.Array:
    """Codes of nearest rounding of `w - strength * (nearest(w) - w)` (QVec).

    The shift that quantization makes is subtracted beforehand. With strength 1 a weight
    flips if its error is more than a quarter of a step.
    """
    nearest = quantization.dequantize(
        quantization.quantize(weights, params, spec), params
    )
    return quantization.quantize(weights - strength * (nearest - weights), params, spec)
