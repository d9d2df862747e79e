# SPDX-License-Identifier: Apache-2.0
"""array_record files: what their headers say is what the library reads."""

import importlib
import pathlib
from typing import Any

import numpy as np
import pytest

from nad_jax.data import array_records


def write(path: pathlib.Path, records: list[bytes], options: str) -> pathlib.Path:
    module: Any = importlib.import_module("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def read(path: pathlib.Path) -> list[bytes]:
    return list(array_records.read_records(path, array_records.read_contents(path)))


def random_records(seed: int = 0) -> list[bytes]:
    """Of lengths around those at which chunks and headers cross a block of 64 KiB."""
    draw = np.random.default_rng(seed)
    lengths = [0, 1, 65_400, 65_512, 65_536, 200_000, *draw.integers(0, 70_000, 60)]
    lengths += (65_536 - 64 - 40 - np.arange(60)).tolist()
    draw.shuffle(lengths)
    return [draw.bytes(int(length)) for length in lengths]


@pytest.mark.parametrize("compression", ["uncompressed", "zstd", "brotli", "snappy"])
@pytest.mark.parametrize("group_size", [1, 7, 1000])
@pytest.mark.parametrize("at_once", [2**24, 10**5])
def test_records_come_back_in_order(
    tmp_path, monkeypatch, compression, group_size, at_once
):
    monkeypatch.setattr(array_records, "_BYTES_AT_ONCE", at_once)
    records = random_records()
    options = f"group_size:{group_size},{compression}"
    path = write(tmp_path / "x", records, options)
    contents = array_records.read_contents(path)
    groups = [records[i : i + group_size] for i in range(0, len(records), group_size)]
    assert contents.num_records.tolist() == [len(group) for group in groups]
    assert contents.num_bytes.tolist() == [sum(map(len, group)) for group in groups]
    assert read(path) == records
    numbers = [5, 0, 100, 5]
    files = array_records.Files([path, path], int(contents.num_bytes.max()))
    found = list(files.read([*numbers, len(records) + 3]))
    assert found == [records[number] for number in [*numbers, 3]]


def test_a_file_without_records_is_read(tmp_path):
    assert read(write(tmp_path / "x", [], "group_size:1")) == []


def test_records_of_another_layout_are_refused(tmp_path):
    """Transposed: what they unpack to is not bounded by their header."""
    path = write(tmp_path / "x", [b"abc"] * 9, "group_size:1,transpose:true")
    with pytest.raises(ValueError, match="cut off or damaged"):
        read(path)


def test_the_digest_is_that_of_the_records(tmp_path):
    options = "group_size:1,zstd"
    digests = [
        array_records.read_contents(write(tmp_path / name, records, options)).digest
        for name, records in [
            ("a", [b"abc", b"def"]),
            ("b", [b"abc", b"def"]),
            ("c", [b"abc", b"deg"]),
            ("d", [b"def", b"abc"]),
        ]
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 3


@pytest.mark.parametrize("group_size", [1, 100])
def test_nothing_is_unpacked_of_a_file_that_unpacks_to_too_much(
    tmp_path, monkeypatch, group_size
):
    path = write(tmp_path / "x", [bytes(10**6)] * 40, f"group_size:{group_size}")
    size = path.stat().st_size
    assert size < 200_000
    assert len(read(path)) == 40
    monkeypatch.setattr(array_records, "_FREE_BYTES", 10**6)
    with pytest.raises(ValueError, match=r"unpacks to 40,.*, accepted up to") as error:
        array_records.read_contents(path)
    assert f"{size:,} bytes" in str(error.value) and "\n" not in str(error.value)
    monkeypatch.undo()
    monkeypatch.setattr(array_records, "MAX_RECORD_BYTES", 10**6 - 1)
    with pytest.raises(ValueError, match=r"records of \d+,000,000 bytes, accepted"):
        array_records.read_contents(path)


@pytest.mark.slow
def test_a_file_cut_off_or_damaged_anywhere_gives_its_records_or_an_error(tmp_path):
    records = [bytes([number]) * 900 for number in range(100)]
    path = write(tmp_path / "x", records, "group_size:1,uncompressed")
    good = path.read_bytes()
    draw, refused = np.random.default_rng(0), 0
    for place in draw.integers(0, len(good), 150).tolist():
        flipped = good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :]
        for bad in (good[:place], flipped):
            path.write_bytes(bad)
            try:
                assert read(path) == records
            except Exception as error:
                assert not isinstance(error, AssertionError)
                refused += 1
    assert refused > 200


def test_an_index_that_does_not_fit_is_refused(tmp_path):
    """Contents of one file, records of another."""
    one = write(tmp_path / "one", [b"abc"] * 9, "group_size:1")
    contents = array_records.read_contents(one)
    for records, printed in (([b"abc"] * 8, "its records"), ([b"abcd"] * 9, "its dat")):
        other = write(tmp_path / "other", records, "group_size:1")
        with pytest.raises(ValueError, match=printed):
            list(array_records.read_records(other, contents))
