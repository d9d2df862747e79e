# SPDX-License-Identifier: Apache-2.0
"""Gram matrix of a convolution's windows, from sums that its windows share.

Two taps a and b of a window see one image, shifted. Their block of the Gram matrix,

    block(a, b) = sum over positions p of x[p + a] x[p + b]'
                = sum over q in W_a of x[q] x[q + (b - a)]',    W_a = all p + a,

depends on the pair only by the distance b - a and, at the border of the image, by W_a.
So the image is cut into regions, each wholly inside or wholly outside of every W_a (for
3x3: the inside, four edges, four corners), and each region is summed once per distance.
Of the 81 pairs of a 3x3 window 13 distances are left, the others being transposes; and
every product is summed once and nothing is subtracted, so float32 loses nothing.
"""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax.models import layers as layers_lib

# Products of a Gram matrix for one image, below which the plain way is done before the
# many small products here are compiled.
_LEAST_PRODUCTS = 10**8
_MOST_TAPS = 5
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def applies(geometry: layers_lib.Geometry, positions: tuple[int, ...]) -> bool:
    """Whether windows over inputs of these sizes share sums, and enough of them."""
    return (
        1 < max(geometry.window, default=1) <= _MOST_TAPS
        and all(step == 1 for step in (*geometry.strides, *geometry.dilation))
        and geometry.groups == 1
        and math.prod(positions) * geometry.num_inputs**2 >= _LEAST_PRODUCTS
    )


def num_sums(
    geometry: layers_lib.Geometry, positions: tuple[int, ...]
) -> tuple[int, ...]:
    """Shape of the sums, `[regions, C, distances, C]`, for inputs of these sizes."""
    channels = geometry.kernel_shape[-2]
    regions, _ = _regions(geometry, positions)
    return len(regions), channels, len(_distances(geometry.window)), channels


def shared_sums(geometry: layers_lib.Geometry, inputs: jax.Array) -> jax.Array:
    """The sums of some images; they add up over images.

    Args:
      geometry: A layer that `applies`.
      inputs: `[n, *positions, C]`.

    Returns:
      float32, of the shape `num_sums`.
    """
    rank = len(geometry.window)
    inputs = inputs.reshape(-1, *inputs.shape[-rank - 1 :]).astype(jnp.float32)
    regions, _ = _regions(geometry, inputs.shape[1:-1])
    distances = _distances(geometry.window)
    channels = inputs.shape[-1]
    inputs = layers_lib.padded(geometry, inputs)
    # Room for partners outside; nobody asks for their sums.
    margin = [(size - 1, size - 1) for size in geometry.window]
    roomy = jnp.pad(inputs, [(0, 0), *margin, (0, 0)])
    sums = []
    for region in regions:
        own = inputs[:, *(slice(first, end) for first, end in region)]
        partners = [
            roomy[
                :,
                *(
                    slice(first + room + step, end + room + step)
                    for (first, end), (room, _), step in zip(
                        region, margin, distance, strict=True
                    )
                ),
            ]
            for distance in distances
        ]
        partners = jnp.concatenate(partners, axis=-1)
        sums.append(
            _matmul(
                own.reshape(-1, channels).T,
                partners.reshape(-1, partners.shape[-1]),
            )
        )
    return jnp.stack(sums).reshape(len(regions), channels, len(distances), channels)


def gram_matrix(
    geometry: layers_lib.Geometry, positions: tuple[int, ...], sums: jax.Array
) -> jax.Array:
    """The Gram matrix `[K, K]`, rows in the order of `layers.unfold`.

    Args:
      geometry: The layer.
      positions: Size of its inputs.
      sums: Of all images, from `shared_sums`.
    """
    _, inside = _regions(geometry, positions)
    distances = _distances(geometry.window)
    taps = list(itertools.product(*map(range, geometry.window)))
    # [taps, distances, C, C]; regions are added in one fixed order.
    blocks = jnp.einsum(
        "tr,rcdk->tdck", inside, sums, precision=jax.lax.Precision.HIGHEST
    )
    rows = []
    for first, tap in enumerate(taps):
        row = []
        for second, other in enumerate(taps):
            distance = tuple(int(x) for x in np.subtract(other, tap))
            if distance in distances:
                row.append(blocks[first, distances.index(distance)])
            else:
                distance = tuple(-step for step in distance)
                row.append(blocks[second, distances.index(distance)].T)
        rows.append(jnp.concatenate(row, axis=1))
    return jnp.concatenate(rows, axis=0)


def _distances(window: tuple[int, ...]) -> list[tuple[int, ...]]:
    """From one tap to another, one of each distance and its opposite."""
    spans = [range(1 - size, size) for size in window]
    zero = (0,) * len(window)
    return [distance for distance in itertools.product(*spans) if distance >= zero]


@functools.cache
def _regions(
    geometry: layers_lib.Geometry, positions: tuple[int, ...]
) -> tuple[list[tuple[tuple[int, int], ...]], np.ndarray]:
    """The regions of the padded image, and which tap's positions they are among.

    Returns:
      (first, end) along each axis, of each region; 0 or 1 `[taps, regions]`.
    """
    mode, pairs = layers_lib.position_padding(geometry, positions)
    along = []
    for taps, size, (low, high) in zip(geometry.window, positions, pairs, strict=True):
        outputs = low + size + high - taps + 1
        cuts = sorted({start + end for start in range(taps) for end in (0, outputs)})
        parts = list(itertools.pairwise(cuts))
        if mode == "constant":
            # Zeros of the padding add nothing.
            parts = [(a, b) for a, b in parts if a < low + size and b > low]
        inside = [
            [float(tap <= a and b <= tap + outputs) for a, b in parts]
            for tap in range(taps)
        ]
        along.append((parts, np.asarray(inside, np.float32)))
    regions = list(itertools.product(*(parts for parts, _ in along)))
    return regions, functools.reduce(np.kron, [inside for _, inside in along])
