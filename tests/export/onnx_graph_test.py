# SPDX-License-Identifier: Apache-2.0
"""Exported graphs compute what JAX does, from exactly the codes that were given."""

import collections
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, models
from nad_jax.core import quantization
from nad_jax.defenses import efrap, quantized_module
from nad_jax.models import class_token_vit
from nad_jax.models import layers as layers_lib

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import numpy_helper  # noqa: E402

from nad_jax.export import onnx_graph  # noqa: E402

EVALUATE = {"train": False}


def _run(model, images, *, as_written=False):
    """Logits by ONNX Runtime itself, after a round trip through bytes."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    # Without it, CPUs that lack VNNI add int8 products in 16 bits, which overflow.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if as_written:
        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.graph_optimization_level = level
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(["logits"], {"images": np.asarray(images)})[0]


def _images(shape, seed=0):
    return np.random.default_rng(seed).uniform(size=shape).astype(np.float32)


def _variables(module, image_shape):
    """Variables as after training, compiled from nothing; no scale or bias is idle."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    generator = np.random.default_rng(1)

    def draw(path, leaf):
        if path[-1].key in ("scale", "var"):
            values = generator.uniform(0.5, 1.5, leaf.shape)
        elif path[-1].key == "kernel":
            std = np.sqrt(2 / max(np.prod(leaf.shape[:-1]), 1))
            values = generator.normal(0, std, leaf.shape)
        else:
            values = generator.normal(0, 0.3, leaf.shape)
        return values.astype(np.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), images)
    return jax.device_put(jax.tree_util.tree_map_with_path(draw, shapes))


@functools.cache
def _apply(module):
    """One compilation for all tests of a module."""
    return jax.jit(module.apply)


def _assert_close(actual, expected, tolerance=1e-5):
    expected = np.asarray(expected)
    assert np.ptp(expected) > 1e-3
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def _assert_parity(module, image_shape, batch=3, tolerance=1e-5):
    """Float parity; returns the model."""
    images = _images((batch, *image_shape))
    variables = _variables(module, image_shape)
    model = onnx_graph.to_onnx(module, variables, image_shape)
    expected = _apply(module)(variables, images)
    if isinstance(expected, tuple):
        expected = expected[0]
    _assert_close(_run(model, images), expected, tolerance)
    return model


def _counts(model):
    return collections.Counter(node.op_type for node in model.graph.node)


def _initializers(model):
    return {tensor.name: tensor for tensor in model.graph.initializer}


class Net(nn.Module):
    """Two convolutions with BatchNorm, one without, and a Dense."""

    channels: int = 8

    @nn.compact
    def __call__(self, x, train: bool = False):
        for index, stride in enumerate((1, 2)):
            name = f"conv{index}"
            x = nn.Conv(self.channels, (3, 3), (stride, stride), name=name)(x)
            x = nn.BatchNorm(use_running_average=not train, name=f"bn{index}")(x)
            x = nn.relu(x)
        x = nn.relu(nn.Conv(self.channels, (1, 1), name="conv2")(x))
        x = x.mean(axis=(1, 2))
        return nn.Dense(5, name="fc")(x)


@pytest.fixture(scope="module")
def net():
    """Module, folded variables and layers of `Net`."""
    module, images = Net(), jnp.asarray(_images((4, 8, 8, 3)))
    variables = _variables(module, (8, 8, 3))
    layers = layers_lib.find_layers(module, variables, images)
    return module, layers_lib.fold_batch_norm(variables, layers), layers


def _quantize(kernel, spec):
    """Codes, grid and floats of a kernel, without compiling anything."""
    kernel = np.asarray(kernel)
    axes = tuple(range(kernel.ndim - (spec.channel_axis is not None)))
    low, high = kernel.min(axes, keepdims=True), kernel.max(axes, keepdims=True)
    if spec.symmetric:
        high = np.maximum(-low, high)
        low = np.zeros_like(high)
    scale = (high - low) / np.float32(spec.qmax)
    zero_point = np.round(-low / scale).astype(np.int32)
    codes = np.clip(np.round(kernel / scale) + zero_point, spec.qmin, spec.qmax)
    grid = quantization.QuantParams(jnp.asarray(scale), jnp.asarray(zero_point))
    floats = scale * (codes - zero_point).astype(np.float32)
    return jnp.asarray(codes.astype(spec.dtype)), grid, jnp.asarray(floats)


def _quantized(net, spec):
    """Codes, grids, specs and dequantized variables of every layer of `Net`."""
    _, variables, layers = net
    codes, grids = {}, {}
    for layer in layers:
        kernel = variables["params"][layer.name]["kernel"]
        codes[layer.name], grids[layer.name], kernel = _quantize(kernel, spec)
        path = ("params", layer.name, "kernel")
        variables = layers_lib.set_in(variables, path, kernel)
    specs = {layer.name: spec for layer in layers}
    return variables, {"codes": codes, "quant_params": grids, "specs": specs}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["wrn_10_1", "resnet_8", "preact_resnet_18", "imagenet_resnet_18"]
)
def test_convolutional_models_keep_their_logits(name):
    module = models.build(name, num_classes=10, width=0.25)
    variables = _variables(module, (16, 16, 3))
    images = _images((3, 16, 16, 3))
    model = onnx_graph.to_onnx(module, variables, (16, 16, 3), apply_kwargs=EVALUATE)
    expected = jax.jit(lambda v: module.apply(v, images, train=False)[0])(variables)
    _assert_close(_run(model, images), expected)
    # The images alone change their layout.
    assert _counts(model)["Transpose"] == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    [
        models.build("vit_tiny", num_classes=10, depth=2, dim=24),
        class_token_vit.vit_b(4, num_classes=10, depth=2, dim=24, head_dim=8),
    ],
    ids=["mean", "class token"],
)
def test_transformers_keep_their_logits(module):
    variables = _variables(module, (8, 8, 3))
    images = _images((3, 8, 8, 3))
    model = onnx_graph.to_onnx(module, variables, (8, 8, 3))
    expected = jax.jit(lambda v: module.apply(v, images)[0])(variables)
    _assert_close(_run(model, images), expected)


CONVOLUTIONS = {
    "stride 2, odd size": {"strides": (2, 2), "padding": "SAME"},
    "stride 3": {"strides": (3, 2), "kernel_size": (2, 4), "padding": "SAME"},
    "valid": {"padding": "VALID", "use_bias": False},
    "grouped": {"feature_group_count": 2},
    "dilated": {"kernel_dilation": (2, 3)},
    "grouped and dilated": {"feature_group_count": 4, "kernel_dilation": 2},
    "explicit": {"padding": ((0, 2), (1, 0))},
    "cropping": {"padding": ((-1, 2), (1, -2))},
    "circular": {"padding": "CIRCULAR"},
    "reflecting": {"padding": "REFLECT"},
}


@pytest.mark.slow
def test_every_kind_of_convolution():
    class All(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = [{"kernel_size": (3, 3), **o} for o in CONVOLUTIONS.values()]
            outputs = [nn.Conv(8, **o)(x) for o in options]
            flat = [y.reshape(y.shape[0], -1) for y in outputs]
            return jnp.concatenate(flat, axis=-1)

    _assert_parity(All(), (9, 7, 4))


@pytest.mark.slow
def test_a_users_network_with_other_operations():
    class Users(nn.Module):
        """Pooling, a gate over channels, GroupNorm, attention, a class token."""

        @nn.compact
        def __call__(self, x):
            x = 2.0 * (x - jnp.asarray([0.4, 0.5, 0.6]).reshape(1, 1, 1, 3))
            x = nn.max_pool(nn.silu(nn.Conv(8, (3, 3))(x)), (3, 3), (2, 2), "SAME")
            gate = nn.Conv(8, (1, 1))(x.mean(axis=(1, 2), keepdims=True))
            x = nn.GroupNorm(num_groups=2)(x) * nn.sigmoid(gate)
            x = nn.avg_pool(nn.leaky_relu(x), (2, 2), (2, 2))
            x = nn.relu6(jnp.concatenate([x, -x[..., ::1]], axis=-1))
            tokens = x.reshape(x.shape[0], -1, x.shape[-1])
            token = self.param("token", nn.initializers.normal(), (1, 1, 16))
            token = jnp.broadcast_to(token, (x.shape[0], 1, 16))
            tokens = jnp.concatenate([token, tokens], axis=1)
            tokens += nn.MultiHeadDotProductAttention(num_heads=2)(tokens)
            tokens = nn.gelu(nn.Dense(12)(nn.LayerNorm()(tokens)))
            tokens = jnp.where(tokens > 0.0, jnp.tanh(tokens), nn.softplus(tokens))
            return nn.Dense(4)(tokens[:, 0]), tokens

    # flax's own avg_pool and attention need the usual promotions.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        _assert_parity(Users(), (8, 8, 3))


@pytest.mark.slow
def test_blocks_under_jit_and_remat_and_a_layer_called_twice():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.relu(nn.Dense(6)(x))

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.remat(Block)()(nn.jit(Block)()(x))
            shared = nn.Dense(6)
            return nn.log_softmax(shared(jnp.sin(shared(inputs=x))).mean(axis=(1, 2)))

    first = _assert_parity(Outer(), (4, 4, 3))
    # What was compiled for the first export must not change the second.
    assert _assert_parity(Outer(), (4, 4, 3)) == first


@pytest.mark.slow
def test_flattening_keeps_the_order_of_channels():
    class Flat(nn.Module):
        @nn.compact
        def __call__(self, x):
            # Names that the graph wants for itself.
            x = nn.relu(nn.Conv(6, (3, 3), name="images")(x))
            x = nn.relu(nn.Conv(6, (1, 1), name="relu_1")(x))
            return jnp.tanh(nn.Dense(5, name="logits")(x.reshape(x.shape[0], -1)))

    _assert_parity(Flat(), (4, 5, 3))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_the_batch_size_is_free(net, batch):
    module, variables, layers = net
    model = onnx_graph.to_onnx(module, variables, (8, 8, 3), layers=layers)
    sizes = model.graph.input[0].type.tensor_type.shape.dim
    assert sizes[0].dim_param == "N" and [s.dim_value for s in sizes[1:]] == [8, 8, 3]
    images = _images((7, 8, 8, 3))
    expected = np.asarray(_apply(module)(variables, images))[:batch]
    _assert_close(_run(model, images[:batch]), expected)


@pytest.mark.slow
def test_folded_batch_norm_is_a_bias_and_nothing_else(net):
    module, variables, layers = net
    counts = _counts(onnx_graph.to_onnx(module, variables, (8, 8, 3)))
    expected = {"Transpose": 1, "Conv": 3, "Relu": 3, "ReduceSum": 1, "Mul": 1}
    assert counts == {**expected, "Gemm": 1}
    unfolded = _variables(module, (8, 8, 3))
    counts = _counts(onnx_graph.to_onnx(module, unfolded, (8, 8, 3)))
    assert counts == {**expected, "Gemm": 1, "BatchNormalization": 2}


GRIDS = {
    "W8": quantization.QuantSpec(8),
    "W8 per tensor": quantization.QuantSpec(8, channel_axis=None),
    "W8 affine": quantization.QuantSpec(8, symmetric=False),
    "W6": quantization.QuantSpec(6),
    "W4": quantization.QuantSpec(4),
    "W4 affine": quantization.QuantSpec(4, symmetric=False),
    "W2 per tensor": quantization.QuantSpec(2, channel_axis=None),
}


@pytest.mark.parametrize("spec", GRIDS.values(), ids=GRIDS)
def test_stored_codes_are_the_given_ones_and_give_the_same_logits(net, spec):
    module, _, layers = net
    variables, quantized = _quantized(net, spec)
    model = onnx_graph.to_onnx(module, variables, (8, 8, 3), layers=layers, **quantized)
    stored = _initializers(onnx.load_model_from_string(model.SerializeToString()))
    for name, codes in quantized["codes"].items():
        tensor = stored[f"{name}/codes"]
        types = ("INT4", "UINT4") if spec.bits <= 4 else ("INT8", "UINT8")
        assert tensor.data_type == getattr(onnx.TensorProto, types[not spec.symmetric])
        array = numpy_helper.to_array(tensor).astype(np.int32)
        if array.ndim == 4:
            array = array.transpose(2, 3, 1, 0)
        np.testing.assert_array_equal(array, np.asarray(codes, np.int32))
        scale = numpy_helper.to_array(stored[f"{name}/scale"])
        given = np.asarray(quantized["quant_params"][name].scale)
        np.testing.assert_array_equal(scale.ravel(), given.ravel())
    images = _images((7, 8, 8, 3))
    expected = _apply(module)(variables, images)
    _assert_close(_run(model, images, as_written=True), expected)


def test_small_codes_can_be_stored_in_bytes(net):
    module, _, layers = net
    variables, quantized = _quantized(net, quantization.QuantSpec(4))
    model = onnx_graph.to_onnx(
        module, variables, (8, 8, 3), layers=layers, pack_int4=False, **quantized
    )
    tensor = _initializers(model)["conv1/codes"]
    assert tensor.data_type == onnx.TensorProto.INT8
    images = _images((7, 8, 8, 3))
    expected = _apply(module)(variables, images)
    _assert_close(_run(model, images, as_written=True), expected)


def test_layers_without_codes_stay_float(net):
    module, _, layers = net
    variables, quantized = _quantized(net, quantization.QuantSpec(4))
    del quantized["codes"]["fc"]
    model = onnx_graph.to_onnx(module, variables, (8, 8, 3), **quantized)
    assert _counts(model)["DequantizeLinear"] == 3
    images = _images((7, 8, 8, 3))
    _assert_close(_run(model, images), _apply(module)(variables, images))


@pytest.fixture(scope="module")
def calibrated(net):
    """`efrap` of `Net` with 8-bit activations, and its export."""
    module, variables, layers = net
    # A channel that is nearly dead but for its bias, as folding the BatchNorm of a
    # pruned one leaves it.
    for path, index, value in (
        (("params", "conv1", "kernel"), (..., 0), 1e-10),
        (("params", "conv1", "bias"), 0, 0.5),
        (("params", "bn1", "bias"), 0, 0.5),
    ):
        leaf = layers_lib.get_in(variables, path).at[index].set(value)
        variables = layers_lib.set_in(variables, path, leaf)
    # Several classes should win somewhere.
    logits = _apply(module)(variables, _colourful(200))
    path = ("params", "fc", "bias")
    bias = layers_lib.get_in(variables, path) - jnp.median(logits, axis=0)
    variables = layers_lib.set_in(variables, path, bias)
    quantized = efrap.efrap(
        module,
        variables,
        jnp.asarray(_colourful(32)),
        weight_bits=8,
        act_bits=8,
        method="nearest",
        fold_batch_norm=True,
        apply_kwargs=EVALUATE,
    )
    return quantized


def _colourful(number):
    """Images of different brightness and colour."""
    colours = _images((number, 1, 1, 3), seed=7)
    return (_images((number, 8, 8, 3), seed=5) + colours) / np.float32(2)


def _export(quantized, **changes):
    arguments = {
        "codes": quantized.codes,
        "quant_params": quantized.quant_params,
        "specs": quantized.specs,
        "act_params": quantized.act_params,
        "act_spec": quantized.act_spec,
        "apply_kwargs": quantized.apply_kwargs,
        **changes,
    }
    variables = quantized.variables
    return onnx_graph.to_onnx(quantized.module, variables, (8, 8, 3), **arguments)


@pytest.mark.slow
def test_quantized_activations_equal_fake_quantization(calibrated):
    quantized = calibrated
    model = _export(quantized)
    counts = _counts(model)
    assert counts["QuantizeLinear"] == 4 and counts["DequantizeLinear"] == 8
    assert not {"Clip", "BatchNormalization"} & set(counts)
    # The large bias of conv1 stays an Add; a runtime would clip it as int32.
    assert counts["Add"] == 1
    images = _colourful(200)
    expected = np.asarray(jax.jit(quantized.apply)(quantized.variables, images))
    actual = _run(model, images, as_written=True)
    # An activation that falls on a tie within a last bit takes the other code; no
    # other difference is possible, and few images have one.
    off = np.abs(actual - expected).max(axis=1) > 1e-5 * np.abs(expected).max()
    assert off.mean() < 0.05
    optimised = _run(model, images)
    assert np.sort(np.bincount(expected.argmax(axis=1)))[-3] >= 20
    agreement = np.mean(optimised.argmax(axis=1) == expected.argmax(axis=1))
    assert agreement >= 0.99
    _assert_close(optimised, expected, tolerance=0.03)


@pytest.mark.slow
def test_a_runtime_can_fuse(calibrated, tmp_path):
    """Conv -> Relu -> QuantizeLinear becomes QLinearConv in ONNX Runtime."""
    quantized = calibrated
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(
        _export(quantized).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
    )
    counts = _counts(onnx.load_model(tmp_path / "optimized.onnx"))
    # conv0 alone: conv1 has an Add behind it, conv2 feeds a mean.
    assert counts["QLinearConv"] == 1, counts


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 7])
def test_narrow_activations_are_clipped(net, bits):
    module, _, layers = net
    variables, quantized = _quantized(net, quantization.QuantSpec(8))
    spec = quantization.QuantSpec(bits, symmetric=False, channel_axis=None)
    # The range of the input ends well below its largest value.
    grid = quantization.params_from_range(-0.1, 0.5, spec)
    act_params = {layer.name: grid for layer in layers}
    model = onnx_graph.to_onnx(
        module,
        variables,
        (8, 8, 3),
        act_params=act_params,
        act_spec=spec,
        **quantized,
    )
    assert _counts(model)["Clip"] == 4
    images = _images((20, 8, 8, 3), seed=6)
    apply = functools.partial(
        quantized_module.apply_quantized, module, act_spec=spec, apply_kwargs={}
    )
    expected = jax.jit(apply)(variables, images, act_params)
    actual = _run(model, images, as_written=True)
    close = np.abs(actual - expected).max(axis=1) <= 1e-5 * np.abs(expected).max()
    assert close.mean() >= 0.9


@pytest.mark.slow
def test_layers_with_the_same_input_share_its_quantizer():
    class Fork(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (1, 1), name="a")(x) + nn.Conv(4, (3, 3), name="b")(x)

    module = Fork()
    variables = _variables(module, (4, 4, 3))
    spec = quantization.QuantSpec(8, symmetric=False, channel_axis=None)
    grid = quantization.params_from_range(0.0, 1.0, spec)
    model = onnx_graph.to_onnx(
        module,
        variables,
        (4, 4, 3),
        act_params={"a": grid, "b": grid},
        act_spec=spec,
    )
    assert _counts(model)["QuantizeLinear"] == 1


@pytest.mark.slow
def test_metadata_and_versions_are_stored(net):
    module, variables, _ = net
    model = onnx_graph.to_onnx(
        module, variables, (8, 8, 3), metadata={"normalisation": "inside"}
    )
    assert [(p.key, p.value) for p in model.metadata_props] == [
        ("normalisation", "inside")
    ]
    assert model.ir_version == 10 and model.opset_import[0].version == 21
    again = onnx_graph.to_onnx(
        module, variables, (8, 8, 3), metadata={"normalisation": "inside"}
    )
    assert again.SerializeToString() == model.SerializeToString()


def _one_line(error):
    assert "\n" not in str(error.value)
    return str(error.value)


def test_an_unknown_operation_is_named():
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(jnp.cumsum(x.mean(axis=(1, 2)), axis=-1))

    variables = _variables(Odd(), (4, 4, 3))
    with pytest.raises(errors.InputError, match="'cumsum'") as error:
        onnx_graph.to_onnx(Odd(), variables, (4, 4, 3))
    _one_line(error)


@pytest.mark.slow
def test_other_types_are_refused():
    module = models.build("wrn_10_1", num_classes=3, width=0.25, dtype=jnp.bfloat16)
    variables = _variables(module, (8, 8, 3))
    with pytest.raises(errors.InputError, match="bfloat16") as error:
        onnx_graph.to_onnx(module, variables, (8, 8, 3), apply_kwargs=EVALUATE)
    _one_line(error)


@pytest.mark.slow
def test_wrong_codes_are_refused(net):
    module, variables, layers = net
    spec = quantization.QuantSpec(4)
    _, good = _quantized(net, spec)

    def refused(match, **changes):
        with pytest.raises(errors.InputError, match=match) as error:
            onnx_graph.to_onnx(module, variables, (8, 8, 3), **{**good, **changes})
        _one_line(error)

    codes = good["codes"]
    refused(
        "which the module does not call",
        codes={**codes, "conv9": codes["fc"]},
        quant_params={**good["quant_params"], "conv9": good["quant_params"]["fc"]},
        specs={**good["specs"], "conv9": spec},
    )
    refused("no scale or spec", specs={})
    refused(r"lie in \[-7, 7\]", codes={**codes, "fc": codes["fc"] - jnp.int8(8)})
    refused("shape", codes={**codes, "fc": codes["fc"][:-1]})
    refused("int8 or uint8", codes={**codes, "fc": codes["fc"].astype(jnp.int32)})
    grid = quantization.QuantParams(jnp.ones((1, 3)), jnp.zeros((1, 3), jnp.int32))
    refused("one per output", quant_params={**good["quant_params"], "fc": grid})
    act = {"fc": grid}
    refused("act_spec", act_params=act)
    spec = dataclasses.replace(spec, symmetric=False, channel_axis=None)
    refused("one number", act_params=act, act_spec=spec)
    with pytest.raises(errors.InputError, match="images"):
        onnx_graph.to_onnx(module, variables, (8, 8, 4), layers=layers)


@pytest.mark.parametrize(
    ("spec", "zero_point", "accepted"),
    [
        (quantization.QuantSpec(8, symmetric=False), 261, r"\[0, 255\]"),
        (quantization.QuantSpec(8, symmetric=False), -1, r"\[0, 255\]"),
        (quantization.QuantSpec(4, symmetric=False), 16, r"\[0, 15\]"),
        (quantization.QuantSpec(8), 130, r"\[0, 0\]"),
        (quantization.QuantSpec(4), 1, r"\[0, 0\]"),
    ],
)
def test_a_zero_point_that_would_wrap_is_refused(net, spec, zero_point, accepted):
    """The graph would compute something else than JAX, and nothing would say so."""
    module, variables, layers = net
    _, good = _quantized(net, spec)

    def refused(name, **changes):
        match = f"^{name}: zero points must lie in {accepted}, got .*{zero_point}"
        with pytest.raises(errors.InputError, match=match) as error:
            onnx_graph.to_onnx(
                module, variables, (8, 8, 3), layers=layers, **{**good, **changes}
            )
        _one_line(error)

    grid = good["quant_params"]["fc"]
    wrong = grid._replace(zero_point=grid.zero_point.at[..., 0].set(zero_point))
    refused("layer fc", quant_params={**good["quant_params"], "fc": wrong})
    grid = quantization.QuantParams(jnp.float32(0.1), jnp.int32(zero_point))
    act_spec = dataclasses.replace(spec, channel_axis=None)
    refused("activations of fc", act_params={"fc": grid}, act_spec=act_spec)
