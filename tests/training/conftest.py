# SPDX-License-Identifier: Apache-2.0
"""A toy classifier and toy data for the tests of the training room."""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.training import loop

NUM_CLASSES = 3


class ToyNet(nn.Module):
    """A convolution, a BatchNorm, a dense layer: all that the step must handle."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, images, train=False):
        features = nn.Conv(4, (3, 3), use_bias=False)(images)
        features = nn.BatchNorm(
            use_running_average=not train, momentum=0.8, axis_name=self.axis_name
        )(features)
        features = nn.relu(features)
        logits = nn.Dense(NUM_CLASSES)(features.mean(axis=(1, 2)))
        return logits, {"stage1": features}


class ToyData(NamedTuple):
    images: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="module")
def compile_once():
    """Runs of the same step share their programs; tests would only wait for more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "_compile_steps", functools.cache(loop._compile_steps))
        yield


def make_batch(key, images, labels):
    """Batch with noise that depends on the key, so that a reused key is noticed."""
    clean = images.astype(jnp.float32) / 255.0
    noise = jax.random.uniform(key, clean.shape, maxval=0.1)
    return {"images": clean + noise, "labels": labels}


@pytest.fixture(scope="session")
def toy_net() -> ToyNet:
    return ToyNet()


@pytest.fixture(scope="session")
def toy_variables(toy_net: ToyNet) -> Any:
    """Made without `toy_net.init`, most of whose seconds go into compiling it."""
    shapes = jax.eval_shape(toy_net.init, jax.random.key(7), jnp.zeros((1, 6, 6, 1)))
    generator = np.random.default_rng(7)

    def fill(path, shape):
        if path[-1].key == "kernel":
            values = generator.normal(size=shape.shape, scale=0.5)
        else:
            values = np.full(shape.shape, path[-1].key in ("scale", "var"))
        return jnp.asarray(values.astype(np.float32))

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="session")
def toy_data() -> ToyData:
    """52 images whose brightness tells the class, with noise."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, NUM_CLASSES, 52)
    images = generator.integers(0, 90, (52, 6, 6, 1)) + 80 * labels[:, None, None, None]
    return ToyData(images.astype(np.uint8), labels.astype(np.int32))


@pytest.fixture(scope="session")
def toy_make_batch():
    return make_batch


@pytest.fixture
def pmap_net() -> ToyNet:
    return ToyNet(axis_name="data")
