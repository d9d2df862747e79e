# SPDX-License-Identifier: Apache-2.0
"""Data sets prepared by TFDS, read without TensorFlow and without the network.

    DATA_DIR/name[/config]/1.0.0/{dataset_info.json, features.json, records...}

Records may be array_record (written by `nad_jax.data.prepare`) or TFRecord (what TFDS
with TensorFlow writes). Pictures are decoded once, by PIL, and cached as arrays; with a
cached copy PIL is not imported. Whether the data are there is decided from the two json
files alone, so that nothing ever waits for a download.

TFDS itself is not asked: it imports whatever classes `features.json` names, in several
spellings, and decodes features that nobody wants. Of the json files only what is needed
here is looked at, and of the records only `image`, `label` and `id`.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import struct
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from nad_jax import errors
from nad_jax.data import array_records, cache, pictures, sources, stored, tf_examples

_NAME = re.compile(r"(\w+(?:/[\w.-]*\w)?)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CHANNELS = (1, 3, 4)
_FEATURES = ("image", "label", "id")
# Also the endings of files; where TFDS names no template for them, it means this one.
_FORMATS = ("array_record", "tfrecord")
_TEMPLATE = "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
# Of a json file or of class names; parsed JSON is up to 24 times its text.
_MAX_TEXT_BYTES = 2**22


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
    if part.file_format == "tfrecord":
        raise errors.InputError(
            f"{part.directory}: TFRecord files cannot be read record by record; "
            "use config.data.loader=device, or array_record files"
        )
    arrays = cache.fetch(
        _cache_entry(name, part, "places of records"), lambda: _index_split(part)
    )
    reader = _Records(part, arrays, image_size)
    return _dataset(name, part, stored.Images(reader), arrays["labels"])


class _Split(NamedTuple):
    """A split that is there, going by the json files."""

    directory: pathlib.Path
    name: str
    num_examples: int
    files: list[pathlib.Path]
    file_format: str
    num_classes: int
    channels: int


def _find_split(
    name: str, split: str, data_dir: str | os.PathLike[str] | None
) -> _Split:
    directory = _find(name, data_dir)
    features = _read_features(directory)
    info = _read_info(directory)
    if split not in info.shard_lengths:
        raise errors.InputError(
            f"{directory}: no split {split!r}, it has {sorted(info.shard_lengths)}"
        )
    lengths = info.shard_lengths[split]
    files = [
        _shard_path(directory, info, split, number)
        for number, length in enumerate(lengths)
        if length  # TFDS writes no file for an empty one.
    ]
    return _Split(directory, split, sum(lengths), files, info.file_format, *features)


def _cache_entry(name: str, part: _Split, *settings: object) -> str:
    missing = [path for path in part.files if not path.is_file()]
    if missing:
        raise errors.InputError(f"{part.directory}: {missing[0].name!r} is missing")
    texts = [part.directory / name for name in ("dataset_info.json", "features.json")]
    key = cache.fingerprint([*texts, *part.files], part.name, *settings)
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


class _Info(NamedTuple):
    name: str
    file_format: str
    shard_lengths: dict[str, list[int]]  # of each split
    templates: dict[str, str]  # of the names of its files


def _read_info(directory: pathlib.Path) -> _Info:
    """What `dataset_info.json` says of splits and their files."""
    info = _read_json(directory / "dataset_info.json")
    try:
        lengths, templates = {}, {}
        for split in info["splits"]:
            key = str(split["name"])
            lengths[key] = list(map(int, split["shardLengths"]))
            templates[key] = str(split.get("filepathTemplate") or _TEMPLATE)
        name, file_format = info["name"], info.get("fileFormat") or "tfrecord"
        if any(length < 0 for shards in lengths.values() for length in shards):
            raise ValueError("a shard of negative length")
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise errors.InputError(
            f"{directory}: dataset_info.json does not list its splits"
        ) from error
    if file_format not in _FORMATS:
        raise errors.InputError(
            f"{directory}: files are {file_format!r}, accepted {_FORMATS}"
        )
    return _Info(str(name), file_format, lengths, templates)


def _shard_path(
    directory: pathlib.Path, info: _Info, split: str, number: int
) -> pathlib.Path:
    """The file of a shard, inside of `directory`.

    Names are put in here: `str.format` would follow whatever a template asks for.
    """
    count = len(info.shard_lengths[split])
    width = max(5, len(str(count)))
    index, shards = f"{number:0{width}}", f"{count:0{width}}"
    values = {
        "DATASET": info.name,
        "SPLIT": split,
        "FILEFORMAT": info.file_format,
        "SHARD_INDEX": index,
        "NUM_SHARDS": shards,
        "SHARD_X_OF_Y": f"{index}-of-{shards}",
    }
    template = info.templates[split]
    name = re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], "{"), template)
    path = pathlib.PurePath(name)
    if path.is_absolute() or ".." in path.parts or "{" in name or "\0" in name:
        raise errors.InputError(
            f"{directory}: files named {template[:80]!r}, accepted names like "
            f"{_TEMPLATE!r}"
        )
    return directory / path


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
        "images": _decode_all(part, examples, len(examples), image_size),
        "labels": np.array([example["label"] for example in examples], np.int32),
    }


def _index_split(part: _Split) -> cache.Arrays:
    """What is kept of records that are read one by one, sorted by `id`.

    Returns:
      "places" int64 `[N]` in the files and "labels" int32 `[N]`, "largest" int64 `[1]`
      of the records in bytes, and "digest" uint8 `[32]` of all of them.
    """
    examples = _read_split(part, with_pictures=False)
    # Read once more, now that all records were found to be what the headers say.
    contents = [array_records.read_contents(path) for path in part.files]
    digest = hashlib.sha256(b"".join(content.digest for content in contents))
    return {
        "places": np.array([example["place"] for example in examples], np.int64),
        "labels": np.array([example["label"] for example in examples], np.int32),
        "largest": np.array([max(each.num_bytes.max() for each in contents)], np.int64),
        "digest": np.frombuffer(digest.digest(), np.uint8),
    }


class _Records:
    """A `stored.Reader` of array_record files."""

    def __init__(self, part: _Split, index: cache.Arrays, image_size: int | None):
        self._part = part
        self._places = index["places"]
        self._largest = int(index["largest"][0])
        self._image_size = image_size
        self._files: Any = None
        first = _decode_all(part, self._read_examples(np.zeros(1, int)), 1, image_size)
        height, width, channels = first.shape[1:]
        self.shape = (len(self._places), height, width, channels)
        self.identity = f"{self.shape} {index['digest'].tobytes().hex()}"

    def __getstate__(self) -> dict[str, Any]:
        # Open files are no other process's.
        return {**self.__dict__, "_files": None}

    def read(self, rows: np.ndarray) -> np.ndarray:
        return _decode_all(
            self._part,
            self._read_examples(rows),
            len(rows),
            self._image_size,
            image_shape=self.shape[1:],
        )

    def _read_examples(self, rows: np.ndarray) -> Iterator[dict[str, Any]]:
        places = self._places[rows].tolist()
        try:
            if self._files is None:
                self._files = array_records.Files(self._part.files, self._largest)
            for place, record in zip(places, self._files.read(places), strict=True):
                example = tf_examples.read(record, _FEATURES)
                if not isinstance(example["image"], bytes):
                    raise ValueError(f"record {place} has no image")
                yield {"place": place, **example}
        except Exception as error:  # As in `_read_split`.
            raise _unreadable(self._part, sources.first_line(error)) from error


def _read_split(part: _Split, *, with_pictures: bool) -> list[dict[str, Any]]:
    """Whole examples sorted by `id`, each with its stored `place`.

    Their pictures are still encoded, or, to save memory, left out.
    """
    examples, whole, num_bytes = [], 0, 0
    try:
        for place, example in enumerate(_read_examples(part)):
            # A file that was cut off may yield examples without content, not an error.
            image, label = example["image"], example["label"]
            whole += isinstance(image, bytes) and isinstance(label, int)
            if isinstance(label, int) and not 0 <= label < part.num_classes:
                raise ValueError(f"label {label}, accepted 0..{part.num_classes - 1}")
            if not with_pictures:
                example = {**example, "image": None}
            elif isinstance(image, bytes):
                num_bytes += len(image)
                sources.check_bytes((num_bytes,), 1, f"{part.directory}: {part.name}")
            examples.append({"place": place, **example})
            if len(examples) > part.num_examples:
                break
    except errors.InputError:
        raise
    except Exception as error:  # Readers raise all sorts on damaged files.
        raise _unreadable(part, sources.first_line(error)) from error
    if not whole == len(examples) == part.num_examples > 0:
        raise _unreadable(part, f"{whole} whole examples of {part.num_examples}")
    kinds = {type(example["id"]) for example in examples}
    if len(kinds) > 1:
        raise _unreadable(part, "some of its examples have another kind of id")
    if kinds != {type(None)}:
        examples.sort(key=lambda example: example["id"])
    return examples


def _unreadable(part: _Split, reason: str) -> errors.InputError:
    return errors.InputError(f"{part.directory}: cannot read {part.name}: {reason}")


def _decode_all(
    part: _Split,
    examples: Iterable[dict[str, Any]],
    num_examples: int,
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
            shape = (num_examples, *(image_shape or image.shape))
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


def _read_examples(part: _Split) -> Iterator[dict[str, Any]]:
    """Examples in stored order, their pictures still encoded."""
    for path in part.files:
        if part.file_format == "tfrecord":
            records = _read_tfrecords(path)
        else:
            contents = array_records.read_contents(path)
            records = array_records.read_records(path, contents)
        for record in records:
            yield tf_examples.read(record, _FEATURES)


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
            if length > array_records.MAX_RECORD_BYTES:
                raise ValueError(
                    f"a record of {length:,} bytes, accepted up to "
                    f"{array_records.MAX_RECORD_BYTES:,}"
                )
            yield file.read(length)
            file.seek(4, os.SEEK_CUR)
