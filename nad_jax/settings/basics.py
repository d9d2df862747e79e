# SPDX-License-Identifier: Apache-2.0
"""Settings of what every job has: data, model, training, grid, trigger."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nad_jax.core import grids
from nad_jax.errors import InputError
from nad_jax.settings.checks import check, check_name

LOADERS = ("device", "stream")
OPTIMIZERS = ("adam", "sgd")
SCHEDULES = ("constant", "cosine", "one_cycle", "steps")


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
        check_name(self, "loader", LOADERS)
        check(self, "workers", self.workers >= 0, ">= 0")
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
        check(self, "width", self.width > 0, "> 0")


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
            check(self, name, getattr(self, name) >= 1, "at least 1")
        check_name(self, "optimizer", OPTIMIZERS)
        check_name(self, "schedule", SCHEDULES)
        check(self, "learning_rate", self.learning_rate > 0, "> 0")
        check(self, "momentum", 0 <= self.momentum < 1, "in [0, 1)")
        check(self, "weight_decay", self.weight_decay >= 0, ">= 0")
        for name in ("crop_padding", "cutout"):
            check(self, name, getattr(self, name) >= 0, ">= 0")
        good = self.milestones == tuple(sorted(set(self.milestones)))
        good = good and min(self.milestones, default=1) >= 1
        check(self, "milestones", good, "ascending, from 1 on")
        check(self, "step_factor", self.step_factor > 0, "> 0")


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
        check_name(self, "preset", tuple(grids.GRIDS))
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

    def folds_batch_norm(self, wanted: bool | None) -> bool:
        """Whether BatchNorm is folded in: as wanted; None = as the name says."""
        return self.grid().fold_batch_norm if wanted is None else wanted


@dataclasses.dataclass(frozen=True)
class TriggerSettings:
    """Name of a trigger of `nad_jax.attacks.triggers` and its arguments."""

    name: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
