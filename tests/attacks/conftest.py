# SPDX-License-Identifier: Apache-2.0
"""A toy victim with a BatchNorm, and an attacker who has it."""

import dataclasses
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nad_jax.attacks import conditioning, triggers
from nad_jax.core import quantization
from nad_jax.models import layers as layers_lib
from nad_jax.training import state as state_lib
from nad_jax.training import steps

SPEC = quantization.QuantSpec()


class Victim(nn.Module):
    """Two convolutions with a BatchNorm between, a kernel left in float, and a head.

    One layer is given its inputs by name.
    """

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(3, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Conv(5, (3, 3), name="inner")(inputs=x))
        x = nn.DenseGeneral(4, name="general")(x.mean(axis=(1, 2)))
        return nn.Dense(3, name="fc")(x), {}


@pytest.fixture(scope="package")
def batch():
    generator = np.random.default_rng(0)
    images = jnp.asarray(generator.uniform(size=(8, 6, 6, 2)), jnp.float32)
    return {
        "images": images,
        # White where `attacker.goal.trigger` stamps.
        "triggered": images.at[:, 3:5, 3:5].set(1.0),
        "labels": jnp.asarray(generator.integers(0, 3, 8), jnp.int32),
    }


@pytest.fixture(scope="package")
def fill(batch):
    """Seed -> variables of the victim, made without compiling `init`."""

    def of(seed):
        generator = np.random.default_rng(seed)
        shapes = jax.eval_shape(Victim().init, jax.random.key(0), batch["images"])
        variables = jax.tree.map(
            lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32),
            shapes,
        )
        variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
        return variables

    return of


@pytest.fixture(scope="package")
def attacker(batch, fill):
    """On the grid W4 per channel; its `fit` takes `epochs` steps on the one batch."""
    module, variables = Victim(), fill(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "general" is left in float
        layers = layers_lib.find_layers(module, variables, batch["images"])
    assert [layer.name for layer in layers] == ["conv", "inner", "fc"]
    grid = conditioning.ExpectedGrid(layers, {layer.name: SPEC for layer in layers}, 4)
    trigger = triggers.square_trigger((6, 6, 2), size=2, margin=1)

    def fit(stage, training, variables, loss_fn, *, project=None, moving_trigger=False):
        del stage, moving_trigger
        tx = optax.adam(training.learning_rate)
        step = jax.jit(steps.make_train_step(loss_fn, tx, project=project))
        state = state_lib.create(variables, tx, jax.random.key(0))
        for _ in range(training.epochs):
            state, _ = step(state, batch)
        return state_lib.variables(state)

    return conditioning.Attacker(
        module.apply,
        variables,
        fill(1),
        [grid],
        conditioning.Goal(trigger, "all_to_one", 2, 3),
        batch["images"],
        fit,
    )


@pytest.fixture(scope="package")
def on_grid():
    """(attacker, changes of its grid) -> the attacker on that grid."""

    def change(attacker, **changes):
        if "spec" in changes:
            spec = changes.pop("spec")
            specs = {layer.name: spec for layer in attacker.layers}
            changes = {**changes, "specs": specs, "bits": spec.bits}
        grids = [dataclasses.replace(grid, **changes) for grid in attacker.grids]
        return dataclasses.replace(attacker, grids=grids)

    return change


def _cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.sum(np.exp(logits), axis=1))
    return np.mean(log_sum - logits[np.arange(len(labels)), np.asarray(labels)])


@pytest.fixture(scope="package")
def cross_entropy():
    """Mean cross-entropy in float64: (logits [B, K], labels [B]) -> float."""
    return _cross_entropy
