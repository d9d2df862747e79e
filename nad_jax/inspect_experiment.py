# SPDX-License-Identifier: Apache-2.0
"""An inspection as a program: a float model and clean images in, suspicions out.

The traces of an attack show on the grid it was trained against, so every grid of the
config is looked at.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from nad_jax import roundings, settings, whole_file
from nad_jax import workdir as workdir_lib
from nad_jax.core import grids
from nad_jax.data import sources
from nad_jax.defenses import rounding_inspection
from nad_jax.interop import name_maps, reader
from nad_jax.report import schema
from nad_jax.training import environment


def run(
    config: settings.InspectSettings,
    workdir: workdir_lib.Workdir,
    *,
    command: str | None = None,
) -> dict[str, Any]:
    """Inspects the model on every grid, says what was found, writes inspection.json.

    Raises:
      InputError: the file cannot be read, or the images do not fit the model.
    """
    environment.check_canary()
    assert config.float_model is not None
    checkpoint = reader.read_checkpoint(config.float_model)
    converted = name_maps.convert(
        checkpoint.arrays, config.arch, source=config.float_model
    )
    train = sources.load(
        config.data.name,
        split="train",
        data_dir=config.data.data_dir,
        image_size=config.data.image_size,
    )
    images = roundings.calibration_images(
        train, config.images, jax.random.key(config.seed)
    )
    entries = []
    for preset in config.presets:
        for bits in config.weight_bits:
            workdir.check_stop()
            with workdir.timed("inspect"):
                found = rounding_inspection.inspect(
                    converted.model,
                    converted.variables,
                    images,
                    weight_bits=bits,
                    act_bits=config.act_bits,
                    grid=grids.named(preset),
                    apply_kwargs=roundings.EVAL,
                )
            workdir.say(
                f"W{bits} {preset:<16} score {found.score:5.2f}: ties "
                f"{found.tie_ratio:.2f} times as expected, nearest changes "
                f"{found.drift:.1%} of the images and chance "
                f"{found.drift_by_chance:.1%}, largest weight "
                f"{found.outlier_ratio:.0f} times the median"
            )
            entries.append(
                {
                    "preset": preset,
                    "weight_bits": bits,
                    "score": found.score,
                    "tie_limit": found.tie_limit,
                    "drift_ratio": found.drift_ratio,
                    **dataclasses.asdict(found),
                }
            )
    suspicious = [entry for entry in entries if entry["score"] > 1]
    workdir.say(f"verdict: {'suspicious' if suspicious else 'nothing found'}")
    report = {
        "command": command,
        "config": dataclasses.asdict(config),
        "float_model_sha256": checkpoint.sha256,
        "suspicious": bool(suspicious),
        "limits": {
            "drift_ratio": rounding_inspection.DRIFT_LIMIT,
            "outlier_ratio": rounding_inspection.OUTLIER_LIMIT,
        },
        "inspections": entries,
        "versions": environment.describe()["versions"],
        "seconds": workdir.seconds,
    }
    report = schema.plain(report, "inspection")
    whole_file.write_json(workdir.path / "inspection.json", report)
    return report


def exit_code(report: Mapping[str, Any]) -> int:
    """0 if nothing was found, 1 otherwise."""
    return 1 if report["suspicious"] else 0
