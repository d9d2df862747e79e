# SPDX-License-Identifier: Apache-2.0
"""What follows a layer, read off a module, against numpy written from its source."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.defenses import activation_tails
from nad_jax.models import layers as layers_lib

EPSILON = 0.25


class Block(nn.Module):
    """One layer for each way in which a tail can end."""

    @nn.compact
    def __call__(self, x, *, slope=0.0):
        def norm(name):
            return nn.BatchNorm(use_running_average=True, epsilon=EPSILON, name=name)

        def conv(name):
            return nn.Conv(3, (1, 1), name=name)

        x = nn.relu(norm("norm_relu")(conv("relu")(x)))
        x = x + norm("norm_added")(conv("added")(x))
        x = nn.gelu(conv("gelu")(x), approximate=False)
        x = nn.sigmoid(conv("gate")(x)) * x
        y = conv("forked")(x)
        x = nn.relu(y) + y
        x = jnp.maximum(2.0 * conv("scaled")(x) - 1.0, slope)
        x = nn.relu(nn.LayerNorm(name="layer_norm")(conv("normalized")(x)))
        shift = self.param("shift", nn.initializers.normal(1.0), (1, 4, 4, 3))
        x = jnp.tanh(conv("shifted")(x) + shift)
        x = nn.Dense(5, name="pooled")(x).mean(axis=(1, 2))
        return nn.Dense(2, name="logits")(x)


@pytest.fixture(scope="module")
def block():
    """Variables, and the tails of every layer for batches of two images."""
    module, images = Block(), jnp.ones((2, 4, 4, 3))
    generator = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.5, 2, leaf.shape), jnp.float32),
        jax.eval_shape(module.init, jax.random.key(0), images),
    )
    found = layers_lib.find_layers(module, variables, images)
    return variables, activation_tails.find_tails(module, variables, images, found)


def normalized(variables, name, outputs):
    params, stats = variables["params"][name], variables["batch_stats"][name]
    mean, variance, scale, bias = (
        np.asarray(value, np.float64)
        for value in (stats["mean"], stats["var"], params["scale"], params["bias"])
    )
    return (outputs - mean) / np.sqrt(variance + EPSILON) * scale + bias


TAILS = {
    "relu": lambda v, x: np.maximum(normalized(v, "norm_relu", x), 0),
    "added": lambda v, x: normalized(v, "norm_added", x),
    # Flax writes gelu out: x * Phi(x) uses x twice.
    "gelu": lambda v, x: x,
    "gate": lambda v, x: 1 / (1 + np.exp(-x)),
    "forked": lambda v, x: x,
    "scaled": lambda v, x: np.maximum(2 * x - 1, 0),
    "normalized": lambda v, x: x,
    "shifted": lambda v, x: np.tanh(x + v["params"]["shift"]),
    "pooled": lambda v, x: x,
    "logits": lambda v, x: x,
}


@pytest.mark.parametrize("name", TAILS)
def test_a_tail_is_what_follows_the_layer_alone(block, name):
    variables, tails = block
    shape = {"pooled": (2, 4, 4, 5), "logits": (2, 2)}.get(name, (2, 4, 4, 3))
    outputs = np.random.default_rng(1).normal(size=shape)
    got = tails[name](jnp.asarray(outputs, jnp.float32))
    np.testing.assert_allclose(
        got, TAILS[name](variables, outputs), rtol=1e-4, atol=1e-5
    )


def test_every_layer_has_a_tail(block):
    assert set(block[1]) == set(TAILS)


@pytest.mark.slow
def test_tails_work_under_jit_and_have_gradients(block):
    variables, tails = block
    outputs = jnp.asarray(
        np.random.default_rng(1).normal(size=(2, 4, 4, 3)), jnp.float32
    )
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(tails["relu"](x))))(outputs)
    stats, params = variables["batch_stats"]["norm_relu"], variables["params"]
    factor = np.asarray(params["norm_relu"]["scale"] / np.sqrt(stats["var"] + EPSILON))
    is_on = normalized(variables, "norm_relu", np.asarray(outputs, np.float64)) > 0
    assert 0 < is_on.mean() < 1
    np.testing.assert_allclose(gradient, is_on * factor, rtol=1e-4, atol=1e-6)


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x, *, first_relu):
        shared = nn.Dense(3, name="shared")
        first = shared(x)
        first = nn.relu(first) if first_relu else first + x
        return jnp.tanh(shared(first)).mean()


@pytest.mark.slow
@pytest.mark.parametrize("first_relu", [True, False])
def test_the_tail_of_a_layer_called_twice_is_that_of_its_first_call(first_relu):
    """The inputs that are kept are those of the first call."""
    module, inputs = Twice(), jnp.ones((2, 3))
    kwargs = {"first_relu": first_relu}
    variables = module.init(jax.random.key(0), inputs, **kwargs)
    found = layers_lib.find_layers(module, variables, inputs, apply_kwargs=kwargs)
    tails = activation_tails.find_tails(
        module, variables, inputs, found, apply_kwargs=kwargs
    )
    outputs = np.asarray([[-2.0, 0.5, 3.0]] * 2, np.float32)
    expected = np.maximum(outputs, 0) if first_relu else outputs
    np.testing.assert_allclose(tails["shared"](jnp.asarray(outputs)), expected)


class Square(nn.Module):
    """Layers whose outputs have the shape of their inputs, one behind the other."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, name="dense")(x)
        x = 2.0 * nn.Dense(4, use_bias=False, name="scaled")(x)
        x = nn.Conv(4, (3, 3), feature_group_count=4, name="depthwise")(x)
        x = nn.relu(nn.Conv(4, (1, 1), name="pointwise")(x))
        x = nn.Dense(4, name="mixed")(x) @ jnp.ones((4, 4))
        x = jax.jit(lambda x: nn.relu(x @ jnp.ones((4, 4))))(
            nn.Dense(4, name="jitted")(x)
        )
        return nn.Dense(4, name="last")(x)


@pytest.mark.slow
def test_a_tail_ends_before_the_next_product():
    """Also before one that is hidden in a call."""
    module, images = Square(), jnp.ones((1, 3, 3, 4))
    variables = jax.tree.map(
        lambda leaf: jnp.ones(leaf.shape),
        jax.eval_shape(module.init, jax.random.key(0), images),
    )
    found = layers_lib.find_layers(module, variables, images)
    tails = activation_tails.find_tails(module, variables, images, found)
    outputs = np.random.default_rng(0).normal(size=(1, 3, 3, 4)).astype(np.float32)
    expected = {layer.name: outputs for layer in found}
    expected["scaled"] = 2 * outputs
    expected["pointwise"] = np.maximum(outputs, 0)
    for name, tail in tails.items():
        np.testing.assert_array_equal(tail(outputs), expected[name], err_msg=name)
