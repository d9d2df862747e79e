# SPDX-License-Identifier: Apache-2.0
"""How many epochs NAD needs: recipes over seeds, on one victim from outside.

    python -m benchmarks.erase_recipes --checkpoint=FILE --data_dir=DIR --out=FILE \\
        [--recipes=10+20,3+5,2+4] [--seeds=0,1,2]

A recipe is so many epochs of the teacher, "+", so many of the student, and perhaps "/"
and so many views of each image of which the teacher's maps are kept; everything else is
the recipe of configs/vet.py, with all images to train on and none held out. A seed
decides which 5 % of CIFAR-10 the defender has and the order of its images. ACC and ASR
are those of the `erase` case of `benchmarks.run`, which is where seconds are measured.
"""

import argparse
import dataclasses
import json
import pathlib
import re
from typing import Any

import jax

from benchmarks import results
from benchmarks.ours import files, start, whole
from nad_jax import settings
from nad_jax.data import sources
from nad_jax.defenses import base, nad

_CLEAN_FRACTION = 0.05


def measure(
    checkpoint: pathlib.Path, data_dir: str, recipes: list[str], seeds: list[int]
) -> list[dict[str, Any]]:
    """One entry for each recipe and seed."""
    config = whole.recipe_of_vet()
    train = sources.load("cifar10", split="train", data_dir=data_dir)
    test = sources.load("cifar10", split="test", data_dir=data_dir)
    converted = files.read_net(checkpoint, "wrn_16_1")
    victim = base.Net(converted.model, converted.variables)
    entries = [{"recipe": "victim", **files.rates(victim, test.images, test.labels)}]
    for recipe in recipes:
        teacher_epochs, epochs, views = _parse(recipe)
        for seed in seeds:
            clean_key, repair_key = jax.random.split(jax.random.key(seed))
            rows, none = base.clean_indices(
                clean_key,
                train.labels,
                fraction=_CLEAN_FRACTION,
                validation_fraction=0.0,
            )
            defended = nad.run(
                victim,
                base.clean_data(train, rows, none),
                settings.TuningSettings(
                    dataclasses.replace(config.training, epochs=epochs)
                ),
                dataclasses.replace(
                    config.nad, teacher_epochs=teacher_epochs, teacher_views=views
                ),
                key=repair_key,
            )
            repaired = base.Net(victim.model, defended.variables)
            after = files.rates(repaired, test.images, test.labels)
            entries.append({"recipe": recipe, "seed": seed, **after})
            print(json.dumps(entries[-1]), flush=True)
    return entries


def _parse(recipe: str) -> tuple[int, int, int]:
    """(epochs of the teacher, of the student, views) of "3+5" or "3+5/4"."""
    found = re.fullmatch(r"(\d+)\+(\d+)(?:/(\d+))?", recipe)
    if found is None:
        raise SystemExit(f"erase_recipes: a recipe is like 3+5 or 3+5/4, got {recipe}")
    return int(found[1]), int(found[2]), int(found[3] or 0)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=pathlib.Path, required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--recipes", default="10+20,3+5,2+4")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    recipes = arguments.recipes.split(",")
    for recipe in recipes:
        _parse(recipe)
    facts = start.facts()
    entries = measure(
        arguments.checkpoint,
        arguments.data_dir,
        recipes,
        [int(seed) for seed in arguments.seeds.split(",")],
    )
    report = {
        "command": "python -m benchmarks.erase_recipes --checkpoint=FILE "
        f"--data_dir=DIR --recipes={arguments.recipes} --seeds={arguments.seeds} "
        "--out=FILE",
        **facts,
        "table": results.over_seeds(entries, by=("recipe",)),
        "entries": entries,
    }
    results.write(arguments.out, report)


if __name__ == "__main__":
    main()
