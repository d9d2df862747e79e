# SPDX-License-Identifier: Apache-2.0
"""Safetensors files go both ways between us and the package of that name."""

import json
import os

import good_files as good
import ml_dtypes
import numpy as np
import oracles
import pytest
import safetensors.numpy

from nad_jax import errors
from nad_jax.interop import limits, reader, safetensors_file

ARRAYS = good.sample().arrays()


def test_sample_reads_as_its_values(tmp_path):
    data, expected = good.safetensors_sample()
    (tmp_path / "m").write_bytes(data)
    arrays, metadata = safetensors_file.read_safetensors(tmp_path / "m")
    assert metadata == {"note": "sample"}
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)


def test_the_package_reads_what_we_write(tmp_path):
    path = tmp_path / "m.safetensors"
    safetensors_file.write_safetensors(path, ARRAYS, {"who": "nad_jax", "n": "15"})
    oracles.check("safetensors", path.read_bytes(), ARRAYS)
    with safetensors.safe_open(path, framework="np") as opened:
        assert opened.metadata() == {"who": "nad_jax", "n": "15"}


def test_we_read_what_the_package_writes(tmp_path):
    path = tmp_path / "m"
    arrays = {k: a.copy() for k, a in ARRAYS.items() if a.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(arrays, path, {"a": "b"})
    found, metadata = safetensors_file.read_safetensors(path)
    assert metadata == {"a": "b"}
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


def test_strides_and_byte_order_of_the_writer_do_not_matter(tmp_path):
    base = np.arange(12, dtype="<f4").reshape(3, 4)
    odd = {
        "transposed": base.T,
        "strided": base[::2, 1::2],
        "reversed": base[::-1],
        "big": base.astype(">f4"),
        "broadcast": np.broadcast_to(base[0], (2, 4)),
        "scalar": np.float64(3.5).reshape(()),
        "empty": base[:0],
    }
    safetensors_file.write_safetensors(tmp_path / "m", odd)
    found, _ = safetensors_file.read_safetensors(tmp_path / "m")
    for name, array in odd.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].shape == array.shape


def test_same_arrays_same_bytes_whatever_their_order(tmp_path):
    safetensors_file.write_safetensors(tmp_path / "a", ARRAYS)
    turned = dict(reversed(ARRAYS.items()))
    safetensors_file.write_safetensors(tmp_path / "b", turned)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_every_array_is_aligned_to_its_elements(tmp_path):
    path = tmp_path / "m"
    safetensors_file.write_safetensors(path, ARRAYS)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    for name, entry in safetensors.deserialize(data):
        at = data.index(bytes(entry["data"]), start) if entry["data"] else start
        assert (at - start) % ARRAYS[name].dtype.itemsize == 0


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "m"
    safetensors_file.write_safetensors(path, {"w": np.ones(3, "<f4")})
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, no_space)
            with pytest.raises(errors.InputError, match="No space left"):
                safetensors_file.write_safetensors(path, {"w": np.zeros(9, "<f4")})
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    ("arrays", "metadata", "words"),
    [
        ({}, None, "no arrays"),
        ({"": np.ones(1, "<f4")}, None, "array name ''"),
        ({"../x": np.ones(1, "<f4")}, None, "array name '../x'"),
        ({"__metadata__": np.ones(1, "<f4")}, None, "array name '__metadata__'"),
        ({"w": np.ones(1, "<c8")}, None, "'w' has dtype complex64"),
        ({"w": np.array(["a"])}, None, "'w' has dtype <U1"),
        ({"w": np.array([None])}, None, "'w' has dtype object"),
        ({"w": np.ones(1, "<f4")}, {"a": 1}, "texts to texts"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(tmp_path, arrays, metadata, words):
    with pytest.raises(errors.InputError) as caught:
        safetensors_file.write_safetensors(tmp_path / "m", arrays, metadata)
    assert words in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(errors.InputError, match="cannot write .*No such file"):
        safetensors_file.write_safetensors(
            tmp_path / "no" / "m", {"w": np.ones(1, "<f4")}
        )


def test_data_parallel_prefix_goes_from_a_checkpoint(tmp_path):
    arrays = {"module.a": np.ones(1, "<f4"), "module.b": np.ones(2, "<f4")}
    safetensors_file.write_safetensors(tmp_path / "m", arrays)
    assert set(reader.read_checkpoint(tmp_path / "m").arrays) == {"a", "b"}


def test_what_a_text_of_the_metadata_says_is_not_counted(tmp_path):
    """An artefact's card is JSON in a JSON text."""
    notes = {
        "card": json.dumps(['a"\\b', 1, 2] * 100_000),
        **{str(i): "," for i in range(99)},
    }
    safetensors_file.write_safetensors(tmp_path / "m", {"w": np.ones(1, "<f4")}, notes)
    assert safetensors_file.read_safetensors(tmp_path / "m")[1] == notes


def test_a_header_at_its_bounds_is_read(tmp_path, monkeypatch):
    arrays = {f"w{i}": np.ones((1, 1, 1), "<f4") for i in range(10)}
    notes = {"a": "", "b": ""}
    safetensors_file.write_safetensors(tmp_path / "m", arrays, notes)
    # Five texts and six commas for each array, the last of which has none behind it.
    bounds = {"TEXTS": 5 * 10 + 2 * 2 + 1, "COMMAS": 6 * 10 + 1, "NOTES": 2}
    for name, bound in bounds.items():
        monkeypatch.setattr(limits, f"MAX_HEADER_{name}", bound)
    assert safetensors_file.read_safetensors(tmp_path / "m")[1] == notes
    for name, bound in bounds.items():
        with monkeypatch.context() as patch:
            patch.setattr(limits, f"MAX_HEADER_{name}", bound - 1)
            with pytest.raises(errors.InputError, match=f"{bound - 1}.* (in|are) "):
                safetensors_file.read_safetensors(tmp_path / "m")
    monkeypatch.setattr(limits, "MAX_HEADER_NOTES", 1)
    with pytest.raises(errors.InputError, match="2 entries of .* at most 1 are wri"):
        safetensors_file.write_safetensors(tmp_path / "n", arrays, notes)
