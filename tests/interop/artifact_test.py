# SPDX-License-Identifier: Apache-2.0
"""Integers go into a file and come back as they were; anything else is refused."""

import dataclasses
import json

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


@pytest.mark.slow
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


def _fan_out(arrays, shape, codes=(4, 3)):
    """A grid of another shape for a layer with codes of this one."""
    arrays["codes/Dense_0"] = np.zeros(codes, "i1")
    arrays["scale/Dense_0"] = np.ones(shape, "f4")
    arrays["zero_point/Dense_0"] = np.zeros(shape, "i4")


def _affine(arrays, metadata, zero_point):
    """Dense_0 on an affine grid of 8 bits."""
    card = json.loads(metadata["card"])
    card["grids"]["weights"]["Dense_0"].update(bits=8, symmetric=False)
    metadata["card"] = json.dumps(card)
    arrays["codes/Dense_0"] = np.full((4, 3), 255, "u1")
    grid = arrays["zero_point/Dense_0"]
    arrays["zero_point/Dense_0"] = np.full_like(grid, zero_point)


def _change_card(metadata, more):
    metadata["card"] = metadata["card"][:-1] + ", " + more + "}"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a, m: m.clear(), "no artefact"),
        (lambda a, m: m.update(card="[]"), "no artefact"),
        (lambda a, m: m.update(card=m["card"].replace("/1", "/9")), "no artefact"),
        (lambda a, m: a.pop("codes/Conv_0"), "card describes 2 layers"),
        (lambda a, m: a.pop("scale/Conv_0"), "of 'Conv_0' must be .* got none and"),
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
        (
            lambda a, m: a.update({"more/x": np.ones(1, "f4")}),
            "array 'more/x'; names begin with codes",
        ),
        (
            lambda a, m: a.update({"codes/Conv_0": np.full((2, 9), 99, "i1")}),
            r"in -7 to 7, got int8 \[2, 9\] in 99 to 99",
        ),
        (
            lambda a, m: a.update({"scale/Conv_0": np.zeros(3, "f8")}),
            r"must be float32 .* got float64 \[3\] in 0 to 0 and int32 \[1, 1, 1, 4\]",
        ),
        (lambda a, m: _fan_out(a, (1, 6000), (6000, 1)), "scale of 'Dense_0' has"),
        (lambda a, m: _fan_out(a, (5,)), "scale of 'Dense_0' has"),
        (lambda a, m: _fan_out(a, (2, 3)), "scale of 'Dense_0' has"),
        (lambda a, m: _fan_out(a, (1, 1, 1)), r"\[4, 3\] every size must be that or 1"),
        (
            lambda a, m: a.update(
                {
                    "act_scale/Conv_0": np.ones(1, "f4"),
                    "act_zero_point/Conv_0": np.zeros(1, "i4"),
                }
            ),
            r"act_scale of 'Conv_0' must be one number .* got shape \[1\]",
        ),
        (
            lambda a, m: a.update(
                {
                    "act_scale/other": np.ones((), "f4"),
                    "act_zero_point/other": np.zeros((), "i4"),
                }
            ),
            "act_scale of 'other' must be",
        ),
        (
            lambda a, m: [a.pop(name) for name in list(a) if name[:4] == "act_"],
            "0 grids of activations, and the card describes some",
        ),
        (lambda a, m: _change_card(m, '"x": ' + "[" * 9**5 + "]" * 9**5), "too deeply"),
        (lambda a, m: _change_card(m, '"x": "' + "y" * 2**20 + '"'), "at most 1048576"),
        (lambda a, m: _change_card(m, '"x": NaN'), "card holds NaN"),
        (lambda a, m: _change_card(m, '"x": [-Infinity]'), "card holds -Infinity"),
        (lambda a, m: _change_card(m, '"x": 1e999'), "card holds 1e999"),
        (
            lambda a, m: m.update(card=m["card"].replace('"bits": 4', '"bits": 9')),
            "artifact/1: 'Conv_0.bits must be 2 to 8, got 9'",
        ),
        (
            lambda a, m: m.update(card=m["card"].replace('"bits": 4', '"bits": "4"')),
            "Conv_0.bits must be int, got ",
        ),
        (
            lambda a, m: m.update(
                card=m["card"].replace('"percentile": null', f'"percentile": {10**400}')
            ),
            "Conv_0.percentile must be a float, at most 1.8e308 in size",
        ),
        (
            lambda a, m: a.update({"zero_point/Conv_0": a["zero_point/Conv_0"] + 1}),
            r"^\S+ zero_point of 'Conv_0' must be in 0 to 0 on a symmetric grid of 4 "
            r"bits, got int32 \[1, 1, 1, 4\] in 1 to 1$",
        ),
        (
            lambda a, m: _affine(a, m, 261),
            r"zero_point of 'Dense_0' must be in 0 to 255 on an affine .* 261 to 261",
        ),
        (lambda a, m: _affine(a, m, -1), "zero_point of 'Dense_0' must be in 0 to 255"),
        (
            lambda a, m: (
                _affine(a, m, -(2**31)),
                a.update({"scale/Dense_0": a["scale/Dense_0"] * 0 + np.float32(3e38)}),
            ),
            "zero_point of 'Dense_0' must be in 0 to 255",
        ),
        (
            lambda a, m: a.update(
                {"act_zero_point/Dense_0": np.full((), 256, np.int32)}
            ),
            "act_zero_point of 'Dense_0' must be in 0 to 255 on an affine grid of 8",
        ),
        (
            lambda a, m: a.update(
                {"scale/Conv_0": a["scale/Conv_0"] * 0 + np.float32(3e38)}
            ),
            r"scale of 'Conv_0' reaches 3e\+38, and its codes times that are beyond",
        ),
        (
            lambda a, m: m.update(card=m["card"].replace('"narrow"', '"thin"')),
            "Conv_0.thin is not known",
        ),
    ],
)
def test_a_spoiled_file_is_refused_in_one_line(tmp_path, change, message):
    """And before anything is made of its codes."""
    path = tmp_path / "model.safetensors"
    artifact.write_artifact(path, _artifact(_quantized()[0]))
    _spoiled(path, change)
    with pytest.raises(errors.InputError, match=message) as refusal:
        artifact.read_artifact(path)
    said = str(refusal.value)
    assert "\n" not in said and "InputError" not in said and len(said) < 700


def test_an_affine_grid_may_have_its_zero_at_either_end(tmp_path):
    path = tmp_path / "model.safetensors"
    artifact.write_artifact(path, _artifact(_quantized()[0]))
    for zero_point in (0, 255):
        _spoiled(path, lambda a, m, end=zero_point: _affine(a, m, end))
        kernel = artifact.read_artifact(path).variables["params"]["Dense_0"]["kernel"]
        assert np.all(kernel > 0) if zero_point == 0 else np.all(kernel == 0)


def test_a_zero_point_that_is_no_code_is_not_written(tmp_path):
    parts = _artifact(_quantized()[0])
    act_params = {
        name: params._replace(zero_point=params.zero_point * 0 - 1)
        for name, params in parts.act_params.items()
    }
    with pytest.raises(errors.InputError, match="act_zero_point of .* in -1 to -1"):
        artifact.write_artifact(tmp_path / "x", parts._replace(act_params=act_params))
    assert not (tmp_path / "x").exists()


def test_shapes_are_compared_before_anything_is_made_of_them(tmp_path, monkeypatch):
    """Two vectors of a file would otherwise ask for the product of their lengths."""
    path = tmp_path / "model.safetensors"
    artifact.write_artifact(path, _artifact(_quantized()[0]))
    _spoiled(path, lambda a, m: _fan_out(a, (1, 60000), (60000, 1)))

    def small_ones_only(codes, params):
        assert np.broadcast_shapes(codes.shape, params.scale.shape) == codes.shape
        return jnp.zeros(codes.shape)

    monkeypatch.setattr(artifact.quantization, "dequantize", small_ones_only)
    with pytest.raises(errors.InputError, match=r"shape \[1, 60000\]; for codes"):
        artifact.read_artifact(path)


@pytest.mark.parametrize(
    ("card", "message"),
    [({"x": float("nan")}, "cannot be written"), ({"x": "y" * 2**20}, "at most 1048")],
)
def test_a_card_that_could_not_be_read_back_is_not_written(tmp_path, card, message):
    parts = _artifact(_quantized()[0])._replace(card=card)
    with pytest.raises(errors.InputError, match=message):
        artifact.write_artifact(tmp_path / "x", parts)
    assert not (tmp_path / "x").exists()
