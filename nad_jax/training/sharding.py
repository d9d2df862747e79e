# SPDX-License-Identifier: Apache-2.0
"""Data parallelism: a one-axis mesh, batches split over it, everything else copied.

Under `jax.jit` that is all there is to it: the compiler makes means over a split batch
global, those of batch normalisation included.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from nad_jax import errors

DATA_AXIS = "data"


def data_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh with the single axis "data" over the devices, by default all there are."""
    devices = jax.devices() if devices is None else devices
    # Under AxisType.Explicit, indexing and top_k of a sharded batch raise; a foreign
    # model must not have to care.
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def mesh_for_batch(batch_size: int) -> Mesh | None:
    """Mesh over as many local devices as split the batch evenly; None for one."""
    devices = jax.local_devices()
    size = math.gcd(batch_size, len(devices))
    return data_mesh(devices[:size]) if size > 1 else None


def shard_batch(batch: Any, mesh: Mesh) -> Any:
    """The batch with the leading axis of every leaf split over the mesh.

    Inside of `jit`, use `constrain_batch`: there, `device_put` to a mesh is ignored.

    Raises:
        InputError: a leading axis is not a multiple of the number of devices.
    """
    _check_leading_axes(batch, mesh)
    return jax.device_put(batch, _split(mesh))


def constrain_batch(batch: Any, mesh: Mesh) -> Any:
    """As `shard_batch`, for a batch that is made inside of `jit`."""
    _check_leading_axes(batch, mesh)
    return jax.lax.with_sharding_constraint(batch, _split(mesh))


def replicate(tree: Any, mesh: Mesh) -> Any:
    """The tree with a copy of every leaf on every device; not inside of `jit`."""
    return jax.device_put(tree, replicated(mesh))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array with a copy on every device of the mesh."""
    return NamedSharding(mesh, PartitionSpec())


def unreplicate(tree: Any) -> Any:
    """Replicated arrays as ordinary ones on the default device, as if just loaded."""
    # By way of the host: an array bound to its device would be compiled for anew.
    return jax.device_put(jax.device_get(tree))


def check_divisible(batch_size: int, mesh: Mesh) -> None:
    """Raises InputError if the batch cannot be split evenly over the mesh."""
    if batch_size % mesh.size:
        raise errors.InputError(
            f"batch_size {batch_size} cannot be split over {mesh.size} devices; "
            f"use a multiple of {mesh.size}"
        )


def _check_leading_axes(batch: Any, mesh: Mesh) -> None:
    for leaf in jax.tree.leaves(batch):
        check_divisible(leaf.shape[0], mesh)


def _split(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))
