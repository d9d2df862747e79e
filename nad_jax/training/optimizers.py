# SPDX-License-Identifier: Apache-2.0
"""Optimisers and learning-rate schedules by name."""

import optax

from nad_jax import settings


def build(
    training: settings.TrainingSettings, *, num_examples: int
) -> optax.GradientTransformation:
    """The optimiser of a stage that sees `num_examples` images per epoch."""
    steps_per_epoch = max(num_examples // training.batch_size, 1)
    rate = schedule(training, steps_per_epoch=steps_per_epoch)
    if training.optimizer == "adam":
        update = optax.adam(rate)
    else:
        update = optax.sgd(rate, momentum=training.momentum, nesterov=True)
    if training.weight_decay == 0.0:
        return update
    return optax.chain(optax.add_decayed_weights(training.weight_decay), update)


def schedule(
    training: settings.TrainingSettings, *, steps_per_epoch: int
) -> optax.Schedule:
    """Learning rate as a function of the step."""
    peak = training.learning_rate
    total_steps = training.epochs * steps_per_epoch
    if training.schedule == "constant":
        return optax.constant_schedule(peak)
    if training.schedule == "cosine":
        return optax.cosine_decay_schedule(peak, total_steps)
    if training.schedule == "steps":
        boundaries = [epoch * steps_per_epoch for epoch in training.milestones]
        return optax.piecewise_constant_schedule(
            peak, dict.fromkeys(boundaries, training.step_factor)
        )
    return optax.cosine_onecycle_schedule(total_steps, peak, pct_start=0.3)
