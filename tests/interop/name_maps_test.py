# SPDX-License-Identifier: Apache-2.0
"""Foreign state dicts give the logits they gave in PyTorch, or a reason why not.

The networks below are written from PyTorch's definitions in float64 NumPy, on arrays
[B, C, H, W] and by PyTorch's names; they share nothing with the Flax modules.
"""

import functools
import math
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import pytest

from nad_jax import errors, models
from nad_jax.interop import arch_match, name_maps

StateDict = dict[str, np.ndarray]
CLASSES = 7
MLP = ("mlp.0", "mlp.3")

# Networks in PyTorch's terms -----------------------------------------------------


class Net:
    """A state dict under construction, and the arithmetic of its layers."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.arrays: StateDict = {}

    def add_conv(self, name: str, outputs: int, inputs: int, size: int = 3) -> None:
        std = np.sqrt(2 / (inputs * size**2))
        shape = (outputs, inputs, size, size)
        self.arrays[f"{name}.weight"] = self.rng.normal(0, std, shape).astype("f4")

    def add_bn(self, name: str, channels: int) -> None:
        for leaf in ("weight", "running_var"):
            values = self.rng.uniform(0.5, 1.5, channels)
            self.arrays[f"{name}.{leaf}"] = values.astype("f4")
        for leaf in ("bias", "running_mean"):
            values = self.rng.normal(0, 0.3, channels)
            self.arrays[f"{name}.{leaf}"] = values.astype("f4")
        self.arrays[f"{name}.num_batches_tracked"] = np.array(782)

    def add_linear(self, name: str, outputs: int, inputs: int) -> None:
        self.add(f"{name}.weight", 1, outputs, inputs)
        self.add(f"{name}.bias", 1, outputs)

    def add_ln(self, name: str, channels: int) -> None:
        values = self.rng.uniform(0.5, 1.5, channels)
        self.arrays[f"{name}.weight"] = values.astype("f4")
        self.add(f"{name}.bias", 0.3, channels)

    def add(self, name: str, std: float, *shape: int) -> None:
        self.arrays[name] = self.rng.normal(0, std, shape).astype("f4")

    def conv(self, name: str, x: np.ndarray, stride: int = 1) -> np.ndarray:
        kernel = self.arrays[f"{name}.weight"].astype(np.float64)
        size = kernel.shape[-1]
        pad = (size - 1) // 2
        x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
        windows = windows[:, :, ::stride, ::stride]
        return np.einsum("bchwij,ocij->bohw", windows, kernel, optimize=True)

    def max_pool(self, x: np.ndarray) -> np.ndarray:
        """MaxPool2d(kernel_size=3, stride=2, padding=1)."""
        pads = ((0, 0), (0, 0), (1, 1), (1, 1))
        x = np.pad(x, pads, constant_values=-np.inf)
        windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), (2, 3))
        return windows[:, :, ::2, ::2].max(axis=(4, 5))

    def bn(self, name: str, x: np.ndarray) -> np.ndarray:
        weight, bias, mean, var = (
            self.arrays[f"{name}.{leaf}"].astype(np.float64)[:, None, None]
            for leaf in ("weight", "bias", "running_mean", "running_var")
        )
        return (x - mean) / np.sqrt(var + 1e-5) * weight + bias

    def relu_bn(self, name: str, x: np.ndarray) -> np.ndarray:
        return np.maximum(self.bn(name, x), 0)

    def head(self, name: str, x: np.ndarray) -> np.ndarray:
        return self.linear(name, x.mean(axis=(2, 3)))

    def linear(self, name: str, x: np.ndarray) -> np.ndarray:
        weight = self.arrays[f"{name}.weight"].astype(np.float64)
        return x @ weight.T + self.arrays[f"{name}.bias"]

    def ln(self, name: str, x: np.ndarray) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x * self.arrays[f"{name}.weight"] + self.arrays[f"{name}.bias"]


def wrn(depth: int, factor: int, *, stem: int = 4, inputs: int = 3) -> Net:
    net, channels = Net(), stem
    net.add_conv("conv1", stem, inputs)
    for group in (1, 2, 3):
        for layer in range((depth - 4) // 6):
            name, outputs = f"block{group}.layer.{layer}", stem * factor * 2**group // 2
            net.add_bn(f"{name}.bn1", channels)
            net.add_conv(f"{name}.conv1", outputs, channels)
            net.add_bn(f"{name}.bn2", outputs)
            net.add_conv(f"{name}.conv2", outputs, outputs)
            if channels != outputs:
                net.add_conv(f"{name}.convShortcut", outputs, channels, 1)
            channels = outputs
    net.add_bn("bn1", channels)
    net.add_linear("fc", CLASSES, channels)
    return net


def wrn_logits(net: Net, x: np.ndarray) -> np.ndarray:
    x = net.conv("conv1", x)
    for name, stride in blocks_of(net):
        out = net.relu_bn(f"{name}.bn1", x)
        if f"{name}.convShortcut.weight" in net.arrays:
            x = net.conv(f"{name}.convShortcut", out, stride)
        out = net.relu_bn(f"{name}.bn2", net.conv(f"{name}.conv1", out, stride))
        x = x + net.conv(f"{name}.conv2", out)
    return net.head("fc", net.relu_bn("bn1", x))


def resnet(
    sizes: tuple[int, ...], *, shortcut: str, head: str, stem: int = 4, inputs: int = 3
) -> Net:
    net, channels = Net(), stem
    net.add_conv("conv1", stem, inputs)
    net.add_bn("bn1", stem)
    for stage, size in enumerate(sizes):
        for block in range(size):
            name, outputs = f"layer{stage + 1}.{block}", stem * 2**stage
            net.add_conv(f"{name}.conv1", outputs, channels)
            net.add_bn(f"{name}.bn1", outputs)
            net.add_conv(f"{name}.conv2", outputs, outputs)
            net.add_bn(f"{name}.bn2", outputs)
            if channels != outputs:
                net.add_conv(f"{name}.{shortcut}.0", outputs, channels, 1)
                net.add_bn(f"{name}.{shortcut}.1", outputs)
            channels = outputs
    net.add_linear(head, CLASSES, channels)
    return net


def resnet_logits(net: Net, x: np.ndarray, *, shortcut: str, head: str) -> np.ndarray:
    x = net.relu_bn("bn1", net.conv("conv1", x))
    for name, stride in blocks_of(net):
        out = net.relu_bn(f"{name}.bn1", net.conv(f"{name}.conv1", x, stride))
        out = net.bn(f"{name}.bn2", net.conv(f"{name}.conv2", out))
        if stride == 2:
            x = net.bn(f"{name}.{shortcut}.1", net.conv(f"{name}.{shortcut}.0", x, 2))
        x = np.maximum(x + out, 0)
    return net.head(head, x)


def preact_resnet(*, stem: int = 4) -> Net:
    net, channels = Net(), stem
    net.add_conv("conv1", stem, 3)
    for stage in range(4):
        for block in range(2):
            name, outputs = f"layer{stage + 1}.{block}", stem * 2**stage
            net.add_bn(f"{name}.bn1", channels)
            net.add_conv(f"{name}.conv1", outputs, channels)
            net.add_bn(f"{name}.bn2", outputs)
            net.add_conv(f"{name}.conv2", outputs, outputs)
            if channels != outputs:
                net.add_conv(f"{name}.shortcut.0", outputs, channels, 1)
            channels = outputs
    net.add_linear("linear", CLASSES, channels)
    return net


def preact_resnet_logits(net: Net, x: np.ndarray) -> np.ndarray:
    x = net.conv("conv1", x)
    for name, stride in blocks_of(net):
        out = net.relu_bn(f"{name}.bn1", x)
        x = net.conv(f"{name}.shortcut.0", out, 2) if stride == 2 else x
        out = net.relu_bn(f"{name}.bn2", net.conv(f"{name}.conv1", out, stride))
        x = x + net.conv(f"{name}.conv2", out)
    return net.head("linear", x)


def imagenet_resnet(
    sizes: tuple[int, ...], *, bottleneck: bool = False, stem: int = 4
) -> Net:
    """torchvision's; the channels behind a bottleneck are 4 times those inside."""
    net, channels = Net(), stem
    net.add_conv("conv1", stem, 3, 7)
    net.add_bn("bn1", stem)
    for stage, size in enumerate(sizes):
        for block in range(size):
            name, inner = f"layer{stage + 1}.{block}", stem * 2**stage
            outputs = 4 * inner if bottleneck else inner
            windows = (1, 3, 1) if bottleneck else (3, 3)
            inputs = channels
            for number, window in enumerate(windows, start=1):
                own = outputs if number == len(windows) else inner
                net.add_conv(f"{name}.conv{number}", own, inputs, window)
                net.add_bn(f"{name}.bn{number}", own)
                inputs = own
            if channels != outputs:
                net.add_conv(f"{name}.downsample.0", outputs, channels, 1)
                net.add_bn(f"{name}.downsample.1", outputs)
            channels = outputs
    net.add_linear("fc", CLASSES, channels)
    return net


def imagenet_resnet_logits(net: Net, x: np.ndarray) -> np.ndarray:
    x = net.max_pool(net.relu_bn("bn1", net.conv("conv1", x, 2)))
    for name, stride in blocks_of(net):
        if f"{name}.conv3.weight" in net.arrays:
            out = net.relu_bn(f"{name}.bn1", net.conv(f"{name}.conv1", x))
            out = net.relu_bn(f"{name}.bn2", net.conv(f"{name}.conv2", out, stride))
            out = net.bn(f"{name}.bn3", net.conv(f"{name}.conv3", out))
        else:
            out = net.relu_bn(f"{name}.bn1", net.conv(f"{name}.conv1", x, stride))
            out = net.bn(f"{name}.bn2", net.conv(f"{name}.conv2", out))
        if f"{name}.downsample.0.weight" in net.arrays:
            x = net.conv(f"{name}.downsample.0", x, stride)
            x = net.bn(f"{name}.downsample.1", x)
        x = np.maximum(x + out, 0)
    return net.head("fc", x)


def vit(
    *, dim: int = 64, depth: int = 12, positions: int = 5, mlp: tuple[str, str] = MLP
) -> Net:
    net = Net()
    net.add("class_token", 1, 1, 1, dim)
    net.add("conv_proj.weight", 0.05, dim, 3, 16, 16)
    net.add("conv_proj.bias", 1, dim)
    net.add("encoder.pos_embedding", 1, 1, positions, dim)
    for layer in range(depth):
        name = f"encoder.layers.encoder_layer_{layer}"
        net.add_ln(f"{name}.ln_1", dim)
        net.add(f"{name}.self_attention.in_proj_weight", dim**-0.5, 3 * dim, dim)
        net.add(f"{name}.self_attention.in_proj_bias", 1, 3 * dim)
        net.add(f"{name}.self_attention.out_proj.weight", dim**-0.5, dim, dim)
        net.add(f"{name}.self_attention.out_proj.bias", 1, dim)
        net.add_ln(f"{name}.ln_2", dim)
        net.add(f"{name}.{mlp[0]}.weight", dim**-0.5, 4 * dim, dim)
        net.add(f"{name}.{mlp[0]}.bias", 1, 4 * dim)
        net.add(f"{name}.{mlp[1]}.weight", 0.5 * dim**-0.5, dim, 4 * dim)
        net.add(f"{name}.{mlp[1]}.bias", 1, dim)
    net.add_ln("encoder.ln", dim)
    net.add_linear("heads.head", CLASSES, dim)
    return net


def vit_logits(net: Net, images: np.ndarray) -> np.ndarray:
    """Image by image, as tokens [T, D]; the first token is the class token."""
    return np.stack([vit_logits_of_one(net, image) for image in images])


def vit_logits_of_one(net: Net, image: np.ndarray) -> np.ndarray:
    dim = net.arrays["class_token"].shape[-1]
    embed = net.arrays["conv_proj.weight"].astype(np.float64)
    patches = [
        image[:, top : top + 16, left : left + 16]
        for top in range(0, image.shape[1], 16)
        for left in range(0, image.shape[2], 16)
    ]
    x = np.einsum("tcij,dcij->td", np.stack(patches), embed, optimize=True)
    x = np.concatenate([net.arrays["class_token"][0], x + net.arrays["conv_proj.bias"]])
    x = x + net.arrays["encoder.pos_embedding"][0]
    for layer in range(12):
        name = f"encoder.layers.encoder_layer_{layer}"
        fused = net.arrays[f"{name}.self_attention.in_proj_weight"]
        queries, keys, values = np.split(
            net.ln(f"{name}.ln_1", x) @ fused.T.astype(np.float64)
            + net.arrays[f"{name}.self_attention.in_proj_bias"],
            3,
            axis=1,
        )
        mixed = np.zeros_like(x)
        for head in range(dim // 64):
            part = slice(64 * head, 64 * head + 64)
            scores = np.exp(queries[:, part] @ keys[:, part].T / 8)
            weights = scores / scores.sum(axis=1, keepdims=True)
            mixed[:, part] = weights @ values[:, part]
        x = x + net.linear(f"{name}.self_attention.out_proj", mixed)
        out = net.linear(f"{name}.mlp.0", net.ln(f"{name}.ln_2", x))
        out = out * (1 + np.vectorize(math.erf)(out / math.sqrt(2))) / 2
        x = x + net.linear(f"{name}.mlp.3", out)
    return net.linear("heads.head", net.ln("encoder.ln", x)[0])


def blocks_of(net: Net) -> list[tuple[str, int]]:
    """(name, stride) of each block in order; later groups start with stride 2."""
    ending = ".conv2.weight"
    names = [n.removesuffix(ending) for n in net.arrays if n.endswith(ending)]
    starts_small = [
        n.endswith(".0") and n[:6] not in ("block1", "layer1") for n in names
    ]
    return [(n, 1 + start) for n, start in zip(names, starts_small, strict=True)]


KUANGLIU = {"shortcut": "shortcut", "head": "linear"}
TORCHVISION = {"shortcut": "downsample", "head": "fc"}
RESNET_18, RESNET_34 = (2, 2, 2, 2), (3, 4, 6, 3)

Case = tuple[str, Callable[[], Net], Callable[[Net, np.ndarray], np.ndarray]]
FORWARD: dict[str, Case] = {
    "wrn": ("wrn_16_1", lambda: wrn(16, 1), wrn_logits),
    # Its first group widens without a stride: the shortcut there has stride 1.
    "wide": ("wrn_10_3", lambda: wrn(10, 3, inputs=1), wrn_logits),
    "kuangliu": (
        "resnet_18",
        lambda: resnet(RESNET_18, **KUANGLIU),
        functools.partial(resnet_logits, **KUANGLIU),
    ),
    "torchvision": (
        "resnet_18",
        lambda: resnet(RESNET_18, **TORCHVISION),
        functools.partial(resnet_logits, **TORCHVISION),
    ),
    "nad": (
        "resnet_8",
        lambda: resnet((1, 1, 1), **TORCHVISION),
        functools.partial(resnet_logits, **TORCHVISION),
    ),
    "preact": ("preact_resnet_18", preact_resnet, preact_resnet_logits),
    "imagenet": (
        "imagenet_resnet_18",
        lambda: imagenet_resnet(RESNET_18),
        imagenet_resnet_logits,
    ),
    "bottleneck": (
        "imagenet_resnet_50",
        lambda: imagenet_resnet(RESNET_34, bottleneck=True),
        imagenet_resnet_logits,
    ),
    # Two heads.
    "vit": ("vit_b_16", lambda: vit(dim=128), vit_logits),
}


# One function for all, so that two spellings of one network compile once; and fast, as
# it runs once.
APPLY = jax.jit(
    lambda model, *inputs: model.apply(*inputs),
    static_argnums=0,
    compiler_options={"xla_backend_optimization_level": 0},
)


@pytest.mark.slow
@pytest.mark.parametrize("case", FORWARD)
def test_logits_are_those_of_pytorch(case):
    arch, make, logits = FORWARD[case]
    net = make()
    found = name_maps.convert(net.arrays)
    assert (found.arch, found.num_classes) == (arch, CLASSES)
    stem = net.arrays.get("conv1.weight", net.arrays.get("conv_proj.weight"))
    side = 32 if arch.startswith(("imagenet_", "vit_")) else 8
    images = np.random.default_rng(1).uniform(size=(3, stem.shape[1], side, side))
    expected = logits(net, images)
    assert np.ptp(expected, axis=0).min() > 0.01  # The images make a difference.
    pixels = images.transpose(0, 2, 3, 1).astype(np.float32)
    actual, _ = APPLY(found.model, found.variables, pixels)
    np.testing.assert_allclose(
        actual, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max()
    )


def slow_if_large(names) -> list:
    """Parameters; nets of torchvision take more than a third of a second to trace."""
    large = ("imagenet", "bottleneck", "vit")
    return [
        pytest.param(n, marks=pytest.mark.slow if n.startswith(large) else [])
        for n in names
    ]


@pytest.mark.parametrize("case", slow_if_large(FORWARD))
def test_the_map_is_a_bijection(case):
    arch, make, _ = FORWARD[case]
    arrays = make().arrays
    found = name_maps.convert(arrays, arch)
    paths = {
        tuple(entry.key for entry in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(found.variables)
    }
    assert sorted(path for leaf in found.names.values() for path in leaf) == sorted(
        paths
    )
    back = name_maps.as_found(found.variables, found.names)
    assert set(back) == {n for n in arrays if not n.endswith("num_batches_tracked")}
    for name, array in back.items():
        assert array.dtype == np.float32 and array.flags.c_contiguous
        np.testing.assert_array_equal(array, arrays[name])


def test_the_tree_is_the_one_the_model_makes():
    """Another build of the same name, classes and width takes the variables."""
    found = name_maps.convert(resnet((1, 1, 1), **KUANGLIU).arrays)
    model = models.build(found.arch, num_classes=found.num_classes, width=found.width)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    made = jax.eval_shape(model.init, jax.random.key(0), images)
    assert jax.tree.structure(made) == jax.tree.structure(found.variables)
    same = jax.tree.map(lambda a, b: a.shape == b.shape, made, found.variables)
    assert all(jax.tree.leaves(same))


@pytest.mark.slow
@pytest.mark.parametrize("arch", slow_if_large(name_maps.ARCHS))
def test_every_listed_architecture_recognises_itself_only(arch):
    family, *numbers = arch.rsplit("_", 2) if arch[0] == "w" else arch.rsplit("_", 1)
    if family == "wrn":
        net = wrn(int(numbers[0]), int(numbers[1]), stem=1)
    elif family == "preact_resnet":
        net = preact_resnet(stem=1)
    elif family == "imagenet_resnet":
        sizes = RESNET_18 if numbers[0] == "18" else RESNET_34
        net = imagenet_resnet(sizes, bottleneck=numbers[0] == "50", stem=1)
    elif family == "vit_b":
        net = vit()
    else:
        sizes = {
            **{"18": RESNET_18, "34": RESNET_34, "8": (1, 1, 1), "14": (2, 2, 2)},
            **{"20": (3, 3, 3), "32": (5, 5, 5)},
        }
        net = resnet(sizes[numbers[0]], **TORCHVISION, stem=1)
    fits = [fit.arch for fit in arch_match.nearest_fits(net.arrays) if not fit.count]
    assert fits == [arch]


# What the file decides -----------------------------------------------------------


def test_classes_and_width_are_read_from_the_file():
    arrays = resnet((1, 1, 1), **TORCHVISION, stem=6).arrays
    arrays["fc.weight"] = np.ones((43, 24), np.float32)
    arrays["fc.bias"] = np.ones(43, np.float32)
    found = name_maps.convert(arrays, "resnet_8")
    assert (found.num_classes, found.width) == (43, 6 / 16)
    assert any("0.375 of the published channels" in note for note in found.notes)


def test_counters_may_be_missing():
    arrays = wrn(10, 1).arrays
    old = {n: a for n, a in arrays.items() if not n.endswith("num_batches_tracked")}
    assert len(old) < len(arrays)
    new, found = name_maps.convert(arrays), name_maps.convert(old)
    assert any(note.startswith("7 counters") for note in new.notes)
    assert not any("counters" in note for note in found.notes)
    jax.tree.map(np.testing.assert_array_equal, found.variables, new.variables)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
def test_other_floats_become_float32(dtype):
    dtype = np.dtype(dtype)
    arrays = {
        name: array if array.dtype.kind == "i" else array.astype(dtype)
        for name, array in wrn(10, 1).arrays.items()
    }
    found = name_maps.convert(arrays)
    back = name_maps.as_found(found.variables, found.names)
    for name, array in back.items():
        np.testing.assert_array_equal(array, arrays[name].astype(np.float32))
    noted = [note for note in found.notes if "float32" in note]
    if dtype == ">f4":
        assert not noted
    else:
        assert noted == [f"{len(back)} arrays were {dtype.name} and are float32 now"]


def test_what_the_weights_do_not_say_is_noted():
    notes = name_maps.convert(resnet(RESNET_18, **TORCHVISION, stem=1).arrays).notes
    assert any("max-pool" in note for note in notes)
    assert any("recognised" in note for note in notes)
    notes = name_maps.convert(preact_resnet(stem=1).arrays, "preact_resnet_18").notes
    assert not any("max-pool" in note or "recognised" in note for note in notes)
    assert any("normalised" in note for note in notes)


@pytest.mark.parametrize(
    ("make", "assumption"),
    [
        (lambda: imagenet_resnet(RESNET_18, stem=1), "its max-pool after the stem are"),
        (lambda: vit(), "heads of 64 channels are assumed"),
    ],
)
def test_what_torchvision_has_is_assumed_and_noted(make, assumption):
    notes = name_maps.convert(make().arrays).notes
    assert sum("as the weights do not say" in note for note in notes) == 1
    assert any(assumption in note for note in notes)


@pytest.mark.slow
def test_the_width_of_a_transformer_is_that_of_its_tokens():
    found = name_maps.convert(vit(dim=192).arrays)
    assert (found.width, found.num_classes) == (0.25, CLASSES)
    note = "0.25 of the published channels, read from conv_proj.weight"
    assert note in found.notes
    model = models.build(found.arch, num_classes=CLASSES, width=found.width)
    assert model == found.model


def test_query_key_and_value_are_the_thirds_of_what_pytorch_fuses():
    arrays = vit().arrays
    found = name_maps.convert(arrays)
    name = "encoder.layers.encoder_layer_11.self_attention.in_proj_"
    block = found.variables["params"]["block12"]
    for index, part in enumerate(("query", "key", "value")):
        rows = slice(64 * index, 64 * index + 64)
        kernel = arrays[f"{name}weight"][rows].T
        np.testing.assert_array_equal(block[part]["kernel"], kernel)
        np.testing.assert_array_equal(block[part]["bias"], arrays[f"{name}bias"][rows])


def test_the_older_names_of_a_transformer_are_taken_and_given_back():
    new, old = vit().arrays, vit(mlp=("mlp.linear_1", "mlp.linear_2")).arrays
    found = name_maps.convert(old)
    expected = name_maps.convert(new).variables
    jax.tree.map(np.testing.assert_array_equal, found.variables, expected)
    back = name_maps.as_found(found.variables, found.names)
    assert set(back) == set(old) != set(new)


@pytest.mark.slow
def test_a_transformer_takes_images_of_its_own_size_only():
    """Nine patches and the class token: 48 pixels on a side."""
    found = name_maps.convert(vit(positions=10).arrays)
    for side in (48, 32):
        images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        if side == 48:
            jax.eval_shape(found.model.apply, found.variables, images)
            continue
        with pytest.raises(errors.InputError, match="48 x 48 pixels, got 32 x 32"):
            jax.eval_shape(found.model.apply, found.variables, images)


def test_the_result_does_not_share_memory_with_the_file():
    arrays = wrn(10, 1).arrays
    before = arrays["bn1.weight"].copy()
    found = name_maps.convert(arrays)
    arrays["bn1.weight"][:] = 0
    scale = found.variables["params"]["bn1"]["scale"]
    np.testing.assert_array_equal(scale, before)


def test_read_only_arrays_are_taken():
    arrays = wrn(10, 1).arrays
    for array in arrays.values():
        array.flags.writeable = False
    assert name_maps.convert(arrays).arch == "wrn_10_1"


# Refusals ------------------------------------------------------------------------


def refusal(arrays: StateDict, arch: str | None = None, **options) -> str:
    """The message with which they are refused, a single printable line."""
    with pytest.raises(errors.InputError) as caught:
        name_maps.convert(arrays, arch, **options)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 2000
    return message


def without(arrays: StateDict, *parts: str) -> StateDict:
    return {n: a for n, a in arrays.items() if not any(part in n for part in parts)}


def test_a_missing_array_is_named_with_its_shape():
    arrays = without(wrn(10, 2).arrays, "block3.layer.0.convShortcut")
    message = refusal(arrays, "wrn_10_2", source="a/net.pth")
    assert message == (
        "'a/net.pth': it does not fit wrn_10_2: 1 missing "
        "('block3.layer.0.convShortcut.weight' [32, 16, 1, 1]); "
        "no other architecture here is closer"
    )


def test_an_array_left_over_is_named_with_its_shape():
    arrays = wrn(10, 1).arrays | {"conv1.bias": np.zeros(4, np.float32)}
    message = refusal(arrays, "wrn_10_1")
    assert message.startswith("state dict: it does not fit wrn_10_1: 1 left over ")
    assert "('conv1.bias' [4]);" in message


def test_another_shape_is_named_with_both():
    arrays = wrn(10, 1).arrays | {"block1.layer.0.bn1.bias": np.zeros(1, np.float32)}
    expected = "1 of another shape ('block1.layer.0.bn1.bias' is [1], expected [4])"
    assert expected in refusal(arrays)
    assert expected in refusal(arrays, "wrn_10_1")


def test_the_first_few_of_each_kind_are_named():
    arrays = {f"odd{n}": np.zeros(n, np.float32) for n in range(1, 9)}
    arrays |= without(wrn(10, 1).arrays, "block1.layer.0.bn")
    message = refusal(arrays, "wrn_10_1")
    assert "8 missing (" in message
    assert "8 left over ('odd1' [1], 'odd2' [2], 'odd3' [3], ...)" in message
    assert "'odd4'" not in message


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "net", "fits"),
    [
        ("wrn_10_1", lambda: wrn(16, 1, stem=1), "wrn_16_1"),
        ("wrn_16_2", lambda: wrn(16, 1, stem=1), "wrn_16_1"),
        ("wrn_16_1", lambda: resnet((1, 1, 1), **KUANGLIU), "resnet_8"),
        ("resnet_18", lambda: preact_resnet(stem=1), "preact_resnet_18"),
        ("preact_resnet_18", lambda: resnet(RESNET_18, **TORCHVISION), "resnet_18"),
        ("resnet_18", lambda: resnet(RESNET_34, **KUANGLIU, stem=1), "resnet_34"),
        ("resnet_18", lambda: imagenet_resnet(RESNET_18), "imagenet_resnet_18"),
        ("imagenet_resnet_18", lambda: resnet(RESNET_18, **TORCHVISION), "resnet_18"),
        (
            "imagenet_resnet_34",
            lambda: imagenet_resnet(RESNET_34, bottleneck=True, stem=1),
            "imagenet_resnet_50",
        ),
        (
            "imagenet_resnet_50",
            lambda: imagenet_resnet(RESNET_34, stem=1),
            "imagenet_resnet_34",
        ),
        ("resnet_8", lambda: vit(), "vit_b_16"),
        ("vit_b_16", lambda: resnet((1, 1, 1), **KUANGLIU), "resnet_8"),
    ],
)
def test_the_architecture_that_fits_is_offered(arch, net, fits):
    message = refusal(net().arrays, arch)
    assert f"it does not fit {arch}: " in message
    assert message.endswith(f"; it fits {fits}")


def test_a_last_batch_norm_is_not_dropped():
    """He et al. normalise before the classifier; the model here does not."""
    net = preact_resnet(stem=1)
    net.add_bn("bn", 8)
    message = refusal(net.arrays)
    assert "closest is preact_resnet_18: 5 left over ('bn.weight' [8]," in message


def test_a_batch_norm_after_the_stem_is_not_dropped():
    """An early ResNet18 of the CIFAR collection: pre-activation blocks after a bn1."""
    net = preact_resnet(stem=1)
    net.add_bn("bn1", 1)
    message = refusal(net.arrays)
    assert "closest is preact_resnet_18: 5 left over ('bn1.weight' [1]," in message


def test_a_shortcut_without_its_batch_norm_is_refused():
    arrays = without(resnet((1, 1, 1), **KUANGLIU).arrays, "shortcut.1")
    message = refusal(arrays, "resnet_8")
    assert "8 missing ('layer2.0.shortcut.1" in message


def test_a_shortcut_without_weights_is_refused():
    """Option A of the CIFAR nets: zero padding instead of a convolution."""
    arrays = without(resnet((1, 1, 1), **KUANGLIU).arrays, "shortcut")
    assert "closest is resnet_8: 10 missing (" in refusal(arrays)


def test_mixed_spellings_are_refused():
    arrays = resnet((1, 1, 1), **KUANGLIU).arrays
    name = "layer2.0.shortcut.0.weight"
    arrays["layer2.0.downsample.0.weight"] = arrays.pop(name)
    assert "left over ('layer2.0.shortcut.1" in refusal(arrays, "resnet_8")


def test_a_counter_without_batch_norm_is_left_over():
    arrays = wrn(10, 1).arrays | {"bn9.num_batches_tracked": np.array(3)}
    assert "1 left over ('bn9.num_batches_tracked' [])" in refusal(arrays)


def test_a_parallel_prefix_shows():
    arrays = {f"module.{name}": array for name, array in wrn(10, 1).arrays.items()}
    assert "'module.conv1.weight' [4, 3, 3, 3]" in refusal(arrays)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"conv1.weight": zeros(64, 3, 5, 5)}, "only stems [channels, inputs, 3, 3]"),
        ({"conv1.weight": zeros(64, 3, 7, 7)}, "no architecture here has such"),
        ({"layer1.0.conv3.weight": zeros(256, 64, 1, 1)}, "a bottleneck ResNet"),
        ({"cls_token": zeros(1, 1, 192)}, "in another layout than torchvision's"),
        ({"blocks.0.attn.qkv.weight": zeros(576, 192)}, "in another layout than"),
        ({"encoder.layers.0.norm1.bias": zeros(8)}, "in another layout than"),
        ({"features.0.weight": zeros(64, 3, 3, 3)}, "no architecture here has such"),
        ({}, "no arrays"),
    ],
)
def test_other_kinds_of_networks_are_refused_by_their_kind(arrays, reason):
    message = refusal(arrays)
    assert reason in message
    assert all(name in message for name in arrays)
    if reason != "no arrays":
        assert "accepted" in message and "preact_resnet_18" in message
    # The same with a name that is in the table.
    refusal(arrays, "resnet_18")


def test_a_bottleneck_net_for_small_images_is_refused():
    arrays = imagenet_resnet(RESNET_34, bottleneck=True, stem=1).arrays
    arrays["conv1.weight"] = zeros(1, 3, 3, 3)
    message = refusal(arrays, "imagenet_resnet_50")
    assert "a bottleneck ResNet without torchvision's 7x7 stem; accepted" in message


@pytest.mark.slow
def test_deeper_and_wider_bottleneck_nets_are_refused():
    arrays = imagenet_resnet((3, 4, 23, 3), bottleneck=True, stem=1).arrays
    assert "closest is imagenet_resnet_50: 306 left over ('layer3.6" in refusal(arrays)
    arrays = imagenet_resnet(RESNET_34, bottleneck=True).arrays
    # As ResNeXt has it, in two groups.
    arrays["layer1.0.conv2.weight"] = zeros(4, 2, 3, 3)
    expected = "'layer1.0.conv2.weight' is [4, 2, 3, 3], expected [4, 4, 3, 3]"
    assert expected in refusal(arrays)


@pytest.mark.slow
def test_a_transformer_of_another_depth_is_refused():
    assert "closest is vit_b_16: 12 missing (" in refusal(vit(depth=11).arrays)
    message = refusal(vit(depth=13).arrays)
    assert "12 left over ('encoder.layers.encoder_layer_12.ln_1.weight' [64]" in message


@pytest.mark.parametrize(
    "arch",
    ["vit_tiny", "vit_b_32", "resnet_50", "wrn_22_1", "wrn_16_99999999", "x\n", ""],
)
def test_an_architecture_without_a_map_is_refused(arch):
    message = refusal(wrn(10, 1).arrays, arch)
    assert f"arch {arch!r} cannot be imported; accepted are wrn_10_1, " in message


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("fc.weight", None, "'fc.weight' [classes, inputs] is missing"),
        ("conv1.weight", None, "'conv1.weight' [channels, inputs, 3, 3] is missing"),
        ("fc.weight", zeros(0, 16), "'fc.weight' is [0, 16], expected [classes, in"),
        ("fc.weight", zeros(7), "'fc.weight' is [7], expected [classes, inputs]"),
        ("conv1.weight", zeros(0, 3, 3, 3), "'conv1.weight' is [0, 3, 3, 3], expec"),
        ("conv1.weight", zeros(10**9, 0, 3, 3), "each 1 to 65536"),
        ("block1.layer.0.conv1.weight", zeros(10**9, 0, 3, 3), "channels; at most"),
        ("conv1.weight", zeros(4), "only stems [channels, inputs, 3, 3] and [ch"),
        ("block1.layer.0.conv1.weight", np.float32(0), "closest is wrn_10_1"),
    ],
)
def test_sizes_are_checked_before_they_are_used(name, array, reason):
    arrays = wrn(10, 1).arrays
    del arrays[name]
    if array is not None:
        arrays[name] = np.asarray(array)
    assert reason in refusal(arrays)


@pytest.mark.parametrize(
    ("name", "array", "reason"),
    [
        ("conv_proj.weight", None, "'conv_proj.weight' [channels, inputs, 16, 16] is"),
        ("conv_proj.weight", zeros(2**20, 0, 16, 16), "each 1 to 65536"),
        ("conv_proj.weight", zeros(100, 3, 16, 16), "100 channels a token; accepted"),
        (
            "conv_proj.weight",
            zeros(64, 3, 32, 32),
            "[64, 3, 32, 32], expected [64, 3, ",
        ),
        ("heads.head.weight", None, "'heads.head.weight' [classes, inputs] is missing"),
        ("heads.head.weight", zeros(2**20, 0), "'heads.head.weight' is [1048576, 0],"),
        ("encoder.pos_embedding", None, "'encoder.pos_embedding' [1, 1 + patches, ch"),
        ("encoder.pos_embedding", zeros(5, 64), "expected [1, 1 + patches, channels]"),
        ("encoder.pos_embedding", zeros(1, 10**9, 0), "each 1 to 65536"),
        ("encoder.pos_embedding", zeros(1, 1, 64), "has 1 positions; expected a class"),
        ("encoder.pos_embedding", zeros(1, 4, 64), "has 4 positions; expected a class"),
        (
            "encoder.pos_embedding",
            zeros(2, 5, 64),
            "is [2, 5, 64], expected [1, 5, 64]",
        ),
        ("class_token", zeros(1, 64), "'class_token' is [1, 64], expected [1, 1, 64]"),
        (
            "encoder.layers.encoder_layer_0.self_attention.in_proj_bias",
            zeros(191),
            "is [191], expected [192]",
        ),
    ],
)
def test_sizes_of_a_transformer_are_checked_before_they_are_used(name, array, reason):
    arrays = vit().arrays
    del arrays[name]
    if array is not None:
        arrays[name] = array
    assert reason in refusal(arrays)
    assert reason in refusal(arrays, "vit_b_16")


@pytest.mark.slow
def test_the_largest_transformer_the_bounds_let_through_is_compared():
    arrays = vit().arrays
    # One number in memory each, as large as the bounds allow.
    huge = {"conv_proj.weight": (2**16, 3, 16, 16)}
    huge["encoder.pos_embedding"] = (1, 1 + 255**2, 2**16)
    for name, shape in huge.items():
        arrays[name] = np.broadcast_to(np.float32(0), shape)
    expected = "self_attention.in_proj_bias' is [192], expected [196608]"
    assert expected in refusal(arrays, "vit_b_16")


def test_the_widest_network_the_bound_lets_through_is_compared():
    arrays = wrn(10, 1).arrays
    arrays["block1.layer.0.conv1.weight"] = zeros(2**16, 0, 3, 3)
    assert "is [65536, 0, 3, 3], expected [65536, 4, 3, 3]" in refusal(arrays)


def test_names_of_strangers_are_shown_on_one_line():
    arrays = wrn(10, 1).arrays | {"a\nb\x1b" + "c" * 999: zeros(2)}
    assert r"1 left over ('a\nb\x1bccc" in refusal(arrays)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("bn1.running_var", lambda a: a - 2, "holds -1.4"),
        ("bn1.weight", lambda a: a * np.nan, "holds 16 values of 16 that are not fin"),
        ("conv1.weight", lambda a: a.astype("f8") * 1e300, "not finite in float32"),
        ("conv1.weight", lambda a: a.astype("i1"), "is int8; weights are float32"),
        ("fc.bias", lambda a: a > 0, "is bool; weights are float32"),
    ],
)
def test_values_that_are_no_weights_are_refused(name, change, reason):
    arrays = wrn(10, 1).arrays
    arrays[name] = change(arrays[name])
    message = refusal(arrays)
    assert message.startswith(f"state dict: '{name}' ") and reason in message
