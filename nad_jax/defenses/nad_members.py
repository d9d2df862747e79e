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
from nad_jax.defenses import base, nad
from nad_jax.training import augmentation, members, optimizers, steps
from nad_jax.training import state as state_lib


@dataclasses.dataclass(frozen=True)
class Member:
    """One student of a sweep.

    Attributes:
      variables: Where it starts: those of the victim.
      teacher: Variables of its teacher, of the same architecture.
      betas: Stage name -> weight, per pixel, as `settings.NadSettings` takes them;
        all members name the same stages. All 0 is fine-tuning.
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
    """The students, in their order; each is what `nad.run` would make of it.

    That is: with its teacher, with neither logits nor kept views, up to float rounding.
    What `nad.run` refuses is refused here; but a stage that counts for one student must
    be able to teach all of them, since it is computed for all.

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
      InputError: no students; different stages; a beta that is negative or not finite;
        a stage that does not exist, or whose map is 1x1 or constant; `patience`.
    """
    if tuning.patience is not None:
        raise errors.InputError(
            f"the students of a sweep end together; patience must be None, got "
            f"{tuning.patience}"
        )
    betas, stages = _check(model, students, clean_data, p, reduction)
    training = tuning.training
    tx = optimizers.build(training, num_examples=len(clean_data.labels))
    states = [
        state_lib.create(
            {
                "params": one.variables["params"],
                "batch_stats": {
                    "batch_stats": one.variables.get("batch_stats", {}),
                    "teacher": one.teacher,
                    "betas": {stage: jnp.float32(own[stage]) for stage in stages},
                },
            },
            tx,
            one.key,
        )
        for one, own in zip(students, betas, strict=True)
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


def _check(
    model: Any,
    students: Sequence[Member],
    clean_data: base.CleanData,
    p: float,
    reduction: str,
) -> tuple[list[dict[str, float]], list[str]]:
    """Betas of each student, and the stages that count for any; as `nad.run` has it."""
    if len({tuple(sorted(student.betas)) for student in students}) > 1:
        raise errors.InputError("all students of a sweep must name the same stages")
    betas = [
        nad.mean_square_betas(
            base.Net(model, one.variables),
            clean_data,
            settings.NadSettings(one.betas, p=p, reduction=reduction),
        )
        for one in students
    ]
    stages = sorted({stage for own in betas for stage, beta in own.items() if beta})
    if stages:
        nets = {
            f"start of student {i}": one.variables for i, one in enumerate(students)
        }
        nets |= {
            f"teacher of student {i}": one.teacher for i, one in enumerate(students)
        }
        nad.check_stages(model, nets, clean_data.images, stages)
    return betas, stages


def _loss(apply_fn: Callable[..., Any], p: float, reduction: str) -> steps.LossFn:
    """`nad.distillation_loss` with teacher and betas from the state, so traced."""

    def loss_fn(params, carried, batch, key):
        own_loss = nad.distillation_loss(
            apply_fn,
            apply_fn,
            carried["teacher"],
            betas=carried["betas"],
            p=p,
            reduction=reduction,
        )
        loss, (batch_stats, metrics) = own_loss(
            params, carried["batch_stats"], batch, key
        )
        return loss, ({**carried, "batch_stats": batch_stats}, metrics)

    return loss_fn
