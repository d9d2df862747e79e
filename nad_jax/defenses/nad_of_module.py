# SPDX-License-Identifier: Apache-2.0
"""NAD of a model in one call: arrays in, the student out."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nad_jax import errors, settings
from nad_jax.defenses import base
from nad_jax.defenses import nad as nad_lib


def nad(
    model: Any,
    variables: Mapping[str, Any],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    betas: Mapping[str, float],
    beta_unit: str = "mean_square",
    teacher: Mapping[str, Any] | None = None,
    teacher_epochs: int = 10,
    epochs: int = 20,
    batch_size: int = 64,
    learning_rate: float = 0.1,
    milestones: Sequence[int] = (2,),
    weight_decay: float = 1e-4,
    crop_padding: int = 4,
    flip: bool = False,
    sharpness_radius: float = 0.0,
    logit_weight: float = 0.0,
    key: jax.Array | None = None,
) -> base.Defended:
    """Erases a backdoor from a model with a few clean images (Li et al., ICLR 2021).

    The defaults are the schedule of the authors' code. With all `betas` 0 this is
    plain fine-tuning: no number of NAD means anything without that control.

    Args:
      model: `nad_jax.Captured(module, stages)`, which makes stages of the submodules of
        any Linen module, or a model of `nad_jax.models`.
      variables: Its "params", and "batch_stats" if it has any. Not changed.
      images: Clean images, uint8 `[N, H, W, C]`; the model sees float32 in [0, 1].
      labels: int `[N]`.
      betas: Stage name -> weight of its attention. The published ones are 500, 1000 and
        1000 on maps of 32, 16 and 8 pixels a side.
      beta_unit: "mean_square", per pixel as published, or "squared_distance" of whole
        maps.
      teacher: Variables of a cleaner model of the same kind; None = the model,
        fine-tuned for `teacher_epochs`.
      teacher_epochs: Only without `teacher`.
      epochs: Of the student.
      batch_size: Images per step.
      learning_rate: Of SGD with Nesterov's momentum 0.9.
      milestones: Epochs, ascending, after each of which the rate is a tenth.
      weight_decay: Added to the gradient.
      crop_padding: Random crop after padding by so many pixels; 0 = none.
      flip: Random horizontal flip.
      sharpness_radius: Above 0 each step is one of SAM (`nad_sam` in the tables).
      logit_weight: Above 0 the model's own logits count as soft labels, at temperature
        2 (with the radius `nad_sam_kd`).
      key: Order and augmentation of images; default `jax.random.key(0)`.

    Returns:
      `variables` of the student and `history`, the mean losses of each epoch.

    Raises:
      InputError: images or labels of another kind or number; a number out of range; a
        stage that does not exist, or whose map could teach nothing.
    """
    images, labels = np.asarray(images), np.asarray(labels)
    if images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise errors.InputError(
            "images must be uint8 [N, H, W, C] with N at least 1, got "
            f"{images.dtype} {list(images.shape)}"
        )
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise errors.InputError(
            f"labels must be integers [{len(images)}], got {labels.dtype} "
            f"{list(labels.shape)}"
        )
    labels = labels.astype(np.int32)
    training = settings.TrainingSettings(
        epochs=epochs,
        batch_size=batch_size,
        optimizer="sgd",
        learning_rate=learning_rate,
        schedule="steps",
        milestones=tuple(milestones),
        weight_decay=weight_decay,
        crop_padding=crop_padding,
        flip=flip,
    )
    logits = settings.LogitSettings(weight=logit_weight) if logit_weight else None
    return nad_lib.run(
        base.Net(model, variables),
        base.CleanData(images, labels, images[:0], labels[:0]),
        settings.TuningSettings(training, sharpness_radius=sharpness_radius),
        settings.NadSettings(
            dict(betas), beta_unit=beta_unit, teacher_epochs=teacher_epochs
        ),
        key=jax.random.key(0) if key is None else key,
        teacher=None if teacher is None else base.Net(model, teacher),
        victim_logits=logits,
    )
