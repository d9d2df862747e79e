# SPDX-License-Identifier: Apache-2.0
"""What every repair of a float model has in common: its types and its one loop.

A defence is a function

    run(victim, clean_data, settings, *, key, on_epoch=None, should_stop=None,
        commits=None) -> Defended

of the victim and of the defender's own clean images: nothing in this room ever sees
test data or a trigger. Defences differ in their loss (`nad_jax.training.steps.LossFn`),
not in their loop, and with equal settings and key they see the same batches; NAD that
keeps its teacher's maps (`view_bank`) is the exception.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, settings
from nad_jax.data import batches, sources
from nad_jax.training import (
    augmentation,
    evaluation,
    loop,
    optimizers,
    sharding,
    steps,
)
from nad_jax.training import commits as commits_lib
from nad_jax.training import state as state_lib

# (variables, means of the epoch's metrics); variables are valid during the call only.
OnEpoch = Callable[[Any, dict[str, float]], None]
ShouldStop = Callable[[], bool]
# Name of one training of a defence -> where it is kept, so that a killed one can go on.
CommitsOf = Callable[[str], commits_lib.Commits]


class Net(NamedTuple):
    """A network: victim, teacher or student.

    Attributes:
      model: Has `apply` with the contract of `nad_jax.models`: a model of that package
        or a `nad_jax.models.capture.Captured` around any Linen module.
      variables: "params" and "batch_stats".
    """

    model: Any
    variables: Any

    def logits(self, variables: Any, images: jax.Array) -> jax.Array:
        """Logits of the model in evaluation mode."""
        return self.model.apply(variables, images, train=False)[0]


@dataclasses.dataclass(frozen=True)
class CleanData:
    """The defender's clean images.

    Attributes:
      images: To train on, uint8 `[N, H, W, C]`.
      labels: int32 `[N]`.
      validation_images: Held out, to decide with, uint8 `[M, H, W, C]`; M may be 0.
      validation_labels: int32 `[M]`.
    """

    images: np.ndarray
    labels: np.ndarray
    validation_images: np.ndarray
    validation_labels: np.ndarray


class Defended(NamedTuple):
    """A repaired network.

    Attributes:
      variables: Its variables.
      history: Means of the metrics, one mapping per epoch.
      chosen: What the defence decided by itself, such as "beta_factor"; numbers.
    """

    variables: Any
    history: tuple[dict[str, float], ...]
    chosen: Mapping[str, float] = types.MappingProxyType({})


def clean_indices(
    key: jax.Array, labels: np.ndarray, *, fraction: float, validation_fraction: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the defender's images: to train on, and held out.

    Drawn once and given to every defence. Each class is represented in proportion.

    Args:
      key: Typed key.
      labels: Labels of the whole training set, int `[N]`.
      fraction: Share of the training set that the defender has, in (0, 1].
      validation_fraction: Share of those that is held out, in [0, 1); rounds down.

    Returns:
      Two disjoint int arrays, ascending.
    """
    subset_key, validation_key = jax.random.split(key)
    rows = np.asarray(
        batches.split_indices(
            subset_key, len(labels), fraction, labels=jnp.asarray(labels)
        )
    )
    held_out = np.zeros(len(rows), bool)
    if int(validation_fraction * len(rows)):
        chosen = batches.split_indices(
            validation_key,
            len(rows),
            int(validation_fraction * len(rows)) / len(rows),
            labels=jnp.asarray(labels[rows]),
        )
        held_out[np.asarray(chosen)] = True
    return rows[~held_out], rows[held_out]


def clean_data(
    dataset: sources.Dataset, rows: np.ndarray, validation_rows: np.ndarray
) -> CleanData:
    """The images at the rows of `clean_indices`."""
    own = dataset.take(rows)
    # Not `take`: a data set without images is refused, and nothing may be held out.
    validation = dataset.images[validation_rows], dataset.labels[validation_rows]
    return CleanData(own.images, own.labels, *validation)


def validation_accuracy(net: Net, data: CleanData) -> Callable[[Any], float]:
    """Function from variables to the share of held-out images given their label."""
    if not len(data.validation_labels):
        raise errors.InputError(
            "a decision needs held-out images; raise validation_fraction, got 0 images"
        )
    evaluate = evaluation.make_evaluator(
        net.logits,
        data.validation_images,
        data.validation_labels,
        mesh=sharding.forward_mesh(),
    )
    return lambda variables: float(evaluate(variables)["acc"] or 0.0)


class _Settled(Exception):
    """Validation accuracy has stopped rising."""


def tune(
    victim: Net,
    data: CleanData,
    tuning: settings.TuningSettings,
    *,
    make_loss: Callable[[Any], steps.LossFn],
    frozen: Any = (),
    make_batch: loop.MakeBatch | None = None,
    companions: tuple[Any, ...] = (),
    key: jax.Array,
    project: Callable[[Any], Any] | None = None,
    on_epoch: OnEpoch | None = None,
    should_stop: ShouldStop | None = None,
    commits: commits_lib.Commits | None = None,
) -> Defended:
    """The victim after training on clean images with the loss of a defence.

    Args:
      victim: Where to start.
      data: Clean images; held-out ones are used only with `tuning.patience`.
      tuning: Optimiser, schedule, augmentation, sharpness radius, patience.
      make_loss: From the frozen arrays to the loss.
      frozen: Arrays that the loss needs and that never change, such as a teacher's
        variables. They enter the step as arguments, not as constants compiled into
        it, so that every teacher runs in the same program.
      make_batch: As for `loop.fit`; None = the augmentation of `tuning`.
      companions: As for `loop.fit`.
      key: Decides the order and the augmentation of images.
      project: Applied to the params after every step.
      on_epoch: Called after each epoch.
      should_stop: Asked between programs.
      commits: Where the training is kept, early stopping included.

    Returns:
      The last epoch's variables; with `tuning.patience` those of the last epoch at
      which validation accuracy rose.
    """
    training = tuning.training
    tx = optimizers.build(training, num_examples=len(data.labels))

    def loss_fn(params, carried, batch, key):
        loss, (batch_stats, metrics) = make_loss(carried["frozen"])(
            params, carried["batch_stats"], batch, key
        )
        return loss, ({**carried, "batch_stats": batch_stats}, metrics)

    def variables_of(state):
        return {"params": state.params, "batch_stats": state.batch_stats["batch_stats"]}

    start = {
        "params": victim.variables["params"],
        "batch_stats": {
            "batch_stats": victim.variables.get("batch_stats", {}),
            "frozen": frozen,
        },
    }
    first_state = state_lib.create(start, tx, key)
    memory = loop.Memory(notes={"history": [], "best_accuracy": -1.0, "waited": 0})
    validate = None
    if tuning.patience is not None:
        validate = validation_accuracy(victim, data)
        memory.arrays = variables_of(first_state)

    def after_epoch(state, metrics):
        notes = memory.notes
        # Not on every device of the mesh, or each would evaluate all images; a copy, as
        # the loop uses the memory of its state again.
        variables = sharding.unreplicate(variables_of(state))
        metrics = {"epoch": int(state.epoch), **metrics}
        if validate is not None:
            metrics["validation_accuracy"] = validate(variables)
        notes["history"].append(metrics)
        if on_epoch is not None:
            on_epoch(variables, metrics)
        if validate is None:
            return
        notes["waited"] += 1
        if metrics["validation_accuracy"] > notes["best_accuracy"]:
            notes["best_accuracy"] = metrics["validation_accuracy"]
            notes["waited"] = 0
            memory.arrays = variables
        if tuning.patience is not None and notes["waited"] >= tuning.patience:
            raise _Settled

    last = None
    try:
        state = loop.fit(
            first_state,
            data.images,
            data.labels,
            step_fn=steps.make_train_step(
                loss_fn,
                tx,
                project=project,
                sharpness_radius=tuning.sharpness_radius,
                sharpness_by_weight=tuning.sharpness_by_weight,
            ),
            epochs=training.epochs,
            batch_size=training.batch_size,
            make_batch=make_batch or augmentation.make_batch(training),
            companions=companions,
            steps_per_dispatch=training.steps_per_dispatch,
            on_epoch=after_epoch,
            should_stop=should_stop,
            commits=commits,
            memory=memory,
            mesh=sharding.mesh_for_batch(min(training.batch_size, len(data.labels))),
        )
        last = sharding.unreplicate(variables_of(state))
    except _Settled:
        pass
    return Defended(
        last if validate is None else memory.arrays, tuple(memory.notes["history"])
    )
