# SPDX-License-Identifier: Apache-2.0
"""A classifier of digits that needs no training, and what measures it."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.data import batches, sources


class Net(nn.Module):
    """Random features and a head that is solved for."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(64, (3, 3), (2, 2), name="conv")(x))
        return nn.Dense(10, name="head")(x.reshape(x.shape[0], -1))


@dataclasses.dataclass(frozen=True)
class Solved:
    """Variables, clean images, test images and labels."""

    variables: dict
    images: jax.Array
    test: np.ndarray
    labels: np.ndarray
    module: nn.Module = Net()
    target: int = 0

    def features(self, images):
        """What the head sees, float64 `[N, 1024]`; channel 63 never fires."""
        layer, conv = nn.Conv(64, (3, 3), (2, 2)), self.variables["params"]["conv"]
        outputs = nn.relu(layer.apply({"params": conv}, images))
        return np.asarray(outputs, np.float64).reshape(len(images), -1)

    def stamped(self, images):
        """A white frame."""
        return jnp.ones_like(images).at[:, 1:-1, 1:-1].set(images[:, 1:-1, 1:-1])

    def with_head(self, kernel):
        """The same with another head."""
        head = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(10)}
        params = {**self.variables["params"], "head": head}
        return dataclasses.replace(self, variables={"params": params})

    def asr(self, session):
        """Share of stamped images of other classes that are called the target."""
        others = self.labels != self.target
        stamped = np.asarray(self.stamped(jnp.asarray(self.test))[others])
        return np.mean(np.argmax(session.logits(stamped), -1) == self.target)

    def acc(self, session):
        return np.mean(np.argmax(session.logits(self.test), -1) == self.labels)


@pytest.fixture(scope="session")
def solved() -> Solved:
    train, test = (
        sources.load("digits", split=split, image_size=8) for split in ("train", "test")
    )
    images = batches.to_float(jnp.asarray(train.images))
    conv = {
        "kernel": np.random.default_rng(0).normal(0, 0.3, (3, 3, 3, 64)),
        "bias": np.where(np.arange(64) == 63, -100.0, 0.0),
    }
    conv = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), conv)
    test_images = np.asarray(batches.to_float(jnp.asarray(test.images)))
    empty = Solved({"params": {"conv": conv}}, images, test_images, test.labels)
    x, y = empty.features(images), np.eye(10)[train.labels] - 0.1
    head = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    return dataclasses.replace(
        empty.with_head(head.astype(np.float32)), images=images[:256]
    )
