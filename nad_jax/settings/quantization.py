# SPDX-License-Identifier: Apache-2.0
"""Settings of the defender who rounds: one grid, and the roundings on it."""

import dataclasses
import math

from nad_jax.errors import InputError
from nad_jax.settings.basics import GridSettings
from nad_jax.settings.checks import check, check_bits, check_different, check_name

# Roundings that look at nothing but the weights.
BLIND_ROUNDINGS = (
    "nearest",
    "floor",
    "ceil",
    "flipped",
    "stochastic",
    "random",
    "top_error",
    "noise",
)
ROUNDINGS = (
    *BLIND_ROUNDINGS,
    "qvec",
    "omse",
    "aciq",
    "ocs",
    "gptq",
    "adaround",
    "reconstruction",
    "efrap",
    "efrap_chosen",
    "adam",
)
# Those that may come in several strengths at once, one row each.
IN_DEGREES = ("noise", "qvec")
# Far above where every weight flips that can; a sum of such prices is still finite.
_MAX_FLIP_WEIGHT = 1e6
ADAM_FORMS = ("minibatch", "gram")


@dataclasses.dataclass(frozen=True)
class AdamSettings:
    """EFRAP's relaxed objective; see `nad_jax.defenses.adam_rounding`.

    The defaults are those of EFRAP's public code, which names the last three options in
    its configuration and uses none of them. AdaRound has 0.1, (20, 2) and 0.2: the row
    "adaround" always does, whatever `stretch`, `exponents` and `warm_up` say here, and
    takes the rest as it is; the row "adam" takes all.

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
      beside_descent: Whether each layer's report tells, too, what coordinate descent
        reaches on the same inputs (`objective_descent`); its time counts, then.
    """

    form: str = "minibatch"
    steps: int = 10_000
    learning_rate: float = 1e-3
    batch_size: int = 32
    penalty_weight: float = 0.01
    stretch: float = 0.0
    exponents: tuple[float, ...] = (2.0, 2.0)
    warm_up: float = 0.0
    beside_descent: bool = False

    def __post_init__(self):
        check_name(self, "form", ADAM_FORMS)
        for name in ("steps", "batch_size"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        check(self, "learning_rate", self.learning_rate > 0, "> 0")
        for name in ("penalty_weight", "stretch"):
            check(self, name, getattr(self, name) >= 0, ">= 0")
        good = len(self.exponents) == 2 and min(self.exponents) > 1
        check(self, "exponents", good, "two numbers above 1")
        check(self, "warm_up", 0 <= self.warm_up < 1, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class ControlSettings:
    """How strong the controls are that come in degrees.

    Attributes:
      flip_share: Share of weights that "random" and "top_error" flip; None = in every
        layer as many as the row "efrap", which must come before them.
      noise: Standard deviations of the noise before nearest, in half steps.
      qvec: Multiples of the shift of nearest rounding that is subtracted beforehand.
      ocs: Share of a layer's input channels that are split in two.
    """

    flip_share: float | None = None
    noise: tuple[float, ...] = (0.5, 1.0)
    qvec: tuple[float, ...] = (0.5, 1.0, 2.0)
    ocs: float = 0.02

    def __post_init__(self):
        good = self.flip_share is None or 0 <= self.flip_share <= 1
        check(self, "flip_share", good, "in [0, 1] or None")
        for name in IN_DEGREES:
            strengths = getattr(self, name)
            good = bool(strengths) and all(0 <= s < math.inf for s in strengths)
            check(self, name, good, "one or more finite numbers >= 0")
            check_different(self, name)
        check(self, "ocs", 0 <= self.ocs <= 1, "in [0, 1]")

    def rows(self, rounding: str) -> list[tuple[str, float | None]]:
        """Name and strength of each row that one of `ROUNDINGS` makes.

        Those of `IN_DEGREES` say the strength in the name; others have none here.
        """
        if rounding not in IN_DEGREES:
            return [(rounding, None)]
        strengths = getattr(self, rounding)
        return [(f"{rounding}_{strength}", strength) for strength in strengths]


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
      flip_weight: EFRAP's price of a weight left at nearest, in [0, 1e6].
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
        check_bits(self, "weight_bits")
        check_bits(self, "act_bits", optional=True)
        if self.quantize_sums and self.act_bits is None:
            raise InputError("quantize_sums needs act_bits, got None")
        good = 0 <= self.flip_weight <= _MAX_FLIP_WEIGHT
        check(self, "flip_weight", good, f"in [0, {_MAX_FLIP_WEIGHT:.0f}]")
        check_name(self, "flip_form", ("element", "neuron"))
        check_name(self, "flip_unit", ("weight", "step"))
        known = ("nearest", "feedback", "flipped")
        good = bool(self.starts) and set(self.starts) <= set(known)
        check(self, "starts", good, f"one or more of {', '.join(known)}")
        for name in ("max_sweeps", "calibration_images"):
            check(self, name, getattr(self, name) >= 1, "at least 1")
        if self.act_bits is not None:
            self.grid.grid().act_spec(self.act_bits)

    @property
    def folds_batch_norm(self) -> bool:
        """What `fold_batch_norm` comes to."""
        return self.grid.folds_batch_norm(self.fold_batch_norm)


@dataclasses.dataclass(frozen=True)
class QuantizationSettings(EfrapSettings):
    """The defender: one grid, and every rounding to compare on it.

    Attributes:
      roundings: Which rows to compute, of `ROUNDINGS`.
      stochastic_draws: Draws of "stochastic", "random" and "noise" that are averaged.
      flip_weight_path: Further flip weights that "efrap" solves each layer with, to
        tell what they cost.
      controls: How strong the controls are.
      adam: The relaxed objective, for the rounding "adam".
    """

    roundings: tuple[str, ...] = ("nearest", "stochastic", "reconstruction", "efrap")
    stochastic_draws: int = 10
    flip_weight_path: tuple[float, ...] = ()
    controls: ControlSettings = dataclasses.field(default_factory=ControlSettings)
    adam: AdamSettings = dataclasses.field(default_factory=AdamSettings)

    def __post_init__(self):
        super().__post_init__()
        for name in self.roundings:
            if name not in ROUNDINGS:
                raise InputError(
                    f"roundings must be of {', '.join(ROUNDINGS)}, got {name!r}"
                )
        check_different(self, "roundings")
        good = all(0 <= w <= _MAX_FLIP_WEIGHT for w in self.flip_weight_path)
        accepted = f"numbers in [0, {_MAX_FLIP_WEIGHT:.0f}]"
        check(self, "flip_weight_path", good, accepted)
        check(self, "stochastic_draws", self.stochastic_draws >= 1, "at least 1")
        if self.controls.flip_share is None:
            rows = self.roundings
            before = rows[: rows.index("efrap")] if "efrap" in rows else rows
            for name in ("random", "top_error"):
                if name in before:
                    raise InputError(
                        f"roundings must have efrap before {name}, which flips as many "
                        "weights; or give controls.flip_share"
                    )
