# SPDX-License-Identifier: Apache-2.0
"""What a data set is, and the one door through which every data set is loaded.

A source is a function `load(name, *, split, data_dir, image_size) -> Dataset` in a file
of its own. To add one, write that file and add one line to `SOURCES`; it is imported
when it is first asked for, so that nobody pays for what they do not use. A function
`open_stored` beside it, with the same arguments, returns the same data set with images
that stay in their files (`nad_jax.data.stored`).

Conventions shared by all sources:

- images are uint8 `[N, H, W, C]`, labels int32 `[N]`, both read-only; images are an
  array or, when asked for, `stored.Images`, which are read when they are indexed;
- `split` is "train" or "test", and the same call always returns the same rows in the
  same order on every machine;
- what comes from outside is untrusted: nothing is unpickled, sizes are checked before
  memory is claimed, and a mistake is one `InputError` that says what to do.
"""

import dataclasses
import importlib
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from nad_jax import errors
from nad_jax.data import stored

SPLITS = ("train", "test")

# A data set lives in memory as a whole; more than this is taken for a damaged file.
MAX_BYTES = 8 * 2**30

# Each has a name and an output of the last layer; more is taken for a damaged file.
MAX_CLASSES = 2**16

# Never change: the rows of every seeded split follow from it.
_SPLIT_SEED = 0


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Images with their labels, validated when made and never changed afterwards.

    Attributes:
      images: uint8 `[N, H, W, C]`, N > 0, read-only; an array or `stored.Images`.
      labels: int32 `[N]` in `[0, num_classes)`, read-only.
      num_classes: number of classes, 1 to `MAX_CLASSES`.
      name: what the data set is called in reports.
      class_names: one name per class; "0", "1", ... when left empty.
    """

    images: Any
    labels: np.ndarray
    num_classes: int
    name: str
    class_names: tuple[str, ...] = ()

    def __post_init__(self):
        def refuse(reason: str):
            raise errors.InputError(f"data set {self.name!r}: {reason}")

        images, labels = self.images, np.asarray(self.labels)
        if not isinstance(images, stored.Images):
            images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4:
            refuse(f"images must be uint8 [N, H, W, C], not {_describe(images)}")
        if 0 in images.shape:
            refuse(f"it is empty: images are {_describe(images)}")
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            refuse(f"labels must be int32 [{len(images)}], not {_describe(labels)}")
        low, high = int(labels.min()), int(labels.max())
        try:
            check_classes(self.num_classes)
        except errors.InputError as error:
            refuse(str(error))
        if low < 0 or high >= self.num_classes:
            refuse(f"labels are {low}..{high}, accepted 0..{self.num_classes - 1}")
        names = tuple(self.class_names) or tuple(map(str, range(self.num_classes)))
        if len(names) != self.num_classes:
            refuse(f"{len(names)} class names for {self.num_classes} classes")
        if not isinstance(images, stored.Images):
            images = _read_only(images)
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "labels", _read_only(labels))
        object.__setattr__(self, "class_names", names)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> "Dataset":
        """The data set with only `rows` (int `[M]`), in that order."""
        rows = np.asarray(rows)
        return dataclasses.replace(
            self, images=self.images[rows], labels=self.labels[rows]
        )

    def replaced(
        self, rows: np.ndarray, images: np.ndarray, labels: np.ndarray
    ) -> "Dataset":
        """The data set with other images and labels at `rows`, int `[M]`, no row twice.

        What stays in files is not copied; the new images are held in memory.
        """
        all_labels = self.labels.copy()
        all_labels[rows] = labels
        if isinstance(self.images, stored.Images):
            all_images = self.images.replaced(rows, images)
        else:
            all_images = self.images.copy()
            all_images[rows] = images
        return dataclasses.replace(self, images=all_images, labels=all_labels)


Loader = Callable[..., Dataset]

# Any other name is looked for among the data sets that TFDS has prepared.
_TFDS = "nad_jax.data.tfds_directory:load"

SOURCES: dict[str, str | Loader] = {
    "cifar10": _TFDS,
    "digits": "nad_jax.data.digits:load",
    "folder": "nad_jax.data.folder:load",
    "npz": "nad_jax.data.npz:load",
}


def load(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
    in_memory: bool = True,
) -> Dataset:
    """One split of a data set.

    Args:
      name: a key of `SOURCES`, or any other data set in TFDS layout under `data_dir`
        that has the features `image` and `label`, as "name", "name/config" or
        "name:1.0.0".
      split: "train" or "test".
      data_dir: where the data are. For TFDS data sets the folder that holds them (None:
        `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`); for "folder" the folder of
        class folders; for "npz" the file; not used by "digits".
      image_size: height and width in pixels to bring all images to (aspect ratio is not
        kept); None keeps the stored size.
      in_memory: False leaves the images in their files. Labels are read in any case; of
        a TFDS data set all records are, once, and what was learnt is kept in the cache.

    Returns:
      The split, in a fixed order.

    Raises:
      InputError: for an unknown name or split, and for data that are missing, damaged
        or not in the expected form.
    """
    if split not in SPLITS:
        raise errors.InputError(f"split must be one of {SPLITS}, not {split!r}")
    if image_size is not None and not 1 <= image_size <= 4096:
        raise errors.InputError(f"image_size must be in 1..4096, not {image_size!r}")
    source = SOURCES.get(name, _TFDS)
    if isinstance(source, str):
        module, function = source.split(":")
        function = function if in_memory else "open_stored"
        source = getattr(importlib.import_module(module), function, None)
    elif not in_memory:
        source = None
    if source is None:
        raise errors.InputError(
            f"{name!r} has no files of which images could be read one by one; use "
            "config.data.loader=device"
        )
    try:
        return source(name, split=split, data_dir=data_dir, image_size=image_size)
    except OSError as error:
        reason = error.strerror or error
        raise errors.InputError(f"{data_dir or name}: {reason}") from error


def seeded_split(
    labels: np.ndarray, split: str, *, test_counts: np.ndarray
) -> np.ndarray:
    """Sorted rows of `split` when a data set comes in one piece.

    Of each class c, `test_counts[c]` rows drawn with a fixed seed are "test"; all
    others are "train". The draw depends on the labels and their order only.
    """
    # RandomState, because NumPy guarantees its stream for ever; Generator's may change.
    draw = np.random.RandomState(_SPLIT_SEED)
    in_test = np.zeros(len(labels), bool)
    # Sorted once, not searched once for each class: there may be many of both.
    rows = np.argsort(labels, kind="stable")
    bounds = np.searchsorted(labels[rows], np.arange(len(test_counts) + 1))
    for label, count in enumerate(test_counts):
        of_class = rows[bounds[label] : bounds[label + 1]]
        in_test[draw.permutation(of_class)[:count]] = True
    return np.flatnonzero(in_test == (split == "test"))


def fifth_of_each_class(labels: np.ndarray) -> np.ndarray:
    """Test counts `[K]` of an 80/20 split: a fifth of each class, to the nearest."""
    return (np.bincount(labels) + 2) // 5


def check_bytes(
    shape: tuple[int, ...], itemsize: int, what: str, *, limit: float = MAX_BYTES
) -> int:
    """Bytes of an array about to be made; refused above `limit`."""
    num_bytes = itemsize
    for length in shape:  # Python integers: a hostile shape must not wrap around.
        num_bytes *= int(length)
    if num_bytes > limit:
        raise errors.InputError(
            f"{what}: an array {list(shape)} of {num_bytes:,} bytes, "
            f"accepted up to {limit:,}"
        )
    return num_bytes


def check_classes(num_classes: int) -> None:
    """Raises InputError for more classes than are accepted, before names are made."""
    if num_classes > MAX_CLASSES:
        raise errors.InputError(
            f"{num_classes:,} classes, accepted up to {MAX_CLASSES:,}"
        )


def user_path(path: str | os.PathLike[str]) -> pathlib.Path:
    """A path as somebody has typed it, with `~` resolved; it need not exist.

    Raises:
      InputError: a home folder that is not known.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise errors.InputError(f"{os.fspath(path)}: {error}") from error


def first_line(error: Exception) -> str:
    """What went wrong, for an `InputError` made of an error of another library."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _describe(array: np.ndarray | stored.Images) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _read_only(array: np.ndarray) -> np.ndarray:
    view = array.view()
    view.flags.writeable = False
    return view
