# SPDX-License-Identifier: Apache-2.0
"""Data parallelism: a one-axis mesh, batches split over it, everything else copied.

Under `jax.jit` that is all there is to it: the compiler makes means over a split batch
global, those of batch normalisation included.

A mesh may span the devices of several processes (`agreement`). Each process then holds
the parts that belong to its devices, and gives `replicate` and `shard_batch` the whole
value, the same in every process.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nad_jax import errors

DATA_AXIS = "data"

_LOGGER = logging.getLogger(__name__)


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the single axis "data" over the devices, by default all there are."""
    devices = jax.devices() if devices is None else devices
    # Under AxisType.Explicit, indexing and top_k of a sharded batch raise; a foreign
    # model must not have to care.
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def mesh_for_batch(batch_size: int) -> Mesh | None:
    """Mesh over as many devices as split the batch evenly; None for one.

    Every process takes part with equally many devices. A batch that the processes
    cannot share evenly is computed whole by each of them, with the same result and in
    the same time as if the others waited.
    """
    processes = jax.process_count()
    if batch_size % processes:
        _LOGGER.warning(
            "a batch of %d cannot be shared by %d processes; each computes all of it",
            batch_size,
            processes,
        )
        groups = [jax.local_devices()]
    else:
        groups = [
            [device for device in jax.devices() if device.process_index == process]
            for process in range(processes)
        ]
    size = math.gcd(batch_size // len(groups), len(groups[0]))
    devices = [device for group in groups for device in group[:size]]
    return data_mesh(devices) if len(devices) > 1 else None


def forward_mesh(batch_size: int | None = None) -> Mesh | None:
    """Mesh for work without gradients; for a batch of any size, over all devices.

    None in a single process on CPU, where forward passes and matrix products use all
    cores on one device as it is, and where many programs with sums over devices, all
    started at once, can wait for each other's threads for ever.
    """
    if jax.process_count() == 1 and jax.default_backend() == "cpu":
        return None
    if batch_size is not None:
        return mesh_for_batch(batch_size)
    return data_mesh() if jax.device_count() > 1 else None


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch with the leading axis of every leaf split over the mesh.

    Inside of `jit`, use `constrain_batch`: there, `device_put` to a mesh is ignored.

    Raises:
        InputError: a leading axis is not a multiple of the number of devices.
    """
    _check_leading_axes(batch, mesh)
    return _put(batch, _split(mesh))


def constrain_batch(batch: Any, mesh: Mesh) -> Any:
    """As `shard_batch`, for a batch that is made inside of `jit`."""
    _check_leading_axes(batch, mesh)
    return jax.lax.with_sharding_constraint(batch, _split(mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with a copy of every leaf on every device; not inside of `jit`."""
    return _put(tree, replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array with a copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def unreplicate(tree: Any) -> Any:
    """Replicated arrays as ordinary ones on the default device, as if just loaded."""
    # By way of the host: an array bound to its device would be compiled for anew.
    return jax.device_put(jax.device_get(tree))


def own_columns(batch_size: int, mesh: Mesh | None) -> slice:
    """The part of every batch over a mesh that this process reads, both ends given.

    Without a mesh, or with one of this process alone, that is the whole batch.

    Raises:
        InputError: the batch cannot be split, or the part is none: the devices of a
            process are not neighbours, as they are in `mesh_for_batch`.
    """
    if mesh is None:
        return slice(0, batch_size)
    check_divisible(batch_size, mesh)
    places = _split(mesh).addressable_devices_indices_map((batch_size,))
    bounds = sorted(
        {place[0].indices(batch_size)[:2] for place in places.values() if place}
    )
    (first, _), (_, last) = bounds[0], bounds[-1]
    if sum(stop - start for start, stop in bounds) != last - first:
        raise errors.InputError(
            f"the devices of process {jax.process_index()} must be neighbours in the "
            f"mesh, but have the rows {bounds} of a batch; use mesh_for_batch"
        )
    return slice(first, last)


def join_columns(batches: Any, mesh: Mesh | None) -> Any:
    """Batches `[S, B, ...]` on devices, of which each process has its own columns.

    Args:
        batches: pytree of arrays `[S, b, ...]`, where b are the `own_columns`.
        mesh: the second axis is split over it; None for the default device.
    """
    if mesh is None:
        return jax.device_put(batches)
    split = NamedSharding(mesh, PartitionSpec(None, DATA_AXIS))
    return jax.tree.map(
        lambda leaf: jax.make_array_from_process_local_data(split, leaf), batches
    )


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError if the batch cannot be split evenly over the mesh."""
    if batch_size % mesh.size:
        raise errors.InputError(
            f"batch_size {batch_size} cannot be split over {mesh.size} devices; "
            f"use a multiple of {mesh.size}"
        )


def _put(tree: Any, sharding: NamedSharding) -> Any:
    """The tree, the same in every process, laid out over a mesh."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # Not `device_put`: it would send every value over the network to compare it.
    return jax.tree.map(lambda leaf: _put_parts(leaf, sharding), tree)


def _put_parts(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """One array over several processes, of which each puts its own parts."""
    if isinstance(leaf, jax.Array):
        if not leaf.is_fully_addressable:
            return leaf if leaf.sharding == sharding else jax.device_put(leaf, sharding)
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            data = _put_parts(jax.random.key_data(leaf), sharding)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index]
    )


def _check_leading_axes(batch: Any, mesh: Mesh) -> None:
    for leaf in jax.tree.leaves(batch):
        check_divisible(leaf.shape[0], mesh)


def _split(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))
