# SPDX-License-Identifier: Apache-2.0
"""Data sets prepared by TFDS, read without TensorFlow and without the network.

    DATA_DIR/name[/config]/1.0.0/{dataset_info.json, features.json, records...}

Records may be array_record (written by `nad_jax.data.prepare`) or TFRecord (what TFDS
with TensorFlow writes). Pictures are decoded once, by PIL, and cached as arrays; with a
cached copy neither TFDS nor PIL is imported. Whether the data are there is decided from
the two json files alone, so that nothing ever waits for a download.
"""

import io
import json
import os
import pathlib
import re
import struct
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from nad_jax import errors
from nad_jax.data import cache, pictures, sources, stored

_NAME = re.compile(r"(\w+(?:/[\w.-]*\w)?)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CHANNELS = (1, 3, 4)
_CHUNK = 1024
# Of a json file or of class names; parsed JSON is up to 24 times its text.
_MAX_TEXT_BYTES = 2**22
# Of an encoded picture and what is beside it: more than `pictures.MAX_PIXELS` need.
_MAX_RECORD_BYTES = 2**29


def load(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> sources.Dataset:
    """The split `split` of the prepared data set `name`, sorted by its feature `id`.

    TFDS shuffles rows when it writes them; `id` restores an order that does not depend
    on who prepared the data. Without it the stored order is kept.

    Raises:
      InputError: if the data set is not there (the message says how to get it), lacks
        `image`, `label` or the split, or is damaged.
    """
    part = _find_split(name, split, data_dir)
    arrays = cache.fetch(
        _cache_entry(name, part, image_size), lambda: _decode_split(part, image_size)
    )
    return _dataset(name, part, arrays["images"], arrays["labels"])


def open_stored(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> sources.Dataset:
    """As `load`, with images that stay in their records.

    All records are read once, for labels and `id`, which are kept in the cache; no
    picture is decoded for that. What is no readable picture, or of another size, is
    found when it is read.

    Raises:
      InputError: as `load`, and for TFRecord, which cannot be read record by record.
    """
    part = _find_split(name, split, data_dir)
    arrays = cache.fetch(
        _cache_entry(name, part, "places of records"), lambda: _index_split(part)
    )
    reader = _Records(part, arrays["places"], image_size)
    return _dataset(name, part, stored.Images(reader), arrays["labels"])


class _Split(NamedTuple):
    """A split that is there, going by the json files."""

    directory: pathlib.Path
    name: str
    num_examples: int
    num_classes: int
    channels: int


def _find_split(
    name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> _Split:
    directory = _find(name, data_dir)
    features = _read_features(directory)
    sizes = _read_split_sizes(directory)
    if split not in sizes:
        raise errors.InputError(
            f"{directory}: no split {split!r}, it has {sorted(sizes)}"
        )
    return _Split(directory, split, sizes[split], *features)


def _cache_entry(name: str, part: _Split, *settings: object) -> str:
    key = cache.fingerprint(part.directory, part.name, *settings)
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{part.name}-{key}"


def _dataset(
    name: str, part: _Split, images: np.ndarray | stored.Images, labels: np.ndarray
) -> sources.Dataset:
    return sources.Dataset(
        images=images,
        labels=labels,
        num_classes=part.num_classes,
        name=name,
        class_names=_read_class_names(part.directory, part.num_classes),
    )


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """The folder of the newest, or the asked for, version of a data set."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = sources.user_path(root)
    match = _NAME.fullmatch(name)
    if match:
        folder, version = root / match[1], match[2]
        versions = [
            info.parent
            for info in folder.glob("*/dataset_info.json")
            if _VERSION.fullmatch(info.parent.name)
            and version in (None, info.parent.name)
        ]
        if versions:
            return max(versions, key=lambda path: [*map(int, path.name.split("."))])
    raise errors.InputError(
        f"no data set {name!r} in {root}; prepare it with `python -m "
        f"nad_jax.data.prepare --source=PATH --out={root} --name=NAME` or give another "
        f"data_dir (known sources: {', '.join(sorted(sources.SOURCES))})"
    )


class _Features(NamedTuple):
    num_classes: int
    channels: int


def _read_features(directory: pathlib.Path) -> _Features:
    """What `features.json` says of `image` and `label`."""
    tree = _read_json(directory / "features.json")
    # TFDS imports the module of every class named here: let it be one of its own.
    foreign = [
        path
        for path in _class_paths(tree)
        if not path.startswith("tensorflow_datasets.core.features.")
    ]
    if foreign:
        raise errors.InputError(f"{directory}: feature of unknown class {foreign[0]!r}")
    try:
        features = tree["featuresDict"]["features"]
        num_classes = int(features["label"]["classLabel"]["numClasses"])
        image = features["image"]["image"]
        channels = int(image["shape"]["dimensions"][-1])
        dtype = image["dtype"]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as error:
        raise errors.InputError(
            f"{directory}: needs the features image (a picture) and label (a class)"
        ) from error
    try:
        sources.check_classes(num_classes)
    except errors.InputError as error:
        raise errors.InputError(f"{directory}: {error}") from None
    if dtype != "uint8" or channels not in _CHANNELS:
        raise errors.InputError(
            f"{directory}: images are {dtype} with {channels} channels, "
            f"accepted uint8 with {_CHANNELS}"
        )
    return _Features(num_classes, channels)


def _class_paths(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if "pythonClassName" in tree:
            yield str(tree["pythonClassName"])
        for value in tree.values():
            yield from _class_paths(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _class_paths(value)


def _read_split_sizes(directory: pathlib.Path) -> dict[str, int]:
    info = _read_json(directory / "dataset_info.json")
    try:
        return {
            split["name"]: sum(map(int, split["shardLengths"]))
            for split in info["splits"]
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise errors.InputError(
            f"{directory}: dataset_info.json does not list its splits"
        ) from error


def _read_class_names(directory: pathlib.Path, num_classes: int) -> tuple[str, ...]:
    path = directory / "label.labels.txt"
    if not path.exists():
        return ()
    try:
        return tuple(_read_text(path).split("\n")[:num_classes])
    except (OSError, ValueError) as error:
        raise errors.InputError(f"{path}: {sources.first_line(error)}") from error


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(_read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.InputError(f"{path}: {error}") from error


def _read_text(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        text = file.read(_MAX_TEXT_BYTES + 1)
    if len(text) > _MAX_TEXT_BYTES:
        raise ValueError(f"accepted up to {_MAX_TEXT_BYTES:,} bytes")
    return text.decode("utf-8")


def _decode_split(part: _Split, image_size: int | None) -> cache.Arrays:
    """Images uint8 `[N, H, W, C]` and labels int32 `[N]`, sorted by `id`."""
    examples = _read_split(part, with_pictures=True)
    return {
        "images": _decode_all(part, examples, image_size),
        "labels": np.array([example["label"] for example in examples], np.int32),
    }


def _index_split(part: _Split) -> cache.Arrays:
    """Stored places int64 `[N]` and labels int32 `[N]` of records sorted by `id`."""
    examples = _read_split(part, with_pictures=False)
    return {
        "places": np.array([example["place"] for example in examples], np.int64),
        "labels": np.array([example["label"] for example in examples], np.int32),
    }


class _Records:
    """A `stored.Reader` of array_record files."""

    def __init__(self, part: _Split, places: np.ndarray, image_size: int | None):
        self._part = part
        self._places = places
        self._image_size = image_size
        self._source: Any = None
        first = _decode_all(part, self._read_examples(np.zeros(1, int)), image_size)
        height, width, channels = first.shape[1:]
        self.shape = (len(places), height, width, channels)
        files = sorted(
            (path.name, path.stat().st_size) for path in part.directory.iterdir()
        )
        self.identity = f"{self.shape} {files}"

    def __getstate__(self) -> dict[str, Any]:
        # Open files are no other process's.
        return {**self.__dict__, "_source": None}

    def read(self, rows: np.ndarray) -> np.ndarray:
        return _decode_all(
            self._part,
            self._read_examples(rows),
            self._image_size,
            image_shape=self.shape[1:],
        )

    def _read_examples(self, rows: np.ndarray) -> list[dict[str, Any]]:
        places = self._places[rows].tolist()
        try:
            if self._source is None:
                self._source = _open_source(_open_builder(self._part), self._part.name)
            return [
                {"place": place, **example}
                for place, example in zip(
                    places, self._source.__getitems__(places), strict=True
                )
            ]
        except Exception as error:  # As in `_read_split`.
            raise _unreadable(self._part, sources.first_line(error)) from error


def _read_split(part: _Split, *, with_pictures: bool) -> list[dict[str, Any]]:
    """Whole examples sorted by `id`, each with its stored `place`.

    Their pictures are still encoded, or, to save memory, left out.
    """
    examples, whole = [], 0
    try:
        for place, example in enumerate(_read_examples(part, with_pictures)):
            # A file that was cut off may yield examples without content, not an error.
            needed = (example["image"], example["label"], example.get("id", b""))
            whole += all(value is not None for value in needed)
            if not with_pictures:
                example = {**example, "image": None}
            examples.append({"place": place, **example})
            if len(examples) > part.num_examples:
                break
    except errors.InputError:
        raise
    except Exception as error:  # TFDS and its readers raise all sorts on damaged files.
        raise _unreadable(part, sources.first_line(error)) from error
    if not whole == len(examples) == part.num_examples > 0:
        raise _unreadable(part, f"{whole} whole examples of {part.num_examples}")
    if "id" in examples[0]:
        examples.sort(key=lambda example: example["id"])
    return examples


def _unreadable(part: _Split, reason: str) -> errors.InputError:
    return errors.InputError(f"{part.directory}: cannot read {part.name}: {reason}")


def _decode_all(
    part: _Split,
    examples: Sequence[dict[str, Any]],
    image_size: int | None,
    *,
    image_shape: tuple[int, ...] | None = None,
) -> np.ndarray:
    """Their pictures, uint8 `[N, H, W, C]`.

    Without `image_shape` the first picture decides about `[H, W, C]`.
    """
    images = None
    for row, example in enumerate(examples):
        what = (
            f"{part.directory}: {part.name} image "
            f"{example.get('id', example['place'])!r}"
        )
        try:
            image = pictures.decode(
                io.BytesIO(example["image"]),
                channels=part.channels,
                image_size=image_size,
            )
        except errors.InputError as error:
            raise errors.InputError(f"{what}: {error}") from error
        if images is None:
            shape = (len(examples), *(image_shape or image.shape))
            sources.check_bytes(shape, 1, str(part.directory))
            images = np.empty(shape, np.uint8)
        if image.shape != images.shape[1:]:
            raise errors.InputError(
                f"{what} is {list(image.shape)} but others are "
                f"{list(images.shape[1:])}; give image_size to resize all"
            )
        images[row] = image
    assert images is not None
    return images


def _read_examples(part: _Split, with_pictures: bool) -> Iterator[dict[str, Any]]:
    """Examples in stored order, their pictures still encoded."""
    import tensorflow_datasets as tfds

    builder = _open_builder(part)
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        if not with_pictures:
            raise errors.InputError(
                f"{part.directory}: TFRecord files cannot be read record by record; "
                "use config.data.loader=device, or array_record files"
            )
        features = builder.info.features
        for path in builder.info.splits[part.name].filepaths:
            for record in _read_tfrecords(pathlib.Path(path)):
                yield features.deserialize_example_np(record, decoders=_decoders())
        return
    source = _open_source(builder, part.name)
    for start in range(0, len(source), _CHUNK):
        stop = min(start + _CHUNK, len(source))
        yield from source.__getitems__(list(range(start, stop)))


def _open_builder(part: _Split) -> Any:
    import tensorflow_datasets as tfds

    # Not `tfds.data_source(name)`: given the folder, TFDS looks nowhere else.
    return tfds.builder_from_directory(part.directory)


def _open_source(builder: Any, split: str) -> Any:
    """Random access to the examples of array_record files."""
    return builder.as_data_source(split=split, decoders=_decoders())


def _decoders() -> dict[str, Any]:
    import tensorflow_datasets as tfds

    # Left encoded, because TFDS decodes JPEG with OpenCV where that is installed, and
    # the pixels of a data set should not depend on it.
    return {"image": tfds.decode.SkipDecoding()}


def _read_tfrecords(path: pathlib.Path) -> Iterator[bytes]:
    """Records of a TFRecord file: length (8 bytes), check (4), data, check (4)."""
    with path.open("rb") as file:
        left = os.fstat(file.fileno()).st_size
        sources.check_bytes((left,), 1, path.name)
        while left:
            (length,) = struct.unpack("<Q4x", file.read(12))
            left -= 12 + length + 4
            if left < 0:
                raise ValueError(f"{path.name} is cut off")
            if length > _MAX_RECORD_BYTES:
                raise ValueError(
                    f"a record of {length:,} bytes, accepted up to "
                    f"{_MAX_RECORD_BYTES:,}"
                )
            yield file.read(length)
            file.seek(4, os.SEEK_CUR)
