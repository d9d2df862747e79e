# SPDX-License-Identifier: Apache-2.0
"""One rule for every JAX operation that may stand between two layers.

A rule `(builder, equation, values) -> value` emits the ONNX nodes of one equation of a
jaxpr and returns what it computes (several results: a list). `RULES` is the table.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import helper

from nad_jax import errors
from nad_jax.export import onnx_builder


def _elementwise(
    builder, op: str, values: Sequence[onnx_builder.Value]
) -> onnx_builder.Value:
    order = _common_order(values)
    name = builder.emit(op, [builder.tensor(value, order) for value in values])
    return onnx_builder.Value(_common_shape(values), name=name, order=order)


def _scaled(value: onnx_builder.Value, factor=None, summand=None) -> onnx_builder.Value:
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


def _arithmetic(op: str) -> Callable[..., onnx_builder.Value]:
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


def _fits(shape: onnx_builder.Shape, into: onnx_builder.Shape) -> bool:
    """Whether broadcasting `shape` to `into` leaves `into` as it is."""
    if len(shape) not in (0, len(into)):
        return False
    return all(
        size == 1 or (isinstance(there, int) and size == there)
        for size, there in zip(shape, into, strict=False)
    )


def _unary(op: str) -> Callable[..., onnx_builder.Value]:
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
    return _elementwise(
        builder, "Pow", [values[0], onnx_builder.constant(np.float32(exponent))]
    )


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
    return onnx_builder.Value(value.shape, name=name, order=value.order)


def _given(builder, equation, values, index: int = 0) -> onnx_builder.Value:
    """An operand as a full tensor without pending factors."""
    value = builder.full(values[index], equation.invars[index].aval.shape)
    if value.constant is not None:
        order = tuple(range(value.rank))
        return onnx_builder.Value(value.shape, name=builder.tensor(value), order=order)
    return builder.plain(value)


def _reduction(op: str) -> Callable[..., onnx_builder.Value]:
    def handler(builder, equation, values):
        value = _given(builder, equation, values)
        axes = equation.params["axes"]
        where = builder.integers(sorted(value.order.index(axis) for axis in axes))
        name = builder.emit(op, [value.name, where], keepdims=0)
        order = _after_removal(value.order, axes)
        return onnx_builder.Value(
            equation.outvars[0].aval.shape, name=name, order=order
        )

    return handler


def _transpose(builder, equation, values):
    value = builder.plain(values[0])
    permutation = equation.params["permutation"]
    order = tuple(permutation.index(axis) for axis in value.order)
    shape = tuple(value.shape[axis] for axis in permutation)
    return onnx_builder.Value(shape, name=value.name, order=order)


def _squeeze(builder, equation, values):
    value = _given(builder, equation, values)
    axes = equation.params["dimensions"]
    where = builder.integers(sorted(value.order.index(axis) for axis in axes))
    name = builder.emit("Squeeze", [value.name, where])
    order = _after_removal(value.order, axes)
    return onnx_builder.Value(equation.outvars[0].aval.shape, name=name, order=order)


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
    return onnx_builder.Value(tuple(sizes), name=name, order=tuple(range(rank)))


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
    return onnx_builder.Value(tuple(shape), name=name, order=tuple(range(len(shape))))


def _concatenate(builder, equation, values):
    values = [_given(builder, equation, values, i) for i in range(len(values))]
    order = _common_order(values)
    axis = order.index(equation.params["dimension"])
    name = builder.emit("Concat", [builder.tensor(v, order) for v in values], axis=axis)
    return onnx_builder.Value(equation.outvars[0].aval.shape, name=name, order=order)


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
    return onnx_builder.Value(equation.outvars[0].aval.shape, name=name, order=order)


def _cut_at(builder, value, starts, sizes) -> onnx_builder.Value:
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


def _cut(builder, value, starts, limits, strides) -> onnx_builder.Value:
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
    if not all(onnx_builder.is_static(tuple(x)) for x in numbers):
        raise errors.InputError("a slice along the batch axis cannot be exported")
    if not cut:
        return value
    where = [value.order.index(axis) for axis in cut]
    given = [builder.integers(x) for x in (numbers[0], numbers[1], where, numbers[2])]
    name = builder.emit("Slice", [value.name, *given])
    shape = list(value.shape)
    for axis, start, limit, stride in zip(cut, *numbers, strict=True):
        shape[axis] = -(-(limit - start) // stride)
    return onnx_builder.Value(tuple(shape), name=name, order=value.order)


def _split(builder, equation, values):
    value = _given(builder, equation, values)
    axis = value.order.index(equation.params["axis"])
    start, results = 0, []
    for size, variable in zip(equation.params["sizes"], equation.outvars, strict=True):
        given = [builder.integers([x]) for x in (start, start + size, axis)]
        name = builder.emit("Slice", [value.name, *given])
        results.append(
            onnx_builder.Value(variable.aval.shape, name=name, order=value.order)
        )
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
    return onnx_builder.Value(
        equation.outvars[0].aval.shape, name=name, order=value.order
    )


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
    return onnx_builder.Value(shape, name=name, order=tuple(range(len(shape))))


def _pooling(op: str) -> Callable[..., onnx_builder.Value]:
    def handler(builder, equation, values):
        value, params = _given(builder, equation, values), equation.params
        order = onnx_builder.channels_first(value.rank)
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
        result = onnx_builder.Value(shape, name=name, order=order)
        if op == "AveragePool":  # JAX sums and divides afterwards
            result = _scaled(result, factor=np.float32(math.prod(window)))
        return result

    return handler


def _after_removal(
    order: onnx_builder.Order, removed: Sequence[int]
) -> onnx_builder.Order:
    """The order of the axes that stay."""
    kept = [axis for axis in range(len(order)) if axis not in removed]
    return tuple(kept.index(axis) for axis in order if axis in kept)


def _common_order(values: Sequence[onnx_builder.Value]) -> onnx_builder.Order:
    """The order in which an elementwise node takes its inputs."""
    orders = [v.order for v in values if v.constant is None and v.rank]
    unusual = [order for order in orders if order != tuple(range(len(order)))]
    return (unusual or orders or [()])[0]


def _common_shape(values: Sequence[onnx_builder.Value]) -> onnx_builder.Shape:
    rank = max(value.rank for value in values)
    shape: list[Any] = [1] * rank
    for value in values:
        for axis, size in enumerate(value.shape):
            if not (isinstance(size, int) and size == 1):
                shape[axis] = size
    return tuple(shape)


RULES: dict[str, Callable[..., Any]] = {
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
