# SPDX-License-Identifier: Apache-2.0
"""Everything that one kind of run reads."""

import dataclasses

from nad_jax.core import grids
from nad_jax.errors import InputError
from nad_jax.settings.attacks import AttackSettings, PoisoningSettings
from nad_jax.settings.basics import (
    DataSettings,
    ModelSettings,
    TrainingSettings,
    TriggerSettings,
)
from nad_jax.settings.checks import (
    check,
    check_bits,
    check_loader,
    check_name,
    check_patience,
    check_seed,
    check_seeds,
    check_widths,
)
from nad_jax.settings.quantization import EfrapSettings, QuantizationSettings
from nad_jax.settings.repairs import NadSettings, RepairSettings


@dataclasses.dataclass(frozen=True)
class ExperimentSettings:
    """Everything a run of `configs/efrap.py` reads.

    Attributes:
      title: Head of the report.
      seeds: The whole pipeline is repeated for each.
      data: Images.
      model: Architecture.
      victim: Training of the clean model that is then attacked.
      attack: How the backdoor is planted.
      defense: The grid and the roundings.
      repairs: Defences of float models, each followed by nearest rounding on the same
        grid; None = no such rows.
      victim_workdir: Workdir of an earlier run whose models are used instead of
        training new ones; None = train.
      zoo: Name of a victim of the zoo that is used instead (`nad_jax.zoo`).
      job: "efrap".
    """

    title: str
    data: DataSettings
    model: ModelSettings
    victim: TrainingSettings
    attack: AttackSettings
    defense: QuantizationSettings
    repairs: RepairSettings | None = None
    seeds: tuple[int, ...] = (0,)
    victim_workdir: str | None = None
    zoo: str | None = None
    job: str = "efrap"

    def __post_init__(self):
        check_name(self, "job", ("efrap",))
        check_seeds(self)


@dataclasses.dataclass(frozen=True)
class NadExperimentSettings:
    """Everything a run of `configs/nad.py` reads.

    Attributes:
      title: Head of the report.
      data: Images.
      model: Architecture.
      victim: Training of the backdoored and of the clean model.
      attack: What is done to the training data of the backdoored one.
      defense: The repairs.
      seeds: The whole pipeline is repeated for each.
      victim_workdir: Workdir of an earlier run whose models are used instead of
        training new ones; None = train.
      zoo: Name of a victim of the zoo that is used instead (`nad_jax.zoo`).
      curves: Measure every repair that trains one net after every epoch with test
        images, for display.
      job: "nad".
    """

    title: str
    data: DataSettings
    model: ModelSettings
    victim: TrainingSettings
    attack: PoisoningSettings
    defense: RepairSettings
    seeds: tuple[int, ...] = (0,)
    victim_workdir: str | None = None
    zoo: str | None = None
    curves: bool = False
    job: str = "nad"

    def __post_init__(self):
        check_name(self, "job", ("nad",))
        check_seeds(self)


@dataclasses.dataclass(frozen=True)
class VerdictSettings:
    """What a vetted model must keep; all are shares in [0, 1].

    Attributes:
      max_accuracy_loss: Of the shipped model against the float model as it came.
      max_asr: Of the shipped model; judged only when a trigger is known.
      max_drift: Share of clean images that nearest rounding of the model as it came
        calls something else. Rounding that changes what a model says is suspicious.
      min_agreement: Share of images on which the exported file predicts what the
        evaluation here did.
    """

    max_accuracy_loss: float = 0.01
    max_asr: float = 0.06
    max_drift: float = 0.1
    min_agreement: float = 0.995

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check(self, field.name, 0 <= value <= 1, "in [0, 1]")


@dataclasses.dataclass(frozen=True)
class VetSettings:
    """Everything a run of `configs/vet.py` reads.

    Attributes:
      title: Head of the report.
      checkpoint: File from outside.
      arch: What it is said to be: a name of `nad_jax.models`; None finds it by the
        names and shapes of its arrays.
      data: Clean images: the training split repairs and calibrates, the test split
        measures.
      training: Of the repair.
      nad: The repair's attention term.
      defense: The grid to ship on, and EFRAP.
      trigger: For measurement, if one is known; the name "none" means that none is.
      target_label: Class the trigger asks for.
      clean_fraction: Share of the training split that is used.
      validation_fraction: Share of those that is held out.
      patience: See `TuningSettings`.
      verdict: What must hold.
      seed: Of all randomness.
      job: "vet".
    """

    title: str
    checkpoint: str | None
    arch: str | None
    data: DataSettings
    training: TrainingSettings
    nad: NadSettings
    defense: EfrapSettings
    trigger: TriggerSettings = TriggerSettings("none")
    target_label: int = 0
    clean_fraction: float = 0.05
    validation_fraction: float = 0.1
    patience: int | None = None
    verdict: VerdictSettings = dataclasses.field(default_factory=VerdictSettings)
    seed: int = 0
    job: str = "vet"

    def __post_init__(self):
        check_name(self, "job", ("vet",))
        check_seed(self)
        check_loader(self)
        if not self.checkpoint:
            raise InputError("checkpoint is missing; give --config.checkpoint=FILE")
        check(self, "clean_fraction", 0 < self.clean_fraction <= 1, "in (0, 1]")
        good = 0 <= self.validation_fraction < 1
        check(self, "validation_fraction", good, "in [0, 1)")
        check(self, "target_label", self.target_label >= 0, ">= 0")
        check_patience(self)
        ends, inner = self.defense.grid.grid().first_last_bits, self.defense.act_bits
        if inner is not None and ends not in (None, inner):
            raise InputError(
                f"defense.act_bits is {inner} and the first and the last layer have "
                f"{ends} bits; what is shipped has one width for all layer inputs"
            )


@dataclasses.dataclass(frozen=True)
class AuditSettings:
    """Everything a run of `configs/audit.py` reads.

    Attributes:
      float_model: Checkpoint of the float model.
      integer_file: Artefact or ONNX file that is said to be its rounding.
      arch: What the checkpoint is said to be; None finds it.
      data: Clean images; the training split is looked at.
      images: How many of them.
      seed: Of their choice.
      job: "audit".
    """

    float_model: str | None
    integer_file: str | None
    arch: str | None
    data: DataSettings
    images: int = 1024
    seed: int = 0
    job: str = "audit"

    def __post_init__(self):
        check_name(self, "job", ("audit",))
        check_seed(self)
        check_loader(self)
        for name in ("float_model", "integer_file"):
            if not getattr(self, name):
                raise InputError(f"{name} is missing; give --config.{name}=FILE")
        check(self, "images", self.images >= 1, "at least 1")


@dataclasses.dataclass(frozen=True)
class InspectSettings:
    """Everything a run of `configs/inspect.py` reads.

    Attributes:
      float_model: Checkpoint.
      arch: As for `VetSettings`.
      data: Clean images; labels are not used.
      weight_bits: Widths to look at.
      presets: Grids to look at, of `nad_jax.core.grids.GRIDS`.
      act_bits: Width of layer inputs, for the drift; None = float.
      images: How many of them.
      seed: Of their choice.
      job: "inspect".
    """

    float_model: str | None
    arch: str | None
    data: DataSettings
    weight_bits: tuple[int, ...] = (8, 4)
    presets: tuple[str, ...] = ("plain",)
    act_bits: int | None = None
    images: int = 1024
    seed: int = 0
    job: str = "inspect"

    def __post_init__(self):
        check_name(self, "job", ("inspect",))
        check_seed(self)
        check_loader(self)
        if not self.float_model:
            raise InputError("float_model is missing; give --config.float_model=FILE")
        check_widths(self, "weight_bits")
        good = bool(self.presets) and set(self.presets) <= set(grids.GRIDS)
        check(self, "presets", good, f"one or more of {', '.join(grids.GRIDS)}")
        check_bits(self, "act_bits", optional=True)
        check(self, "images", self.images >= 1, "at least 1")


JOBS: dict[str, type] = {
    "audit": AuditSettings,
    "efrap": ExperimentSettings,
    "inspect": InspectSettings,
    "nad": NadExperimentSettings,
    "vet": VetSettings,
}
