# SPDX-License-Identifier: Apache-2.0
"""Arrays that lie in a file: described and checked first, read when they are wanted.

Every reader turns what a file declares into a `StoredArray` and compares it with the
bytes that are really there. Only the arrays of the model entry are then loaded, so an
optimizer state is checked but costs no memory.
"""

import abc
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from nad_jax.interop import bounded_file, limits

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

# Every dtype accepted from a file, by numpy's name for it.
DTYPES: dict[str, np.dtype] = {
    "bfloat16": BFLOAT16,
    **{
        name: np.dtype(name).newbyteorder("<")
        for name in (
            *("float64", "float32", "float16", "bool"),
            *("int64", "int32", "int16", "int8"),
            *("uint64", "uint32", "uint16", "uint8"),
        )
    },
}

_SCAN_ELEMENTS = 2**18


def is_floating(dtype: np.dtype) -> bool:
    """Whether the accepted `dtype` can hold NaN and infinity."""
    return dtype.kind == "f" or dtype == BFLOAT16


def checked_shape(shape: Sequence[object]) -> tuple[int, ...]:
    """`shape` as a tuple of sane sizes; `Refusal` when it is not one."""
    if len(shape) > limits.MAX_AXES:
        raise bounded_file.Refusal(
            f"an array with {len(shape)} axes; at most {limits.MAX_AXES} are read"
        )
    sizes: list[int] = []
    elements = 1
    for size in shape:
        # `type` and not `isinstance`: True is an int too.
        if type(size) is not int or size < 0:
            raise bounded_file.Refusal(
                f"a size of {bounded_file.shown(size)} in a shape; sizes are "
                "integers >= 0"
            )
        sizes.append(size)
        # Inside the loop, so that the product never becomes a number of many digits.
        elements *= max(size, 1)
        if elements > limits.MAX_ELEMENTS:
            raise bounded_file.Refusal(
                f"a shape with more than {limits.MAX_ELEMENTS} elements"
            )
    return tuple(sizes)


@dataclasses.dataclass(frozen=True, slots=True)
class StoredArray(abc.ABC):
    """An array of a file whose extent has been checked.

    Attributes:
        dtype: one of `DTYPES`.
        shape: sizes of its axes.
    """

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the array once every repeated element is counted."""
        return math.prod(self.shape) * self.dtype.itemsize

    @abc.abstractmethod
    def load(self) -> np.ndarray:
        """The array itself, read-only."""


@dataclasses.dataclass(frozen=True, slots=True)
class PackedArray(StoredArray):
    """An array whose elements follow each other in row-major order.

    Attributes:
        file: where they are.
        pieces: (offset, bytes) of the parts, in order; one unless the writer split it.
    """

    file: bounded_file.BoundedFile
    pieces: tuple[tuple[int, int], ...]

    def load(self) -> np.ndarray:
        raw = np.empty(self.nbytes, np.uint8)
        start = 0
        for offset, count in self.pieces:
            self.file.read_into(offset, raw[start : start + count])
            start += count
        return view_bytes(raw, self.dtype, self.shape)


def view_bytes(
    raw: np.ndarray,
    dtype: np.dtype,
    shape: tuple[int, ...],
    offset_bytes: int = 0,
    strides_bytes: tuple[int, ...] | None = None,
) -> np.ndarray:
    """A read-only view of the bytes `raw` as an array; numpy checks the extent again.

    Raises:
        Refusal: for a boolean that is neither 0 nor 1, which numpy would not notice.
    """
    raw.flags.writeable = False
    if 0 in shape:
        array = np.zeros(shape, dtype)
        array.flags.writeable = False
        return array
    as_bytes = np.uint8 if dtype == np.bool_ else dtype
    array = np.ndarray(shape, as_bytes, raw.data, offset_bytes, strides_bytes)
    if dtype != np.bool_:
        return array
    if any((chunk > 1).any() for chunk in _chunks(array)):
        raise bounded_file.Refusal("a boolean array with a byte other than 0 and 1")
    return array.view(np.bool_)


def count_nonfinite(array: np.ndarray) -> int:
    """How many elements of a floating array are NaN or infinite."""
    return sum(
        chunk.size - int(np.count_nonzero(np.isfinite(chunk)))
        for chunk in _chunks(array)
    )


def _chunks(array: np.ndarray) -> Any:
    # Piecewise, so that looking at an array never costs a second one of its size.
    if array.size <= _SCAN_ELEMENTS:
        return (array,)
    return np.nditer(
        array, ["external_loop", "buffered"], ["readonly"], buffersize=_SCAN_ELEMENTS
    )


def load_all(
    arrays: Mapping[str, StoredArray], file: bounded_file.BoundedFile
) -> dict[str, np.ndarray]:
    """Reads the chosen arrays, having bounded what they may claim together."""
    total = sum(array.nbytes for array in arrays.values())
    bound = limits.MAX_SHARING_FACTOR * file.size + limits.SHARING_SLACK_BYTES
    if total > bound:
        raise file.error(
            f"its arrays claim {total} bytes by sharing storages; at most {bound} "
            "are accepted for a file of this size"
        )
    loaded: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        try:
            loaded[name] = array.load()
        except bounded_file.Refusal as refusal:
            raise file.error(f"{bounded_file.shown(name)}: {refusal}") from None
    return loaded
