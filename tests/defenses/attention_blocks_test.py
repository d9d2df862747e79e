# SPDX-License-Identifier: Apache-2.0
"""EFRAP on transformers: query, key and value have one input and one Gram matrix."""

import jax
import numpy as np
import pytest

from nad_jax.defenses import efrap as efrap_lib
from nad_jax.defenses import moments as moments_lib
from nad_jax.models import class_token_vit, common, vit

DEPTH = 1
# patch_embed, then query (for key and value, too), out, mlp_in, mlp_out, then fc.
GRAMS = 1 + 4 * DEPTH + 1
LAYERS = 1 + 6 * DEPTH + 1


SIZES = {"num_classes": 3, "dim": 6, "depth": DEPTH, "mlp_ratio": 2}
# The tokens are a grid, or a sequence behind a class token.
MODELS = {
    "grid": vit.vit_tiny(heads=2, **SIZES),
    "class token": class_token_vit.vit_b(4, head_dim=3, **SIZES),
}


@pytest.fixture(scope="module", params=MODELS)
def net(request):
    model = MODELS[request.param]
    images = jax.random.uniform(jax.random.key(1), (9, 8, 8, 1))
    return model, common.init(model, jax.random.key(0), (8, 8, 1)), images


@pytest.fixture
def gram_flags(monkeypatch):
    """Whether each chunk computed a Gram matrix."""
    flags = []
    add_chunk = moments_lib._add_chunk

    def counting(geometry, with_gram, *arguments):
        flags.append(with_gram)
        return add_chunk(geometry, with_gram, *arguments)

    monkeypatch.setattr(moments_lib, "_add_chunk", counting)
    return flags


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [None, 8])
def test_shared_inputs_cost_one_gram_and_change_no_code(
    net, gram_flags, monkeypatch, act_bits
):
    """With quantized activations, too; against a collector that forgets."""
    shared = efrap_lib.efrap(*net, weight_bits=4, act_bits=act_bits)
    assert len(gram_flags) == LAYERS and sum(gram_flags) == GRAMS

    collect = moments_lib.Collector.collect

    def forgetful(self, *arguments):
        self._inputs = lambda: None
        return collect(self, *arguments)

    monkeypatch.setattr(moments_lib.Collector, "collect", forgetful)
    gram_flags.clear()
    unshared = efrap_lib.efrap(*net, weight_bits=4, act_bits=act_bits)
    assert sum(gram_flags) == LAYERS
    assert shared.codes.keys() == unshared.codes.keys()
    for name, codes in shared.codes.items():
        np.testing.assert_array_equal(codes, unshared.codes[name])
    assert shared.flip_rate > 0
    assert shared.act_params.keys() == unshared.act_params.keys()
    jax.tree.map(np.testing.assert_array_equal, shared.act_params, unshared.act_params)
