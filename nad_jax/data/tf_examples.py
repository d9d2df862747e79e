# SPDX-License-Identifier: Apache-2.0
"""Single values out of a serialized `tf.train.Example`, in which TFDS keeps a row.

    message Example { Features features = 1; }
    message Features { map<string, Feature> feature = 1; }
    message Feature { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }
    message BytesList { repeated bytes value = 1; }      and likewise Int64List

Read here and not by TFDS, which for that imports the classes that `features.json` names
and decodes every feature of a row, wanted or not. Nothing is copied that is not asked
for, so that no message takes more memory than its bytes.
"""

from collections.abc import Iterator

# What somebody else's message may make us look at.
_MAX_FEATURES = 4096

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED_BYTES = {_FIXED64: 8, _FIXED32: 4}


def read(record: bytes, names: tuple[str, ...]) -> dict[str, bytes | int | None]:
    """The features `names` of an example.

    Returns:
      For each name the value, bytes or an integer; None if it is missing, empty, a list
      of several values or of floats.

    Raises:
      ValueError: it is no such message.
    """
    values: dict[str, bytes | int | None] = dict.fromkeys(names)
    keys = [(name.encode(), name) for name in names]
    for number, features in _fields(memoryview(record), limit=1):
        if number != 1 or isinstance(features, int):
            continue
        for number, entry in _fields(features, limit=_MAX_FEATURES):
            if number != 1 or isinstance(entry, int):
                continue
            pair = dict(_fields(entry, limit=2))
            key, feature = pair.get(1), pair.get(2)
            if isinstance(key, int) or isinstance(feature, int):
                raise ValueError("no example: a feature is a number")
            # Compared where it lies: a key may be as long as the message.
            name = next((name for key_, name in keys if key_ == key), None)
            if name is not None and feature is not None:
                values[name] = _single(feature)
    return values


def _single(feature: memoryview) -> bytes | int | None:
    for kind, values in _fields(feature, limit=1):
        if isinstance(values, int) or kind not in (1, 3):
            return None
        found = []
        for number, value in _fields(values, limit=2):
            if number != 1 or found:
                return None
            found.append(value)
        if not found:
            return None
        (value,) = found
        if kind == 1:
            return None if isinstance(value, int) else bytes(value)
        if not isinstance(value, int):  # Packed: numbers one behind the other.
            if not value:
                return None
            value, end = _varint(value, 0)
            if end != len(found[0]):
                return None
        return value - 2**64 if value >= 2**63 else value
    return None


def _fields(
    message: memoryview, *, limit: int
) -> Iterator[tuple[int, memoryview | int]]:
    """Numbers and values of the fields of a message; not those of fixed width."""
    place, count = 0, 0
    while place < len(message):
        count += 1
        if count > limit:
            raise ValueError(f"no example: a message of more than {limit:,} fields")
        tag, place = _varint(message, place)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, place = _varint(message, place)
            yield number, value
            continue
        if wire == _BYTES:
            length, place = _varint(message, place)
        elif wire in _FIXED_BYTES:
            length = _FIXED_BYTES[wire]
        else:
            raise ValueError(f"no example: a field of type {wire}")
        if place + length > len(message):
            raise ValueError("an example that is cut off")
        if wire == _BYTES:
            yield number, message[place : place + length]
        place += length


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    """An unsigned number of up to 64 bits, and the place behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if place == len(data):
            raise ValueError("an example that is cut off")
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value % 2**64, place
    raise ValueError("no example: a number of more than 64 bits")
