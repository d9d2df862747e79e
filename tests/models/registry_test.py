# SPDX-License-Identifier: Apache-2.0
"""The table of models, and what each promises; mostly shapes, so nothing computed."""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nad_jax import errors, models
from nad_jax.models import common, resnet

# (side, channels) of each stage at 32 x 32 pixels.
STAGES = {
    "wrn_10_1": [(32, 16), (16, 32), (8, 64)],
    "wrn_16_1": [(32, 16), (16, 32), (8, 64)],
    "wrn_16_2": [(32, 32), (16, 64), (8, 128)],
    "wrn_28_10": [(32, 160), (16, 320), (8, 640)],
    "wrn_40_1": [(32, 16), (16, 32), (8, 64)],
    "wrn_40_2": [(32, 32), (16, 64), (8, 128)],
    "resnet_8": [(32, 16), (16, 32), (8, 64)],
    "resnet_14": [(32, 16), (16, 32), (8, 64)],
    "resnet_20": [(32, 16), (16, 32), (8, 64)],
    "resnet_32": [(32, 16), (16, 32), (8, 64)],
    "resnet_18": [(32, 64), (16, 128), (8, 256), (4, 512)],
    "resnet_34": [(32, 64), (16, 128), (8, 256), (4, 512)],
    "preact_resnet_18": [(32, 64), (16, 128), (8, 256), (4, 512)],
    "imagenet_resnet_18": [(8, 64), (4, 128), (2, 256), (1, 512)],
    "imagenet_resnet_34": [(8, 64), (4, 128), (2, 256), (1, 512)],
    "imagenet_resnet_50": [(8, 256), (4, 512), (2, 1024), (1, 2048)],
    "vit_tiny": [(8, 96)] * 4,
    "vit_b_16": [(2, 768)] * 12,
}

# Trainable parameters with 10 classes. wrn_16_1 is counted in the released checkpoint;
# the others are the numbers commonly printed for these nets, checked by hand from
# conv = 9 in out, BatchNorm = 2 c, fc = 10 (c + 1).
PARAMETERS = {
    "wrn_16_1": 175_066,
    "wrn_16_2": 691_674,
    "wrn_28_10": 36_479_194,
    "wrn_40_1": 563_930,
    "wrn_40_2": 2_243_546,
    "resnet_8": 78_042,
    "resnet_14": 175_258,
    "resnet_20": 272_474,
    "resnet_32": 466_906,
    "resnet_18": 11_173_962,
    "resnet_34": 21_282_122,
    "preact_resnet_18": 11_171_146,
    "vit_tiny": 459_370,
}

# The numbers torchvision prints, with 1000 classes and images of 224 pixels.
IMAGENET_PARAMETERS = {
    "imagenet_resnet_18": 11_689_512,
    "imagenet_resnet_34": 21_797_672,
    "imagenet_resnet_50": 25_557_032,
    "vit_b_16": 86_567_656,
}

# Large ones are slow to trace.
NAMES = [
    pytest.param(name, marks=pytest.mark.slow if name in IMAGENET_PARAMETERS else [])
    for name in STAGES
]


def _trace(model, image_shape=(32, 32, 3)):
    """Submodules called in training, and the shapes of variables and outputs."""
    modules = []

    def record(next_call, args, kwargs, context):
        if context.method_name == "__call__":
            modules.append(context.module.clone(parent=None))
        return next_call(*args, **kwargs)

    def run(key, images):
        with nn.intercept_methods(record):
            return model.init_with_output(key, images, train=True)

    images = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    outputs, variables = jax.eval_shape(run, jax.random.key(0), images)
    return modules, variables, *outputs


@functools.cache
def _traced(name):
    return _trace(models.build(name, num_classes=10, bn_axis_name="devices"))


def _size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.slow
def test_importing_the_table_loads_no_flax():
    code = (
        "import sys, nad_jax.models as m; assert m.model_names(); "
        "assert not {'flax', 'optax', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_has_its_shapes_written_down_here():
    assert set(models.model_names()) == set(models.MODELS) == set(STAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", STAGES)
def test_stages_and_logits_have_the_promised_shapes(name):
    _, _, logits, features = _traced(name)
    expected = {
        f"stage{index}": (2, side, side, channels)
        for index, (side, channels) in enumerate(STAGES[name], start=1)
    }
    assert {stage: maps.shape for stage, maps in features.items()} == expected
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_features_can_be_left_out_and_nothing_else_changes(name):
    _, variables, logits, _ = _traced(name)
    lean = models.build(name, num_classes=10, keep_features=False)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    without, features = jax.eval_shape(lean.apply, variables, images)
    assert features == {} and without == logits


@pytest.mark.slow
@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_counts_are_the_known_ones(name):
    assert _size(_traced(name)[1]["params"]) == PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET_PARAMETERS)
def test_parameter_counts_with_1000_classes_are_the_published_ones(name):
    model = models.build(name, num_classes=1000)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    assert _size(variables["params"]) == IMAGENET_PARAMETERS[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_belongs_to_a_plain_conv_or_dense(name):
    """Layer-wise defences look for nn.Conv and nn.Dense and must find every weight."""
    modules, variables, *_ = _traced(name)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    kernels = [leaf for path, leaf in leaves if path[-1].key == "kernel"]
    layers = [m for m in modules if type(m) in (nn.Conv, nn.Dense)]
    assert len(layers) == len(kernels) > 0
    for layer in layers:
        if isinstance(layer, nn.Conv) and layer.name != "patch_embed":
            pad = (layer.kernel_size[0] - 1) // 2
            assert layer.padding == ((pad, pad), (pad, pad))
            assert not layer.use_bias


@pytest.mark.parametrize("name", NAMES)
def test_every_batch_norm_hears_of_training_axis_and_constants(name):
    norms = [m for m in _traced(name)[0] if isinstance(m, nn.BatchNorm)]
    assert bool(norms) == (not name.startswith("vit_"))
    for norm in norms:
        assert not norm.use_running_average
        assert (norm.axis_name, norm.momentum, norm.epsilon) == ("devices", 0.9, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrn_16_3", "wrn_10_12"])
def test_any_wide_resnet_of_a_known_depth_is_built(name):
    widen_factor = int(name.split("_")[2])
    *_, features = _trace(models.build(name, num_classes=10), (8, 8, 3))
    assert features["stage3"].shape == (2, 2, 2, 64 * widen_factor)


@pytest.mark.parametrize(
    "name",
    ["resnet_50", "wrn_17_1", "wrn_16_0", "wrn_16", "WRN_16_1", "wrn_16_1_x", ""],
)
def test_an_unknown_name_is_refused_and_the_known_are_listed(name):
    with pytest.raises(errors.InputError) as caught:
        models.build(name, num_classes=10)
    message = str(caught.value)
    assert repr(name) in message and "\n" not in message
    assert all(known in message for known in models.MODELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 0}, "num_classes .* got 0"),
        ({"num_classes": 10, "width": 0.0}, "width .* got 0.0"),
        ({"num_classes": 10, "width": float("nan")}, "width .* got nan"),
    ],
)
def test_impossible_sizes_are_refused(options, message):
    with pytest.raises(errors.InputError, match=message):
        models.build("wrn_16_1", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "width", "stem", "channels"),
    [
        ("wrn_10_1", 0.3, 5, [5, 10, 19]),
        ("wrn_10_1", 1e-3, 1, [1, 1, 1]),
        ("wrn_16_2", 0.3, 5, [10, 19, 38]),
        ("resnet_14", 1e-3, 1, [1, 1, 1]),
        ("preact_resnet_18", 0.01, 1, [1, 1, 3, 5]),
        # Bottlenecks have 4 times the rounded number behind them.
        ("imagenet_resnet_50", 0.05, 3, [12, 24, 52, 104]),
    ],
)
def test_width_multiplies_every_channel_count_and_keeps_one_channel(
    name, width, stem, channels
):
    _, variables, _, features = _trace(models.build(name, num_classes=10, width=width))
    assert [maps.shape[-1] for maps in features.values()] == channels
    assert variables["params"]["conv1"]["kernel"].shape[-1] == stem


@pytest.mark.parametrize(
    "name", ["wrn_10_1", "resnet_8", "preact_resnet_18", "imagenet_resnet_18"]
)
def test_one_set_of_weights_serves_every_image_size(name):
    model = models.build(name, num_classes=10, width=1 / 8)
    shapes = [_trace(model, size)[1] for size in ((8, 8, 3), (27, 40, 3))]
    assert shapes[0] == shapes[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("wrn_10_1", "resnet_14", "preact_resnet_18", "vit_tiny"),
        *("imagenet_resnet_50", "vit_b_16"),
    ],
)
def test_bfloat16_computes_the_stages_and_leaves_state_and_logits_float32(name):
    model = models.build(name, num_classes=10, width=1 / 8, dtype=jnp.bfloat16)
    _, variables, logits, features = _trace(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    outputs = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]),
        variables,
        jnp.zeros((2, 32, 32, 3)),
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(outputs[1])} <= {
        jnp.dtype("float32")
    }
    assert {maps.dtype for maps in features.values()} == {jnp.dtype("bfloat16")}
    assert logits.dtype == jnp.float32


@pytest.mark.slow
def test_only_training_changes_the_batch_statistics():
    model = resnet.ResNet(stage_sizes=(1,), stage_channels=(4,), num_classes=10)
    variables = common.init(model, jax.random.key(0), (8, 8, 3))
    images = np.random.default_rng(0).uniform(size=(4, 8, 8, 3)).astype(np.float32)

    @functools.partial(jax.jit, static_argnames="train")
    def run(variables, images, train):
        return model.apply(variables, images, train=train, mutable=["batch_stats"])

    (train_logits, _), updates = run(variables, images, train=True)
    old = jax.tree.leaves_with_path(variables["batch_stats"])
    new = jax.tree.leaves_with_path(updates["batch_stats"])
    assert [path for path, _ in old] == [path for path, _ in new]
    for (_, before), (_, after) in zip(old, new, strict=True):
        assert np.abs(before - after).max() > 1e-4

    (eval_logits, _), updates = run(variables, images, train=False)
    same = jax.tree.map(
        np.array_equal, updates["batch_stats"], variables["batch_stats"]
    )
    assert all(jax.tree.leaves(same))
    assert np.abs(train_logits - eval_logits).max() > 1e-3
    # Evaluation treats each image alone: other batch mates change nothing.
    (other_logits, _), _ = run(variables, images[[0, 0, 0, 0]], train=False)
    np.testing.assert_allclose(other_logits[0], eval_logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_a_model_without_batch_norm_trains_with_the_same_call():
    model = models.build("vit_tiny", num_classes=10, width=0.1, depth=1)
    variables = common.init(model, jax.random.key(0), (8, 8, 3))
    _, updates = jax.eval_shape(
        lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"]),
        variables,
        jnp.zeros((2, 8, 8, 3)),
    )
    assert updates == {"batch_stats": {}}


@pytest.mark.parametrize(
    "name", ["wrn_10_1", "resnet_14", "preact_resnet_18", "vit_tiny", "vit_b_16"]
)
@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32)]
)
def test_integer_pixels_and_single_images_are_refused(name, images):
    model = models.build(name, num_classes=10)
    with pytest.raises(errors.InputError, match=r"float images \[B, H, W, C\].*got"):
        jax.eval_shape(model.init, jax.random.key(0), images)
