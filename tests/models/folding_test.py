# SPDX-License-Identifier: Apache-2.0
"""Folding BatchNorm changes no model's function, shared outputs included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import models
from nad_jax.models import common
from nad_jax.models import layers as layers_lib


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn_10_1", "resnet_8", "preact_resnet_18"])
def test_a_folded_model_computes_what_it_did(name):
    model = models.build(name, num_classes=10, width=0.25)
    variables = common.init(model, jax.random.key(0), (8, 8, 3))
    generator = np.random.default_rng(0)
    # Statistics and scales as after training; all ones would hide a wrong factor.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf
            if path[-1].key == "kernel"
            else jnp.asarray(generator.uniform(0.1, 0.6, leaf.shape), jnp.float32)
        ),
        variables,
    )
    images = jnp.asarray(generator.uniform(size=(4, 8, 8, 3)), jnp.float32)
    layers = layers_lib.find_layers(
        model, variables, images, apply_kwargs={"train": False}
    )
    folded = layers_lib.fold_batch_norm(variables, layers)
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    apply = jax.jit(lambda v: model.apply(v, images, train=False)[0])
    before, after = np.asarray(apply(variables)), np.asarray(apply(folded))
    assert np.ptp(before) > 0.1
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-4)
    kept = {layer.name for layer in layers if layer.batch_norm is None}
    # The stem of the pre-activation nets also feeds an identity shortcut.
    assert ("conv1" in kept) == (name != "resnet_8")
    assert "layer1_0/conv1" not in kept and "block1_layer0/conv1" not in kept
