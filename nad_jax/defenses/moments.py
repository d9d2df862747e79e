# SPDX-License-Identifier: Apache-2.0
"""Second moments of a layer's inputs, a chunk of images at a time.

With images split over devices, each device adds up the moments of its own, and one sum
over devices ends it.

Moments are squares, and a stranger chooses what is squared: inputs of a layer times
2^67 and its weights divided by as much leave the network's function as it is, and take
float32 out of its range. `Units` undoes such scales before anything is squared.
"""

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from nad_jax import errors
from nad_jax.core import solvers
from nad_jax.defenses import window_gram
from nad_jax.models import layers as layers_lib
from nad_jax.training import sharding

# Unfolded inputs alive at a time; bounds memory whatever the number of images. Where
# the sums themselves are larger, so may these be, or adding up takes most of the time.
_UNFOLDED_BYTES = 16 * 2**20
# Of a unit. The ratio of two is still a float32, and so is the square of anything that
# float32 holds but for its last octaves.
_LARGEST_EXPONENT = 60


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


class Units(NamedTuple):
    """What a layer's numbers are counted in; powers of two, on the host.

    They are exact: the moments, the problem made of them and all that is compared on
    the way to its solution are scaled, not rounded, and the solution is the same to the
    bit wherever float32 reaches without them.

    Attributes:
      inputs: float64 `[Cin]`, one for each input channel.
      outputs: float64 `[Cout]`, one for each output channel.
    """

    inputs: np.ndarray
    outputs: np.ndarray

    @classmethod
    def plain(cls, geometry: layers_lib.Geometry) -> "Units":
        """All 1."""
        *_, own_inputs, outputs = geometry.kernel_shape
        return cls(np.ones(own_inputs * geometry.groups), np.ones(outputs))

    @classmethod
    def natural(
        cls, geometry: layers_lib.Geometry, kernel: Any, largest: np.ndarray
    ) -> "Units":
        """Those in which inputs, and what each adds to an output, are below 1.

        Args:
          geometry: The layer.
          kernel: Its float kernel.
          largest: `[Cin]`, finite, the largest magnitude of each input channel.
        """
        inputs = _power_of_two(np.asarray(largest, np.float64))
        # A dead input adds to no output, whatever its weights are.
        live = inputs[largest > 0.0]
        inputs = np.where(largest > 0.0, inputs, np.min(live) if live.size else 1.0)
        units = cls(inputs, np.ones(geometry.kernel_shape[-1]))
        scaled = np.abs(np.asarray(kernel, np.float64) * units.of_weights(geometry))
        return units._replace(
            outputs=_power_of_two(scaled.max(axis=tuple(range(scaled.ndim - 1))))
        )

    def undo(
        self, geometry: layers_lib.Geometry, moments: solvers.Moments
    ) -> solvers.Moments:
        """Moments measured in these units, in plain ones: float64, on the host."""
        groups = geometry.groups
        shape = (geometry.num_inputs, groups, -1)
        plain = np.broadcast_to(
            self.of_weights(geometry) * self.outputs, geometry.kernel_shape
        )
        rows = plain.reshape(shape)[:, :, 0].T[:, :, None]  # [groups, K, 1]
        columns = self.outputs.reshape(groups, 1, -1)
        gram, drift, power, count = (np.asarray(x, np.float64) for x in moments)
        parts: Any = (
            gram * rows * rows.swapaxes(1, 2),
            drift * rows * columns,
            power * columns[:, 0] ** 2,
            count,
        )
        return solvers.Moments(*parts)

    def of_weights(self, geometry: layers_lib.Geometry) -> np.ndarray:
        """What a kernel is multiplied with, `[*1, Cin / groups, Cout]`."""
        own = self.inputs.reshape(geometry.groups, -1).T
        own = np.repeat(own, geometry.kernel_shape[-1] // geometry.groups, axis=1)
        return (own / self.outputs).reshape(
            *[1] * len(geometry.window), *geometry.kernel_shape[-2:]
        )


def _power_of_two(values: np.ndarray) -> np.ndarray:
    """The power of two above each value, 1 above 0; none that float32 cannot invert."""
    exponents = np.clip(np.frexp(values)[1], -_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return np.where(values > 0.0, np.exp2(exponents), 1.0)


@jax.jit
def largest_inputs(inputs: jax.Array) -> jax.Array:
    """float32 `[Cin]`, the largest magnitude of each channel; NaN where one is NaN."""
    inputs = inputs.astype(jnp.float32)
    axes = tuple(range(inputs.ndim - 1))
    # Not the maximum of |x|, which XLA's CPU code takes far longer for.
    return jnp.maximum(jnp.max(inputs, axis=axes), -jnp.min(inputs, axis=axes))


def natural_units(layer: layers_lib.Layer, kernel: Any, inputs: jax.Array) -> Units:
    """`Units.natural` of a layer with these inputs.

    Raises:
      InputError: an input is not finite.
    """
    return Units.natural(layer.geometry, kernel, checked_largest(layer, inputs))


def checked_largest(layer: layers_lib.Layer, inputs: jax.Array) -> np.ndarray:
    """`largest_inputs` of a layer.

    Raises:
      InputError: an input is not finite.
    """
    largest = np.asarray(largest_inputs(inputs))
    check_finite(layer, "inputs", float(np.max(largest)))
    return largest


def check_finite(layer: layers_lib.Layer, what: str, value: float) -> None:
    """Raises InputError for a value that every comparison would be false with."""
    if not math.isfinite(value):
        raise errors.InputError(
            f"layer {layer.name}: {what} on the calibration images must be finite in "
            f"float32, got {value}"
        )


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
        kernel: jax.Array | np.ndarray,
        float_inputs: jax.Array,
        inputs: jax.Array,
        units: Units | None = None,
    ) -> solvers.Moments:
        """`Moments` of one layer, stacked over its channel groups.

        Args:
          geometry: The layer.
          kernel: Its float kernel.
          float_inputs: `[N, ...]`, its inputs in the float network.
          inputs: The same in the network quantized so far.
          units: What inputs and outputs are divided by first; those of inputs are the
            same whenever `inputs` are. Float32 throughout, if given.
        """
        inverse = None
        if units is not None:
            kernel = _scaled_kernel(geometry, kernel, units)
            inverse = (1.0 / units.inputs).astype(np.float32)
            inverse = inverse.reshape(*[1] * (inputs.ndim - 1), -1)
        # How rows are cut from the inputs does not depend on the number of outputs.
        unfolding = dataclasses.replace(
            geometry, kernel_shape=(*geometry.kernel_shape[:-1], 0)
        )
        known = inputs is self._inputs() and unfolding == self._unfolding
        positions = _positions(geometry, inputs.shape)
        if self._mesh is not None:
            moments = _collect_split(
                geometry, not known, self._mesh, kernel, inverse, float_inputs, inputs
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
                    inverse,
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


def _scaled_kernel(
    geometry: layers_lib.Geometry, kernel: Any, units: Units
) -> np.ndarray:
    scaled = np.asarray(kernel, np.float64) * units.of_weights(geometry)
    return scaled.astype(np.float32)


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
def _add_chunk(geometry, with_gram, moments, kernel, inverse, float_inputs, inputs):
    if inverse is not None:
        inputs, float_inputs = (
            x.astype(jnp.float32) * inverse for x in (inputs, float_inputs)
        )
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
def _collect_split(geometry, with_gram, mesh, kernel, inverse, float_inputs, inputs):
    """Moments of inputs that are split over a mesh, a copy on every device."""
    own = PartitionSpec(sharding.DATA_AXIS)

    def collect_own(kernel, inverse, float_inputs, inputs):
        chunk = _chunk_size(geometry, inputs.shape)

        def add(first, size, moments):
            parts = [
                jax.lax.dynamic_slice_in_dim(x, first, size)
                for x in (float_inputs, inputs)
            ]
            return _add_chunk(geometry, with_gram, moments, kernel, inverse, *parts)

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
        in_specs=(PartitionSpec(), PartitionSpec(), own, own),
        out_specs=PartitionSpec(),
        check_vma=False,  # The loop starts from zeros that are the same everywhere.
    )(kernel, inverse, float_inputs, inputs)
