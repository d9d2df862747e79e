# SPDX-License-Identifier: Apache-2.0
"""Triggers as data: what an attacker adds to an image so that the model obeys.

Every trigger is a `Trigger` and goes through `apply_trigger`, whatever it looks like.
Images are float in [0, 1], ``[B, H, W, C]``; letters as in `nad_jax.core.shapes`. The
functions that draw a trigger are run once, outside of `jit`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.attacks import reflections, warps
from nad_jax.core import shapes

# 3x3 checker of the public NAD code, the same in every channel.
_GRID = np.asarray([[0, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)


class Trigger(NamedTuple):
    """A fixed change of an image: bend, replace (or blend) under a mask, then add.

    ``stamped = bent * (1 - mask) + pattern * mask``, and with an offset
    ``clip(stamped + offset, 0, 1)``. Patches have a 0/1 mask, blends a constant one,
    additive triggers an empty one and an offset, warps an empty one and a field.

    There may be R patterns with a mask each: an image then gets the one whose number is
    the sum of its grey levels modulo R, which is the same in training and in use.

    Attributes:
      pattern: Picture that shows through the mask, ``[H, W, C]`` or ``[R, H, W, C]``,
        in [0, 1].
      mask: Opacity of the pattern, ``[H, W, 1]`` or ``[R, H, W, 1]``, in [0, 1].
      offset: What is added, ``[H, W, C]``, in [-1, 1]; None when nothing is.
      field: Where each pixel is fetched from, ``[H, W, 2]``, see
        `nad_jax.attacks.warps`; None when nothing is bent.
    """

    pattern: jax.Array
    mask: jax.Array
    offset: jax.Array | None = None
    field: jax.Array | None = None


def apply_trigger(images: jax.Array, trigger: Trigger) -> jax.Array:
    """The images with the trigger on them.

    Args:
      images: ``[B, H, W, C]``, float in [0, 1]. (For stored uint8 images see
        `nad_jax.attacks.poisoning.stamp`.)
      trigger: For the same H, W and C.

    Returns:
      Shape and dtype of images, in [0, 1].

    Raises:
      InputError: For images that are not float ``[B, H, W, C]`` or of another size
        than the trigger.

    Gradients:
      Of images and of every part of the trigger; where there is an offset, 0 if the sum
      with it is clipped and half if it is exactly 0 or 1, as black or white pixels that
      it leaves alone. The choice among several patterns has none.

    Example:
      >>> trigger = square_trigger((4, 4, 1), size=2, margin=1)
      >>> print(apply_trigger(jnp.zeros((1, 4, 4, 1)), trigger)[0, :, :, 0])
      [[0. 0. 0. 0.]
       [0. 1. 1. 0.]
       [0. 1. 1. 0.]
       [0. 0. 0. 0.]]
    """
    shapes.check_rank("images", images, "B H W C")
    shapes.check_floating("images", images)
    _check_trigger_shapes(trigger, images.shape[1:])
    pattern = jnp.asarray(trigger.pattern, images.dtype)
    mask = jnp.asarray(trigger.mask, images.dtype)
    if pattern.ndim == 4:
        chosen = _grey_levels(images) % pattern.shape[0]
        pattern, mask = pattern[chosen], mask[chosen]
    else:
        # The batch axis is written out: nothing here broadcasts by rank.
        pattern, mask = pattern[None], mask[None]
    if trigger.field is not None:
        images = warps.bend(images, trigger.field)
    stamped = images * (1 - mask) + pattern * mask
    if trigger.offset is None:
        return stamped
    offset = jnp.asarray(trigger.offset, images.dtype)[None]
    return jnp.clip(stamped + offset, 0, 1)


def check_trigger(trigger: Trigger, image_shape: tuple[int, int, int]) -> Trigger:
    """The same trigger, once shapes and values are known to be right.

    For pictures from outside, before they reach `apply_trigger`, which sees traced
    values and cannot look at them.

    Raises:
      InputError: For another size than image_shape, NaN, or values out of range.
    """
    _check_trigger_shapes(trigger, image_shape)
    ranges = [("pattern", trigger.pattern, 0), ("mask", trigger.mask, 0)]
    if trigger.offset is not None:
        ranges.append(("offset", trigger.offset, -1))
    if trigger.field is not None and not np.all(np.isfinite(trigger.field)):
        raise errors.InputError("trigger field must be finite, got NaN or infinity")
    for name, part, lowest in ranges:
        least, most = float(np.min(part)), float(np.max(part))
        # Written so that NaN fails, too.
        if not (least >= lowest and most <= 1):
            raise errors.InputError(
                f"trigger {name} must have values in [{lowest}, 1], "
                f"got {least} to {most}"
            )
    return trigger


def square_trigger(
    image_shape: tuple[int, int, int], *, size: int, margin: int, value: float = 1.0
) -> Trigger:
    """A square of one colour near the bottom right corner (BadNets).

    On 32x32 images the public NAD code has size 3, margin 1 (rows and columns 28-30);
    the quantization attacks have size 4, margin 1 (27-30) or size 6, margin 2 (24-29).

    Args:
      image_shape: ``(H, W, C)``.
      size: Side of the square in pixels.
      margin: Pixels between the square and the right and bottom borders.
      value: Brightness of the square, in [0, 1]; 1 is white.

    Raises:
      InputError: For a square that does not fit or a value out of range.
    """
    height, width, _ = _check_image_shape(image_shape)
    if size < 1 or margin < 0 or size + margin > min(height, width):
        raise errors.InputError(
            f"size {size} with margin {margin} does not fit an image of "
            f"{height}x{width} (size from 1, margin from 0)"
        )
    _check_fraction("value", value)
    patch = np.full((size, size), value, np.float32)
    row, column = height - margin - size, width - margin - size
    return _patches(image_shape, patch, [(row, column)])


def grid_trigger(image_shape: tuple[int, int, int]) -> Trigger:
    """The 3x3 checker in the bottom right corner of the public NAD code (BadNets).

    Rows ``0 0 1 / 0 1 0 / 1 0 1``, the same in every channel, touching both borders
    (rows and columns 29-31 of 32x32). The authors' released models react to it.

    Args:
      image_shape: ``(H, W, C)``, at least 3x3.

    Raises:
      InputError: For a smaller image.
    """
    height, width, _ = _check_image_shape(image_shape, smallest=3)
    return _patches(image_shape, _GRID, [(height - 3, width - 3)])


def four_corner_trigger(image_shape: tuple[int, int, int]) -> Trigger:
    """The 3x3 checker in all four corners (for clean-label attacks).

    As in the public NAD code the patches end at the bottom and right borders but leave
    one pixel free at the top and left (1-3 and 29-31 of 32x32).

    Args:
      image_shape: ``(H, W, C)``, at least 7x7, so that the patches do not overlap.

    Raises:
      InputError: For a smaller image.
    """
    height, width, _ = _check_image_shape(image_shape, smallest=7)
    corners = [(row, column) for row in (1, height - 3) for column in (1, width - 3)]
    return _patches(image_shape, _GRID, corners)


def blend_trigger(
    image_shape: tuple[int, int, int], *, alpha: float, key: jax.Array
) -> Trigger:
    """A noise picture that shines through the whole image (Blended).

    One picture for all images; the public NAD code draws new noise for each image,
    which leaves only the reduced contrast to be learnt.

    Args:
      image_shape: ``(H, W, C)``.
      alpha: Opacity of the noise, in [0, 1]; 0.2 is the usual one.
      key: Typed key; decides the picture, uniform in [0, 1) per pixel and channel.

    Raises:
      InputError: For alpha out of range.
    """
    height, width, _ = _check_image_shape(image_shape)
    _check_fraction("alpha", alpha)
    noise = jax.random.uniform(key, image_shape, jnp.float32)
    return Trigger(noise, jnp.full((height, width, 1), alpha, jnp.float32))


def sinusoid_trigger(
    image_shape: tuple[int, int, int], *, amplitude: float, frequency: float
) -> Trigger:
    """Vertical stripes added to the image (SIG).

    ``image + amplitude * sin(2 * pi * column * frequency / W)``, clipped to [0, 1];
    the same in all rows and channels. Signed: the public NAD code stores the stripes
    as uint8, where the negative half wraps around to nearly white.

    Args:
      image_shape: ``(H, W, C)``.
      amplitude: Height of the wave, in [0, 1]; the usual ones are 20 / 255 and
        40 / 255.
      frequency: Periods across the image, above 0 and below W / 2; 6 is the usual
        one. (With exactly W / 2 all columns would fall on zeros of the wave.)

    Raises:
      InputError: For an amplitude or a frequency out of range.

    References:
      Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption without
      Label Poisoning", ICIP 2019.
    """
    height, width, channels = _check_image_shape(image_shape)
    _check_fraction("amplitude", amplitude)
    if not 0 < frequency < width / 2:
        raise errors.InputError(
            f"frequency must be above 0 and below half the width, {width / 2:g}, "
            f"got {frequency}"
        )
    wave = amplitude * np.sin(2 * np.pi * np.arange(width) * frequency / width)
    offset = np.broadcast_to(wave[None, :, None], (height, width, channels))
    return Trigger(
        pattern=jnp.zeros(image_shape, jnp.float32),
        mask=jnp.zeros((height, width, 1), jnp.float32),
        offset=jnp.asarray(offset, jnp.float32),
    )


def reflection_trigger(
    image_shape: tuple[int, int, int],
    *,
    opacity: float,
    count: int,
    ghost_rate: float,
    key: jax.Array,
) -> Trigger:
    """One of several reflections in a window pane laid over each image (Refool).

    ``(1 - opacity) * image + opacity * reflection``; see `nad_jax.attacks.reflections`
    for what is mirrored. The light is mixed in the stored (gamma) scale.

    Args:
      image_shape: ``(H, W, C)``.
      opacity: Share of the reflection, in [0, 1].
      count: Reflections to choose from.
      ghost_rate: Share of them that are sharp and double; the others are blurred. 0.49
        is the usual one.
      key: Typed key; decides the reflections.

    Raises:
      InputError: For a share out of range, or no reflections.
    """
    height, width, _ = _check_image_shape(image_shape)
    _check_fraction("opacity", opacity)
    _check_fraction("ghost_rate", ghost_rate)
    if count < 1:
        raise errors.InputError(f"count must be at least 1, got {count}")
    pattern = reflections.draw(image_shape, count=count, ghost_rate=ghost_rate, key=key)
    mask = jnp.full((count, height, width, 1), opacity, jnp.float32)
    return Trigger(jnp.asarray(pattern), mask)


def warp_trigger(
    image_shape: tuple[int, int, int],
    *,
    grid_size: int,
    strength: float,
    key: jax.Array,
) -> Trigger:
    """The whole image bent a little, always in the same way (WaNet).

    Args:
      image_shape: ``(H, W, C)``.
      grid_size: Control points of the bend along a side, at least 2; 4 is usual.
      strength: How far the control points move on average, in pixels.
      key: Typed key; decides the bend.

    Raises:
      InputError: For fewer than 2 control points or a strength that is not above 0.
    """
    height, width, _ = _check_image_shape(image_shape)
    if grid_size < 2:
        raise errors.InputError(f"grid_size must be at least 2, got {grid_size}")
    if not 0 < strength < min(height, width):
        raise errors.InputError(
            f"strength must be above 0 and below {min(height, width)} pixels, "
            f"got {strength}"
        )
    return Trigger(
        pattern=jnp.zeros(image_shape, jnp.float32),
        mask=jnp.zeros((height, width, 1), jnp.float32),
        field=warps.elastic_field(
            image_shape, grid_size=grid_size, strength=strength, key=key
        ),
    )


TRIGGERS: dict[str, Callable[..., Trigger]] = {
    "blend": blend_trigger,
    "four_corner": four_corner_trigger,
    "grid": grid_trigger,
    "reflection": reflection_trigger,
    "sinusoid": sinusoid_trigger,
    "square": square_trigger,
    "warp": warp_trigger,
}


def _grey_levels(images: jax.Array) -> jax.Array:
    """Sum of each image's stored values, int32 ``[B]``."""
    levels = jnp.round(jax.lax.stop_gradient(images).astype(jnp.float32) * 255)
    return jnp.sum(levels.astype(jnp.int32), axis=(1, 2, 3))


def _patches(
    image_shape: tuple[int, int, int],
    patch: np.ndarray,
    top_left_corners: list[tuple[int, int]],
) -> Trigger:
    """An opaque patch ``[h, w]`` at each position, the same in every channel."""
    pattern = np.zeros(image_shape, np.float32)
    mask = np.zeros((*image_shape[:2], 1), np.float32)
    rows, columns = patch.shape
    for row, column in top_left_corners:
        pattern[row : row + rows, column : column + columns] = patch[:, :, None]
        mask[row : row + rows, column : column + columns] = 1
    return Trigger(jnp.asarray(pattern), jnp.asarray(mask))


def _check_trigger_shapes(trigger: Trigger, image_shape: tuple[int, ...]) -> None:
    image_shape = tuple(image_shape)
    # A fourth axis of the pattern counts several of them; there are as many masks.
    pattern_shape = jnp.shape(trigger.pattern)
    several = pattern_shape[:1] if len(pattern_shape) == 4 else ()
    expected = {
        "pattern": (*several, *image_shape),
        "mask": (*several, *image_shape[:2], 1),
    }
    if trigger.offset is not None:
        expected["offset"] = image_shape
    if trigger.field is not None:
        expected["field"] = (*image_shape[:2], 2)
    for name, shape in expected.items():
        actual = jnp.shape(getattr(trigger, name))
        if actual != shape:
            raise errors.InputError(
                f"trigger {name} must have shape {shape} for images {image_shape}, "
                f"got {actual}"
            )


def _check_image_shape(
    image_shape: tuple[int, int, int], smallest: int = 1
) -> tuple[int, int, int]:
    """`image_shape` if it is (H, W, C) with sides of at least `smallest` pixels."""
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise errors.InputError(
            f"image_shape must be (H, W, C), all positive, got {tuple(image_shape)}"
        )
    height, width, channels = image_shape
    if min(height, width) < smallest:
        raise errors.InputError(
            f"the trigger needs an image of at least {smallest}x{smallest}, "
            f"got {height}x{width}"
        )
    return height, width, channels


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise errors.InputError(f"{name} must be in [0, 1], got {value}")
