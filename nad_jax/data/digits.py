# SPDX-License-Identifier: Apache-2.0
"""The 1,797 handwritten digits inside scikit-learn: real images without a download.

The file is read from the installed package without importing it, which would cost a
second of every start.
"""

import gzip
import importlib.util
import os
import pathlib

import numpy as np

from nad_jax import errors
from nad_jax.data import sources

_NUM_IMAGES, _SIDE, _MAX_VALUE, _NUM_CLASSES = 1797, 8, 16, 10
_DEFAULT_IMAGE_SIZE = 16
_TEST_IMAGES_PER_CLASS = 50


def load(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> sources.Dataset:
    """The digits as grey RGB images, 16x16 unless `image_size` says otherwise.

    Test holds 50 images of each class drawn with a fixed seed (500 in all), train the
    other 1,297 (124 to 133 of each class). The stored 8x8 images with values 0..16 are
    scaled to 0..255 and each pixel is repeated, so `image_size` is a multiple of 8.
    """
    del data_dir  # The data come with scikit-learn.
    size = _DEFAULT_IMAGE_SIZE if image_size is None else image_size
    if size % _SIDE:
        raise errors.InputError(
            f"{name}: image_size must be a multiple of 8, not {size}"
        )
    table = _read_table()
    labels = table[:, -1].astype(np.int32)
    rows = sources.seeded_split(
        labels, split, test_counts=np.full(_NUM_CLASSES, _TEST_IMAGES_PER_CLASS)
    )
    sources.check_bytes((len(rows), size, size, 3), 1, f"{name} of image_size {size}")
    small = table[rows, :-1].reshape(-1, _SIDE, _SIDE, 1).astype(np.uint16)
    grey = ((small * 255 + _MAX_VALUE // 2) // _MAX_VALUE).astype(np.uint8)
    repeats = size // _SIDE
    return sources.Dataset(
        images=grey.repeat(repeats, axis=1).repeat(repeats, axis=2).repeat(3, axis=3),
        labels=labels[rows],
        num_classes=_NUM_CLASSES,
        name=name,
    )


def _read_table() -> np.ndarray:
    """Rows of 64 pixel values and a label, uint8 `[1797, 65]`."""
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise errors.InputError(
            "digits: scikit-learn, which contains them, is not installed; "
            "get it with: pip install scikit-learn"
        )
    package = pathlib.Path(spec.submodule_search_locations[0])
    path = package / "datasets" / "data" / "digits.csv.gz"
    try:
        with gzip.open(path, "rt", encoding="ascii") as lines:
            table = np.loadtxt(lines, delimiter=",", dtype=np.uint8)
    except (OSError, EOFError, ValueError) as error:
        raise errors.InputError(f"digits: cannot read {path}: {error}") from error
    if table.shape != (_NUM_IMAGES, _SIDE**2 + 1) or table[:, :-1].max() != _MAX_VALUE:
        raise errors.InputError(f"digits: {path} does not hold the known 1,797 digits")
    return table
