# SPDX-License-Identifier: Apache-2.0
"""Images bent by a field of small displacements: the trigger of WaNet.

A field is float ``[H, W, 2]``: how far down and how far right of each pixel, in pixels,
its new value is fetched from. Letters as in `nad_jax.core.shapes`.

References:
  Nguyen, Tran, "WaNet - Imperceptible Warping-based Backdoor Attack", ICLR 2021.
"""

import jax
import jax.numpy as jnp


def elastic_field(
    image_shape: tuple[int, int, int],
    *,
    grid_size: int,
    strength: float,
    key: jax.Array,
) -> jax.Array:
    """A smooth field that is the same for every image.

    ``grid_size x grid_size`` displacements, uniform, scaled to a mean magnitude of
    `strength` along each axis, then enlarged to the image by cubic interpolation.

    Args:
      image_shape: ``(H, W, C)``.
      grid_size: Control points along a side; fewer is smoother.
      strength: Mean absolute displacement of the control points along an axis, pixels.
      key: Typed key; decides the field.

    Returns:
      float32 ``[H, W, 2]``.
    """
    height, width, _ = image_shape
    control = jax.random.uniform(
        key, (grid_size, grid_size, 2), jnp.float32, minval=-1.0, maxval=1.0
    )
    control = strength * control / jnp.mean(jnp.abs(control))
    return jax.image.resize(control, (height, width, 2), method="cubic")


def bend(images: jax.Array, fields: jax.Array) -> jax.Array:
    """Each pixel fetched from its displaced place, between four neighbours linearly.

    Places outside of the image are moved to its border.

    Args:
      images: float ``[B, H, W, C]``.
      fields: ``[H, W, 2]`` for all images, or ``[B, H, W, 2]`` for one each.

    Returns:
      Shape and dtype of images.
    """
    batch, height, width, _ = images.shape
    fields = jnp.broadcast_to(
        jnp.asarray(fields, jnp.float32), (batch, height, width, 2)
    )
    grid = jnp.stack(
        jnp.meshgrid(
            jnp.arange(height, dtype=jnp.float32),
            jnp.arange(width, dtype=jnp.float32),
            indexing="ij",
        ),
        axis=-1,
    )
    last = jnp.asarray([height - 1, width - 1], jnp.float32)
    place = jnp.clip(grid[None] + fields, 0.0, last[None, None, None])
    corner = jnp.floor(place)
    share = (place - corner).astype(images.dtype)
    near = corner.astype(jnp.int32)
    far = jnp.minimum(near + 1, last.astype(jnp.int32)[None, None, None])
    image = jnp.arange(batch)[:, None, None]
    down, right = share[..., :1], share[..., 1:]

    def fetch(rows, columns):
        return images[image, rows, columns]

    top = fetch(near[..., 0], near[..., 1]) * (1 - right)
    top = top + fetch(near[..., 0], far[..., 1]) * right
    bottom = fetch(far[..., 0], near[..., 1]) * (1 - right)
    bottom = bottom + fetch(far[..., 0], far[..., 1]) * right
    return top * (1 - down) + bottom * down
