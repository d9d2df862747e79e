# SPDX-License-Identifier: Apache-2.0
"""The repairs of one model, by the name of their row.

All get the same clean images, batches and budget; what several need is made once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from nad_jax import errors, settings, zoo
from nad_jax import workdir as workdir_lib
from nad_jax.core import metrics
from nad_jax.data import sources
from nad_jax.defenses import base, fine_pruning, fine_tuning, mode_connectivity, nad
from nad_jax.models import common
from nad_jax.training import agreement, loop


@dataclasses.dataclass(frozen=True)
class Patient:
    """A model on the table, and what the defender has to repair it.

    Attributes:
      name: "backdoored" or "clean".
      seed: Of the run it belongs to.
      net: The model.
      data: The defender's images.
      key: Of all repairs: the same key makes the same batches.
    """

    name: str
    seed: int
    net: base.Net
    data: base.CleanData
    key: jax.Array


def given_teacher(
    defense: settings.RepairSettings, workdir: workdir_lib.Workdir
) -> base.Net | None:
    """The teacher from a file, its bytes pinned to the workdir; None if none is given.

    Experiments also ask before they train anything, so that a bad file costs nothing.

    Raises:
      InputError: the file cannot be read, or is not that of earlier runs here.
    """
    if defense.teacher is None:
        return None
    path = defense.teacher
    net, sha256 = agreement.read_in_all(lambda: zoo.read_net(path))
    workdir.check_input("teacher", sha256)
    return net


def check(
    defense: settings.RepairSettings,
    model: Any,
    train: sources.Dataset,
    teacher: base.Net | None,
) -> None:
    """Refuses what a repair would refuse once its victim is trained.

    Args:
      defense: Of the run.
      model: Architecture of the victims.
      train: Clean training images.
      teacher: That of `given_teacher`.

    Raises:
      InputError: no image is held out for those who decide on such; betas of stages
        that the model does not have, or whose map is 1x1; a teacher of other stages.
    """
    # How many there are does not depend on the key.
    rows, held_out = base.clean_indices(
        jax.random.key(0),
        train.labels,
        fraction=defense.clean_fraction,
        validation_fraction=defense.validation_fraction,
    )
    deciding = defense.deciding()
    if deciding and not len(held_out):
        raise errors.InputError(
            f"clean_fraction {defense.clean_fraction:g} and validation_fraction "
            f"{defense.validation_fraction:g} leave none of {len(rows)} clean images "
            f"held out for {', '.join(deciding)}"
        )
    wanted = (*defense.rows, *defense.clean_model_rows)
    attention = None
    if any(name.startswith("nad") for name in wanted):
        attention = defense.nad
    elif "ft_sam_kd" in wanted:
        attention = _no_attention(defense.nad)
    if attention is not None:
        shapes = common.expected_shapes(model, train.images.shape[1:])
        one_image = base.clean_data(train, rows[:1], rows[:0])
        nad.check(base.Net(model, shapes), one_image, attention, teacher=teacher)


def _no_attention(attention: settings.NadSettings) -> settings.NadSettings:
    """One student and no teacher: what is left is fine-tuning and its other terms."""
    return dataclasses.replace(
        attention, betas=dict.fromkeys(attention.betas, 0.0), beta_factors=(1.0,)
    )


def epochs_of_nad(
    training: settings.TrainingSettings, attention: settings.NadSettings
) -> int:
    """Epochs that `nad.run` tells: those of all its students."""
    return len(attention.beta_factors) * training.epochs


def run_stage(
    workdir: workdir_lib.Workdir,
    stage: str,
    repair: Callable[..., base.Defended],
    victim: base.Net,
    *,
    title: str,
    epochs: int,
    evaluate: Callable[[Any], dict[str, Any]] | None = None,
    chosen: dict[str, Any] | None = None,
) -> tuple[base.Net, float]:
    """The net that a repair makes, computed or restored, and its seconds.

    Args:
      workdir: Keeps the result, the commits and a record of each epoch.
      stage: Name of the stage there.
      repair: The `run` of a defence with all arguments but `on_epoch`, `should_stop`
        and `commits`.
      victim: What it repairs.
      title: Of the progress.
      epochs: That it will tell.
      evaluate: Rates of variables, to be recorded after each epoch.
      chosen: Receives what the repair decided, `Defended.chosen`.

    Raises:
      Interrupted: the workdir was asked to stop.
    """

    def compute():
        progress = workdir.progress(title, epochs)

        def on_epoch(variables, metrics):
            if evaluate is not None:
                # No part of the repair, so not of its seconds.
                with workdir.timed("evaluate"):
                    rates = evaluate(variables)
                metrics = {**metrics, "acc": rates["acc"], "asr": rates["asr"]}
            workdir.record("epoch", stage=stage, **metrics)
            progress.advance(f"loss {metrics['loss']:.4f}")

        try:
            defended = repair(
                on_epoch=on_epoch,
                should_stop=workdir.should_stop,
                commits=workdir.commits,
            )
        except loop.TrainingInterrupted as interruption:
            raise workdir_lib.Interrupted(f"{stage}: {interruption}") from None
        progress.done(f"loss {defended.history[-1]['loss']:.4f}")
        notes.update(defended.chosen)
        return defended.variables

    notes = {} if chosen is None else chosen
    variables = workdir.stage(stage, victim.variables, compute, notes)
    return base.Net(victim.model, variables), workdir.seconds[stage]


class Stages:
    """The repairs of one model: each a stage of the workdir, none computed twice.

    Attributes:
      chosen: What a repair decided (`base.Defended.chosen`), by row; of several
        `rate_factors` also the "rate_factor", and "held_out_by_rate", what decided.
    """

    def __init__(
        self,
        defense: settings.RepairSettings,
        workdir: workdir_lib.Workdir,
        patient: Patient,
        evaluate: Callable[[Any], dict[str, Any]] | None = None,
    ):
        """`evaluate`: rates of variables, to be recorded after each epoch of a row."""
        self.chosen: dict[str, dict[str, Any]] = {}
        self._defense = defense
        self._patient = patient
        self._done: dict[str, tuple[base.Net, float]] = {}
        self._held_out: Callable[[Any], float] | None = None
        factors = defense.rate_factors
        # Of several nets of a row only one becomes the row's: their epochs are not its.
        watched = evaluate if len(factors) == 1 else None
        self._at_rates = {
            factor: _StagesAtRate(defense, workdir, patient, watched, factor)
            for factor in factors
        }
        # Whose teacher is shown.
        self._taken = factors[0]

    def repair(self, name: str) -> tuple[base.Net, float]:
        """The net of a row of `settings.REPAIRS`, and the seconds it took.

        With several `rate_factors` that of the largest whose held-out accuracy is
        within `rate_tolerance` of the best, decided without any trigger. Seconds count
        everything the row needs, other rates and what it shares with others included.
        """
        if name in self._done:
            return self._done[name]
        factors = list(self._at_rates)
        nets, seconds = zip(
            *(stages.repair(name) for stages in self._at_rates.values()), strict=True
        )
        taken, decision = 0, {}
        if len(factors) > 1:
            accuracies = [self.held_out_accuracy(net.variables) for net in nets]
            taken = metrics.strongest_affordable(
                factors, accuracies, tolerance=self._defense.rate_tolerance
            )
            by_rate = {str(f): a for f, a in zip(factors, accuracies, strict=True)}
            decision = {"rate_factor": factors[taken], "held_out_by_rate": by_rate}
        factor = factors[taken]
        self.chosen[name] = {**self._at_rates[factor].chosen.get(name, {}), **decision}
        if name.startswith("nad"):
            self._taken = factor
        self._done[name] = nets[taken], sum(seconds)
        return self._done[name]

    def teacher(self) -> tuple[base.Net, float]:
        """That of the last row that distilled; a given one took no time."""
        return self._at_rates[self._taken].teacher()

    def held_out_accuracy(self, variables: Any) -> float:
        """Share of the defender's held-out images given their label."""
        if self._held_out is None:
            self._held_out = base.validation_accuracy(
                self._patient.net, self._patient.data
            )
        return self._held_out(variables)


class _StagesAtRate:
    """`Stages` at one of its learning rates."""

    def __init__(
        self,
        defense: settings.RepairSettings,
        workdir: workdir_lib.Workdir,
        patient: Patient,
        evaluate: Callable[[Any], dict[str, Any]] | None,
        factor: float,
    ):
        training = dataclasses.replace(
            defense.training, learning_rate=factor * defense.training.learning_rate
        )
        defense = dataclasses.replace(defense, training=training)
        self._suffix = "" if len(defense.rate_factors) == 1 else f"-rate{factor}"
        self.chosen: dict[str, dict[str, Any]] = {}
        self._evaluate = evaluate
        self._defense = defense
        self._workdir = workdir
        self._patient = patient
        self._done: dict[str, tuple[base.Net, float]] = {}

    def repair(self, name: str) -> tuple[base.Net, float]:
        """As `Stages.repair`."""
        defense = self._defense
        tuning = settings.TuningSettings(defense.training, patience=defense.patience)
        if name == "ft_sam":
            own = defense.ft_sam
            tuning = dataclasses.replace(
                tuning,
                sharpness_radius=own.radius or defense.sharpness_radius,
                sharpness_by_weight=own.by_weight,
            )
            return self._stage(
                name, fine_tuning.run, tuning, label_smoothing=own.label_smoothing
            )
        if "_sam" in name:
            tuning = dataclasses.replace(
                tuning, sharpness_radius=defense.sharpness_radius
            )
        logits = defense.victim_logits if name.endswith("_kd") else None
        if name == "fine_tuning":
            return self._stage(name, fine_tuning.run, tuning)
        if name == "ft_sam_kd":
            alone = _no_attention(defense.nad)
            return self._stage(name, nad.run, tuning, alone, victim_logits=logits)
        if name == "fine_pruning":
            return self._stage(name, fine_pruning.run, tuning, defense.fine_pruning)
        if name == "mode_connectivity":
            tuned, earlier = self.repair("fine_tuning")
            net, seconds = self._stage(
                name,
                mode_connectivity.run,
                tuning,
                defense.mode_connectivity,
                tuned=tuned,
            )
        else:
            teacher, earlier = self.teacher()
            net, seconds = self._stage(
                name,
                nad.run,
                tuning,
                defense.nad,
                teacher=teacher,
                victim_logits=logits,
            )
        return net, earlier + seconds

    def teacher(self) -> tuple[base.Net, float]:
        """The teacher of all rows that distil; a given one took no time."""
        if "teacher" in self._done:
            return self._done["teacher"]
        given = given_teacher(self._defense, self._workdir)
        if given is not None:
            self._done["teacher"] = given, 0.0
            return self._done["teacher"]
        tuning = settings.TuningSettings(
            self._defense.training, patience=self._defense.patience
        )
        epochs = self._defense.nad.teacher_epochs
        return self._stage("teacher", nad.make_teacher, tuning, epochs=epochs)

    def _epochs(self, name: str) -> int:
        """Epochs that `on_epoch` of a stage will tell."""
        defense = self._defense
        if name == "teacher":
            return defense.nad.teacher_epochs
        if name.startswith("nad"):
            return epochs_of_nad(defense.training, defense.nad)
        return defense.training.epochs

    def _stage(
        self, name: str, run: Callable[..., base.Defended], *arguments, **options
    ) -> tuple[base.Net, float]:
        """What `run` makes of the patient, computed or restored, and its seconds."""
        if name in self._done:
            return self._done[name]
        patient = self._patient
        # Its epochs are not those of one net that becomes the row's: the teacher has no
        # row, of connectivity only a point is used, of several students only one.
        is_other = name in ("teacher", "mode_connectivity") or (
            name.startswith("nad") and len(self._defense.nad.beta_factors) > 1
        )
        evaluate = None if is_other else self._evaluate
        self._done[name] = run_stage(
            self._workdir,
            f"seed{patient.seed}-{patient.name}-{name}{self._suffix}",
            functools.partial(
                run, patient.net, patient.data, *arguments, key=patient.key, **options
            ),
            patient.net,
            title=f"{name}{self._suffix}, {patient.name} model, seed {patient.seed}",
            epochs=self._epochs(name),
            evaluate=evaluate,
            chosen=self.chosen.setdefault(name, {}),
        )
        return self._done[name]
