# SPDX-License-Identifier: Apache-2.0
"""Decoded arrays kept on disk as `.npy` files, so that pictures are decoded once.

Files live in `data` below the folder of all caches (`root`) and may be deleted at any
time. An entry `NAME` is one `NAME.ARRAY.npy` per array and a manifest
`NAME.json` with the SHA-256 of each, written last. Every file appears by an atomic
rename, so that a reader never sees half of one and two writers do no harm: they write
the same. An entry that does not match its manifest is made anew.
"""

import hashlib
import io
import json
import logging
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nad_jax import errors, whole_file
from nad_jax.data import sources

Arrays = Mapping[str, np.ndarray]

VARIABLE = "NAD_JAX_CACHE"
OFF = ("0", "off", "none", "")

# Part of every fingerprint: raise it when the meaning of the arrays changes.
_FORMAT = 2

# Of files of so many bytes in all the content is hashed: no slower than reading what is
# cached of them, which is hashed too. More, and a start would wait for it.
_MAX_HASHED_BYTES = 2**30


def root() -> pathlib.Path | None:
    """Folder of all caches: that of the variable NAD_JAX_CACHE, or `~/.cache/nad_jax`.

    None if the variable says "off" or "0", or nothing is known of a home folder.
    """
    path = os.environ.get(VARIABLE, "~/.cache/nad_jax")
    if path.lower() in OFF:
        return None
    try:
        return sources.user_path(path).absolute()
    except errors.InputError as error:
        # A cache saves seconds; its lack must not stop a run.
        logging.getLogger(__name__).warning("no caches: %s", error)
        return None


def fingerprint(files: Sequence[pathlib.Path], *settings: object) -> str:
    """A short hash of what is in `files`, in that order.

    Of more than 1 GiB in all it is a hash of where they are, their sizes, inodes and
    times, that of the last change included, which no program sets at will; it stays the
    same as long as nobody writes to them. Names, sizes and times of modification alone
    would be the same for many a pair of data sets out of archives.

    `settings` are further things the arrays depend on, such as the split.

    Raises:
      OSError: a file is not there.
    """
    stats = [path.stat() for path in files]
    by_content = sum(stat.st_size for stat in stats) <= _MAX_HASHED_BYTES
    facts: list[object] = [_FORMAT, [str(setting) for setting in settings]]
    for path, stat in zip(files, stats, strict=True):
        if by_content:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            facts.append([path.name, digest])
        else:
            times = (stat.st_mtime_ns, stat.st_ctime_ns)
            facts.append([str(path.resolve()), stat.st_size, stat.st_ino, *times])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def fetch(entry: str, build: Callable[[], Arrays]) -> Arrays:
    """The arrays of `entry` from the cache, or from `build()`, which is then kept."""
    folder = root()
    if folder is None:
        return build()
    manifest = folder / "data" / f"{entry}.json"
    arrays = _read(manifest)
    if arrays is None:
        arrays = build()
        try:
            _write(manifest, arrays)
        # A full or read-only disk costs time, not the run.
        except (OSError, errors.InputError) as error:
            logging.getLogger(__name__).warning("cannot cache %s: %s", entry, error)
    return arrays


def _array_path(manifest: pathlib.Path, name: str) -> pathlib.Path:
    return manifest.with_suffix(f".{name}.npy")


def _read(manifest: pathlib.Path) -> Arrays | None:
    """The arrays, or None if the entry is missing or damaged."""
    if not manifest.exists():
        return None
    arrays = {}
    try:
        for name, digest in json.loads(manifest.read_text()).items():
            data = _array_path(manifest, name).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"{name} is not what was written")
            arrays[name] = np.load(io.BytesIO(data), allow_pickle=False)
    except (OSError, ValueError, AttributeError) as error:
        logging.getLogger(__name__).warning("damaged cache %s: %s", manifest, error)
        return None
    return arrays


def _write(manifest: pathlib.Path, arrays: Arrays) -> None:
    manifest.parent.mkdir(parents=True, exist_ok=True)
    digests = {}
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array, allow_pickle=False)
        digests[name] = hashlib.sha256(stream.getbuffer()).hexdigest()
        whole_file.write_bytes(_array_path(manifest, name), stream.getbuffer())
    whole_file.write_json(manifest, digests)
