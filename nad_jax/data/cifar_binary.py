# SPDX-License-Identifier: Apache-2.0
"""The "binary version" of CIFAR-10, `cifar-10-binary.tar.gz`, as its authors offer it.

A record is one byte of label and 3 x 32 x 32 bytes of red, green and blue planes; a
file holds up to 10,000 of them. Members are read by their exact names into memory:
nothing is extracted, so no path inside the archive can reach the disk. The "python
version" of the archive is a pickle, which could run code when read, and is refused.

The archive is read from its first byte to its last: the checksum of a compressed file
stands at its end, and without it a flipped bit would be a wrong pixel. An archive that
is not compressed has none. Its headers are read here, because `tarfile` takes what
stands before a member (a long name) into memory, however long it says that it is.
"""

import bz2
import gzip
import lzma
import pathlib
import tarfile
import zlib
from collections.abc import Iterator
from typing import IO, NoReturn

import numpy as np

from nad_jax import errors
from nad_jax.data import sources

_FOLDER = "cifar-10-batches-bin"
_FILES = {
    "train": [f"data_batch_{number}.bin" for number in range(1, 6)],
    "test": ["test_batch.bin"],
}
_CLASS_NAMES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
_RECORD_BYTES = 1 + 3 * 32 * 32
_MAX_RECORDS = 10_000
# The real archive has 9 members that unpack to 184 MB.
_MAX_MEMBERS, _MAX_TOTAL_BYTES = 64, 2**29

# How a compressed file begins.
_COMPRESSIONS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_BLOCK_BYTES, _READ_BYTES = 512, 2**20
_FILES_WITH_DATA = (tarfile.REGTYPE, tarfile.AREGTYPE)
_WITHOUT_DATA = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.DIRTYPE),
    *(tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE),
)
# What says more of the member behind it: not counted as one.
_EXTENSIONS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE),
)


def read(path: pathlib.Path) -> dict[str, sources.Dataset]:
    """Both splits of the archive `path`, compressed or not, in stored order.

    Raises:
      InputError: if it is not such an archive, or is damaged or incomplete.
    """
    try:
        members = _read_members(path)
    except (
        *(tarfile.TarError, EOFError, OSError),
        *(zlib.error, lzma.LZMAError),
    ) as error:
        reason = sources.first_line(error)
        raise errors.InputError(f"{path}: not a readable tar: {reason}") from error
    splits = {}
    for split, names in _FILES.items():
        missing = [name for name in names if name not in members]
        if missing:
            raise errors.InputError(f"{path}: {_FOLDER}/{missing[0]} is missing")
        records = np.concatenate([members[name] for name in names])
        planes = records[:, 1:].reshape(-1, 3, 32, 32)
        splits[split] = sources.Dataset(
            images=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
            labels=records[:, 0].astype(np.int32),
            num_classes=len(_CLASS_NAMES),
            name="cifar10",
            class_names=_CLASS_NAMES,
        )
    return splits


def _read_members(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Records uint8 `[N, 3073]` of each expected file."""
    expected = {
        f"{_FOLDER}/{name}": name for names in _FILES.values() for name in names
    }
    members = {}
    with path.open("rb") as file:
        stream = _Stream(path, _unpacked(file))
        for member in _members(stream):
            if "cifar-10-batches-py" in member.name:
                raise errors.InputError(
                    f"{path}: this is the pickled python version, which is not safe to "
                    'read; get the "binary version", cifar-10-binary.tar.gz'
                )
            name = expected.get(member.name.removeprefix("./"))
            if name is None:
                stream.skip(_data_bytes(member))
                continue
            if member.type not in _FILES_WITH_DATA or name in members:
                raise errors.InputError(
                    f"{path}: {member.name} is a link or comes twice"
                )
            if member.size % _RECORD_BYTES or not (
                0 < member.size <= _MAX_RECORDS * _RECORD_BYTES
            ):
                raise errors.InputError(
                    f"{path}: {member.name} has {member.size:,} bytes, accepted 1 to "
                    f"{_MAX_RECORDS:,} records of {_RECORD_BYTES:,}"
                )
            data = stream.read(member.size)
            if len(data) != member.size:
                raise errors.InputError(f"{path}: {member.name} is cut off")
            members[name] = np.frombuffer(data, np.uint8).reshape(-1, _RECORD_BYTES)
            stream.skip(_data_bytes(member) - member.size)
        while stream.read(_READ_BYTES):
            pass  # The checksum is compared at the end.
    return members


def _unpacked(file: IO[bytes]) -> IO[bytes]:
    start = file.read(max(map(len, _COMPRESSIONS)))
    file.seek(0)
    for magic, opened in _COMPRESSIONS.items():
        if start.startswith(magic):
            return opened(file)
    return file


class _Stream:
    """An unpacked archive, read once; refused where it is far larger than CIFAR-10."""

    def __init__(self, path: pathlib.Path, file: IO[bytes]):
        self.path = path
        self._file = file
        self._left = _MAX_TOTAL_BYTES

    def read(self, num_bytes: int) -> bytes:
        """So many bytes; fewer at the end of the archive."""
        # One more than accepted, to see whether there is more.
        data = self._file.read(min(num_bytes, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            self.refuse()
        return data

    def skip(self, num_bytes: int) -> None:
        if num_bytes > self._left:
            self.refuse()
        while num_bytes > 0:
            data = self.read(min(num_bytes, _READ_BYTES))
            if not data:
                raise EOFError("it is cut off")
            num_bytes -= len(data)

    def refuse(self) -> NoReturn:
        raise errors.InputError(f"{self.path}: far larger than CIFAR-10; refused")


def _members(stream: _Stream) -> Iterator[tarfile.TarInfo]:
    """Headers of members; the caller reads or skips the data behind each.

    Names that do not fit into a header are cut, and do not matter.
    """
    num_members = num_blocks = 0
    # A block of zeros is the end, and so is the end of the file.
    while (block := stream.read(_BLOCK_BYTES)).strip(b"\0"):
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        num_blocks += 1
        num_members += member.type not in _EXTENSIONS
        if num_members > _MAX_MEMBERS or num_blocks > 4 * _MAX_MEMBERS:
            stream.refuse()
        if member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        if member.type in _EXTENSIONS:
            stream.skip(_data_bytes(member))
            continue
        yield member


def _data_bytes(member: tarfile.TarInfo) -> int:
    """Bytes behind a header, whole blocks."""
    if member.type in _WITHOUT_DATA:
        return 0
    return -(-member.size // _BLOCK_BYTES) * _BLOCK_BYTES
