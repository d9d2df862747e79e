# SPDX-License-Identifier: Apache-2.0
"""How often `nad_jax.inspect` suspects clean models, and how often backdoored ones.

    python -m nad_jax.main --config=configs/efrap.py --config.seeds='(0,1,2,3,4)' \\
        --config.defense.roundings="('nearest',)" --workdir=DIR
    python -m benchmarks.inspection_rates --workdir=DIR --out=FILE

Inspects the clean and the backdoored model of every seed of a finished run, on the grid
of its defence. The numbers behind the limits in `defenses.rounding_inspection`.
"""

import argparse
import json
import pathlib

import jax
import numpy as np

from benchmarks import finished_run, results
from nad_jax import roundings
from nad_jax.defenses import rounding_inspection


def inspect_run(workdir: pathlib.Path, num_images: int) -> list[dict]:
    """One entry for each model."""
    config, scene = finished_run.read(workdir)
    entries = []
    for seed in config.seeds:
        images = roundings.calibration_images(
            scene.train, num_images, jax.random.key(seed)
        )
        for name in ("clean", "backdoored"):
            found = rounding_inspection.inspect(
                scene.model,
                finished_run.variables(workdir, scene, seed, name),
                images,
                weight_bits=config.defense.weight_bits,
                act_bits=config.defense.act_bits,
                grid=config.defense.grid.grid(),
                apply_kwargs=roundings.EVAL,
            )
            entries.append(
                {
                    "seed": seed,
                    "model": name,
                    "score": found.score,
                    "tie_ratio": found.tie_ratio,
                    "tie_limit": found.tie_limit,
                    "outlier_ratio": found.outlier_ratio,
                    "drift": found.drift,
                    "drift_by_chance": found.drift_by_chance,
                }
            )
            print(json.dumps(entries[-1]), flush=True)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--images", type=int, default=512)
    arguments = parser.parse_args()
    entries = inspect_run(arguments.workdir, arguments.images)

    def rate(name):
        return float(np.mean([e["score"] > 1 for e in entries if e["model"] == name]))

    report = {
        "limits": {
            "tie_ratio": rounding_inspection.TIE_LIMIT,
            "drift_ratio": rounding_inspection.DRIFT_LIMIT,
            "outlier_ratio": rounding_inspection.OUTLIER_LIMIT,
        },
        "false_alarm_rate": rate("clean"),
        "detection_rate": rate("backdoored"),
        "models": entries,
    }
    results.write(arguments.out, report)


if __name__ == "__main__":
    main()
