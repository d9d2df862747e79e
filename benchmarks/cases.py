# SPDX-License-Identifier: Apache-2.0
"""What is compared: each case, our side of it, the PyTorch side in its variants.

A case is timed in one of three ways:

    units      both sides stay alive and do one unit of work in turn; the first unit,
               with compilation, is not counted
    processes  each run is a process of its own, from its start to its exit
    startup    each run is a process of its own, from its start to its first step

The shipped variants of PyTorch keep the layout of the references (NCHW); the tuned ones
use channels_last, a larger batch where the case allows one, and torch.compile.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from benchmarks import floors

TIMINGS = ("units", "processes", "startup")


@dataclasses.dataclass(frozen=True)
class Side:
    """One way of doing the work of a case.

    Attributes:
      variant: Its name in the results.
      task: Name of the task in `benchmarks.ours` or `benchmarks.theirs`.
      options: What the task is told; seconds are divided by `options["batches"]`, the
        number of units of the case that one unit of this side does at once.
      cold: Whether each run begins with an empty compile cache.
    """

    variant: str
    task: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cold: bool = False


@dataclasses.dataclass(frozen=True)
class Case:
    """A comparison.

    Attributes:
      name: Of the case and of its result file.
      timing: One of `TIMINGS`.
      unit: What one timing is of, in words.
      ours: Our sides; more than one where a choice of ours is compared, too.
      theirs: PyTorch's.
      work: What must be done at least for one unit; None = not counted.
      arch: Victim that `prepare` has to make for it; None = no files are needed.
    """

    name: str
    timing: str
    unit: str
    ours: tuple[Side, ...]
    theirs: tuple[Side, ...]
    work: floors.Work | None = None
    arch: str | None = None


def build(*, quick: bool = False, torch_steps: int = 200) -> dict[str, Case]:
    """All cases by name.

    Args:
      quick: Little work, to see that everything runs; the seconds mean nothing.
      torch_steps: How many of the 10,000 Adam steps of each layer the reference loop of
        EFRAP takes; the rest is extrapolated. 10,000 takes them all.
    """
    steps = 1 if quick else 10
    batch = 16 if quick else 64
    tests = 128 if quick else 10_000
    epochs = {"teacher_epochs": 1, "epochs": 2} if quick else {}
    calibration = 64 if quick else 1024
    step = {"arch": "wrn_16_1", "batch": batch, "steps": steps}
    unit = f"seconds a step of {batch} images, mean of {steps} steps"

    def tuned(task, options, *, compiled=True, large=True):
        last = {**options, "channels_last": True}
        sides = [Side("shipped", task, options), Side("channels_last", task, last)]
        if large:
            big = {**last, "batch": 4 * batch, "batches": 4}
            sides.append(Side(f"channels_last, batch {4 * batch}", task, big))
        if compiled:
            sides.append(
                Side("channels_last, compiled", task, {**last, "compiled": True})
            )
        return tuple(sides)

    def efrap(name, arch):
        options = {"arch": arch, "images": calibration}
        theirs = {**options, "measured_steps": min(2 if quick else torch_steps, 10_000)}
        return Case(
            name,
            "processes",
            "seconds from the start of the process to the rounded checkpoint",
            (Side("cache warm", "efrap", options),),
            tuned("efrap", theirs, compiled=False, large=False),
            # No method can do with less than a float and a quantized pass.
            work=floors.forward(arch, calibration).times(2),
            arch=arch,
        )

    cases = [
        Case(
            "nad_step",
            "units",
            unit,
            (
                Side("one step a program", "nad_step", step),
                Side(
                    "5 steps a program", "nad_step", {**step, "steps_per_dispatch": 5}
                ),
                Side("maps of 4 views kept", "nad_step", {**step, "views": 4}),
                Side(
                    "maps of 4 views kept, 5 steps a program",
                    "nad_step",
                    {**step, "views": 4, "steps_per_dispatch": 5},
                ),
            ),
            tuned("nad_step", step),
            work=floors.distillation("wrn_16_1", batch),
        ),
        Case(
            "erase",
            "processes",
            "seconds from the start of the process to the repaired checkpoint",
            (
                Side("cache warm", "erase", epochs),
                Side("cache cold", "erase", epochs, cold=True),
            ),
            tuned("erase", epochs, compiled=False, large=False),
            work=None
            if quick
            # 40 batches an epoch of the 2,500 images, as the reference counts them.
            else floors.training("wrn_16_1", 64).times(10 * 40)
            + floors.distillation("wrn_16_1", 64).times(20 * 40),
            arch="wrn_16_1",
        ),
        efrap("efrap_resnet_14", "resnet_14"),
        efrap("efrap_resnet_18", "resnet_18"),
        Case(
            "evaluation",
            "units",
            f"seconds for {tests} images",
            (Side("batch 125", "evaluation", {"arch": "wrn_16_1", "images": tests}),),
            (
                Side(
                    "shipped, batch 64",
                    "evaluation",
                    {"arch": "wrn_16_1", "images": tests, "batch": 64},
                ),
                Side(
                    "channels_last, batch 500",
                    "evaluation",
                    {
                        "arch": "wrn_16_1",
                        "images": tests,
                        "batch": 500,
                        "channels_last": True,
                    },
                ),
            ),
            work=floors.forward("wrn_16_1", tests),
        ),
        Case(
            "victim_step",
            "units",
            unit,
            (Side("one step a program", "victim_step", step),),
            tuned("victim_step", step),
            work=floors.training("wrn_16_1", batch),
        ),
        Case(
            "startup",
            "startup",
            "seconds from the start of the process to the end of the first NAD step",
            (
                Side("cache warm", "nad_step", {**step, "steps": 1}),
                Side("cache cold", "nad_step", {**step, "steps": 1}, cold=True),
            ),
            (Side("shipped", "nad_step", {**step, "steps": 1}),),
        ),
        Case(
            "help",
            "processes",
            "seconds of --help, from the start of the process to its exit",
            (Side("nad_jax.main --help", "help"),),
            (Side("argparse behind import torch", "help"),),
        ),
    ]
    return {case.name: case for case in cases}
