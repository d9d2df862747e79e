# SPDX-License-Identifier: Apache-2.0
"""Walks a jaxpr and writes its equations as ONNX nodes.

Whatever depends on constants alone is computed here and now; the rest goes by the
table of `onnx_rules`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jax_core

from nad_jax import errors
from nad_jax.export import onnx_builder, onnx_rules


def run(
    builder: onnx_builder.Builder,
    jaxpr: Any,
    arguments: Sequence[onnx_builder.Value],
    constants: Sequence[Any],
    extra: dict[str, Callable[..., list[onnx_builder.Value] | None]],
    needed: Sequence[int] | None = None,
) -> list[onnx_builder.Value]:
    """Emits the nodes of a jaxpr and returns the values of its outputs.

    Args:
      builder: Takes the nodes.
      jaxpr: Open jaxpr.
      arguments: Its inputs.
      constants: Its captured arrays.
      extra: Handlers `(builder, equation, values)` of further primitives, by name; one
        that returns None leaves the equation to the table.
      needed: Which outputs are wanted; None = all.

    Raises:
      InputError: an operation without an ONNX counterpart here, or one on numbers
        other than float32.
    """
    known: dict[Any, onnx_builder.Value] = {}

    def read(atom: Any) -> onnx_builder.Value:
        if isinstance(atom, jax_core.Literal):
            aval: Any = atom.aval
            return onnx_builder.constant(np.asarray(atom.val, aval.dtype))
        return known[atom]

    known.update(
        zip(jaxpr.constvars, map(onnx_builder.constant, constants), strict=True)
    )
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


def _run_equation(builder, equation, values, extra) -> list[onnx_builder.Value]:
    name = equation.primitive.name
    results = extra[name](builder, equation, values) if name in extra else None
    if results is not None:
        return results
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
    rule = onnx_rules.RULES.get(name)
    if rule is None:
        raise errors.InputError(
            f"operation {name!r} cannot be written to ONNX; known are elementwise "
            "arithmetic, reductions, products, pooling and changes of shape"
        )
    result = rule(builder, equation, values)
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


def _fold(equation, values) -> list[onnx_builder.Value] | None:
    """The constant results of an equation; None if their size is not known yet."""
    name, params = equation.primitive.name, equation.params
    arrays = [value.constant for value in values]
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    if name in _IDENTITIES:
        return values
    if name in _NUMPY and avals[-1].dtype == jnp.float32:
        with np.errstate(all="ignore"):
            return [onnx_builder.constant(_NUMPY[name](*arrays))]
    if name == "broadcast_in_dim":
        sizes = [1] * len(params["shape"])
        for axis, size in zip(
            params["broadcast_dimensions"], arrays[0].shape, strict=True
        ):
            sizes[axis] = size
        return [onnx_builder.constant(arrays[0].reshape(sizes))]
    if not all(onnx_builder.is_static(aval.shape) for aval in avals):
        return None
    given = [
        np.broadcast_to(array, variable.aval.shape)
        for array, variable in zip(arrays, equation.invars, strict=True)
    ]
    if name == "reshape" and params["dimensions"] is None:
        return [onnx_builder.constant(given[0].reshape(params["new_sizes"]))]
    if name == "convert_element_type":
        return [onnx_builder.constant(given[0].astype(params["new_dtype"]))]
    results = equation.primitive.bind(*map(jnp.asarray, given), **params)
    return [onnx_builder.constant(x) for x in jax.tree.leaves(results)]
