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


def _set_zero_points(model, values):
    name = "head/zero_point"
    model.graph.initializer[2].CopyFrom(numpy_helper.from_array(values, name))


def _quantize_inputs(model, zero_point, highest):
    """Inputs of step 1 in codes up to `highest`, behind a Clip."""
    ends = np.float32([0, highest]) - np.float32(zero_point)
    arrays = {"scale": np.float32(1.0), "zero": zero_point}
    arrays |= {"low": ends[0], "high": ends[1]}
    for name, array in arrays.items():
        tensor = numpy_helper.from_array(np.asarray(array), name)
        model.graph.initializer.append(tensor)
    gemm = model.graph.node.pop()
    gemm.input[0] = "back"
    model.graph.node.extend(
        [
            helper.make_node("Clip", ["images", "low", "high"], ["clipped"]),
            helper.make_node("QuantizeLinear", ["clipped", "scale", "zero"], ["codes"]),
            helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["back"]),
            gemm,
        ]
    )


@pytest.mark.parametrize(
    ("zero_point", "highest", "bits"),
    [(np.uint8(15), 15, 4), (np.uint8(3), 63, 6), (np.int8(-7), 7, 4)],
)
def test_the_width_of_inputs_is_that_of_their_codes(
    tmp_path, zero_point, highest, bits
):
    model = _model()
    _quantize_inputs(model, zero_point, highest)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    read = onnx_codes.read_onnx(tmp_path / "m.onnx")
    assert read.act_bits == bits
    assert read.act_params["head"].zero_point == zero_point


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
        (
            lambda model: _set_zero_points(model, np.array([0, 200, 0], np.uint8)),
            r"zero points in \[0, 200\]; accepted are those of the grid, \[-128, 127\]",
        ),
        (
            lambda model: _set_zero_points(model, np.array([0, 0, -(2**32)], np.int64)),
            r"zero points in \[-4294967296, 0\]",
        ),
        (
            lambda model: _quantize_inputs(model, np.uint8(16), 15),
            r"zero points in \[16, 16\]; accepted are those of the grid, \[0, 15\]",
        ),
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
