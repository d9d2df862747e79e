# SPDX-License-Identifier: Apache-2.0
"""Strict modes for every test, eight virtual devices on one CPU, quick compilation."""

import os

# Most of the suite's time is compilation, of programs that run for a moment; without
# XLA's optimisations it is much less. Children of a test inherit this. Those that stand
# for a user's command clear it: XLA_FLAGS="".
_QUICK = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
# Before jax starts. What is there already comes last, and so wins.
os.environ["XLA_FLAGS"] = f"{_QUICK} {os.environ.get('XLA_FLAGS', '')}".strip()
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

from nad_jax.data import sources  # noqa: E402

# For this process alone; not before jax is asked for its devices.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_configure(config):
    """Keeps compiled programs between runs, where pytest keeps anything."""
    if not hasattr(config, "cache"):
        return
    # One directory for each worker: two writers of one file could meet.
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    directory = config.cache.mkdir(f"xla-{worker}")
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(scope="session")
def write_npz():
    """Function that writes images and labels as a data set, for both splits alike."""

    def write(path, images, labels):
        parts = {"images": images, "labels": labels}
        splits = ("train", "test")
        np.savez(path, **{f"{k}_{s}": v for k, v in parts.items() for s in splits})
        return path

    return write


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """Settings of 200 + 200 digits: enough for a run of which only the way counts."""
    path = tmp_path_factory.mktemp("few") / "digits.npz"
    parts = {}
    for split in ("train", "test"):
        digits = sources.load("digits", split=split, image_size=8).take(np.arange(200))
        parts[f"images_{split}"] = digits.images
        parts[f"labels_{split}"] = digits.labels
    np.savez(path, **parts)
    return {"name": "npz", "data_dir": str(path)}
