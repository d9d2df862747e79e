# SPDX-License-Identifier: Apache-2.0
"""Integers go into a file and come back as they were; anything else is refused."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.interop import artifact, safetensors_file


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(jnp.mean(x, (1, 2)))


def _quantized(act_bits=8, bits=4):
    images = jax.random.uniform(jax.random.key(0), (16, 6, 6, 2))
    module = _Net()
    variables = module.init(jax.random.key(1), images)
    result = efrap_lib.efrap(
        module, variables, images, weight_bits=bits, act_bits=act_bits, method="flipped"
    )
    return result, images


def _artifact(result):
    return artifact.Artifact(
        result.variables,
        result.codes,
        result.quant_params,
        result.specs,
        result.act_params,
        result.act_spec,
        {"arch": "net", "acc": 0.5},
    )


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [None, 8])
def test_what_was_written_is_what_is_read(tmp_path, act_bits):
    result, images = _quantized(act_bits)
    artifact.write_artifact(tmp_path / "model.safetensors", _artifact(result))
    back = artifact.read_artifact(tmp_path / "model.safetensors")
    assert back.card == {"arch": "net", "acc": 0.5}
    assert back.specs == result.specs and back.act_spec == result.act_spec
    for layer, codes in result.codes.items():
        assert back.codes[layer].dtype == codes.dtype
        np.testing.assert_array_equal(back.codes[layer], codes)
    np.testing.assert_array_equal(
        result.apply(jax.tree.map(jnp.asarray, back.variables), images),
        result.apply(result.variables, images),
    )
    assert set(back.act_params) == set(result.act_params)


@pytest.mark.slow
def test_kernels_are_stored_as_integers_only(tmp_path):
    result, _ = _quantized()
    path = tmp_path / "model.safetensors"
    artifact.write_artifact(path, _artifact(result))
    names = safetensors_file.read_safetensors(path)[0]
    assert "codes/Conv_0" in names and "float/params/Conv_0/bias" in names
    assert not any(name.endswith("kernel") for name in names)


def test_codes_of_another_model_are_not_written(tmp_path):
    result, _ = _quantized()
    codes = {**result.codes, "Conv_0": result.codes["Conv_0"] * 0}
    with pytest.raises(errors.InputError, match="'Conv_0' do not stand for"):
        artifact.write_artifact(
            tmp_path / "x", _artifact(dataclasses.replace(result, codes=codes))
        )
    assert not (tmp_path / "x").exists()


def _spoiled(path, change):
    arrays, metadata = safetensors_file.read_safetensors(path)
    arrays, metadata = dict(arrays), dict(metadata)
    change(arrays, metadata)
    safetensors_file.write_safetensors(path, arrays, metadata)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, m: m.clear(), "no artefact"),
        (lambda a, m: m.update(card="[]"), "no artefact"),
        (lambda a, m: m.update(card=m["card"].replace("/1", "/9")), "no artefact"),
        (lambda a, m: a.pop("codes/Conv_0"), "card describes 2 layers"),
        (lambda a, m: a.pop("scale/Conv_0"), "scale and zero_point of 'Conv_0'"),
        (
            lambda a, m: a.update({"scale/Conv_0": -a["scale/Conv_0"]}),
            "scale and zero_point of 'Conv_0'",
        ),
        (
            lambda a, m: a.update({"codes/Conv_0": a["codes/Conv_0"] * 0 + 8}),
            "codes of 'Conv_0' must be int8 in -7 to 7",
        ),
        (
            lambda a, m: a.update({"codes/Conv_0": a["codes/Conv_0"].astype("f4")}),
            "codes of 'Conv_0' must be int8",
        ),
        (
            lambda a, m: a.update({"float/params": np.ones(1, "f4")}),
            "both an array and a folder",
        ),
    ],
)
def test_a_spoiled_file_is_refused_in_one_line(tmp_path, change, message):
    path = tmp_path / "model.safetensors"
    artifact.write_artifact(path, _artifact(_quantized()[0]))
    _spoiled(path, change)
    with pytest.raises(errors.InputError, match=message) as refusal:
        artifact.read_artifact(path)
    assert "\n" not in str(refusal.value)
