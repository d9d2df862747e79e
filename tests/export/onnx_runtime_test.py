# SPDX-License-Identifier: Apache-2.0
"""The session returns JAX's logits and refuses what it was not made for."""

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


@pytest.fixture(scope="module")
def variables():
    return Net().init(jax.random.key(0), jnp.asarray(IMAGES))


def _quantized(variables, bits):
    """Variables on the grid, and what describes it."""
    spec, params = quantization.QuantSpec(bits), dict(variables["params"])
    codes, grids = {}, {}
    for name, own in params.items():
        grids[name] = quantization.calibrate(own["kernel"], spec)
        codes[name] = quantization.quantize(own["kernel"], grids[name], spec)
        kernel = quantization.dequantize(codes[name], grids[name])
        params[name] = {**own, "kernel": kernel}
    specs = dict.fromkeys(codes, spec)
    quantized = {"codes": codes, "quant_params": grids, "specs": specs}
    return {"params": params}, quantized


def _assert_close(actual, expected, tolerance=1e-5):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


def test_logits_from_a_file_in_batches(variables, tmp_path):
    model = onnx_graph.to_onnx(Net(), variables, (8, 8, 3), metadata={"key": "text"})
    onnx.save_model(model, tmp_path / "model.onnx")
    session = onnx_runtime.Session(tmp_path / "model.onnx", threads=1)
    assert session.metadata == {"key": "text"}
    expected = np.asarray(Net().apply(variables, IMAGES))
    for batch_size in (1, 10, 500):
        _assert_close(session.logits(IMAGES, batch_size), expected)


@pytest.mark.parametrize("bits", [4, 8])
def test_products_with_narrow_kernels_are_not_approximated(variables, bits):
    """What ONNX Runtime computes by default is off by thousandths with 4 bits."""
    on_grid, quantized = _quantized(variables, bits)
    model = onnx_graph.to_onnx(Net(), on_grid, (8, 8, 3), **quantized)
    session = onnx_runtime.Session(model.SerializeToString())
    _assert_close(session.logits(IMAGES), np.asarray(Net().apply(on_grid, IMAGES)))


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
