# SPDX-License-Identifier: Apache-2.0
"""Post-activation ResNets against a float64 forward pass from the definition."""

import jax
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.models import common, resnet


def _block(oracle, x, params, stats, *, strides):
    """Convolutions of these strides, the last one without ReLU, and the shortcut."""
    y = x
    for number, stride in enumerate(strides, start=1):
        y = oracle.conv(y, params[f"conv{number}"]["kernel"], stride=stride)
        y = oracle.batch_norm(y, params[f"bn{number}"], stats[f"bn{number}"])
        y = y if number == len(strides) else oracle.relu(y)
    if "shortcut" in params:
        x = oracle.conv(x, params["shortcut"]["kernel"], stride=max(strides))
        x = oracle.batch_norm(x, params["shortcut_bn"], stats["shortcut_bn"])
    return oracle.relu(x + y)


def _logits_and_stages(oracle, x, params, stats, *, strides):
    """All behind the stem: stages of one and two blocks; `strides` of a later stage."""
    features = {}
    for stage, num_blocks in ((1, 1), (2, 2)):
        for block in range(num_blocks):
            name = f"layer{stage}_{block}"
            own = strides if stage > 1 and block == 0 else (1,) * len(strides)
            x = _block(oracle, x, params[name], stats[name], strides=own)
        features[f"stage{stage}"] = x
    return oracle.dense(x.mean(axis=(1, 2)), params["fc"]), features


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
    logits, features = _logits_and_stages(oracle, x, params, stats, strides=(2, 1))
    assert_forward_equal(model, variables, images, logits, features)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16), (13, 10)])
def test_bottlenecks_behind_the_imagenet_stem_agree_with_float64_numpy(
    oracle, trained_looking, assert_forward_equal, size
):
    """The first stage widens without a stride; odd sizes show where the pool begins."""
    model = resnet.ResNet(
        stage_sizes=(1, 2),
        stage_channels=(4, 6),
        bottleneck=True,
        imagenet_stem=True,
        num_classes=5,
    )
    variables = trained_looking(common.init(model, jax.random.key(1), (*size, 3)))
    params, stats = variables["params"], variables["batch_stats"]
    assert params["conv1"]["kernel"].shape == (7, 7, 3, 4)
    assert params["layer1_0"]["shortcut"]["kernel"].shape == (1, 1, 4, 16)
    images = np.random.default_rng(2).uniform(size=(2, *size, 3))

    x = oracle.conv(images, params["conv1"]["kernel"], stride=2)
    x = oracle.relu(oracle.batch_norm(x, params["bn1"], stats["bn1"]))
    x = oracle.max_pool(x)
    logits, features = _logits_and_stages(oracle, x, params, stats, strides=(1, 2, 1))
    assert_forward_equal(model, variables, images, logits, features)


@pytest.mark.parametrize("depth", [16, 50])
def test_a_depth_without_layout_is_refused(depth):
    with pytest.raises(errors.InputError, match=f"8, 14, 20, 32, 18, 34, got {depth}"):
        resnet.resnet(depth, num_classes=10)


@pytest.mark.parametrize("depth", [20, 101])
def test_an_imagenet_depth_without_layout_is_refused(depth):
    with pytest.raises(errors.InputError, match=f"one of 18, 34, 50, got {depth}"):
        resnet.imagenet_resnet(depth, num_classes=10)
