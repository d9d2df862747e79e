# SPDX-License-Identifier: Apache-2.0
"""Many trainings that differ only in numbers, as one compiled program.

Members are stacked along the first axis of every array of their states; what makes
them differ (key, start, a weight of the loss) is in the state. Each device trains its
share of them, and they exchange nothing. One compilation serves all, and an epoch ends
for all at once.

Inside of a device, accelerators run the step under `vmap`. On CPU the step is written
out once per member: `vmap` over kernels makes grouped convolutions, slow ones there.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nad_jax import errors
from nad_jax.training import feeds, loop, sharding, steps
from nad_jax.training import state as state_lib


def member_mesh(num_members: int) -> Mesh | None:
    """Mesh over as many local devices as share the members evenly; None for one."""
    devices = jax.local_devices()
    size = math.gcd(num_members, len(devices))
    return sharding.data_mesh(devices[:size]) if size > 1 else None


def fit(
    states: Sequence[state_lib.TrainState],
    images: Any,
    labels: Any,
    *,
    step_fn: steps.StepFn,
    epochs: int,
    batch_size: int,
    make_batch: loop.MakeBatch,
    mesh: Mesh | None = None,
    written_out: bool | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[list[state_lib.TrainState], list[dict[str, np.ndarray]]]:
    """States of all members after `epochs` epochs, and the metrics of every epoch.

    Each member sees the batches that `loop.fit` would give it alone, and ends where
    that would end, up to float rounding.

    Args:
        states: of the members, from `state.create`; equal structures and shapes.
        images: uint8 `[N, H, W, C]`, the same for all.
        labels: int `[N]`.
        step_fn: as for `loop.fit`, of one member.
        epochs: number of epochs.
        batch_size: examples per step of one member.
        make_batch: as for `loop.fit`.
        mesh: from `member_mesh`; its size divides the number of members.
        written_out: True writes the step out once per member of a device, False puts
            it under `vmap`; None is True on CPU.
        should_stop: asked between steps.

    Returns:
        States in the order of `states`, and for each epoch the mean of every metric,
        float64 `[members]`.

    Raises:
        InputError: there are no members, or they cannot be shared by the mesh.
        TrainingDiverged: the loss of a member is not finite at the end of an epoch.
        TrainingInterrupted: `should_stop` returned True.
    """
    if not states:
        raise errors.InputError("a sweep needs at least one member, got 0")
    members = len(states)
    if written_out is None:
        written_out = jax.default_backend() == "cpu"
    images, labels = loop.checked(images, labels)
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    orders = jax.jit(
        jax.vmap(
            functools.partial(
                feeds.order_of_epoch,
                num_examples=images.shape[0],
                batch_size=batch_size,
            )
        )
    )
    if mesh is None:
        images = jnp.asarray(images)
    else:
        if members % mesh.size:
            raise errors.InputError(
                f"{members} members cannot be shared by {mesh.size} devices"
            )
        images, labels = sharding.replicate((images, labels), mesh)
        state = sharding.shard_batch(state, mesh)
    run_step = _compile_step(step_fn, make_batch, mesh, written_out)
    history = []
    for epoch in range(epochs):
        order = orders(state.key, state.epoch)
        metrics = []
        for step in range(order.shape[1]):
            if should_stop is not None and should_stop():
                raise loop.TrainingInterrupted(
                    f"stopped in epoch {epoch + 1} of {epochs}; a sweep keeps nothing"
                )
            state, means = run_step(state, order[:, step], images, labels)
            metrics.append(means)
            loop.wait_for_device(metrics)
        state = state.replace(epoch=state.epoch + 1)
        fetched = jax.device_get(metrics)
        means = {
            name: np.mean([one[name] for one in fetched], axis=0, dtype=np.float64)
            for name in fetched[0]
        }
        bad = np.flatnonzero(~np.isfinite(means["loss"]))
        if bad.size:
            raise loop.TrainingDiverged(
                f"the loss of member {bad[0]} is not finite in epoch {epoch + 1}; "
                "lower the learning rate"
            )
        history.append(means)
    if mesh is not None:
        state = sharding.unreplicate(state)
    return [
        jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(members)
    ], history


def _compile_step(
    step_fn: steps.StepFn,
    make_batch: loop.MakeBatch,
    mesh: Mesh | None,
    written_out: bool,
) -> Any:
    """Jitted `(state [M, ...], indices [M, B], images, labels) -> (state, metrics)`."""

    def one_step(state, indices, images, labels):
        key = state_lib.derive_key(state.key, state_lib.AUGMENT, state.step)
        return step_fn(state, make_batch(key, images[indices], labels[indices]))

    def own_steps(state, indices, images, labels):
        if not written_out:
            batched = jax.vmap(one_step, in_axes=(0, 0, None, None))
            return batched(state, indices, images, labels)
        results = [
            one_step(
                jax.tree.map(lambda leaf, i=i: leaf[i], state),
                indices[i],
                images,
                labels,
            )
            for i in range(indices.shape[0])
        ]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    if mesh is None:
        return jax.jit(own_steps, donate_argnums=0)
    own, whole = PartitionSpec(sharding.DATA_AXIS), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            own_steps,
            mesh=mesh,
            in_specs=(own, own, whole, whole),
            out_specs=own,
            check_vma=False,
        ),
        donate_argnums=0,
    )
