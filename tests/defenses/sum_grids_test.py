# SPDX-License-Identifier: Apache-2.0
"""Sums on grids: the same arithmetic here and in the exported graph."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import auditing, errors
from nad_jax.core import quantization
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.defenses import quantized_module


class Net(nn.Module):
    """A stem, a block with an identity shortcut, one with a convolution, and a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="stem")(x))
        y = nn.relu(nn.Conv(8, (3, 3), name="a1")(x))
        x = nn.relu(x + nn.Conv(8, (3, 3), name="a2")(y))
        y = nn.relu(nn.Conv(8, (3, 3), name="b1")(x))
        x = nn.relu(nn.Conv(8, (1, 1), name="b3")(x) + nn.Conv(8, (3, 3), name="b2")(y))
        return nn.Dense(5, name="fc")(x.mean(axis=(1, 2)))


@pytest.fixture(scope="module")
def quantized():
    images = jax.random.uniform(jax.random.key(0), (32, 8, 8, 3))
    variables = Net().init(jax.random.key(1), images[:1])
    result = efrap_lib.efrap(
        Net(),
        variables,
        images,
        weight_bits=8,
        act_bits=8,
        method="nearest",
        quantize_sums=True,
    )
    return result, variables, images


@pytest.mark.slow
def test_operands_have_grids_and_shortcuts_that_of_their_layer(quantized):
    result, _, images = quantized
    layers = {"stem", "a1", "a2", "b1", "b2", "b3", "fc"}
    operands = {f"sum{i}/{side}" for i in (0, 1) for side in ("left", "right")}
    assert set(result.act_params) == layers | operands
    shortcut, own = result.act_params["sum0/left"], result.act_params["a1"]
    assert float(shortcut.scale) == float(own.scale)

    # Against the same network written out.
    def grid(x, name):
        return quantization.fake_quant(x, result.act_params[name], result.act_spec)

    params = result.variables["params"]

    def layer(name, size, x):
        conv = nn.Conv(8, (size, size))
        return conv.apply({"params": params[name]}, grid(x, name))

    x = nn.relu(layer("stem", 3, images))
    y = layer("a2", 3, nn.relu(layer("a1", 3, x)))
    x = nn.relu(grid(x, "sum0/left") + grid(y, "sum0/right"))
    y = layer("b2", 3, nn.relu(layer("b1", 3, x)))
    x = nn.relu(grid(layer("b3", 1, x), "sum1/left") + grid(y, "sum1/right"))
    x = grid(x.mean(axis=(1, 2)), "fc")
    expected = x @ params["fc"]["kernel"] + params["fc"]["bias"][None]
    actual = result.apply(result.variables, images)
    # Sums in another order may move a value across an edge of its cell.
    off = np.abs(np.asarray(actual - expected)).max(axis=1)
    assert np.mean(off > 1e-5) < 0.1 and off.max() < 0.02
    without = {k: v for k, v in result.act_params.items() if k in layers}
    plain = quantized_module.apply_quantized(
        Net(),
        result.variables,
        images,
        without,
        act_spec=result.act_spec,
        apply_kwargs={},
    )
    assert np.abs(np.asarray(plain - expected)).max() > 1e-4


@pytest.mark.slow
def test_a_runtime_computes_whole_blocks_in_integers(quantized, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from nad_jax.export import onnx_graph, onnx_runtime

    result, variables, images = quantized
    model = onnx_graph.to_onnx(
        Net(),
        result.variables,
        (8, 8, 3),
        codes=result.codes,
        quant_params=result.quant_params,
        specs=result.specs,
        act_params=result.act_params,
        act_spec=result.act_spec,
    ).SerializeToString()
    images = np.asarray(images)
    expected = np.asarray(jax.jit(result.apply)(result.variables, images))
    path = tmp_path / "optimized.onnx"
    for integers in (False, True):
        session = onnx_runtime.Session(model, integers=integers, optimized_path=path)
        off = np.abs(session.logits(images) - expected).max(axis=1)
        assert np.median(off) < (1e-5 if not integers else 0.05 * np.ptp(expected))
    operations = [node.op_type for node in onnx.load_model(path).graph.node]
    assert operations.count("QLinearConv") == 6 and "Conv" not in operations
    assert operations.count("QLinearAdd") >= 1

    # And an audit reads the grids of sums from the file.
    (tmp_path / "model.onnx").write_bytes(model)
    found = auditing.audit(
        variables, tmp_path / "model.onnx", module=Net(), images=images
    )
    assert found.honest, found.findings


def test_sums_need_activation_bits():
    with pytest.raises(errors.InputError, match="quantize_sums needs act_bits"):
        efrap_lib.efrap(Net(), {}, jnp.zeros((1, 8, 8, 3)), quantize_sums=True)
