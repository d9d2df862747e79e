# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (one case a line reads as a table)
"""Bad safetensors and msgpack files, and files of no accepted format."""

import json
import struct
from collections.abc import Callable

import good_files as good
import numpy as np
from good_files import msgpack, msgpack_array, safetensors_file
from hostile_case import Case

W = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
B = {"dtype": "I64", "shape": [1], "data_offsets": [16, 24]}
PAYLOAD = np.arange(4, dtype="<f4").tobytes() + struct.pack("<q", 7)


def header(**changes) -> Callable[[], bytes]:
    """Two arrays, one or the other entry replaced or a third one added."""
    return lambda: safetensors_file({"w": W, "b": B} | changes, PAYLOAD)


def entry(**fields) -> Callable[[], bytes]:
    """The first entry with some fields replaced."""
    return header(w=W | fields)


def text(raw: str | bytes, **lies) -> Callable[[], bytes]:
    """A header that is not made by a JSON writer."""
    return lambda: safetensors_file(raw, PAYLOAD, **lies)


def empty(shape: list) -> Callable[[], bytes]:
    """A third array without elements."""
    return header(e={"dtype": "F32", "shape": shape, "data_offsets": [0, 0]})


PLAIN = json.dumps({"w": W, "b": B})
TWICE = PLAIN.replace('"w": ', f'"w": {json.dumps(W)}, "w": ')
INNER_TWICE = PLAIN.replace('"dtype"', '"dtype": "F32", "dtype"', 1)

SAFETENSORS_CASES = [
    Case(f"safetensors: {name}", words, make)
    for name, words, make in [
        ("header longer than the file", "in a file of", text(PLAIN, length=10_000)),
        ("header of 17 MB", "a header of", text(PLAIN, length=17 * 2**20)),
        ("header one byte short", "not JSON", text(PLAIN, length=len(PLAIN) - 1)),
        ("header one byte long", "not JSON", text(PLAIN, length=len(PLAIN) + 1)),
        ("no JSON", "not JSON", text("{hello}")),
        ("two JSON values", "not JSON", text(PLAIN + "{}")),
        ("not UTF-8", "not UTF-8", text(PLAIN.encode().replace(b'"w"', b'"\xff"'))),
        ("lone surrogate as a name", "array name", text(PLAIN.replace('"w"', '"\\ud800"'))),
        ("duplicate name", "duplicate key 'w'", text(TWICE)),
        ("duplicate field", "duplicate key 'dtype'", text(INNER_TWICE)),
        ("nested too deeply", "nested too deeply", text('{"w": ' + "[" * 100_000 + "]" * 100_000 + "}")),
        ("number of 5000 digits", "5000 digits", text(PLAIN.replace("16", "1" * 5000, 1))),
        ("number that is a float", "the number '16.0'", text(PLAIN.replace("16", "16.0", 1))),
        ("number with an exponent", "the number '1e999'", text(PLAIN.replace("16", "1e999", 1))),
        ("number that is NaN", "the number 'NaN'", text(PLAIN.replace("16", "NaN", 1))),
        ("no arrays", "no arrays", text("{}")),
        ("only metadata", "no arrays", text('{"__metadata__": {"a": "b"}}')),
        ("metadata that is a list", "mapping of texts", header(__metadata__=["a"])),
        ("size of minus zero", "negative number -0", text(PLAIN.replace("0", "-0", 1))),
        ("metadata with half a surrogate", "half a surrogate", text(PLAIN.replace("{", '{"__metadata__": {"a": "\\udc00"}, ', 1))),
        ("metadata with a number", "mapping of texts", header(__metadata__={"a": 1})),
        ("entry that is a list", "without exactly", header(w=[1])),
        ("entry without a dtype", "without exactly", header(w={"shape": [4], "data_offsets": [0, 16]})),
        ("entry with a field too many", "without exactly", entry(extra=1)),
        ("unknown dtype", "dtype 'F8_E4M3'", entry(dtype="F8_E4M3")),
        ("dtype I4", "dtype 'I4'", entry(dtype="I4")),
        ("complex dtype", "dtype 'C64'", entry(dtype="C64")),
        ("dtype in lower case", "dtype 'f32'", entry(dtype="f32")),
        ("dtype that is a list", "dtype a list", entry(dtype=["F32"])),
        ("shape that is a number", "shape 4", entry(shape=4)),
        ("shape with a text", "a size of '2'", entry(shape=["2", 2])),
        ("shape with a bool", "a size of True", entry(shape=[True, 4])),
        ("negative size", "negative number -2", entry(shape=[-2, -2])),
        ("size of 2**63", "more than", entry(shape=[2**63])),
        ("size of 10**19", "more than", entry(shape=[10**19])),
        ("product that wraps to 4", "more than", entry(shape=[2**32 + 1, 2**32, 2**32])),
        ("17 axes", "17 axes", entry(shape=[1] * 16 + [4])),
        ("empty with huge axes", "more than", empty([0, 2**40, 2**40])),
        ("shape larger than its bytes", "which needs 24 bytes", entry(shape=[2, 3])),
        ("shape smaller than its bytes", "which needs 12 bytes", entry(shape=[3])),
        ("wider dtype", "which needs 32 bytes", entry(dtype="F64")),
        ("one offset", "not two integers", entry(data_offsets=[0])),
        ("three offsets", "not two integers", entry(data_offsets=[0, 8, 16])),
        ("offset that is a bool", "not two integers", entry(data_offsets=[False, 16])),
        ("offset that is a text", "not two integers", entry(data_offsets=["0", 16])),
        ("offsets the wrong way round", "data_offsets [16, 0]", entry(data_offsets=[16, 0])),
        ("negative offset", "negative number -16", entry(data_offsets=[-16, 0])),
        ("offsets beyond the file", "it ends at byte", entry(data_offsets=[2**40, 2**40 + 16])),
        ("offsets that overlap", "ends at", header(b=B | {"data_offsets": [8, 16]})),
        ("two names for one range", "ends at", header(c=W)),
        ("a gap between arrays", "ends at", lambda: safetensors_file({"w": W, "b": B | {"data_offsets": [17, 25]}}, PAYLOAD + b"x")),
        ("a gap before the first", "ends at", lambda: safetensors_file({"b": B}, PAYLOAD)),
        ("bytes after the last", "the arrays end", lambda: safetensors_file({"w": W, "b": B}, PAYLOAD + b"x")),
        ("a zip after the last", "the arrays end", lambda: good.safetensors_sample()[0] + good.zip_sample()[0]),
        ("payload cut short", "it ends at byte", lambda: safetensors_file({"w": W, "b": B}, PAYLOAD[:-1])),
        ("no payload", "it ends at byte", lambda: safetensors_file({"w": W, "b": B}, b"")),
        ("empty name", "array name ''", header(**{"": B})),
        ("name with a newline", "array name 'a\\nb'", header(**{"a\nb": B})),
        ("name that is a path", "array name '../../w'", header(**{"../../w": B})),
        ("name of 600 characters", "array name", header(**{"n" * 600: B})),
        ("NaN", "'w' holds 2 NaN", lambda: safetensors_file({"w": W, "b": B}, struct.pack("<4f", 1, float("nan"), 2, float("inf")) + bytes(8))),
        ("boolean of 2", "other than 0 and 1", lambda: safetensors_file({"w": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\x01\x02")),
    ]
]  # fmt: skip

ARRAY = np.arange(6, dtype="<f4").reshape(2, 3)
RAW = ARRAY.tobytes()


def tree(leaf: object) -> Callable[[], bytes]:
    """Flax variables with one odd leaf."""
    return lambda: msgpack({"params": {"good": ARRAY, "odd": leaf}})


def array(shape: object = (2, 3), dtype: object = "float32", raw: bytes = RAW, **lies):
    return tree(msgpack_array(shape, dtype, raw, **lies))


def split(shape: dict, chunks: dict, mark: object = True) -> Callable[[], bytes]:
    return tree(split_parts(shape, chunks, mark))


def split_parts(shape: dict, chunks: dict, mark: object = True) -> dict:
    return {"__msgpack_chunked_array__": mark, "shape": shape, "chunks": chunks}


FLAT = np.arange(3, dtype="<f4")
SHAPE = {"0": 2, "1": 3}

MSGPACK_CASES = [
    Case(f"msgpack: {name}", words, make)
    for name, words, make in [
        ("bytes after the value", "bytes after", lambda: good.msgpack_sample()[0] + b"\0"),
        ("cut in a container", "a container of", lambda: b"\x82\xa6params\x81"),
        ("cut in an array", "beyond the file", lambda: good.msgpack_sample()[0][:60]),
        ("map of 2**32 entries", "a container of", tree(b"\xdf\xff\xff\xff\xff")),
        ("array of 2**32 entries", "a container of", tree(b"\xdd\xff\xff\xff\xff")),
        ("text of 2**32 bytes", "a text of", tree(b"\xdb\xff\xff\xff\xff")),
        ("text of 5000 bytes", "a text of 5000", tree("a" * 5000)),
        ("text that is not UTF-8", "not UTF-8", tree(b"\xa2\xff\xfe")),
        ("bytes outside an array", "type code 0xc4", tree(b"\xc4\x01x")),
        ("code that is never used", "type code 0xc1", tree(b"\xc1")),
        ("timestamp", "extension type 255", tree(b"\xd6\xff\x00\x00\x00\x00")),
        ("complex number", "extension type 2", tree(b"\xc7\x03\x02\x92\x01\x02")),
        ("unknown extension", "extension type 77", array(kind=77)),
        ("extension of 2**32 bytes", "beyond the file", array(length=2**32 - 1)),
        ("extension too short", "are left in its extension", array(length=20)),
        ("extension too long", "beyond the file", array(length=49)),
        ("extension that takes the next value", "are left in its extension", lambda: array(length=47)() + b"\xc0" * 9),
        ("extension that is empty", "an array of dtype", tree(b"\xd4\x01\x00")),
        ("array content of two parts", "an array of dtype", tree(b"\xd6\x01\x92\x90\xa1f")),
        ("bytes fewer than the shape", "needs 24 bytes", array(raw=RAW[:-4])),
        ("bytes more than the shape", "needs 24 bytes", array(raw=RAW + bytes(4))),
        ("declared bytes beyond the file", "needs 24 bytes", array(count=2**32 - 1)),
        ("shape of 2**62", "more than", array(shape=(2**62,))),
        ("product that wraps to 6", "more than", array(shape=(2**32, 2**32, 6))),
        ("negative size", "a size of -2", array(shape=(-2, -3))),
        ("size that is a float", "a size of 2.0", array(shape=(2.0, 3))),
        ("size that is a bool", "a size of True", array(shape=(True, 6))),
        ("17 axes", "17 axes", array(shape=(1,) * 17)),
        ("shape that is a number", "an array of dtype", array(shape=6)),
        ("shape of shapes", "nested deeper", array(shape=((2,), (3,)))),
        ("unknown dtype", "dtype 'float8_e4m3fn'", array(dtype="float8_e4m3fn")),
        ("object dtype", "dtype 'object'", array(dtype="object")),
        ("structured dtype", "dtype 'f4,f4'", array(dtype="f4,f4")),
        ("big-endian dtype", "dtype '>f4'", array(dtype=">f4")),
        ("complex dtype", "dtype 'complex64'", array(dtype="complex64")),
        ("dtype that is a number", "a dtype that is 4", array(dtype=4)),
        ("array bytes that are a text", "array bytes of type code", tree(b"\xc7\x0a\x01\x93\x91\x01\xa4int8\xa1x ")),
        ("scalar with a shape", "numpy scalar of shape", array(kind=3)),
        ("65 maps deep", "nested deeper", tree(b"\x81\xa1a" * 70 + b"\xc0")),
        ("100,000 arrays deep", "nested deeper", tree(b"\x91" * 100_000 + b"\xc0")),
        ("key that is a number", "a map key that is 1", tree(b"\x81\x01\xc0")),
        ("key that is None", "a map key that is None", tree(b"\x81\xc0\xc0")),
        ("key that is a map", "nested deeper", tree(b"\x81\x80\xc0")),
        ("key that is an array of numbers", "a map key that is", tree(b"\x81" + msgpack_array((1,), "int8", b"a") + b"\xc0")),
        ("duplicate key", "duplicate key 'a'", tree(b"\x82\xa1a\xc0\xa1a\xc0")),
        ("leaf that is a number", "'params/odd' is 3", tree(3)),
        ("leaf that is None", "'params/odd' is None", tree(None)),
        ("leaf that is a list", "'params/odd' is a list", tree([ARRAY])),
        ("name that is a path", "array name 'params/odd/..'", tree({"..": ARRAY})),
        ("name with a newline", "array name", tree({"a\nb": ARRAY})),
        ("two ways to one name", "duplicate array", lambda: msgpack({"params": {"a/b": ARRAY, "a": {"b": ARRAY}}})),
        ("names that grow", "array name", tree(b"\x81\xda\x02\x00" + b"n" * 512 + b"\x81\xa1a\xc0")),
        ("no arrays", "model entry is empty", lambda: msgpack({"params": {}})),
        ("two model entries", "several model entries", lambda: msgpack({"params": {"a": ARRAY}, "model": {"params": {"a": ARRAY}}})),
        ("split array of no bytes", "a split array of", split(SHAPE, {})),
        ("split array too short", "with 12 bytes", split(SHAPE, {"0": FLAT})),
        ("split array of two dtypes", "of 2 dtypes", split(SHAPE, {"0": FLAT, "1": FLAT.astype("<i4")})),
        ("split array of matrices", "not a flat array", split(SHAPE, {"0": ARRAY})),
        ("split array in a split array", "not a flat array", split(SHAPE, {"0": split_parts({"0": 3}, {"0": FLAT})})),
        ("split array without numbers", "not numbered", split(SHAPE, {"a": FLAT, "b": FLAT})),
        ("split array that says no", "malformed split", split(SHAPE, {"0": FLAT}, mark=False)),
        ("split array of 2**80", "more than", split({"0": 2**40, "1": 2**40}, {"0": FLAT})),
        ("infinity in bfloat16", "holds 1 NaN", tree(np.array([1, np.inf], good.dtype_of("bfloat16")))),
        ("boolean of 7", "other than 0 and 1", array((1,), "bool", b"\x07")),
    ]
]  # fmt: skip

UNKNOWN_CASES = [
    Case(f"unknown: {name}", words, lambda raw=raw: raw)
    for name, words, raw in [
        ("empty file", "the file is empty", b""),
        ("one zero byte", "unknown format", b"\0"),
        ("one byte 0x80", "unknown format", b"\x80"),
        ("text", "unknown format", b"hello, I am a model\n"),
        (
            "Git LFS pointer",
            "b'version https:",
            b"version https://git-lfs.github.com/spec/v1\n",
        ),
        ("HTML", "unknown format", b"<!DOCTYPE html><html></html>"),
        ("JSON", "unknown format", b'{"w": [1, 2, 3]}'),
        ("pickle of protocol 0", "unknown format", b"(dp0\nS'a'\np1\nI1\ns."),
        (
            "pickle that is no torch file",
            "not a torch file",
            good.program({"w": [1, 2]}),
        ),
        ("pickle of a number", "not a torch file", good.program(5)),
        ("numpy array", "unknown format", b"\x93NUMPY\x01\x00v\x00{'descr': '|O'}"),
        ("HDF5", "a map key that is 72", b"\x89HDF\r\n\x1a\n" + bytes(64)),
        ("gzip", "unknown format", b"\x1f\x8b\x08" + bytes(32)),
        ("tar", "unknown format", b"weights".ljust(257, b"\0") + b"ustar" + bytes(250)),
        ("ONNX", "unknown format", b"\x08\x0a\x12\x07pytorch" + bytes(32)),
        ("ELF", "unknown format", b"\x7fELF" + bytes(60)),
        ("a megabyte of zeros", "unknown format", bytes(2**20)),
        ("an empty zip", "unknown format", b"PK\x05\x06" + bytes(18)),
        ("self-extracting zip", "unknown format", b"MZ" + good.zip_sample()[0]),
        ("torch file behind a zero", "unknown format", b"\0" + good.legacy_sample()[0]),
    ]
]


def pickle_bomb(unit: bytes, count: int, start: bytes = b"") -> Callable[[], bytes]:
    """A main pickle that repeats a few opcodes."""
    body = b"\x80\x02" + start + b"(" + unit * count + b"."
    return lambda: good.legacy_file(body, {})


def many_entries() -> bytes:
    """A safetensors header of 200,000 arrays that share no bytes."""
    one = '"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    return safetensors_file("{" + ",".join(one % i for i in range(200_000)) + "}", b"")


ORDERED = good.global_("collections", "OrderedDict") + b"q\x00"

BOMB_CASES = [
    Case(f"bomb: {name}", words, make)
    for name, words, make in [
        ("two million dicts", "containers", pickle_bomb(b"}", 2_000_000)),
        ("a million dicts in the memo", "containers", pickle_bomb(b"}\x94", 1_000_000)),
        ("a million small dicts", "containers", pickle_bomb(b"}K\x01Ns", 1_000_000)),
        ("a million OrderedDicts", "containers", pickle_bomb(b"h\x00)R", 1_000_000, ORDERED)),
        ("a tuple two million deep", "opcodes", lambda: good.legacy_file(b"\x80\x02)" + b"\x85" * 2_000_000 + b".", {})),
        ("two million marks", "opcodes", pickle_bomb(b"(", 2_000_000)),
        ("fourteen million characters, some emoji", "of text", pickle_bomb(b"X\xff\xff\x0f\x00" + b"a" * (2**20 - 5) + "\U0001f600".encode(), 14)),
        ("750,000 tuples in a list", "containers", lambda: good.legacy_file(b"\x80\x02](N\x85q\x00" + (b"h\x00" + b"\x85" * 50) * 15_000 + b"e.", {})),
        ("200,000 arrays", "more than 50000 arrays", many_entries),
        ("a million JSON objects", "more than 50000 arrays", lambda: safetensors_file('{"w":[' + "{}," * 10**6 + "{}]}", b"")),
        ("a million JSON lists", "lists in the header", lambda: safetensors_file('{"w":[' + "[]," * 10**6 + "[]]}", b"")),
        ("1.7 million metadata texts", "more than 270001 texts", lambda: safetensors_file('{"__metadata__":{' + '"abcd":"",' * 1_670_000 + '"a":""}}', b"")),
        ("130,000 metadata texts", "130000 entries of metadata", lambda: safetensors_file({"__metadata__": {f"{i:x}": "" for i in range(130_000)}}, b"")),
        ("a shape of four million axes", "more than 410000 commas", lambda: safetensors_file('{"w":{"dtype":"U8","data_offsets":[0,0],"shape":[' + "0," * 4_200_000 + "0]}}", b"")),
        ("a JSON text of quotes that does not end", "not JSON", lambda: safetensors_file('{"' + '\\"' * 8_000_000, b"")),
        ("15 MB of JSON text", "not JSON", lambda: safetensors_file('{"' + "\\u00e4" * (15 * 2**20 // 6), b"")),
        ("15 MB of JSON text with an emoji", "array name", lambda: safetensors_file('{"\U0001f600' + "a" * (15 * 2**20) + '":1}', b"")),
        ("a million msgpack maps", "more than 300000 values", tree(b"\xdd\x00\x0f\x42\x40" + b"\x80" * 10**6)),
        ("a million msgpack numbers", "more than 300000 values", tree(b"\xdd\x00\x0f\x42\x40" + b"\x01" * 10**6)),
        ("60,000 msgpack arrays", "more than 50000 arrays", tree(b"\xdd\x00\x00\xea\x60" + msgpack_array((0,), "int8", b"") * 60_000)),
    ]
]  # fmt: skip
