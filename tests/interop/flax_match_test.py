# SPDX-License-Identifier: Apache-2.0
"""Variables of our own models are found again by their names, and others refused."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from nad_jax import errors, models
from nad_jax.interop import name_maps
from nad_jax.models import common

LARGE = ("imagenet_", "resnet_34", "wrn_28_10", "wrn_40", "vit_b")


def variables_of(arch, *, classes=7, width=1.0, image=(32, 16, 3)):
    model = models.build(arch, num_classes=classes, width=width)
    image = (32, 32, 3) if arch == "vit_b_16" else image
    return common.init(model, jax.random.key(0), image)


def named(variables, prefix=""):
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {prefix + name: np.asarray(array) for name, array in flat.items()}


def refusal(arrays, arch=None):
    with pytest.raises(errors.InputError) as raised:
        name_maps.convert(arrays, arch)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("arch", "prefix"),
    [
        pytest.param(n, "", marks=[pytest.mark.slow] if n.startswith(LARGE) else [])
        for n in (*models.model_names(), "wrn_10_3")
    ]
    + [("resnet_8", "float/"), ("vit_tiny", "float/")],
)
def test_every_model_is_found_and_comes_back(arch, prefix):
    # A quarter of the channels, but for the transformers, whose heads are whole.
    width = 1.0 if arch == "vit_tiny" else 1 / 12 if arch == "vit_b_16" else 0.25
    if arch == "wrn_28_10":
        width = 1 / 16
    variables = variables_of(arch, width=width)
    arrays = named(variables, prefix)
    found = name_maps.convert(arrays)
    assert (found.arch, found.num_classes) == (arch, 7)
    assert found.width == pytest.approx(width)
    paths = named(found.variables)
    assert set(paths) == set(named(variables))
    for name, array in named(variables).items():
        np.testing.assert_array_equal(paths[name], array)
    back = name_maps.as_found(found.variables, found.names)
    assert set(back) == set(arrays)
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name])
    # The module is the one that made them.
    shapes = jax.eval_shape(
        lambda v, x: found.model.apply(v, x, train=False)[0],
        found.variables,
        jax.ShapeDtypeStruct((2, 32, 32 if arch == "vit_b_16" else 16, 3), np.float32),
    )
    assert shapes.shape == (2, 7)


def test_what_is_read_from_the_file_is_told():
    notes = name_maps.convert(named(variables_of("resnet_8", width=0.5))).notes
    assert "resnet_8 was recognised by names and shapes" in notes
    assert any("0.5 of the published" in n and "params/conv1/" in n for n in notes)
    assert any("3 attention heads" in n for n in notes_of("vit_tiny"))


def notes_of(arch):
    return name_maps.convert(named(variables_of(arch)), arch).notes


def test_the_trigger_of_a_file_of_the_zoo_is_left_aside():
    arrays = named(variables_of("wrn_10_1"), "float/")
    arrays |= {"float/trigger/mask": np.zeros((8, 8, 1), np.float32)}
    found = name_maps.convert(arrays)
    assert "float/trigger/mask" not in found.names
    assert "1 arrays of a trigger were ignored" in found.notes


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("params/bn1/scale", None, "closest is wrn_10_1: 1 missing ('params/bn1/sca"),
        ("params/bn1/extra", np.zeros(3), "1 left over ('params/bn1/extra' [3])"),
        ("params/bn1/scale", np.zeros(3), "'params/bn1/scale' is [3], expected [64]"),
        ("params/conv1/kernel", None, "'params/conv1/kernel' [height, width, inputs,"),
        ("params/conv1/kernel", np.zeros((3, 3, 0, 16)), "each 1 to 65536"),
        ("params/fc/kernel", None, "'params/fc/kernel' [inputs, classes] is missing"),
        ("params/fc/kernel", np.zeros(7), "'params/fc/kernel' is [7], expected [inpu"),
        ("params/bn1/scale", np.full(64, np.nan), "not finite"),
        ("params/fc/bias", np.zeros(7, int), "'params/fc/bias' is int64; weights are"),
        ("batch_stats/bn1/var", np.full(64, -1.0), "a running variance is >= 0"),
        ("float/codes", np.zeros(3), "1 left over ('float/codes' [3])"),
    ],
)
def test_what_does_not_fit_is_refused(name, array, reason):
    arrays = named(variables_of("wrn_10_1"))
    arrays.pop(name, None)
    if array is not None:
        arrays[name] = array
    assert reason in refusal(arrays)


@pytest.mark.parametrize(
    ("name", "shape", "reason"),
    [
        ("params/position_embedding", (1, 2**15, 2**15, 0), "each 1 to 65536"),
        ("params/position_embedding", (1, 300, 300, 1), "300 x 300 positions; at most"),
        ("params/position_embedding", (1, 8, 4, 95), "expected [1, 8, 4, 96]"),
        ("params/patch_embed/kernel", (48, 95), "95 channels a token; accepted are m"),
        ("params/patch_embed/kernel", (3, 96), "is [3, 96], expected [16, 96]"),
    ],
)
def test_sizes_of_a_transformer_are_checked_before_they_are_used(name, shape, reason):
    arrays = named(variables_of("vit_tiny"))
    arrays[name] = np.zeros(shape, np.float32)
    assert reason in refusal(arrays)
    assert reason in refusal(arrays, "vit_tiny")


def test_the_architecture_named_is_the_one_compared():
    arrays = named(variables_of("resnet_8"))
    message = refusal(arrays, "wrn_10_1")
    assert "it does not fit wrn_10_1: " in message
    assert "arch 'wrn_10_x' cannot be imported; accepted are wrn_10_1" in refusal(
        arrays, "wrn_10_x"
    )
    assert name_maps.convert(arrays, "resnet_8").arch == "resnet_8"


def test_a_foreign_module_is_refused_by_what_is_missing():
    arrays = {"params/Dense_0/kernel": np.zeros((3, 2), np.float32)}
    message = refusal(arrays)
    assert "'params/fc/kernel' [inputs, classes] is missing" in message
    assert "'params/Dense_0/kernel' [3, 2]" in message
