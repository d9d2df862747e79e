# SPDX-License-Identifier: Apache-2.0
"""An audit as a program: two files and clean images in, a verdict with reasons out."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from nad_jax import auditing, pipeline, roundings, settings
from nad_jax import workdir as workdir_lib
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
    images = roundings.load_calibration_images(config.data, config.images, config.seed)
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
    content = {
        "float_model_sha256": result.float_model_sha256,
        "integer_file_sha256": result.integer_file_sha256,
        "honest": result.honest,
        "findings": list(result.findings),
        "audit": dataclasses.asdict(result),
    }
    return pipeline.write_findings(
        "audit", content, config=config, workdir=workdir, command=command
    )


def exit_code(report: Mapping[str, Any]) -> int:
    """0 if nothing was found, 1 otherwise."""
    return 0 if report["honest"] else 1
