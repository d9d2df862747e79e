# SPDX-License-Identifier: Apache-2.0
"""How often `nad_jax.inspect` suspects clean models, and how often backdoored ones.

    python -m nad_jax.main --config=configs/efrap.py:ATTACK --workdir=DIR \\
        --config.seeds='(3,4,5,6,7)' --config.defense.roundings="('nearest',)"
    python -m benchmarks.inspection_rates --workdirs DIR ... --seeds 5 6 7 --out=FILE

Inspects the clean and the backdoored models of finished runs on the grid of their
defence, at its width and at 8 and 4 bits. The limits in `defenses.rounding_inspection`
may be set by looking at any seed but `--seeds`, of which alone the rates are.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import finished_run, results
from nad_jax import roundings
from nad_jax.defenses import rounding_inspection


def inspect_run(workdir: pathlib.Path, num_images: int) -> list[dict[str, Any]]:
    """One entry for each model and width."""
    config, scene = finished_run.read(workdir)
    entries = []
    for seed in config.seeds:
        images = roundings.calibration_images(
            scene.train, num_images, jax.random.key(seed)
        )
        for name in ("clean", "backdoored"):
            variables = finished_run.variables(workdir, scene, seed, name)
            for bits in sorted({4, 8, config.defense.weight_bits}):
                found = rounding_inspection.inspect(
                    scene.model,
                    variables,
                    images,
                    weight_bits=bits,
                    act_bits=config.defense.act_bits,
                    grid=config.defense.grid.grid(),
                    apply_kwargs=roundings.EVAL,
                )
                entries.append(
                    {
                        "attack": config.attack.name,
                        "attacked_bits": list(config.attack.weight_bits),
                        "seed": seed,
                        "model": name,
                        "bits": bits,
                        "score": found.score,
                        "tie_ratio": found.tie_ratio,
                        "tie_limit": found.tie_limit,
                        "outlier_ratio": found.outlier_ratio,
                        "drift": found.drift,
                        "drift_by_chance": found.drift_by_chance,
                        "drift_ratio": found.drift_ratio,
                    }
                )
                print(json.dumps(entries[-1]), flush=True)
    return entries


def alarm_rates(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Which models -> share of them suspected at any width, and how many there are.

    The clean models of all runs with one seed and width are one model.
    """
    scores: dict[str, dict[Any, float]] = {}
    for entry in entries:
        kind, which = "clean", (entry["seed"],)
        if entry["model"] == "backdoored":
            bits = "+".join(f"W{bits}" for bits in entry["attacked_bits"])
            kind = f"{entry['attack']} {bits}"
        group = scores.setdefault(kind, {})
        group[which] = max(group.get(which, 0.0), entry["score"])
    return {
        kind: {
            "models": len(group),
            "suspected": float(np.mean([score > 1 for score in group.values()])),
        }
        for kind, group in scores.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdirs", type=pathlib.Path, nargs="+", required=True)
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=512)
    arguments = parser.parse_args()
    entries = [
        entry
        for workdir in arguments.workdirs
        for entry in inspect_run(workdir, arguments.images)
    ]
    report = {
        "limits": {
            "tie_ratio": rounding_inspection.TIE_LIMIT,
            "drift_ratio": rounding_inspection.DRIFT_LIMIT,
            "outlier_ratio": rounding_inspection.OUTLIER_LIMIT,
        },
        "seeds": arguments.seeds,
        "alarms": alarm_rates(
            [entry for entry in entries if entry["seed"] in arguments.seeds]
        ),
        "models": entries,
    }
    results.write(arguments.out, report)


if __name__ == "__main__":
    main()
