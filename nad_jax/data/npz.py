# SPDX-License-Identifier: Apache-2.0
"""A NumPy `.npz` file of images and labels, read without ever unpickling.

    images_train, labels_train, images_test, labels_test      both splits given, or
    images, labels                                            a seeded 80/20 split
    class_names (optional)                                    strings, one per class

Images are uint8 `[N, H, W, C]`, labels any integers `[N]`. Without `class_names` the
number of classes is the largest label of the whole file plus one.
"""

import contextlib
import io
import math
import os
import pathlib
import struct
import zipfile
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np

from nad_jax import errors
from nad_jax.data import pictures, sources, stored

# What stands before the data of a zip entry: 26 bytes, then the lengths of the name and
# of the extra field, which follow.
_ENTRY_HEADER = struct.Struct("<26xHH")
_CHECK_BYTES = 2**20

# Header of an array, a line of text; NumPy reads what is declared before it looks.
_MAX_HEADER_BYTES = 2**16
# Version of the .npy format -> how it writes the length of the header, who reads it.
_HEADERS: dict[tuple[int, int], tuple[struct.Struct, Callable[..., Any]]] = {
    (1, 0): (struct.Struct("<H"), np.lib.format.read_array_header_1_0),
    (2, 0): (struct.Struct("<I"), np.lib.format.read_array_header_2_0),
}

# A compressed array may unpack to so many times its bytes, or to so many in any case:
# deflate makes a thousand times as much of zeros, pictures a tenth of that at best.
_MAX_EXPANSION, _FREE_BYTES = 128, 2**28


def load(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> sources.Dataset:
    """The images of the `.npz` file `data_dir`, in stored order.

    The 80/20 split holds out a fifth of each class with a fixed seed; it depends on the
    labels and their order only.

    Raises:
      InputError: if arrays are missing, of the wrong type or shape, damaged or too
        large, or if a label has no class.
    """
    path = _path(name, data_dir)
    with _open(path) as archive:
        images = _read_array(archive, _images_name(archive, split))
        part = _find_split(archive, split)
        _check_images(part, images.dtype, images.shape)
        class_names = _read_class_names(archive)
    if len(part.rows) < len(images):  # Otherwise they are all there, in order.
        images = images[part.rows]
    return sources.Dataset(
        images=pictures.resize(images, image_size),
        labels=part.labels[part.rows],
        num_classes=len(class_names) or part.num_classes,
        name=path.stem,
        class_names=class_names,
    )


def open_stored(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> sources.Dataset:
    """As `load`, with images that stay in the file.

    The array of images is read through once, to see that it is undamaged.

    Raises:
      InputError: as `load`, and for compressed images (`np.savez_compressed`), which
        cannot be read one by one.
    """
    path = _path(name, data_dir)
    with _open(path) as archive:
        part = _find_split(archive, split)
        reader = _locate_images(archive, path, part, image_size)
        class_names = _read_class_names(archive)
    return sources.Dataset(
        images=stored.Images(reader),
        labels=part.labels[part.rows],
        num_classes=len(class_names) or part.num_classes,
        name=path.stem,
        class_names=class_names,
    )


class _Split(NamedTuple):
    """Where a split is found.

    Attributes:
      images: Name of the array of images.
      rows: Its rows that belong to the split, int `[M]` ascending.
      labels: int32 `[N]`, of the whole array.
      num_classes: Of the whole file.
    """

    images: str
    rows: np.ndarray
    labels: np.ndarray
    num_classes: int


def _path(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    if data_dir is None:
        raise errors.InputError(f"{name}: give data_dir, the path of the .npz file")
    return sources.user_path(data_dir)


def _images_name(archive: zipfile.ZipFile, split: str) -> str:
    """The array that holds the images of a split."""
    found = _array_names(archive)
    both = "images_train" in found or "images_test" in found
    return f"images_{split}" if both else "images"


def _find_split(archive: zipfile.ZipFile, split: str) -> _Split:
    images = _images_name(archive, split)
    if images != "images":
        all_labels = {s: _read_labels(archive, f"labels_{s}") for s in sources.SPLITS}
        num_classes = 1 + max(int(labels.max()) for labels in all_labels.values())
        labels = all_labels[split]
        return _Split(images, np.arange(len(labels)), labels, num_classes)
    labels = _read_labels(archive, "labels")
    rows = sources.seeded_split(
        labels, split, test_counts=sources.fifth_of_each_class(labels)
    )
    return _Split(images, rows, labels, 1 + int(labels.max()))


def _check_images(part: _Split, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8 or len(shape) != 4:
        raise errors.InputError(
            f"{part.images} must be uint8 [N, H, W, C], not {dtype} {list(shape)}"
        )
    if shape[0] != len(part.labels):
        raise errors.InputError(f"{shape[0]} images, {len(part.labels)} labels")
    if not len(part.rows):
        raise errors.InputError(f"{shape[0]} images are too few for an 80/20 split")


class _ImagesInFile:
    """A `stored.Reader` of an array that lies in a file as it would in memory."""

    def __init__(
        self,
        path: pathlib.Path,
        *,
        offset: int,
        image_shape: tuple[int, int, int],
        rows: np.ndarray,
        image_size: int | None,
        identity: str,
    ):
        self._path = path
        self._offset = offset
        self._image_shape = image_shape
        self._rows = rows
        self._image_size = image_size
        height, width, channels = image_shape
        if image_size is not None:
            height = width = image_size
        self.shape = (len(rows), height, width, channels)
        self.identity = identity

    def read(self, rows: np.ndarray) -> np.ndarray:
        images = np.empty((len(rows), *self._image_shape), np.uint8)
        num_bytes = math.prod(self._image_shape)
        try:
            # Not a memory map: a file that shrinks meanwhile would end the process.
            with open(self._path, "rb", buffering=0) as file:
                for image, row in zip(images, self._rows[rows].tolist(), strict=True):
                    place = self._offset + row * num_bytes
                    if os.preadv(file.fileno(), [image.data], place) != num_bytes:
                        raise errors.InputError(f"{self._path}: cut off")
        except OSError as error:
            raise errors.InputError(
                f"{self._path}: {error.strerror or error}"
            ) from error
        return pictures.resize(images, self._image_size)


def _locate_images(
    archive: zipfile.ZipFile,
    path: pathlib.Path,
    part: _Split,
    image_size: int | None,
) -> _ImagesInFile:
    entry = _find_entry(archive, part.images)
    if entry.compress_type != zipfile.ZIP_STORED:
        raise errors.InputError(
            f"{part.images} is compressed; store it with np.savez, or use "
            "config.data.loader=device"
        )
    with archive.open(entry) as stream:
        header = _read_header(stream, entry, part.images, limit=math.inf)
        offset = stream.tell()
        # At the end zipfile compares the checksum.
        while stream.read(_CHECK_BYTES):
            pass
    _check_images(part, header.dtype, header.shape)
    if header.is_fortran:
        raise errors.InputError(
            f"{part.images} is in Fortran order; store np.ascontiguousarray of it, or "
            "use config.data.loader=device"
        )
    with path.open("rb") as file:
        file.seek(entry.header_offset)
        before = file.read(_ENTRY_HEADER.size)
        offset += file.tell() + sum(_ENTRY_HEADER.unpack(before))
    _, height, width, channels = header.shape
    return _ImagesInFile(
        path,
        offset=offset,
        image_shape=(height, width, channels),
        rows=part.rows,
        image_size=image_size,
        identity=f"{header.shape} {entry.CRC:08x}",
    )


def _read_labels(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    labels = _read_array(archive, name)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not labels.size:
        raise errors.InputError(
            f"{name} must be integers [N], not {labels.dtype} {list(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    # One wild label would otherwise ask for a last layer of any size.
    if low < 0 or high >= sources.MAX_CLASSES:
        raise errors.InputError(
            f"{name} are {low}..{high}, accepted 0..{sources.MAX_CLASSES - 1}"
        )
    return labels.astype(np.int32)


def _read_class_names(archive: zipfile.ZipFile) -> tuple[str, ...]:
    if "class_names" not in _array_names(archive):
        return ()
    names = _read_array(archive, "class_names")
    if names.dtype.kind != "U" or names.ndim != 1:
        raise errors.InputError(
            f"class_names must be strings [K], not {names.dtype} {list(names.shape)}"
        )
    sources.check_classes(len(names))
    return tuple(names.tolist())


def _array_names(archive: zipfile.ZipFile) -> list[str]:
    return sorted(entry.removesuffix(".npy") for entry in archive.namelist())


class _Header(NamedTuple):
    """What stands before the values of an array."""

    shape: tuple[int, ...]
    is_fortran: bool
    dtype: np.dtype


def _find_entry(archive: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
    try:
        return archive.getinfo(f"{name}.npy")
    except KeyError:
        found = ", ".join(_array_names(archive))
        raise errors.InputError(f"has no array {name!r}; it holds: {found}") from None


def _read_header(
    stream: IO[bytes], entry: zipfile.ZipInfo, name: str, *, limit: float
) -> _Header:
    """The header, which must agree with the size of the entry and with `limit`."""
    version = np.lib.format.read_magic(stream)
    if version not in _HEADERS:
        raise errors.InputError(f"{name}: unknown .npy version {version}")
    length, read = _HEADERS[version]
    start = stream.read(length.size)
    (num_bytes,) = length.unpack(start)
    if num_bytes > _MAX_HEADER_BYTES:
        raise errors.InputError(
            f"{name}: a header of {num_bytes:,} bytes, accepted up to "
            f"{_MAX_HEADER_BYTES:,}"
        )
    header = io.BytesIO(start + stream.read(num_bytes))
    shape, is_fortran, dtype = read(header)
    if dtype.kind not in "uifbU":
        raise errors.InputError(f"{name} has dtype {dtype}, accepted are numbers")
    if min(shape, default=0) < 0:
        raise errors.InputError(f"{name} has the shape {list(shape)}")
    num_bytes = sources.check_bytes(shape, dtype.itemsize, name, limit=limit)
    held = entry.file_size - stream.tell()
    if num_bytes != held:
        raise errors.InputError(
            f"{name}: {dtype} {list(shape)} takes {num_bytes:,} bytes, "
            f"the file holds {held:,}"
        )
    return _Header(shape, is_fortran, dtype)


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; its header must agree with the file before memory is claimed."""
    entry = _find_entry(archive, name)
    with archive.open(entry) as stream:
        assert archive.filename is not None  # It was opened by its path.
        packed = min(entry.compress_size, os.path.getsize(archive.filename))
        limit = max(_MAX_EXPANSION * packed, _FREE_BYTES)
        limit = min(limit, sources.MAX_BYTES)
        header = _read_header(stream, entry, name, limit=limit)
        num_bytes = math.prod(header.shape) * header.dtype.itemsize
        data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise errors.InputError(f"{name}: cut off after {len(data):,} bytes")
    order = "F" if header.is_fortran else "C"
    return np.frombuffer(data, header.dtype).reshape(header.shape, order=order)


@contextlib.contextmanager
def _open(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """The archive; whatever goes wrong inside becomes one line that names it."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except OSError as error:
        raise errors.InputError(f"{path}: {error.strerror or error}") from error
    # zipfile, zlib and the .npy header parser raise all sorts on malformed files.
    except Exception as error:
        raise errors.InputError(f"{path}: {sources.first_line(error)}") from error
