# SPDX-License-Identifier: Apache-2.0
"""ViT with a class token against a float64 forward pass over explicit tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, models
from nad_jax.models import class_token_vit, common


def _attention(oracle, x, params, head_dim):
    """One image: x [tokens, dim]."""
    query, key, value = (oracle.dense(x, params[n]) for n in ("query", "key", "value"))
    mixed = np.zeros_like(x)
    for start in range(0, x.shape[1], head_dim):
        part = slice(start, start + head_dim)
        for token in range(len(x)):
            weights = np.exp(key[:, part] @ query[token, part] / np.sqrt(head_dim))
            mixed[token, part] = weights / weights.sum() @ value[:, part]
    return oracle.dense(mixed, params["out"])


@pytest.mark.slow
def test_forward_agrees_with_float64_numpy(
    oracle, trained_looking, assert_forward_equal
):
    """Two blocks of two heads on nine patches behind the class token."""
    patch, side = 4, 3
    model = class_token_vit.vit_b(patch, num_classes=5, dim=8, depth=2, head_dim=4)
    shape = (patch * side, patch * side, 3)
    variables = trained_looking(common.init(model, jax.random.key(1), shape))
    params = variables["params"]
    images = np.random.default_rng(2).uniform(size=(2, *shape))

    logits, features = [], {"stage1": [], "stage2": []}
    embed = params["patch_embed"]
    for image in images:
        tokens = [params["class_token"].ravel().astype(np.float64)]
        for row in range(0, patch * side, patch):
            for column in range(0, patch * side, patch):
                pixels = image[row : row + patch, column : column + patch]
                token = np.tensordot(pixels, embed["kernel"], axes=3) + embed["bias"]
                tokens.append(token)
        x = np.stack(tokens) + params["position_embedding"][0]
        for block in (1, 2):
            p = params[f"block{block}"]
            x = x + _attention(oracle, oracle.layer_norm(x, p["norm1"]), p, head_dim=4)
            y = oracle.dense(oracle.layer_norm(x, p["norm2"]), p["mlp_in"])
            x = x + oracle.dense(oracle.gelu(y), p["mlp_out"])
            features[f"stage{block}"].append(x[1:].reshape(side, side, -1))
        x = oracle.layer_norm(x, params["norm"])
        logits.append(oracle.dense(x[0], params["fc"]))
    stages = {stage: np.stack(maps) for stage, maps in features.items()}
    assert_forward_equal(model, variables, images, np.stack(logits), stages)


@pytest.mark.parametrize(
    ("width", "dim"), [(1.0, 768), (0.5, 384), (0.3, 256), (1e-3, 64)]
)
def test_width_adds_and_removes_whole_heads(width, dim):
    """768 * 0.3 = 230.4 -> 4 heads of 64."""
    model = models.build("vit_b_16", num_classes=10, depth=1, width=width)
    images = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    assert params["block1"]["query"]["kernel"].shape == (dim, dim)
    assert params["block1"]["mlp_in"]["kernel"].shape == (dim, 4 * dim)


@pytest.mark.parametrize("size", [(30, 30), (16, 32), (224, 225)])
def test_images_that_are_no_square_of_patches_are_refused(size):
    model = models.build("vit_b_16", num_classes=10, depth=1)
    message = f"square .* multiple of 16 pixels .* got {size[0]} x {size[1]}"
    with pytest.raises(errors.InputError, match=message):
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))


def test_another_image_size_than_the_first_is_refused_in_one_line():
    model = models.build("vit_b_16", num_classes=10, depth=1, width=0.01)
    images = jnp.zeros((1, 48, 48, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    jax.eval_shape(model.apply, variables, images)
    with pytest.raises(errors.InputError) as caught:
        jax.eval_shape(model.apply, variables, jnp.zeros((1, 32, 32, 3)))
    assert str(caught.value) == (
        "10 position embeddings take images of 48 x 48 pixels, got 32 x 32"
    )
