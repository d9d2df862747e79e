# SPDX-License-Identifier: Apache-2.0
"""Measuring the grid of a layer's input on calibration images."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax.core import grids, histogram_range, quantization

# Images whose values share one range before ranges are averaged.
_BATCH = 32
# Values of one batch that a range is measured on, where all of them are not needed.
_SAMPLE = 2**14


def measure(
    inputs: jax.Array, grid: grids.Grid, bits: int, *, num_images: int
) -> quantization.QuantParams:
    """Scale and zero point for a layer's input.

    Extremes are taken over all values; the other methods see an even sample of each
    batch.

    Args:
      inputs: `[N, ...]`, the layer's inputs in the float network, in the order of the
        calibration images. Behind a reshape that merges positions into the first axis,
        N is a multiple of their number; where it is anything else, a row counts as an
        image.
      grid: Says how ranges are measured and averaged.
      bits: Width of layer inputs, before any reduction by the grid.
      num_images: How many calibration images there are.
    """
    spec = grid.act_spec(bits)
    if inputs.shape[0] % num_images == 0:
        inputs = inputs.reshape(num_images, -1)
    values = inputs.reshape(1, -1) if grid.act_ema is None else _by_batch(inputs)
    if spec.range_method not in ("absmax", "minmax"):
        # As many values of each batch, also where all are one.
        wanted = _SAMPLE * max(inputs.shape[0] // _BATCH // values.shape[0], 1)
        values = values[:, :: _stride(values.shape[1], wanted, inputs.shape[1:])]
    if spec.range_method == "histogram":
        low, high = histogram_range.histogram_range(
            np.asarray(values, np.float32), codes=2**bits
        )
        return quantization.params_from_range(jnp.float32(low), jnp.float32(high), spec)
    return _calibrate(values, spec, grid.act_ema or 0.0)


def join_calls(inputs: Sequence[jax.Array], *, num_images: int) -> jax.Array:
    """The inputs of several calls of one layer as `measure` takes those of one.

    Args:
      inputs: `[N, ...]` of each call; only the last axis has the same size in all.
      num_images: How many calibration images there are.

    Returns:
      float32 `[num_images, n]`; or `[1, n]`, where some N is no multiple of
      num_images, and all values then share one range.
    """
    belongs = all(one.shape[0] % num_images == 0 for one in inputs)
    rows = num_images if belongs else 1
    parts = [one.reshape(rows, -1).astype(jnp.float32) for one in inputs]
    return jnp.concatenate(parts, axis=1)


def _by_batch(inputs: jax.Array) -> jax.Array:
    """`[batches, n]`; images that fill no batch are left out."""
    batches = max(inputs.shape[0] // _BATCH, 1)
    per_batch = inputs.shape[0] // batches
    return inputs[: batches * per_batch].reshape(batches, -1)


def _stride(size: int, wanted: int, image_shape: tuple[int, ...]) -> int:
    stride = max(size // wanted, 1)
    # A stride prime to an image's size walks through all channels and positions
    # instead of visiting a few of them.
    while math.gcd(stride, math.prod(image_shape)) > 1:
        stride += 1
    return stride


@functools.partial(jax.jit, static_argnums=(1, 2))
def _calibrate(values, spec, ema) -> quantization.QuantParams:
    return quantization.calibrate_activations(values, spec, ema=ema)
