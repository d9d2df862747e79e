# SPDX-License-Identifier: Apache-2.0
"""The residual sums of a module, seen without editing it.

A runtime computes in integers only between tensors that all have a grid. Layers are
seen by intercepting their calls; a sum is a bare `+` in a module's code and is found in
its trace instead: an addition of two tensors of one shape that have passed through
different layers. (Biases and BatchNorm add something that has passed through none, and
what an activation function adds comes from the same ones.)

    x ----------------------------- sum0/left
     \\-> conv1 -> ... -> conv2 ---- sum0/right

Sums are numbered in the order of the trace. Those inside `jit`, `remat` or `scan` are
left alone.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jax_core

from nad_jax.models import layers as layers_lib

SIDES = ("left", "right")
_PREFIX = "sum"
_INPUT_OF = "input of "


def is_operand(name: str) -> bool:
    """Whether a name is that of a sum's operand, not of a layer."""
    stem, _, side = name.rpartition("/")
    return side in SIDES and stem.removeprefix(_PREFIX).isdigit()


def mark_input(inputs: jax.Array, layer: str) -> jax.Array:
    """The same tensor, in a trace on the record as what that layer takes."""
    return checkpoint_name(inputs, _INPUT_OF + layer)


def mark_inputs(function: Callable[[jax.Array], Any]) -> Callable[[jax.Array], Any]:
    """A function that applies a module, with the input of every layer marked."""

    def mark(next_fun, args, kwargs, context):
        if layers_lib.is_layer_call(context):
            inputs = layers_lib.input_of(args, kwargs)
            return next_fun(mark_input(inputs, "/".join(context.module.path)))
        return next_fun(*args, **kwargs)

    def marked(images):
        with nn.intercept_methods(mark):
            return function(images)

    return marked


def find(jaxpr: Any, images: Sequence[Any]) -> dict[int, tuple[str, str]]:
    """Index of each sum's equation -> names of its two operands.

    Args:
      jaxpr: Open jaxpr of a function with marked inputs.
      images: Its input variables that are images.
    """
    # The layers that each value which depends on the images has passed through.
    passed: dict[Any, frozenset[str]] = dict.fromkeys(images, frozenset())
    found = {}
    for index, equation in enumerate(jaxpr.eqns):
        operands = [
            x for x in equation.invars if isinstance(x, jax_core.Var) and x in passed
        ]
        if not operands:
            continue
        layers = frozenset().union(*(passed[x] for x in operands))
        if (layer := _taker(equation)) is not None:
            layers |= {layer}
        passed.update(dict.fromkeys(equation.outvars, layers))
        if equation.primitive.name != "add" or len(operands) != 2:
            continue
        avals: list[Any] = [operand.aval for operand in operands]
        alike = avals[0].shape == avals[1].shape
        is_float = jnp.issubdtype(avals[0].dtype, jnp.floating)
        if alike and is_float and passed[operands[0]] != passed[operands[1]]:
            name = f"{_PREFIX}{len(found)}"
            found[index] = (f"{name}/{SIDES[0]}", f"{name}/{SIDES[1]}")
    return found


def run(
    function: Callable[[jax.Array], Any],
    images: jax.Array,
    replace: Callable[[str, jax.Array, str | None], jax.Array],
) -> Any:
    """`function(images)` with every operand of a sum replaced.

    Args:
      function: Applies a module to images; traced once.
      images: A batch; a tracer inside `jit`.
      replace: (name, value, layer) -> value; `layer` is the name of a layer that takes
        the very same tensor as its input, or None.
    """
    closed, shape = jax.make_jaxpr(mark_inputs(function), return_shape=True)(images)
    jaxpr = closed.jaxpr
    names = find(jaxpr, jaxpr.invars)
    takers = _takers(jaxpr)
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known[jaxpr.invars[0]] = images

    def read(atom):
        return atom.val if isinstance(atom, jax_core.Literal) else known[atom]

    for index, equation in enumerate(jaxpr.eqns):
        values = [read(atom) for atom in equation.invars]
        if index in names:
            values = [
                replace(name, value, takers.get(atom))
                for name, value, atom in zip(
                    names[index], values, equation.invars, strict=True
                )
            ]
        params = equation.primitive.get_bind_params(equation.params)
        with equation.ctx.manager:
            results = equation.primitive.bind(*values, **params)
        if not equation.primitive.multiple_results:
            results = [results]
        known.update(zip(equation.outvars, results, strict=True))
    leaves = [read(atom) for atom in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shape), leaves)


def _taker(equation) -> str | None:
    """The layer that takes what an equation returns, if it is a mark."""
    name = equation.params.get("name")
    if equation.primitive.name != "name" or not name.startswith(_INPUT_OF):
        return None
    return name.removeprefix(_INPUT_OF)


def _takers(jaxpr) -> Mapping[Any, str]:
    """Variable -> the first layer that takes it."""
    named = [
        (equation.invars[0], _taker(equation))
        for equation in jaxpr.eqns
        if equation.invars
    ]
    return {variable: layer for variable, layer in reversed(named) if layer}
