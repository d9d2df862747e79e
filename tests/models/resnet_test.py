# SPDX-License-Identifier: Apache-2.0
"""Post-activation ResNets against a float64 forward pass from the definition."""

import jax
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.models import common, resnet


def _block(oracle, x, params, stats, *, stride):
    y = oracle.conv(x, params["conv1"]["kernel"], stride=stride)
    y = oracle.relu(oracle.batch_norm(y, params["bn1"], stats["bn1"]))
    y = oracle.conv(y, params["conv2"]["kernel"])
    y = oracle.batch_norm(y, params["bn2"], stats["bn2"])
    if stride == 2:
        x = oracle.conv(x, params["shortcut"]["kernel"], stride=2)
        x = oracle.batch_norm(x, params["shortcut_bn"], stats["shortcut_bn"])
    return oracle.relu(x + y)


@pytest.mark.slow
def test_forward_agrees_with_float64_numpy(
    oracle, trained_looking, assert_forward_equal
):
    """One block with identity shortcut, one with projection, one after it."""
    model = resnet.ResNet(stage_sizes=(1, 2), stage_channels=(4, 6), num_classes=5)
    variables = trained_looking(common.init(model, jax.random.key(1), (12, 8, 3)))
    params, stats = variables["params"], variables["batch_stats"]
    images = np.random.default_rng(2).uniform(size=(2, 12, 8, 3))

    x = oracle.conv(images, params["conv1"]["kernel"])
    x = oracle.relu(oracle.batch_norm(x, params["bn1"], stats["bn1"]))
    features = {}
    for stage, num_blocks in ((1, 1), (2, 2)):
        for block in range(num_blocks):
            name = f"layer{stage}_{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            x = _block(oracle, x, params[name], stats[name], stride=stride)
        features[f"stage{stage}"] = x
    logits = oracle.dense(x.mean(axis=(1, 2)), params["fc"])
    assert_forward_equal(model, variables, images, logits, features)


@pytest.mark.parametrize("depth", [16, 50])
def test_a_depth_without_layout_is_refused(depth):
    with pytest.raises(errors.InputError, match=f"8, 14, 20, 32, 18, 34, got {depth}"):
        resnet.resnet(depth, num_classes=10)
