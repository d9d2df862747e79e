# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best, by XLA: a large product, a large copy."""

import time

import jax
import jax.numpy as jnp

from benchmarks import protocol
from nad_jax.training import environment

_SIDE = 2048
_FLOATS = 2**25  # 128 MiB, beyond any cache but the largest
_REPEATS = 7


def run(channel: protocol.Channel, options: dict) -> None:
    # One device: XLA splits a single product over all cores by itself.
    environment.enable_compile_cache()
    matrix = jnp.ones((_SIDE, _SIDE))
    vector = jnp.ones(_FLOATS)
    product = _best(jax.jit(lambda a: a @ a), matrix)
    copy = _best(jax.jit(lambda a: a + 1.0), vector)
    channel.ready(
        operations_per_second=2 * _SIDE**3 / product,
        bytes_per_second=2 * 4 * _FLOATS / copy,
        versions=environment.describe()["versions"],
        threads=len(jax.devices()),
    )


def _best(program, argument) -> float:
    """Least seconds of a few runs: a peak is what could be, not what usually is."""
    program(argument).block_until_ready()
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        program(argument).block_until_ready()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
