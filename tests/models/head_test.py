# SPDX-License-Identifier: Apache-2.0
"""What the last layer sees, against the same arithmetic written out."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.models import head


class Net(nn.Module):
    by_name: bool

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Dense(4, name="hidden")(x.mean(axis=(1, 2))))
        last = nn.Dense(3, name="last")
        return last(inputs=x) if self.by_name else last(x)


@pytest.mark.parametrize("by_name", [False, True])
def test_neurons_are_what_the_last_dense_layer_sees(by_name):
    generator = np.random.default_rng(0)
    kernels = {"hidden": generator.normal(size=(2, 4)), "last": np.ones((4, 3))}
    params = {
        name: {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(width)}
        for (name, kernel), width in zip(kernels.items(), (4, 3), strict=True)
    }
    images = generator.uniform(size=(5, 3, 3, 2))
    net, variables = Net(by_name), {"params": params}
    path = head.find(net, variables, jnp.asarray(images, jnp.float32))
    assert path == ("last",)
    got = head.inputs(net, variables, jnp.asarray(images, jnp.float32), path)
    expected = np.maximum(images.mean(axis=(1, 2)) @ kernels["hidden"], 0)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
