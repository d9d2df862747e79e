# SPDX-License-Identifier: Apache-2.0
"""JAX operations between the layers of a model, written as ONNX nodes.

`Builder` collects nodes; `run` walks a jaxpr and emits them. Three things are put off
as long as possible, so that the graph keeps only what must be computed:

* *Layout.* A tensor's axes may lie in another order than JAX's (`Value.order`): what
  leaves an ONNX Conv is `[N, C, H, W]` and stays so through additions, activations and
  reductions. Transposing costs a node only where an order is demanded.
* *Broadcasting.* ONNX broadcasts by itself, so a JAX broadcast is only remembered.
* *Constant factors and summands.* A chain of them, such as a BatchNorm in evaluation
  mode, becomes one factor and one summand (`Value.factor`, `Value.summand`).

Whatever depends on constants alone is computed here and now.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

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
        if value.constant is not None and _is_static(shape):
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


def _is_static(shape: Shape) -> bool:
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


def _after_removal(order: Order, removed: Sequence[int]) -> Order:
    """The order of the axes that stay."""
    kept = [axis for axis in range(len(order)) if axis not in removed]
    return tuple(kept.index(axis) for axis in order if axis in kept)


def _common_order(values: Sequence[Value]) -> Order:
    """The order in which an elementwise node takes its inputs."""
    orders = [v.order for v in values if v.constant is None and v.rank]
    unusual = [order for order in orders if order != tuple(range(len(order)))]
    return (unusual or orders or [()])[0]


def _common_shape(values: Sequence[Value]) -> Shape:
    rank = max(value.rank for value in values)
    shape: list[Any] = [1] * rank
    for value in values:
        for axis, size in enumerate(value.shape):
            if not (isinstance(size, int) and size == 1):
                shape[axis] = size
    return tuple(shape)


def run(
    builder: Builder,
    jaxpr: Any,
    arguments: Sequence[Value],
    constants: Sequence[Any],
    extra: dict[str, Callable[..., list[Value]]],
    needed: Sequence[int] | None = None,
) -> list[Value]:
    """Emits the nodes of a jaxpr and returns the values of its outputs.

    Args:
      builder: Takes the nodes.
      jaxpr: Open jaxpr.
      arguments: Its inputs.
      constants: Its captured arrays.
      extra: Handlers `(builder, equation, values)` of further primitives, by name.
      needed: Which outputs are wanted; None = all.

    Raises:
      InputError: an operation without an ONNX counterpart here, or one on numbers
        other than float32.
    """
    known: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        if isinstance(atom, jax_core.Literal):
            aval: Any = atom.aval
            return constant(np.asarray(atom.val, aval.dtype))
        return known[atom]

    known.update(zip(jaxpr.constvars, map(constant, constants), strict=True))
    known.update(zip(jaxpr.invars, arguments, strict=True))
    outputs = jaxpr.outvars if needed is None else [jaxpr.outvars[i] for i in needed]
    for equation in _needed_equations(jaxpr, outputs):
        values = [read(atom) for atom in equation.invars]
        results = _run_equation(builder, equation, values, extra)
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in outputs]


def _needed_equations(jaxpr, outputs):
    """The equations that the outputs depend on, in order."""
    wanted = {atom for atom in outputs if isinstance(atom, jax_core.Var)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if wanted.isdisjoint(equation.outvars):
            continue
        kept.append(equation)
        wanted.update(x for x in equation.invars if isinstance(x, jax_core.Var))
    return kept[::-1]


# Calls whose body simply runs in place, and the parameter that holds it.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "call_jaxpr",
    "checkpoint": "jaxpr",
    "remat2": "jaxpr",
}


def _run_equation(builder, equation, values, extra) -> list[Value]:
    name = equation.primitive.name
    if name in extra:
        return extra[name](builder, equation, values)
    if name in _CALLS:
        body = equation.params[_CALLS[name]]
        closed = isinstance(body, jax_core.ClosedJaxpr)
        inner, consts = (body.jaxpr, body.consts) if closed else (body, [])
        return run(builder, inner, values, consts, extra)
    for variable in equation.outvars:
        dtype = variable.aval.dtype
        if jnp.issubdtype(dtype, jnp.floating) and dtype != jnp.float32:
            raise errors.InputError(
                f"the model computes in {dtype.name}; only float32 can be exported"
            )
    if all(value.constant is not None for value in values):
        folded = _fold(equation, values)
        if folded is not None:
            return folded
    if name in _IDENTITIES:
        return values
    handler = _HANDLERS.get(name)
    if handler is None:
        raise errors.InputError(
            f"operation {name!r} cannot be written to ONNX; known are elementwise "
            "arithmetic, reductions, products, pooling and changes of shape"
        )
    result = handler(builder, equation, values)
    return result if isinstance(result, list) else [result]


_IDENTITIES = ("stop_gradient", "copy", "copy_p", "name", "optimization_barrier")

# What NumPy computes in float32 as JAX would; the rest of what is constant is left to
# JAX itself, which compiles something for every shape.
_NUMPY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "neg": np.negative,
    "exp": np.exp,
    "sqrt": np.sqrt,
    "square": np.square,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
}


def _fold(equation, values) -> list[Value] | None:
    """The constant results of an equation; None if their size is not known yet."""
    name, params = equation.primitive.name, equation.params
    arrays = [value.constant for value in values]
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    if name in _IDENTITIES:
        return values
    if name in _NUMPY and avals[-1].dtype == jnp.float32:
        with np.errstate(all="ignore"):
            return [constant(_NUMPY[name](*arrays))]
    if name == "broadcast_in_dim":
        sizes = [1] * len(params["shape"])
        for axis, size in zip(
            params["broadcast_dimensions"], arrays[0].shape, strict=True
        ):
            sizes[axis] = size
        return [constant(arrays[0].reshape(sizes))]
    if not all(_is_static(aval.shape) for aval in avals):
        return None
    given = [
        np.broadcast_to(array, variable.aval.shape)
        for array, variable in zip(arrays, equation.invars, strict=True)
    ]
    if name == "reshape" and params["dimensions"] is None:
        return [constant(given[0].reshape(params["new_sizes"]))]
    if name == "convert_element_type":
        return [constant(given[0].astype(params["new_dtype"]))]
    results = equation.primitive.bind(*map(jnp.asarray, given), **params)
    return [constant(x) for x in jax.tree.leaves(results)]


def _elementwise(builder, op: str, values: Sequence[Value]) -> Value:
    order = _common_order(values)
    name = builder.emit(op, [builder.tensor(value, order) for value in values])
    return Value(_common_shape(values), name=name, order=order)


def _scaled(value: Value, factor=None, summand=None) -> Value:
    """`value * factor + summand` without a node."""
    result = dataclasses.replace(value, plain=None)
    rank = max(value.rank, *(np.ndim(x) for x in (factor, summand) if x is not None))
    assert rank == value.rank, (value.shape, factor, summand)

    def ranked(x):
        x = np.asarray(x, np.float32)
        return x.reshape((1,) * (rank - x.ndim) + x.shape)

    if factor is not None:
        factor = ranked(factor)
        old = result.factor
        result.factor = factor if old is None else old * factor
        if result.summand is not None:
            result.summand = result.summand * factor
    if summand is not None:
        summand = ranked(summand)
        old = result.summand
        result.summand = summand if old is None else old + summand
    return result


def _arithmetic(op: str) -> Callable[..., Value]:
    """Add, Sub, Mul and Div; a constant operand waits in the value."""

    def handler(builder, equation, values):
        x, y = values
        tensor, other = (x, y.constant) if x.constant is None else (y, x.constant)
        if (
            other is None
            or equation.outvars[0].aval.dtype != jnp.float32
            or not _fits(other.shape, tensor.shape)
            or (op == "Div" and tensor is y)
        ):
            return _elementwise(builder, op, values)
        match op:
            case "Add":
                return _scaled(tensor, summand=other)
            case "Mul":
                return _scaled(tensor, factor=other)
            case "Div":
                return _scaled(tensor, factor=np.float32(1) / other)
        if tensor is x:
            return _scaled(tensor, summand=-other)
        return _scaled(tensor, factor=np.float32(-1), summand=other)

    return handler


def _fits(shape: Shape, into: Shape) -> bool:
    """Whether broadcasting `shape` to `into` leaves `into` as it is."""
    if len(shape) not in (0, len(into)):
        return False
    return all(
        size == 1 or (isinstance(there, int) and size == there)
        for size, there in zip(shape, into, strict=False)
    )


def _unary(op: str) -> Callable[..., Value]:
    return lambda builder, equation, values: _elementwise(builder, op, values[:1])


def _max(builder, equation, values):
    x, y = values
    tensor, other = (x, y.constant) if x.constant is None else (y, x.constant)
    if other is not None and not np.any(other) and tensor.rank >= other.ndim:
        return _elementwise(builder, "Relu", [tensor])
    return _elementwise(builder, "Max", values)


def _rsqrt(builder, equation, values):
    root = _elementwise(builder, "Sqrt", values)
    return _elementwise(builder, "Reciprocal", [root])


def _erfc(builder, equation, values):
    erf = _elementwise(builder, "Erf", values)
    return _scaled(erf, factor=np.float32(-1), summand=np.float32(1))


def _square(builder, equation, values):
    return _elementwise(builder, "Mul", [values[0], values[0]])


def _integer_pow(builder, equation, values):
    exponent = equation.params["y"]
    if exponent == 2:
        return _square(builder, equation, values)
    return _elementwise(builder, "Pow", [values[0], constant(np.float32(exponent))])


def _log1p(builder, equation, values):
    return _elementwise(builder, "Log", [_scaled(values[0], summand=np.float32(1))])


def _not_equal(builder, equation, values):
    return _elementwise(builder, "Not", [_elementwise(builder, "Equal", values)])


def _select(builder, equation, values):
    if len(values) != 3 or equation.invars[0].aval.dtype != jnp.bool_:
        raise errors.InputError(
            "select_n among more than two cases cannot be written to ONNX; use "
            "jnp.where"
        )
    condition, if_false, if_true = values
    return _elementwise(builder, "Where", [condition, if_true, if_false])


def _clamp(builder, equation, values):
    low, x, high = values
    return _elementwise(builder, "Min", [_elementwise(builder, "Max", [x, low]), high])


def _convert(builder, equation, values):
    source, target = equation.invars[0].aval.dtype, equation.params["new_dtype"]
    if source == target:
        return values[0]
    value = builder.plain(values[0])
    name = builder.emit(
        "Cast", [value.name], to=helper.np_dtype_to_tensor_dtype(np.dtype(target))
    )
    return Value(value.shape, name=name, order=value.order)


def _given(builder, equation, values, index: int = 0) -> Value:
    """An operand as a full tensor without pending factors."""
    value = builder.full(values[index], equation.invars[index].aval.shape)
    if value.constant is not None:
        order = tuple(range(value.rank))
        return Value(value.shape, name=builder.tensor(value), order=order)
    return builder.plain(value)


def _reduction(op: str) -> Callable[..., Value]:
    def handler(builder, equation, values):
        value = _given(builder, equation, values)
        axes = equation.params["axes"]
        where = builder.integers(sorted(value.order.index(axis) for axis in axes))
        name = builder.emit(op, [value.name, where], keepdims=0)
        order = _after_removal(value.order, axes)
        return Value(equation.outvars[0].aval.shape, name=name, order=order)

    return handler


def _transpose(builder, equation, values):
    value = builder.plain(values[0])
    permutation = equation.params["permutation"]
    order = tuple(permutation.index(axis) for axis in value.order)
    shape = tuple(value.shape[axis] for axis in permutation)
    return Value(shape, name=value.name, order=order)


def _squeeze(builder, equation, values):
    value = _given(builder, equation, values)
    axes = equation.params["dimensions"]
    where = builder.integers(sorted(value.order.index(axis) for axis in axes))
    name = builder.emit("Squeeze", [value.name, where])
    order = _after_removal(value.order, axes)
    return Value(equation.outvars[0].aval.shape, name=name, order=order)


def _broadcast(builder, equation, values):
    value, rank = values[0], len(equation.params["shape"])
    if value.rank == rank:
        return value
    places = equation.params["broadcast_dimensions"]
    added = [axis for axis in range(rank) if axis not in places]
    name = builder.emit("Unsqueeze", [builder.tensor(value), builder.integers(added)])
    sizes: list[Any] = [1] * rank
    for axis, size in zip(places, value.shape, strict=True):
        sizes[axis] = size
    return Value(tuple(sizes), name=name, order=tuple(range(rank)))


def _reshape(builder, equation, values):
    shape = equation.params["new_sizes"]
    name = builder.tensor(_given(builder, equation, values))
    symbolic = [axis for axis, size in enumerate(shape) if not isinstance(size, int)]
    if len(symbolic) > 1:
        raise errors.InputError(
            f"a reshape to {shape} spreads the batch over several axes; keep the "
            "batch axis whole"
        )
    sizes = [-1 if axis in symbolic else size for axis, size in enumerate(shape)]
    name = builder.emit("Reshape", [name, builder.integers(sizes)])
    return Value(tuple(shape), name=name, order=tuple(range(len(shape))))


def _concatenate(builder, equation, values):
    values = [_given(builder, equation, values, i) for i in range(len(values))]
    order = _common_order(values)
    axis = order.index(equation.params["dimension"])
    name = builder.emit("Concat", [builder.tensor(v, order) for v in values], axis=axis)
    return Value(equation.outvars[0].aval.shape, name=name, order=order)


def _slice(builder, equation, values):
    value = _given(builder, equation, values)
    params = equation.params
    strides = params["strides"] or (1,) * value.rank
    return _cut(
        builder, value, params["start_indices"], params["limit_indices"], strides
    )


def _dynamic_slice(builder, equation, values):
    value = _given(builder, equation, values)
    starts = [start.constant for start in values[1:]]
    return _cut_at(builder, value, starts, equation.params["slice_sizes"])


def _gather(builder, equation, values):
    """Indexing by constant integers, `x[:, 0]`, which is a slice in disguise."""
    value, where = _given(builder, equation, values), values[1].constant
    params, numbers = equation.params, equation.params["dimension_numbers"]
    sizes, collapsed = params["slice_sizes"], numbers.collapsed_slice_dims
    if where is None or where.ndim != 1 or numbers.operand_batching_dims:
        raise errors.InputError(
            "gather cannot be written to ONNX, except indexing by constant integers"
        )
    starts: list[Any] = [np.int32(0)] * value.rank
    for axis, start in zip(numbers.start_index_map, where, strict=True):
        starts[axis] = start
    value = _cut_at(builder, value, starts, sizes)
    axes = builder.integers(sorted(value.order.index(axis) for axis in collapsed))
    name = builder.emit("Squeeze", [value.name, axes]) if collapsed else value.name
    order = _after_removal(value.order, collapsed)
    return Value(equation.outvars[0].aval.shape, name=name, order=order)


def _cut_at(builder, value, starts, sizes) -> Value:
    """A slice of given sizes at constant places, moved inside as JAX would."""
    limits = list(sizes)
    places = [0] * value.rank
    for axis, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        if size == value.shape[axis]:
            continue
        if start is None or not isinstance(value.shape[axis], int):
            raise errors.InputError(
                "only slices at constant places of axes other than the batch can be "
                "exported"
            )
        places[axis] = min(max(int(start), 0), value.shape[axis] - size)
        limits[axis] = places[axis] + size
    return _cut(builder, value, places, limits, (1,) * value.rank)


def _cut(builder, value, starts, limits, strides) -> Value:
    cut = [
        axis
        for axis in range(value.rank)
        if not (
            isinstance(starts[axis], int)
            and starts[axis] == 0
            and limits[axis] == value.shape[axis]
            and strides[axis] == 1
        )
    ]
    numbers = [[x[axis] for axis in cut] for x in (starts, limits, strides)]
    if not all(_is_static(tuple(x)) for x in numbers):
        raise errors.InputError("a slice along the batch axis cannot be exported")
    if not cut:
        return value
    where = [value.order.index(axis) for axis in cut]
    given = [builder.integers(x) for x in (numbers[0], numbers[1], where, numbers[2])]
    name = builder.emit("Slice", [value.name, *given])
    shape = list(value.shape)
    for axis, start, limit, stride in zip(cut, *numbers, strict=True):
        shape[axis] = -(-(limit - start) // stride)
    return Value(tuple(shape), name=name, order=value.order)


def _split(builder, equation, values):
    value = _given(builder, equation, values)
    axis = value.order.index(equation.params["axis"])
    start, results = 0, []
    for size, variable in zip(equation.params["sizes"], equation.outvars, strict=True):
        given = [builder.integers([x]) for x in (start, start + size, axis)]
        name = builder.emit("Slice", [value.name, *given])
        results.append(Value(variable.aval.shape, name=name, order=value.order))
        start += size
    return results


def _pad(builder, equation, values):
    value, filler = _given(builder, equation, values), values[1].constant
    config = [equation.params["padding_config"][axis] for axis in value.order]
    if filler is None or any(interior for _, _, interior in config):
        raise errors.InputError(
            "only padding around a tensor with a constant can be exported"
        )
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    name = builder.emit(
        "Pad", [value.name, builder.integers(pads), builder.array(filler)]
    )
    return Value(equation.outvars[0].aval.shape, name=name, order=value.order)


def _dot_general(builder, equation, values):
    left, right = (_given(builder, equation, values, i) for i in (0, 1))
    contract, batch = equation.params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    names: list[dict[int, str]] = [{}, {}]
    for pairs in (batch, contract):
        for axes in zip(*pairs, strict=True):
            letter = next(letters)
            names[0][axes[0]] = names[1][axes[1]] = letter
    result = [names[0][axis] for axis in batch[0]]
    for operand, own in ((left, names[0]), (right, names[1])):
        for axis in range(operand.rank):
            if axis not in own:
                own[axis] = next(letters)
                result.append(own[axis])
    terms = [
        "".join(own[axis] for axis in operand.order)
        for operand, own in ((left, names[0]), (right, names[1]))
    ]
    text = f"{terms[0]},{terms[1]}->{''.join(result)}"
    name = builder.emit("Einsum", [left.name, right.name], equation=text)
    shape = equation.outvars[0].aval.shape
    return Value(shape, name=name, order=tuple(range(len(shape))))


def _pooling(op: str) -> Callable[..., Value]:
    def handler(builder, equation, values):
        value, params = _given(builder, equation, values), equation.params
        order = channels_first(value.rank)
        window, padding = params["window_dimensions"], params["padding"]
        whole = (params["base_dilation"], params["window_dilation"])
        if (
            value.rank < 3
            or any(d != 1 for dilation in whole for d in dilation)
            or any(window[a] != 1 or tuple(padding[a]) != (0, 0) for a in order[:2])
            or any(params["window_strides"][axis] != 1 for axis in order[:2])
        ):
            raise errors.InputError(
                "only pooling over the positions of [N, *positions, C] without "
                f"dilation can be exported, got a window {tuple(window)}"
            )
        positions = order[2:]
        attributes: dict[str, Any] = {
            "kernel_shape": [window[axis] for axis in positions],
            "strides": [params["window_strides"][axis] for axis in positions],
            "pads": [padding[axis][side] for side in (0, 1) for axis in positions],
        }
        if op == "AveragePool":
            attributes["count_include_pad"] = 1
        name = builder.emit(op, [builder.tensor(value, order)], **attributes)
        shape = equation.outvars[0].aval.shape
        result = Value(shape, name=name, order=order)
        if op == "AveragePool":  # JAX sums and divides afterwards
            result = _scaled(result, factor=np.float32(math.prod(window)))
        return result

    return handler


_HANDLERS: dict[str, Callable[..., Any]] = {
    "add": _arithmetic("Add"),
    "add_any": _arithmetic("Add"),
    "sub": _arithmetic("Sub"),
    "mul": _arithmetic("Mul"),
    "div": _arithmetic("Div"),
    "max": _max,
    "min": lambda builder, equation, values: _elementwise(builder, "Min", values),
    "pow": lambda builder, equation, values: _elementwise(builder, "Pow", values),
    "eq": lambda builder, equation, values: _elementwise(builder, "Equal", values),
    "gt": lambda builder, equation, values: _elementwise(builder, "Greater", values),
    "lt": lambda builder, equation, values: _elementwise(builder, "Less", values),
    "ge": lambda builder, equation, values: _elementwise(
        builder, "GreaterOrEqual", values
    ),
    "le": lambda builder, equation, values: _elementwise(
        builder, "LessOrEqual", values
    ),
    "and": lambda builder, equation, values: _elementwise(builder, "And", values),
    "or": lambda builder, equation, values: _elementwise(builder, "Or", values),
    "ne": _not_equal,
    "not": _unary("Not"),
    "neg": _unary("Neg"),
    "abs": _unary("Abs"),
    "sign": _unary("Sign"),
    "floor": _unary("Floor"),
    "ceil": _unary("Ceil"),
    "exp": _unary("Exp"),
    "log": _unary("Log"),
    "log1p": _log1p,
    "sqrt": _unary("Sqrt"),
    "rsqrt": _rsqrt,
    "tanh": _unary("Tanh"),
    "sin": _unary("Sin"),
    "cos": _unary("Cos"),
    "erf": _unary("Erf"),
    "erfc": _erfc,
    "logistic": _unary("Sigmoid"),
    "square": _square,
    "integer_pow": _integer_pow,
    "select_n": _select,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "reduce_sum": _reduction("ReduceSum"),
    "reduce_max": _reduction("ReduceMax"),
    "reduce_min": _reduction("ReduceMin"),
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "concatenate": _concatenate,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "split": _split,
    "pad": _pad,
    "dot_general": _dot_general,
    "reduce_window_max": _pooling("MaxPool"),
    "reduce_window_sum": _pooling("AveragePool"),
}


def initializers(builder: Builder) -> list[onnx.TensorProto]:
    """The constants that some node uses."""
    used = {name for node in builder.nodes for name in node.input}
    return [
        numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name)
        for name, array in builder.arrays.items()
        if name in used
    ]
