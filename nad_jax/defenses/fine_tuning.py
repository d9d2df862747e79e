# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on clean images: the control beside NAD, and NAD's teacher.

With `sharpness_radius` above 0 it is FT-SAM: the gradient is taken where the loss is
worst in a small ball, which moves the weights that a backdoor lives in further.

References:
  Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware
  Minimization", ICCV 2023. (Its ball is scaled by the weights: `sharpness_by_weight`.)
"""

import jax

from nad_jax import settings
from nad_jax.defenses import base
from nad_jax.training import steps


def run(
    victim: base.Net,
    clean_data: base.CleanData,
    tuning: settings.TuningSettings,
    *,
    key: jax.Array,
    label_smoothing: float = 0.0,
    on_epoch: base.OnEpoch | None = None,
    should_stop: base.ShouldStop | None = None,
    commits: base.CommitsOf | None = None,
) -> base.Defended:
    """The victim, all layers trained on clean images with cross-entropy.

    `label_smoothing` is the share of each label that is spread over all classes.
    BatchNorm is in training mode: it normalises with the batch and its running
    statistics move to the defender's data.
    """
    loss_fn = steps.classification_loss(
        victim.model.apply, label_smoothing=label_smoothing
    )
    return base.tune(
        victim,
        clean_data,
        tuning,
        make_loss=lambda _: loss_fn,
        key=key,
        on_epoch=on_epoch,
        should_stop=should_stop,
        commits=None if commits is None else commits("tuned"),
    )
