# SPDX-License-Identifier: Apache-2.0
"""NAD over seeds and betas as one compiled program.

A member is one student: its own start, teacher, key and betas; the clean images, the
optimiser and the architecture are shared. `training.members` trains them side by side.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from nad_jax import errors, settings
from nad_jax.core import losses
from nad_jax.defenses import base
from nad_jax.training import augmentation, members, optimizers, steps
from nad_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Member:
    """One student of a sweep.

    Attributes:
      variables: Where it starts: those of the victim.
      teacher: Variables of its teacher, of the same architecture.
      betas: Stage name -> weight, per pixel, as `losses.nad_loss` takes them; all
        members name the same stages. All 0 is fine-tuning.
      key: Decides the order and the augmentation of its images.
    """

    variables: Any
    teacher: Any
    betas: Mapping[str, float]
    key: jax.Array


def run(
    model: Any,
    students: Sequence[Member],
    clean_data: base.CleanData,
    tuning: settings.TuningSettings,
    *,
    p: float = 2,
    reduction: str = "sum",
    mesh: Mesh | None = None,
    written_out: bool | None = None,
    should_stop: base.ShouldStop | None = None,
) -> list[base.Defended]:
    """The students, in their order; each is what `nad.run` without logits makes of it.

    Args:
      model: Architecture of all students and teachers.
      students: What distinguishes them.
      clean_data: Clean images, the same for all.
      tuning: Training of all; without `patience`, since they end together.
      p: Power of the attention map.
      reduction: "sum" or "mean" over channels.
      mesh: From `members.member_mesh`, to share the students among devices.
      written_out: See `members.fit`.
      should_stop: Asked between steps.

    Raises:
      InputError: no students, different stages, a negative beta, or `patience`.
    """
    if tuning.patience is not None:
        raise errors.InputError(
            f"the students of a sweep end together; patience must be None, got "
            f"{tuning.patience}"
        )
    if len({tuple(sorted(student.betas)) for student in students}) > 1:
        raise errors.InputError("all students of a sweep must name the same stages")
    lowest = min((min(one.betas.values()) for one in students), default=0.0)
    if lowest < 0:
        raise errors.InputError(f"betas must not be negative, got {lowest}")
    training = tuning.training
    tx = optimizers.build(training, num_examples=len(clean_data.labels))
    states = [
        state_lib.create(
            {
                "params": one.variables["params"],
                "batch_stats": {
                    "batch_stats": one.variables.get("batch_stats", {}),
                    "teacher": one.teacher,
                    "betas": {k: jnp.float32(v) for k, v in one.betas.items()},
                },
            },
            tx,
            one.key,
        )
        for one in students
    ]
    fitted, history = members.fit(
        states,
        clean_data.images,
        clean_data.labels,
        step_fn=steps.make_train_step(
            _loss(model.apply, p, reduction),
            tx,
            sharpness_radius=tuning.sharpness_radius,
        ),
        epochs=training.epochs,
        batch_size=training.batch_size,
        make_batch=augmentation.make_batch(training),
        mesh=mesh,
        written_out=written_out,
        should_stop=should_stop,
    )
    return [
        base.Defended(
            {"params": state.params, "batch_stats": state.batch_stats["batch_stats"]},
            tuple(
                {"epoch": epoch + 1, **{k: float(v[i]) for k, v in means.items()}}
                for epoch, means in enumerate(history)
            ),
        )
        for i, state in enumerate(fitted)
    ]


def _loss(apply_fn: Callable[..., Any], p: float, reduction: str) -> steps.LossFn:
    """`nad.distillation_loss` without logits; teacher and betas are in the state."""

    def loss_fn(params, carried, batch, key):
        del key
        images, labels = batch["images"], batch["labels"]
        (logits, features), batch_stats = steps.apply_training(
            apply_fn, params, carried["batch_stats"], images
        )
        _, teacher_features = apply_fn(
            jax.lax.stop_gradient(carried["teacher"]), images, train=False
        )
        task_loss = jnp.mean(steps.cross_entropy(logits, labels))
        distillation = jnp.float32(0.0)
        for stage, beta in sorted(carried["betas"].items()):
            distance = losses.attention_distance(
                features[stage], teacher_features[stage], p=p, reduction=reduction
            )
            distillation += beta * jnp.mean(distance)
        return task_loss + distillation, (
            {**carried, "batch_stats": batch_stats},
            {
                "accuracy": steps.accuracy(logits, labels),
                "task_loss": task_loss,
                "distillation_loss": distillation,
            },
        )

    return loss_fn
