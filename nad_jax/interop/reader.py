# SPDX-License-Identifier: Apache-2.0
"""Reads a model file of any accepted format, trusting neither its name nor its content.

The format is decided by the first bytes, then one strict reader runs, once. When it
refuses the file that is the answer: there is no second, looser attempt.

    torch-zip     torch.save since 1.6        torch_reader
    torch-legacy  torch.save before           torch_reader
    safetensors                               safetensors_file
    flax-msgpack  flax.serialization          msgpack_reader
"""

import dataclasses
import os

import numpy as np

from nad_jax.interop import (
    bounded_file,
    model_entry,
    msgpack_reader,
    safetensors_file,
    stored_array,
    torch_reader,
)
from nad_jax.interop.bounded_file import shown

FORMATS = ("torch-zip", "torch-legacy", "safetensors", "flax-msgpack")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The model entry of a file.

    Attributes:
        arrays: name -> read-only array, all finite; torch layout and names for torch
            files, "params/..." names for Flax ones, as found for safetensors.
        format: one of `FORMATS`.
        metadata: numbers and short texts saved beside the model.
        sha256: of the file these were read from, in hexadecimal.
    """

    arrays: dict[str, np.ndarray]
    format: str
    metadata: dict[str, object]
    sha256: str


def read_checkpoint(
    path: str | os.PathLike[str], *, entry: str | None = None
) -> Checkpoint:
    """The model in the file at `path`, whatever accepted format it has.

    Nothing in the file is executed, imported or believed: memory stays below the size
    of the file plus 300 MB.

    Args:
        path: one file. Checkpoint folders are not read here.
        entry: key of the model entry, needed only if the file holds several.

    Raises:
        InputError: one line that names the file, what is wrong with it and where.
    """
    with bounded_file.BoundedFile(path) as file:
        format_name = detect_format(file)
        if format_name == "torch-zip":
            arrays, metadata = torch_reader.read_zip(file, entry=entry)
        elif format_name == "torch-legacy":
            arrays, metadata = torch_reader.read_legacy(file, entry=entry)
        elif format_name == "flax-msgpack":
            arrays, metadata = msgpack_reader.read_open_file(file, entry=entry)
        else:
            if entry is not None:
                raise file.error("a safetensors file has no entries; leave entry out")
            arrays, metadata = safetensors_file.read_open_file(file)
            arrays = model_entry.without_parallel_prefix(arrays)
            arrays = model_entry.checked_names(arrays, file)
        _check_finite(arrays, file)
        # Of the file that is open, whatever its path leads to by now; last, so that
        # what is refused is refused at once.
        return Checkpoint(arrays, format_name, dict(metadata), file.sha256())


def detect_format(file: bounded_file.BoundedFile) -> str:
    """One of `FORMATS`, from the first bytes of the file."""
    start = file.read(0, min(file.size, 16))
    if safetensors_file.looks_like_safetensors(file):
        return "safetensors"
    if start[:4] == b"PK\x03\x04":
        return "torch-zip"
    # A pickle of protocol 2 to 5. The byte before also begins an empty msgpack map,
    # after which nothing could follow.
    if start[:1] == b"\x80" and len(start) > 1:
        return "torch-legacy"
    # A msgpack map, in its three lengths.
    if 0x81 <= start[0] <= 0x8F or start[0] in (0xDE, 0xDF):
        return "flax-msgpack"
    raise file.error(
        f"unknown format, it begins with {shown(start)}; accepted by content are "
        f"{', '.join(FORMATS)}"
    )


def _check_finite(
    arrays: dict[str, np.ndarray], file: bounded_file.BoundedFile
) -> None:
    bad = {
        name: count
        for name, array in arrays.items()
        if stored_array.is_floating(array.dtype)
        and (count := stored_array.count_nonfinite(array))
    }
    if bad:
        name, count = next(iter(bad.items()))
        more = f", and {len(bad) - 1} more arrays hold some" if len(bad) > 1 else ""
        raise file.error(
            f"{shown(name)} holds {count} NaN or infinite values of "
            f"{arrays[name].size}{more}; weights must be finite"
        )
