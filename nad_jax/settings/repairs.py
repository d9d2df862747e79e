# SPDX-License-Identifier: Apache-2.0
"""Settings of the defender of a float model: NAD and its controls."""

import dataclasses
from collections.abc import Mapping

from nad_jax.errors import InputError
from nad_jax.settings.basics import TrainingSettings
from nad_jax.settings.checks import check, check_different, check_name, check_patience

REPAIRS = (
    "fine_tuning",
    "fine_pruning",
    "mode_connectivity",
    "ft_sam",
    "ft_sam_kd",
    "nad",
    "nad_sam",
    "nad_sam_kd",
)


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """Training on the defender's clean images (`nad_jax.defenses`).

    Attributes:
      training: Optimiser, schedule, augmentation.
      sharpness_radius: Of the ascent step of SAM, in weight units; 0 = no SAM.
      sharpness_by_weight: In units of each weight's own size instead (adaptive SAM).
      patience: Stop after so many epochs in which accuracy on held-out clean images did
        not rise, and go back to the best; None = train to the end, keep the last.
    """

    training: TrainingSettings
    sharpness_radius: float = 0.0
    sharpness_by_weight: bool = False
    patience: int | None = None

    def __post_init__(self):
        check(self, "sharpness_radius", self.sharpness_radius >= 0, ">= 0")
        check_patience(self)


@dataclasses.dataclass(frozen=True)
class NadSettings:
    """The attention term (`nad_jax.defenses.nad`).

    Attributes:
      betas: Stage name to weight; stages that are not named, or None in a config, are
        left alone.
      beta_unit: "mean_square" per pixel, as in the public code, or "squared_distance"
        of whole maps.
      p: Power of the attention map.
      reduction: "sum" or "mean" over channels.
      teacher_epochs: Fine-tuning that makes the teacher.
      teacher_views: So many variations of each image, of which the teacher's maps are
        computed once and kept; its batches then differ from those of the controls.
        0 = a new variation and a teacher pass in every step.
      beta_factors: Multiples of `betas` to try; held-out accuracy decides.
      accuracy_tolerance: What held-out accuracy may lose for a larger factor.
    """

    betas: Mapping[str, float]
    beta_unit: str = "mean_square"
    p: float = 2.0
    reduction: str = "sum"
    teacher_epochs: int = 10
    teacher_views: int = 0
    beta_factors: tuple[float, ...] = (1.0,)
    accuracy_tolerance: float = 0.01

    def __post_init__(self):
        good = bool(self.betas)
        good = good and all(
            isinstance(beta, (int, float)) and 0 <= beta < float("inf")
            for beta in self.betas.values()
        )
        check(self, "betas", good, "numbers >= 0 by stage")
        check_name(self, "beta_unit", ("mean_square", "squared_distance"))
        check_name(self, "reduction", ("sum", "mean"))
        check(self, "p", 0 < self.p < float("inf"), "> 0 and finite")
        check(self, "teacher_epochs", self.teacher_epochs >= 1, "at least 1")
        check(self, "teacher_views", self.teacher_views >= 0, ">= 0")
        good = bool(self.beta_factors)
        good = good and all(0 <= f < float("inf") for f in self.beta_factors)
        check(self, "beta_factors", good, "one or more finite numbers >= 0")
        check_different(self, "beta_factors")
        check(self, "accuracy_tolerance", self.accuracy_tolerance >= 0, ">= 0")


@dataclasses.dataclass(frozen=True)
class LogitSettings:
    """The victim's own logits on clean images as soft labels (`nad_jax.defenses.nad`).

    Attributes:
      weight: Of `losses.logit_distance`, beside a cross-entropy of weight 1.
      temperature: Its temperature.
    """

    weight: float = 1.0
    temperature: float = 2.0

    def __post_init__(self):
        check(self, "weight", 0 < self.weight < float("inf"), "> 0")
        check(self, "temperature", 0 < self.temperature < float("inf"), "> 0")


@dataclasses.dataclass(frozen=True)
class FtSamSettings:
    """The row "ft_sam" (`nad_jax.defenses.fine_tuning`).

    Attributes:
      radius: Of its ascent step; None = that of the other rows in a SAM step.
      by_weight: Whether the radius is in units of each weight's own size.
      label_smoothing: Share of each label spread over all classes.
    """

    radius: float | None = None
    by_weight: bool = False
    label_smoothing: float = 0.0

    def __post_init__(self):
        good = self.radius is None or 0 < self.radius < float("inf")
        check(self, "radius", good, "> 0 and finite, or None")
        check(self, "label_smoothing", 0 <= self.label_smoothing < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class FinePruningSettings:
    """`max_accuracy_drop`: what held-out accuracy may lose by pruning, a fraction."""

    max_accuracy_drop: float = 0.04

    def __post_init__(self):
        check(self, "max_accuracy_drop", self.max_accuracy_drop >= 0, ">= 0")


@dataclasses.dataclass(frozen=True)
class ModeConnectivitySettings:
    """The curve of `nad_jax.defenses.mode_connectivity`.

    Attributes:
      positions: To choose the repaired net from, 0 = victim, 1 = fine-tuned copy;
        held-out accuracy decides. One position needs no decision.
      accuracy_tolerance: What held-out accuracy may lose for a position further from
        the victim.
      learning_rate: Peak rate for the curve; its schedule is that of the tuning.
    """

    positions: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    accuracy_tolerance: float = 0.01
    learning_rate: float = 0.01

    def __post_init__(self):
        good = bool(self.positions) and all(0 <= p <= 1 for p in self.positions)
        check(self, "positions", good, "one or more numbers in [0, 1]")
        check(self, "accuracy_tolerance", self.accuracy_tolerance >= 0, ">= 0")
        check(self, "learning_rate", self.learning_rate > 0, "> 0")


@dataclasses.dataclass(frozen=True)
class RepairSettings:
    """The defender of a float model: one budget, and every defence to compare in it.

    Attributes:
      training: Optimiser, schedule and augmentation of every repair.
      nad: The attention term.
      rows: Which rows to compute for the backdoored model, of `REPAIRS`.
      clean_model_rows: The same for the clean model, where nothing needs repair; with
        none it is not even trained.
      clean_fraction: Share of the training set that the defender has, clean.
      validation_fraction: Share of those that is held out for decisions.
      teacher: File of a model to distil from, a state dict of PyTorch or a file of the
        zoo; None = the victim, fine-tuned.
      patience: See `TuningSettings`.
      rate_factors: Multiples of `training.learning_rate` to try, for each row; held-out
        accuracy decides. A faster repair mostly forgets more, of backdoor and of task.
        The curve of mode connectivity keeps its own rate; with several factors there
        are no curves over epochs.
      rate_tolerance: What held-out accuracy may lose for a larger factor.
      sharpness_radius: SAM's, for the rows that use it.
      ft_sam: Its settings.
      victim_logits: Of the rows "ft_sam_kd" and "nad_sam_kd".
      fine_pruning: Its settings.
      mode_connectivity: Its settings.
    """

    training: TrainingSettings
    nad: NadSettings
    rows: tuple[str, ...] = REPAIRS
    clean_model_rows: tuple[str, ...] = ("fine_tuning", "nad")
    clean_fraction: float = 0.05
    validation_fraction: float = 0.1
    teacher: str | None = None
    patience: int | None = None
    rate_factors: tuple[float, ...] = (1.0,)
    rate_tolerance: float = 0.02
    sharpness_radius: float = 0.1
    ft_sam: FtSamSettings = dataclasses.field(default_factory=FtSamSettings)
    victim_logits: LogitSettings = dataclasses.field(default_factory=LogitSettings)
    fine_pruning: FinePruningSettings = dataclasses.field(
        default_factory=FinePruningSettings
    )
    mode_connectivity: ModeConnectivitySettings = dataclasses.field(
        default_factory=ModeConnectivitySettings
    )

    def __post_init__(self):
        for field in ("rows", "clean_model_rows"):
            for name in getattr(self, field):
                known = ", ".join(REPAIRS)
                if name not in REPAIRS:
                    raise InputError(f"{field} must be of {known}, got {name!r}")
            check_different(self, field)
        check(self, "clean_fraction", 0 < self.clean_fraction <= 1, "in (0, 1]")
        good = 0 <= self.validation_fraction < 1
        check(self, "validation_fraction", good, "in [0, 1)")
        check(self, "sharpness_radius", self.sharpness_radius > 0, "> 0")
        check_patience(self)
        good = bool(self.rate_factors)
        good = good and all(0 < f < float("inf") for f in self.rate_factors)
        check(self, "rate_factors", good, "one or more finite numbers > 0")
        check_different(self, "rate_factors")
        check(self, "rate_tolerance", 0 <= self.rate_tolerance <= 1, "in [0, 1]")
        attentive = [
            name
            for name in (*self.rows, *self.clean_model_rows)
            if name.startswith("nad")
        ]
        if attentive and not max(self.nad.betas.values()) * max(self.nad.beta_factors):
            raise InputError(
                f"nad.betas must have one above 0 for {', '.join(attentive)}, which "
                f"are fine-tuning without; got {dict(self.nad.betas)} times "
                f"{self.nad.beta_factors}"
            )
        deciding = self.deciding()
        if self.validation_fraction == 0 and deciding:
            raise InputError(
                f"validation_fraction must be above 0 for {', '.join(deciding)}, "
                "which decide on held-out images, got 0.0"
            )

    def deciding(self) -> list[str]:
        """What of these settings decides on held-out images."""
        rows = {*self.rows, *self.clean_model_rows}
        decides = {
            "fine_pruning": "fine_pruning" in rows,
            "mode_connectivity.positions": "mode_connectivity" in rows
            and len(self.mode_connectivity.positions) > 1,
            "nad.beta_factors": len(self.nad.beta_factors) > 1,
            "patience": self.patience is not None,
            "rate_factors": len(self.rate_factors) > 1,
        }
        return [name for name, does in decides.items() if does]
