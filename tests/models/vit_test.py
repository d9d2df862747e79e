# SPDX-License-Identifier: Apache-2.0
"""The small ViT against a float64 forward pass with explicit loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, models
from nad_jax.models import common


def _attention(oracle, x, params, heads):
    """One image: x [tokens, dim]."""
    query, key, value = (oracle.dense(x, params[n]) for n in ("query", "key", "value"))
    size = x.shape[1] // heads
    mixed = np.zeros_like(x)
    for head in range(heads):
        part = slice(head * size, (head + 1) * size)
        for token in range(len(x)):
            scores = key[:, part] @ query[token, part] / np.sqrt(size)
            weights = np.exp(scores) / np.exp(scores).sum()
            mixed[token, part] = weights @ value[:, part]
    return oracle.dense(mixed, params["out"])


@pytest.mark.slow
def test_forward_agrees_with_float64_numpy(
    oracle, trained_looking, assert_forward_equal
):
    """One block of two heads on a 2 x 3 grid of patches."""
    patch, rows, columns = 4, 2, 3
    model = models.build("vit_tiny", num_classes=5, dim=8, depth=1, heads=2)
    shape = (rows * patch, columns * patch, 3)
    variables = trained_looking(common.init(model, jax.random.key(1), shape))
    params = variables["params"]
    images = np.random.default_rng(2).uniform(size=(2, *shape))

    logits = []
    stage1 = []
    for image in images:
        tokens = [
            image[r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].ravel()
            for r in range(rows)
            for c in range(columns)
        ]
        x = oracle.dense(np.stack(tokens), params["patch_embed"])
        x = x + np.reshape(params["position_embedding"], x.shape)
        p = params["block1"]
        x = x + _attention(oracle, oracle.layer_norm(x, p["norm1"]), p, heads=2)
        y = oracle.dense(oracle.layer_norm(x, p["norm2"]), p["mlp_in"])
        x = x + oracle.dense(oracle.gelu(y), p["mlp_out"])
        stage1.append(x.reshape(rows, columns, -1))
        x = oracle.layer_norm(x, params["norm"])
        logits.append(oracle.dense(x.mean(axis=0), params["fc"]))
    features = {"stage1": np.stack(stage1)}
    assert_forward_equal(model, variables, images, np.stack(logits), features)


@pytest.mark.slow
def test_width_keeps_the_channels_a_multiple_of_the_heads():
    """96 * 0.4 = 38.4 -> 39 = 3 * 13; a vanishing width leaves one channel a head."""
    for width, dim in ((0.4, 39), (1e-3, 3)):
        model = models.build("vit_tiny", num_classes=10, depth=1, width=width)
        variables = common.init(model, jax.random.key(0), (8, 8, 3))
        assert variables["params"]["block1"]["query"]["kernel"].shape == (dim, dim)


def test_an_image_that_does_not_divide_into_patches_is_refused():
    model = models.build("vit_tiny", num_classes=10)
    with pytest.raises(errors.InputError, match="30 x 32 .* patch size 4"):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 30, 32, 3)))
