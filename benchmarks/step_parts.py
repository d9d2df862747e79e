# SPDX-License-Identifier: Apache-2.0
"""Where our NAD step spends its time: the step with one part taken out, or exchanged.

    python -m benchmarks.step_parts [--part="one device" ...] [--rounds=7] [--steps=10]

Each part is a process that stays alive; they take a few steps in turn, A B C A B C, as
in `benchmarks.run`. The table gives medians of wall and processor seconds a step and
their ratio to "plain", the step of a textbook on one device. Where the machine is busy
the processor seconds still mean something, the wall seconds do not.
"""

import argparse
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from benchmarks import cases, machine, protocol, results, run

_PLAIN = "plain"
# What a part is -> task and options. Every one but the plain ones goes through
# `base.tune` and `loop.fit`.
PARTS: dict[str, tuple[str, dict[str, Any]]] = {
    _PLAIN: ("plain_step", {"devices": 1}),
    "plain, split over two devices": ("plain_step", {"devices": 2}),
    "ours": ("nad_step", {"devices": 2}),
    "ours, one device": ("nad_step", {"devices": 1}),
    "ours, without augmentation": ("nad_step", {"devices": 2, "augmented": False}),
    "ours, teacher compiled in": ("nad_step", {"devices": 2, "carried": False}),
    "ours, textbook attention": ("nad_step", {"devices": 2, "attention": "plain"}),
    "ours, no teacher": ("nad_step", {"devices": 2, "attention": "none"}),
    "ours, BatchNorm fixed": ("nad_step", {"devices": 2, "fixed": "batch_norm"}),
    "ours, one device, BatchNorm fixed": (
        "nad_step",
        {"devices": 1, "fixed": "batch_norm"},
    ),
    "ours, stem fixed": ("nad_step", {"devices": 2, "fixed": "stem"}),
    "ours, 5 steps a program": ("nad_step", {"devices": 2, "steps_per_dispatch": 5}),
    "ours, one device, 5 steps a program": (
        "nad_step",
        {"devices": 1, "steps_per_dispatch": 5},
    ),
}


def measure(
    parts: Sequence[str],
    *,
    rounds: int,
    steps: int,
    quiet: run.Quiet,
    work: pathlib.Path,
) -> dict[str, dict[str, list[float]]]:
    """Part -> {"seconds", "cpu_seconds"}, a value for each round."""
    step = {"arch": "wrn_16_1", "batch": 64, "steps": steps}
    sides = {
        part: cases.Side(part, task, {**step, **options})
        for part, (task, options) in PARTS.items()
        if part in parts
    }
    case = cases.Case("step_parts", "units", "", tuple(sides.values()), ())
    bench = run.Bench(
        case,
        pythons={"ours": sys.executable},
        work=work,
        quiet=quiet,
        own_cache=False,
    )
    found = {part: {"seconds": [], "cpu_seconds": []} for part in sides}
    children: dict[str, protocol.Child] = {}
    try:
        for part, side in sides.items():
            children[part] = bench.start("ours", side)
            children[part].expect("ready")
        for _ in range(rounds):
            for part, child in children.items():
                done = quiet.run(child.go)
                for name, values in found[part].items():
                    values.append(done[name])
    finally:
        for child in children.values():
            child.kill()
    return found


def table(found: dict[str, dict[str, list[float]]]) -> str:
    """Medians, and ratios to the first part."""
    medians = {
        part: {name: statistics.median(series) for name, series in values.items()}
        for part, values in found.items()
    }
    first = next(iter(medians.values()))
    lines = ["| part | s a step | ratio | cpu s | ratio |", "|---|---:|---:|---:|---:|"]
    for part, values in medians.items():
        cells = [
            f"{values[name]:.4f} | {values[name] / first[name]:.2f}"
            for name in ("seconds", "cpu_seconds")
        ]
        lines.append(f"| {part} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 done, 2 refused, in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_parts")
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    run.add_quiet_options(parser)
    parser.add_argument("--out", type=pathlib.Path, default=run.RESULTS)
    arguments = parser.parse_args(argv)
    quiet = run.quiet_of(arguments)
    with tempfile.TemporaryDirectory(prefix="nad_jax_benchmark_") as work:
        try:
            quiet.wait()
            found = measure(
                arguments.part or list(PARTS),
                rounds=arguments.rounds,
                steps=arguments.steps,
                quiet=quiet,
                work=pathlib.Path(work),
            )
        except (run.Refused, protocol.SideFailed) as failure:
            print(f"benchmarks: {failure}", file=sys.stderr)
            return 2
    content = {
        "steps": arguments.steps,
        "machine": machine.describe(),
        "other_cores_worst": quiet.worst,
        "stolen_cores_worst": quiet.stolen,
        "parts": found,
    }
    results.write(arguments.out / "step_parts.json", content)
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
