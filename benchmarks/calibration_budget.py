# SPDX-License-Identifier: Apache-2.0
"""EFRAP with fewer calibration images, and with images that have nothing to do with it.

    python -m nad_jax.main --config=configs/efrap.py \\
        --config.seeds='(0,1,2)' --workdir=DIR
    python -m benchmarks.calibration_budget --workdir=DIR --out=FILE

Takes the backdoored models of a finished run and its defence as configured, but for the
images: the first 1,024, 256, 64 and 16 of the same draw; uniform noise; the images with
their pixels shuffled (colours right, shapes gone); and, if `--other` names a data set,
images of that. Reconstruction (flip weight 0) stands beside each.
"""

import argparse
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import finished_run, results
from nad_jax import roundings
from nad_jax.data import sources
from nad_jax.defenses import efrap as efrap_lib

_COUNTS = (1024, 256, 64, 16)
_METHODS = {"efrap": None, "reconstruction": 0.0}


def image_sets(
    train: sources.Dataset, key: jax.Array, other: sources.Dataset | None
) -> dict[str, jax.Array]:
    """Name -> float images `[n, H, W, C]`."""
    images = roundings.calibration_images(train, _COUNTS[0], key)
    generator = np.random.default_rng(int(jax.random.key_data(key)[-1]))
    noise = generator.random(images.shape, np.float32)
    pixels = np.asarray(images).reshape(len(images), -1, images.shape[-1])
    shuffled = generator.permuted(pixels, axis=1).reshape(images.shape)
    found = {f"{count} images": images[:count] for count in _COUNTS}
    found |= {
        f"{len(images)} of noise": jnp.asarray(noise),
        f"{len(images)} with shuffled pixels": jnp.asarray(shuffled),
    }
    if other is not None:
        some = roundings.calibration_images(other, _COUNTS[0], key)
        found[f"{len(some)} of {other.name}"] = some
    return found


def measure(
    workdir: pathlib.Path, other: sources.Dataset | None
) -> list[dict[str, Any]]:
    """One entry for each seed, set of images and method."""
    config, scene = finished_run.read(workdir)
    defense = config.defense
    entries = []
    for seed in config.seeds:
        variables = finished_run.variables(workdir, scene, seed, "backdoored")
        rates = scene.evaluate(variables)
        before = {"acc": rates["acc"], "asr": rates["asr"]}
        key = jax.random.fold_in(jax.random.key(seed), 1)
        for name, images in image_sets(scene.train, key, other).items():
            for method, flip_weight in _METHODS.items():
                result = efrap_lib.efrap(
                    scene.model,
                    variables,
                    images,
                    weight_bits=defense.weight_bits,
                    act_bits=defense.act_bits,
                    grid=defense.grid.grid(),
                    flip_weight=(
                        defense.flip_weight if flip_weight is None else flip_weight
                    ),
                    fold_batch_norm=defense.fold_batch_norm,
                    apply_kwargs=roundings.EVAL,
                    layers=scene.layers,
                )
                rates = scene.evaluate(result.variables, result)
                entries.append(
                    {
                        "seed": seed,
                        "images": name,
                        "method": method,
                        "acc": rates["acc"],
                        "asr": rates["asr"],
                        "flip_rate": result.flip_rate,
                        "float": before,
                    }
                )
                print(json.dumps(entries[-1]), flush=True)
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--other", help="data set whose images are nothing like it")
    parser.add_argument("--other_dir", help="its folder")
    arguments = parser.parse_args()
    config, scene = finished_run.read(arguments.workdir)
    other = None
    if arguments.other:
        other = sources.load(
            arguments.other,
            split="train",
            data_dir=arguments.other_dir,
            image_size=scene.train.images.shape[1],
        )
    entries = measure(arguments.workdir, other)
    report = {
        "attack": config.attack.name,
        "weight_bits": config.defense.weight_bits,
        "dataset": config.data.name,
        "table": results.over_seeds(entries, by=("images", "method")),
        "entries": entries,
    }
    results.write(arguments.out, report)


if __name__ == "__main__":
    main()
