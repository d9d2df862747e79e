# SPDX-License-Identifier: Apache-2.0
"""Which examples make a batch, and how training images are varied.

Everything is a pure function of arrays and a key, and can be jitted with the plain
Python numbers static. A batch is `images[indices]`, whether the images are one uint8
array on the device or in files (`nad_jax.data.stream`), and since its indices follow
from `(key, epoch)` alone, a run that was interrupted resumes with exactly the batches
it would have seen.

B = batch, N = examples, H = height, W = width, C = channels.
"""

import jax
import jax.numpy as jnp

from nad_jax import errors


def to_float(images: jax.Array) -> jax.Array:
    """Images in [0, 1] from stored ones.

    Args:
      images: uint8, any shape.

    Returns:
      float32 of the same shape, `images / 255`.

    Example:
      >>> to_float(jnp.array([0, 255], jnp.uint8)).tolist()
      [0.0, 1.0]
    """
    return images.astype(jnp.float32) / 255.0


def epoch_indices(
    key: jax.Array, epoch: int | jax.Array, num_examples: int, batch_size: int
) -> jax.Array:
    """Rows of one epoch of training, shuffled and cut into equal batches.

    For training only: the up to `batch_size - 1` examples left over are dropped, others
    in each epoch. Use `evaluation_batches` where every example must count.

    Args:
      key: key of the run; the same for all its epochs.
      epoch: number of the epoch; may be traced.
      num_examples: N, at least 1.
      batch_size: at least 1. If there are fewer examples than that, the epoch is one
        batch of all of them.

    Returns:
      int32 `[N // B, B]`, no number twice.
    """
    _check_counts(num_examples=num_examples, batch_size=batch_size)
    batch_size = min(batch_size, num_examples)
    num_steps = num_examples // batch_size
    order = jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


def evaluation_batches(
    num_examples: int, batch_size: int
) -> tuple[jax.Array, jax.Array]:
    """Rows of all examples in order, in batches of one size, and which slots count.

    The last batch is filled up with example 0; its mask is False there.

    Args:
      num_examples: N, at least 1.
      batch_size: B, at least 1.

    Returns:
      Indices int32 and mask bool, both `[ceil(N / B), B]`. `indices[mask]` is 0 .. N-1.

    Example:
      >>> indices, mask = evaluation_batches(3, 2)
      >>> indices.tolist(), mask.tolist()
      ([[0, 1], [2, 0]], [[True, True], [True, False]])
    """
    _check_counts(num_examples=num_examples, batch_size=batch_size)
    num_steps = -(-num_examples // batch_size)
    slots = jnp.arange(num_steps * batch_size).reshape(num_steps, batch_size)
    mask = slots < num_examples
    return jnp.where(mask, slots, 0), mask


def draw_views(key: jax.Array, count: int) -> jax.Array:
    """What decides the variation of each of so many images, for `show_views`.

    Args:
      key: fresh for each batch.
      count: B.

    Returns:
      float32 `[B, 5]`, uniform in [0, 1).
    """
    return jax.random.uniform(key, (count, 5))


def show_views(
    views: jax.Array,
    images: jax.Array,
    *,
    pad: int = 4,
    flip: bool = True,
    cutout: int = 0,
) -> jax.Array:
    """Each image cropped, perhaps mirrored, perhaps with a hole in it.

    The image is padded with `pad` zeros on every side and cropped back to H x W at an
    offset drawn uniformly from the `(2 pad + 1)^2` possible ones; then mirrored left to
    right with probability 1/2; then a square of `cutout` x `cutout` pixels around a
    pixel drawn uniformly from the image is set to zero, as far as it lies inside. Every
    image has its own draws, and switching one kind off leaves the others as they were.

    The reference code of NAD has "Cutout of length 3", which cuts 2 x 2 pixels: that is
    `cutout=2` here.

    Args:
      views: from `draw_views`, `[B, 5]`; equal views are equal variations.
      images: `[B, H, W, C]`, float or integer; zero is black.
      pad: in pixels, 0 for no crop.
      flip: whether to mirror.
      cutout: side of the hole in pixels, 0 for none.

    Returns:
      `[B, H, W, C]` of the same dtype.

    Gradients:
      Those of the pixels that were copied.
    """
    if pad < 0 or cutout < 0:
        raise errors.InputError(f"pad and cutout must be >= 0, not {pad} and {cutout}")
    if images.ndim != 4:
        raise errors.InputError(f"images must be [B, H, W, C], not {images.shape}")
    _, height, width, _ = images.shape
    row, column = jnp.arange(height)[None], jnp.arange(width)[None]  # [1, H], [1, W]
    # Each is [B, 1].
    crop_row, crop_column, mirror, hole_row, hole_column = jnp.split(views, 5, axis=1)

    # Where each pixel of the result comes from; outside of the image means padding.
    from_row = row + _integer_below(2 * pad + 1, crop_row) - pad
    from_column = column + _integer_below(2 * pad + 1, crop_column) - pad
    if flip:
        from_column = jnp.where(mirror < 0.5, from_column[:, ::-1], from_column)
    visible = _cross(
        (from_row >= 0) & (from_row < height),
        (from_column >= 0) & (from_column < width),
    )
    if cutout:
        top = _integer_below(height, hole_row) - cutout // 2
        left = _integer_below(width, hole_column) - cutout // 2
        visible &= ~_cross(
            (row >= top) & (row < top + cutout),
            (column >= left) & (column < left + cutout),
        )
    # One gather of the pixels wanted; the padded copy is never made. Under `vmap`, not
    # with the number of the image as an index: a split batch would be collected on
    # every device first, for all the compiler knows.
    pixels = jax.vmap(lambda image, rows, columns: image[rows[:, None], columns])(
        images,
        jnp.clip(from_row, 0, height - 1),
        jnp.clip(from_column, 0, width - 1),
    )
    return jnp.where(visible[..., None], pixels, jnp.zeros((), images.dtype))


def split_indices(
    key: jax.Array,
    num_examples: int,
    fraction: float,
    *,
    labels: jax.Array | None = None,
) -> jax.Array:
    """Rows of a random subset, such as the clean images a defender is given.

    Drawn once and shared by all defences, so that they are compared on the same data.

    Args:
      key: the same key gives the same rows.
      num_examples: N, at least 1.
      fraction: size of the subset in (0, 1], as a fraction of N. NAD uses 0.05.
      labels: int `[N]`; when given, every class is represented in proportion, to the
        nearest image, as far as the size allows.

    Returns:
      int32 `[max(1, round(fraction * N))]`, sorted, no number twice.
    """
    _check_counts(num_examples=num_examples)
    if not 0 < fraction <= 1:
        raise errors.InputError(f"fraction must be in (0, 1], not {fraction}")
    if labels is not None and labels.shape != (num_examples,):
        raise errors.InputError(f"labels must be [{num_examples}], not {labels.shape}")
    size = max(1, round(fraction * num_examples))
    order = jax.random.permutation(key, num_examples)
    if labels is not None:
        order = order[_interleave_classes(labels[order])]
    return jnp.sort(order[:size])


def _interleave_classes(labels: jax.Array) -> jax.Array:
    """An order in which every beginning holds the classes in proportion.

    Image number r (from 0) of n of a class is placed at (r + 1/2) / n. Ties, which is
    all there is when classes are of one size, stay in the order given.
    """
    by_class = jnp.argsort(labels, stable=True)
    grouped = labels[by_class]
    first = jnp.searchsorted(grouped, grouped, side="left")
    last = jnp.searchsorted(grouped, grouped, side="right")
    rank = jnp.arange(len(labels)) - first
    place = (rank.astype(jnp.float32) + 0.5) / (last - first).astype(jnp.float32)
    unsorted = jnp.zeros_like(place).at[by_class].set(place)
    return jnp.argsort(unsorted, stable=True)


def _integer_below(bound: int, chance: jax.Array) -> jax.Array:
    """0 .. bound - 1, evenly, from uniform numbers in [0, 1)."""
    return jnp.floor(chance * bound).astype(jnp.int32)


def _cross(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Bool `[B, H, W]`: where both the row `[B, H]` and the column `[B, W]` hold."""
    return rows[:, :, None] & columns[:, None, :]


def _check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise errors.InputError(f"{name} must be at least 1, not {count}")
