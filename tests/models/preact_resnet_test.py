# SPDX-License-Identifier: Apache-2.0
"""PreAct-ResNet-18 against a float64 forward pass from the definition."""

import jax
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.models import common, preact_resnet


@pytest.mark.slow
def test_forward_agrees_with_float64_numpy(
    oracle, trained_looking, assert_forward_equal
):
    """No BatchNorm after the stem, none before pooling: the head sees raw sums."""
    model = preact_resnet.PreActResNet(stage_sizes=(1, 2), num_classes=5, width=1 / 16)
    variables = trained_looking(common.init(model, jax.random.key(1), (12, 8, 3)))
    params, stats = variables["params"], variables["batch_stats"]
    images = np.random.default_rng(2).uniform(size=(2, 12, 8, 3))

    x = oracle.conv(images, params["conv1"]["kernel"])
    features = {}
    for stage, num_blocks in ((1, 1), (2, 2)):
        for block in range(num_blocks):
            p, s = params[f"layer{stage}_{block}"], stats[f"layer{stage}_{block}"]
            activated = oracle.relu(oracle.batch_norm(x, p["bn1"], s["bn1"]))
            stride = 1
            if stage > 1 and block == 0:
                stride = 2
                x = oracle.conv(activated, p["shortcut"]["kernel"], stride=2)
            y = oracle.conv(activated, p["conv1"]["kernel"], stride=stride)
            y = oracle.relu(oracle.batch_norm(y, p["bn2"], s["bn2"]))
            x = x + oracle.conv(y, p["conv2"]["kernel"])
        features[f"stage{stage}"] = x
    logits = oracle.dense(x.mean(axis=(1, 2)), params["fc"])
    assert_forward_equal(model, variables, images, logits, features)
    assert {name for name in params if name.startswith("bn")} == set()


def test_a_depth_without_layout_is_refused():
    with pytest.raises(errors.InputError, match="18, got 19"):
        preact_resnet.preact_resnet(19, num_classes=10)
