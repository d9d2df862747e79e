# SPDX-License-Identifier: Apache-2.0
"""Reads the files of `torch.save` without torch and without unpickling.

Two containers hold the same pickle:

    zip     <name>/data.pkl, <name>/data/<key> for each storage, a few one-line records
    legacy  magic number, protocol 1001, system info, the pickle, the list of storage
            keys (five pickles in a row), then for each key: size, bytes

The pickle goes through `pickle_machine` with the names of `torch_tensors`. Every
storage it mentions must exist with exactly the size it says, every storage that exists
must be mentioned, and nothing may follow the last byte.
"""

import os
import re

import numpy as np

from nad_jax.interop import (
    bounded_file,
    limits,
    model_entry,
    pickle_machine,
    stored_array,
    stored_zip,
    torch_tensors,
)

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001

_SMALL_PICKLE_BYTES = 4096
_RECORDS = re.compile(
    r"data\.pkl|version|byteorder|\.format_version|\.storage_alignment"
    r"|\.data/serialization_id|data/[0-9]{1,20}"
)
_MAX_RECORD_BYTES = 256
# What the small records must say; the others may say anything.
_EXPECTED = {"byteorder": (b"little",), "version": (b"2", b"3")}


def read_torch(
    path: str | os.PathLike[str], *, entry: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """The model's arrays by name, and the scalars saved beside it.

    Args:
        path: a file in either container; which one is decided by its content.
        entry: key of the wanted mapping if the file holds several.

    Returns:
        Read-only arrays, views where the file has views and shared where it shares;
        and metadata such as an epoch.

    Raises:
        InputError: for anything that is not exactly such a file.
    """
    with bounded_file.BoundedFile(path) as file:
        is_zip = file.size >= 4 and file.read(0, 4) == b"PK\x03\x04"
        return (read_zip if is_zip else read_legacy)(file, entry=entry)


def read_zip(
    file: bounded_file.BoundedFile, *, entry: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """`read_torch` for the zip container."""
    records = _zip_records(file)
    program = records["data.pkl"]
    data = stored_zip.read_bytes(file, program, limits.MAX_PICKLE_BYTES)
    table = torch_tensors.StorageTable()
    tree, length = pickle_machine.run_pickle(
        data,
        start=program.offset,
        file=file,
        allowed=torch_tensors.ALLOWED_GLOBALS,
        persistent=table.from_persistent_id,
    )
    if length != len(data):
        raise file.error("bytes after the pickle in data.pkl", program.offset + length)
    stored = {key[5:]: record for key, record in records.items() if key[:5] == "data/"}
    _check_keys(file, table, list(stored))
    for key, storage in table.storages.items():
        record = stored[key]
        if storage.size * storage.kind.itemsize != record.size:
            raise file.error(
                f"storage {key} has {record.size} bytes, the pickle says "
                f"{storage.size * storage.kind.itemsize}",
                record.offset,
            )
        storage.read = lambda record=record: stored_zip.read_array(file, record)
    arrays, metadata = _load(file, tree, entry)
    # An archive damaged in a part nobody asked for is still a damaged archive.
    for key, record in stored.items():
        if table.storages[key].raw is None:
            stored_zip.verify(file, record)
    return arrays, metadata


def _zip_records(file: bounded_file.BoundedFile) -> dict[str, stored_zip.Entry]:
    """Entries by their name below the archive's one folder."""
    records: dict[str, stored_zip.Entry] = {}
    folders: set[str] = set()
    for name, record in stored_zip.read_entries(file).items():
        folder, _, rest = name.partition("/")
        folders.add(folder)
        if not _RECORDS.fullmatch(rest):
            raise file.error(
                f"zip entry {bounded_file.shown(name)} is not part of a torch "
                "checkpoint (TorchScript archives and .npz files are not read)",
                record.header,
            )
        records[rest] = record
    if len(folders) != 1 or "data.pkl" not in records:
        raise file.error("a zip archive without the data.pkl of a torch checkpoint")
    for name, record in records.items():
        if name != "data.pkl" and not name.startswith("data/"):
            text = stored_zip.read_bytes(file, record, _MAX_RECORD_BYTES).strip()
            accepted = _EXPECTED.get(name, (text,))
            if text not in accepted:
                raise file.error(
                    f"{name} {bounded_file.shown(text)}; accepted are "
                    f"{', '.join(map(bounded_file.shown, accepted))}"
                )
    return records


def read_legacy(
    file: bounded_file.BoundedFile, *, entry: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """`read_torch` for the legacy stream."""
    stream = _PickleStream(file)
    magic = stream.next(_SMALL_PICKLE_BYTES)
    if type(magic) is not int or magic != MAGIC_NUMBER:
        raise file.error(
            "a pickle that is not a torch file; only the streams of torch.save are read"
        )
    version = stream.next(_SMALL_PICKLE_BYTES)
    if type(version) is not int or version != PROTOCOL_VERSION:
        raise file.error(
            f"torch protocol {bounded_file.shown(version)}; {PROTOCOL_VERSION} is read"
        )
    system = stream.next(_SMALL_PICKLE_BYTES)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise file.error("not saved on a little-endian machine")
    table = torch_tensors.StorageTable()
    tree = stream.next(limits.MAX_PICKLE_BYTES, table)
    keys = stream.next(limits.MAX_PICKLE_BYTES)
    if type(keys) is not list or not all(isinstance(key, str) for key in keys):
        raise file.error("the list of storage keys is not a list of texts")
    _check_keys(file, table, keys)
    _place_legacy_storages(file, table, keys, stream.position)
    return _load(file, tree, entry)


class _PickleStream:
    """Pickles that follow each other from the start of a file."""

    def __init__(self, file: bounded_file.BoundedFile) -> None:
        self.file = file
        self.position = 0

    def next(
        self, max_bytes: int, table: torch_tensors.StorageTable | None = None
    ) -> object:
        """The value of the next pickle; only with a `table` may it name anything."""
        count = min(max_bytes, self.file.size - self.position)
        value, length = pickle_machine.run_pickle(
            self.file.read(self.position, count),
            start=self.position,
            file=self.file,
            allowed={} if table is None else torch_tensors.ALLOWED_GLOBALS,
            persistent=None if table is None else table.from_persistent_id,
        )
        self.position += length
        return value


def _place_legacy_storages(
    file: bounded_file.BoundedFile,
    table: torch_tensors.StorageTable,
    keys: list[str],
    position: int,
) -> None:
    """Finds each storage behind the pickles: its size in 8 bytes, then its bytes."""
    for key in keys:
        storage = table.storages[key]
        size = int.from_bytes(file.read(position, 8), "little", signed=True)
        if size != storage.size:
            raise file.error(
                f"storage {key} has {size} elements, the pickle says {storage.size}",
                position,
            )
        count = size * storage.kind.itemsize
        position += 8
        if count > file.size - position:
            raise file.error(
                f"storage {key} has {count} bytes, {file.size - position} are left",
                position,
            )
        storage.read = stored_array.PackedArray(
            stored_array.DTYPES["uint8"], (count,), file, ((position, count),)
        ).load
        position += count
    if position != file.size:
        raise file.error("bytes after the last storage", position)


def _check_keys(
    file: bounded_file.BoundedFile, table: torch_tensors.StorageTable, keys: list[str]
) -> None:
    """The storages that exist are those the pickle mentions, each once."""
    present = set(keys)
    if len(present) != len(keys):
        raise file.error("a storage key is listed twice")
    odd = sorted(present ^ table.storages.keys())
    if odd:
        state = "never used" if odd[0] in present else "missing"
        raise file.error(f"storage {bounded_file.shown(odd[0])} is {state}")


def _load(
    file: bounded_file.BoundedFile, tree: object, entry: str | None
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    arrays, metadata = model_entry.select_state_dict(tree, file=file, entry=entry)
    return stored_array.load_all(arrays, file), metadata
