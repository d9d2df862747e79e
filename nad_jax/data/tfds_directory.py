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
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nad_jax import errors
from nad_jax.data import cache, pictures, sources

_NAME = re.compile(r"(\w+(?:/[\w.-]*\w)?)(?::(\d+\.\d+\.\d+))?")
_VERSION = re.compile(r"\d+\.\d+\.\d+")
_CHANNELS = (1, 3, 4)
_CHUNK = 1024


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
    directory = _find(name, data_dir)
    features = _read_features(directory)
    sizes = _read_split_sizes(directory)
    if split not in sizes:
        raise errors.InputError(
            f"{directory}: no split {split!r}, it has {sorted(sizes)}"
        )
    key = cache.fingerprint(directory, split, image_size)
    arrays = cache.fetch(
        f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{split}-{key}",
        lambda: _decode_split(
            directory, split, sizes[split], features.channels, image_size
        ),
    )
    return sources.Dataset(
        images=arrays["images"],
        labels=arrays["labels"],
        num_classes=features.num_classes,
        name=name,
        class_names=_read_class_names(directory, features.num_classes),
    )


def _find(name: str, data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """The folder of the newest, or the asked for, version of a data set."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    root = pathlib.Path(root).expanduser()
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
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise errors.InputError(
            f"{directory}: needs the features image (a picture) and label (a class)"
        ) from error
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
    except (KeyError, TypeError, ValueError) as error:
        raise errors.InputError(
            f"{directory}: dataset_info.json does not list its splits"
        ) from error


def _read_class_names(directory: pathlib.Path, num_classes: int) -> tuple[str, ...]:
    path = directory / "label.labels.txt"
    if not path.exists():
        return ()
    try:
        return tuple(path.read_text(encoding="utf-8").split("\n")[:num_classes])
    except (OSError, ValueError) as error:
        raise errors.InputError(f"{path}: {sources.first_line(error)}") from error


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise errors.InputError(f"{path}: {error}") from error


def _decode_split(
    directory: pathlib.Path,
    split: str,
    num_examples: int,
    channels: int,
    image_size: int | None,
) -> cache.Arrays:
    """Images uint8 `[N, H, W, C]` and labels int32 `[N]`, sorted by `id`."""
    try:
        examples = list(_read_examples(directory, split))
    except Exception as error:  # TFDS and its readers raise all sorts on damaged files.
        reason = sources.first_line(error)
        raise errors.InputError(
            f"{directory}: cannot read {split}: {reason}"
        ) from error
    # A file that was cut off may yield examples without content instead of an error.
    has_id = bool(examples) and "id" in examples[0]
    needed = ("image", "label", "id") if has_id else ("image", "label")
    whole = sum(all(e[name] is not None for name in needed) for e in examples)
    if not whole == len(examples) == num_examples > 0:
        raise errors.InputError(
            f"{directory}: cannot read {split}: "
            f"{whole} whole examples of {num_examples}"
        )
    if has_id:
        examples.sort(key=lambda example: example["id"])
    images = None
    for row, example in enumerate(examples):
        what = f"{directory}: {split} image {example.get('id', row)!r}"
        try:
            image = pictures.decode(
                io.BytesIO(example["image"]), channels=channels, image_size=image_size
            )
        except errors.InputError as error:
            raise errors.InputError(f"{what}: {error}") from error
        if images is None:
            shape = (num_examples, *image.shape)
            sources.check_bytes(shape, 1, str(directory))
            images = np.empty(shape, np.uint8)
        if image.shape != images.shape[1:]:
            raise errors.InputError(
                f"{what} is {list(image.shape)} but others are "
                f"{list(images.shape[1:])}; give image_size to resize all"
            )
        images[row] = image
    assert images is not None
    labels = np.array([example["label"] for example in examples], np.int32)
    return {"images": images, "labels": labels}


def _read_examples(directory: pathlib.Path, split: str) -> Iterator[dict[str, Any]]:
    """Examples in stored order, their pictures still encoded."""
    import tensorflow_datasets as tfds

    # Not `tfds.data_source(name)`: given the folder, TFDS looks nowhere else.
    builder: Any = tfds.builder_from_directory(directory)
    # Left encoded, because TFDS decodes JPEG with OpenCV where that is installed, and
    # the pixels of a data set should not depend on it.
    decoders = {"image": tfds.decode.SkipDecoding()}
    features = builder.info.features
    if builder.info.file_format == tfds.core.FileFormat.TFRECORD:
        for path in builder.info.splits[split].filepaths:
            for record in _read_tfrecords(pathlib.Path(path)):
                yield features.deserialize_example_np(record, decoders=decoders)
        return
    source = builder.as_data_source(split=split, decoders=decoders)
    for start in range(0, len(source), _CHUNK):
        stop = min(start + _CHUNK, len(source))
        yield from source.__getitems__(list(range(start, stop)))


def _read_tfrecords(path: pathlib.Path) -> Iterator[bytes]:
    """Records of a TFRecord file: length (8 bytes), check (4), data, check (4)."""
    data = memoryview(path.read_bytes())
    start = 0
    while start < len(data):
        (length,) = struct.unpack_from("<Q", data, start)
        stop = start + 12 + length + 4
        if stop > len(data):
            raise ValueError(f"{path.name} is cut off")
        yield bytes(data[start + 12 : stop - 4])
        start = stop
