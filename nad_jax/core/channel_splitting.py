# SPDX-License-Identifier: Apache-2.0
"""Outlier channel splitting: a smaller range by computing some inputs twice.

The input channel with the largest weight is duplicated and its weights are shared out
between the two copies, which halves them; then the next one. The layer computes what it
did, on a grid whose range the outliers no longer set.
"""

import jax
import jax.numpy as jnp

from nad_jax import errors
from nad_jax.core import quantization


def split_codes(
    weights: jax.Array, spec: quantization.QuantSpec, *, num_splits: int
) -> tuple[jax.Array, quantization.QuantParams]:
    """Codes of nearest rounding after input channels were split.

    A weight w of a split channel becomes w/2 - step/4 and w/2 + step/4, which round to
    two codes whose steps add up to those of w itself, on the finer grid.

    Args:
      weights: float `[..., inputs, outputs]`.
      spec: The grid; of all weights, or with `channel_axis` -1 per output.
      num_splits: Copies to add, at least 0; a copy may be split again.

    Returns:
      Codes int32 `[..., inputs, outputs]`, those of a channel's copies added up, so
      they may exceed the range of `spec`, and with hundreds of copies that of int16;
      and the grid, to `dequantize` them.

    Raises:
      InputError: fewer than two axes, or a negative number of splits.

    References:
      Zhao, Hu, Dotzel, De Sa, Zhang: Improving Neural Network Quantization without
      Retraining using Outlier Channel Splitting, ICML 2019.
    """
    if weights.ndim < 2 or num_splits < 0:
        raise errors.InputError(
            "weights must be [..., inputs, outputs] and num_splits at least 0, got "
            f"shape {weights.shape} and {num_splits}"
        )
    if num_splits == 0:
        params = quantization.calibrate(weights, spec)
        codes = quantization.quantize(weights, params, spec)
        return codes.astype(jnp.int32), params
    inputs = weights.shape[-2]
    # [inputs, ..., outputs], with room for the copies.
    parts = jnp.moveaxis(weights.astype(jnp.float32), -2, 0)
    room = jnp.zeros((num_splits, *parts.shape[1:]), jnp.float32)
    whole = jnp.concatenate([parts, room])

    def halve(copy, carried):
        parts, chosen = carried
        sizes = jnp.max(jnp.abs(parts), axis=tuple(range(1, parts.ndim)))
        largest = jnp.argmax(sizes)
        half = 0.5 * parts[largest]
        parts = parts.at[largest].set(half).at[inputs + copy].set(half)
        return parts, chosen.at[copy].set(largest)

    start = whole, jnp.zeros(num_splits, jnp.int32)
    halves, chosen = jax.lax.fori_loop(0, num_splits, halve, start)
    # The grid is that of the halves; only then is a step known to shift them by.
    params = quantization.calibrate(jnp.moveaxis(halves, 0, -2), spec)
    of_parts = jax.tree.map(lambda x: jnp.moveaxis(x, -2, 0), params)
    quarter_step = 0.25 * of_parts.scale[0]

    def share_out(copy, carried):
        parts, owner = carried
        half = 0.5 * parts[chosen[copy]]
        parts = parts.at[inputs + copy].set(half + quarter_step)
        parts = parts.at[chosen[copy]].set(half - quarter_step)
        return parts, owner.at[inputs + copy].set(owner[chosen[copy]])

    start = whole, jnp.arange(inputs + num_splits)
    parts, owner = jax.lax.fori_loop(0, num_splits, share_out, start)
    codes = quantization.quantize(parts, of_parts, spec).astype(jnp.int32)
    steps = codes - of_parts.zero_point
    added = jax.ops.segment_sum(steps, owner, num_segments=inputs)
    total = jnp.moveaxis(added + of_parts.zero_point, 0, -2)
    return total, params
