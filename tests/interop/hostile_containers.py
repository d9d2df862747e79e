# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501 (one case a line reads as a table)
"""Sound pickles in bad containers: legacy streams, zip archives, model entries."""

import dataclasses
import struct
import zlib
from collections.abc import Callable

import good_files as good
from good_files import (
    Ordered,
    Raw,
    Tensor,
    ZipEntry,
    global_,
    legacy_file,
    program,
    tensor,
    text,
    zip_archive,
)
from hostile_case import Case

WEIGHT = Tensor("0", "float32", 4, (2, 2), (2, 1))
OTHER = Tensor("1", "int32", 2, (2,), (1,))
STORAGES = {
    "0": good.storage("float32", (1, 2, 3, 4)),
    "1": good.storage("int32", (5, 6)),
}
STATE = {"state_dict": {"w": WEIGHT, "b": OTHER}}
MAIN = program(STATE)


def legacy(**lies) -> bytes:
    return legacy_file(MAIN, STORAGES, **lies)


LEGACY_CASES = [
    Case(name, words, lambda lies=lies: legacy(**lies))
    for name, words, lies in [
        ("magic number off by one", "not a torch file", {"magic": program(good.MAGIC + 1)}),
        ("magic number that is a text", "not a torch file", {"magic": program("torch")}),
        ("magic number that is a dict", "not a torch file", {"magic": program({})}),
        ("magic pickle with a global", "is not accepted", {"magic": program(good.EMPTY_ORDERED)}),
        ("magic pickle of protocol 6", "protocol 6", {"magic": b"\x80\x06N."}),
        ("magic pickle without an end", "without STOP", {"magic": b"\x80\x02" + b"}" * 4096}),
        ("protocol 1000", "torch protocol 1000", {"protocol": program(1000)}),
        ("protocol that is True", "torch protocol True", {"protocol": program(True)}),
        ("protocol that is a text", "torch protocol '1001'", {"protocol": program("1001")}),
        ("big-endian", "little-endian", {"system": program({"little_endian": False})}),
        ("no endianness", "little-endian", {"system": program({})}),
        ("endianness that is 1", "little-endian", {"system": program({"little_endian": 1})}),
        ("system info that is a list", "little-endian", {"system": program([1])}),
        ("system info with a storage", "is not accepted", {"system": program({"little_endian": WEIGHT})}),
        ("no storage keys", "is missing", {"keys": program([])}),
        ("one storage key too few", "is missing", {"keys": program(["0"])}),
        ("one storage key too many", "never used", {"keys": program(["0", "1", "2"])}),
        ("storage key twice", "listed twice", {"keys": program(["0", "1", "1"])}),
        ("storage keys that are numbers", "not a list of texts", {"keys": program([0, 1])}),
        ("storage keys that are a dict", "not a list of texts", {"keys": program({"0": 1})}),
        ("storage keys with a global", "is not accepted", {"keys": program([good.EMPTY_ORDERED])}),
        ("storage size in the record", "has 3 elements", {"sizes": {"0": 3}}),
        ("negative size in the record", "has -1 elements", {"sizes": {"0": -1}}),
        ("size of 2**62 in the record", "elements, the pickle says", {"sizes": {"1": 2**62}}),
        ("one byte after the end", "bytes after the last", {"tail": b"\0"}),
        ("a second file after the end", "bytes after the last", {"tail": legacy()}),
        ("a zip after the end", "bytes after the last", {"tail": good.zip_sample()[0]}),
    ]
]  # fmt: skip

LEGACY_CASES += [
    Case(f"legacy cut at {where}", words, lambda cut=cut: legacy()[:cut])
    for where, words, cut in [
        ("2 bytes", "ends without STOP", 2),
        ("the magic number", "are left", 6),
        ("the protocol", "are left", 19),
        ("the main pickle", "pickle", 200),
        ("the first size", "expected here", -8 - 8 - 16 - 4),
        ("the first storage", "are left", -8 - 8 - 4),
        ("the last storage", "are left", -1),
    ]
]


def entries(main: bytes = MAIN, storages: good.Storages = STORAGES) -> list[ZipEntry]:
    return good.torch_entries(main, storages)


def changed(name: str, **fields) -> bytes:
    """The archive with some fields of one entry replaced."""
    return zip_archive(
        [
            dataclasses.replace(entry, **fields) if entry.name == name else entry
            for entry in entries()
        ]
    )


def without(name: str) -> bytes:
    return zip_archive([entry for entry in entries() if entry.name != name])


def plus(*more: ZipEntry) -> bytes:
    return zip_archive(entries() + list(more))


def deflated() -> bytes:
    """A storage of 8 MB of zeros in 8 kB."""
    packer = zlib.compressobj(9, wbits=-15)
    body = packer.compress(bytes(2**23)) + packer.flush()
    size = {"size": 2**23, "packed": len(body), "method": 8, "crc": 0}
    return changed("model/data/0", data=body, flags=0, local=size, central=size)


def miscounted(name: str, size: int) -> bytes:
    """All three copies of one checksum agree on a wrong value."""
    lie = b"PK\x07\x08" + struct.pack("<3I", 7, size, size)
    return changed(name, central={"crc": 7}, descriptor=lie)


def archive(**lies) -> bytes:
    return zip_archive(entries(), **lies)


def counted(count: int) -> bytes:
    """An archive without the 64-bit record whose end record counts wrong."""
    return archive(end={"count": count, "on_disk": count}, with_end64=False)


def overlapping() -> bytes:
    """A thousand directory entries for the same bytes."""
    names = [f"model/data/{index}" for index in range(2, 1002)]
    return zip_archive(
        [*entries(), *(ZipEntry(name, b"", central={"header": 0}) for name in names)]
    )


DATA = "model/data/0"
PICKLE = "model/data.pkl"
ZIP64 = struct.pack("<2H2Q", 1, 16, 2**40, 2**40)

ZIP_CASES = [
    Case(name, words, make)
    for name, words, make in [
        ("big-endian zip", "byteorder", lambda: changed("model/byteorder", data=b"big")),
        ("byteorder of nonsense", "byteorder", lambda: changed("model/byteorder", data=b"\xff" * 9)),
        ("byteorder of a megabyte", "at most", lambda: changed("model/byteorder", data=bytes(2**20))),
        ("version 99", "version", lambda: changed("model/version", data=b"99")),
        ("no data.pkl", "without the data.pkl", lambda: without(PICKLE)),
        ("no storage", "is missing", lambda: without(DATA)),
        ("storage never used", "never used", lambda: plus(ZipEntry("model/data/7", b"1234"))),
        ("storage too short", "has 12 bytes", lambda: changed(DATA, data=bytes(12))),
        ("storage too long", "has 20 bytes", lambda: changed(DATA, data=bytes(20))),
        ("bytes after the pickle", "after the pickle", lambda: changed(PICKLE, data=MAIN + b"x")),
        ("empty data.pkl", "without STOP", lambda: changed(PICKLE, data=b"")),
        ("33 MB of data.pkl", "at most", lambda: changed(PICKLE, data=bytes(33 * 2**20))),
        ("wrong checksum of the pickle", "damaged", lambda: miscounted(PICKLE, len(MAIN))),
        ("wrong checksum of a storage", "damaged", lambda: miscounted(DATA, 16)),
        ("compressed storage", "is compressed", deflated),
        ("unknown method", "method 99", lambda: changed(DATA, central={"method": 99})),
        ("method only in the local header", "disagree", lambda: changed(DATA, local={"method": 8})),
        ("packed size of its own", "is compressed", lambda: changed(DATA, central={"packed": 15})),
        ("version to come", "needs version 6.4", lambda: changed(DATA, central={"version": 64})),
        ("encrypted entry", "flags", lambda: changed(DATA, central={"flags": 0x0809})),
        ("flags that differ", "disagree", lambda: changed(DATA, local={"flags": 0x0800})),
        ("names that differ", "disagree", lambda: changed(DATA, local={"name": b"model/data/9"})),
        ("name only longer in front", "disagree", lambda: changed(DATA, local={"name": b"model/data/00"})),
        ("local signature", "disagree", lambda: changed(DATA, local={"signature": b"PK\x03\x05"})),
        ("local sizes that differ", "disagree", lambda: changed(DATA, local={"size": 8, "packed": 8, "crc": 1})),
        ("descriptor that differs", "descriptor", lambda: changed(DATA, descriptor=b"PK\x07\x08" + bytes(12))),
        ("descriptor missing", "descriptor", lambda: changed(DATA, descriptor=b"")),
        ("central signature", "malformed", lambda: changed(DATA, central={"signature": b"PK\x01\x03"})),
        ("comment on an entry", "malformed", lambda: changed(DATA, central={"comment": b"hi"})),
        ("entry on another disk", "malformed", lambda: changed(DATA, central={"disk": 1})),
        ("entry that starts elsewhere", "starts at", lambda: changed(DATA, central={"header": 5})),
        ("entry beyond the file", "starts at", lambda: changed(DATA, central={"header": 2**32 - 1})),
        ("size that covers the next entries", "descriptor", lambda: changed(DATA, central={"size": 400, "packed": 400})),
        ("size beyond the file", "expected here", lambda: changed(DATA, central={"size": 2**31, "packed": 2**31})),
        ("64-bit sizes", "64-bit sizes", lambda: changed(DATA, central={"extra": ZIP64})),
        ("64-bit sizes in front", "64-bit sizes", lambda: changed(DATA, local={"extra": ZIP64})),
        ("extra field cut short", "extra field", lambda: changed(DATA, central={"extra": b"\x05"})),
        ("extra field too long", "extra field", lambda: changed(DATA, central={"extra": b"FB\xff\x00"})),
        ("the same name twice", "appears twice", lambda: plus(ZipEntry(DATA, bytes(16)))),
        ("name with a parent folder", "with the name", lambda: plus(ZipEntry("model/../data/0", b""))),
        ("absolute name", "with the name", lambda: plus(ZipEntry("/etc/passwd", b""))),
        ("name with a backslash", "with the name", lambda: plus(ZipEntry("model\\data\\0", b""))),
        ("name with a zero byte", "with the name", lambda: plus(ZipEntry("model/data/0\0", b""))),
        ("name with a newline", "with the name", lambda: plus(ZipEntry("model/da\nta", b""))),
        ("name that is not UTF-8", "with the name", lambda: plus(ZipEntry(b"model/\xff", b""))),
        ("name of 300 bytes", "with the name", lambda: plus(ZipEntry("model/" + "a" * 300, b""))),
        ("a folder entry", "with the name", lambda: plus(ZipEntry("model/", b""))),
        ("an entry of another kind", "not part of", lambda: plus(ZipEntry("model/code/x.py", b"import os"))),
        ("TorchScript", "not part of", lambda: plus(ZipEntry("model/constants.pkl", b"N."))),
        ("an .npz file", "not part of", lambda: zip_archive([ZipEntry("w.npy", b"\x93NUMPY")])),
        ("two folders", "without the data.pkl", lambda: plus(ZipEntry("other/data.pkl", MAIN))),
        ("an entry the directory hides", "ends here", lambda: zip_archive([ZipEntry("model/data.pkl", b"N.", hidden=True), *entries()])),
        ("an entry hidden at the end", "between the zip entries", lambda: plus(ZipEntry("model/version", b"3", hidden=True))),
        ("bytes before an entry", "ends here", lambda: changed(DATA, before=b"x")),
        ("bytes after an entry", "ends here", lambda: changed(DATA, after=b"xyz")),
        ("bytes before the directory", "between the zip entries", lambda: archive(before_directory=b"x")),
        ("bytes after the directory", "does not end", lambda: archive(after_directory=b"x")),
        ("bytes after the end record", "end record", lambda: archive(tail=b"x")),
        ("a comment at the end", "end record", lambda: archive(end={"comment": b"hello"})),
        ("a comment that is a zip", "end record", lambda: archive(end={"comment": zip_archive(entries())})),
        ("two zips in a row", "out of place", lambda: zip_archive(entries()) + zip_archive(entries())),
        ("no end record", "end record", lambda: zip_archive(entries())[:-22]),
        ("a zip of 10 bytes", "cut short", lambda: zip_archive(entries())[:10]),
        ("end record of another disk", "several parts", lambda: archive(end={"disk": 1}, with_end64=False)),
        ("counts that differ", "several parts", lambda: archive(end={"on_disk": 1}, with_end64=False)),
        ("one entry more than there are", "zip directory", lambda: counted(10)),
        ("50,000 entries", "too short", lambda: counted(50_000)),
        ("one entry less", "after the last entry", lambda: counted(7)),
        ("directory elsewhere", "does not end", lambda: archive(end={"offset": 0}, with_end64=False)),
        ("directory of 4 GB", "does not end", lambda: archive(end={"length": 2**32 - 1}, with_end64=False)),
        ("end records that disagree", "disagree", lambda: archive(end64={"count": 5, "on_disk": 5})),
        ("2**63 entries", "disagree", lambda: archive(end64={"count": 2**63, "on_disk": 2**63})),
        ("2**63 entries twice", "at most", lambda: archive(end64={"count": 2**63, "on_disk": 2**63}, end={"count": 65535, "on_disk": 65535})),
        ("64-bit record elsewhere", "out of place", lambda: archive(locator={"offset": 0})),
        ("64-bit record of many disks", "out of place", lambda: archive(locator={"disks": 9})),
        ("64-bit record without its signature", "malformed", lambda: archive(end64={"signature": b"PK\x06\x05"})),
        ("64-bit record of another size", "malformed", lambda: archive(end64={"size": 45})),
        ("64-bit record of several parts", "several parts", lambda: archive(end64={"disk": 2})),
        ("directory that lists one entry often", "starts at", overlapping),
        ("a safetensors file in front", "unknown format", lambda: good.safetensors_sample()[0][:8] + zip_archive(entries())),
    ]
]  # fmt: skip


def content(value: object) -> Callable[[], bytes]:
    """A legacy stream with this value."""
    return lambda: legacy_file(program(value), STORAGES)


def both(extra: object = None) -> dict:
    """Mentions both storages, so that only the entry is at fault."""
    return {"optimizer": {"state": [WEIGHT, OTHER]}, "extra": extra}


W = {"w": WEIGHT}
B = {"b": OTHER}
LONG = "n" * 600

CONTENT_CASES = [
    Case(name, words, content(value))
    for name, words, value in [
        ("no tensors in a wrapper", "no model entry", both({})),
        ("only an unknown wrapper", "it holds 'weights'", {"weights": {**W, **B}}),
        ("two wrappers", "several model entries: 'state_dict', 'model'", {"model": W, "state_dict": B}),
        ("three wrappers", "'net'", {"net": W, "state_dict": B, "model": W}),
        ("wrapper beside tensors", "'(top level)'", {"state_dict": W, "b": OTHER}),
        ("number in the state dict", "'epoch' of 'state_dict' is 3", {"state_dict": {**W, **B, "epoch": 3}}),
        ("dict in the state dict", "is a dict", {"state_dict": {**W, "more": B}}),
        ("None in the state dict", "is None", {"model": {**W, **B, "extra": None}}),
        ("text in the state dict", "is 'x'", {"model": {**W, **B, "extra": "x"}}),
        ("list in the state dict", "is a list", {"model": {**W, "extra": [OTHER]}}),
        ("name that is a number", "array name 7", {"model": {**W, 7: OTHER}}),
        ("empty name", "array name ''", {"model": {**W, "": OTHER}}),
        ("name with a newline", "array name 'a\\nb'", {"model": {**W, "a\nb": OTHER}}),
        ("name with an escape sequence", "array name", {"model": {**W, "\x1b[2J": OTHER}}),
        ("name that turns text around", "array name", {"model": {**W, "a\u202eb": OTHER}}),
        ("name that is a path", "array name '../w'", {"model": {**W, "../w": OTHER}}),
        ("name that is an absolute path", "array name", {"model": {**W, "/etc/passwd": OTHER}}),
        ("name with a backslash", "array name", {"model": {**W, "a\\b": OTHER}}),
        ("name of 600 characters", "array name", {"model": {**W, LONG: OTHER}}),
        ("prefix and nothing else", "array name ''", {"model": {"module.": WEIGHT, "module.b": OTHER}}),
        ("a list of tensors", "content is a list", [WEIGHT, OTHER]),
        ("a whole model", "torch.nn.modules.conv", {"model": Raw(global_("torch.nn.modules.conv", "Conv2d") + b")R")}),
    ]
]  # fmt: skip


def sharing() -> bytes:
    """One tensor of 1 MB under 200 names."""
    data = {"0": good.storage("float32", [1.0])}
    data["0"] = ("float32", data["0"][1] * 2**18)
    view = Tensor("0", "float32", 2**18, (2**18,), (1,))
    first = text("w0") + tensor(view) + b"q\x00"
    rest = b"".join(text(f"w{i}") + b"h\x00" for i in range(1, 200))
    return legacy_file(b"\x80\x02}(" + first + rest + b"u.", data)


def with_values(dtype: str, values: tuple, raw: bytes | None = None) -> bytes:
    """A state dict whose second array holds these values."""
    stored = good.storage(dtype, values) if raw is None else (dtype, raw)
    size = len(stored[1]) // good.dtype_of(dtype).itemsize
    view = Tensor("1", dtype, size, (size,), (1,))
    state = Ordered({"w": WEIGHT, "odd": view})
    return legacy_file(program(state), {"0": STORAGES["0"], "1": stored})


NAN, INF = float("nan"), float("inf")

VALUE_CASES = [
    Case(name, words, make)
    for name, words, make in [
        ("one NaN in float32", "'odd' holds 1 NaN", lambda: with_values("float32", (1, NAN, 2))),
        ("infinities in float64", "'odd' holds 2 NaN", lambda: with_values("float64", (INF, -INF, 0))),
        ("NaN in float16", "'odd' holds 1 NaN", lambda: with_values("float16", (NAN, 1))),
        ("infinity in bfloat16", "'odd' holds 3 NaN", lambda: with_values("bfloat16", (INF, NAN, -INF, 1))),
        ("boolean of 2", "other than 0 and 1", lambda: with_values("bool", (), b"\x00\x01\x02")),
        ("boolean of 255", "other than 0 and 1", lambda: with_values("bool", (), b"\xff")),
        ("one tensor under 200 names", "by sharing storages", sharing),
    ]
]  # fmt: skip
