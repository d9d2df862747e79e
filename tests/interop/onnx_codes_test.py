# SPDX-License-Identifier: Apache-2.0
"""Codes of an ONNX file are read as they stand, and what could hide some is refused."""

import numpy as np
import pytest

from nad_jax import errors
from nad_jax.interop import bounded_file, onnx_codes

onnx = pytest.importorskip("onnx")
from onnx import helper, numpy_helper  # noqa: E402

CODES = np.arange(-6, 6, dtype=np.int8).reshape(4, 3)


def _model():
    """One dense layer: codes -> DequantizeLinear -> Gemm."""
    arrays = {
        "head/codes": CODES,
        "head/scale": np.full(3, 0.5, np.float32),
        "head/zero_point": np.zeros(3, np.int8),
    }
    nodes = [
        helper.make_node("DequantizeLinear", list(arrays), ["head/kernel"], axis=1),
        helper.make_node("Gemm", ["images", "head/kernel"], ["logits"]),
    ]
    images, logits = (
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size])
        for name, size in (("images", 4), ("logits", 3))
    )
    graph = helper.make_graph(
        nodes,
        "model",
        [images],
        [logits],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph)


def test_codes_and_the_hash_of_their_file_are_read(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(_model().SerializeToString())
    read = onnx_codes.read_onnx(path)
    np.testing.assert_array_equal(read.codes["head"], CODES)
    np.testing.assert_array_equal(read.quant_params["head"].scale, np.full((1, 3), 0.5))
    assert read.image_shape == (4,) and read.sha256 == bounded_file.sha256(path)


def _add_twice(model):
    """Another scale under the same name, which a runtime may prefer."""
    model.graph.initializer.append(
        numpy_helper.from_array(np.full(3, 9, np.float32), "head/scale")
    )


def _set_scale(model, scale):
    scale = np.asarray(scale, np.float32)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(scale, "head/scale"))


def _keep_elsewhere(model):
    model.graph.initializer[0].data_location = onnx.TensorProto.EXTERNAL


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.functions.add(name="f"), "1 functions; accepted are"),
        (lambda model: model.training_info.add(), "1 training_info; accepted are"),
        (lambda model: model.graph.sparse_initializer.add(), "1 sparse initializers"),
        (_add_twice, "two initializers are called 'head/scale'"),
        (_keep_elsewhere, "'head/codes' is kept in another file"),
        (lambda model: _set_scale(model, np.ones(5)), "5 scales of 'head'; accepted"),
        (lambda model: _set_scale(model, [1, -1, 1]), "a scale of -1; accepted"),
        (lambda model: _set_scale(model, [np.nan] * 3), "a scale of nan; accepted"),
        (lambda model: model.graph.ClearField("node"), "no layer's weights are codes"),
    ],
)
def test_what_an_audit_would_not_see_is_refused_in_one_line(tmp_path, change, message):
    model = _model()
    change(model)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(errors.InputError, match=message) as refusal:
        onnx_codes.read_onnx(tmp_path / "m.onnx")
    assert "m.onnx" in str(refusal.value) and "\n" not in str(refusal.value)
