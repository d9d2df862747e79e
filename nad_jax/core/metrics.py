# SPDX-License-Identifier: Apache-2.0
"""Masked counts that merge, and the rates divided from them once, at the end.

A mean of batch means is wrong as soon as the last batch is shorter, and an attack
success rate means nothing without the number of images behind it. So a batch yields
integers, integers are added (over batches, devices, hosts), and `summarize` divides.

All rates are fractions in [0, 1]:

====  ====================================================================
acc   clean images given their label, over all clean images
asr   triggered images given the attacker's label, over those whose true
      label is another one
ra    the same triggered images given their true label; asr + ra <= 1
====  ====================================================================
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nad_jax import errors
from nad_jax.core import shapes


class Counts(NamedTuple):
    """What was counted so far: int32 scalars, exact up to 2 ** 31 - 1 images.

    Attributes:
      clean_correct: Clean images given their label.
      clean_count: Clean images.
      attack_success: Triggered images given the attacker's label.
      robust_correct: Triggered images given their true label.
      attack_count: Triggered images whose true label is not the attacker's.
    """

    clean_correct: jax.Array
    clean_count: jax.Array
    attack_success: jax.Array
    robust_correct: jax.Array
    attack_count: jax.Array


def zero_counts() -> Counts:
    """Counts of no image at all: the neutral element of `merge`."""
    return Counts(*(jnp.zeros((), jnp.int32) for _ in Counts._fields))


def merge(a: Counts, b: Counts) -> Counts:
    """Counts of both sets of images together."""
    return Counts(*(left + right for left, right in zip(a, b, strict=True)))


def count_batch(
    clean_logits: jax.Array,
    triggered_logits: jax.Array | None,
    labels: jax.Array,
    mask: jax.Array,
    *,
    target_labels: jax.Array | None,
) -> Counts:
    """Counts of one batch.

    The prediction is the largest logit, the first one on a tie. A row of logits with a
    NaN predicts no class: it is counted, and it is wrong in every sense. (`argmax`
    alone would call it class 0, and a broken model would look attacked or repaired.)

    Args:
      clean_logits: Logits of the clean images, ``[B, K]``.
      triggered_logits: Logits of the same images with the trigger, ``[B, K]``; None
        when there is no attack to measure, and all three attack counts are then 0.
      labels: True labels, int ``[B]``.
      mask: Which rows are images and not padding, ``[B]``, bool or 0 and 1.
      target_labels: The label the attack wants for each image, int ``[B]``: constant
        for all-to-one, label + 1 for all-to-all. Images that already have it are not
        counted as attacked. Needed with triggered_logits, otherwise ignored.

    Returns:
      `Counts`; safe under `jit`, and under `vmap` with a leading axis.

    Raises:
      InputError: For shapes that do not fit, or triggered_logits without
        target_labels.

    Example:
      >>> clean = jnp.asarray([[9.0, 1.0], [9.0, 1.0], [1.0, 9.0]])
      >>> triggered = jnp.asarray([[9.0, 1.0], [9.0, 1.0], [9.0, 1.0]])
      >>> labels = jnp.asarray([0, 1, 1])
      >>> counts = count_batch(
      ...     clean, triggered, labels, jnp.ones(3), target_labels=jnp.zeros(3, int)
      ... )
      >>> summarize(counts)["asr"], summarize(counts)["asr_count"]
      (1.0, 2)
    """
    shapes.check_rank("clean_logits", clean_logits, "B K")
    shapes.check_rank("labels", labels, "B")
    shapes.check_same_shape("labels", labels, "the rows", clean_logits[:, 0])
    shapes.check_same_shape("labels", labels, "mask", mask)
    labels, is_image = jnp.asarray(labels, jnp.int32), jnp.asarray(mask, bool)

    clean_correct = is_image & (predict(clean_logits) == labels)
    counts = zero_counts()._replace(
        clean_correct=_count(clean_correct), clean_count=_count(is_image)
    )
    if triggered_logits is None:
        return counts

    if target_labels is None:
        raise errors.InputError("triggered_logits need target_labels, got None")
    shapes.check_same_shape(
        "clean_logits", clean_logits, "triggered_logits", triggered_logits
    )
    shapes.check_same_shape("labels", labels, "target_labels", target_labels)
    target_labels = jnp.asarray(target_labels, jnp.int32)
    is_attacked = is_image & (labels != target_labels)
    prediction = predict(triggered_logits)
    return counts._replace(
        attack_success=_count(is_attacked & (prediction == target_labels)),
        robust_correct=_count(is_attacked & (prediction == labels)),
        attack_count=_count(is_attacked),
    )


def summarize(counts: Counts) -> dict[str, float | int | None]:
    """The rates of `counts` as Python numbers; None where nothing was counted.

    Returns:
      ``acc``, ``asr``, ``ra`` (fractions or None), ``acc_count``, ``asr_count``
      (their denominators; ra shares that of asr).

    Example:
      >>> summarize(zero_counts())
      {'acc': None, 'asr': None, 'ra': None, 'acc_count': 0, 'asr_count': 0}
    """
    acc_count, asr_count = int(counts.clean_count), int(counts.attack_count)
    return {
        "acc": int(counts.clean_correct) / acc_count if acc_count else None,
        "asr": int(counts.attack_success) / asr_count if asr_count else None,
        "ra": int(counts.robust_correct) / asr_count if asr_count else None,
        "acc_count": acc_count,
        "asr_count": asr_count,
    }


def defense_effectiveness_rating(
    *, acc_before: float, asr_before: float, acc_after: float, asr_after: float
) -> float:
    """DER: what the attack lost minus what accuracy lost, on a scale from 0 to 1.

    ``(max(0, asr_before - asr_after) - max(0, acc_before - acc_after) + 1) / 2``

    0.5 says nothing happened, 1 a perfect repair, 0 a destroyed model that still obeys.
    The accuracy drop is subtracted; a public variant that adds it rewards damage.
    Gains (accuracy up, or attack up) count as 0.

    Args:
      acc_before: Accuracy before the defence, fraction.
      asr_before: Attack success rate before the defence, fraction.
      acc_after: Accuracy after the defence, fraction.
      asr_after: Attack success rate after the defence, fraction.

    Raises:
      InputError: For a rate outside [0, 1], such as a percentage.

    Example:
      >>> defense_effectiveness_rating(
      ...     acc_before=1.0, asr_before=1.0, acc_after=0.75, asr_after=0.0
      ... )
      0.875

    References:
      Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
      Minimization", ICCV 2023, equation 7.
    """
    _check_fractions(
        acc_before=acc_before,
        asr_before=asr_before,
        acc_after=acc_after,
        asr_after=asr_after,
    )
    attack_drop = max(0.0, asr_before - asr_after)
    return (attack_drop - max(0.0, acc_before - acc_after) + 1.0) / 2.0


def robust_improvement_rating(
    *, acc_before: float, ra_before: float, acc_after: float, ra_after: float
) -> float:
    """RIR: what robust accuracy gained minus what accuracy lost, from 0 to 1.

    ``(max(0, ra_after - ra_before) - max(0, acc_before - acc_after) + 1) / 2``

    As DER, but a model that answers nonsense to the trigger does not count as repaired.

    Args:
      acc_before: Accuracy before the defence, fraction.
      ra_before: Robust accuracy before the defence, fraction.
      acc_after: Accuracy after the defence, fraction.
      ra_after: Robust accuracy after the defence, fraction.

    Raises:
      InputError: For a rate outside [0, 1], such as a percentage.

    Example:
      >>> robust_improvement_rating(
      ...     acc_before=1.0, ra_before=0.0, acc_after=0.75, ra_after=0.75
      ... )
      0.75
    """
    _check_fractions(
        acc_before=acc_before,
        ra_before=ra_before,
        acc_after=acc_after,
        ra_after=ra_after,
    )
    robust_gain = max(0.0, ra_after - ra_before)
    return (robust_gain - max(0.0, acc_before - acc_after) + 1.0) / 2.0


def strongest_affordable(
    strengths: Sequence[float], accuracies: Sequence[float], *, tolerance: float
) -> int:
    """Which of several repairs to keep, decided by accuracy on held-out clean images.

    A stronger repair mostly leaves less of a backdoor, which no defender can measure,
    and costs more accuracy, which is measured here.

    Args:
      strengths: One for each repair: a learning rate, a multiple of betas.
      accuracies: Of each on held-out images, in [0, 1].
      tolerance: What accuracy may lose from the best of them, in [0, 1].

    Returns:
      Index of the strongest repair that is accurate enough.

    Raises:
      InputError: no repair, or not one accuracy for each.

    Example:
      >>> strongest_affordable([0.05, 0.1, 0.2], [0.98, 0.97, 0.91], tolerance=0.02)
      1
    """
    if not strengths or len(strengths) != len(accuracies):
        raise errors.InputError(
            "there must be one accuracy for each of one or more strengths, got "
            f"{len(strengths)} strengths and {len(accuracies)} accuracies"
        )
    # Shares of few images: 0.02 of 50 is one image, whatever binary fractions say.
    least = max(accuracies) - tolerance - 1e-9
    good = [i for i, accuracy in enumerate(accuracies) if accuracy >= least]
    return max(good, key=lambda i: strengths[i])


def predict(logits: jax.Array) -> jax.Array:
    """Classes, int32 `[B]`, of logits `[B, K]`; -1 where a logit is NaN.

    The first of several largest logits.

    Example:
      >>> predict(jnp.asarray([[0.0, 2.0], [1.0, 1.0], [jnp.nan, 0.0]])).tolist()
      [1, 0, -1]
    """
    is_broken = jnp.any(jnp.isnan(logits), axis=-1)
    return jnp.where(is_broken, -1, jnp.argmax(logits, axis=-1).astype(jnp.int32))


def _count(flags: jax.Array) -> jax.Array:
    return jnp.sum(flags, dtype=jnp.int32)


def _check_fractions(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0.0 <= rate <= 1.0:
            raise errors.InputError(f"{name} must be a fraction in [0, 1], got {rate}")
