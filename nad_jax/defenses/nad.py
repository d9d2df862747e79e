# SPDX-License-Identifier: Apache-2.0
"""Neural Attention Distillation: fine-tuning towards a teacher's attention maps.

    teacher = the victim, fine-tuned on clean images; then frozen, evaluation mode
    student = the victim, trained on the same images with
              cross-entropy + sum over stages of beta * attention_distance

The student's BatchNorm is in training mode, the teacher's in evaluation mode, as in the
public code; so even equal weights give maps that differ a little. With all betas 0, and
without the term below, this is plain fine-tuning, bit for bit, and no number of NAD
means anything without that row.

Our variant adds weight * logit_distance to the victim's own logits (Hinton et al.,
2015). They are what the stranger's model is wanted for, and clean images do not wake
the backdoor in them: a student held to them keeps its accuracy while it moves further
from where it started, and so from the backdoor.

References:
  Li et al., "Neural Attention Distillation: Erasing Backdoor Triggers from Deep Neural
  Networks", ICLR 2021.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, settings
from nad_jax.core import attention, losses, metrics
from nad_jax.data import batches
from nad_jax.defenses import base, fine_tuning, view_bank
from nad_jax.training import steps

# A map whose positions differ by less than this share of their mean teaches nothing.
_CONSTANT = 1e-4
_IMAGES_TO_CHECK = 8


def run(
    victim: base.Net,
    clean_data: base.CleanData,
    tuning: settings.TuningSettings,
    nad: settings.NadSettings,
    *,
    key: jax.Array,
    teacher: base.Net | None = None,
    victim_logits: settings.LogitSettings | None = None,
    on_epoch: base.OnEpoch | None = None,
    should_stop: base.ShouldStop | None = None,
    commits: base.CommitsOf | None = None,
) -> base.Defended:
    """The student.

    With several `nad.beta_factors` one student is trained for each. Kept is the one
    with the largest factor whose held-out accuracy is within `nad.accuracy_tolerance`
    of the best: as much attention as accuracy allows, decided without any trigger.

    Args:
      victim: The model to repair; also where the student starts.
      clean_data: Clean images.
      tuning: The student's training; with a sharpness radius the distillation, too,
        happens in a SAM step.
      nad: The attention term.
      key: The same key makes the same batches in every defence, but for NAD with
        `nad.teacher_views`.
      teacher: None = `make_teacher`. Another architecture will do as long as its stages
        have the same names and sizes.
      victim_logits: How much they count as soft labels; None = not at all.
      on_epoch: Called after each epoch of a student; of several, the metrics tell its
        "beta_factor".
      should_stop: Asked between programs.
      commits: Keeps the trainings of the teacher and of each student.

    Raises:
      InputError: a stage that does not exist, or whose map is 1x1 or constant; a
        teacher for other images, or with maps of other sizes.
    """
    # Whatever can be refused is, before the teacher is trained.
    check(victim, clean_data, nad, teacher=teacher)
    betas = mean_square_betas(victim, clean_data, nad)
    stages = _that_count(betas, nad)
    validate = None
    if len(nad.beta_factors) > 1:
        validate = base.validation_accuracy(victim, clean_data)
    bank = None
    if not stages:
        teacher = victim  # Nobody asks it anything.
    else:
        images = clean_data.images
        check_stages(victim.model, {"victim": victim.variables}, images, stages)
        if teacher is None:
            made = make_teacher(
                victim,
                clean_data,
                tuning,
                epochs=nad.teacher_epochs,
                key=key,
                should_stop=should_stop,
                commits=commits,
            )
            teacher = base.Net(victim.model, made.variables)
        check_stages(teacher.model, {"teacher": teacher.variables}, images, stages)
        if nad.teacher_views:
            bank = view_bank.build(
                view_bank.maps_fn(
                    teacher.model,
                    tuning.training,
                    stages=stages,
                    p=nad.p,
                    reduction=nad.reduction,
                ),
                teacher.variables,
                clean_data.images,
                views=nad.teacher_views,
                key=key,
                should_stop=should_stop,
            )
    students = []
    for factor in sorted(nad.beta_factors):
        scaled = {stage: beta * factor for stage, beta in betas.items()}
        # Without the term it is fine-tuning, with fine-tuning's batches.
        kept = bank if factor else None
        frozen = (
            teacher.variables if kept is None else (),
            () if victim_logits is None else victim.variables,
        )
        student = base.tune(
            victim,
            clean_data,
            tuning,
            make_loss=lambda frozen, scaled=scaled: distillation_loss(
                victim.model.apply,
                teacher.model.apply,
                frozen[0],
                betas=scaled,
                p=nad.p,
                reduction=nad.reduction,
                victim_variables=frozen[1],
                victim_logits=victim_logits,
            ),
            frozen=frozen,
            make_batch=None if kept is None else view_bank.make_batch(tuning.training),
            companions=() if kept is None else kept,
            key=key,
            on_epoch=_naming(factor, nad.beta_factors, on_epoch),
            should_stop=should_stop,
            commits=None if commits is None else commits(f"student-{factor}"),
        )
        if validate is None:
            return student
        student = student._replace(chosen={"beta_factor": factor})
        students.append((validate(student.variables), student))
    kept_student = metrics.strongest_affordable(
        [student.chosen["beta_factor"] for _, student in students],
        [accuracy for accuracy, _ in students],
        tolerance=nad.accuracy_tolerance,
    )
    return students[kept_student][1]


def _naming(
    factor: float, factors: Collection[float], on_epoch: base.OnEpoch | None
) -> base.OnEpoch | None:
    """`on_epoch` that is told, where there are several students, which one it is."""
    if on_epoch is None or len(factors) == 1:
        return on_epoch
    return lambda variables, metrics: on_epoch(
        variables, {**metrics, "beta_factor": factor}
    )


def make_teacher(
    victim: base.Net,
    clean_data: base.CleanData,
    tuning: settings.TuningSettings,
    *,
    epochs: int,
    key: jax.Array,
    on_epoch: base.OnEpoch | None = None,
    should_stop: base.ShouldStop | None = None,
    commits: base.CommitsOf | None = None,
) -> base.Defended:
    """The victim after plain fine-tuning: a teacher.

    Args:
      victim: The model to repair.
      clean_data: Clean images.
      tuning: That of the student, `patience` included; but for the sharpness radius.
      epochs: How many; with `tuning.patience` at most so many, and the teacher is then
        the best of them on held-out images.
      key: Makes the batches.
      on_epoch: Called after each epoch.
      should_stop: Asked between programs.
      commits: Keeps the training.
    """
    training = dataclasses.replace(tuning.training, epochs=epochs)
    tuning = dataclasses.replace(tuning, training=training, sharpness_radius=0.0)
    return fine_tuning.run(
        victim,
        clean_data,
        tuning,
        key=key,
        on_epoch=on_epoch,
        should_stop=should_stop,
        commits=commits,
    )


def distillation_loss(
    student_apply: Callable[..., Any],
    teacher_apply: Callable[..., Any],
    teacher_variables: Any,
    *,
    betas: Mapping[str, float | jax.Array],
    p: float = 2,
    reduction: str = "sum",
    victim_variables: Any = None,
    victim_logits: settings.LogitSettings | None = None,
) -> steps.LossFn:
    """Cross-entropy plus the attention term, as a loss for a training step.

    One forward pass of each net; none of the teacher where the batch brings its maps
    (`view_bank.make_batch`). Teacher and victim get no gradient and keep their
    BatchNorm statistics. Metrics: "accuracy" and the terms apart: "task_loss", with
    betas "distillation_loss", with `victim_logits` "logit_loss".

    Args:
      student_apply: `model.apply` of the student.
      teacher_apply: `model.apply` of the teacher.
      teacher_variables: Its variables.
      betas: Stage name to weight, per pixel; see `losses.nad_loss`. All 0 is
        `steps.classification_loss` itself, unless logits count.
      p: Power of the attention map.
      reduction: "sum" or "mean" over channels.
      victim_variables: With `victim_logits`: what the student started from.
      victim_logits: How much they count; None = not at all.
    """
    betas = {stage: beta for stage, beta in betas.items() if losses.counts(beta)}
    if not betas and victim_logits is None:
        return steps.classification_loss(student_apply)

    def loss_fn(params, batch_stats, batch, key):
        del key
        images, labels = batch["images"], batch["labels"]
        (logits, features), batch_stats = steps.apply_training(
            student_apply, params, batch_stats, images
        )
        task_loss = jnp.mean(steps.cross_entropy(logits, labels))
        terms = {"task_loss": task_loss}
        if betas:
            taught = batch.get("teacher_maps")
            has_maps = taught is not None
            if not has_maps:
                _, taught = teacher_apply(
                    jax.lax.stop_gradient(teacher_variables), images, train=False
                )
            distillation = losses.nad_loss(
                _select(features, betas),
                _select(taught, betas),
                betas=betas,
                p=p,
                reduction=reduction,
                teacher_is_map=has_maps,
            )
            terms["distillation_loss"] = jnp.mean(distillation).astype(task_loss.dtype)
        if victim_logits is not None:
            wanted, _ = student_apply(
                jax.lax.stop_gradient(victim_variables), images, train=False
            )
            divergence = losses.logit_distance(
                logits, wanted, temperature=victim_logits.temperature
            )
            logit_loss = victim_logits.weight * jnp.mean(divergence)
            terms["logit_loss"] = logit_loss.astype(task_loss.dtype)
        return sum(terms.values(), jnp.zeros_like(task_loss)), (
            batch_stats,
            {"accuracy": steps.accuracy(logits, labels), **terms},
        )

    return loss_fn


def mean_square_betas(
    net: base.Net, clean_data: base.CleanData, nad: settings.NadSettings
) -> dict[str, float]:
    """`nad.betas` in the unit of `losses.nad_loss`, whichever they are given in.

    Raises:
      InputError: a stage that does not exist; a beta of another unit than 0 for a stage
        without a map.
    """
    shapes = _stage_shapes("victim", net.model, net.variables, clean_data.images)
    _check_names(shapes, nad.betas)
    counted = {stage: beta for stage, beta in nad.betas.items() if beta}
    if nad.beta_unit == "mean_square" or not counted:
        return dict(nad.betas)
    # A stage [B, C] has no positions to convert by; a beta of 0 needs none.
    _check_shapes("victim", shapes, counted)
    positions = {stage: (shapes[stage][1], shapes[stage][2]) for stage in counted}
    converted = losses.convert_betas(counted, positions, to="mean_square")
    return {**nad.betas, **converted}


def check_stages(
    model: Any, nets: Mapping[str, Any], images: np.ndarray, stages: Collection[str]
) -> None:
    """Refuses stages whose attention map could never teach anything.

    A normalised 1x1 map is the number 1, whatever the network; so is a map that was
    pooled and spread again. Other implementations distil from such maps in silence.

    Args:
      model: Of teachers or students.
      nets: What each is called -> its variables.
      images: Clean images, uint8 `[N, H, W, C]`; the first few are looked at.
      stages: Names of stages.

    Raises:
      InputError: one line that names the net, the stage and its shape; or a net for
        images of another shape.
    """
    forward = jax.jit(lambda v, x: model.apply(v, x, train=False)[1])
    for name, variables in nets.items():
        _check_shapes(name, _stage_shapes(name, model, variables, images), stages)
        features = forward(variables, _first_images(images))
        for stage in stages:
            maps = np.asarray(attention.attention_map(features[stage]))
            spread = maps.std(axis=(1, 2)) / np.maximum(maps.mean(axis=(1, 2)), 1e-12)
            if spread.max() < _CONSTANT:
                raise errors.InputError(
                    f"stage {stage!r} of the {name} has the same attention everywhere "
                    f"in all of {len(maps)} images; it teaches nothing, choose another "
                    "stage"
                )


def check(
    victim: base.Net,
    clean_data: base.CleanData,
    nad: settings.NadSettings,
    *,
    teacher: base.Net | None = None,
) -> None:
    """Refuses what `run` would, as far as shapes tell; nothing is computed.

    Args:
      victim: Variables may be `jax.ShapeDtypeStruct`s.
      clean_data: One image will do.
      nad: The attention term.
      teacher: None = the victim, fine-tuned.

    Raises:
      InputError: a stage that does not exist, or whose map is 1x1; a teacher for other
        images, or with maps of other sizes.
    """
    betas = mean_square_betas(victim, clean_data, nad)
    stages = _that_count(betas, nad)
    nets = (
        {"victim": victim}
        if teacher is None
        else {"victim": victim, "teacher": teacher}
    )
    sizes = []
    for name, net in nets.items() if stages else ():
        shapes = _stage_shapes(name, net.model, net.variables, clean_data.images)
        _check_shapes(name, shapes, stages)
        sizes.append({stage: list(shapes[stage][1:3]) for stage in stages})
    for stage in stages:
        if sizes[0][stage] != sizes[-1][stage]:
            raise errors.InputError(
                f"stage {stage!r} of the teacher has a map of {sizes[-1][stage]}, of "
                f"the victim one of {sizes[0][stage]}"
            )


def _that_count(betas: Mapping[str, float], nad: settings.NadSettings) -> list[str]:
    """Stages that some student is taught."""
    return [stage for stage, beta in betas.items() if beta * max(nad.beta_factors)]


def _check_shapes(
    name: str, shapes: Mapping[str, tuple[int, ...]], stages: Collection[str]
) -> None:
    """Refuses stages without a map, or with one of a single position."""
    _check_names(shapes, stages)
    for stage in stages:
        shape = shapes[stage]
        if len(shape) != 4 or shape[1] * shape[2] < 2:
            raise errors.InputError(
                f"stage {stage!r} of the {name} is {list(shape[1:])} per image; "
                "attention needs [H, W, C] with more than one position"
            )


def _first_images(images: np.ndarray) -> jax.Array:
    return batches.to_float(jnp.asarray(images[:_IMAGES_TO_CHECK]))


def _stage_shapes(
    name: str, model: Any, variables: Any, images: np.ndarray
) -> dict[str, tuple[int, ...]]:
    """Stage name -> shape of its features for a few images; nothing is computed.

    Raises:
      InputError: a net for images of another shape, or a stage that is no array.
    """
    try:
        _, features = jax.eval_shape(
            lambda v, x: model.apply(v, x, train=False),
            variables,
            _first_images(images),
        )
    except flax.errors.ScopeParamShapeError as error:
        raise errors.InputError(
            f"the {name} cannot be given images of shape {list(images.shape[1:])}: "
            + str(error).split(" (http")[0]
        ) from None
    for stage, one in features.items():
        # A submodule of a foreign net may return anything.
        if not isinstance(one, jax.ShapeDtypeStruct):
            raise errors.InputError(
                f"stage {stage!r} of the {name} must be one array, got "
                f"{type(one).__name__}"
            )
    return {stage: tuple(one.shape) for stage, one in features.items()}


def _check_names(known: Collection[str], wanted: Collection[str]) -> None:
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        raise errors.InputError(
            f"betas must name stages of {', '.join(known)}, "
            f"got {', '.join(unknown or wanted) or 'none'}"
        )


def _select(features: Mapping[str, Any], stages: Collection[str]) -> dict[str, Any]:
    return {stage: features[stage] for stage in stages}
