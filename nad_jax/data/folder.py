# SPDX-License-Identifier: Apache-2.0
"""A folder with one folder of pictures per class, as most people keep their images.

    DATA_DIR/train/cat/*.png, DATA_DIR/test/cat/*.png, ...    both splits given, or
    DATA_DIR/cat/*.png, ...                                   a seeded 80/20 split

Classes are numbered in the alphabetical order of their folders. Pictures are decoded at
every call, or, if they stay in their files, whenever they are read; for many of them
run `nad_jax.data.prepare` once.
"""

import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from nad_jax import errors
from nad_jax.data import pictures, sources, stored


def load(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> sources.Dataset:
    """RGB images of the folder `data_dir`, in the alphabetical order of their paths.

    The 80/20 split holds out a fifth of each class with a fixed seed; it depends on how
    many pictures each class has, not on their content.

    Raises:
      InputError: if the folder does not look as above, if anything in it is hidden or
        not a readable picture (it is named, never skipped), or if sizes differ and no
        `image_size` is given.
    """
    root, listing = _find(name, split, data_dir)
    return _dataset(root, listing, _decode_all(root, listing.files, image_size))


def open_stored(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> sources.Dataset:
    """As `load`, with images that stay in their files.

    What is no readable picture, or of another size, is found when it is read.
    """
    root, listing = _find(name, split, data_dir)
    return _dataset(root, listing, stored.Images(_Pictures(root, listing, image_size)))


class _Pictures:
    """A `stored.Reader` of picture files."""

    def __init__(self, root: pathlib.Path, listing: "_Listing", image_size: int | None):
        self._root = root
        self._files = listing.files
        self._image_size = image_size
        first = _decode_all(root, listing.files[:1], image_size)
        height, width, channels = first.shape[1:]
        self.shape = (len(listing.files), height, width, channels)
        # Sizes tell other pictures of the same names; reading all would take too long.
        facts = "\0".join(
            f"{path.relative_to(root)}\0{path.stat().st_size}" for path in listing.files
        )
        digest = hashlib.sha256(facts.encode(errors="surrogateescape"))
        self.identity = f"{self.shape} {digest.hexdigest()}"

    def read(self, rows: np.ndarray) -> np.ndarray:
        files = [self._files[row] for row in rows.tolist()]
        return _decode_all(
            self._root, files, self._image_size, image_shape=self.shape[1:]
        )


def _dataset(
    root: pathlib.Path, listing: "_Listing", images: np.ndarray | stored.Images
) -> sources.Dataset:
    return sources.Dataset(
        images=images,
        labels=listing.labels,
        num_classes=len(listing.class_names),
        name=root.resolve().name,
        class_names=listing.class_names,
    )


def _find(
    name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> tuple[pathlib.Path, "_Listing"]:
    """The folder, and the pictures of one split."""
    if data_dir is None:
        raise errors.InputError(f"{name}: give data_dir, the folder of class folders")
    root = sources.user_path(data_dir)
    given = [(root / known).is_dir() for known in sources.SPLITS]
    if all(given):
        listings = {known: _list_pictures(root / known) for known in sources.SPLITS}
        train, test = (set(listings[known].class_names) for known in sources.SPLITS)
        if train != test:
            odd = _some(sorted(train ^ test))
            raise errors.InputError(f"{root}: not in both train/ and test/: {odd}")
        listing = listings[split]
    elif any(given):
        raise errors.InputError(f"{root}: has only one of train/ and test/")
    else:
        listing = _seeded_part(_list_pictures(root), split)
    if not listing.files:
        raise errors.InputError(f"{root}: too few pictures for an 80/20 split")
    return root, listing


class _Listing(NamedTuple):
    class_names: tuple[str, ...]
    files: list[pathlib.Path]  # N of them
    labels: np.ndarray  # int32 [N]


def _list_pictures(directory: pathlib.Path) -> _Listing:
    classes = sorted(_entries(directory))
    odd = [path for path in classes if _is_hidden(path) or not path.is_dir()]
    files, labels = [], []
    for label, class_folder in enumerate(classes):
        if class_folder in odd:
            continue
        inside = sorted(_entries(class_folder))
        odd += [path for path in inside if _is_hidden(path) or not path.is_file()]
        odd += [] if inside else [class_folder]
        files += inside
        labels += [label] * len(inside)
    if odd:
        names = _some([str(path.relative_to(directory)) for path in odd])
        raise errors.InputError(
            f"{directory}: must hold class folders with pictures in them "
            f"and nothing hidden, empty or nested; remove {names}"
        )
    if not files:
        raise errors.InputError(f"{directory}: holds no class folders")
    class_names = tuple(path.name for path in classes)
    return _Listing(class_names, files, np.asarray(labels, np.int32))


def _entries(directory: pathlib.Path) -> list[pathlib.Path]:
    try:
        return list(directory.iterdir())
    except OSError as error:
        raise errors.InputError(f"{directory}: {error.strerror}") from error


def _is_hidden(path: pathlib.Path) -> bool:
    return path.name.startswith(".")


def _seeded_part(listing: _Listing, split: str) -> _Listing:
    rows = sources.seeded_split(
        listing.labels,
        split,
        test_counts=sources.fifth_of_each_class(listing.labels),
    )
    files = [listing.files[row] for row in rows]
    return _Listing(listing.class_names, files, listing.labels[rows])


def _decode_all(
    root: pathlib.Path,
    files: list[pathlib.Path],
    image_size: int | None,
    *,
    image_shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """uint8 `[N, H, W, 3]`; all unreadable files are gathered into one error.

    Without `image_shape` the first picture decides about `[H, W, 3]`.
    """
    images, bad = None, []
    for row, path in enumerate(files):
        name = path.relative_to(root)
        try:
            with path.open("rb") as stream:
                image = pictures.decode(stream, image_size=image_size)
        except (errors.InputError, OSError) as error:
            bad.append(f"{name} ({error})")
            continue
        if images is None:
            shape = (len(files), *(image_shape or image.shape))
            sources.check_bytes(shape, 1, str(root))
            images = np.empty(shape, np.uint8)
        if image.shape != images.shape[1:]:
            raise errors.InputError(
                f"{root}: {name} is {list(image.shape)} but others are "
                f"{list(images.shape[1:])}; give image_size to resize all"
            )
        images[row] = image
    if bad or images is None:
        raise errors.InputError(f"{root}: cannot read {_some(bad)}")
    return images


def _some(names: Sequence[str], shown: int = 3) -> str:
    """The first few of `names`, and how many more there are."""
    more = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {more} more" if more > 0 else "")
