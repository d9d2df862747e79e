# SPDX-License-Identifier: Apache-2.0
"""An audit as a program: two files and clean images in, a verdict with reasons out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from nad_jax import auditing, roundings, settings, whole_file
from nad_jax import workdir as workdir_lib
from nad_jax.data import sources
from nad_jax.report import schema
from nad_jax.training import environment


def run(
    config: settings.AuditSettings,
    workdir: workdir_lib.Workdir,
    *,
    command: str | None = None,
) -> dict[str, Any]:
    """Audits the file, says what was found and writes audit.json.

    Raises:
      InputError: a file cannot be read, or the two do not belong together.
    """
    environment.check_canary()
    assert config.float_model is not None and config.integer_file is not None
    train = sources.load(
        config.data.name,
        split="train",
        data_dir=config.data.data_dir,
        image_size=config.data.image_size,
    )
    images = roundings.calibration_images(
        train, config.images, jax.random.key(config.seed)
    )
    with workdir.timed("audit"):
        result = auditing.audit(
            config.float_model,
            config.integer_file,
            arch=config.arch,
            images=images,
            check_stop=workdir.check_stop,
        )
    for layer in result.layers:
        shown = "" if layer.gain is None else f", output error {-layer.gain:+.1%}"
        workdir.say(
            f"{layer.name:<24} {layer.rounding:<14} {layer.not_nearest:6.1%} not "
            f"nearest{shown}; {layer.grid}"
        )
    for finding in result.findings:
        workdir.say(f"found: {finding}")
    workdir.say(f"verdict: {'honest' if result.honest else 'findings'}")
    report = {
        "command": command,
        "config": dataclasses.asdict(config),
        "float_model_sha256": result.float_model_sha256,
        "integer_file_sha256": result.integer_file_sha256,
        "honest": result.honest,
        "findings": list(result.findings),
        "audit": dataclasses.asdict(result),
        "versions": environment.describe()["versions"],
        "seconds": workdir.seconds,
    }
    report = schema.plain(report, "audit")
    whole_file.write_json(workdir.path / "audit.json", report)
    return report


def exit_code(report: Mapping[str, Any]) -> int:
    """0 if nothing was found, 1 otherwise."""
    return 0 if report["honest"] else 1
