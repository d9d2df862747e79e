# SPDX-License-Identifier: Apache-2.0
"""Brings JAX up as the program does, and says what it found."""

from typing import Any

import jax

from nad_jax.training import environment


def facts(devices: int | None = None) -> dict[str, Any]:
    """Versions and devices, after all cores and the compile cache are in use.

    Args:
        devices: Virtual devices on CPU; None = as many as the program makes.
    """
    if devices is not None:
        jax.config.update("jax_num_cpu_devices", devices)
    environment.use_cpu_cores()
    environment.enable_compile_cache()
    described = environment.describe()
    return {"versions": described["versions"], "threads": len(jax.devices())}
