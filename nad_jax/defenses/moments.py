# SPDX-License-Identifier: Apache-2.0
"""Second moments of a layer's inputs, a chunk of images at a time.

With images split over devices, each device adds up the moments of its own, and one sum
over devices ends it.
"""

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nad_jax.core import solvers
from nad_jax.defenses import window_gram
from nad_jax.models import layers as layers_lib
from nad_jax.training import sharding

# Unfolded inputs alive at a time; bounds memory whatever the number of images. Where
# the sums themselves are larger, so may these be, or adding up takes most of the time.
_UNFOLDED_BYTES = 16 * 2**20


class Remembered:
    """A function's last result, for as long as it is asked for the very same arrays.

    Arguments that are no arrays, such as widths and specs, need only be equal.

    Query, key and value of an attention block are fed by one tensor. What is made of it
    once, such as its quantized copy, must be one tensor again for `Collector` to see
    that they share it.
    """

    def __init__(self, function: Callable[..., Any]):
        self._function = function
        self._arguments: tuple[Any, ...] | None = None
        self._result: Any = None

    def __call__(self, *arguments: Any) -> Any:
        known = self._arguments is not None and all(
            one is other or (isinstance(one, Hashable) and one == other)
            for one, other in zip(self._arguments, arguments, strict=True)
        )
        if not known:
            # Not while the new ones are made: they are as large.
            self._arguments = self._result = None
            self._result = self._function(*arguments)
            self._arguments = arguments
        return self._result


class Collector:
    """Measures moments, and remembers the last Gram matrix.

    Layers that are fed by the very same tensor (query, key and value of an attention
    block) share one Gram matrix, which is most of the work.

    Args:
      mesh: If given, all inputs are split over it.
    """

    def __init__(self, mesh: Mesh | None = None):
        self._mesh = mesh
        # Seen, not kept: they are as large as all images of a layer.
        self._inputs: Callable[[], Any] = lambda: None
        self._unfolding: Any = None
        self._gram: Any = None

    def collect(
        self,
        geometry: layers_lib.Geometry,
        kernel: jax.Array,
        float_inputs: jax.Array,
        inputs: jax.Array,
    ) -> solvers.Moments:
        """`Moments` of one layer, stacked over its channel groups.

        Args:
          geometry: The layer.
          kernel: Its float kernel.
          float_inputs: `[N, ...]`, its inputs in the float network.
          inputs: The same in the network quantized so far.
        """
        # How rows are cut from the inputs does not depend on the number of outputs.
        unfolding = dataclasses.replace(
            geometry, kernel_shape=(*geometry.kernel_shape[:-1], 0)
        )
        known = inputs is self._inputs() and unfolding == self._unfolding
        positions = _positions(geometry, inputs.shape)
        if self._mesh is not None:
            moments = _collect_split(
                geometry, not known, self._mesh, kernel, float_inputs, inputs
            )
        else:
            moments = _zeros(geometry, positions)
            chunk = _chunk_size(geometry, inputs.shape)
            for first in range(0, inputs.shape[0], chunk):
                part = slice(first, first + chunk)
                moments = _add_chunk(
                    geometry,
                    not known,
                    moments,
                    kernel,
                    float_inputs[part],
                    inputs[part],
                )
        if known:
            moments = moments._replace(gram=self._gram)
        elif window_gram.applies(geometry, positions):
            gram = _gram_matrix(geometry, positions, moments.gram[0])
            moments = moments._replace(gram=gram[None])
        self._inputs, self._unfolding = weakref.ref(inputs), unfolding
        self._gram = moments.gram
        return moments


_gram_matrix = jax.jit(window_gram.gram_matrix, static_argnums=(0, 1))


def _positions(
    geometry: layers_lib.Geometry, shape: tuple[int, ...]
) -> tuple[int, ...]:
    return shape[len(shape) - 1 - len(geometry.window) : -1]


def _zeros(
    geometry: layers_lib.Geometry, positions: tuple[int, ...]
) -> solvers.Moments:
    """The moments of no rows, stacked over groups; on the host, free of compilation.

    Where windows share sums, these stand in the place of the Gram matrix.
    """
    zeros = functools.partial(
        solvers.zero_moments,
        geometry.num_inputs,
        geometry.kernel_shape[-1] // geometry.groups,
    )
    shapes = jax.eval_shape(zeros)
    if window_gram.applies(geometry, positions):
        sums = window_gram.num_sums(geometry, positions)
        shapes = shapes._replace(gram=jax.ShapeDtypeStruct(sums, jnp.float32))
    return jax.tree.map(
        lambda x: np.zeros((geometry.groups, *x.shape), x.dtype), shapes
    )


def per_group(function, *arguments):
    """`vmap` over the leading group axis; without it where there is one group.

    A batched `while_loop` carries masks through every iteration, which the usual
    ungrouped layer should not pay for.
    """
    if jax.tree.leaves(arguments)[0].shape[0] > 1:
        return jax.vmap(function)(*arguments)
    result = function(*jax.tree.map(lambda x: x[0], arguments))
    return jax.tree.map(lambda x: x[None], result)


def _chunk_size(geometry: layers_lib.Geometry, shape: tuple[int, ...]) -> int:
    one = jax.ShapeDtypeStruct((1, *shape[1:]), jnp.float32)
    rows = jax.eval_shape(functools.partial(layers_lib.unfold, geometry), one)
    sums = _zeros(geometry, _positions(geometry, shape)).gram
    alive = max(_UNFOLDED_BYTES, sums.nbytes)
    return min(max(alive // (4 * rows.size), 1), shape[0])


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _add_chunk(geometry, with_gram, moments, kernel, float_inputs, inputs):
    # The layer is linear: one product gives the difference of two outputs.
    drift = layers_lib.run(geometry, kernel, inputs - float_inputs)
    rows = layers_lib.unfold(geometry, inputs)
    drift = drift.reshape(rows.shape[1], geometry.groups, -1).swapaxes(0, 1)
    shares = window_gram.applies(geometry, _positions(geometry, inputs.shape))
    add = functools.partial(solvers.add_rows, with_gram=with_gram and not shares)
    moments = per_group(add, moments, rows, drift)
    if with_gram and shares:
        sums = window_gram.shared_sums(geometry, inputs)
        moments = moments._replace(gram=moments.gram + sums[None])
    return moments


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _collect_split(geometry, with_gram, mesh, kernel, float_inputs, inputs):
    """Moments of inputs that are split over a mesh, a copy on every device."""
    own = PartitionSpec(sharding.DATA_AXIS)

    def collect_own(kernel, float_inputs, inputs):
        chunk = _chunk_size(geometry, inputs.shape)

        def add(first, size, moments):
            parts = [
                jax.lax.dynamic_slice_in_dim(x, first, size)
                for x in (float_inputs, inputs)
            ]
            return _add_chunk(geometry, with_gram, moments, kernel, *parts)

        chunks, rest = divmod(inputs.shape[0], chunk)
        moments = jax.lax.fori_loop(
            0,
            chunks,
            lambda index, moments: add(index * chunk, chunk, moments),
            jax.tree.map(
                jnp.asarray, _zeros(geometry, _positions(geometry, inputs.shape))
            ),
        )
        if rest:
            moments = add(chunks * chunk, rest, moments)
        return jax.tree.map(lambda x: jax.lax.psum(x, sharding.DATA_AXIS), moments)

    return jax.shard_map(
        collect_own,
        mesh=mesh,
        in_specs=(PartitionSpec(), own, own),
        out_specs=PartitionSpec(),
        check_vma=False,  # The loop starts from zeros that are the same everywhere.
    )(kernel, float_inputs, inputs)
