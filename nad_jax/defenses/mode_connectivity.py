# SPDX-License-Identifier: Apache-2.0
"""Mode-connectivity repair: a point on a path between the victim and a tuned copy.

    theta(t) = (1 - t)^2 victim + 2 t (1 - t) bend + t^2 tuned

Only the bend is trained, on clean images at a t drawn anew in every step, so that all
of the curve has low loss on them. A point near the victim keeps its accuracy and, if
all goes well, not its backdoor.

Which point? Published figures look at t = 0.1, which was read off attack success. The
defender has clean images only, and on these every inner point may look alike. What they
can know is how far they dare to go: taken is the point furthest from the victim whose
held-out accuracy is within a tolerance of the best. (The far end itself is fine-tuning
and not among the positions of the shipped config.)

References:
  Zhao et al., "Bridging Mode Connectivity in Loss Landscapes and Adversarial
  Robustness", ICLR 2020.
  Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs",
  NeurIPS 2018.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from nad_jax import settings
from nad_jax.data import batches
from nad_jax.defenses import base, fine_tuning
from nad_jax.training import augmentation, steps

# After so many batches a running mean with momentum 0.9 has forgotten its start.
_STATISTICS_STEPS = 60


def run(
    victim: base.Net,
    clean_data: base.CleanData,
    tuning: settings.TuningSettings,
    connectivity: settings.ModeConnectivitySettings,
    *,
    key: jax.Array,
    tuned: base.Net | None = None,
    on_epoch: base.OnEpoch | None = None,
    should_stop: base.ShouldStop | None = None,
    commits: base.CommitsOf | None = None,
) -> base.Defended:
    """The net at one of `connectivity.positions` of the curve, 0 being the victim.

    Args:
      victim: One end.
      clean_data: Clean images.
      tuning: The budget of the tuned copy, and once more of the curve.
      connectivity: Positions and learning rate of the curve.
      key: Order, augmentation and the points drawn on the curve.
      tuned: The other end; None = the victim after fine-tuning.
      on_epoch: Called after each epoch of the curve, with the bend.
      should_stop: Asked between programs.
      commits: Keeps both trainings.
    """
    if tuned is None:
        end = fine_tuning.run(
            victim,
            clean_data,
            tuning,
            key=key,
            should_stop=should_stop,
            commits=commits,
        )
        tuned = base.Net(victim.model, end.variables)
    ends = {"victim": victim.variables["params"], "tuned": tuned.variables["params"]}
    middle = jax.tree.map(lambda a, b: (a + b) / 2, ends["victim"], ends["tuned"])
    training = dataclasses.replace(
        tuning.training, learning_rate=connectivity.learning_rate
    )
    task_loss = steps.classification_loss(victim.model.apply)

    def make_loss(ends):
        def loss_fn(params, batch_stats, batch, key):
            point = on_curve(ends["victim"], params, ends["tuned"], _draw(key))
            return task_loss(point, batch_stats, batch, key)

        return loss_fn

    curve = base.tune(
        base.Net(victim.model, {**tuned.variables, "params": middle}),
        clean_data,
        settings.TuningSettings(training),
        make_loss=make_loss,
        frozen=ends,
        key=key,
        on_epoch=on_epoch,
        should_stop=should_stop,
        commits=None if commits is None else commits("curve"),
    )
    points = [
        _point(victim.model, ends, curve.variables, position, clean_data, training, key)
        for position in sorted(connectivity.positions)
    ]
    if len(points) == 1:
        return base.Defended(points[0], curve.history)
    validate = base.validation_accuracy(victim, clean_data)
    accuracies = [validate(point) for point in points]
    least = max(accuracies) - connectivity.accuracy_tolerance
    daring = [p for p, a in zip(points, accuracies, strict=True) if a >= least]
    return base.Defended(daring[-1], curve.history)


def _point(
    model: Any,
    ends: Any,
    curve: Any,
    position: float,
    clean_data: base.CleanData,
    training: settings.TrainingSettings,
    key: jax.Array,
) -> Any:
    """Variables at a position, with BatchNorm statistics of their own."""
    params = jax.jit(on_curve)(
        ends["victim"],
        curve["params"],
        ends["tuned"],
        jnp.asarray(position, jnp.float32),
    )
    net = base.Net(model, {**curve, "params": params})
    return _measure_statistics(net, clean_data, training, key)


def on_curve(start: Any, bend: Any, end: Any, position: jax.Array) -> Any:
    """The quadratic Bezier curve at `position` in [0, 1], for each array of a tree."""
    rest = 1 - position

    def point(a, b, c):
        return rest**2 * a + 2 * rest * position * b + position**2 * c

    return jax.tree.map(point, start, bend, end)


def _draw(key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, ())


def _measure_statistics(
    net: base.Net,
    clean_data: base.CleanData,
    training: settings.TrainingSettings,
    key: jax.Array,
) -> Any:
    """Variables with BatchNorm statistics of this very point, not of the curve."""
    if not jax.tree.leaves(net.variables.get("batch_stats", {})):
        return net.variables
    images = jnp.asarray(clean_data.images)
    labels = jnp.asarray(clean_data.labels)
    make_batch = augmentation.make_batch(training)
    batch_size = min(training.batch_size, len(labels))

    @functools.partial(jax.jit, donate_argnums=0)
    def forward(batch_stats, params, images, labels, key):
        rows = batches.epoch_indices(key, 0, images.shape[0], batch_size)[0]
        batch = make_batch(key, images[rows], labels[rows])
        return steps.apply_training(
            net.model.apply, params, batch_stats, batch["images"]
        )[1]

    batch_stats = jax.tree.map(jnp.copy, net.variables["batch_stats"])
    for step in range(_STATISTICS_STEPS):
        batch_stats = forward(
            batch_stats,
            net.variables["params"],
            images,
            labels,
            jax.random.fold_in(key, step),
        )
    return {**net.variables, "batch_stats": batch_stats}
