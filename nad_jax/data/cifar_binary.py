# SPDX-License-Identifier: Apache-2.0
"""The "binary version" of CIFAR-10, `cifar-10-binary.tar.gz`, as its authors offer it.

A record is one byte of label and 3 x 32 x 32 bytes of red, green and blue planes; a
file holds up to 10,000 of them. Members are read by their exact names into memory:
nothing is extracted, so no path inside the archive can reach the disk. The "python
version" of the archive is a pickle, which could run code when read, and is refused.
"""

import pathlib
import tarfile
import zlib

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


def read(path: pathlib.Path) -> dict[str, sources.Dataset]:
    """Both splits of the archive `path`, compressed or not, in stored order.

    Raises:
      InputError: if it is not such an archive, or is damaged or incomplete.
    """
    try:
        members = _read_members(path)
    except (tarfile.TarError, EOFError, zlib.error, OSError) as error:
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
    members, total_bytes = {}, 0
    with tarfile.open(path) as archive:
        for count, member in enumerate(archive, start=1):
            total_bytes += member.size
            if count > _MAX_MEMBERS or total_bytes > _MAX_TOTAL_BYTES:
                raise errors.InputError(f"{path}: far larger than CIFAR-10; refused")
            if "cifar-10-batches-py" in member.name:
                raise errors.InputError(
                    f"{path}: this is the pickled python version, which is not safe to "
                    'read; get the "binary version", cifar-10-binary.tar.gz'
                )
            name = expected.get(member.name.removeprefix("./"))
            if name is None:
                continue
            if not member.isreg() or name in members:
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
            stream = archive.extractfile(member)
            data = stream.read() if stream else b""
            if len(data) != member.size:
                raise errors.InputError(f"{path}: {member.name} is cut off")
            members[name] = np.frombuffer(data, np.uint8).reshape(-1, _RECORD_BYTES)
    return members
