# SPDX-License-Identifier: Apache-2.0
"""A growing ONNX graph, and the values that flow through it.

`Builder` collects nodes. Three things are put off as long as possible, so that the
graph keeps only what must be computed:

* *Layout.* A tensor's axes may lie in another order than JAX's (`Value.order`): what
  leaves an ONNX Conv is `[N, C, H, W]` and stays so through additions, activations and
  reductions. Transposing costs a node only where an order is demanded.
* *Broadcasting.* ONNX broadcasts by itself, so a JAX broadcast is only remembered.
* *Constant factors and summands.* A chain of them, such as a BatchNorm in evaluation
  mode, becomes one factor and one summand (`Value.factor`, `Value.summand`).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from nad_jax import errors

try:
    import onnx
    from onnx import helper, numpy_helper
except ImportError as error:
    raise errors.InputError(
        f"ONNX export needs the package onnx; install nad_jax[export] ({error})"
    ) from None

# The batch size of the graph's input; every other size is a number.
BATCH = "N"
IMAGES = "images"
LOGITS = "logits"

# A factor this close to 1 is one: BatchNorm folded into its layer leaves
# 1 / sqrt((1 - epsilon) + epsilon), which float32 may miss by its last bits.
_UNIT = 4 * float(np.finfo(np.float32).epsneg)

Shape = tuple[Any, ...]  # numbers and symbolic batch sizes
Order = tuple[int, ...]


@dataclasses.dataclass(eq=False)
class Value:
    """A JAX value during the walk: a constant, or `tensor * factor + summand`.

    Attributes:
      shape: In JAX's order of axes; 1 where a broadcast is only remembered.
      constant: The value itself, if it does not depend on the images.
      name: The ONNX tensor otherwise.
      order: Axis i of the ONNX tensor is axis `order[i]` of the JAX value.
      factor: float32 of the same rank, broadcastable; None = 1.
      summand: float32 of the same rank, broadcastable; None = 0.
      plain: The same value with factor and summand applied, once that was needed.
    """

    shape: Shape
    constant: np.ndarray | None = None
    name: str = ""
    order: Order = ()
    factor: np.ndarray | None = None
    summand: np.ndarray | None = None
    plain: "Value | None" = None

    @property
    def rank(self) -> int:
        return len(self.shape)


def constant(array: Any) -> Value:
    array = np.asarray(array)
    return Value(array.shape, constant=array)


def channels_first(rank: int) -> Order:
    """The order `[N, C, *positions]` of a JAX value `[N, *positions, C]`."""
    return (0, rank - 1, *range(1, rank - 1))


class Builder:
    """The nodes and constants of a growing ONNX graph."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, np.ndarray] = {}
        self._names = {IMAGES, LOGITS}
        self._known: dict[tuple[Any, ...], str] = {}

    def fresh(self, hint: str) -> str:
        """A tensor name that is not taken."""
        name, count = hint, 0
        while name in self._names:
            count += 1
            name = f"{hint}_{count}"
        self._names.add(name)
        return name

    def emit(self, op: str, inputs: Sequence[str], hint: str = "", **attributes) -> str:
        """Adds a node with one output and returns the output's name."""
        output = self.fresh(hint or op.lower())
        node = helper.make_node(op, list(inputs), [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def once(self, op: str, inputs: Sequence[str], hint: str = "", **attributes) -> str:
        """`emit`, unless the very same node exists already."""
        key = (op, *inputs, *sorted((k, str(v)) for k, v in attributes.items()))
        if key not in self._known:
            self._known[key] = self.emit(op, inputs, hint, **attributes)
        return self._known[key]

    def array(self, array: np.ndarray, hint: str = "constant") -> str:
        """The name of an initializer; equal arrays of one hint share it."""
        array = np.asarray(array)
        key = (hint, str(array.dtype), array.shape, array.tobytes())
        if key not in self._known:
            name = self.fresh(hint)
            self._known[key] = name
            self.arrays[name] = array
        return self._known[key]

    def integers(self, numbers: Sequence[int]) -> str:
        return self.array(np.asarray(numbers, np.int64))

    def plain(self, value: Value) -> Value:
        """The value with its factor and summand applied by nodes."""
        if value.factor is None and value.summand is None:
            return value
        if value.plain is None:
            order, name = value.order, value.name
            factor, summand = value.factor, value.summand
            if factor is not None and np.all(np.abs(factor - 1) <= _UNIT):
                factor = None
            if factor is not None and _is_per_channel(value, factor, summand):
                # One pass over the tensor instead of two.
                channels = value.shape[-1]
                one, zero = np.ones(channels), np.zeros(channels)
                given = (factor, zero if summand is None else summand, zero, one)
                given = [np.broadcast_to(x.ravel(), (channels,)) for x in given]
                name = self.emit(
                    "BatchNormalization",
                    [name, *(self.array(x.astype(np.float32)) for x in given)],
                    epsilon=0.0,
                )
                factor = summand = None
            if factor is not None:
                factor = self.array(_ordered(factor, order))
                name = self.emit("Mul", [name, factor])
            if summand is not None and np.any(summand):
                summand = self.array(_ordered(summand, order))
                name = self.emit("Add", [name, summand])
            value.plain = Value(value.shape, name=name, order=order)
        return value.plain

    def tensor(self, value: Value, order: Order | None = None) -> str:
        """The name of an ONNX tensor that holds the value with its axes in `order`.

        A value without axes fits every order.
        """
        if order is None or value.rank == 0:
            order = tuple(range(value.rank))
        if value.constant is not None:
            return self.array(_ordered(value.constant, order))
        value = self.plain(value)
        if value.order == order:
            return value.name
        permutation = [value.order.index(axis) for axis in order]
        return self.once("Transpose", [value.name], perm=permutation)

    def full(self, value: Value, shape: Shape) -> Value:
        """The value with every remembered broadcast carried out."""
        if value.constant is not None and is_static(shape):
            return constant(np.broadcast_to(value.constant, shape))
        if value.shape == shape:
            return value
        if value.constant is not None:
            name, order = self.tensor(value), tuple(range(value.rank))
        else:
            value = self.plain(value)
            name, order = value.name, value.order
        sizes = []
        for axis in order:
            if isinstance(shape[axis], int):
                sizes.append(self.integers([shape[axis]]))
            else:
                sizes.append(self.once("Shape", [IMAGES], start=0, end=1))
        target = self.once("Concat", sizes, axis=0) if len(sizes) > 1 else sizes[0]
        return Value(shape, name=self.emit("Expand", [name, target]), order=order)


def _ordered(array: np.ndarray, order: Order) -> np.ndarray:
    return array.transpose(order) if array.ndim == len(order) else array


def is_static(shape: Shape) -> bool:
    return all(isinstance(size, int) for size in shape)


def _is_per_channel(value, factor, summand) -> bool:
    """Whether an ONNX BatchNormalization can do it."""
    rank = value.rank
    return (
        rank >= 3
        and value.order == channels_first(rank)
        and isinstance(value.shape[-1], int)
        and all(
            x is None or math.prod(x.shape) == x.shape[-1] for x in (factor, summand)
        )
    )


def initializers(builder: Builder) -> list[onnx.TensorProto]:
    """The constants that some node uses."""
    used = {name for node in builder.nodes for name in node.input}
    return [
        numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        for name, array in builder.arrays.items()
        if name in used
    ]
