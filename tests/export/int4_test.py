# SPDX-License-Identifier: Apache-2.0
"""Four-bit weights from the defence to the runtime: codes, accuracy, size."""

import dataclasses

import numpy as np
import pytest

from nad_jax.defenses import efrap as efrap_lib
from nad_jax.interop import artifact, onnx_codes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from nad_jax.export import onnx_graph, onnx_runtime  # noqa: E402


@pytest.fixture(scope="module")
def rounded(solved):
    return efrap_lib.efrap(
        solved.module,
        solved.variables,
        solved.images,
        weight_bits=4,
        act_bits=8,
        method="coordinate",
    )


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [None, 8])
def test_int4_codes_and_accuracy_survive_the_export(
    solved, rounded, act_bits, tmp_path
):
    result = rounded
    if act_bits is None:
        result = dataclasses.replace(result, act_params={}, act_specs={})
    artifact.write_artifact(
        tmp_path / "model.safetensors",
        artifact.Artifact(
            result.variables,
            result.codes,
            result.quant_params,
            result.specs,
            result.act_params,
            result.act_spec,
            {},
        ),
    )
    stored = artifact.read_artifact(tmp_path / "model.safetensors")

    def export(**quantized):
        return onnx_graph.to_onnx(
            result.module, result.variables, (8, 8, 3), **quantized
        ).SerializeToString()

    (tmp_path / "model.onnx").write_bytes(
        export(
            codes=stored.codes,
            quant_params=stored.quant_params,
            specs=stored.specs,
            act_params=stored.act_params,
            act_spec=stored.act_spec,
        )
    )
    back = onnx_codes.read_onnx(tmp_path / "model.onnx")
    assert set(back.storage_bits.values()) == {4}
    for name, codes in result.codes.items():
        np.testing.assert_array_equal(back.codes[name], codes)
        assert len(np.unique(codes)) > 8  # not codes of fewer bits

    session = onnx_runtime.Session(tmp_path / "model.onnx")
    here = np.argmax(result.apply(result.variables, solved.test), -1)
    acc = np.mean(here == solved.labels)
    assert acc > 0.9
    assert abs(solved.acc(session) - acc) <= 0.003
    assert (tmp_path / "model.onnx").stat().st_size < 0.2 * len(export())
