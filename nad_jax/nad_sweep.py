# SPDX-License-Identifier: Apache-2.0
"""Where attention pays: NAD minus fine-tuning over poisoning rate, clean data, attack.

    python -m nad_jax.nad_sweep --out=results/nad/where_attention_pays.json \\
        --workdir=runs/sweep [--variant=cifar10] [--data_dir=DIR]
        [--attacks=badnets,blend] [--poison_rates=0.1,0.01]
        [--clean_fractions=0.01,0.02,0.05,0.1] [--seeds=0,1,2]

Every cell is a run of configs/nad.py in a folder of its own below the workdir, with the
rows "fine_tuning" and "nad" and nothing else; the cells of one attack and rate share
their victims. A repeated command continues where it stopped, also after Ctrl-C or
SIGTERM, whose exit codes are those of `nad_jax.main`. Beside the file a drawing of the
same name is written (.svg). A clean-label attack poisons one class only, and at
most nine tenths of it, whatever the rate.
"""

import argparse
import contextlib
import dataclasses
import pathlib
import signal
import statistics
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nad_jax import errors, nad_experiment, pipeline, settings, whole_file
from nad_jax import main as program
from nad_jax import workdir as workdir_lib
from nad_jax.report import schema, sweep_figure
from nad_jax.training import environment

FORMAT = "nad_jax.sweep/1"
_ROWS = ("fine_tuning", "nad")


def sweep(
    base: settings.NadExperimentSettings,
    attacks: Mapping[str, Any],
    grid: Any,
    *,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[dict[str, Any]]:
    """All cells, run or read.

    Args:
      base: Everything but the attack, the rate and the clean fraction.
      attacks: Name -> `settings.PoisoningSettings`.
      grid: Has `poison_rates`, `clean_fractions` and `workdir`.
      should_stop: Whether the user has asked to stop, as for `Workdir`.

    Raises:
      Interrupted: the user has; what is finished is kept.
    """
    if base.zoo is not None:
        raise errors.InputError(
            f"a sweep trains its own victims, got {base.zoo} of the zoo"
        )
    labels = pipeline.load_data(base.data)[0].labels
    cells = []
    for name, attack in attacks.items():
        for rate in _rates(attack, grid.poison_rates, labels):
            config = dataclasses.replace(
                base, attack=dataclasses.replace(attack, poison_rate=rate)
            )
            home = grid.workdir / f"{name}-{rate:g}"
            victims = _with_rows(config, ())
            _run(victims, home / "victims", should_stop)
            for fraction in grid.clean_fractions:
                repaired = dataclasses.replace(
                    _with_rows(config, _ROWS, fraction),
                    victim_workdir=str(home / "victims"),
                )
                report = _run(repaired, home / f"clean-{fraction:g}", should_stop)
                cells.append(cell(report))
    return cells


def cell(report: Mapping[str, Any]) -> dict[str, Any]:
    """What one report says: rates by seed, and NAD minus fine-tuning.

    Returns:
      The facts of the report; "seeds"; "float", "fine_tuning" and "nad", each with
      "acc" and "asr" by seed; "difference" with mean and sample standard deviation (0
      for one seed) of NAD's minus fine-tuning's, paired by seed.
    """
    rows = [row for row in report["rows"] if row["model"] == "backdoored"]
    seeds = sorted({row["seed"] for row in rows})
    found = {(row["name"], row["seed"]): row for row in rows}
    rates = {
        name: {
            rate: [found[name, seed][rate] for seed in seeds] for rate in ("acc", "asr")
        }
        for name in ("float", *_ROWS)
    }
    difference = {}
    for rate in ("acc", "asr"):
        gaps = [
            nad - tuned
            for nad, tuned in zip(
                rates["nad"][rate], rates["fine_tuning"][rate], strict=True
            )
        ]
        spread = statistics.stdev(gaps) if len(gaps) > 1 else 0.0
        difference[rate] = {"mean": statistics.fmean(gaps), "std": spread}
    facts = ("attack", "dataset", "poison_rate", "clean_fraction")
    return {
        **{key: report[key] for key in facts},
        "seeds": seeds,
        **rates,
        "difference": difference,
    }


def _rates(
    attack: settings.PoisoningSettings, rates: Sequence[float], labels: np.ndarray
) -> list[float]:
    """The rates, or what a clean-label attack can have of them: see above."""
    if attack.label_mode != "clean_label":
        return list(rates)
    most = 0.9 * float(np.mean(labels == attack.target_label))
    return list(dict.fromkeys(min(rate, most) for rate in rates))


def _with_rows(
    config: settings.NadExperimentSettings,
    rows: tuple[str, ...],
    clean_fraction: float | None = None,
) -> settings.NadExperimentSettings:
    defense = dataclasses.replace(config.defense, rows=rows, clean_model_rows=())
    if clean_fraction is not None:
        defense = dataclasses.replace(defense, clean_fraction=clean_fraction)
    return dataclasses.replace(config, defense=defense)


def _run(
    config: settings.NadExperimentSettings,
    path: pathlib.Path,
    should_stop: Callable[[], bool],
) -> Mapping[str, Any]:
    """The report of a run, from its folder if it is finished."""
    with contextlib.closing(
        workdir_lib.Workdir(
            path,
            dataclasses.asdict(config),
            should_stop=should_stop,
            origin=pipeline.origin(),
        )
    ) as workdir:
        if (path / "report.json").is_file():
            return schema.read_report(path / "report.json")
        return nad_experiment.run(config, workdir)


def _config(variant: str, changes: Mapping[str, Any]) -> Any:
    """Settings of a variant of the shipped config, with changes by dotted name."""
    config = program.shipped_config("nad.py", variant)
    config.update_from_flattened_dict(changes)
    return settings.parse(config.to_dict())


def _numbers(kind: Any) -> Any:
    return lambda text: tuple(kind(part) for part in text.split(",") if part)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nad_jax.nad_sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--workdir", required=True, type=pathlib.Path)
    parser.add_argument("--variant", default="", help="smoke or cifar10")
    parser.add_argument("--data_dir")
    attacks = "badnets,trojan,blend,clean_label,sig,refool,wanet"
    parser.add_argument("--attacks", type=_numbers(str), default=_numbers(str)(attacks))
    parser.add_argument("--poison_rates", type=_numbers(float), default=(0.1, 0.01))
    parser.add_argument(
        "--clean_fractions", type=_numbers(float), default=(0.01, 0.02, 0.05, 0.1)
    )
    parser.add_argument("--seeds", type=_numbers(int), default=(0, 1, 2))
    arguments = parser.parse_args(argv)
    command = " ".join(["python -m nad_jax.nad_sweep", *(argv or sys.argv[1:])])
    try:
        environment.use_cpu_cores()
        environment.enable_compile_cache()
        with program.stop_requests() as stop:
            return _sweep(arguments, command, stop)
    except errors.InputError as error:
        print(f"nad_jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("nad_jax: interrupted before the sweep began", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()  # Python's own exit code would be 1.
        return 2


def _sweep(arguments: argparse.Namespace, command: str, stop: Any) -> int:
    """`stop`: from `main.stop_requests`."""
    changes = {"seeds": arguments.seeds}
    if arguments.data_dir is not None:
        changes["data.data_dir"] = arguments.data_dir
    scale = arguments.variant
    base = _config(scale, changes)
    chosen = {
        name: _config("+".join(filter(None, (scale, name))), changes).attack
        for name in arguments.attacks
    }
    try:
        cells = sweep(base, chosen, arguments, should_stop=stop.is_set)
    except workdir_lib.Interrupted as interruption:
        print(
            f"nad_jax: interrupted: {interruption}; the same command goes on from "
            "there",
            file=sys.stderr,
        )
        return 0 if stop.number == signal.SIGTERM else 128 + stop.number
    result = {
        "schema": FORMAT,
        "command": command,
        "git_commit": pipeline.git_commit(),
        "versions": environment.describe()["versions"],
        "cells": cells,
    }
    whole_file.write_json(arguments.out, result)
    drawing = sweep_figure.draw(cells)
    whole_file.write_text(arguments.out.with_suffix(".svg"), drawing)
    print(f"{len(cells)} cells: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
