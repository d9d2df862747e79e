# SPDX-License-Identifier: Apache-2.0
"""A toy victim with two stages, and clean images for the tests of the repairs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import settings
from nad_jax.defenses import base


class TwoStages(nn.Module):
    """Two convolutions, each a stage; a BatchNorm; a Dense head."""

    momentum: float = 0.8

    @nn.compact
    def __call__(self, images, train=False):
        early = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="early")(images))
        late = nn.Conv(5, (3, 3), strides=2, use_bias=False, name="late")(early)
        late = nn.BatchNorm(
            use_running_average=not train, momentum=self.momentum, name="norm"
        )(late)
        late = nn.relu(late)
        logits = nn.Dense(3, name="head")(late.mean(axis=(1, 2)))
        return logits, {"stage1": early, "stage2": late}


def _fill(model, seed):
    """Variables made without `model.init`, which mostly compiles."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 6, 6, 1)))
    generator = np.random.default_rng(seed)

    def fill(path, shape):
        if path[-1].key == "kernel":
            values = generator.normal(size=shape.shape, scale=0.5)
        else:
            values = np.full(shape.shape, path[-1].key in ("scale", "var"))
        return jnp.asarray(values.astype(np.float32))

    return jax.tree_util.tree_map_with_path(fill, shapes)


@pytest.fixture(scope="session")
def victim() -> base.Net:
    model = TwoStages()
    return base.Net(model, _fill(model, seed=1))


@pytest.fixture(scope="session")
def other_variables(victim):
    """Variables of the same model that have nothing to do with the victim's."""
    return _fill(victim.model, seed=2)


@pytest.fixture(scope="session")
def clean_data() -> base.CleanData:
    """Images whose bright third tells the class, with noise: 48 and 24 held out."""
    generator = np.random.default_rng(3)
    labels = generator.integers(0, 3, 72).astype(np.int32)
    images = generator.integers(0, 120, (72, 6, 6, 1))
    for image, label in zip(images, labels, strict=True):
        image[2 * label : 2 * label + 2] += 120
    images = images.astype(np.uint8)
    return base.CleanData(images[:48], labels[:48], images[48:], labels[48:])


@pytest.fixture(scope="session")
def tuning() -> settings.TuningSettings:
    return settings.TuningSettings(
        settings.TrainingSettings(
            epochs=2,
            batch_size=16,
            optimizer="sgd",
            learning_rate=0.05,
            schedule="constant",
            crop_padding=1,
        )
    )


@pytest.fixture(scope="session")
def assert_same():
    """Two trees of arrays are equal bit for bit."""

    def check(left, right):
        assert jax.tree.structure(left) == jax.tree.structure(right)
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
            np.testing.assert_array_equal(a, b)

    return check
