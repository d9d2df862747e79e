# SPDX-License-Identifier: Apache-2.0
"""Second opinions on what a file holds, sharing no code with the readers.

They are more lenient than the readers, so they must only ever see files a reader has
accepted: then everything in them is built from opcodes and names of the allow-list.
A reader that accepts what its oracle refuses, or finds other arrays, accepted wrongly.

    torch        the stdlib's pure-Python unpickler with stand-ins for every name, and
                 the stdlib's zipfile
    safetensors  the package of that name (Rust)
    msgpack      flax.serialization
"""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Iterator

import good_files as good
import numpy as np
import safetensors
from flax import serialization

Arrays = dict[str, np.ndarray]


class Disagreement(Exception):
    """Why an accepted file should not have been."""


class _Anything:
    """Stands for a value nobody looks at."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


class _View(tuple):
    """The arguments of a rebuild function."""


_STAND_INS: dict[tuple[str, str], object] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor"): lambda *arguments: _View(arguments),
    ("torch._utils", "_rebuild_tensor_v2"): lambda *arguments: _View(arguments),
    ("torch._utils", "_rebuild_tensor_v3"): lambda *arguments: _View(arguments),
    ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    ("torch", "Size"): tuple,
    **{
        ("torch", kind): good.dtype_of(name)
        for name, kind in good.STORAGE_CLASSES.items()
    },
}


class _Unpickler(pickle._Unpickler):  # type: ignore[attr-defined, name-defined]
    def find_class(self, module: str, name: str) -> object:
        return _STAND_INS.get((module, name), _Anything)

    def persistent_load(self, pid: object) -> object:
        return pid


def _load(stream: io.BytesIO) -> object:
    return _Unpickler(stream, encoding="utf-8").load()


def torch_candidates(data: bytes) -> Iterator[Arrays]:
    """The state dicts a torch file could mean."""
    if data.startswith(b"PK"):
        tree, storages = _zip_content(data)
    else:
        tree, storages = _legacy_content(data)
    yield from _state_dicts(tree, storages)


def _zip_content(data: bytes) -> tuple[object, dict[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if len(set(names)) != len(names):
            raise Disagreement("zipfile sees a name twice")
        content = {name.partition("/")[2]: archive.read(name) for name in names}
    stream = io.BytesIO(content["data.pkl"])
    tree = _load(stream)
    if stream.read():
        raise Disagreement("the unpickler leaves bytes of data.pkl")
    return tree, {k[5:]: v for k, v in content.items() if k.startswith("data/")}


def _legacy_content(data: bytes) -> tuple[object, dict[str, bytes]]:
    stream = io.BytesIO(data)
    if _load(stream) != good.MAGIC or _load(stream) != 1001:
        raise Disagreement("the unpickler sees another magic number")
    _load(stream)
    tree = _load(stream)
    keys = _load(stream)
    sizes = _storage_sizes(tree)
    storages: dict[str, bytes] = {}
    assert isinstance(keys, list)
    for key in keys:
        (size,) = struct.unpack("<q", stream.read(8))
        if key not in sizes or sizes[key][0] != size:
            raise Disagreement(f"storage {key} of {size} is not the one mentioned")
        storages[key] = stream.read(size * sizes[key][1])
    if stream.read():
        raise Disagreement("bytes are left after the storages")
    return tree, storages


def _storage_sizes(tree: object) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}
    seen: set[int] = set()
    todo = [tree]
    while todo:
        node = todo.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, _View):
            _, dtype, key, _, size, *_ = node[0]
            found[key] = (size, dtype.itemsize)
        elif isinstance(node, tuple) and len(node) in (5, 6) and node[0] == "storage":
            found[node[2]] = (node[4], node[1].itemsize)
        elif isinstance(node, dict):
            todo.extend(node.values())
        elif isinstance(node, (list, tuple)):
            todo.extend(node)
    return found


def _state_dicts(tree: object, storages: dict[str, bytes]) -> Iterator[Arrays]:
    assert isinstance(tree, dict)
    wrapped = [tree.get(name) for name in ("state_dict", "model", "model_state_dict")]
    for mapping in (tree, *wrapped, tree.get("net")):
        if isinstance(mapping, dict) and mapping:
            if all(isinstance(value, _View) for value in mapping.values()):
                yield {name: _array(view, storages) for name, view in mapping.items()}


def _array(view: _View, storages: dict[str, bytes]) -> np.ndarray:
    (_, dtype, key, _, size, *rest), offset, shape, strides = view[:4]
    flat = np.frombuffer(storages[key], dtype)
    if len(flat) != size:
        raise Disagreement(f"storage {key} has {len(flat)} elements and not {size}")
    if rest and rest[0] is not None:
        flat = flat[rest[0][1] :][: rest[0][2]]
    if 0 in shape:  # Its other axes may be of any length.
        return np.zeros(shape, dtype)
    # Positions of all elements, by broadcasting one axis after the other.
    at = np.full(shape, offset, np.int64)
    for axis, (length, step) in enumerate(zip(shape, strides, strict=True)):
        row = np.arange(length, dtype=np.int64) * step
        at += row.reshape((-1,) + (1,) * (len(shape) - axis - 1))
    if at.min() < 0 or at.max() >= len(flat):
        raise Disagreement("a view leaves its storage")
    return flat[at]


def safetensors_candidates(data: bytes) -> Iterator[Arrays]:
    """The arrays the safetensors package finds."""
    names = {code: name for name, code in good.SAFETENSORS_CODES.items()}
    yield {
        name: np.frombuffer(
            bytes(entry["data"]), good.dtype_of(names[entry["dtype"]])
        ).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(data)
    }


def msgpack_candidates(data: bytes) -> Iterator[Arrays]:
    """The arrays flax finds, of the variables or of a bare tree."""
    tree = serialization.msgpack_restore(data)
    wrapped = [tree.get(n) for n in ("state_dict", "model", "model_state_dict", "net")]
    for mapping in (tree, *wrapped):
        if isinstance(mapping, dict) and "params" in mapping:
            wanted = {k: mapping[k] for k in ("params", "batch_stats") if k in mapping}
            yield dict(_leaves(wanted, ""))
    yield dict(_leaves(tree, ""))


def _leaves(tree: dict, prefix: str) -> Iterator[tuple[str, np.ndarray]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            known = isinstance(value, (bool, int, float, np.ndarray, np.generic))
            yield prefix + key, np.asarray(value if known else None)


def check(format_name: str, data: bytes, arrays: Arrays) -> None:
    """Raises `Disagreement` unless the oracle finds exactly `arrays` in `data`."""
    candidates = {
        "torch-zip": torch_candidates,
        "torch-legacy": torch_candidates,
        "safetensors": safetensors_candidates,
        "flax-msgpack": msgpack_candidates,
    }[format_name]
    try:
        found = list(candidates(data))
    except Disagreement:
        raise
    except Exception as problem:
        raise Disagreement(f"the oracle refuses it: {problem!r}") from problem
    if not any(_equal(arrays, other) for other in found):
        raise Disagreement(f"the oracle finds {[sorted(other) for other in found]}")
    for name, array in arrays.items():
        if array.dtype.kind not in "iub" and not np.isfinite(array).all():
            raise Disagreement(f"{name} is not finite")


def _equal(left: Arrays, right: Arrays) -> bool:
    while all(name.startswith("module.") for name in right) and right:
        right = {name.removeprefix("module."): array for name, array in right.items()}
    return left.keys() == right.keys() and all(
        array.dtype == right[name].dtype
        and array.shape == right[name].shape
        and array.tobytes() == right[name].tobytes()
        for name, array in left.items()
    )
