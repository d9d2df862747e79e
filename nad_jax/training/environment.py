# SPDX-License-Identifier: Apache-2.0
"""Is the machine fit to compute on, and what exactly is it?

jaxlib 0.10.2 returns silently wrong numbers under `jit` on CPU. The canary repeats the
computation that shows it; a program calls `check_canary()` before anything else.
"""

import ctypes
import functools
import importlib.metadata
import logging
import os
import pathlib
import platform
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.data import cache

_LOGGER = logging.getLogger(__name__)

# The fault needs at least this many rows and shows in the last one only.
_CANARY_ROWS = 32_769
_CANARY_EXPECTED = 1_073_741_824.0  # 32,768 squared, exact in float32

# More would leave a small batch few images each.
_MAX_CPU_DEVICES = 8
# Parameters of mallopt(3): M_MMAP_MAX, no array in a mapping of its own; and
# M_TRIM_THRESHOLD, memory freed at the end of the heap is kept.
_KEEP_MEMORY = {-4: 0, -1: 2**31 - 1}

_PACKAGES = ("nad_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class WrongNumbersError(errors.InputError):
    """The installed jaxlib does not compute what it should."""


def canary() -> dict[str, Any]:
    """Outcome of a computation that a known fault of jaxlib 0.10.2 gets wrong.

    A 3x3 identity times each of 32,769 rows (i, 0, 0), squared and summed, under
    `vmap` and `jit`: the last row must give 32,768 squared.

    Returns:
        "passed", "computed" and "expected" (numbers), "jaxlib" and "platform".
    """
    rows = np.zeros((_CANARY_ROWS, 3), np.float32)
    rows[:, 0] = np.arange(_CANARY_ROWS)
    lengths = _squared_lengths(np.eye(3, dtype=np.float32), rows)
    computed = float(np.asarray(lengths)[-1])
    return {
        "passed": computed == _CANARY_EXPECTED,
        "computed": computed,
        "expected": _CANARY_EXPECTED,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "platform": jax.default_backend(),
    }


@jax.jit
def _squared_lengths(matrix: Any, rows: Any) -> jax.Array:
    # The sum must be inside the vmap; beside it, the same arithmetic comes out right.
    return jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))(rows)


def check_canary() -> dict[str, Any]:
    """The outcome of `canary`, if it passed.

    Raises:
        WrongNumbersError: it did not.
    """
    outcome = canary()
    if not outcome["passed"]:
        raise WrongNumbersError(
            f"jaxlib {outcome['jaxlib']} computes wrong numbers on "
            f"{outcome['platform']} ({outcome['computed']:.0f} instead of "
            f"{outcome['expected']:.0f}); install jaxlib 0.10.1, or start with "
            "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type="
        )
    return outcome


def use_cpu_cores() -> None:
    """Makes JAX on CPU use all cores and keep its memory; before JAX computes.

    XLA computes the weight gradient of a convolution on one core. Split over virtual
    devices, a batch has all of its gradients on all cores. A device is made for every
    core, up to `_MAX_CPU_DEVICES`, unless the user chose a number. And XLA asks for
    the memory of every program anew: with the C library's defaults each large array is
    mapped, filled with zeros by the kernel, and unmapped again, every step.

    `give_memory_back` ends the keeping where it costs more than it saves.

    Does nothing for accelerators, and only the first part where the C library is not
    glibc. Results depend on the number of devices as on any reordering of a float sum.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    chosen = "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if not chosen and jax.config.jax_num_cpu_devices < 0:  # pyright: ignore
        # A power of two, so that it divides usual batches.
        devices = 1 << (min(cores, _MAX_CPU_DEVICES).bit_length() - 1)
        jax.config.update("jax_num_cpu_devices", devices)
    if (libc := _glibc()) is not None:
        for option, value in _KEEP_MEMORY.items():
            libc.mallopt(option, value)


def give_memory_back() -> None:
    """Returns to the system what is freed but kept, see `use_cpu_cores`.

    For work whose arrays differ in size from layer to layer: what one layer leaves does
    not fit the next, and the gaps add up to more than the arrays. It speaks for the
    whole process, whoever runs in it. Does nothing where the C library is not glibc.
    """
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def enable_compile_cache(path: str | os.PathLike[str] | None = None) -> str | None:
    """Keeps compiled programs on disk from now on, and returns where.

    Args:
        path: directory; None means `xla/<host name>` below the folder of all caches
            (`nad_jax.data.cache.root`): programs for one machine may not run on
            another that shares that folder. "off" or "0", here or in the variable
            NAD_JAX_CACHE, disables the cache.

    Returns:
        The directory, or None if the cache is off or the directory cannot be written.
    """
    if path is None:
        root = cache.root()
        path = "off" if root is None else root / "xla" / platform.node()
    if str(path).lower() in cache.OFF:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    directory = pathlib.Path(path).expanduser().absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        # A cache saves seconds; its lack must not stop a run.
        _LOGGER.warning("no compile cache: cannot create %s (%s)", directory, error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(directory))
    # By default jax keeps only what took a second or more to compile.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return str(directory)


def describe() -> dict[str, Any]:
    """Versions, devices and settings that numbers depend on, as JSON can hold them."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu_count": os.cpu_count(),
        "versions": _versions(),
        "platform": jax.default_backend(),
        "devices": [device.device_kind for device in jax.devices()],
        "process_count": jax.process_count(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "x64": bool(jax.config.jax_enable_x64),  # pyright: ignore
        "matmul_precision": jax.config.jax_default_matmul_precision,  # pyright: ignore
    }


@functools.cache
def _versions() -> dict[str, str | None]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return versions
