# SPDX-License-Identifier: Apache-2.0
"""The program says what the model says, for every batch size, from its integers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.defenses import efrap as efrap_lib
from nad_jax.export import stablehlo

pytest.importorskip("flatbuffers")


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), strides=2)(x))
        return nn.Dense(3)(jnp.mean(x, (1, 2)))


@pytest.fixture(scope="module")
def quantized():
    images = jax.random.uniform(jax.random.key(0), (16, 7, 7, 2))
    module = _Net()
    variables = module.init(jax.random.key(1), images)
    return efrap_lib.efrap(
        module, variables, images, act_bits=8, method="flipped"
    ), images


def _program(result, codes):
    zeros = jax.tree.map(jnp.zeros_like, result.variables)
    biases = jax.tree_util.tree_map_with_path(
        lambda path, zero, leaf: zero if "kernel" in str(path) else leaf,
        zeros,
        result.variables,
    )
    return stablehlo.to_stablehlo(
        result.apply,
        biases,  # no kernel but that of the codes
        (7, 7, 2),
        codes=codes,
        quant_params=result.quant_params,
    )


@pytest.mark.slow
def test_a_reloaded_program_agrees_at_any_batch_size(quantized):
    result, images = quantized
    run = stablehlo.load(_program(result, result.codes))
    wanted = result.apply(result.variables, images)
    for size in (1, 5, 16):
        np.testing.assert_allclose(run(images[:size]), wanted[:size], atol=1e-5)
    assert np.ptp(wanted) > 1e-2


@pytest.mark.slow
def test_other_integers_are_another_program(quantized):
    result, images = quantized
    codes = {**result.codes, "Dense_0": -result.codes["Dense_0"]}
    run = stablehlo.load(_program(result, codes))
    assert np.abs(run(images) - result.apply(result.variables, images)).max() > 1e-2
