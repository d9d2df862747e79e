# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all.

A reader, or a run after a crash, sees the old file or the new one, never half of one:
the bytes go to a temporary neighbour (`.NAME.<hex>.tmp`), are forced to disk and only
then take the name.
"""

import contextlib
import json
import os
import secrets
from typing import Any

from nad_jax import errors


def write_bytes(
    path: str | os.PathLike[str], *parts: bytes | bytearray | memoryview
) -> None:
    """Writes the parts one after the other.

    Args:
      path: The file; its folder exists. A file that stands there is replaced.
      *parts: What it is to hold.

    Raises:
      InputError: the file cannot be written; whatever stood there before is then still
        there.
    """
    target = os.path.abspath(path)
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    try:
        with open(temporary, "xb") as stream:
            for part in parts:
                stream.write(part)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, target)
    except (OSError, ValueError) as problem:  # a null byte in a name is no OSError
        raise errors.InputError(
            f"cannot write {target!r}: {_reason(problem)}"
        ) from None
    finally:
        with contextlib.suppress(OSError, ValueError):
            os.unlink(temporary)
    _sync_folder(folder)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8, with "?" for half a surrogate; see `write_bytes`."""
    write_bytes(path, text.encode("utf-8", errors="replace"))


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes a value as JSON; see `write_bytes`.

    Args:
      path: The file.
      value: What `json` knows (`report.schema.plain` makes it of arrays and paths).

    Raises:
      InputError: also for NaN, an infinity or another type.
    """
    try:
        # Pure ASCII, so that no name in a config can make a file that is not UTF-8.
        text = json.dumps(value, indent=2, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as problem:
        raise errors.InputError(
            f"cannot write {os.fspath(path)!r} as JSON: {_reason(problem)}"
        ) from None
    write_text(path, text + "\n")


def remove(path: str | os.PathLike[str]) -> None:
    """Removes a file, if it is there.

    Raises:
      InputError: it is there and stays.
    """
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except OSError as problem:
        raise errors.InputError(
            f"cannot remove {os.fspath(path)!r}: {_reason(problem)}"
        ) from None


def _reason(problem: Exception) -> str:
    return getattr(problem, "strerror", None) or str(problem)


def _sync_folder(folder: str) -> None:
    """Makes the new name itself survive a power cut, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)
