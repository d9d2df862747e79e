# SPDX-License-Identifier: Apache-2.0
"""What a torch file's names mean here: storages, views of them, and inert values.

Nothing of torch is imported. A storage class becomes a dtype, a rebuild function a
description of a view that is checked against its storage, and the names that honest
training checkpoints carry beside their weights (devices, numpy scalars, the counter of
a learning-rate schedule) become values without content.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from nad_jax.interop import limits, stored_array
from nad_jax.interop.bounded_file import Refusal, shown
from nad_jax.interop.pickle_machine import (
    INERT,
    ORDERED_DICT,
    Constructor,
    Globals,
)


@dataclasses.dataclass(frozen=True, slots=True)
class StorageClass:
    """The dtype of a storage's elements; None for untyped bytes."""

    dtype: np.dtype | None

    @property
    def itemsize(self) -> int:
        return 1 if self.dtype is None else self.dtype.itemsize


@dataclasses.dataclass(slots=True)
class Storage:
    """A flat run of elements that tensors view.

    Attributes:
        kind: its storage class.
        size: number of elements; of bytes if untyped.
        read: reads its bytes; given by the reader once it knows where they are.
        raw: the bytes, read once however many tensors share them.
    """

    kind: StorageClass
    size: int
    read: Callable[[], np.ndarray] | None = None
    raw: np.ndarray | None = None

    def bytes(self) -> np.ndarray:
        """All bytes of the storage, uint8 [size * itemsize]."""
        if self.raw is None:
            assert self.read is not None
            self.raw = self.read()
        return self.raw


@dataclasses.dataclass(frozen=True, slots=True)
class StorageSpan:
    """The part of a storage that a persistent id speaks of, usually all of it."""

    storage: Storage
    start: int
    size: int


@dataclasses.dataclass(frozen=True, slots=True)
class StridedArray(stored_array.StoredArray):
    """A view of a storage.

    Attributes:
        storage: what it looks at.
        offset_bytes: where its first element is.
        strides_bytes: steps along each axis, >= 0.
    """

    storage: Storage
    offset_bytes: int
    strides_bytes: tuple[int, ...]

    def load(self) -> np.ndarray:
        return stored_array.view_bytes(
            self.storage.bytes(),
            self.dtype,
            self.shape,
            self.offset_bytes,
            self.strides_bytes,
        )


class StorageTable:
    """All storages of one file, filled by the persistent ids of its pickle."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}

    def from_persistent_id(self, identifier: object) -> StorageSpan:
        """('storage', class, key, device, size[, view]) -> the span it speaks of."""
        if type(identifier) is not tuple or len(identifier) not in (5, 6):
            raise Refusal(f"a persistent id that is {shown(identifier)}")
        kind_of_id, kind, key, device, size, *view = identifier
        # Types before values: comparing a dtype with a text may raise.
        is_storage = isinstance(kind_of_id, str) and kind_of_id == "storage"
        if not is_storage or not isinstance(kind, StorageClass):
            raise Refusal(
                f"a persistent id of {shown(kind_of_id)} and {shown(kind)}; only "
                "storages of a known class are read"
            )
        # ASCII digits only: a key becomes part of the name of a zip entry.
        if not _is_key(key) or not isinstance(device, str):
            raise Refusal(f"a storage with the key {shown(key)}")
        size = _count(size, "storage size")
        storage = self.storages.setdefault(key, Storage(kind, size))
        if storage.kind is not kind or storage.size != size:
            raise Refusal(f"storage {shown(key)} is declared in two ways")
        if len(self.storages) > limits.MAX_TENSORS:
            raise Refusal(f"more than {limits.MAX_TENSORS} storages")
        return _span(storage, view[0] if view else None)


def _is_key(key: object) -> bool:
    return (
        isinstance(key, str)
        and 0 < len(key) <= 20
        and key.isascii()
        and (key.isdigit())
    )


def _span(storage: Storage, view: object) -> StorageSpan:
    """The whole storage, or the part that files of torch 0.4 and older name."""
    if view is None:
        return StorageSpan(storage, 0, storage.size)
    if type(view) is not tuple or len(view) != 3:
        raise Refusal(f"a storage view that is {shown(view)}")
    start, size = _count(view[1], "view offset"), _count(view[2], "view size")
    if start + size > storage.size:
        raise Refusal(
            f"a storage view of elements {start} to {start + size} of {storage.size}"
        )
    return StorageSpan(storage, start, size)


def _count(value: object, what: str) -> int:
    # The bound keeps sums and products of a few of these numbers small.
    if type(value) is not int or not 0 <= value <= limits.MAX_FILE_BYTES:
        raise Refusal(f"{what} {shown(value)}; expected 0 to {limits.MAX_FILE_BYTES}")
    return value


# Constructors ----------------------------------------------------------------


def _strided(
    span: object, offset: object, shape: object, strides: object, dtype: np.dtype | None
) -> StridedArray:
    """A checked view; `dtype` None takes that of the storage."""
    if not isinstance(span, StorageSpan):
        raise Refusal(f"a tensor on {shown(span)}; expected a storage")
    kind = span.storage.kind
    # Either the storage has a dtype or the tensor brings one for untyped bytes.
    if (dtype is None) == (kind.dtype is None):
        raise Refusal("a tensor and its storage with two dtypes or none")
    dtype = kind.dtype if dtype is None else dtype
    assert dtype is not None
    if type(shape) is not tuple or type(strides) is not tuple:
        raise Refusal("a tensor whose shape or strides are not a tuple")
    sizes = stored_array.checked_shape(shape)
    steps = tuple(_count(step, "stride") for step in strides)
    if len(sizes) != len(steps):
        raise Refusal(f"a tensor of {len(sizes)} axes with {len(steps)} strides")
    # In bytes, because an untyped storage counts them and a typed one elements.
    first = span.start * kind.itemsize + _count(offset, "offset") * dtype.itemsize
    room = (span.start + span.size) * kind.itemsize
    reach = sum((size - 1) * step for size, step in zip(sizes, steps, strict=True)) + 1
    elements = math.prod(sizes)
    if elements and first + reach * dtype.itemsize > room:
        raise Refusal(
            f"a tensor of shape {list(sizes)} and strides {list(steps)} reads to byte "
            f"{first + reach * dtype.itemsize} of a storage of {room}"
        )
    stored = span.size * kind.itemsize // dtype.itemsize
    if elements > max(stored, limits.MAX_BROADCAST_ELEMENTS):
        raise Refusal(
            f"a tensor of {elements} elements that repeats the {stored} of its storage"
        )
    steps_bytes = tuple(step * dtype.itemsize for step in steps)
    return StridedArray(dtype, sizes, span.storage, first, steps_bytes)


def _arity(arguments: tuple, fewest: int, most: int) -> None:
    if not fewest <= len(arguments) <= most:
        raise Refusal(f"{len(arguments)} arguments; expected {fewest} to {most}")


def _flags(requires_grad: object, hooks: object) -> None:
    # None is what torch 0.4 wrote for an empty OrderedDict.
    if hooks is not None and (not isinstance(hooks, dict) or hooks):
        raise Refusal("a tensor with hooks")
    if type(requires_grad) is not bool:
        raise Refusal(f"requires_grad {shown(requires_grad)}; expected True or False")


def _rebuild_tensor(arguments: tuple) -> StridedArray:
    _arity(arguments, 4, 4)
    span, offset, shape, strides = arguments
    return _strided(span, offset, shape, strides, None)


def _rebuild_tensor_v2(arguments: tuple) -> StridedArray:
    _arity(arguments, 6, 7)
    span, offset, shape, strides, requires_grad, hooks, *extras = arguments
    _flags(requires_grad, hooks)
    # Says that the values are to be conjugated or negated when read.
    if any(extra is not None for extra in extras):
        raise Refusal("a tensor with metadata")
    return _strided(span, offset, shape, strides, None)


def _rebuild_tensor_v3(arguments: tuple) -> StridedArray:
    _arity(arguments, 7, 8)
    span, offset, shape, strides, requires_grad, hooks, dtype, *extras = arguments
    _flags(requires_grad, hooks)
    if not isinstance(dtype, np.dtype):
        raise Refusal(f"a tensor with the dtype {shown(dtype)}")
    if any(extra is not None for extra in extras):
        raise Refusal("a tensor with metadata")
    return _strided(span, offset, shape, strides, dtype)


def _rebuild_parameter(arguments: tuple) -> StridedArray:
    _arity(arguments, 3, 3)
    data, requires_grad, hooks = arguments
    _flags(requires_grad, hooks)
    if not isinstance(data, StridedArray):
        raise Refusal(f"a parameter made of {shown(data)}; expected a tensor")
    return data


def _size(arguments: tuple) -> tuple[int, ...]:
    _arity(arguments, 1, 1)
    if not isinstance(arguments[0], (list, tuple)):
        raise Refusal(f"a torch.Size made of {shown(arguments[0])}")
    return stored_array.checked_shape(arguments[0])


_INERT_CALL = Constructor(lambda arguments: INERT)

_DTYPE_NAMES = {
    "float64": ("float64", "double", "DoubleStorage"),
    "float32": ("float32", "float", "FloatStorage"),
    "float16": ("float16", "half", "HalfStorage"),
    "bfloat16": ("bfloat16", "BFloat16Storage"),
    "int64": ("int64", "long", "LongStorage"),
    "int32": ("int32", "int", "IntStorage"),
    "int16": ("int16", "short", "ShortStorage"),
    "int8": ("int8", "CharStorage"),
    "uint8": ("uint8", "ByteStorage"),
    "bool": ("bool", "BoolStorage"),
    "uint16": ("uint16",),
    "uint32": ("uint32",),
    "uint64": ("uint64",),
}

# Everything a torch file may name.
ALLOWED_GLOBALS: Globals = {
    **{
        ("torch", alias): StorageClass(stored_array.DTYPES[name])
        if alias.endswith("Storage")
        else stored_array.DTYPES[name]
        for name, aliases in _DTYPE_NAMES.items()
        for alias in aliases
    },
    ("torch.storage", "UntypedStorage"): StorageClass(None),
    ("torch._utils", "_rebuild_tensor"): Constructor(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Constructor(_rebuild_tensor_v2),
    ("torch._utils", "_rebuild_tensor_v3"): Constructor(_rebuild_tensor_v3),
    ("torch._utils", "_rebuild_parameter"): Constructor(_rebuild_parameter),
    ("torch", "Size"): Constructor(_size),
    ("collections", "OrderedDict"): ORDERED_DICT,
    # Beside the weights, never looked at.
    ("torch", "device"): _INERT_CALL,
    ("collections", "Counter"): _INERT_CALL,
    ("_codecs", "encode"): _INERT_CALL,
    ("numpy", "dtype"): _INERT_CALL,
    ("numpy", "ndarray"): INERT,
    **{
        (module, name): _INERT_CALL
        for module in ("numpy.core.multiarray", "numpy._core.multiarray")
        for name in ("scalar", "_reconstruct")
    },
}
