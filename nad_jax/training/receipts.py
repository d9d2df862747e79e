# SPDX-License-Identifier: Apache-2.0
"""The sha256 of every file of a checkpoint step, in one more file of the step.

Each leaf has a hash of its own (`records`), so no wrong value is ever restored. But
bytes that a reader happens to skip may rot unseen, until another reader needs them.
With a receipt every damaged byte of a step shows, and by the name of its file.

A receipt is written after its step: a step without one was saved by a process that was
killed in between, and is good if its leaves are; but it may be in memory alone until it
gets its receipt.
"""

import errno
import hashlib
import os
import pathlib

from nad_jax.training import records

_NAME = "SHA256SUMS"
_TEMPORARY = ".receipt.tmp"


def write(folder: pathlib.Path) -> None:
    """Writes the receipt of a step, and forces all files of the step to disk."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            lines.append(f"{_sha256(path.read_bytes())}  {_name(folder, path)}\n")
        _sync(path)
    body = "".join(lines).encode()
    # Beside the step, which is whole and must not hold half a receipt.
    temporary = folder.with_name(f".{folder.name}{_TEMPORARY}")
    temporary.write_bytes(body + _sha256(body).encode())
    _sync(temporary)
    os.replace(temporary, folder / _NAME)
    _sync(folder)
    _sync(folder.parent)


def exists(folder: pathlib.Path) -> bool:
    """Whether a step has its receipt, and so is on disk."""
    return (folder / _NAME).exists()


def sync_parents(folder: pathlib.Path) -> None:
    """Forces the names of a folder and of all that it is in to disk.

    Some of those may be new, too; others are not ours to read, or cannot be synced.
    """
    for parent in folder.absolute().parents:
        try:
            _sync(parent)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EINVAL):
                raise


def is_leftover(name: str) -> bool:
    """Whether a file beside steps is a receipt that was never finished."""
    return name.endswith(_TEMPORARY)


def check(folder: pathlib.Path) -> None:
    """Raises DamagedStep unless the files are those of the receipt, if there is one."""
    if not exists(folder):
        return
    content = (folder / _NAME).read_bytes()
    body, seal = content[:-64], content[-64:]
    if seal != _sha256(body).encode():
        raise records.DamagedStep(f"sha256 of file {_NAME} differs")
    sums = {line[66:]: line[:64] for line in body.decode().splitlines()}
    there = {_name(folder, path): path for path in folder.rglob("*") if path.is_file()}
    del there[_NAME]
    for name in sorted({*sums, *there}):
        if name not in there:
            raise records.DamagedStep(f"file {name} is missing")
        if name not in sums:
            raise records.DamagedStep(f"file {name} is not expected")
        if _sha256(there[name].read_bytes()) != sums[name]:
            raise records.DamagedStep(f"sha256 of file {name} differs")


def _name(folder: pathlib.Path, path: pathlib.Path) -> str:
    return path.relative_to(folder).as_posix()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
