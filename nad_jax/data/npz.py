# SPDX-License-Identifier: Apache-2.0
"""A NumPy `.npz` file of images and labels, read without ever unpickling.

    images_train, labels_train, images_test, labels_test      both splits given, or
    images, labels                                            a seeded 80/20 split
    class_names (optional)                                    strings, one per class

Images are uint8 `[N, H, W, C]`, labels any integers `[N]`. Without `class_names` the
number of classes is the largest label of the whole file plus one.
"""

import contextlib
import os
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from nad_jax import errors
from nad_jax.data import pictures, sources

# One wild label would otherwise ask for a last layer of any size.
_MAX_CLASSES = 2**16


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
    if data_dir is None:
        raise errors.InputError(f"{name}: give data_dir, the path of the .npz file")
    path = pathlib.Path(data_dir).expanduser()
    with _open(path) as archive:
        images, labels, num_classes = _read_split(archive, split)
        class_names = _read_class_names(archive)
    if labels.shape != images.shape[:1]:
        raise errors.InputError(f"{path}: {len(images)} images, {len(labels)} labels")
    return sources.Dataset(
        images=pictures.resize(images, image_size),
        labels=labels,
        num_classes=len(class_names) or num_classes,
        name=path.stem,
        class_names=class_names,
    )


def _read_split(
    archive: zipfile.ZipFile, split: str
) -> tuple[np.ndarray, np.ndarray, int]:
    """Images, labels and the number of classes in the whole file."""
    found = _array_names(archive)
    if "images_train" in found or "images_test" in found:
        all_labels = {s: _read_labels(archive, f"labels_{s}") for s in sources.SPLITS}
        num_classes = 1 + max(int(labels.max()) for labels in all_labels.values())
        return _read_images(archive, f"images_{split}"), all_labels[split], num_classes
    images, labels = _read_images(archive, "images"), _read_labels(archive, "labels")
    if len(images) != len(labels):
        return images, labels, 0  # refused by the caller
    rows = sources.seeded_split(
        labels, split, test_counts=sources.fifth_of_each_class(labels)
    )
    if not len(rows):
        raise errors.InputError(f"{len(labels)} images are too few for an 80/20 split")
    return images[rows], labels[rows], 1 + int(labels.max())


def _read_images(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    images = _read_array(archive, name)
    if images.dtype != np.uint8 or images.ndim != 4:
        raise errors.InputError(
            f"{name} must be uint8 [N, H, W, C], "
            f"not {images.dtype} {list(images.shape)}"
        )
    return images


def _read_labels(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    labels = _read_array(archive, name)
    if labels.dtype.kind not in "iu" or labels.ndim != 1 or not labels.size:
        raise errors.InputError(
            f"{name} must be integers [N], not {labels.dtype} {list(labels.shape)}"
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= _MAX_CLASSES:
        raise errors.InputError(
            f"{name} are {low}..{high}, accepted 0..{_MAX_CLASSES - 1}"
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
    return tuple(names.tolist())


def _array_names(archive: zipfile.ZipFile) -> list[str]:
    return sorted(entry.removesuffix(".npy") for entry in archive.namelist())


def _read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array; its header must agree with the file before memory is claimed."""
    try:
        entry = archive.getinfo(f"{name}.npy")
    except KeyError:
        found = ", ".join(_array_names(archive))
        raise errors.InputError(f"has no array {name!r}; it holds: {found}") from None
    with archive.open(entry) as stream:
        version = np.lib.format.read_magic(stream)
        if version == (1, 0):
            header = np.lib.format.read_array_header_1_0(stream)
        elif version == (2, 0):
            header = np.lib.format.read_array_header_2_0(stream)
        else:
            raise errors.InputError(f"{name}: unknown .npy version {version}")
        shape, is_fortran, dtype = header
        if dtype.kind not in "uifbU":
            raise errors.InputError(f"{name} has dtype {dtype}, accepted are numbers")
        num_bytes = sources.check_bytes(shape, dtype.itemsize, name)
        held = entry.file_size - stream.tell()
        if num_bytes != held:
            raise errors.InputError(
                f"{name}: {dtype} {list(shape)} takes {num_bytes:,} bytes, "
                f"the file holds {held:,}"
            )
        data = stream.read(num_bytes)
    if len(data) != num_bytes:
        raise errors.InputError(f"{name}: cut off after {len(data):,} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if is_fortran else "C")


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
