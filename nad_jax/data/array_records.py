# SPDX-License-Identifier: Apache-2.0
"""Records of array_record files, in memory that does not depend on what they say.

The library decompresses a chunk of records as a whole, to whatever size it has, and a
file of 100 kB can hold chunks of gigabytes. So the headers of all chunks, which are not
compressed, are read first: they tell what the chunks unpack to. The format is that of
Riegeli (`doc/riegeli_records_file_format.md` there): chunks one behind the other,
interrupted by a block header at every multiple of 64 KiB.

What holds: nothing is decompressed before every chunk of the file is known to unpack to
`MAX_RECORD_BYTES` at most and the file to `_MAX_EXPANSION` times its bytes. What does
not: the library finds chunks by an index, itself compressed, which nobody can compare
with the headers beforehand. A forged one could lead to larger chunks hidden inside of
others; what they unpack to shows when they are read, so up to `_CHUNKS_AT_ONCE` of them
are unpacked before such a file is refused.
"""

import hashlib
import importlib
import os
import pathlib
import struct
from collections.abc import Iterator
from typing import IO, Any, NamedTuple

import numpy as np

# Of an encoded picture and what is beside it: more than `pictures.MAX_PIXELS` need.
MAX_RECORD_BYTES = 2**29

# A file may unpack to so many times its bytes, or to so many in any case: Zstandard
# makes ten thousand times as much of zeros, encoded pictures hardly shrink.
_MAX_EXPANSION, _FREE_BYTES = 128, 2**28

# Unpacked at once, unless a single chunk is larger.
_BYTES_AT_ONCE, _CHUNKS_AT_ONCE = 2**24, 64

_BLOCK, _BLOCK_HEADER = 2**16, 24
# Hash of the header, size and hash of the data, type and records, unpacked size.
_HEADER = struct.Struct("<QQQQQ")
_SIGNATURE = bytes.fromhex(
    "83af70d10d884a3f0000000000000000400000000000000091bac23c9287e1a9"
    "0000000000000000e19f13c0e9b1c37273000000000000000000000000000000"
)
_RECORDS, _PADDING = ord("r"), ord("p")


class Contents(NamedTuple):
    """What a file holds, going by the headers of its chunks.

    Attributes:
      num_records: Records of each chunk, int64 `[chunks]`.
      num_bytes: What the records of each chunk unpack to, int64 `[chunks]`.
      digest: SHA-256 of all headers. They hold a hash of the data of their chunk, which
        the library compares, so files of one digest have the same records.
    """

    num_records: np.ndarray
    num_bytes: np.ndarray
    digest: bytes


def read_contents(path: pathlib.Path) -> Contents:
    """Reads the headers of all chunks, a few bytes each, and nothing else.

    Raises:
      ValueError: for a file that is damaged, or unpacks to more than is accepted.
    """
    num_records, num_bytes = [], []
    digest = hashlib.sha256()
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if file.read(len(_SIGNATURE)) != _SIGNATURE:
            raise ValueError(f"{path.name} is no array_record file")
        begin = len(_SIGNATURE)
        while begin < size:
            header = _read_header(file, begin)
            digest.update(header)
            _, data_bytes, _, kind_and_records, unpacked = _HEADER.unpack(header)
            records, kind = divmod(kind_and_records, 2**8)
            end = _chunk_end(begin, data_bytes, records)
            if end > size or kind not in (_RECORDS, _PADDING):
                raise ValueError(f"{path.name} is cut off or damaged at byte {begin:,}")
            if unpacked > MAX_RECORD_BYTES:
                raise ValueError(
                    f"{path.name} has records of {unpacked:,} bytes, accepted up to "
                    f"{MAX_RECORD_BYTES:,}"
                )
            if kind == _RECORDS:
                num_records.append(records)
                num_bytes.append(unpacked)
            begin = end
    limit = max(_FREE_BYTES, _MAX_EXPANSION * size)
    if sum(num_bytes) > limit:
        raise ValueError(
            f"{path.name} of {size:,} bytes unpacks to {sum(num_bytes):,}, accepted up "
            f"to {limit:,}"
        )
    # The last two are no records of the data set but the index and where it is.
    return Contents(
        np.array(num_records[:-2], np.int64),
        np.array(num_bytes[:-2], np.int64),
        digest.digest(),
    )


def read_records(path: pathlib.Path, contents: Contents) -> Iterator[bytes]:
    """All records of a file of those contents, in stored order.

    Raises:
      ValueError: the file is not what its headers say.
    """
    module: Any = importlib.import_module("array_record.python.array_record_module")
    total = int(contents.num_records.sum())
    reader = module.ArrayRecordReader(
        os.fspath(path), "readahead_buffer_size:0,max_parallelism:0"
    )
    try:
        if not reader.ok() or reader.num_records() != total:
            raise ValueError(f"{path.name} has an index that does not fit its records")
        ends = np.cumsum(contents.num_records)
        for first, last in _groups(contents.num_bytes):
            start = int(ends[first] - contents.num_records[first])
            # A range, because the library would unpack a chunk once for each record.
            records = reader.read(start, int(ends[last])) if ends[last] > start else []
            expected = int(contents.num_bytes[first : last + 1].sum())
            if sum(map(len, records)) != expected:
                raise ValueError(f"{path.name} has an index that does not fit its data")
            yield from records
    finally:
        reader.close()


class Files:
    """Records of several files, in the order of the files, by their numbers.

    May be used by several threads at once.
    """

    def __init__(self, paths: list[pathlib.Path], largest: int):
        """`largest` of the records, in bytes, bounds how many are fetched at once."""
        from array_record.python import array_record_data_source

        self._source = array_record_data_source.ArrayRecordDataSource(
            [os.fspath(path) for path in paths]
        )
        self._at_once = max(1, _BYTES_AT_ONCE // max(1, largest))

    def read(self, numbers: list[int]) -> Iterator[bytes]:
        """The records of those numbers, each of them anew."""
        for start in range(0, len(numbers), self._at_once):
            yield from self._source.__getitems__(numbers[start : start + self._at_once])


def _groups(num_bytes: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last of consecutive chunks that are unpacked together."""
    first, held = 0, 0
    for chunk, size in enumerate(num_bytes.tolist()):
        full = held + size > _BYTES_AT_ONCE or chunk - first == _CHUNKS_AT_ONCE
        if chunk > first and full:
            yield first, chunk - 1
            first, held = chunk, 0
        held += size
    if len(num_bytes):
        yield first, len(num_bytes) - 1


def _read_header(file: IO[bytes], begin: int) -> bytes:
    """The header of the chunk that begins there, without a block header inside of it.

    Of a file that ends there it is padded with zeros, which are no header of any chunk.
    """
    header, place = b"", begin
    while len(header) < _HEADER.size:
        if place % _BLOCK == 0:
            place += _BLOCK_HEADER
        file.seek(place)
        length = min(_HEADER.size - len(header), _BLOCK - place % _BLOCK)
        header += file.read(length).ljust(length, b"\0")
        place += length
    return header


def _chunk_end(begin: int, data_bytes: int, num_records: int) -> int:
    """Where the next chunk begins; the formula is that of the format."""
    usable = _BLOCK - _BLOCK_HEADER
    size = _HEADER.size + data_bytes
    blocks = (size + (begin + usable - 1) % _BLOCK) // usable
    # A chunk has as many bytes as records at least, and does not end in a block header.
    shortest = begin + num_records
    shortest += max(0, -shortest % _BLOCK - (usable - 1))
    return max(begin + size + blocks * _BLOCK_HEADER, shortest)
