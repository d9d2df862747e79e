# SPDX-License-Identifier: Apache-2.0
"""EFRAP on a net and images of any size; of nets, only sizes matter for the cost."""

import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import protocol
from benchmarks.ours import start
from nad_jax import models
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.models import common
from nad_jax.training import sharding


def efrap(channel: protocol.Channel, options: dict) -> None:
    """W4 by coordinate descent: the first solve of the process, and the second.

    The net is untrained and the images are noise; that changes how many sweeps a layer
    takes, which is told.
    """
    facts = start.facts()
    model = models.build(options["arch"], num_classes=10, width=options["width"])
    shape = (options["size"], options["size"], 3)
    variables = common.init(model, jax.random.key(0), shape)
    pixels = np.random.default_rng(0).random((options["images"], *shape), np.float32)
    images = jnp.asarray(pixels)
    seconds, sweeps = [], 0
    for _ in range(2):
        started = time.perf_counter()
        result = efrap_lib.efrap(
            model,
            variables,
            images,
            apply_kwargs={"train": False},
            mesh=sharding.mesh_for_batch(options["images"]),
        )
        jax.block_until_ready(result.variables)
        seconds.append(time.perf_counter() - started)
        sweeps = max(len(report.trace) - 1 for report in result.layers.values())
    weights = sum(int(np.prod(r.kernel_shape)) for r in result.layers.values())
    channel.ready(
        first_seconds=seconds[0],
        second_seconds=seconds[1],
        layers=len(result.layers),
        weights=weights,
        most_sweeps=sweeps,
        **facts,
    )
