# SPDX-License-Identifier: Apache-2.0
"""The entries of a zip archive in which nothing is compressed and nothing is hidden.

Zip says everything twice: in front of each entry and in a directory at the end. Two
programs that believe different copies see two different archives in one file. Here
both copies must agree, the entries must follow each other from byte 0 to the directory
without a gap or an overlap, and the directory must end the file, so every byte has
exactly one meaning. That is how `torch.save` writes; archives repacked by other tools
(compressed, with folders, with comments) are refused.

Files stay below 4 GiB (`limits.MAX_FILE_BYTES`), so the 64-bit fields of an entry are
never needed; the 64-bit end record, which torch always writes, is read and compared.
"""

import dataclasses
import struct
import zlib

import numpy as np

from nad_jax.interop import bounded_file, limits

# "Version needed to extract", in tenths: the newest that the format defines.
_NEWEST_VERSION = 63
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_LOCATOR_64 = struct.Struct("<4sIQI")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_DESCRIPTOR = struct.Struct("<4s3I")

_HAS_DESCRIPTOR = 1 << 3
_IS_UTF8 = 1 << 11
_ZIP64_EXTRA = 1
_MAX_ENTRIES = limits.MAX_TENSORS + 16
_MAX_DIRECTORY_BYTES = 16 * 2**20
_MAX_ENTRY_NAME_BYTES = 256
_PIECE_BYTES = 2**20


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One stored entry.

    Attributes:
        name: its name in the archive.
        header: offset of its local header.
        crc: CRC-32 of its bytes.
        size: how many there are.
        flags: the general purpose flags, equal in both headers.
        offset: where its bytes start; set once the local header agreed.
    """

    name: str
    header: int
    crc: int
    size: int
    flags: int
    offset: int = -1


def read_entries(file: bounded_file.BoundedFile) -> dict[str, Entry]:
    """All entries by name; `InputError` unless the archive has one reading only."""
    count, directory, end = _read_end(file)
    entries = _read_directory(file, count, directory, end)
    placed: dict[str, Entry] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        if entry.header != position:
            raise file.error(
                f"zip entry {bounded_file.shown(entry.name)} starts at "
                f"{entry.header}; the one before it ends here",
                position,
            )
        if entry.name in placed:
            name = bounded_file.shown(entry.name)
            raise file.error(f"zip entry {name} appears twice", position)
        placed[entry.name], position = _read_local(file, entry, directory)
    if position != directory:
        raise file.error("bytes between the zip entries and their directory", position)
    return placed


def read_bytes(file: bounded_file.BoundedFile, entry: Entry, max_bytes: int) -> bytes:
    """The bytes of a small entry, their checksum verified."""
    if entry.size > max_bytes:
        name = bounded_file.shown(entry.name)
        raise file.error(
            f"zip entry {name} has {entry.size} bytes; at most {max_bytes}"
        )
    data = file.read(entry.offset, entry.size)
    _check_crc(file, entry, zlib.crc32(data))
    return data


def read_array(file: bounded_file.BoundedFile, entry: Entry) -> np.ndarray:
    """The bytes of an entry as a uint8 array [size], their checksum verified."""
    raw = np.empty(entry.size, np.uint8)
    file.read_into(entry.offset, raw)
    _check_crc(file, entry, zlib.crc32(raw.data))
    return raw


def verify(file: bounded_file.BoundedFile, entry: Entry) -> None:
    """Checks the checksum of an entry nobody reads, piece by piece."""
    crc = 0
    for start in range(0, entry.size, _PIECE_BYTES):
        count = min(_PIECE_BYTES, entry.size - start)
        crc = zlib.crc32(file.read(entry.offset + start, count), crc)
    _check_crc(file, entry, crc)


def _check_crc(file: bounded_file.BoundedFile, entry: Entry, crc: int) -> None:
    if crc != entry.crc:
        raise file.error(
            f"zip entry {bounded_file.shown(entry.name)} is damaged: its checksum is "
            f"{crc:08x}, the archive says {entry.crc:08x}"
        )


def _read_end(file: bounded_file.BoundedFile) -> tuple[int, int, int]:
    """Number of entries, and start and end of the directory."""
    start = file.size - _END.size
    if start < 0:
        raise file.error("a zip archive cut short")
    fields = _END.unpack(file.read(start, _END.size))
    signature, disk, directory_disk, on_disk, count, length, offset, comment = fields
    if signature != b"PK\x05\x06" or comment:
        raise file.error("the zip archive does not end with its end record", start)
    if disk or directory_disk or on_disk != count:
        raise file.error("a zip archive of several parts", start)
    locator = start - _LOCATOR_64.size
    if locator >= 0 and file.read(locator, 4) == b"PK\x06\x07":
        start, *wide = _read_end_64(file, locator)
        for narrow, value, most in zip(
            (count, length, offset), wide, (0xFFFF, 2**32 - 1, 2**32 - 1), strict=True
        ):
            if narrow != min(value, most):
                raise file.error("the two end records of the zip disagree", start)
        count, length, offset = wide
    if offset + length != start:
        raise file.error("the zip directory does not end at its end record", start)
    if count > _MAX_ENTRIES or length > _MAX_DIRECTORY_BYTES:
        raise file.error(f"a zip archive with {count} entries; at most {_MAX_ENTRIES}")
    return count, offset, start


def _read_end_64(
    file: bounded_file.BoundedFile, locator: int
) -> tuple[int, int, int, int]:
    """Offset of the 64-bit end record and its count, length and offset."""
    _, disk, start, disks = _LOCATOR_64.unpack(file.read(locator, _LOCATOR_64.size))
    if disk or disks > 1 or start + _END_64.size != locator:
        raise file.error("a 64-bit zip end record out of place", locator)
    fields = _END_64.unpack(file.read(start, _END_64.size))
    signature, size, _, _, disk, directory_disk, on_disk, count, length, offset = fields
    if signature != b"PK\x06\x06" or size != _END_64.size - 12:
        raise file.error("a malformed 64-bit zip end record", start)
    if disk or directory_disk or on_disk != count:
        raise file.error("a zip archive of several parts", start)
    return start, count, length, offset


def _read_directory(
    file: bounded_file.BoundedFile, count: int, start: int, end: int
) -> list[Entry]:
    if count * _CENTRAL.size > end - start:
        raise file.error(f"a zip directory too short for {count} entries", start)
    data = file.read(start, end - start)
    entries: list[Entry] = []
    at = 0
    for _ in range(count):
        if at + _CENTRAL.size > len(data):
            raise file.error("a zip directory cut short", start + at)
        fields = _CENTRAL.unpack_from(data, at)
        signature, _, version, flags, method, _, _, crc, packed, size = fields[:10]
        name_length, extra_length, comment_length, disk, _, _, header = fields[10:]
        rest = at + _CENTRAL.size
        at = rest + name_length + extra_length
        if signature != b"PK\x01\x02" or comment_length or disk or at > len(data):
            raise file.error("a malformed zip directory entry", start + rest)
        name = _entry_name(file, data[rest : rest + name_length], start + rest)
        shown = bounded_file.shown(name)
        if method != 0 or packed != size:
            raise file.error(
                f"zip entry {shown} is compressed (method {method}); checkpoints of "
                "torch.save are not (TorchScript and repacked archives are not read)",
                start + rest,
            )
        if version > _NEWEST_VERSION:
            raise file.error(
                f"zip entry {shown} needs version {version / 10:g} of the format; read "
                f"are those up to {_NEWEST_VERSION / 10:g}",
                start + rest,
            )
        if flags & ~(_HAS_DESCRIPTOR | _IS_UTF8):
            raise file.error(f"zip entry {shown} has flags {flags:#06x}", start + rest)
        _check_extra(file, data[rest + name_length : at], start + rest + name_length)
        entries.append(Entry(name, header, crc, size, flags))
    if at != len(data):
        raise file.error("bytes after the last entry of the zip directory", start + at)
    return entries


def _read_local(
    file: bounded_file.BoundedFile, entry: Entry, directory: int
) -> tuple[Entry, int]:
    """`entry` with its offset, and the end of it, once the local header agrees."""
    shown = bounded_file.shown(entry.name)
    at = entry.header
    fields = _LOCAL.unpack(file.read(at, _LOCAL.size))
    signature, _, flags, method, _, _, crc, packed, size, name_length, extra = fields
    name = file.read(at + _LOCAL.size, name_length + extra)
    sizes = (entry.crc, entry.size, entry.size)
    # With a descriptor the sizes come after the bytes, and the header may hold zeros.
    late = bool(flags & _HAS_DESCRIPTOR) and (crc, packed, size) == (0, 0, 0)
    if (
        signature != b"PK\x03\x04"
        or (flags, method) != (entry.flags, 0)
        or name[:name_length] != entry.name.encode()
        or not (late or (crc, packed, size) == sizes)
    ):
        raise file.error(f"the two headers of zip entry {shown} disagree", at)
    _check_extra(file, name[name_length:], at + _LOCAL.size + name_length)
    offset = at + _LOCAL.size + name_length + extra
    end = offset + entry.size
    if flags & _HAS_DESCRIPTOR:
        descriptor = _DESCRIPTOR.unpack(file.read(end, _DESCRIPTOR.size))
        if descriptor != (b"PK\x07\x08", *sizes):
            raise file.error(f"the descriptor of zip entry {shown} disagrees", end)
        end += _DESCRIPTOR.size
    if end > directory:
        raise file.error(f"zip entry {shown} reaches into the directory", at)
    return dataclasses.replace(entry, offset=offset), end


def _entry_name(file: bounded_file.BoundedFile, raw: bytes, at: int) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        name = ""
    parts = name.split("/")
    if (
        len(raw) > _MAX_ENTRY_NAME_BYTES
        or not name.isprintable()
        or "\\" in name
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise file.error(f"zip entry with the name {bounded_file.shown(raw)}", at)
    return name


def _check_extra(file: bounded_file.BoundedFile, extra: bytes, at: int) -> None:
    """Walks the extra fields: padding is fine, a second set of sizes is not."""
    position = 0
    while position < len(extra):
        if position + 4 > len(extra):
            raise file.error("a zip extra field cut short", at)
        kind, length = struct.unpack_from("<2H", extra, position)
        position += 4 + length
        if position > len(extra):
            raise file.error("a zip extra field longer than its header says", at)
        if kind == _ZIP64_EXTRA:
            raise file.error("64-bit sizes in a zip archive below 4 GiB", at)
