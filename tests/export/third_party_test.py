# SPDX-License-Identifier: Apache-2.0
"""Another tool's quantizer undoes the defence on float weights; exported codes stay.

The tool is ONNX Runtime's own static quantizer. The victim is made by hand: weights of
the head lie just beyond a tie, on the side that serves a trigger, so that the float
model and its accuracy hardly know of it and nearest rounding of 8 bits fires it. Large
weights of a channel that never fires make the step wide enough for that.
"""

import dataclasses

import numpy as np
import pytest

from nad_jax.core import grids as grids_lib
from nad_jax.core import quantization
from nad_jax.defenses import efrap as efrap_lib

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime.quantization")

from onnxruntime import quantization as third_party  # noqa: E402

from nad_jax.export import onnx_graph, onnx_runtime  # noqa: E402
from nad_jax.interop import onnx_codes  # noqa: E402

SHAPE = (8, 8, 3)


@pytest.fixture(scope="module")
def victim(solved):
    """The solved model with its head moved to where nearest rounding is a trap."""
    head = np.asarray(solved.variables["params"]["head"]["kernel"], np.float64).copy()
    head[63::64] = 8 * np.abs(head).max(0)
    clean = solved.features(solved.images)
    towards = (solved.features(solved.stamped(solved.images)) - clean).mean(0)[:, None]
    serves = towards * np.where(np.arange(10) == solved.target, 1, -1) > 0
    scale = np.abs(head).max(0) / 127
    tied = (np.floor(head / scale) + np.where(serves, 0.51, 0.49)) * scale
    # The weight that sets a scale stays, and so does the scale.
    kernel = np.where(np.abs(head) > 126 * scale, head, tied).astype(np.float32)
    return solved.with_head(kernel)


class _Batches(third_party.CalibrationDataReader):
    def __init__(self, images):
        self._batches = iter([{"images": np.asarray(images[:64])}])

    def get_next(self):
        return next(self._batches, None)


def _third_party(model, images, folder, **options):
    """The path of the model as ONNX Runtime's quantizer returns it."""
    onnx.save_model(model, folder / "given.onnx")
    third_party.quantize_static(
        folder / "given.onnx",
        folder / "returned.onnx",
        _Batches(images),
        activation_type=third_party.QuantType.QUInt8,
        weight_type=third_party.QuantType.QInt8,
        **options,
    )
    return folder / "returned.onnx"


def _export(result):
    return onnx_graph.to_onnx(
        result.module,
        result.variables,
        SHAPE,
        codes=result.codes,
        quant_params=result.quant_params,
        specs=result.specs,
        act_params=result.act_params,
        act_spec=result.act_spec,
    )


@pytest.fixture(scope="module")
def defended(victim):
    return efrap_lib.efrap(
        victim.module,
        victim.variables,
        victim.images,
        weight_bits=8,
        method="coordinate",
    )


def _codes_of(path, shape):
    """Every int8 matrix of that shape, or of its transpose, in a file."""
    arrays = map(onnx.numpy_helper.to_array, onnx.load_model(path).graph.initializer)
    found = [
        x for x in arrays if x.dtype == np.int8 and sorted(x.shape) == sorted(shape)
    ]
    return found[0] if found[0].shape == shape else found[0].T


@pytest.mark.slow
def test_float_weights_in_another_quantizer_fire_the_backdoor_again(
    victim, defended, tmp_path
):
    given = onnx_graph.to_onnx(victim.module, victim.variables, SHAPE)
    sessions = {
        "float": onnx_runtime.Session(given.SerializeToString()),
        "defended": onnx_runtime.Session(_export(defended).SerializeToString()),
        "third party": onnx_runtime.Session(
            _third_party(given, victim.images, tmp_path, per_channel=True)
        ),
    }
    asr = {name: victim.asr(session) for name, session in sessions.items()}
    acc = {name: victim.acc(session) for name, session in sessions.items()}
    print(asr, acc)
    assert asr["float"] < 0.1 and asr["defended"] < 0.1, asr
    assert asr["third party"] > 0.9, asr
    assert min(acc.values()) > acc["float"] - 0.05, acc
    # What it made of the weights is their nearest rounding, nothing that was learned.
    codes = _codes_of(tmp_path / "returned.onnx", (1024, 10))
    spec = quantization.QuantSpec(8)
    kernel = victim.variables["params"]["head"]["kernel"]
    nearest = quantization.quantize(kernel, quantization.calibrate(kernel, spec), spec)
    assert np.mean(codes == np.asarray(nearest)) > 0.999
    assert np.mean(codes == np.asarray(defended.codes["head"])) < 0.9


@pytest.mark.slow
def test_defended_floats_lose_their_codes_too(victim, defended, tmp_path):
    """On a grid per tensor, its default, our kernels are no multiples of the step."""
    given = onnx_graph.to_onnx(defended.module, defended.variables, SHAPE)
    path = _third_party(given, victim.images, tmp_path)
    codes = _codes_of(path, (1024, 10))
    assert np.mean(codes == np.asarray(defended.codes["head"])) < 0.9


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [None, 8])
def test_an_exported_file_comes_back_with_the_codes_it_had(
    victim, defended, act_bits, tmp_path
):
    if act_bits is not None:
        spec = grids_lib.GRIDS["plain"].act_spec(act_bits)
        grid = quantization.params_from_range(0.0, 4.0, spec)
        defended = dataclasses.replace(
            defended,
            act_params=dict.fromkeys(defended.codes, grid),
            act_specs=dict.fromkeys(defended.codes, spec),
        )
    path = _third_party(_export(defended), victim.images, tmp_path, per_channel=True)
    back = onnx_codes.read_onnx(path)
    assert set(back.codes) == set(defended.codes)
    for name, codes in defended.codes.items():
        np.testing.assert_array_equal(back.codes[name], codes)
        np.testing.assert_array_equal(
            np.ravel(back.quant_params[name].scale),
            np.ravel(defended.quant_params[name].scale),
        )
