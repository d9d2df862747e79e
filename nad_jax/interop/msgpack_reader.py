# SPDX-License-Identifier: Apache-2.0
"""Reads the msgpack files of `flax.serialization` with a decoder of its own.

Msgpack is a tree of maps, arrays, texts and numbers. Flax puts an array into extension
type 1 (a numpy scalar into 3) whose content is msgpack again: shape, name of the dtype,
bytes. Arrays above 1 GiB are split into a map of flat pieces that says so. Everything
else msgpack can hold (raw bytes, timestamps, foreign extensions) is refused.
"""

import math
import os
import struct

import numpy as np

from nad_jax.interop import bounded_file, limits, model_entry, stored_array
from nad_jax.interop.bounded_file import Refusal, shown

_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_MAX_TEXT_BYTES = 4096


def read_msgpack(
    path: str | os.PathLike[str], *, entry: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """The model's arrays, and the scalars saved beside them.

    Args:
        path: a file of `flax.serialization.to_bytes` or `msgpack_serialize`.
        entry: key of the wanted variables if the file holds several.

    Returns:
        Read-only arrays under names such as "params/conv1/kernel", and metadata.

    Raises:
        InputError: for anything that is not exactly such a file.
    """
    with bounded_file.BoundedFile(path) as file:
        return read_open_file(file, entry=entry)


def read_open_file(
    file: bounded_file.BoundedFile, *, entry: str | None = None
) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """`read_msgpack` of a file that is open already."""
    decoder = _Decoder(file)
    try:
        tree = decoder.value(0)
    except Refusal as refusal:
        raise file.error(f"msgpack: {refusal}", decoder.cursor.position) from None
    if decoder.cursor.position != file.size:
        raise file.error("bytes after the msgpack value", decoder.cursor.position)
    arrays, metadata = model_entry.select_collections(tree, file=file, entry=entry)
    return stored_array.load_all(arrays, file), metadata


class _Decoder:
    """Walks the file once; array bytes are passed over and only noted."""

    def __init__(self, file: bounded_file.BoundedFile) -> None:
        self.cursor = bounded_file.Cursor(file)
        self.values = 0
        self.arrays = 0
        # Arrays joined from pieces, by id; kept here, so that no id is used twice.
        self.joined: dict[int, stored_array.PackedArray] = {}

    def value(self, depth: int) -> object:
        """The next value of the tree, `depth` containers down."""
        self._count_value()
        code = self._number(1)
        if code < 0x80:
            return code
        if code >= 0xE0:
            return code - 0x100
        if 0xA0 <= code < 0xC0:
            return self._text(code & 0x1F)
        if code < 0x90:
            return self._map(code & 0x0F, depth)
        if code < 0xA0:
            return self._array(code & 0x0F, depth)
        return self._long_form(code, depth)

    def _long_form(self, code: int, depth: int) -> object:
        if code in _CONSTANTS:
            return _CONSTANTS[code]
        if code in _NUMBERS:
            form = _NUMBERS[code]
            return struct.unpack(form, self.cursor.take(struct.calcsize(form)))[0]
        if code in _TEXT_WIDTHS:
            return self._text(self._number(_TEXT_WIDTHS[code]))
        if code in _ARRAY_WIDTHS:
            return self._array(self._number(_ARRAY_WIDTHS[code]), depth)
        if code in _MAP_WIDTHS:
            return self._map(self._number(_MAP_WIDTHS[code]), depth)
        if code in _FIXED_EXTENSIONS:
            return self._extension(_FIXED_EXTENSIONS[code])
        if code in _EXTENSION_WIDTHS:
            return self._extension(self._number(_EXTENSION_WIDTHS[code]))
        raise Refusal(f"type code 0x{code:02x}; expected maps, numbers, texts, arrays")

    def _count_value(self) -> None:
        self.values += 1
        if self.values > limits.MAX_MSGPACK_VALUES:
            raise Refusal(f"more than {limits.MAX_MSGPACK_VALUES} values")

    def _number(self, width: int) -> int:
        return int.from_bytes(self.cursor.take(width), "big")

    def _text(self, length: int) -> str:
        if length > _MAX_TEXT_BYTES:
            raise Refusal(f"a text of {length} bytes; at most {_MAX_TEXT_BYTES}")
        raw = self.cursor.take(length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise Refusal(f"text {shown(raw)} is not UTF-8") from None

    def _check_container(self, bytes_at_least: int, depth: int) -> None:
        if depth >= limits.MAX_DEPTH:
            raise Refusal(f"containers nested deeper than {limits.MAX_DEPTH}")
        left = self.cursor.file.size - self.cursor.position
        if bytes_at_least > left:
            raise Refusal(f"a container of {bytes_at_least} bytes or more; {left} left")

    def _array(self, length: int, depth: int) -> list[object]:
        self._check_container(length, depth)
        return [self.value(depth + 1) for _ in range(length)]

    def _map(self, length: int, depth: int) -> object:
        self._check_container(2 * length, depth)
        result: dict[str, object] = {}
        for _ in range(length):
            key = self.value(limits.MAX_DEPTH)
            if not isinstance(key, str):
                raise Refusal(f"a map key that is {shown(key)}; expected texts")
            if key in result:
                raise Refusal(f"duplicate key {shown(key)}")
            result[key] = self.value(depth + 1)
        return self._joined(result) if _CHUNKED in result else result

    def _extension(self, length: int) -> stored_array.PackedArray:
        kind = self._number(1)
        if kind not in (_ARRAY, _SCALAR):
            raise Refusal(f"extension type {kind}; Flax writes arrays as type 1 or 3")
        self.arrays += 1
        if self.arrays > limits.MAX_TENSORS:
            raise Refusal(f"more than {limits.MAX_TENSORS} arrays")
        end = self.cursor.position + length
        if end > self.cursor.file.size:
            raise Refusal(f"an array of {length} bytes that reaches beyond the file")
        # The content is a list of three: shape, dtype name, bytes.
        head = self._number(1)
        shape = self.value(limits.MAX_DEPTH - 1) if head == 0x93 else None
        name = self._dtype_name() if head == 0x93 else None
        if not isinstance(shape, list) or name not in stored_array.DTYPES:
            accepted = ", ".join(stored_array.DTYPES)
            raise Refusal(f"an array of dtype {shown(name)}; accepted are {accepted}")
        dtype = stored_array.DTYPES[name]
        sizes = stored_array.checked_shape(shape)
        if kind == _SCALAR and sizes:
            raise Refusal(f"a numpy scalar of shape {list(sizes)}")
        declared = math.prod(sizes) * dtype.itemsize
        code = self._number(1)
        if code not in _BYTES_WIDTHS:
            raise Refusal(f"array bytes of type code 0x{code:02x}")
        count = self._number(_BYTES_WIDTHS[code])
        if count != declared or self.cursor.position + count != end:
            raise Refusal(
                f"{name} {list(sizes)} needs {declared} bytes, {count} are there and "
                f"{end - self.cursor.position} are left in its extension"
            )
        start = self.cursor.position
        self.cursor.skip(count)
        pieces = ((start, count),)
        return stored_array.PackedArray(dtype, sizes, self.cursor.file, pieces)

    def _dtype_name(self) -> str:
        name = self.value(limits.MAX_DEPTH)
        if not isinstance(name, str):
            raise Refusal(f"a dtype that is {shown(name)}; expected its name")
        return name

    def _joined(self, parts: dict[str, object]) -> stored_array.PackedArray:
        """One array from the pieces Flax splits a large one into."""
        if parts.keys() != {_CHUNKED, "shape", "chunks"} or parts[_CHUNKED] is not True:
            raise Refusal("a malformed split array")
        sizes = stored_array.checked_shape(_numbered(parts["shape"]))
        chunks = _numbered(parts["chunks"])
        pieces: list[tuple[int, int]] = []
        dtypes = set()
        for chunk in chunks:
            # Flax does not join a piece that is a split array itself.
            if (
                not isinstance(chunk, stored_array.PackedArray)
                or len(chunk.shape) != 1
                or id(chunk) in self.joined
            ):
                raise Refusal("a split array with a piece that is not a flat array")
            pieces.extend(chunk.pieces)
            dtypes.add(chunk.dtype)
        if len(dtypes) != 1:
            raise Refusal(f"a split array of {len(dtypes)} dtypes")
        dtype = dtypes.pop()
        there = sum(count for _, count in pieces)
        if math.prod(sizes) * dtype.itemsize != there:
            raise Refusal(f"a split array of shape {list(sizes)} with {there} bytes")
        array = stored_array.PackedArray(dtype, sizes, self.cursor.file, tuple(pieces))
        self.joined[id(array)] = array
        return array


def _numbered(mapping: object) -> list[object]:
    """The values of {"0": ..., "1": ..., ...} in order."""
    if not isinstance(mapping, dict) or list(mapping) != [
        str(index) for index in range(len(mapping))
    ]:
        raise Refusal("a split array whose parts are not numbered")
    return list(mapping.values())


_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
_NUMBERS = {
    0xCA: ">f",
    0xCB: ">d",
    0xCC: ">B",
    0xCD: ">H",
    0xCE: ">I",
    0xCF: ">Q",
    0xD0: ">b",
    0xD1: ">h",
    0xD2: ">i",
    0xD3: ">q",
}
_TEXT_WIDTHS = {0xD9: 1, 0xDA: 2, 0xDB: 4}
_BYTES_WIDTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4}
_ARRAY_WIDTHS = {0xDC: 2, 0xDD: 4}
_MAP_WIDTHS = {0xDE: 2, 0xDF: 4}
_FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
_EXTENSION_WIDTHS = {0xC7: 1, 0xC8: 2, 0xC9: 4}
