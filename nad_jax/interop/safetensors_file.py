# SPDX-License-Identifier: Apache-2.0
"""Reads and writes safetensors files.

    8 bytes     length n of the header, little-endian
    n bytes     JSON: name -> {"dtype", "shape", "data_offsets"}, and "__metadata__"
    the rest    the arrays, row-major, little-endian

The reader is stricter than the format asks: a key that appears twice, a gap, an
overlap, a byte too many or too few, a number that is not an integer are all refused,
because another reader might resolve them differently.
"""

import json
import math
import os
import re
from collections.abc import Mapping

import numpy as np

from nad_jax import errors, whole_file
from nad_jax.interop import bounded_file, limits, model_entry, stored_array
from nad_jax.interop.bounded_file import Refusal, shown

_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {stored_array.DTYPES[name]: code for code, name in _DTYPES.items()}
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_DIGITS = 20
# A text of JSON, or what is left of one that does not end, or a comma between texts.
# Possessive and without an end that it must find, so that it reads each byte once.
_TEXT_OR_COMMA = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?+|,', re.DOTALL)
_COMMA = ord(",")


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays of a safetensors file by name, and its metadata.

    Returns:
        Read-only arrays in the order of their bytes; metadata texts by name.

    Raises:
        InputError: for anything that is not exactly such a file.
    """
    with bounded_file.BoundedFile(path) as file:
        return read_open_file(file)


def read_open_file(
    file: bounded_file.BoundedFile,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """`read_safetensors` of a file that is open already."""
    try:
        header, data_start = _read_header(file)
        metadata = _checked_metadata(header.pop(_METADATA, {}))
        arrays = _arrays(file, header, data_start)
    except Refusal as refusal:
        raise file.error(f"safetensors: {refusal}") from None
    return stored_array.load_all(arrays, file), metadata


def looks_like_safetensors(file: bounded_file.BoundedFile) -> bool:
    """Whether the file begins with a possible header length and a brace."""
    if file.size < 10:
        return False
    start = file.read(0, 9)
    # The bound of the format, so that a header beyond ours is refused by name.
    return int.from_bytes(start[:8], "little") <= 10**8 and start[8:] == b"{"


def _read_header(file: bounded_file.BoundedFile) -> tuple[dict, int]:
    if file.size < 8:
        raise Refusal("shorter than the length of its header")
    length = int.from_bytes(file.read(0, 8), "little")
    if length > limits.MAX_HEADER_BYTES:
        raise Refusal(
            f"a header of {length} bytes; at most {limits.MAX_HEADER_BYTES} are read"
        )
    if 8 + length > file.size:
        raise Refusal(f"a header of {length} bytes in a file of {file.size}")
    raw = file.read(8, length)
    # Parsed JSON is up to 24 times its text; these bound it before it exists.
    if raw.count(b"{") > limits.MAX_TENSORS + 2:
        raise Refusal(f"more than {limits.MAX_TENSORS} arrays")
    if raw.count(b"[") > 2 * limits.MAX_TENSORS:
        raise Refusal(f"more than {2 * limits.MAX_TENSORS} lists in the header")
    if raw[:1] != b"{":
        raise Refusal("a header that does not begin with a brace")
    _check_counts(raw)
    return _parsed(raw), 8 + length


def _check_counts(raw: bytes) -> None:
    """Refuses a header of many texts or of many numbers, each of which costs time.

    A text may itself hold JSON, as an artefact's card does; what is in it is not
    counted.
    """
    texts = commas = 0
    for token in _TEXT_OR_COMMA.finditer(raw):
        if raw[token.start()] == _COMMA:
            commas += 1
        else:
            texts += 1
        if texts > limits.MAX_HEADER_TEXTS:
            raise Refusal(f"more than {limits.MAX_HEADER_TEXTS} texts in the header")
        if commas > limits.MAX_HEADER_COMMAS:
            raise Refusal(f"more than {limits.MAX_HEADER_COMMAS} commas in the header")


def _parsed(raw: bytes) -> dict:
    try:
        header = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except UnicodeDecodeError:
        raise Refusal("a header that is not UTF-8") from None
    except RecursionError:
        raise Refusal("a header nested too deeply") from None
    except json.JSONDecodeError as problem:
        raise Refusal(f"a header that is not JSON: {problem.msg}") from None
    if not isinstance(header, dict):
        raise Refusal("a header that is not a JSON object")
    return header


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    result: dict[str, object] = {}
    for key, value in pairs:
        if key in result:
            raise Refusal(f"duplicate key {shown(key)}")
        result[key] = value
    return result


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise Refusal(f"a number of {len(digits)} digits in the header")
    # Also -0, which some readers take for 0 and some for an error.
    if digits.startswith("-"):
        raise Refusal(f"the negative number {digits} in the header")
    return int(digits)


def _no_number(text: str) -> float:
    raise Refusal(f"the number {shown(text)} in the header; expected integers")


def _checked_metadata(metadata: object) -> dict[str, str]:
    if isinstance(metadata, dict) and len(metadata) > limits.MAX_HEADER_NOTES:
        raise Refusal(
            f"{len(metadata)} entries of metadata; at most {limits.MAX_HEADER_NOTES} "
            "are read"
        )
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise Refusal("metadata that is not a mapping of texts")
    try:
        "".join(part for pair in metadata.items() for part in pair).encode()
    except UnicodeEncodeError:
        raise Refusal("metadata with half a surrogate pair") from None
    return metadata


def _arrays(
    file: bounded_file.BoundedFile, header: dict, data_start: int
) -> dict[str, stored_array.StoredArray]:
    arrays: dict[str, stored_array.PackedArray] = {}
    for name, fields in header.items():
        if not model_entry.is_sane_name(name):
            raise Refusal(f"array name {shown(name)}")
        try:
            arrays[name] = _array(file, fields, data_start)
        except Refusal as refusal:
            raise Refusal(f"{shown(name)}: {refusal}") from None
    if not arrays:
        raise Refusal("no arrays")
    # Empty arrays sort before the one that starts where they are.
    ordered = sorted(arrays.items(), key=lambda item: item[1].pieces[0])
    position = data_start
    for name, array in ordered:
        start, count = array.pieces[0]
        if start != position:
            raise Refusal(
                f"{shown(name)} starts at byte {start}, the array before it ends at "
                f"{position}"
            )
        position += count
    if position != file.size:
        raise Refusal(f"the arrays end at byte {position} of {file.size}")
    return dict(ordered)


def _array(
    file: bounded_file.BoundedFile, fields: object, data_start: int
) -> stored_array.PackedArray:
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise Refusal("an entry without exactly dtype, shape and data_offsets")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise Refusal(f"dtype {shown(code)}; accepted are {', '.join(_DTYPES)}")
    if not isinstance(shape, list):
        raise Refusal(f"shape {shown(shape)}; expected a list")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
    ):
        raise Refusal("data_offsets that are not two integers")
    dtype = stored_array.DTYPES[_DTYPES[code]]
    sizes = stored_array.checked_shape(shape)
    start, end = offsets
    declared = math.prod(sizes) * dtype.itemsize
    if end - start != declared:
        raise Refusal(
            f"data_offsets [{start}, {end}] for {code} {list(sizes)}, which needs "
            f"{declared} bytes"
        )
    if data_start + end > file.size:
        raise Refusal(f"it ends at byte {data_start + end} of {file.size}")
    return stored_array.PackedArray(
        dtype, sizes, file, ((data_start + start, declared),)
    )


def write_safetensors(
    path: str | os.PathLike[str],
    arrays: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `arrays` so that the file appears complete or not at all.

    Args:
        path: an existing file is replaced.
        arrays: by name; dtypes as in `stored_array.DTYPES`, any strides and byte order.
        metadata: texts by name.

    Raises:
        InputError: for a name, dtype or metadata the reader would refuse, or if the
            file cannot be written.
    """
    ready = {name: _writable(name, array) for name, array in arrays.items()}
    if not ready:
        raise errors.InputError("no arrays to write; expected at least one")
    notes = dict(metadata or {})
    if not all(isinstance(part, str) for pair in notes.items() for part in pair):
        raise errors.InputError("safetensors metadata must map texts to texts")
    if len(notes) > limits.MAX_HEADER_NOTES:
        raise errors.InputError(
            f"{len(notes)} entries of safetensors metadata; at most "
            f"{limits.MAX_HEADER_NOTES} are written"
        )
    # Widest first keeps every array aligned; the name makes the file reproducible.
    order = sorted(ready, key=lambda name: (-ready[name].dtype.itemsize, name))
    header: dict[str, object] = {_METADATA: notes} if notes else {}
    position = 0
    for name in order:
        array = ready[name]
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > limits.MAX_HEADER_BYTES:
        raise errors.InputError(
            f"a safetensors header of {len(text)} bytes; at most "
            f"{limits.MAX_HEADER_BYTES} are written"
        )
    parts: list[bytes | memoryview] = [len(text).to_bytes(8, "little"), text]
    parts += [ready[name].reshape(-1).view(np.uint8).data for name in order]
    whole_file.write_bytes(path, *parts)


def _writable(name: str, array: np.ndarray) -> np.ndarray:
    if name == _METADATA or not model_entry.is_sane_name(name):
        raise errors.InputError(f"array name {shown(name)} cannot be written")
    little = array.dtype.newbyteorder("<")
    if little not in _CODES:
        raise errors.InputError(
            f"{shown(name)} has dtype {array.dtype}; accepted are "
            f"{', '.join(stored_array.DTYPES)}"
        )
    # asarray with order C, not ascontiguousarray, which turns a scalar into a vector.
    return np.asarray(array, dtype=little, order="C")
