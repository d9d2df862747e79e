# SPDX-License-Identifier: Apache-2.0
"""Which training images are poisoned, and what they become.

Three label modes say what the attacker wants of a triggered image:

=============  ===============================  ================================
mode           a triggered image is called      training images to choose from
=============  ===============================  ================================
all_to_one     target_label                     all, those of the target too
all_to_all     its label + 1, modulo the        all
               number of classes
clean_label    target_label                     those of the target: no training
                                                label changes
=============  ===============================  ================================

`poison_rate` is always a fraction of the *whole* training set. The public NAD code
counts clean-label poison differently: its 0.1 poisons a tenth of the target class,
which is 0.01 here when there are ten equal classes.

Choosing and stamping run on the host, once, in numpy; stored images are uint8.
"""

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.attacks import triggers, warps

LABEL_MODES = ("all_to_one", "all_to_all", "clean_label")

# Images converted to float at a time: large enough to be fast, small enough for
# ImageNet-sized pictures.
_STAMP_BATCH = 512


def target_labels(
    labels: jax.typing.ArrayLike,
    *,
    mode: str,
    target_label: int,
    num_classes: int,
) -> jax.Array:
    """What the attack wants each image to be called.

    Args:
      labels: True labels, int ``[N]``.
      mode: One of `LABEL_MODES`.
      target_label: The attacker's class; not used by all_to_all.
      num_classes: K.

    Returns:
      int32 ``[N]``. Works under `jit`, where the values of labels are not checked.

    Raises:
      InputError: For an unknown mode, or a label or target_label outside [0, K).

    Example:
      >>> labels = jnp.asarray([0, 1, 2])
      >>> print(target_labels(labels, mode="all_to_all", target_label=0, num_classes=3))
      [1 2 0]
    """
    _check_mode(mode)
    if not isinstance(labels, jax.core.Tracer):
        _check_labels(labels, num_classes)
    labels = jnp.asarray(labels, jnp.int32)
    if mode == "all_to_all":
        return (labels + 1) % num_classes
    if not 0 <= target_label < num_classes:
        raise errors.InputError(
            f"target_label must be in [0, {num_classes}), got {target_label}"
        )
    return jnp.full_like(labels, target_label)


def poison_indices(
    key: jax.Array,
    labels: jax.typing.ArrayLike,
    *,
    poison_rate: float,
    mode: str,
    target_label: int,
) -> np.ndarray:
    """Which training images are poisoned: drawn without replacement, ascending.

    ``round(poison_rate * N)`` images, whatever the mode. With the same key a lower
    rate takes a subset of what a higher one takes.

    Args:
      key: Typed key.
      labels: True labels of the whole training set, int ``[N]``.
      poison_rate: Fraction of the whole training set, in [0, 1]; 0 gives no index.
      mode: One of `LABEL_MODES`.
      target_label: The attacker's class; used by clean_label only.

    Returns:
      int64 ``[M]``, ascending.

    Raises:
      InputError: For an unknown mode, a rate outside [0, 1] or so low that it selects
        nothing, and for a clean_label rate above the share of the target class.
    """
    _check_mode(mode)
    labels = _check_labels(labels)
    if not 0 <= poison_rate <= 1:
        raise errors.InputError(
            f"poison_rate must be a fraction in [0, 1], got {poison_rate}"
        )
    count = round(poison_rate * labels.size)
    if poison_rate > 0 and count == 0:
        raise errors.InputError(
            f"poison_rate {poison_rate} selects none of {labels.size} images"
        )
    eligible = np.arange(labels.size)
    if mode == "clean_label":
        eligible = np.flatnonzero(labels == target_label)
        if count > eligible.size:
            raise errors.InputError(
                f"poison_rate {poison_rate} needs {count} images of class "
                f"{target_label}, but only {eligible.size} of {labels.size} are; "
                f"clean_label allows at most {eligible.size / labels.size:g}"
            )
    # The first `count` of one permutation: this is what makes rates nest.
    order = np.asarray(jax.random.permutation(key, eligible.size))
    return np.sort(eligible[order[:count]])


def poison(
    images: np.ndarray,
    labels: jax.typing.ArrayLike,
    indices: np.ndarray,
    trigger: triggers.Trigger,
    *,
    mode: str,
    target_label: int,
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray]:
    """A poisoned copy of a training set.

    Args:
      images: uint8 ``[N, H, W, C]``.
      labels: True labels, int ``[N]``.
      indices: Which images to poison, int ``[M]``, from `poison_indices`.
      trigger: What is stamped on them; see `stamp` for the rounding.
      mode: One of `LABEL_MODES`.
      target_label: The attacker's class; not used by all_to_all.
      num_classes: K.

    Returns:
      Images, uint8 ``[N, H, W, C]``, and labels, int32 ``[N]``; both new, and equal to
      the originals outside of indices. With clean_label all labels are.

    Raises:
      InputError: For arrays that do not fit each other or the trigger, repeated
        indices, labels out of range, or clean_label indices of another class.
    """
    labels = _check_labels(labels, num_classes)
    indices = np.asarray(indices)
    _check_images(images)
    if len(images) != labels.size:
        raise errors.InputError(f"got {len(images)} images but {labels.size} labels")
    _check_indices(indices, labels.size)

    poisoned_labels = np.array(labels, np.int32)
    poisoned_labels[indices] = target_labels(
        labels[indices], mode=mode, target_label=target_label, num_classes=num_classes
    )
    changed = int(np.sum(poisoned_labels != labels))
    if mode == "clean_label" and changed:
        raise errors.InputError(
            f"clean_label poisons images of class {target_label} only, "
            f"{changed} of {indices.size} indices have another label"
        )
    poisoned_images = np.array(images)
    poisoned_images[indices] = stamp(poisoned_images[indices], trigger)
    return poisoned_images, poisoned_labels


def stamp(images: np.ndarray, trigger: triggers.Trigger) -> np.ndarray:
    """Stored images with the trigger on them, as they would be stored again.

    ``round(apply_trigger(images / 255) * 255)``, halves to even. Pixels the trigger
    does not touch keep their value exactly. A model sees blends and additive triggers
    up to half a grey level off from `apply_trigger` on floats.

    Args:
      images: uint8 ``[N, H, W, C]``.
      trigger: For the same H, W and C.

    Returns:
      A new array, uint8 ``[N, H, W, C]``.

    Raises:
      InputError: For images that are not uint8 ``[N, H, W, C]``, or a trigger that
        `triggers.check_trigger` refuses.
    """
    _check_images(images)
    triggers.check_trigger(trigger, images.shape[1:])
    stamped = np.empty_like(images)
    for start in range(0, len(images), _STAMP_BATCH):
        batch = jnp.asarray(images[start : start + _STAMP_BATCH], jnp.float32) / 255
        levels = np.asarray(triggers.apply_trigger(batch, trigger)) * 255
        stamped[start : start + _STAMP_BATCH] = np.rint(levels).astype(np.uint8)
    return stamped


def distract(
    images: np.ndarray,
    indices: np.ndarray,
    trigger: triggers.Trigger,
    *,
    jitter: float,
    key: jax.Array,
) -> np.ndarray:
    """A training set in which some images are bent in other ways than the trigger's.

    WaNet's noise mode: their labels stay, so that a model learns this very bend and not
    any bend at all. Each field is the trigger's plus a displacement of every pixel,
    uniform in [-jitter, jitter].

    Args:
      images: uint8 ``[N, H, W, C]``.
      indices: Which to bend, int ``[M]``; none of them poisoned.
      trigger: One with a field, for the same H, W and C.
      jitter: In pixels, at least 0.
      key: Typed key; decides the displacements.

    Returns:
      A copy, uint8 ``[N, H, W, C]``, equal to the original outside of indices.

    Raises:
      InputError: For a trigger that bends nothing or that `triggers.check_trigger`
        refuses, a jitter out of range, or arrays that do not fit.
    """
    _check_images(images)
    _check_indices(np.asarray(indices), len(images))
    if trigger.field is None:
        raise errors.InputError("noise images need a trigger that bends, such as warp")
    triggers.check_trigger(trigger, images.shape[1:])
    if not 0 <= jitter < np.inf:
        raise errors.InputError(f"jitter must be >= 0 and finite, got {jitter}")
    field = jnp.asarray(trigger.field)[None]
    bent = np.array(images)
    for start in range(0, len(indices), _STAMP_BATCH):
        rows = np.asarray(indices[start : start + _STAMP_BATCH])
        draw = jax.random.uniform(
            jax.random.fold_in(key, start),
            (len(rows), *field.shape[1:]),
            minval=-jitter,
            maxval=jitter,
        )
        batch = jnp.asarray(images[rows], jnp.float32) / 255
        levels = np.asarray(warps.bend(batch, field + draw)) * 255
        bent[rows] = np.rint(levels).astype(np.uint8)
    return bent


def _check_mode(mode: str) -> None:
    if mode not in LABEL_MODES:
        raise errors.InputError(
            f"mode must be one of {', '.join(LABEL_MODES)}, got {mode!r}"
        )


def _check_labels(
    labels: jax.typing.ArrayLike, num_classes: int | None = None
) -> np.ndarray:
    """The labels in numpy, once they are known to be int [N] in [0, num_classes)."""
    array = np.asarray(labels)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise errors.InputError(
            f"labels must be integers [N], got {array.dtype} {list(array.shape)}"
        )
    least, most = int(array.min(initial=0)), int(array.max(initial=0))
    if least < 0 or (num_classes is not None and most >= num_classes):
        accepted = "0 or more" if num_classes is None else f"in [0, {num_classes})"
        raise errors.InputError(f"labels must be {accepted}, got {least} to {most}")
    return array


def _check_images(images: np.ndarray) -> None:
    if images.ndim != 4 or images.dtype != np.uint8:
        raise errors.InputError(
            f"images must be uint8 [N, H, W, C], "
            f"got {images.dtype} {list(images.shape)}"
        )


def _check_indices(indices: np.ndarray, size: int) -> None:
    if indices.ndim != 1 or not np.issubdtype(indices.dtype, np.integer):
        raise errors.InputError(
            f"indices must be integers [M], got {indices.dtype} {list(indices.shape)}"
        )
    # Negative ones would silently count from the end.
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        raise errors.InputError(
            f"indices must be in [0, {size}), got {indices.min()} to {indices.max()}"
        )
    if np.unique(indices).size != indices.size:
        raise errors.InputError(
            f"indices must be different from each other, "
            f"{indices.size - np.unique(indices).size} are repeated"
        )
