# SPDX-License-Identifier: Apache-2.0
"""WRN: shapes of the released NAD checkpoints, and the forward pass that fits them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, models
from nad_jax.models import common, wide_resnet


def _paths_and_shapes(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(entry.key for entry in path): x.shape for path, x in leaves}


def test_wrn_16_1_has_exactly_the_tensors_of_the_released_checkpoint():
    """Its 82 entries are 43 parameters, 26 statistics and 13 step counters."""
    expected = {"conv1/kernel": (3, 3, 3, 16)}
    stats = {}

    def bn(name, channels):
        expected[f"{name}/scale"] = expected[f"{name}/bias"] = (channels,)
        stats[f"{name}/mean"] = stats[f"{name}/var"] = (channels,)

    for block, into, out in ((1, 16, 16), (2, 16, 32), (3, 32, 64)):
        for layer, first in ((0, into), (1, out)):
            name = f"block{block}_layer{layer}"
            bn(f"{name}/bn1", first)
            expected[f"{name}/conv1/kernel"] = (3, 3, first, out)
            bn(f"{name}/bn2", out)
            expected[f"{name}/conv2/kernel"] = (3, 3, out, out)
    expected["block2_layer0/shortcut/kernel"] = (1, 1, 16, 32)
    expected["block3_layer0/shortcut/kernel"] = (1, 1, 32, 64)
    bn("bn1", 64)
    expected["fc/kernel"] = (64, 10)
    expected["fc/bias"] = (10,)

    model = models.build("wrn_16_1", num_classes=10)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert (len(expected), len(stats)) == (43, 26)
    assert _paths_and_shapes(variables["params"]) == expected
    assert _paths_and_shapes(variables["batch_stats"]) == stats


def _forward(oracle, variables, images, *, num_layers):
    """The five steps of the published forward pass, in float64."""
    params, stats = variables["params"], variables["batch_stats"]

    def block(x, name, stride):
        p, s = params[name], stats[name]
        activated = oracle.relu(oracle.batch_norm(x, p["bn1"], s["bn1"]))
        y = oracle.conv(activated, p["conv1"]["kernel"], stride=stride)
        y = oracle.relu(oracle.batch_norm(y, p["bn2"], s["bn2"]))
        y = oracle.conv(y, p["conv2"]["kernel"])
        if x.shape[-1] == y.shape[-1]:
            return x + y
        return y + oracle.conv(activated, p["shortcut"]["kernel"], stride=stride)

    x = oracle.conv(images, params["conv1"]["kernel"])
    features = {}
    for group in (1, 2, 3):
        for layer in range(num_layers):
            stride = 2 if group > 1 and layer == 0 else 1
            x = block(x, f"block{group}_layer{layer}", stride)
        features[f"stage{group}"] = x
    x = oracle.relu(oracle.batch_norm(x, params["bn1"], stats["bn1"]))
    return oracle.dense(x.mean(axis=(1, 2)), params["fc"]), features


@pytest.mark.slow
def test_forward_agrees_with_float64_numpy(
    oracle, trained_looking, assert_forward_equal
):
    """WRN-16-2 has all three blocks: identity, projection at stride 1 and at 2."""
    model = models.build("wrn_16_2", num_classes=5, width=0.125)
    variables = trained_looking(common.init(model, jax.random.key(1), (8, 12, 3)))
    images = np.random.default_rng(2).uniform(size=(2, 8, 12, 3))
    expected = _forward(oracle, variables, images, num_layers=2)
    assert_forward_equal(model, variables, images, *expected)
    # Raw sums: a stage read after a ReLU would have no negative value.
    assert all((stage < 0).any() for stage in expected[1].values())


@pytest.mark.parametrize("depth", [4, 11, 18])
def test_a_depth_that_is_not_6n_plus_4_is_refused(depth):
    with pytest.raises(errors.InputError, match=f"got {depth}"):
        wide_resnet.wrn(depth, 1, num_classes=10)
