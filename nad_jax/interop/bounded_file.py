# SPDX-License-Identifier: Apache-2.0
"""A file from a stranger, read by offset, every read checked before it allocates.

The file is opened once and only through its descriptor afterwards, so that deciding
the format and reading it see the same bytes. It is read, never memory-mapped: a mapped
file that somebody truncates meanwhile kills the process instead of raising.
"""

import hashlib
import os
import stat

import numpy as np

from nad_jax import errors
from nad_jax.interop import limits

_CURSOR_BYTES = 64 * 1024
_HASHED_BYTES = 2**20


class Refusal(Exception):
    """A reason to refuse, raised where neither the file nor the offset is known."""


def shown(value: object, max_chars: int = 80) -> str:
    """`value` of a stranger's file as printable ASCII on one line, clipped.

    Of a container only its type is shown: a few nested references to one list print
    as more text than any memory holds.
    """
    if isinstance(value, (str, bytes)):
        # Clipped before quoting too, which makes up to ten characters of one.
        text = ascii(value[:max_chars])
    elif value is None or isinstance(value, (bool, int, float)):
        text = ascii(value)
    else:
        text = f"a {type(value).__name__}"
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


class BoundedFile:
    """An open regular file whose reads cannot leave it."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.label = shown(os.fspath(path), 200)
        try:
            # Not blocking: opening a pipe would wait for a writer that never comes.
            flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
            self._descriptor = os.open(path, flags)
        except (OSError, ValueError) as problem:
            reason = getattr(problem, "strerror", None) or str(problem)
            raise errors.InputError(f"cannot open {self.label}: {reason}") from None
        try:
            status = os.fstat(self._descriptor)
            self.size = status.st_size
            if stat.S_ISDIR(status.st_mode):
                raise self.error("a directory; expected one model file")
            if not stat.S_ISREG(status.st_mode):
                raise self.error("not a regular file")
            if self.size == 0:
                raise self.error("the file is empty")
            if self.size > limits.MAX_FILE_BYTES:
                raise self.error(
                    f"{self.size} bytes; at most {limits.MAX_FILE_BYTES} are read"
                )
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> "BoundedFile":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def error(self, text: str, at: int | None = None) -> errors.InputError:
        """The error to raise for this file; `at` is a byte offset in it."""
        where = "" if at is None else f" (at byte {at})"
        return errors.InputError(f"{self.label}: {text}{where}")

    def read(self, offset: int, count: int) -> bytes:
        """Exactly `count` bytes from `offset`."""
        self._check_range(offset, count)
        parts = []
        while count:
            part = os.pread(self._descriptor, min(count, 2**30), offset)
            if not part:
                raise self.error("the file became shorter while it was read", offset)
            parts.append(part)
            offset += len(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_into(self, offset: int, target: np.ndarray) -> None:
        """Fills the uint8 array `target` [n] with the bytes from `offset`."""
        self._check_range(offset, target.size)
        view = target.data
        while len(view):
            count = os.preadv(self._descriptor, [view[: 2**30]], offset)
            if not count:
                raise self.error("the file became shorter while it was read", offset)
            view = view[count:]
            offset += count

    def sha256(self) -> str:
        """Hash of all its bytes, in hexadecimal."""
        digest = hashlib.sha256()
        for offset in range(0, self.size, _HASHED_BYTES):
            digest.update(self.read(offset, min(_HASHED_BYTES, self.size - offset)))
        return digest.hexdigest()

    def _check_range(self, offset: int, count: int) -> None:
        if offset < 0 or count < 0 or offset + count > self.size:
            raise self.error(
                f"{count} bytes expected here, the file has {self.size}", offset
            )


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a file's bytes, in hexadecimal.

    Raises:
        InputError: it is no regular file that can be read.
    """
    with BoundedFile(path) as file:
        return file.sha256()


class Cursor:
    """Reads a bounded file forward through a small window."""

    def __init__(self, file: BoundedFile) -> None:
        self.file = file
        self.position = 0
        self._window = b""
        self._window_start = 0

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        start = self.position - self._window_start
        if start < 0 or start + count > len(self._window):
            left = self.file.size - self.position
            # A count beyond the file is refused by read, before anything is allocated.
            wanted = max(count, min(_CURSOR_BYTES, left))
            self._window = self.file.read(self.position, wanted)
            self._window_start, start = self.position, 0
        self.position += count
        return self._window[start : start + count]

    def skip(self, count: int) -> None:
        """Passes over `count` bytes, which must exist."""
        if count > self.file.size - self.position:
            raise self.file.error(
                f"{count} bytes expected here, the file has {self.file.size}",
                self.position,
            )
        self.position += count
