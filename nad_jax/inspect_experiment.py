# SPDX-License-Identifier: Apache-2.0
"""An inspection as a program: a float model and clean images in, suspicions out.

The traces of an attack show on the grid it was trained against, so every grid of the
config is looked at.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nad_jax import audit_files, pipeline, roundings, settings
from nad_jax import workdir as workdir_lib
from nad_jax.core import grids
from nad_jax.defenses import rounding_inspection
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
    floats = audit_files.read_floats(
        config.float_model, module=None, arch=config.arch, apply_kwargs=None
    )
    images = roundings.load_calibration_images(config.data, config.images, config.seed)
    entries = []
    for preset in config.presets:
        for bits in config.weight_bits:
            workdir.check_stop()
            with workdir.timed("inspect"):
                found = rounding_inspection.inspect(
                    floats.module,
                    floats.variables,
                    images,
                    weight_bits=bits,
                    act_bits=config.act_bits,
                    grid=grids.named(preset),
                    apply_kwargs=floats.apply_kwargs,
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
    content = {
        "float_model_sha256": floats.sha256,
        "suspicious": bool(suspicious),
        "limits": {
            "drift_ratio": rounding_inspection.DRIFT_LIMIT,
            "outlier_ratio": rounding_inspection.OUTLIER_LIMIT,
        },
        "inspections": entries,
    }
    return pipeline.write_findings(
        "inspection", content, config=config, workdir=workdir, command=command
    )


def exit_code(report: Mapping[str, Any]) -> int:
    """0 if nothing was found, 1 otherwise."""
    return 1 if report["suspicious"] else 0
