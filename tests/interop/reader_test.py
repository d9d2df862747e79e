# SPDX-License-Identifier: Apache-2.0
"""The door: format by content, one strict reader, one line of refusal."""

import ast
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import good_files as good
import numpy as np
import pytest

from nad_jax import errors, interop
from nad_jax.interop import bounded_file, limits, reader

NAMES = ["m.pth.tar", "m.safetensors", "m.msgpack", "m.txt", "m"]


def refusal(path, **options) -> str:
    with pytest.raises(errors.InputError) as caught:
        reader.read_checkpoint(path, **options)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("format_name", reader.FORMATS)
def test_the_name_of_a_file_says_nothing(tmp_path, format_name):
    data, expected = good.SAMPLES[format_name]()
    for name in NAMES:
        (tmp_path / name).write_bytes(data)
        found = reader.read_checkpoint(str(tmp_path / name))
        assert found.format == format_name
        assert found.arrays.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found.arrays[key], array, strict=True)


@pytest.mark.parametrize("format_name", reader.FORMATS)
def test_a_file_cut_anywhere_is_refused(tmp_path, format_name):
    data, _ = good.SAMPLES[format_name]()
    path = tmp_path / "m"
    for cut in sorted({len(data) * step // 256 for step in range(256)}):
        path.write_bytes(data[:cut])
        refusal(path)


@pytest.mark.slow
def test_a_flipped_bit_in_a_zip_storage_is_noticed(tmp_path):
    """Zip alone of the formats carries checksums, and they are verified."""
    data, _ = good.zip_sample()
    main = good.torch_entries(b"", good.sample().storages)
    stored = next(entry for entry in main if entry.name == "model/data/0").data
    at = data.index(stored)
    path = tmp_path / "m"
    for bit in range(8 * len(stored)):
        flipped = bytearray(data)
        flipped[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert "is damaged" in refusal(path)


def test_a_folder_is_named_as_one(tmp_path):
    assert "a directory; expected one model file" in refusal(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    assert "No such file" in refusal(tmp_path / "none")


def test_a_path_cannot_smuggle_lines_or_zero_bytes(tmp_path):
    refusal(str(tmp_path) + "/a\nb\x1b[31m")
    assert "cannot open" in refusal("a\0b")


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_a_device_is_refused():
    assert "not a regular file" in refusal("/dev/zero")


def test_a_file_without_permission_is_refused(tmp_path, monkeypatch):
    def denied(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", denied)
    assert "Permission denied" in refusal(tmp_path / "m")


@pytest.mark.parametrize("start", [b"\x10\0\0\0\0\0\0\0{", b"PK\x03\x04", b"\x80\x02N"])
def test_a_file_beyond_the_bound_is_refused_before_it_is_read(tmp_path, start):
    """A sparse file: five gigabytes that take no space."""
    path = tmp_path / "m"
    path.write_bytes(start)
    os.truncate(path, limits.MAX_FILE_BYTES + 1)
    assert "at most 4294967296 are read" in refusal(path)


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    data, _ = good.legacy_sample()
    path = tmp_path / "m"
    path.write_bytes(data)
    plain = os.preadv

    def shrink(descriptor: int, buffers: list, offset: int) -> int:
        os.truncate(path, offset)
        return plain(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", shrink)
    assert "became shorter" in refusal(path)


def test_the_hash_is_that_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    """Another file takes the path while the first one is open."""
    data, _ = good.safetensors_sample()
    path = tmp_path / "m"
    path.write_bytes(data)
    (tmp_path / "other").write_bytes(good.zip_sample()[0])
    detect = reader.detect_format

    def exchange(file):
        os.replace(tmp_path / "other", path)
        return detect(file)

    monkeypatch.setattr(reader, "detect_format", exchange)
    found = reader.read_checkpoint(path)
    assert found.format == "safetensors"
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert bounded_file.sha256(path) != found.sha256


def test_the_hash_of_what_cannot_be_read_is_one_line(tmp_path):
    for path in (tmp_path, tmp_path / "none", "a\0b"):
        with pytest.raises(errors.InputError) as caught:
            bounded_file.sha256(path)
        assert "\n" not in str(caught.value)


def test_no_descriptor_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "good").write_bytes(good.zip_sample()[0])
    (tmp_path / "bad").write_bytes(b"nothing")
    for _ in range(3):
        reader.read_checkpoint(tmp_path / "good")
        refusal(tmp_path / "bad")
        refusal(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_entry_of_a_format_without_entries_is_refused(tmp_path):
    (tmp_path / "m").write_bytes(good.safetensors_sample()[0])
    assert "has no entries" in refusal(tmp_path / "m", entry="model")


def test_large_arrays_are_scanned_for_nan_to_the_end(tmp_path):
    """Beyond one piece of the scan, and through a transposed view."""
    values = np.zeros((600, 1000), "<f4")
    values[599, 999] = np.nan
    values[0, 5] = np.inf
    view = good.Tensor("0", "float32", values.size, (1000, 600), (1, 1000))
    storages = {"0": ("float32", values.tobytes())}
    path = tmp_path / "m"
    path.write_bytes(good.zip_file(good.program({"w": view}), storages))
    assert "'w' holds 2 NaN or infinite values of 600000" in refusal(path)


@pytest.mark.slow
def test_reading_needs_no_torch_no_flax_and_no_other_reader():
    code = "import sys, nad_jax.interop.reader; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "nad_jax.interop.torch_reader" in loaded
    assert not loaded & {"torch", "flax", "optax", "orbax", "safetensors", "msgpack"}


def test_no_reader_imports_what_can_execute_a_file():
    """Neither the stdlib's unpickler nor anything that evaluates or imports names."""
    forbidden = {"pickle", "_pickle", "marshal", "shelve", "importlib", "runpy", "code"}
    calls = {"eval", "exec", "compile", "__import__", "getattr", "globals"}
    folder = Path(interop.__path__[0])
    names = "bounded_file limits model_entry msgpack_reader pickle_machine reader"
    names += " safetensors_file stored_array stored_zip torch_reader torch_tensors"
    for name in names.split():
        for node in ast.walk(ast.parse((folder / f"{name}.py").read_text())):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name for alias in node.names}, name
            elif isinstance(node, ast.ImportFrom):
                assert node.module not in forbidden, name
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                allowed = {"getattr"} if name == "bounded_file" else set()
                assert node.func.id not in calls - allowed, name
