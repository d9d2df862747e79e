# SPDX-License-Identifier: Apache-2.0
"""The NAD step as a textbook would write it in Flax and optax: what to compare with."""

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import protocol
from benchmarks.ours import start, steps
from nad_jax.data import batches
from nad_jax.training import sharding


def attention_distance(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean square between maps normalised as in the public code, `[]`."""
    maps = []
    for features in (student, teacher):
        strength = jnp.sum(features**2, axis=-1)
        norm = jnp.sqrt(jnp.sum(strength**2, axis=(1, 2), keepdims=True))
        maps.append(strength / (norm + 1e-6))
    return jnp.mean((maps[0] - maps[1]) ** 2)


def nad_loss(student: Any, teacher: Any, betas: dict[str, float]) -> jax.Array:
    """The attention term, `[]`."""
    terms = [
        beta * attention_distance(student[stage], jax.lax.stop_gradient(teacher[stage]))
        for stage, beta in betas.items()
    ]
    return functools.reduce(jnp.add, terms)


def nad_step(channel: protocol.Channel, options: dict) -> None:
    """One batch, over and over; `options["devices"]` > 1 splits it."""
    facts = start.facts(options["devices"])
    net, images, labels = steps.scene({**options, "steps": 1})
    tx = optax.chain(
        optax.add_decayed_weights(1e-4), optax.sgd(1e-4, momentum=0.9, nesterov=True)
    )
    batch = (batches.to_float(jnp.asarray(images)), jnp.asarray(labels))
    state = (net.variables["params"], net.variables["batch_stats"])
    state = (*jax.tree.map(jnp.copy, state), tx.init(state[0]))
    teacher = net.variables
    mesh = sharding.mesh_for_batch(options["batch"])
    if mesh is not None:
        batch = sharding.shard_batch(batch, mesh)
        state, teacher = sharding.replicate((state, teacher), mesh)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()),
    )
    def step(state: Any, teacher: Any, images: jax.Array, labels: jax.Array) -> Any:
        params, batch_stats, momentum = state

        def loss_of(params: Any) -> Any:
            (logits, features), updated = net.model.apply(
                {"params": params, "batch_stats": batch_stats},
                images,
                train=True,
                mutable=["batch_stats"],
            )
            _, targets = net.model.apply(teacher, images, train=False)
            task = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            loss = task.mean() + nad_loss(features, targets, steps.BETAS)
            return loss, updated["batch_stats"]

        (loss, batch_stats), gradient = jax.value_and_grad(loss_of, has_aux=True)(
            params
        )
        updates, momentum = tx.update(gradient, momentum, params)
        return (optax.apply_updates(params, updates), batch_stats, momentum), loss

    state, loss = step(state, teacher, *batch)
    loss.block_until_ready()
    channel.ready(**facts)
    while channel.next():
        started, used = time.perf_counter(), time.process_time()
        for _ in range(options["steps"]):
            state, loss = step(state, teacher, *batch)
        loss.block_until_ready()
        channel.done(
            (time.perf_counter() - started) / options["steps"],
            cpu_seconds=(time.process_time() - used) / options["steps"],
        )
