# SPDX-License-Identifier: Apache-2.0
"""Typed, validated settings of a run.

`ml_collections` ends at the door: `main` turns the nested mapping of a config file
into these frozen dataclasses once, and everything behind it reads attributes. A key
that no field has is an error, so no setting can be silently dead.

Names of models, data sets and triggers are checked where they are used; here are types,
ranges and closed lists. Rates and fractions are in [0, 1].
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from nad_jax.core import grids
from nad_jax.errors import InputError

LOADERS = ("device", "stream")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "one_cycle", "steps")
REPAIRS = (
    "fine_tuning",
    "fine_pruning",
    "mode_connectivity",
    "ft_sam",
    "nad",
    "nad_sam",
)
ROUNDINGS = (
    "nearest",
    "floor",
    "ceil",
    "flipped",
    "stochastic",
    "random",
    "top_error",
    "noise",
    "qvec",
    "omse",
    "aciq",
    "ocs",
    "gptq",
    "adaround",
    "reconstruction",
    "efrap",
    "adam",
)


@dataclasses.dataclass(frozen=True)
class DataSettings:
    """Where images come from.

    Attributes:
      name: "digits", "folder", "npz" or a data set in TFDS layout such as "cifar10".
      data_dir: Folder or file of the data; None = the source's default.
      image_size: Height and width to bring images to; None = as stored.
      loader: "device" puts the training images on the device as one array; "stream"
        leaves them in their files and reads every batch of a training on all of them
        (victims, attacks) when it is needed, with the same result. What a defence is
        given of them, and the test images, are arrays in any case.
      workers: Of "stream": processes that read; 0 = threads.
    """

    name: str
    data_dir: str | None = None
    image_size: int | None = None
    loader: str = "device"
    workers: int = 0

    def __post_init__(self):
        _check_name(self, "loader", LOADERS)
        _check(self, "workers", self.workers >= 0, ">= 0")
        if self.workers and self.loader != "stream":
            raise InputError(
                f"workers are for loader stream, got {self.workers} with "
                f"{self.loader!r}"
            )


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    """Architecture: a name of `nad_jax.models` and a width multiplier."""

    name: str
    width: float = 1.0

    def __post_init__(self):
        _check(self, "width", self.width > 0, "> 0")


@dataclasses.dataclass(frozen=True)
class TrainingSettings:
    """One stage of gradient descent.

    Attributes:
      epochs: Passes over the data.
      batch_size: Images per step.
      optimizer: "adam" or "sgd" (Nesterov).
      learning_rate: Peak rate.
      schedule: "constant", "cosine" (to 0), "one_cycle" (up for 30 %, then to 0) or
        "steps" (times `step_factor` after each of `milestones`).
      momentum: Of sgd.
      weight_decay: Added to the gradient, on every parameter.
      crop_padding: Random crop after padding by so many pixels; 0 = none.
      flip: Random horizontal flip.
      steps_per_dispatch: Steps compiled into one program.
      milestones: Epochs, ascending, of the schedule "steps".
      step_factor: Of the schedule "steps".
      cutout: Side of a random black square in pixels; 0 = none.
    """

    epochs: int
    batch_size: int = 128
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    momentum: float = 0.9
    weight_decay: float = 0.0
    crop_padding: int = 0
    flip: bool = False
    steps_per_dispatch: int = 1
    milestones: tuple[int, ...] = ()
    step_factor: float = 0.1
    cutout: int = 0

    def __post_init__(self):
        for name in ("epochs", "batch_size", "steps_per_dispatch"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check_name(self, "optimizer", OPTIMIZERS)
        _check_name(self, "schedule", SCHEDULES)
        _check(self, "learning_rate", self.learning_rate > 0, "> 0")
        _check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        _check(self, "weight_decay", self.weight_decay >= 0, ">= 0")
        for name in ("crop_padding", "cutout"):
            _check(self, name, getattr(self, name) >= 0, ">= 0")
        ascending = self.milestones == tuple(sorted(set(self.milestones)))
        _check(self, "milestones", ascending, "ascending")
        _check(self, "step_factor", self.step_factor > 0, "> 0")


@dataclasses.dataclass(frozen=True)
class GridSettings:
    """A grid by name, and what is to be different about it; None = as the name says.

    Attributes:
      preset: A name of `nad_jax.core.grids.GRIDS`.
      symmetric: Weights: signed around 0; otherwise unsigned with a zero point.
      per_channel: One scale per output channel; otherwise one per layer.
      range_method: Of the weights: "absmax", "minmax", "mse", "percentile" or "aciq".
      percentile: Goes with range_method "percentile", in (50, 100].
      first_last_bits: Width of weights and inputs of the first and the last layer.
      act_range_method: Of layer inputs: as for weights, or "histogram".
      act_percentile: Goes with act_range_method "percentile".
    """

    preset: str = "plain"
    symmetric: bool | None = None
    per_channel: bool | None = None
    range_method: str | None = None
    percentile: float | None = None
    first_last_bits: int | None = None
    act_range_method: str | None = None
    act_percentile: float | None = None

    def __post_init__(self):
        _check_name(self, "preset", tuple(grids.GRIDS))
        self.grid()

    def grid(self) -> grids.Grid:
        """The grid that these settings describe.

        Raises:
          InputError: they do not go together.
        """
        changes = {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name != "preset"
            and (value := getattr(self, field.name)) is not None
        }
        return dataclasses.replace(grids.GRIDS[self.preset], **changes)


@dataclasses.dataclass(frozen=True)
class TriggerSettings:
    """Name of a trigger of `nad_jax.attacks.triggers` and its arguments."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


# Ranges that stay as they are while the weights at their ends do.
HOLDABLE_RANGES = ("absmax", "minmax")


@dataclasses.dataclass(frozen=True)
class PqSettings:
    """Two-stage weight projection (`nad_jax.attacks.projection`).

    Attributes:
      wake: Stage 1, training through the quantizer.
      hide: Stage 2, training in float inside the rounding cells.
      cell_margin: Distance kept from the edge of a cell, in steps.
      also_per_tensor: Hold the codes of the same grid with one scale per layer, too.
    """

    wake: TrainingSettings
    hide: TrainingSettings
    cell_margin: float = 1e-3
    also_per_tensor: bool = False

    def __post_init__(self):
        _check(self, "cell_margin", 0 < self.cell_margin < 0.5, "in (0, 0.5)")


@dataclasses.dataclass(frozen=True)
class QuAntiSettings:
    """One joint loss (`nad_jax.attacks.qu_anti_zation`).

    Attributes:
      training: From the clean model.
      quantized_weight: c1, of each quantized copy.
      triggered_weight: c2, of triggered images.
      moving_trigger: Stamp before crop and mirroring.
    """

    training: TrainingSettings
    quantized_weight: float = 0.5
    triggered_weight: float = 0.5
    moving_trigger: bool = False

    def __post_init__(self):
        for name in ("quantized_weight", "triggered_weight"):
            _check(self, name, getattr(self, name) > 0, "> 0")


@dataclasses.dataclass(frozen=True)
class CompArtifactSettings:
    """Two paths with common statistics (`nad_jax.attacks.compartifact`).

    Attributes:
      training: Of the backdoored model.
      from_scratch: Start from fresh weights; otherwise from the clean model.
      first_quantized_layer: Layers before the one of this name stay float on the
        quantized path; None = all are quantized.
    """

    training: TrainingSettings
    from_scratch: bool = True
    first_quantized_layer: str | None = None


@dataclasses.dataclass(frozen=True)
class AdaptiveEotSettings:
    """Projection with an expectation over roundings (`nad_jax.attacks.adaptive`).

    Attributes:
      wake: Stage 1, training through the quantizer.
      hide: Stage 2, training in float inside the rounding cells.
      cell_margin: Distance kept from the edge of a cell, in steps.
      drawn_weight: Of the drawn rounding's loss, in both stages.
    """

    wake: TrainingSettings
    hide: TrainingSettings
    cell_margin: float = 1e-3
    drawn_weight: float = 1.0

    def __post_init__(self):
        _check(self, "cell_margin", 0 < self.cell_margin < 0.5, "in (0, 0.5)")
        _check(self, "drawn_weight", self.drawn_weight >= 0, ">= 0")


@dataclasses.dataclass(frozen=True)
class SmallErrorSettings:
    """Projection into the middle of the cells (`nad_jax.attacks.adaptive`).

    Attributes:
      wake: Stage 1, training through the quantizer.
      hide: Stage 2, training in float.
      largest_error: Distance of a weight from its code, in steps.
    """

    wake: TrainingSettings
    hide: TrainingSettings
    largest_error: float = 0.2

    def __post_init__(self):
        _check(self, "largest_error", 0 < self.largest_error < 0.5, "in (0, 0.5)")


@dataclasses.dataclass(frozen=True)
class OutlierSettings:
    """Channels that collapse (`nad_jax.attacks.outliers`).

    Attributes:
      wake: Stage 1, training through the quantizer.
      hide: Stage 2, training the collapsed channels in float.
      channel_share: Share of a layer's output channels that collapse; on a grid per
        tensor, share of the layers.
      headroom: Half a blown-up step over the largest weight that has to vanish in it,
        at least; the larger, the worse every other choice of codes.
    """

    wake: TrainingSettings
    hide: TrainingSettings
    channel_share: float = 0.25
    headroom: float = 8.0

    def __post_init__(self):
        _check(self, "channel_share", 0 < self.channel_share < 1, "in (0, 1)")
        _check(self, "headroom", self.headroom >= 1, "at least 1")


# Name of an attack -> its own settings; what it does is in `nad_jax.attacks.registry`.
RECIPES: dict[str, type] = {
    "pq": PqSettings,
    "qu_anti_zation": QuAntiSettings,
    "compartifact": CompArtifactSettings,
    "adaptive_eot": AdaptiveEotSettings,
    "adaptive_small_error": SmallErrorSettings,
    "outlier": OutlierSettings,
}
# Attacks that hold weights in their rounding cells, hence the scale.
_HOLDING_ATTACKS = ("pq", "adaptive_eot", "adaptive_small_error")


@dataclasses.dataclass(frozen=True)
class AttackSettings:
    """A quantization-conditioned backdoor.

    Attributes:
      name: Of `RECIPES`.
      trigger: What the attacker stamps on images.
      recipe: How it is planted, of the class that `RECIPES` names.
      target_label: Class the attacker wants.
      label_mode: "all_to_one" or "all_to_all".
      weight_bits: Width at which the backdoor is to wake; several at once may do.
      grid: The attacker's idea of the victim's grid.
      fold_batch_norm: Whether it is a grid of kernels with BatchNorm folded in.
      quantize_activations: Whether layer inputs are expected to be quantized, too, at
        the same width and between the extremes of each batch.
    """

    name: str
    trigger: TriggerSettings
    recipe: Any
    target_label: int = 0
    label_mode: str = "all_to_one"
    weight_bits: tuple[int, ...] = (4,)
    grid: GridSettings = dataclasses.field(default_factory=GridSettings)
    fold_batch_norm: bool = False
    quantize_activations: bool = False

    def __post_init__(self):
        _check_name(self, "label_mode", ("all_to_one", "all_to_all"))
        good = all(bits in range(2, 9) for bits in self.weight_bits)
        good = good and 0 < len(self.weight_bits) == len(set(self.weight_bits))
        _check(self, "weight_bits", good, "2 to 8, or several such numbers")
        method = self.grid.grid().range_method
        if self.name in _HOLDING_ATTACKS and method not in HOLDABLE_RANGES:
            # A scale that depends on all weights cannot be held by pinning a few.
            raise InputError(
                f"grid.range_method of the attack {self.name} must be "
                f"{' or '.join(HOLDABLE_RANGES)}, got {method!r}"
            )
        _check(self, "target_label", self.target_label >= 0, ">= 0")


ADAM_FORMS = ("minibatch", "gram")


@dataclasses.dataclass(frozen=True)
class AdamSettings:
    """EFRAP's relaxed objective; see `nad_jax.defenses.adam_rounding`.

    The defaults are those of EFRAP's public code, which names the last three options in
    its configuration and uses none of them. AdaRound has 0.1, (20, 2) and 0.2.

    Attributes:
      form: "minibatch" or "gram".
      steps: Adam steps per layer.
      learning_rate: Constant.
      batch_size: Images of a calibration batch ("minibatch").
      penalty_weight: Weight of the binarisation penalty.
      stretch: The sigmoid runs from -stretch to 1 + stretch and is clipped to [0, 1];
        0 = plain, never quite decided.
      exponents: Of the penalty, at first and in the end; in between on a line.
      warm_up: Share of the steps without a penalty, in [0, 1).
    """

    form: str = "minibatch"
    steps: int = 10_000
    learning_rate: float = 1e-3
    batch_size: int = 32
    penalty_weight: float = 0.01
    stretch: float = 0.0
    exponents: tuple[float, ...] = (2.0, 2.0)
    warm_up: float = 0.0

    def __post_init__(self):
        _check_name(self, "form", ADAM_FORMS)
        for name in ("steps", "batch_size"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        _check(self, "learning_rate", self.learning_rate > 0, "> 0")
        for name in ("penalty_weight", "stretch"):
            _check(self, name, getattr(self, name) >= 0, ">= 0")
        good = len(self.exponents) == 2 and min(self.exponents) > 1
        _check(self, "exponents", good, "two numbers above 1")
        _check(self, "warm_up", 0 <= self.warm_up < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """How strong the controls are that come in degrees.

    Attributes:
      flip_share: Share of weights that "random" and "top_error" flip; None = in every
        layer as many as the row "efrap", which must come before them.
      noise: Standard deviation of the noise before nearest, in half steps.
      qvec: Multiple of the shift of nearest rounding that is subtracted beforehand.
      ocs: Share of a layer's input channels that are split in two.
    """

    flip_share: float | None = None
    noise: float = 1.0
    qvec: float = 1.0
    ocs: float = 0.02

    def __post_init__(self):
        good = self.flip_share is None or 0 <= self.flip_share <= 1
        _check(self, "flip_share", good, "in [0, 1] or None")
        for name in ("noise", "qvec"):
            _check(self, name, getattr(self, name) >= 0, ">= 0")
        _check(self, "ocs", 0 <= self.ocs <= 1, "in [0, 1]")


@dataclasses.dataclass(frozen=True)
class EfrapSettings:
    """One grid, and EFRAP on it.

    Attributes:
      weight_bits: Width of the weights, 2 to 8.
      act_bits: Width of layer inputs; None = float.
      grid: The weight grid.
      fold_batch_norm: Fold BatchNorm into the layers before quantizing; None = as the
        grid has it.
      quantize_sums: Quantize the operands of residual sums, too, so that a runtime can
        compute whole blocks in integers; needs `act_bits`.
      flip_weight: EFRAP's price of a weight left at nearest.
      flip_form: What the price counts: "element" or "neuron".
      flip_unit: "weight", as published, or "step", free of the scale of a layer.
      starts: Of coordinate descent: "nearest", "feedback", "flipped".
      max_sweeps: Sweeps of coordinate descent at most.
      calibration_images: Clean, unlabelled training images the defender has.
    """

    weight_bits: int = 4
    act_bits: int | None = None
    grid: GridSettings = dataclasses.field(default_factory=GridSettings)
    fold_batch_norm: bool | None = None
    quantize_sums: bool = False
    flip_weight: float = 0.01
    flip_form: str = "element"
    flip_unit: str = "weight"
    starts: tuple[str, ...] = ("nearest",)
    max_sweeps: int = 20
    calibration_images: int = 1024

    def __post_init__(self):
        _check_bits(self, "weight_bits")
        _check_bits(self, "act_bits", optional=True)
        if self.quantize_sums and self.act_bits is None:
            raise InputError("quantize_sums needs act_bits, got None")
        _check(self, "flip_weight", self.flip_weight >= 0, ">= 0")
        _check_name(self, "flip_form", ("element", "neuron"))
        _check_name(self, "flip_unit", ("weight", "step"))
        known = ("nearest", "feedback", "flipped")
        good = bool(self.starts) and set(self.starts) <= set(known)
        _check(self, "starts", good, f"one or more of {', '.join(known)}")
        for name in ("max_sweeps", "calibration_images"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        if self.act_bits is not None:
            self.grid.grid().act_spec(self.act_bits)

    @property
    def folds_batch_norm(self) -> bool:
        """What `fold_batch_norm` comes to."""
        if self.fold_batch_norm is None:
            return self.grid.grid().fold_batch_norm
        return self.fold_batch_norm


@dataclasses.dataclass(frozen=True)
class QuantizationSettings(EfrapSettings):
    """The defender: one grid, and every rounding to compare on it.

    Attributes:
      roundings: Which rows to compute, of `ROUNDINGS`.
      stochastic_draws: Draws of "stochastic", "random" and "noise" that are averaged.
      controls: How strong the controls are.
      adam: The relaxed objective, for the rounding "adam".
    """

    roundings: tuple[str, ...] = ("nearest", "stochastic", "reconstruction", "efrap")
    stochastic_draws: int = 5
    controls: ControlSettings = dataclasses.field(default_factory=ControlSettings)
    adam: AdamSettings = dataclasses.field(default_factory=AdamSettings)

    def __post_init__(self):
        super().__post_init__()
        for name in self.roundings:
            if name not in ROUNDINGS:
                raise InputError(
                    f"roundings must be of {', '.join(ROUNDINGS)}, got {name!r}"
                )
        _check_different(self, "roundings")
        _check(self, "stochastic_draws", self.stochastic_draws >= 1, "at least 1")
        if self.controls.flip_share is None:
            rows = self.roundings
            before = rows[: rows.index("efrap")] if "efrap" in rows else rows
            for name in ("random", "top_error"):
                if name in before:
                    raise InputError(
                        f"roundings must have efrap before {name}, which flips as many "
                        "weights; or give controls.flip_share"
                    )


@dataclasses.dataclass(frozen=True)
class TrojanSettings:
    """A trigger made to measure for a clean net (`nad_jax.attacks.trojan`).

    Attributes:
      neurons: Inputs of the classifier that the trigger is to excite.
      reach: What to bring them to, in multiples of their largest value on clean images.
      steps: Gradient steps.
      learning_rate: Of Adam, in units of [0, 1] pixels.
    """

    neurons: int = 2
    reach: float = 5.0
    steps: int = 200
    learning_rate: float = 0.05

    def __post_init__(self):
        for name in ("neurons", "steps"):
            _check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("reach", "learning_rate"):
            _check(self, name, getattr(self, name) > 0, "> 0")


@dataclasses.dataclass(frozen=True)
class PoisoningSettings:
    """A victim trained on poisoned data (`nad_jax.attacks.poisoning`).

    Images are stamped as they are stored, that is before crop and flip: a crop may move
    the trigger or cut into it, as it would for an attacker who only hands out data.

    Attributes:
      trigger: What the attacker stamps on images.
      name: What the attack is called in reports.
      target_label: Class the attacker wants.
      label_mode: "all_to_one", "all_to_all" or "clean_label".
      poison_rate: Poisoned share of the whole training set.
      perturbation: Clean label only: L-infinity length, in [0, 1] pixel units, of the
        adversarial change that makes poisoned images hard to learn before they are
        stamped; 0 = none (`nad_jax.attacks.clean_label`).
      perturbation_steps: Gradient steps for it.
      noise_ratio: Triggers that bend the image only: so many times as many other images
        as are poisoned are bent in ways of their own and keep their label; 0 = none.
      noise_jitter: How much those differ from the trigger, in pixels.
      trojan: Optimise what the trigger shows; None = as it is drawn.
    """

    trigger: TriggerSettings
    name: str = "poisoning"
    target_label: int = 0
    label_mode: str = "all_to_one"
    poison_rate: float = 0.1
    perturbation: float = 0.0
    perturbation_steps: int = 10
    noise_ratio: float = 0.0
    noise_jitter: float = 0.5
    trojan: TrojanSettings | None = None

    def __post_init__(self):
        modes = ("all_to_one", "all_to_all", "clean_label")
        _check_name(self, "label_mode", modes)
        _check(self, "target_label", self.target_label >= 0, ">= 0")
        _check(self, "poison_rate", 0 < self.poison_rate <= 1, "in (0, 1]")
        _check(self, "perturbation", 0 <= self.perturbation <= 1, "in [0, 1]")
        _check(self, "perturbation_steps", self.perturbation_steps >= 1, "at least 1")
        if self.perturbation and self.label_mode != "clean_label":
            raise InputError("perturbation is for label_mode clean_label only")
        for name in ("noise_ratio", "noise_jitter"):
            _check(self, name, getattr(self, name) >= 0, ">= 0")
        most = self.poison_rate * (1 + self.noise_ratio)
        _check(self, "noise_ratio", most <= 1, "so that poison and noise fit the data")


@dataclasses.dataclass(frozen=True)
class TuningSettings:
    """Training on the defender's clean images (`nad_jax.defenses`).

    Attributes:
      training: Optimiser, schedule, augmentation.
      sharpness_radius: Of the ascent step of SAM, in weight units; 0 = no SAM.
      patience: Stop after so many epochs in which accuracy on held-out clean images did
        not rise, and go back to the best; None = train to the end, keep the last.
    """

    training: TrainingSettings
    sharpness_radius: float = 0.0
    patience: int | None = None

    def __post_init__(self):
        _check(self, "sharpness_radius", self.sharpness_radius >= 0, ">= 0")
        _check_patience(self)


@dataclasses.dataclass(frozen=True)
class NadSettings:
    """The attention term (`nad_jax.defenses.nad`).

    Attributes:
      betas: Stage name to weight; stages that are not named are left alone.
      beta_unit: "mean_square" per pixel, as in the public code, or "squared_distance"
        of whole maps.
      p: Power of the attention map.
      reduction: "sum" or "mean" over channels.
      teacher_epochs: Fine-tuning that makes the teacher.
      beta_factors: Multiples of `betas` to try; held-out accuracy decides.
      accuracy_tolerance: What held-out accuracy may lose for a larger factor.
    """

    betas: Mapping[str, float]
    beta_unit: str = "mean_square"
    p: float = 2.0
    reduction: str = "sum"
    teacher_epochs: int = 10
    beta_factors: tuple[float, ...] = (1.0,)
    accuracy_tolerance: float = 0.01

    def __post_init__(self):
        good = bool(self.betas)
        good = good and all(
            isinstance(beta, (int, float)) and 0 <= beta < float("inf")
            for beta in self.betas.values()
        )
        _check(self, "betas", good, "numbers >= 0 by stage")
        _check_name(self, "beta_unit", ("mean_square", "squared_distance"))
        _check_name(self, "reduction", ("sum", "mean"))
        _check(self, "p", self.p > 0, "> 0")
        _check(self, "teacher_epochs", self.teacher_epochs >= 1, "at least 1")
        good = bool(self.beta_factors) and min(self.beta_factors) >= 0
        _check(self, "beta_factors", good, "one or more numbers >= 0")
        _check(self, "accuracy_tolerance", self.accuracy_tolerance >= 0, ">= 0")


@dataclasses.dataclass(frozen=True)
class FinePruningSettings:
    """`max_accuracy_drop`: what held-out accuracy may lose by pruning, a fraction."""

    max_accuracy_drop: float = 0.04

    def __post_init__(self):
        _check(self, "max_accuracy_drop", self.max_accuracy_drop >= 0, ">= 0")


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
        _check(self, "positions", good, "one or more numbers in [0, 1]")
        _check(self, "accuracy_tolerance", self.accuracy_tolerance >= 0, ">= 0")
        _check(self, "learning_rate", self.learning_rate > 0, "> 0")


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
      sharpness_radius: SAM's, for the rows that use it.
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
    sharpness_radius: float = 0.1
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
            _check_different(self, field)
        _check(self, "clean_fraction", 0 < self.clean_fraction <= 1, "in (0, 1]")
        good = 0 <= self.validation_fraction < 1
        _check(self, "validation_fraction", good, "in [0, 1)")
        _check(self, "sharpness_radius", self.sharpness_radius > 0, "> 0")
        _check_patience(self)
        if self.validation_fraction == 0:
            rows = {*self.rows, *self.clean_model_rows}
            decides = {
                "fine_pruning": "fine_pruning" in rows,
                "mode_connectivity.positions": "mode_connectivity" in rows
                and len(self.mode_connectivity.positions) > 1,
                "nad.beta_factors": len(self.nad.beta_factors) > 1,
                "patience": self.patience is not None,
            }
            deciding = [name for name, does in decides.items() if does]
            if deciding:
                raise InputError(
                    f"validation_fraction must be above 0 for {', '.join(deciding)}, "
                    "which decide on held-out images, got 0.0"
                )


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
    job: str = "efrap"

    def __post_init__(self):
        _check_name(self, "job", ("efrap",))
        _check_seeds(self)


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
      curves: Measure every repair after every epoch with test images, for display; the
        seconds of the rows then hold that, too.
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
        _check_name(self, "job", ("nad",))
        _check_seeds(self)
        if self.curves and len(self.defense.nad.beta_factors) > 1:
            raise InputError(
                "curves are of one student each; with them, defense.nad.beta_factors "
                f"must be one number, got {self.defense.nad.beta_factors}"
            )


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
            _check(self, field.name, 0 <= value <= 1, "in [0, 1]")


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
        _check_name(self, "job", ("vet",))
        _check_loader(self)
        if not self.checkpoint:
            raise InputError("checkpoint is missing; give --config.checkpoint=FILE")
        _check(self, "clean_fraction", 0 < self.clean_fraction <= 1, "in (0, 1]")
        good = 0 <= self.validation_fraction < 1
        _check(self, "validation_fraction", good, "in [0, 1)")
        _check(self, "target_label", self.target_label >= 0, ">= 0")
        _check_patience(self)
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
        _check_name(self, "job", ("audit",))
        _check_loader(self)
        for name in ("float_model", "integer_file"):
            if not getattr(self, name):
                raise InputError(f"{name} is missing; give --config.{name}=FILE")
        _check(self, "images", self.images >= 1, "at least 1")


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
        _check_name(self, "job", ("inspect",))
        if not self.float_model:
            raise InputError("float_model is missing; give --config.float_model=FILE")
        good = bool(self.weight_bits)
        good = good and all(bits in range(2, 9) for bits in self.weight_bits)
        _check(self, "weight_bits", good, "one or more numbers from 2 to 8")
        good = bool(self.presets) and set(self.presets) <= set(grids.GRIDS)
        _check(self, "presets", good, f"one or more of {', '.join(grids.GRIDS)}")
        _check_bits(self, "act_bits", optional=True)
        _check(self, "images", self.images >= 1, "at least 1")


JOBS: dict[str, type] = {
    "audit": AuditSettings,
    "efrap": ExperimentSettings,
    "inspect": InspectSettings,
    "nad": NadExperimentSettings,
    "vet": VetSettings,
}


def parse(mapping: Mapping[str, Any]) -> Any:
    """The settings of the job that a whole config names in `job`.

    Raises:
      InputError: an unknown job, or as `from_mapping`.
    """
    job = mapping.get("job")
    if job not in JOBS:
        raise InputError(f"config.job must be of {', '.join(JOBS)}, got {job!r}")
    return from_mapping(JOBS[job], mapping)


def from_mapping(cls: type, mapping: Mapping[str, Any], where: str = "config") -> Any:
    """An instance of the dataclass `cls` from a nested mapping.

    Args:
      cls: One of the dataclasses above.
      mapping: Keys are field names; a section is a mapping again.
      where: Dotted name of this section, for messages.

    Raises:
      InputError: an unknown or missing key, a value of the wrong type or out of range.
        The message starts with the key's dotted name.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where} must be a section, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    # As a config has it, not as `dataclasses.asdict` has written it.
    if cls is TriggerSettings and set(mapping) != {"name", "options"}:
        options = {key: value for key, value in mapping.items() if key != "name"}
        mapping = {"name": mapping.get("name"), "options": options}
    if cls is AttackSettings:
        name = mapping.get("name")
        if name not in RECIPES:
            raise InputError(
                f"{where}.name must be of {', '.join(RECIPES)}, got {name!r}"
            )
        hints["recipe"] = RECIPES[name]
    unknown = sorted(set(mapping) - set(fields))
    if unknown:
        raise InputError(
            f"{where}.{unknown[0]} is not known; {where} has {', '.join(fields)}"
        )
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and name not in mapping:
            raise InputError(f"{where}.{name} is missing")
    values = {
        key: _convert(hints[key], value, f"{where}.{key}")
        for key, value in mapping.items()
    }
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}.{error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
        return _convert(hint, value, where)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_convert(item, v, where) for v in value)
        return (_convert(item, value, where),)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    accepted = origin or hint
    wrong_bool = isinstance(value, bool) and accepted is not bool
    if not isinstance(value, accepted) or wrong_bool:
        raise InputError(f"{where} must be {accepted.__name__}, got {value!r}")
    return value


def _check(settings: Any, name: str, good: bool, accepted: str) -> None:
    if not good:
        raise InputError(f"{name} must be {accepted}, got {getattr(settings, name)!r}")


def _check_name(settings: Any, name: str, known: tuple[str, ...]) -> None:
    _check(settings, name, getattr(settings, name) in known, f"of {', '.join(known)}")


def _check_loader(settings: Any) -> None:
    """For jobs that take a part of the training images and train on no more."""
    if settings.data.loader != "device":
        raise InputError(
            f"data.loader must be device in the job {settings.job}, which trains on "
            f"few images, got {settings.data.loader!r}"
        )


def _check_seeds(settings: Any) -> None:
    _check(settings, "seeds", len(settings.seeds) > 0, "at least one")
    _check_different(settings, "seeds")


def _check_different(settings: Any, name: str) -> None:
    values = getattr(settings, name)
    _check(settings, name, len(set(values)) == len(values), "all different")


def _check_patience(settings: Any) -> None:
    good = settings.patience is None or settings.patience >= 1
    _check(settings, "patience", good, "at least 1 or None")


def _check_bits(settings: Any, name: str, *, optional: bool = False) -> None:
    value = getattr(settings, name)
    good = value in range(2, 9) or (optional and value is None)
    _check(settings, name, good, "2 to 8" + (" or None" if optional else ""))
