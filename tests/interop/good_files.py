# SPDX-License-Identifier: Apache-2.0
"""Honest model files, written byte by byte without torch, flax or safetensors.

Each builder also knows the arrays a reader must find, computed here from a flat storage
with plain index arithmetic and not with the library under test.
"""

import dataclasses
import functools
import itertools
import json
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C

STORAGE_CLASSES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
SAFETENSORS_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint64": "U64",
    "uint32": "U32",
    "uint16": "U16",
    "uint8": "U8",
    "bool": "BOOL",
}


def dtype_of(name: str) -> np.dtype:
    """The little-endian numpy dtype of that name."""
    if name == "bfloat16":
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name).newbyteorder("<")


# Pickle ----------------------------------------------------------------------


class Raw(bytes):
    """Opcodes to paste into a pickle where a value stands."""


@dataclasses.dataclass(frozen=True)
class Ordered:
    """A dict written as an OrderedDict, as `state_dict` returns it."""

    items: dict
    metadata: bool = False


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, in elements."""

    storage: str
    dtype: str
    storage_size: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    parameter: bool = False


def global_(module: str, name: str) -> Raw:
    return Raw(f"c{module}\n{name}\n".encode())


def text(value: str) -> Raw:
    raw = value.encode()
    return Raw(b"X" + struct.pack("<I", len(raw)) + raw)


def integer(value: int) -> Raw:
    if 0 <= value < 256:
        return Raw(b"K" + bytes([value]))
    if 0 <= value < 65536:
        return Raw(b"M" + struct.pack("<H", value))
    if -(2**31) <= value < 2**31:
        return Raw(b"J" + struct.pack("<i", value))
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return Raw(b"\x8a" + bytes([len(raw)]) + raw)


def tuple_(*values: object) -> Raw:
    return Raw(b"(" + b"".join(opcodes(value) for value in values) + b"t")


def reduce(function: bytes, *arguments: object) -> Raw:
    return Raw(function + tuple_(*arguments) + b"R")


def mapping(pairs: Iterable[tuple[object, object]], start: bytes = b"}") -> Raw:
    body = b"".join(opcodes(key) + opcodes(value) for key, value in pairs)
    return Raw(start + (b"(" + body + b"u" if body else b""))


EMPTY_ORDERED = reduce(global_("collections", "OrderedDict"))


def storage_id(
    key: str, dtype: str, size: int, view: object = None, *, legacy: bool = True
) -> Raw:
    kind = global_("torch", STORAGE_CLASSES[dtype])
    tail = (view,) if legacy else ()
    return Raw(tuple_("storage", kind, key, "cpu", size, *tail) + b"Q")


def tensor(value: Tensor, *, legacy: bool = True) -> Raw:
    data = reduce(
        global_("torch._utils", "_rebuild_tensor_v2"),
        storage_id(value.storage, value.dtype, value.storage_size, legacy=legacy),
        value.offset,
        value.shape,
        value.strides,
        False,
        EMPTY_ORDERED,
    )
    if not value.parameter:
        return data
    rebuild = global_("torch._utils", "_rebuild_parameter")
    return reduce(rebuild, data, True, EMPTY_ORDERED)


def opcodes(value: object, *, legacy: bool = True) -> bytes:
    """The opcodes, without PROTO and STOP, that leave `value` on the stack."""
    if isinstance(value, Raw):
        return value
    if isinstance(value, Tensor):
        return tensor(value, legacy=legacy)
    if isinstance(value, Ordered):
        pairs = [(k, Raw(opcodes(v, legacy=legacy))) for k, v in value.items.items()]
        body = mapping(pairs, EMPTY_ORDERED)
        version = Ordered({"": {"version": 1}})
        return body + (
            opcodes({"_metadata": version}) + b"b" if value.metadata else b""
        )
    if isinstance(value, dict):
        return mapping((k, Raw(opcodes(v, legacy=legacy))) for k, v in value.items())
    if isinstance(value, list):
        return b"](" + b"".join(opcodes(v, legacy=legacy) for v in value) + b"e"
    if isinstance(value, tuple):
        return tuple_(*value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, int):
        return integer(value)
    raise TypeError(type(value))


def program(value: object, *, legacy: bool = True) -> bytes:
    """A whole pickle of protocol 2."""
    return b"\x80\x02" + opcodes(value, legacy=legacy) + b"."


# Zip -------------------------------------------------------------------------


@dataclasses.dataclass
class ZipEntry:
    """One entry and the lies to tell about it: header field -> value."""

    name: str | bytes
    data: bytes
    flags: int = 0x0808
    local: dict = dataclasses.field(default_factory=dict)
    central: dict = dataclasses.field(default_factory=dict)
    descriptor: bytes | None = None
    before: bytes = b""
    after: bytes = b""
    hidden: bool = False

    @property
    def raw_name(self) -> bytes:
        return self.name if isinstance(self.name, bytes) else self.name.encode()


def zip_archive(
    entries: Sequence[ZipEntry],
    *,
    end: dict | None = None,
    end64: dict | None = None,
    locator: dict | None = None,
    with_end64: bool = True,
    before_directory: bytes = b"",
    after_directory: bytes = b"",
    tail: bytes = b"",
) -> bytes:
    """An archive laid out as torch writes it, every field open to a lie."""
    body = b""
    central = b""
    for entry in entries:
        body += entry.before
        header = len(body)
        late = bool(entry.flags & 8)
        truth = {"crc": zlib.crc32(entry.data), "packed": len(entry.data)}
        truth |= {"size": len(entry.data), "method": 0, "flags": entry.flags}
        truth |= {"name": entry.raw_name, "signature": None, "extra": None}
        pad = -(header + 30 + len(entry.raw_name) + 4) % 64
        padding = b"FB" + struct.pack("<H", pad) + b"Z" * pad
        zeros = {"crc": 0, "packed": 0, "size": 0} if late else {}
        body += _local_header({**truth, **zeros, "extra": padding} | entry.local)
        body += entry.data
        if late:
            sizes = (truth["crc"], truth["packed"], truth["size"])
            plain = b"PK\x07\x08" + struct.pack("<3I", *sizes)
            body += plain if entry.descriptor is None else entry.descriptor
        body += entry.after
        if not entry.hidden:
            where = {"header": header, "disk": 0, "comment": b"", "extra": b""}
            central += _central_header({**truth, **where} | entry.central)
    body += before_directory
    count = sum(not entry.hidden for entry in entries)
    start = len(body)
    body += central + after_directory
    facts = {"count": count, "on_disk": count, "length": len(central), "offset": start}
    facts |= {"disk": 0, "directory_disk": 0}
    if with_end64:
        record = {**facts, "size": 44, "signature": b"PK\x06\x06"} | (end64 or {})
        where = {"offset": len(body), "disk": 0, "disks": 1} | (locator or {})
        body += _end64(record)
        body += b"PK\x06\x07" + struct.pack(
            "<IQI", where["disk"], where["offset"], where["disks"]
        )
    closing = {**facts, "comment": b""} | (end or {})
    body += b"PK\x05\x06" + struct.pack(
        "<4H2IH",
        closing["disk"],
        closing["directory_disk"],
        closing["on_disk"],
        closing["count"],
        closing["length"],
        closing["offset"],
        closing.get("comment_length", len(closing["comment"])),
    )
    return body + closing["comment"] + tail


def _local_header(f: dict) -> bytes:
    return (
        struct.pack(
            "<4s5H3I2H",
            f["signature"] or b"PK\x03\x04",
            0,
            f["flags"],
            f["method"],
            0,
            0,
            f["crc"],
            f["packed"],
            f["size"],
            f.get("name_length", len(f["name"])),
            f.get("extra_length", len(f["extra"])),
        )
        + f["name"]
        + f["extra"]
    )


def _central_header(f: dict) -> bytes:
    return (
        struct.pack(
            "<4s6H3I5H2I",
            f["signature"] or b"PK\x01\x02",
            0,
            f.get("version", 0),
            f["flags"],
            f["method"],
            0,
            0,
            f["crc"],
            f["packed"],
            f["size"],
            f.get("name_length", len(f["name"])),
            f.get("extra_length", len(f["extra"])),
            len(f["comment"]),
            f["disk"],
            0,
            0,
            f["header"],
        )
        + f["name"]
        + f["extra"]
        + f["comment"]
    )


def _end64(f: dict) -> bytes:
    return f["signature"] + struct.pack(
        "<Q2H2I4Q",
        f["size"],
        45,
        45,
        f["disk"],
        f["directory_disk"],
        f["on_disk"],
        f["count"],
        f["length"],
        f["offset"],
    )


# Torch -----------------------------------------------------------------------

Storages = dict[str, tuple[str, bytes]]


def storage(dtype: str, values: Iterable[float]) -> tuple[str, bytes]:
    """A storage of `values`: its dtype and its bytes."""
    return dtype, np.array(list(values)).astype(dtype_of(dtype)).tobytes()


def legacy_file(
    main: bytes,
    storages: Storages,
    *,
    magic: bytes | None = None,
    protocol: bytes | None = None,
    system: bytes | None = None,
    keys: bytes | None = None,
    sizes: dict[str, int] | None = None,
    tail: bytes = b"",
) -> bytes:
    """A legacy stream around the main pickle."""
    widths = {"short": 2, "int": 4, "long": 4}
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": widths}
    body = program(MAGIC) if magic is None else magic
    body += program(1001) if protocol is None else protocol
    body += program(info) if system is None else system
    body += main
    body += program(list(storages)) if keys is None else keys
    for key, (dtype, data) in storages.items():
        size = len(data) // dtype_of(dtype).itemsize
        body += struct.pack("<q", (sizes or {}).get(key, size)) + data
    return body + tail


def torch_entries(
    main: bytes, storages: Storages, *, folder: str = "model"
) -> list[ZipEntry]:
    """The records of a zip checkpoint in torch's order."""
    small = {".format_version": b"1", ".storage_alignment": b"64"}
    small["byteorder"] = b"little"
    last = {"version": b"3\n", ".data/serialization_id": b"0123456789" * 4}
    data = {f"data/{key}": raw for key, (_, raw) in storages.items()}
    records = {"data.pkl": main, **small, **data, **last}
    return [ZipEntry(f"{folder}/{name}", raw) for name, raw in records.items()]


def zip_file(main: bytes, storages: Storages) -> bytes:
    """A zip checkpoint around the main pickle."""
    return zip_archive(torch_entries(main, storages))


def element(flat: np.ndarray, view: Tensor) -> np.ndarray:
    """The array `view` must read as, element by element."""
    result = np.zeros(view.shape, flat.dtype)
    for index in itertools.product(*(range(size) for size in view.shape)):
        at = view.offset + sum(
            i * step for i, step in zip(index, view.strides, strict=True)
        )
        result[index] = flat[at]
    return result


@dataclasses.dataclass(frozen=True)
class Sample:
    """A small model with every dtype and every kind of view."""

    tensors: dict[str, Tensor]
    storages: Storages

    def arrays(self) -> dict[str, np.ndarray]:
        """What a reader must find."""
        flats = {
            key: np.frombuffer(raw, dtype_of(dtype))
            for key, (dtype, raw) in self.storages.items()
        }
        return {k: element(flats[t.storage], t) for k, t in self.tensors.items()}


@functools.cache
def sample() -> Sample:
    """Fifteen tensors on ten storages; not to be changed."""
    values = {
        "0": storage("float32", (0.5 * i - 3 for i in range(12))),
        "1": storage("int64", (7 * i - 20 for i in range(10))),
        "2": storage("float16", (0.25, -1.5, 2.0, 1024.0)),
        "3": storage("bfloat16", (1.0, -0.5, 3.140625, 1e20, -7.0)),
        "4": storage("bool", (1, 0, 1)),
        "5": storage("uint8", (0, 128, 255, 3)),
        "6": storage("int8", (-128, 127, 5)),
        "7": storage("int16", (-30000, 12345)),
        "8": storage("int32", (-(2**31), 2**31 - 1)),
        "9": storage("float64", (1 / 3,)),
    }
    tensors = {
        "conv.weight": Tensor("0", "float32", 12, (4, 3), (3, 1), parameter=True),
        "conv.transposed": Tensor("0", "float32", 12, (3, 4), (1, 3)),
        "conv.tied": Tensor("0", "float32", 12, (2, 2, 3), (6, 3, 1)),
        "part": Tensor("1", "int64", 10, (3,), (2,), offset=4),
        "half": Tensor("2", "float16", 4, (2, 2), (2, 1)),
        "brain": Tensor("3", "bfloat16", 5, (5,), (1,)),
        "brain.strided": Tensor("3", "bfloat16", 5, (2,), (3,), offset=1),
        "flags": Tensor("4", "bool", 3, (3,), (1,)),
        "byte": Tensor("5", "uint8", 4, (2, 1, 2), (2, 2, 1)),
        "char": Tensor("6", "int8", 3, (3,), (1,)),
        "short": Tensor("7", "int16", 2, (2,), (1,)),
        "int": Tensor("8", "int32", 2, (2,), (1,)),
        "scalar": Tensor("9", "float64", 1, (), ()),
        "broadcast": Tensor("9", "float64", 1, (2, 3), (0, 0)),
        "empty": Tensor("9", "float64", 1, (0, 3), (3, 1)),
    }
    return Sample(tensors, values)


def checkpoint(model: Sample) -> dict:
    """A training checkpoint around the model, as the authors of NAD save it."""
    moment = Tensor("0", "float32", 12, (12,), (1,))
    group = {"lr": 0.01, "momentum": 0.9, "nesterov": True, "params": [1, 2]}
    # What pickling numpy.float64(85.5) leaves behind.
    dtype = Raw(reduce(global_("numpy", "dtype"), "f8", False, True) + b"}b")
    raw = reduce(global_("_codecs", "encode"), "\x00`U@", "latin1")
    score = reduce(global_("numpy.core.multiarray", "scalar"), dtype, raw)
    optimizer = {"state": {1: {"buffer": moment}}, "param_groups": [group]}
    return {
        "epoch": 25,
        "arch": "wrn_16_1",
        "state_dict": Ordered(dict(model.tensors), metadata=True),
        "best_prec": 85.5,
        "best_score": score,
        "optimizer": optimizer,
    }


# Safetensors -----------------------------------------------------------------


def safetensors_parts(
    arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None
) -> tuple[dict, bytes]:
    """Header and payload of a safetensors file."""
    header: dict = {"__metadata__": metadata} if metadata else {}
    payload = b""
    for name, array in arrays.items():
        raw = array.tobytes()
        header[name] = {
            "dtype": SAFETENSORS_CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(payload), len(payload) + len(raw)],
        }
        payload += raw
    return header, payload


def safetensors_file(
    header: dict | str | bytes, payload: bytes, *, length: int | None = None
) -> bytes:
    """A file from its parts; the header may be text that is no JSON."""
    if isinstance(header, dict):
        header = json.dumps(header)
    raw = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + payload


# Msgpack ---------------------------------------------------------------------


def msgpack(value: object) -> bytes:
    """`value` in msgpack, arrays as Flax writes them; bytes are pasted as they are."""
    if isinstance(value, bytes):
        return value
    if value is None or isinstance(value, bool):
        return {None: b"\xc0", False: b"\xc2", True: b"\xc3"}[value]
    if isinstance(value, int):
        if 0 <= value < 128:
            return bytes([value])
        return b"\xd3" + struct.pack(">q", value)
    if isinstance(value, float):
        return b"\xcb" + struct.pack(">d", value)
    if isinstance(value, str):
        raw = value.encode()
        short = bytes([0xA0 + len(raw)]) if len(raw) < 32 else b""
        return (short or b"\xda" + struct.pack(">H", len(raw))) + raw
    if isinstance(value, np.ndarray):
        return msgpack_array(value.shape, value.dtype.name, value.tobytes())
    if isinstance(value, (list, tuple)):
        return _counted(0x90, 0xDC, len(value)) + b"".join(map(msgpack, value))
    if isinstance(value, dict):
        pairs = (msgpack(part) for pair in value.items() for part in pair)
        return _counted(0x80, 0xDE, len(value)) + b"".join(pairs)
    raise TypeError(type(value))


def _counted(short: int, long: int, count: int) -> bytes:
    return bytes([short + count]) if count < 16 else struct.pack(">BH", long, count)


def msgpack_array(
    shape: object,
    dtype: object,
    raw: bytes,
    *,
    kind: int = 1,
    count: int | None = None,
    length: int | None = None,
) -> bytes:
    """The extension value of one array, with two numbers open to a lie."""
    declared = len(raw) if count is None else count
    content = b"\x93" + msgpack(list(shape) if isinstance(shape, tuple) else shape)
    content += msgpack(dtype) + b"\xc6" + struct.pack(">I", declared) + raw
    size = len(content) if length is None else length
    return b"\xc9" + struct.pack(">IB", size, kind) + content


def flax_tree(model: Sample) -> dict:
    """The sample as Flax variables in a train state."""
    arrays = {k: a for k, a in model.arrays().items() if k != "broadcast"}
    names = list(arrays)
    params = {"layer": {k: arrays[k] for k in names[:7]}}
    params["head"] = {k: arrays[k] for k in names[7:-1]}
    stats = {"bn": {"mean": arrays[names[-1]]}}
    return {"step": 3, "params": params, "batch_stats": stats, "opt_state": {"0": {}}}


def flax_arrays(tree: dict) -> dict[str, np.ndarray]:
    """The flat names a reader must find in `flax_tree`."""
    return {
        f"{collection}/{layer}/{name}": array
        for collection in ("params", "batch_stats")
        for layer, leaves in tree[collection].items()
        for name, array in leaves.items()
    }


# All formats -----------------------------------------------------------------


def legacy_sample() -> tuple[bytes, dict[str, np.ndarray]]:
    model = sample()
    return legacy_file(program(checkpoint(model)), model.storages), model.arrays()


def zip_sample() -> tuple[bytes, dict[str, np.ndarray]]:
    model = sample()
    main = program(checkpoint(model), legacy=False)
    return zip_file(main, model.storages), model.arrays()


def safetensors_sample() -> tuple[bytes, dict[str, np.ndarray]]:
    arrays = sample().arrays()
    return safetensors_file(*safetensors_parts(arrays, {"note": "sample"})), arrays


def msgpack_sample() -> tuple[bytes, dict[str, np.ndarray]]:
    tree = flax_tree(sample())
    return msgpack(tree), flax_arrays(tree)


SAMPLES: dict[str, Callable[[], tuple[bytes, dict[str, np.ndarray]]]] = {
    "torch-legacy": legacy_sample,
    "torch-zip": zip_sample,
    "safetensors": safetensors_sample,
    "flax-msgpack": msgpack_sample,
}
