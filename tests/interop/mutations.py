# SPDX-License-Identifier: Apache-2.0
"""Structure-aware mutation of good model files.

Random bytes die at the first check. These mutations know where a token begins (an
opcode, a header field, a JSON word, a msgpack value), change tokens and declared
numbers, and then mend what would give them away (checksums, lengths, offsets), so that
most of them reach the code behind.
"""

import dataclasses
import json
import pickletools
import random
import re
import struct
from collections.abc import Callable

import good_files as good
from good_files import Ordered, Tensor, ZipEntry, program

INTERESTING = (
    *(0, 1, 2, 3, 4, 7, 8, 12, 16, 17, 127, 128, 255, 256),
    *(2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40),
    *(2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -4, -(2**31), -(2**63)),
)
WORDS = (
    *("state_dict", "model", "net", "module.", "params", "batch_stats", "optimizer"),
    *("storage", "cpu", "0", "1", "w", "", "..", "/", "a/b", "\n", "\ud7ff", "n" * 300),
    *("float32", "bfloat16", "bool", "int64", "F32", "BF16", "BOOL", "object", "F8"),
    *("collections", "OrderedDict", "torch", "torch._utils", "_rebuild_tensor_v2"),
    *("os", "system", "builtins", "eval", "__metadata__", "_metadata", "dtype"),
)


def number(rng: random.Random) -> int:
    """An interesting number or one close by."""
    return rng.choice(INTERESTING) + rng.choice((0, 0, 0, 1, -1))


# Bytes -----------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes, tokens: list[int]) -> bytes:
    """One change at a token boundary, or anywhere once in a while."""
    if not data:  # An empty tensor has no bytes to change.
        return rng.randbytes(rng.choice((0, 1, 4, 64)))
    buffer = bytearray(data)
    at = (
        rng.choice(tokens)
        if tokens and rng.random() < 0.8
        else rng.randrange(len(data))
    )
    kind = rng.randrange(9)
    if kind == 0:
        buffer[at] ^= 1 << rng.randrange(8)
    elif kind == 1:
        buffer[at] = rng.randrange(256)
    elif kind == 2:
        width, order = rng.choice((1, 2, 4, 8)), rng.choice(("little", "big"))
        value = number(rng) % 256**width
        at = min(at + rng.choice((0, 1)), len(buffer))
        buffer[at : at + width] = value.to_bytes(width, order)
    elif kind == 3:
        del buffer[at : _end(rng, tokens, at, len(data))]
    elif kind == 4:
        buffer[at:at] = data[at : _end(rng, tokens, at, len(data))]
    elif kind == 5:
        other = rng.choice(tokens) if tokens else 0
        end = _end(rng, tokens, at, len(data))
        buffer[at:end] = data[other : _end(rng, tokens, other, len(data))]
    elif kind == 6:
        buffer[at:at] = rng.randbytes(rng.choice((1, 2, 4, 8)))
    elif kind == 7:
        del buffer[at:]
    else:
        buffer += rng.randbytes(rng.choice((1, 4, 64)))
    return bytes(buffer)


def _end(rng: random.Random, tokens: list[int], at: int, size: int) -> int:
    """Where the token at `at` ends, or one of the next few."""
    later = [token for token in tokens if token > at][: rng.choice((1, 1, 1, 2, 5))]
    return later[-1] if later else min(size, at + rng.choice((1, 2, 4)))


def several(rng: random.Random) -> int:
    return rng.choice((1, 1, 1, 2, 3))


# Torch -----------------------------------------------------------------------


def opcode_starts(data: bytes, start: int = 0) -> list[int]:
    """Offsets of all opcodes of a pickle."""
    return [start + position for _, _, position in pickletools.genops(data[start:])]


OPCODES = bytes(ord(opcode.code) for opcode in pickletools.opcodes)


def mutate_pickle(rng: random.Random, data: bytes, starts: list[int]) -> bytes:
    """Opcodes replaced, repeated, removed, moved; arguments replaced."""
    for _ in range(several(rng)):
        if rng.random() < 0.3:
            at = rng.choice(starts)
            at = min(at, len(data) - 1)
            data = data[:at] + bytes([rng.choice(OPCODES)]) + data[at + 1 :]
        elif rng.random() < 0.3:
            at = rng.choice(starts)
            data = data[:at] + odd_value(rng) + data[at:]
        else:
            data = mutate_bytes(rng, data, [at for at in starts if at < len(data)])
        if not data:
            return b"\x80"
    return data


def odd_value(rng: random.Random) -> bytes:
    """Opcodes that leave one value on the stack, not always an allowed one."""
    return rng.choice(
        (
            lambda: good.integer(max(min(number(rng), 2**64), -(2**63))),
            lambda: good.text(rng.choice(WORDS)),
            lambda: good.global_(rng.choice(WORDS) or "x", rng.choice(WORDS) or "y"),
            lambda: good.opcodes(rng.choice(([], {}, (), None, True, 1.5))),
            lambda: good.EMPTY_ORDERED,
            lambda: b"h" + bytes([rng.randrange(4)]),
        )
    )()


def mutate_tensor(rng: random.Random, view: Tensor) -> Tensor:
    """A view with one field changed, half of the time only a little."""
    small = rng.random() < 0.5

    def changed(value: int) -> int:
        return max(-1, value + rng.choice((-2, -1, 1, 2))) if small else number(rng)

    field = rng.choice(
        ("shape", "strides", "offset", "storage_size", "storage", "dtype")
    )
    if field in ("shape", "strides"):
        values = list(getattr(view, field))
        if values and rng.random() < 0.8:
            index = rng.randrange(len(values))
            values[index] = changed(values[index])
        else:
            values.insert(rng.randint(0, len(values)), rng.choice((0, 1, 2)))
        return dataclasses.replace(view, **{field: tuple(values)})
    if field == "storage":
        return dataclasses.replace(view, storage=str(rng.randrange(12)))
    if field == "dtype":
        dtype = rng.choice(list(good.STORAGE_CLASSES))
        return dataclasses.replace(view, dtype=dtype)
    return dataclasses.replace(view, **{field: changed(getattr(view, field))})


def mutate_model(rng: random.Random) -> tuple[dict, good.Storages]:
    """A sound pickle of a model that lies about a view, a name or an entry."""
    model = good.sample()
    tensors, storages = dict(model.tensors), dict(model.storages)
    for _ in range(several(rng)):
        name = rng.choice(list(tensors))
        choice = rng.randrange(6)
        if choice < 3:
            tensors[name] = mutate_tensor(rng, tensors[name])
        elif choice == 3:
            tensors[rng.choice(WORDS)] = tensors.pop(name)
        elif choice == 4:
            del tensors[name]
            if not tensors:
                tensors = dict(model.tensors)
        else:
            key = rng.choice(list(storages))
            dtype, raw = storages[key]
            storages[key] = dtype, mutate_bytes(rng, raw, list(range(len(raw))))
    tree = good.checkpoint(dataclasses.replace(model, tensors=tensors))
    if rng.random() < 0.3:
        tree[rng.choice(WORDS)] = tree.pop(rng.choice(list(tree)))
    if rng.random() < 0.2:
        tree[rng.choice(WORDS)] = Ordered(dict(list(tensors.items())[:2]))
    return tree, storages


def sound_pickle(tree: dict, *, legacy: bool) -> bytes:
    try:
        return program(tree, legacy=legacy)
    except (struct.error, OverflowError):
        return program({}, legacy=legacy)


def torch_legacy(rng: random.Random) -> bytes:
    """A mutated legacy stream."""
    if rng.random() < 0.45:
        tree, storages = mutate_model(rng)
        return good.legacy_file(sound_pickle(tree, legacy=True), storages)
    model, data = good.sample(), _CACHE["legacy"]
    if rng.random() < 0.6:
        main = mutate_pickle(rng, _CACHE["main"], _TOKENS["main"])
        return good.legacy_file(main, model.storages)
    for _ in range(several(rng)):
        tokens = [at for at in _TOKENS["legacy"] if at < len(data)]
        data = mutate_bytes(rng, data, tokens) or b"\x80"
    return data


def torch_zip(rng: random.Random) -> bytes:
    """A mutated zip archive, its checksums right or one header wrong."""
    chance = rng.random()
    if chance < 0.3:
        tree, storages = mutate_model(rng)
        return good.zip_file(sound_pickle(tree, legacy=False), storages)
    model = good.sample()
    if chance < 0.55:
        main = mutate_pickle(rng, _CACHE["zip main"], _TOKENS["zip main"])
        return good.zip_file(main, model.storages)
    if chance < 0.8:
        return lying_archive(
            rng, good.torch_entries(_CACHE["zip main"], model.storages)
        )
    data = _CACHE["zip"]
    for _ in range(several(rng)):
        tokens = [at for at in _TOKENS["zip"] if at < len(data)]
        data = mutate_bytes(rng, data, tokens) or b"P"
    return data


def lying_archive(rng: random.Random, entries: list[ZipEntry]) -> bytes:
    """An archive in which one or two header fields, entries or gaps are wrong."""
    ends: dict = {}
    for _ in range(several(rng)):
        entry = rng.choice(entries)
        choice = rng.randrange(10)
        field = rng.choice(("crc", "packed", "size", "method", "flags", "name"))
        value = rng.choice(WORDS).encode("utf-8") if field == "name" else number(rng)
        value = (
            value
            if field == "name"
            else _fit(value, 2 if field in "method flags" else 4)
        )
        if choice == 0:
            entry.local[field] = value
        elif choice == 1:
            entry.central[field] = value
        elif choice == 2:
            entry.local[field] = entry.central[field] = value
        elif choice == 3:
            entry.central["header"] = _fit(number(rng), 4)
        elif choice == 4:
            entry.flags = rng.choice((0, 0x0800, 0x0008, 1, 0x2000))
        elif choice == 5:
            entry.data = mutate_bytes(rng, entry.data + b"\0", [])
        elif choice == 6:
            rng.choice((entries.remove, entries.append))(entry)
            if not entries:
                entries.append(entry)
        elif choice == 7:
            entry.hidden = True
        elif choice == 8:
            gap = rng.choice(("before", "after"))
            setattr(entry, gap, rng.choice((b"\0", b"PK\x03\x04" + bytes(26))))
        else:
            part = rng.choice(("end", "end64", "locator"))
            fields = ("offset",) if part == "locator" else ("count", "length", "offset")
            width = 2 if part == "end" else 8
            ends[part] = {rng.choice(fields): _fit(number(rng), width)}
            ends["with_end64"] = rng.random() < 0.8
    return good.zip_archive(entries, **ends)


def _fit(value: int, width: int) -> int:
    return value % 256**width


# Safetensors -----------------------------------------------------------------

_JSON_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+|[\[\]{}:,]')


def safetensors(rng: random.Random) -> bytes:
    """A mutated header, its length mended most of the time, or mutated bytes."""
    header, payload = good.safetensors_parts(_ARRAYS, {"note": "x"})
    if rng.random() < 0.55:
        for _ in range(several(rng)):
            payload = mutate_header(rng, header, payload)
        raw = json.dumps(header).encode()
    else:
        raw = json.dumps(header).encode()
        for _ in range(several(rng)):
            tokens = [token.start() for token in _JSON_TOKEN.finditer(raw)]
            raw = mutate_bytes(rng, raw, tokens) or b"{"
        # Half of random bytes are no UTF-8, which is checked before anything else.
        if rng.random() < 0.9:
            raw = bytes(byte & 0x7F for byte in raw)
    length = number(rng) % 2**64 if rng.random() < 0.05 else None
    data = good.safetensors_file(raw, payload, length=length)
    return mutate_bytes(rng, data, [0, 8]) if rng.random() < 0.1 else data


def mutate_header(rng: random.Random, header: dict, payload: bytes) -> bytes:
    """Changes one entry of the header in place; returns the payload, maybe changed."""
    name = rng.choice([key for key in header if key != "__metadata__"] or [""])
    entry = header.setdefault(
        name, {"dtype": "U8", "shape": [], "data_offsets": [0, 1]}
    )
    choice = rng.randrange(9)
    if choice == 0 or not isinstance(entry, dict) or len(entry) != 3:
        header[rng.choice(WORDS)] = header.pop(name)
    elif choice == 1:
        entry["dtype"] = rng.choice((*good.SAFETENSORS_CODES.values(), "F8", 1, None))
    elif choice == 2 and isinstance(entry["shape"], list):
        shape = entry["shape"]
        shape.insert(rng.randint(0, len(shape)), rng.choice((0, 1, 2, number(rng))))
    elif choice == 3 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = number(rng)
    elif choice == 4 and isinstance(entry["shape"], list):
        rng.shuffle(entry["shape"])
    elif choice == 5:
        entry["data_offsets"][rng.randrange(2)] = number(rng)
    elif choice == 6:
        shift = rng.choice((-8, -4, -1, 1, 4, 8))
        entry["data_offsets"] = [at + shift for at in entry["data_offsets"]]
    elif choice == 7:
        entry[rng.choice(WORDS)] = rng.choice((1, "x", None, []))
    else:
        return mutate_bytes(rng, payload or b"\0", [])
    return payload


# Msgpack ---------------------------------------------------------------------


def flax_msgpack(rng: random.Random) -> bytes:
    """Mutated variables, mutated arrays inside them, or mutated bytes."""
    tree = _copied(_TREE)
    if rng.random() < 0.5:
        for _ in range(several(rng)):
            mutate_tree(rng, tree)
        data = good.msgpack(tree)
        if rng.random() < 0.8:
            return data
    else:
        data = good.msgpack(tree)
    for _ in range(several(rng)):
        data = mutate_bytes(rng, data, list(_msgpack_starts(data))) or b"\x80"
    return data


def _copied(tree: dict) -> dict:
    """The same leaves in new dicts."""
    return {k: _copied(v) if isinstance(v, dict) else v for k, v in tree.items()}


def mutate_tree(rng: random.Random, tree: dict) -> None:
    """Changes one leaf, one name or one array in place."""
    node = tree
    while True:
        inner = [value for value in node.values() if isinstance(value, dict)]
        if not inner or rng.random() < 0.2:
            break
        node = rng.choice(inner)
    if not node:
        node[rng.choice(WORDS)] = number(rng) % 2**32
        return
    name = rng.choice(list(node))
    value = node[name]
    choice = rng.randrange(7)
    if choice == 0:
        node[rng.choice(WORDS)] = node.pop(name)
    elif choice == 1:
        node[name] = rng.choice((1, "x", None, [], {}, True, 1.5, {"a": 1}))
    elif choice == 2:
        del node[name]
    elif choice == 3:
        node[name] = {rng.choice(WORDS): value}
    elif hasattr(value, "tobytes"):
        node[name] = lying_array(rng, value)


def lying_array(rng: random.Random, array) -> bytes | dict:
    """One array with a wrong shape, dtype, count or length, or split into pieces."""
    shape: tuple[object, ...] = array.shape
    dtype, raw, lies = array.dtype.name, array.tobytes(), {}
    choice = rng.randrange(7)
    if choice == 0:
        sizes = list(shape)
        sizes.insert(
            rng.randint(0, len(sizes)), rng.choice((0, 1, number(rng) % 2**62))
        )
        shape = tuple(sizes)
    elif choice == 1:
        dtype = rng.choice(list(good.SAFETENSORS_CODES))
    elif choice == 2:
        raw = mutate_bytes(rng, raw + b"\0", [])
    elif choice == 3:
        lies["count"] = _fit(number(rng), 4)
    elif choice == 4:
        lies["length"] = _fit(number(rng), 4)
    elif choice == 5:
        lies["kind"] = rng.choice((0, 1, 2, 3, 4, 255))
    else:
        flat = array.reshape(-1)
        cut = rng.randint(0, flat.size)
        pieces = {"0": flat[:cut], "1": flat[cut:]}
        sizes = {str(axis): size for axis, size in enumerate(array.shape)}
        return {"__msgpack_chunked_array__": True, "shape": sizes, "chunks": pieces}
    return good.msgpack_array(shape, dtype, raw, **lies)


def _msgpack_starts(data: bytes) -> list[int]:
    """Offsets of bytes that look like the start of a value or a name."""
    return [at for at, byte in enumerate(data) if byte >= 0x80]


MUTATORS: dict[str, Callable[[random.Random], bytes]] = {
    "torch-legacy": torch_legacy,
    "torch-zip": torch_zip,
    "safetensors": safetensors,
    "flax-msgpack": flax_msgpack,
}

_MODEL = good.sample()
_ARRAYS = _MODEL.arrays()
_TREE = good.flax_tree(_MODEL)
_CACHE = {
    "main": program(good.checkpoint(_MODEL)),
    "zip main": program(good.checkpoint(_MODEL), legacy=False),
    "legacy": good.legacy_sample()[0],
    "zip": good.zip_sample()[0],
}


def _all_starts(data: bytes, count: int) -> list[int]:
    starts: list[int] = []
    at = 0
    for _ in range(count):
        starts += opcode_starts(data, at)
        at = starts[-1] + 1
    return starts


_TOKENS = {
    "main": opcode_starts(_CACHE["main"]),
    "zip main": opcode_starts(_CACHE["zip main"]),
    "legacy": _all_starts(_CACHE["legacy"], 5),
    "zip": [
        found.start() + field
        for found in re.finditer(rb"PK\x01\x02|PK\x03\x04|PK[\x05-\x08]", _CACHE["zip"])
        for field in (0, 4, 6, 8, 10, 14, 16, 18, 20, 22, 24, 26, 28, 30, 42, 46)
    ],
}
