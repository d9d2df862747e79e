# SPDX-License-Identifier: Apache-2.0
"""What a module does to a layer's output before anything else joins in.

EFRAP's public code compares float and quantized outputs not at the layer itself but
after the BatchNorm and ReLU that follow, and before a residual addition. `find_tails`
reads that chain off the module's own computation, so it holds for any module:

    conv -> BatchNorm -> relu -> ...        tail = BatchNorm, relu
    conv -> BatchNorm -> (+ shortcut)       tail = BatchNorm
    dense -> ...                            tail = nothing

The chain ends at the first activation function, before the product of the next layer or
any other, at a second operand that depends on the images, where the value is used
twice, or where its shape changes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jax_core

from nad_jax import errors
from nad_jax.models import layers as layers_lib

Tail = Callable[[jax.Array], jax.Array]

# Primitives at which a chain ends, the primitive itself included.
_ACTIVATIONS = ("max", "jit", "pjit", "custom_jvp_call", "tanh", "logistic", "erf")
# Primitives before which it ends: what follows is another layer, or as good as one.
_PRODUCTS = ("dot_general", "conv_general_dilated")


def find_tails(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    layers: list[layers_lib.Layer],
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Tail]:
    """Layer name -> function from the layer's output (bias included) to its tail's.

    A tail computes in the module's dtype, whatever its input has. It raises InputError
    for outputs of another shape than the module's own.

    Args:
      module: The Linen module.
      variables: Its variables.
      images: One batch; every tail takes outputs of exactly this batch size.
      layers: From `layers.find_layers`.
      apply_kwargs: Keyword arguments of the module's call.
    """

    def mark(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        if not layers_lib.is_layer_call(context):
            return outputs
        return checkpoint_name(outputs, "/".join(context.module.path))

    def forward(images):
        with nn.intercept_methods(mark):
            return module.apply(variables, images, **(apply_kwargs or {}))

    closed = jax.make_jaxpr(forward)(images)
    names = {layer.name for layer in layers}
    depends = _image_dependent(closed.jaxpr)
    tails: dict[str, Tail] = {}
    for equation in closed.jaxpr.eqns:
        name = equation.params.get("name")
        # Of a layer called twice, the first call counts: its inputs are the ones kept.
        if equation.primitive.name == "name" and name in names - set(tails):
            chain = _chain(closed.jaxpr, equation.outvars[0], depends)
            tails[name] = (
                _compile(closed, name, equation.outvars[0], chain, depends)
                if chain
                else _identity
            )
    return {name: tails.get(name, _identity) for name in names}


def _identity(outputs: jax.Array) -> jax.Array:
    return outputs


def _variables_of(equation) -> list[Any]:
    return [v for v in equation.invars if isinstance(v, jax_core.Var)]


def _image_dependent(jaxpr) -> set[Any]:
    depends = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(v in depends for v in _variables_of(equation)):
            depends.update(equation.outvars)
    return depends


def _chain(jaxpr, variable, depends) -> list[Any]:
    chain: list[Any] = []
    while True:
        users = [e for e in jaxpr.eqns if variable in _variables_of(e)]
        if len(users) != 1 or len(users[0].outvars) != 1:
            return chain
        (user,) = users
        others = [v for v in _variables_of(user) if v is not variable]
        same_shape = user.outvars[0].aval.shape == variable.aval.shape
        if not same_shape or any(v in depends for v in others) or _multiplies(user):
            return chain
        chain.append(user)
        variable = user.outvars[0]
        if user.primitive.name in _ACTIVATIONS:
            return chain


def _multiplies(equation) -> bool:
    """Whether an equation is a product, or has one in what it calls."""
    if equation.primitive.name in _PRODUCTS:
        return True
    called = jax_core.jaxprs_in_params(equation.params)
    return any(_multiplies(inner) for jaxpr in called for inner in jaxpr.eqns)


def _compile(closed, name, variable, chain, depends) -> Tail:
    """The chain as a function of `variable`; everything else is computed once."""
    inner = {v for e in chain for v in e.outvars} | {variable}
    outer = [v for e in chain for v in _variables_of(e) if v not in inner]
    outer = list(dict.fromkeys(outer))
    constants = jax_core.jaxpr_as_fun(
        jax_core.ClosedJaxpr(
            closed.jaxpr.replace(
                invars=[],
                outvars=outer,
                eqns=[
                    e
                    for e in closed.jaxpr.eqns
                    if not any(v in depends for v in e.outvars)
                ],
            ),
            closed.consts,
        )
    )()
    tail = jax_core.jaxpr_as_fun(
        jax_core.ClosedJaxpr(
            closed.jaxpr.replace(
                constvars=outer,
                invars=[variable],
                outvars=chain[-1].outvars,
                eqns=chain,
            ),
            constants,
        )
    )
    shape, dtype = variable.aval.shape, variable.aval.dtype

    def apply(outputs: jax.Array) -> jax.Array:
        # Batches are cut along the first axis, which need not be that of the images.
        if outputs.shape != shape:
            raise errors.InputError(
                f"layer {name}: outputs of a batch must have shape {shape} to go "
                f"through what follows the layer, got {outputs.shape}"
            )
        return jnp.asarray(tail(outputs.astype(dtype))[0])

    return apply
