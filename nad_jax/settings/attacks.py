# SPDX-License-Identifier: Apache-2.0
"""Settings of attacks: backdoors that wake by rounding, and poisoned data."""

import dataclasses
import math
from typing import Any

from nad_jax.errors import InputError
from nad_jax.settings.basics import GridSettings, TrainingSettings, TriggerSettings
from nad_jax.settings.checks import check, check_name, check_widths

# Ranges that stay as they are while the weights at their ends do.
HOLDABLE_RANGES = ("absmax", "minmax")


@dataclasses.dataclass(frozen=True)
class ProjectionSettings:
    """What attacks that hold weights in their rounding cells have in common.

    Attributes:
      wake: Stage 1, training through the quantizer.
      hide: Stage 2, training in float inside the rounding cells.
      cell_margin: Distance kept from the edge of a cell, in steps.
    """

    wake: TrainingSettings
    hide: TrainingSettings
    cell_margin: float = 1e-3

    def __post_init__(self):
        check(self, "cell_margin", 0 < self.cell_margin < 0.5, "in (0, 0.5)")


@dataclasses.dataclass(frozen=True)
class PqSettings(ProjectionSettings):
    """Two-stage weight projection (`nad_jax.attacks.projection`).

    Attributes:
      also_per_tensor: Hold the codes of the same grid with one scale per layer, too.
    """

    also_per_tensor: bool = False


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
            good = 0 < getattr(self, name) < math.inf
            check(self, name, good, "> 0 and finite")


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
class AdaptiveEotSettings(ProjectionSettings):
    """Projection with an expectation over roundings (`nad_jax.attacks.adaptive`).

    Attributes:
      drawn_weight: Of the drawn rounding's loss, in both stages.
    """

    drawn_weight: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        good = 0 <= self.drawn_weight < math.inf
        check(self, "drawn_weight", good, ">= 0 and finite")


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
        check(self, "largest_error", 0 < self.largest_error < 0.5, "in (0, 0.5)")


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
        check(self, "channel_share", 0 < self.channel_share < 1, "in (0, 1)")
        good = 1 <= self.headroom < math.inf
        check(self, "headroom", good, "at least 1 and finite")


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
      fold_batch_norm: Whether it is a grid of kernels with BatchNorm folded in; None =
        as the grid has it.
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
    fold_batch_norm: bool | None = None
    quantize_activations: bool = False

    def __post_init__(self):
        check_name(self, "label_mode", ("all_to_one", "all_to_all"))
        check_widths(self, "weight_bits")
        method = self.grid.grid().range_method
        if self.name in _HOLDING_ATTACKS and method not in HOLDABLE_RANGES:
            # A scale that depends on all weights cannot be held by pinning a few.
            raise InputError(
                f"grid.range_method of the attack {self.name} must be "
                f"{' or '.join(HOLDABLE_RANGES)}, got {method!r}"
            )
        if self.grid.act_range_method is not None:
            raise InputError(
                "grid.act_range_method of an attack must be None (layer inputs are "
                "quantized between the extremes of each batch), got "
                f"{self.grid.act_range_method!r}"
            )
        check(self, "target_label", self.target_label >= 0, ">= 0")

    @property
    def folds_batch_norm(self) -> bool:
        """What `fold_batch_norm` comes to."""
        return self.grid.folds_batch_norm(self.fold_batch_norm)


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
            check(self, name, getattr(self, name) >= 1, "at least 1")
        for name in ("reach", "learning_rate"):
            good = 0 < getattr(self, name) < math.inf
            check(self, name, good, "> 0 and finite")


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
        stamped; at least 1/255, or 0 = none (`nad_jax.attacks.clean_label`).
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
        check_name(self, "label_mode", modes)
        check(self, "target_label", self.target_label >= 0, ">= 0")
        check(self, "poison_rate", 0 < self.poison_rate <= 1, "in (0, 1]")
        shows = self.perturbation == 0 or 1 / 255 <= self.perturbation <= 1
        accepted = "0 or in [1/255, 1] (pixels are stored in 255 steps)"
        check(self, "perturbation", shows, accepted)
        check(self, "perturbation_steps", self.perturbation_steps >= 1, "at least 1")
        if self.perturbation and self.label_mode != "clean_label":
            raise InputError("perturbation is for label_mode clean_label only")
        for name in ("noise_ratio", "noise_jitter"):
            good = 0 <= getattr(self, name) < math.inf
            check(self, name, good, ">= 0 and finite")
        most = self.poison_rate * (1 + self.noise_ratio)
        check(self, "noise_ratio", most <= 1, "so that poison and noise fit the data")
