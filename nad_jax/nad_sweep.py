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
import tempfile
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
    for path, config in plan(base, attacks, grid, labels).items():
        report = _run(config, path, should_stop)
        if config.victim_workdir is not None:
            cells.append(cell(report))
    return cells


def plan(
    base: settings.NadExperimentSettings,
    attacks: Mapping[str, Any],
    grid: Any,
    labels: np.ndarray,
) -> dict[pathlib.Path, settings.NadExperimentSettings]:
    """Every run by its folder, in order: victims, and then the cells that share them.

    All of it before the first run, so that a mistake is known before hours are spent.

    Args:
      base: As for `sweep`.
      attacks: As for `sweep`.
      grid: As for `sweep`.
      labels: Of the training images.

    Raises:
      InputError: a rate or a fraction is out of range, or two share a folder.
    """
    runs: dict[pathlib.Path, settings.NadExperimentSettings] = {}

    def add(path, config):
        if path in runs:
            raise errors.InputError(
                f"two runs would share the folder {path}; poison rates and clean "
                "fractions must differ in their first six digits, got "
                f"{grid.poison_rates} and {grid.clean_fractions}"
            )
        runs[path] = config

    for name, attack in attacks.items():
        for rate in _rates(attack, grid.poison_rates, labels):
            config = dataclasses.replace(
                base, attack=dataclasses.replace(attack, poison_rate=rate)
            )
            home = grid.workdir / f"{name}-{rate:g}"
            victims = home / "victims"
            add(victims, _with_rows(config, ()))
            for fraction in grid.clean_fractions:
                repaired = dataclasses.replace(
                    _with_rows(config, _ROWS, fraction), victim_workdir=str(victims)
                )
                add(home / f"clean-{fraction:g}", repaired)
    return runs


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
    # Nobody looks at the page of a cell.
    return dataclasses.replace(config, defense=defense, curves=False)


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


def _several(kind: Callable[[str], Any], accepted: str) -> Callable[[str], Any]:
    """Reads values with commas between them.

    Args:
      kind: Reads one of them, or raises ValueError.
      accepted: What they must be, for the message.
    """

    def parse(text):
        parts = text.split(",")
        try:
            values = tuple(map(kind, parts))
        except ValueError:
            values = ()
        if not values or "" in parts or len(set(values)) < len(values):
            raise argparse.ArgumentTypeError(
                f"must be {accepted}, with commas between them, each once, got {text!r}"
            )
        return values

    return parse


def _check_out(out: pathlib.Path) -> None:
    """Raises InputError unless the result and its drawing can be written; see above."""
    if out.suffix == ".svg":
        raise errors.InputError(
            f"--out must not end in .svg, the name of the drawing, got {str(out)!r}"
        )
    if not out.name or any(p.is_dir() for p in (out, out.with_suffix(".svg"))):
        raise errors.InputError(
            f"--out must be a file, and so its drawing (.svg), got {str(out)!r}, where "
            "a folder is"
        )
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # What a folder's mode says is not all there is to it.
        with tempfile.TemporaryFile(dir=out.parent):
            pass
    except OSError as error:
        raise errors.InputError(
            f"--out must be in a folder that can be written, got {str(out)!r}: "
            f"{error.strerror or error}"
        ) from None


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
    names = _several(str, "names of attacks")
    shares = _several(float, "numbers in (0, 1]")
    seeds = _several(int, "integers from 0 on")
    parser.add_argument("--attacks", type=names, default=tuple(attacks.split(",")))
    parser.add_argument("--poison_rates", type=shares, default=(0.1, 0.01))
    parser.add_argument(
        "--clean_fractions", type=shares, default=(0.01, 0.02, 0.05, 0.1)
    )
    parser.add_argument("--seeds", type=seeds, default=(0, 1, 2))
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
    _check_out(arguments.out)
    changes = {"seeds": arguments.seeds}
    if arguments.data_dir is not None:
        changes["data.data_dir"] = arguments.data_dir
    scale = arguments.variant
    base = _config(scale, changes)
    program.check_place(base.data)
    chosen = {}
    for name in arguments.attacks:
        attack = _config("+".join(filter(None, (scale, name))), changes).attack
        # A scale is no attack, and neither are several parts of a variant.
        if base.zoo is None and attack.name != name:
            raise errors.InputError(f"--attacks must name attacks, got {name!r}")
        chosen[name] = attack
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
