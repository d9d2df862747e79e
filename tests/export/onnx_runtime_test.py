# SPDX-License-Identifier: Apache-2.0
"""The session returns JAX's logits and refuses what it was not made for."""

import importlib
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.core import quantization

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from nad_jax.export import onnx_graph, onnx_runtime  # noqa: E402


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(32, (3, 3), name="conv")(x))
        x = nn.relu(nn.Dense(64, name="hidden")(x.mean(axis=(1, 2))))
        return nn.Dense(5, name="fc")(x)


IMAGES = np.random.default_rng(0).uniform(size=(23, 8, 8, 3)).astype(np.float32)


apply = jax.jit(Net().apply)


@pytest.fixture(scope="module")
def variables():
    shapes = jax.eval_shape(Net().init, jax.random.key(0), IMAGES)
    generator = np.random.default_rng(1)

    def draw(leaf):
        values = generator.normal(0, 0.2, leaf.shape)
        return jnp.asarray(values.astype(np.float32))

    return jax.tree.map(draw, shapes)


def _quantize(kernel, spec):
    """Codes, grid and floats on a symmetric grid per channel."""
    axes = tuple(range(kernel.ndim - 1))
    largest = np.abs(kernel).max(axes, keepdims=True)
    scale = np.asarray(largest, np.float32) / np.float32(spec.qmax)
    codes = np.round(np.asarray(kernel) / scale)
    grid = quantization.QuantParams(
        jnp.asarray(scale), jnp.zeros(scale.shape, jnp.int32)
    )
    return jnp.asarray(codes.astype(np.int8)), grid, jnp.asarray(scale * codes)


def _quantized(variables, bits):
    """Variables on the grid, and what describes it."""
    spec, params = quantization.QuantSpec(bits), dict(variables["params"])
    codes, grids = {}, {}
    for name, own in params.items():
        codes[name], grids[name], kernel = _quantize(own["kernel"], spec)
        params[name] = {**own, "kernel": kernel}
    specs = dict.fromkeys(codes, spec)
    quantized = {"codes": codes, "quant_params": grids, "specs": specs}
    return {"params": params}, quantized


def _assert_close(actual, expected, tolerance=1e-5):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.slow
def test_logits_from_a_file_in_batches(variables, tmp_path):
    model = onnx_graph.to_onnx(Net(), variables, (8, 8, 3), metadata={"key": "text"})
    onnx.save_model(model, tmp_path / "model.onnx")
    session = onnx_runtime.Session(tmp_path / "model.onnx", threads=1)
    assert session.metadata == {"key": "text"}
    expected = np.asarray(apply(variables, IMAGES))
    for batch_size in (1, 10, 500):
        _assert_close(session.logits(IMAGES, batch_size), expected)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_narrow_kernels_are_not_approximated(variables, bits):
    """What ONNX Runtime computes by default is off by thousandths with 4 bits."""
    on_grid, quantized = _quantized(variables, bits)
    model = onnx_graph.to_onnx(Net(), on_grid, (8, 8, 3), **quantized)
    session = onnx_runtime.Session(model.SerializeToString())
    _assert_close(session.logits(IMAGES), np.asarray(apply(on_grid, IMAGES)))


@pytest.mark.slow
def test_integers_can_be_switched_off(variables, tmp_path):
    on_grid, quantized = _quantized(variables, 8)
    spec = quantization.QuantSpec(8, symmetric=False, channel_axis=None)
    grid = quantization.params_from_range(0.0, 1.0, spec)
    model = onnx_graph.to_onnx(
        Net(),
        on_grid,
        (8, 8, 3),
        act_params=dict.fromkeys(quantized["codes"], grid),
        act_spec=spec,
        **quantized,
    )
    operations, logits = [], []
    for integers in (True, False):
        path = tmp_path / f"{integers}.onnx"
        session = onnx_runtime.Session(
            model.SerializeToString(), integers=integers, optimized_path=path
        )
        logits.append(session.logits(IMAGES))
        nodes = onnx.load_model(path).graph.node
        operations.append({node.op_type for node in nodes})
    assert "QGemm" in operations[0] and not {"QGemm"} & operations[1]
    _assert_close(logits[0], logits[1], tolerance=0.02)


@pytest.mark.slow
def test_what_is_refused(variables, tmp_path):
    model = onnx_graph.to_onnx(Net(), variables, (8, 8, 3))
    session = onnx_runtime.Session(model.SerializeToString())
    calls = {
        "float64": lambda: session.logits(IMAGES.astype(np.float64)),
        "8, 7": lambda: session.logits(IMAGES[:, :, :7]),
        "at least one image": lambda: session.logits(IMAGES[:0]),
        "batch size": lambda: session.logits(IMAGES, 0),
        "threads": lambda: onnx_runtime.Session(b"", threads=0),
        "bytes: not a model": lambda: onnx_runtime.Session(b"no such thing"),
        "nowhere": lambda: onnx_runtime.Session(tmp_path / "nowhere.onnx"),
    }
    for match, call in calls.items():
        with pytest.raises(errors.InputError, match=match) as error:
            call()
        assert "\n" not in str(error.value)
    model.graph.input[0].name = "pixels"
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = "pixels" if name == "images" else name
    with pytest.raises(errors.InputError, match="pixels"):
        onnx_runtime.Session(model.SerializeToString())


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_in_one_line(package, monkeypatch):
    room = "nad_jax.export"
    names = {
        "onnx": ("onnx_graph", "onnx_builder", "onnx_rules", "onnx_walk"),
        "onnxruntime": ("onnx_runtime",),
    }
    monkeypatch.setitem(sys.modules, package, None)
    for name in names[package]:
        monkeypatch.delitem(sys.modules, f"{room}.{name}")
    with pytest.raises(errors.InputError, match=r"nad_jax\[export\]") as error:
        importlib.import_module(f"{room}.{names[package][0]}")
    assert package in str(error.value) and "\n" not in str(error.value)
