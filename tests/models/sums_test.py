# SPDX-License-Identifier: Apache-2.0
"""Residual sums are found, and only they; a function with their operands replaced."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import models
from nad_jax.models import common, sums


class Block(nn.Module):
    """One sum: the input of "second", and of nothing else, plus "third"'s output."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(4, name="first")(x))
        y = nn.Dense(4, name="second")(x)
        y = nn.Dense(4, name="third")(nn.gelu(y))
        return nn.Dense(2, name="fc")(nn.relu(x + y))


@pytest.fixture(scope="module")
def block():
    variables = Block().init(jax.random.key(0), jnp.ones((1, 3)))
    return variables, jax.random.normal(jax.random.key(1), (5, 3))


@pytest.mark.slow
def test_biases_and_activation_functions_are_no_sums(block):
    """And an operand that is a layer's input comes with that layer's name."""
    variables, x = block
    seen = {}

    def record(name, value, layer):
        seen[name] = (np.asarray(value), layer)
        return value

    outputs = sums.run(lambda x: Block().apply(variables, x), x, record)
    np.testing.assert_allclose(outputs, Block().apply(variables, x), rtol=1e-6)
    assert list(seen) == ["sum0/left", "sum0/right"]
    assert seen["sum0/left"][1] == "second" and seen["sum0/right"][1] is None
    params = variables["params"]["first"]
    first = np.maximum(np.asarray(x) @ params["kernel"] + params["bias"][None], 0)
    np.testing.assert_allclose(seen["sum0/left"][0], first, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_is_put_in_place_of_an_operand_is_added(block):
    """Zero in place of both operands leaves the last layer's bias."""
    variables, x = block
    variables = jax.tree.map(lambda leaf: leaf + 0.25, variables)

    @jax.jit
    def zeroed(x):
        return sums.run(
            lambda x: Block().apply(variables, x), x, lambda n, v, _: jnp.zeros_like(v)
        )

    np.testing.assert_allclose(zeroed(x), np.full((5, 2), 0.25), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, count", [("resnet_8", 3), ("wrn_16_1", 6), ("preact_resnet_18", 8)]
)
def test_every_block_of_a_residual_net_has_one(name, count):
    model = models.build(name, num_classes=10, width=0.25)
    variables = common.init(model, jax.random.key(0), (16, 16, 3))
    shape = jax.ShapeDtypeStruct((1, 16, 16, 3), jnp.float32)
    apply = sums.mark_inputs(lambda x: model.apply(variables, x, train=False))
    closed = jax.make_jaxpr(apply)(shape)
    assert len(sums.find(closed.jaxpr, closed.jaxpr.invars)) == count


def test_names_of_operands_are_told_from_layers():
    assert sums.is_operand("sum0/left") and sums.is_operand("sum12/right")
    assert not any(map(sums.is_operand, ("conv1", "sum/left", "summary/left", "sum0")))
