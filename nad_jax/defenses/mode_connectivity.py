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
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nad_jax import settings
from nad_jax.core import metrics
from nad_jax.data import batches
from nad_jax.defenses import base, fine_tuning
from nad_jax.training import augmentation, steps
from nad_jax.training import state as state_lib

# Batches whose statistics are averaged.
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
      tuning: Training of the tuned copy. The curve has its epochs, batches and schedule
        once more, all of them and in plain steps: neither patience nor sharpness.
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
    points = []
    for position in sorted(connectivity.positions):
        point = _point(
            victim.model, ends, curve.variables, position, clean_data, training, key
        )
        chosen = {"position": position}
        points.append(base.Defended(point, curve.history, chosen))
    if len(points) == 1:
        return points[0]
    validate = base.validation_accuracy(victim, clean_data)
    accuracies = [validate(point.variables) for point in points]
    kept = metrics.strongest_affordable(
        [point.chosen["position"] for point in points],
        accuracies,
        tolerance=connectivity.accuracy_tolerance,
    )
    return points[kept]


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
    """Variables with BatchNorm statistics of this very point, not of the curve.

    They are means over batches, however slowly the model's own running means move. What
    no BatchNorm of Flax keeps, or one that never moves, stays as it is.
    """
    if not jax.tree.leaves(net.variables.get("batch_stats", {})):
        return net.variables
    images = jnp.asarray(clean_data.images)
    labels = jnp.asarray(clean_data.labels)
    make_batch = augmentation.make_batch(training)
    batch_size = min(training.batch_size, len(labels))
    momenta = _momenta(net, batches.to_float(images[:batch_size]))
    key = state_lib.derive_key(key, state_lib.STATISTICS)

    @jax.jit
    def measure(variables, images, labels, step):
        order_key = state_lib.derive_key(key, state_lib.SHUFFLE)
        rows = batches.epoch_indices(order_key, step, images.shape[0], batch_size)[0]
        augment_key = state_lib.derive_key(key, state_lib.AUGMENT, step)
        batch = make_batch(augment_key, images[rows], labels[rows])
        before = variables["batch_stats"]
        _, after = steps.apply_training(
            net.model.apply, variables["params"], before, batch["images"]
        )
        return jax.tree.map(_of_batch, before, after, momenta)

    total = None
    for step in range(_STATISTICS_STEPS):
        found = measure(net.variables, images, labels, jnp.int32(step))
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    batch_stats = jax.tree.map(
        lambda sums, old: (sums / _STATISTICS_STEPS).astype(old.dtype),
        total,
        net.variables["batch_stats"],
    )
    return {**net.variables, "batch_stats": batch_stats}


def _of_batch(before: jax.Array, after: jax.Array, momentum: float) -> jax.Array:
    """The x of the running mean: after = momentum * before + (1 - momentum) * x."""
    if momentum == 1:
        return before
    return (after - momentum * before) / (1 - momentum)


def _momenta(net: base.Net, images: jax.Array) -> Any:
    """The momentum of each running statistic; 1 where none is known.

    Args:
      net: Its statistics are the leaves.
      images: A batch, float `[B, H, W, C]`.
    """
    by_module: dict[tuple[str, ...], float] = {}

    def note(next_fun, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm):
            by_module[context.module.path] = context.module.momentum
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(
            lambda v, x: net.model.apply(v, x, train=True, mutable=["batch_stats"]),
            net.variables,
            images,
        )
    return jax.tree_util.tree_map_with_path(
        lambda path, _: by_module.get(tuple(entry.key for entry in path[:-1]), 1.0),
        net.variables["batch_stats"],
    )
