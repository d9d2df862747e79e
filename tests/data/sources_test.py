# SPDX-License-Identifier: Apache-2.0
"""Data sets: what is accepted, what is refused, and that loading is repeatable."""

import functools
import gzip
import hashlib
import importlib
import importlib.util
import io
import json
import os
import pathlib
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nad_jax import errors
from nad_jax.data import cache, npz, pictures, prepare, sources, tfds_directory


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    """No test reads or writes the caches and data of the user."""
    monkeypatch.setenv("NAD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def random_images(num: int, *, seed: int = 0, size: int = 8, channels: int = 3):
    shape = (num, size, size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def tiny_dataset(num: int = 6, num_classes: int = 3, **kwargs) -> sources.Dataset:
    labels = np.arange(num, dtype=np.int32) % num_classes
    return sources.Dataset(random_images(num, **kwargs), labels, num_classes, "tiny")


def one_line(error: pytest.ExceptionInfo) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


PICTURE = pictures.encode_png(random_images(1)[0]).read()


# --- Dataset ---


def test_dataset_names_its_classes_and_cannot_be_changed():
    data = tiny_dataset()
    assert data.class_names == ("0", "1", "2")
    with pytest.raises(ValueError, match="read-only"):
        data.images[0] = 0
    with pytest.raises(ValueError, match="read-only"):
        data.labels[0] = 0


def test_take_picks_rows_in_the_given_order():
    data = tiny_dataset()
    taken = data.take(np.array([4, 0]))
    assert len(taken) == 2 and taken.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(taken.images, data.images[[4, 0]])


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ({"images": np.zeros((0, 8, 8, 3), np.uint8), "labels": []}, r"\[0, 8, 8, 3\]"),
        ({"images": np.zeros((6, 8, 8), np.uint8)}, r"\[6, 8, 8\]"),
        ({"images": np.zeros((6, 8, 8, 3), np.float32)}, "float32"),
        ({"labels": np.zeros(6, np.int64)}, "int64"),
        ({"labels": np.zeros(5, np.int32)}, r"\[5\]"),
        ({"labels": np.array([0, 1, 2, 3, 0, 1], np.int32)}, "0..3, accepted 0..2"),
        ({"labels": np.array([0, -1, 2, 0, 0, 1], np.int32)}, "-1..2, accepted 0..2"),
        ({"class_names": ("a", "b")}, "2 class names for 3 classes"),
        ({"num_classes": 10**12}, "1,000,000,000,000 classes, accepted up to 65,536"),
    ],
)
def test_dataset_refuses_what_does_not_fit(change, printed):
    data = tiny_dataset()
    fields = {
        "images": data.images,
        "labels": data.labels,
        "num_classes": 3,
        "name": "tiny",
        **change,
    }
    fields["labels"] = np.asarray(
        fields["labels"], getattr(fields["labels"], "dtype", np.int32)
    )
    with pytest.raises(errors.InputError, match=printed) as error:
        sources.Dataset(**fields)
    one_line(error)


# --- load and the splits ---


def test_an_unknown_name_lists_the_known_ones(tmp_path):
    with pytest.raises(errors.InputError) as error:
        sources.load("digit", split="train", data_dir=tmp_path)
    message = one_line(error)
    assert "'digit'" in message and all(name in message for name in sources.SOURCES)


@pytest.mark.parametrize("split", ["validation", "train[:50%]", ""])
def test_an_unknown_split_is_refused(split):
    with pytest.raises(errors.InputError, match="train"):
        sources.load("digits", split=split)


@pytest.mark.parametrize("name", ["npz", "folder", "cifar10"])
@pytest.mark.parametrize(
    ("data_dir", "printed"),
    [("~nobody-of-that-name/x", "home"), ("a" * 300, "too long|no data set")],
)
def test_a_path_that_cannot_be_is_one_line(name, data_dir, printed):
    with pytest.raises(errors.InputError, match=printed) as error:
        sources.load(name, split="train", data_dir=data_dir)
    assert data_dir in one_line(error)


def test_a_source_is_one_line_in_the_registry(monkeypatch):
    def load(name, *, split, data_dir, image_size):
        assert (name, split, data_dir, image_size) == ("toy", "test", "here", 8)
        return tiny_dataset()

    monkeypatch.setitem(sources.SOURCES, "toy", load)
    assert (
        sources.load("toy", split="test", data_dir="here", image_size=8).name == "tiny"
    )


def test_seeded_split_holds_out_the_counts_of_each_class_and_loses_no_row():
    labels = np.random.default_rng(0).integers(0, 4, 101)
    counts = np.array([0, 3, 7, 1])
    train = sources.seeded_split(labels, "train", test_counts=counts)
    test = sources.seeded_split(labels, "test", test_counts=counts)
    assert np.bincount(labels[test], minlength=4).tolist() == counts.tolist()
    assert sorted([*train, *test]) == list(range(101))


def _split_class_by_class(labels, split, test_counts):
    """The formula by which every published split was drawn."""
    draw = np.random.RandomState(0)
    in_test = np.zeros(len(labels), bool)
    for label, count in enumerate(test_counts):
        in_test[draw.permutation(np.flatnonzero(labels == label))[:count]] = True
    return np.flatnonzero(in_test == (split == "test"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32, np.int64, np.uint64])
@pytest.mark.parametrize(("num", "classes"), [(1, 1), (50, 100), (999, 7), (300, 300)])
def test_a_seeded_split_is_what_it_always_was(num, classes, dtype):
    for seed in range(3):
        random = np.random.default_rng(seed)
        labels = random.integers(0, min(classes, 128), num).astype(dtype)
        fifths = sources.fifth_of_each_class(labels)
        for counts in (fifths, random.integers(0, 9, classes), fifths[:-1]):
            for split in sources.SPLITS:
                np.testing.assert_array_equal(
                    sources.seeded_split(labels, split, test_counts=counts),
                    _split_class_by_class(labels, split, counts),
                )


@pytest.mark.slow
def test_a_seeded_split_of_many_classes_does_not_take_long():
    """A search of all labels for each class takes minutes."""
    labels = np.random.default_rng(0).integers(0, 2**16, 3_000_000)
    start = time.perf_counter()
    counts = sources.fifth_of_each_class(labels)
    rows = sources.seeded_split(labels, "test", test_counts=counts)
    assert time.perf_counter() - start < 20 and len(rows) == counts.sum()


# --- digits ---


def test_digits_are_the_rows_of_the_file_scaled_and_repeated():
    """Every stored image appears exactly once in train or test, with its label."""
    spec = importlib.util.find_spec("sklearn")
    assert spec is not None and spec.submodule_search_locations
    path = pathlib.Path(
        spec.submodule_search_locations[0], "datasets/data/digits.csv.gz"
    )
    expected = []
    for line in gzip.open(path, "rt"):
        *pixels, label = map(int, line.split(","))
        scaled = np.floor(np.array(pixels) / 16 * 255 + 0.5).reshape(8, 8)
        expected.append((np.kron(scaled, np.ones((2, 2))).tobytes(), label))
    found = []
    for split, size in (("train", 1297), ("test", 500)):
        data = sources.load("digits", split=split)
        assert data.images.shape == (size, 16, 16, 3) and data.num_classes == 10
        assert (data.images == data.images[..., :1]).all()
        assert (data.images.min(), data.images.max()) == (0, 255)
        grey = data.images[..., 0].astype(np.float64)
        found += [(g.tobytes(), int(n)) for g, n in zip(grey, data.labels, strict=True)]
    assert sorted(found) == sorted(expected)


def test_digits_are_balanced_and_always_the_same():
    test = sources.load("digits", split="test")
    train = sources.load("digits", split="train")
    assert np.bincount(test.labels).tolist() == [50] * 10
    assert np.bincount(train.labels).min() >= 124
    # The split is part of every published number: no NumPy may move it.
    assert hashlib.sha256(test.images.tobytes()).hexdigest()[:16] == "f6071fa9be3eda34"
    again = sources.load("digits", split="test")
    np.testing.assert_array_equal(test.images, again.images)


def test_digits_size():
    small = sources.load("digits", split="test", image_size=8)
    large = sources.load("digits", split="test", image_size=32)
    np.testing.assert_array_equal(small.images, large.images[:, ::4, ::4])
    with pytest.raises(errors.InputError, match="multiple of 8, not 20"):
        sources.load("digits", split="test", image_size=20)


@pytest.mark.parametrize("name", ["digits", "npz"])
def test_images_are_not_grown_beyond_what_is_accepted(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sources.check_bytes.__kwdefaults__, "limit", 10**6)
    np.savez(tmp_path / "x.npz", **npz_arrays())
    load = functools.partial(sources.load, name, split="train")
    path = tmp_path / "x.npz"
    assert load(data_dir=path, image_size=8).images.shape[1:] == (8, 8, 3)
    with pytest.raises(errors.InputError, match="image_size 256.*bytes, accepted"):
        load(data_dir=path, image_size=256)


@pytest.mark.slow
def test_digits_import_neither_sklearn_nor_tfds():
    code = (
        "import sys; from nad_jax.data import sources;"
        "sources.load('digits', split='test');"
        "print({'sklearn', 'tensorflow_datasets', 'PIL', 'flax'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(errors.InputError, match="pip install scikit-learn") as error:
        sources.load("digits", split="test")
    one_line(error)


# --- folder ---


def write_folder(root: pathlib.Path, images: np.ndarray, labels: np.ndarray) -> None:
    for row, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = root / f"class{label}" / f"{row:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)


def test_folder_with_both_splits_is_read_without_loss(tmp_path):
    images, labels = random_images(6), np.repeat([0, 1], 3)
    write_folder(tmp_path / "train", images, labels)
    write_folder(tmp_path / "test", images[::-1], labels)
    for split, expected in (("train", images), ("test", images[::-1])):
        data = sources.load("folder", split=split, data_dir=tmp_path)
        np.testing.assert_array_equal(data.images, expected)
        assert data.labels.tolist() == labels.tolist()
        assert data.class_names == ("class0", "class1")


def test_folder_without_splits_holds_out_a_fifth_of_each_class(tmp_path):
    images, labels = random_images(30), np.repeat([0, 1], [20, 10])
    write_folder(tmp_path, images, labels)
    train, test = (
        sources.load("folder", split=split, data_dir=tmp_path)
        for split in sources.SPLITS
    )
    assert np.bincount(test.labels).tolist() == [4, 2]
    both = {image.tobytes() for data in (train, test) for image in data.images}
    assert both == {image.tobytes() for image in images}
    assert len(train) + len(test) == 30


def test_folder_resizes_only_when_asked(tmp_path):
    write_folder(tmp_path, random_images(10), np.zeros(10, int))
    flat = np.full((12, 4, 3), 77, np.uint8)
    Image.fromarray(flat).save(tmp_path / "class0" / "zzz.png")
    with pytest.raises(errors.InputError, match="give image_size") as error:
        sources.load("folder", split="train", data_dir=tmp_path)
    assert "zzz.png is [12, 4, 3]" in one_line(error)
    data = sources.load("folder", split="train", data_dir=tmp_path, image_size=8)
    assert (
        data.images.shape[1:] == (8, 8, 3) and (data.images == 77).all((1, 2, 3)).any()
    )


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("class0/.DS_Store", b""),
        ("class0/.hidden.png", PICTURE),
        (".git/x.png", PICTURE),
        ("README.txt", b"hello"),
        ("class0/notes.txt", b"hello"),
        ("class0/deeper/x.png", PICTURE),
        ("class0/cut.png", PICTURE[:-60]),
    ],
)
def test_folder_names_what_is_not_a_picture(tmp_path, name, content):
    write_folder(tmp_path, random_images(10), np.zeros(10, int))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    named = name if name.count("/") < 2 and name[0] != "." else name.rsplit("/", 1)[0]
    with pytest.raises(errors.InputError, match=re.escape(named)) as error:
        # A picture in either split is looked at by one of the two.
        for split in sources.SPLITS:
            sources.load("folder", split=split, data_dir=tmp_path)
    one_line(error)


def test_folder_with_one_split_or_other_classes_is_refused(tmp_path):
    write_folder(tmp_path / "train", random_images(2), np.array([0, 1]))
    with pytest.raises(errors.InputError, match="only one of"):
        sources.load("folder", split="train", data_dir=tmp_path)
    write_folder(tmp_path / "test", random_images(2), np.array([0, 2]))
    with pytest.raises(errors.InputError, match="class1, class2"):
        sources.load("folder", split="train", data_dir=tmp_path)


@pytest.mark.parametrize("name", ["folder", "npz"])
def test_sources_of_files_say_when_there_is_nothing(tmp_path, name):
    with pytest.raises(errors.InputError, match="give data_dir"):
        sources.load(name, split="train")
    with pytest.raises(errors.InputError, match="No such file"):
        sources.load(name, split="train", data_dir=tmp_path / "nothing")


def test_a_picture_that_declares_an_enormous_size_is_not_decoded():
    """60,000 x 60,000 pixels take 10 GB decoded; the file has not a hundred bytes."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    for side, printed in ((60_000, "bomb"), (9_000, "9000x9000 pixels")):
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
        picture = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b""))
        with pytest.raises(errors.InputError, match=printed) as error:
            pictures.decode(io.BytesIO(picture))
        one_line(error)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_png_is_lossless(channels):
    image = random_images(1, channels=channels)[0]
    decoded = pictures.decode(pictures.encode_png(image), channels=channels)
    np.testing.assert_array_equal(decoded, image)


# --- npz ---


def npz_arrays() -> dict[str, Any]:
    return {"images": random_images(20), "labels": np.arange(20) % 2}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_with_both_splits_is_read_as_it_is(tmp_path, save):
    images = random_images(5)
    save(
        tmp_path / "x.npz",
        images_train=images[:3],
        labels_train=np.array([0, 1, 2], np.uint8),
        images_test=np.asfortranarray(images[3:]),
        labels_test=np.array([1, 0]),
    )
    train, test = (
        sources.load("npz", split=split, data_dir=tmp_path / "x.npz")
        for split in sources.SPLITS
    )
    np.testing.assert_array_equal(train.images, images[:3])
    np.testing.assert_array_equal(test.images, images[3:])
    # Class 2 is unseen in the test split and still counted.
    assert (train.num_classes, test.num_classes) == (3, 3)


def test_npz_in_one_piece_is_split_in_the_same_way_every_time(tmp_path):
    arrays = npz_arrays()
    np.savez(tmp_path / "x.npz", class_names=np.array(["no", "yes"]), **arrays)

    def load(split: str) -> sources.Dataset:
        return sources.load("npz", split=split, data_dir=tmp_path / "x.npz")

    train, test = load("train"), load("test")
    assert np.bincount(test.labels).tolist() == [2, 2]
    assert test.class_names == ("no", "yes") and test.name == "x"
    np.testing.assert_array_equal(load("test").images, test.images)
    rows = {
        image.tobytes(): label for image, label in zip(*arrays.values(), strict=True)
    }
    for data in (train, test):
        for image, label in zip(data.images, data.labels, strict=True):
            assert rows.pop(image.tobytes()) == label
    assert not rows


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ({"labels": None}, "no array 'labels'; it holds: images"),
        ({"images": np.zeros((20, 8, 8, 3))}, "float64"),
        ({"images": np.zeros((20, 8, 8), np.uint8)}, r"\[20, 8, 8\]"),
        ({"labels": np.zeros(20)}, "float64"),
        ({"labels": np.zeros((20, 1), int)}, r"\[20, 1\]"),
        ({"labels": np.zeros(19, int)}, "20 images, 19 labels"),
        ({"labels": np.arange(20) - 1}, "-1..18"),
        ({"labels": np.arange(20) * 10**9}, "19000000000"),
        ({"labels": np.array([None] * 20)}, "dtype object"),
        ({"class_names": np.array(["only one"])}, "0..1, accepted 0..0"),
        ({"class_names": np.array([b"a", b"b"])}, "dtype .*S1"),
    ],
)
def test_npz_refuses_what_does_not_fit(tmp_path, change, printed):
    arrays = {**npz_arrays(), **change}
    kept: dict[str, Any] = {k: v for k, v in arrays.items() if v is not None}
    np.savez(tmp_path / "x.npz", **kept)
    with pytest.raises(errors.InputError, match=printed) as error:
        sources.load("npz", split="train", data_dir=tmp_path / "x.npz")
    one_line(error)


def test_npz_header_that_lies_about_its_size_claims_no_memory(tmp_path):
    for images, printed in (
        ((10**9, 100, 100, 3), "accepted up to"),
        ((40, 8, 8, 3), "the file holds 100"),
        ((1, 1, 1, 3), "the file holds 100"),
    ):
        stream = io.BytesIO()
        header = {"descr": "|u1", "fortran_order": False, "shape": images}
        np.lib.format.write_array_header_1_0(stream, header)
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("images.npy", stream.getvalue() + b"\0" * 100)
        with pytest.raises(errors.InputError, match=printed):
            sources.load("npz", split="train", data_dir=tmp_path / "x.npz")


@pytest.mark.parametrize(("version", "length"), [(1, "<H"), (2, "<I")])
def test_npz_header_is_not_read_before_its_length_is_known(tmp_path, version, length):
    """A header of blanks: nothing in a compressed file, a lot in memory."""
    declared = 2**16 - 1 if version == 1 else 2**23
    start = b"\x93NUMPY" + bytes([version, 0]) + struct.pack(length, declared)
    with zipfile.ZipFile(tmp_path / "x.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", start + b" " * declared)
    tracemalloc.start()
    try:
        with pytest.raises(errors.InputError, match="header|Header") as error:
            sources.load("npz", split="train", data_dir=tmp_path / "x.npz")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    one_line(error)
    assert peak < 4e6


def test_npz_that_unpacks_to_far_more_than_pictures_do_is_refused(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(npz, "_FREE_BYTES", 10**6)
    load = functools.partial(
        sources.load, "npz", split="train", data_dir=tmp_path / "x.npz"
    )
    for size, accepted in ((100, True), (1000, False)):
        images = np.zeros((10, size, size, 3), np.uint8)
        np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.arange(10))
        if accepted:
            # A fifth of one image each is none, so all are for training.
            assert load().images.shape == images.shape
            continue
        with pytest.raises(errors.InputError, match="30,000,000 bytes, accepted up to"):
            load()


def test_npz_of_too_many_class_names_is_refused(tmp_path):
    names = np.full(2**16 + 1, "x")
    np.savez_compressed(tmp_path / "x.npz", **npz_arrays(), class_names=names)
    with pytest.raises(errors.InputError, match="65,537 classes"):
        sources.load("npz", split="train", data_dir=tmp_path / "x.npz")


def test_npz_with_any_byte_damaged_is_read_or_refused_in_one_line(tmp_path):
    """Flipping a bit never leads to another exception, or to wrong images."""
    np.savez(
        tmp_path / "x.npz",
        images=np.zeros((5, 1, 1, 1), np.uint8),
        labels=np.zeros(5, int),
    )
    good = (tmp_path / "x.npz").read_bytes()
    for place in range(0, len(good), 3):
        bad = bytearray(good)
        bad[place] ^= 0x15
        (tmp_path / "bad.npz").write_bytes(bad)
        try:
            data = sources.load("npz", split="train", data_dir=tmp_path / "bad.npz")
        except errors.InputError as error:
            assert "\n" not in str(error)
        else:
            assert data.images.shape == (4, 1, 1, 1) and not data.images.any()


# --- TFDS directories ---


@pytest.fixture
def prepared(tmp_path):
    """A data directory with the data set `tiny`, 40 train and 10 test images."""
    splits = {"train": tiny_dataset(40), "test": tiny_dataset(10, seed=1)}
    prepare.write(splits, out=tmp_path / "tfds", name="tiny")
    return tmp_path / "tfds", splits


def test_prepared_data_come_back_in_order(prepared):
    data_dir, splits = prepared
    for split, expected in splits.items():
        data = sources.load("tiny", split=split, data_dir=data_dir)
        np.testing.assert_array_equal(data.images, expected.images)
        np.testing.assert_array_equal(data.labels, expected.labels)
        assert data.class_names == expected.class_names and data.name == "tiny"


def test_data_dir_falls_back_to_the_environment_then_home(prepared, monkeypatch):
    data_dir, splits = prepared
    monkeypatch.setenv("TFDS_DATA_DIR", str(data_dir))
    assert len(sources.load("tiny", split="test")) == 10
    monkeypatch.delenv("TFDS_DATA_DIR")
    data_dir.rename(pathlib.Path.home() / "tensorflow_datasets")
    assert len(sources.load("tiny", split="test")) == 10


def test_the_newest_or_the_asked_version_is_read(prepared):
    data_dir, _ = prepared
    other = {"train": tiny_dataset(3), "test": tiny_dataset(4)}
    for version in ("2.0.0", "10.0.0"):
        prepare.write(other, out=data_dir / "more", name="tiny")
        (data_dir / "more/tiny/1.0.0").rename(data_dir / "tiny" / version)
        info = data_dir / "tiny" / version / "dataset_info.json"
        info.write_text(info.read_text().replace("1.0.0", version))
    assert tfds_directory._find("tiny", data_dir).name == "10.0.0"
    assert len(sources.load("tiny", split="test", data_dir=data_dir)) == 4
    assert len(sources.load("tiny:1.0.0", split="test", data_dir=data_dir)) == 10


def test_missing_data_fail_at_once_and_say_how_to_get_them(tmp_path):
    start = time.perf_counter()
    for name in ("cifar10", "mnist", "../../etc", "cifar10:9.9.9"):
        with pytest.raises(errors.InputError, match="nad_jax.data.prepare") as error:
            sources.load(name, split="train", data_dir=tmp_path)
        assert str(tmp_path) in one_line(error)
    assert time.perf_counter() - start < 20  # not the minutes of network retries


def test_a_cached_split_is_not_decoded_again(prepared, monkeypatch):
    data_dir, splits = prepared
    sources.load("tiny", split="test", data_dir=data_dir)
    monkeypatch.setattr(tfds_directory, "_decode_split", lambda *_: pytest.fail())
    data = sources.load("tiny", split="test", data_dir=data_dir)
    np.testing.assert_array_equal(data.images, splits["test"].images)


@pytest.mark.parametrize("off", ["off", "0", ""])
def test_without_caches_nothing_is_written(prepared, monkeypatch, tmp_path, off):
    data_dir, splits = prepared
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("NAD_JAX_CACHE", off)
    data = sources.load("tiny", split="train", data_dir=data_dir)
    np.testing.assert_array_equal(data.images, splits["train"].images)
    assert not list((tmp_path / "here").iterdir())
    assert not (tmp_path / ".cache").exists()  # HOME is tmp_path.


def test_split_size_and_other_records_make_other_cache_entries(
    prepared, monkeypatch, tmp_path
):
    data_dir, _ = prepared
    decoded = []
    decode = tfds_directory._decode_split
    monkeypatch.setattr(
        tfds_directory,
        "_decode_split",
        lambda *args: decoded.append(args) or decode(*args),
    )
    load = functools.partial(sources.load, "tiny", data_dir=data_dir)
    for _ in range(2):
        load(split="test")
        load(split="train")
        assert load(split="test", image_size=4).images.shape == (10, 4, 4, 3)
    assert len(decoded) == 3
    record = next((data_dir / "tiny/1.0.0").glob("*test*"))
    record.touch()
    load(split="test")
    assert len(decoded) == 3
    other = {"train": tiny_dataset(40), "test": tiny_dataset(10, seed=7)}
    folder = prepare.write(other, out=tmp_path / "other", name="tiny")
    record.write_bytes((folder / record.name).read_bytes())
    np.testing.assert_array_equal(load(split="test").images, other["test"].images)
    assert len(decoded) == 4


@pytest.mark.parametrize("hashed_bytes", [2**30, 0])
def test_data_sets_of_the_same_names_sizes_and_times_are_told_apart(
    tmp_path, monkeypatch, hashed_bytes
):
    """Records are padded to 64 kB, and archives may set all times to the same."""
    monkeypatch.setattr(cache, "_MAX_HASHED_BYTES", hashed_bytes)
    facts = set()
    for seed in range(2):
        splits = {split: tiny_dataset(10, seed=seed) for split in sources.SPLITS}
        folder = prepare.write(splits, out=tmp_path / f"{seed}", name="tiny")
        for path in folder.iterdir():
            os.utime(path, (10**9, 10**9))
            facts.add((path.name, path.stat().st_size, path.stat().st_mtime_ns))
        for _ in range(2):
            data = sources.load("tiny", split="test", data_dir=tmp_path / f"{seed}")
            np.testing.assert_array_equal(data.images, splits["test"].images)
    assert len({name for name, *_ in facts}) == len(facts)
    assert len(list((tmp_path / "cache/data").glob("*.json"))) == 2


@pytest.mark.parametrize("suffix", [".images.npy", ".labels.npy", ".json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "empty"])
def test_a_damaged_cache_is_made_anew(prepared, tmp_path, suffix, damage):
    data_dir, splits = prepared
    load = functools.partial(sources.load, "tiny", split="test", data_dir=data_dir)
    load()
    (path,) = (tmp_path / "cache/data").glob(f"*{suffix}")
    good = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        flipped = good[:-9] + bytes([good[-9] ^ 1]) + good[-8:]
        bad = {"flip": flipped, "cut": good[:-5], "empty": b""}
        path.write_bytes(bad[damage])
    np.testing.assert_array_equal(load().images, splits["test"].images)
    assert path.read_bytes() == good
    assert len(list((tmp_path / "cache/data").iterdir())) == 3


def test_a_cache_that_cannot_be_written_costs_time_only(prepared, monkeypatch, caplog):
    data_dir, _ = prepared
    monkeypatch.setenv("NAD_JAX_CACHE", "/dev/null")
    assert len(sources.load("tiny", split="test", data_dir=data_dir)) == 10
    assert "cannot cache" in caplog.text


def test_cache_names_are_those_of_the_documentation(tmp_path):
    cache.fetch("some-entry", lambda: {"images": np.zeros(3)})
    names = {path.name for path in (tmp_path / "cache/data").iterdir()}
    assert names == {"some-entry.images.npy", "some-entry.json"}


def test_tfrecord_directories_are_read_too(prepared, tmp_path):
    """What TFDS writes with TensorFlow: the same examples in another envelope."""
    import tensorflow_datasets as tfds

    data_dir, splits = prepared
    folder = data_dir / "tiny/1.0.0"
    builder: Any = tfds.builder_from_directory(folder)
    for split in sources.SPLITS:
        source = builder.as_data_source(split, deserialize_method="raw_bytes")
        (old,) = folder.glob(f"*{split}*")
        envelopes = b""
        for row in range(len(source)):
            record = source.data_source[row]
            envelopes += struct.pack("<Q4x", len(record)) + record + b"crc."
        old.unlink()
        (folder / old.name.replace("array_record", "tfrecord")).write_bytes(envelopes)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    data = sources.load("tiny", split="train", data_dir=data_dir)
    np.testing.assert_array_equal(data.images, splits["train"].images)


def test_tfrecords_of_absurd_length_are_refused(tmp_path):
    """A file with a hole takes no room on the disk."""
    path = tmp_path / "x.tfrecord"
    with path.open("wb") as file:
        file.write(struct.pack("<Q4x", 2**32))
        file.truncate(2**32 + 16)
    with pytest.raises(ValueError, match="record of 4,294,967,296 bytes"):
        next(tfds_directory._read_tfrecords(path))
    with path.open("r+b") as file:
        file.truncate(2**34)
    with pytest.raises(errors.InputError, match="17,179,869,184 bytes, accepted"):
        next(tfds_directory._read_tfrecords(path))


def test_more_records_than_promised_are_not_all_read(prepared, monkeypatch):
    data_dir, _ = prepared
    read = []

    def forever(part):
        del part
        while True:
            read.append(1)
            yield {"image": PICTURE, "label": 0, "id": b"x"}

    monkeypatch.setattr(tfds_directory, "_read_examples", forever)
    with pytest.raises(errors.InputError, match="11 whole examples of 10"):
        sources.load("tiny", split="test", data_dir=data_dir)
    assert len(read) == 11


@pytest.mark.parametrize(
    "name", ["features.json", "dataset_info.json", "label.labels.txt"]
)
def test_texts_beside_the_records_are_bounded(prepared, name):
    data_dir, _ = prepared
    with (data_dir / "tiny/1.0.0" / name).open("ab") as file:
        file.write(b" " * 2**22)
    with pytest.raises(errors.InputError, match=f"{name}: accepted up to") as error:
        sources.load("tiny", split="test", data_dir=data_dir)
    one_line(error)


def test_a_damaged_record_file_is_one_line(prepared):
    data_dir, _ = prepared
    (record,) = (data_dir / "tiny/1.0.0").glob("*test*")
    good = record.read_bytes()
    for bad in (b"", b"nonsense" * 100, good[: len(good) // 2], good[:-10]):
        record.write_bytes(bad)
        with pytest.raises(errors.InputError, match="cannot read test|test image") as e:
            sources.load("tiny", split="test", data_dir=data_dir)
        one_line(e)


@pytest.mark.parametrize(
    ("old", "new", "printed"),
    [
        ('"label"', '"other"', "label"),
        ('"dtype": "uint8"', '"dtype": "uint16"', "uint16"),
        ('"numClasses": "3"', '"numClasses": "5000000"', "5,000,000 classes, acc"),
        ('"numClasses": "3"', '"numClasses": Infinity', "label"),
        ("{", "", "features.json"),
    ],
)
def test_features_that_are_no_images_with_labels_are_refused(
    prepared, old, new, printed
):
    data_dir, _ = prepared
    path = data_dir / "tiny/1.0.0/features.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(errors.InputError, match=printed) as error:
        sources.load("tiny", split="test", data_dir=data_dir)
    one_line(error)


_TEXT = "tensorflow_datasets.core.features.text_feature.Text"


@pytest.mark.parametrize(
    "change",
    [
        {"pythonClassName": "data.tiny.payload.X"},
        {"python_class_name": "data.tiny.payload.X"},
        {"type": "data.tiny.payload.X", "content": {}},
        {"pythonClassName": _TEXT, "jsonFeature": {"json": '{"type": "data.tiny.p"}'}},
    ],
)
@pytest.mark.parametrize("place", ["top", "id"])
def test_no_class_named_by_a_data_set_is_imported(
    prepared, tmp_path, monkeypatch, change, place
):
    """A folder of a stranger is a package for who stands beside it."""
    data_dir, splits = prepared
    data_dir.rename(tmp_path / "data")
    payload = "import pathlib\npathlib.Path('it_ran').touch()\nclass X: pass\n"
    for name in ("payload.py", "p.py"):
        (tmp_path / "data/tiny" / name).write_text(payload)
    path = tmp_path / "data/tiny/1.0.0/features.json"
    tree = json.loads(path.read_text())
    holder = tree if place == "top" else tree["featuresDict"]["features"]["id"]
    del holder["pythonClassName"]
    holder.update(change)
    path.write_text(json.dumps(tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for in_memory in (True, False):
        data = sources.load("tiny", split="train", data_dir="data", in_memory=in_memory)
        np.testing.assert_array_equal(data.images[:], splits["train"].images)
    assert not (tmp_path / "it_ran").exists()
    assert not [name for name in sys.modules if name.startswith("data.")]


def write_records(prepared, examples: list[dict[str, Any]]) -> pathlib.Path:
    """Puts others into the place of the records of the split test."""
    proto: Any = importlib.import_module("tensorflow_datasets.proto")
    data_dir, _ = prepared
    (path,) = (data_dir / "tiny/1.0.0").glob("*test*")
    records = []
    for example in examples:
        message = proto.tf_example_pb2.Example()
        for name, value in example.items():
            feature = message.features.feature[name]
            if isinstance(value, int):
                feature.int64_list.value.append(value)
            else:
                feature.bytes_list.value.append(value)
        records.append(message.SerializeToString())
    module: Any = importlib.import_module("array_record.python.array_record_module")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    return path


@pytest.mark.parametrize("label", [-1, 3, 2**40, -(2**63), 2**63 - 1])
@pytest.mark.parametrize("in_memory", [True, False])
def test_labels_of_no_class_are_refused(prepared, label, in_memory):
    row = {"image": PICTURE, "id": b"x"}
    write_records(prepared, [{**row, "label": label if n else 0} for n in range(10)])
    with pytest.raises(errors.InputError, match=f"label {label}, accept") as error:
        sources.load("tiny", split="test", data_dir=prepared[0], in_memory=in_memory)
    one_line(error)


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ({"image": None}, "9 whole examples of 10"),
        ({"label": None}, "9 whole examples of 10"),
        ({"label": b"1"}, "9 whole examples of 10"),
        ({"image": 7}, "9 whole examples of 10"),
        ({"id": None}, "another kind of id"),
        ({"id": 7}, "another kind of id"),
    ],
)
def test_records_that_lack_something_are_refused(prepared, change, printed):
    row = {"image": PICTURE, "label": 1, "id": b"x"}
    odd = {
        name: value for name, value in {**row, **change}.items() if value is not None
    }
    write_records(prepared, [row] * 9 + [odd])
    with pytest.raises(errors.InputError, match=printed) as error:
        sources.load("tiny", split="test", data_dir=prepared[0])
    one_line(error)


@pytest.mark.parametrize("kind", ["text", "number", "none"])
def test_rows_are_sorted_by_any_id_or_left_as_they_are(prepared, kind):
    ids: dict[str, list[Any]] = {
        "text": [b"%d" % (9 - row) for row in range(10)],
        "number": [-row for row in range(10)],
        "none": [None] * 10,
    }
    rows = [
        {"image": PICTURE, "label": row % 3} | ({} if key is None else {"id": key})
        for row, key in enumerate(ids[kind])
    ]
    write_records(prepared, rows)
    data = sources.load("tiny", split="test", data_dir=prepared[0])
    expected = [row % 3 for row in range(10)]
    assert data.labels.tolist() == (expected if kind == "none" else expected[::-1])


def test_pictures_that_nobody_asked_for_are_not_decoded(prepared):
    """TFDS would decode all features of a row, of any size."""
    data_dir, _ = prepared
    row = {"image": PICTURE, "label": 1, "id": b"x", "mask": b"no picture at all"}
    write_records(prepared, [row] * 10)
    path = data_dir / "tiny/1.0.0/features.json"
    tree = json.loads(path.read_text())
    features = tree["featuresDict"]["features"]
    features["mask"] = features["image"]
    path.write_text(json.dumps(tree))
    for in_memory in (True, False):
        data = sources.load(
            "tiny", split="test", data_dir=data_dir, in_memory=in_memory
        )
        assert data.images[:].shape == (10, 8, 8, 3)


@pytest.mark.slow
@pytest.mark.parametrize("in_memory", [True, False])
def test_records_that_unpack_to_far_more_than_their_file_are_refused(
    prepared, in_memory
):
    """A file of 200 kB that used to take gigabytes of memory."""
    row = {"image": bytes(2**26), "label": 1, "id": b"x"}
    path = write_records(prepared, [row] * 5)
    assert path.stat().st_size < 400_000
    with pytest.raises(errors.InputError, match="unpacks to 335,544,") as error:
        sources.load("tiny", split="test", data_dir=prepared[0], in_memory=in_memory)
    one_line(error)


def test_encoded_pictures_in_memory_are_bounded(prepared, monkeypatch):
    monkeypatch.setitem(sources.check_bytes.__kwdefaults__, "limit", 1000)
    with pytest.raises(errors.InputError, match="accepted up to 1,000") as error:
        sources.load("tiny", split="test", data_dir=prepared[0])
    one_line(error)


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (None, "tiny-test.array_record-00000-of-00001"),
        (
            "{SPLIT}/{DATASET}-{SHARD_INDEX}.{FILEFORMAT}",
            "test/tiny-00000.array_record",
        ),
        ("x{NUM_SHARDS}", "x00001"),
        ("../{SPLIT}", None),
        ("/tmp/{SPLIT}", None),
        ("{SPLIT.__class__}", None),
        ("{SPLIT:>999999999999}", None),
        ("{HOME}", None),
        ("{SPLIT}\n", None),
        ("\0", None),
        ("", "tiny-test.array_record-00000-of-00001"),
    ],
)
def test_files_have_the_names_that_the_data_set_says(prepared, template, name):
    data_dir, splits = prepared
    path = data_dir / "tiny/1.0.0/dataset_info.json"
    info = json.loads(path.read_text())
    for split in info["splits"]:
        if template is None:  # as older versions of TFDS write it
            split.pop("filepathTemplate", None)
        else:
            split["filepathTemplate"] = template
    path.write_text(json.dumps(info))
    if name is None:
        # A newline is a name like any other; no such file is there.
        said = "is missing" if template == "{SPLIT}\n" else "files named"
        with pytest.raises(errors.InputError, match=said) as error:
            sources.load("tiny", split="test", data_dir=data_dir)
        one_line(error)
        return
    (old,) = path.parent.glob("*test*")
    (path.parent / name).parent.mkdir(exist_ok=True)
    old.rename(path.parent / name)
    data = sources.load("tiny", split="test", data_dir=data_dir)
    np.testing.assert_array_equal(data.images, splits["test"].images)


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ({"fileFormat": "parquet"}, "files are 'parquet', accepted"),
        ({"splits": []}, "no split 'test'"),
        ({"splits": [{"name": "test", "shardLengths": [-1]}]}, "does not list"),
        ({"splits": [{"name": "test", "shardLengths": []}]}, "0 whole examples of 0"),
        ({"splits": [{"name": "test", "shardLengths": ["1", 1]}]}, "is missing"),
        ({"splits": ["test"]}, "does not list its splits"),
        ({"name": "other\n"}, "is missing"),
        ({"name": None}, "is missing"),
    ],
)
def test_a_dataset_info_that_does_not_fit_is_refused(prepared, change, printed):
    data_dir, _ = prepared
    path = data_dir / "tiny/1.0.0/dataset_info.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    for in_memory in (True, False):
        with pytest.raises(errors.InputError, match=printed) as error:
            sources.load("tiny", split="test", data_dir=data_dir, in_memory=in_memory)
        one_line(error)


def test_a_split_in_several_files_is_one(prepared):
    """An empty shard has no file."""
    data_dir, _ = prepared
    rows = [{"image": PICTURE, "label": n % 3, "id": b"%d" % n} for n in range(10)]
    path = data_dir / "tiny/1.0.0/dataset_info.json"
    for number, part in ((0, rows[6:]), (2, rows[:6])):
        record = write_records(prepared, part)
        name = f"tiny-test.array_record-{number:05}-of-00003"
        # Not yet of the same pattern: the one file is written twice.
        record.rename(record.with_name(name.replace("test", "later")))
        (record.parent / record.name).touch()
    record.unlink()
    for later in record.parent.glob("*later*"):
        later.rename(later.with_name(later.name.replace("later", "test")))
    info = json.loads(path.read_text())
    info["splits"] = [{"name": "test", "shardLengths": ["4", "0", "6"]}]
    path.write_text(json.dumps(info))
    for in_memory in (True, False):
        data = sources.load(
            "tiny", split="test", data_dir=data_dir, in_memory=in_memory
        )
        assert data.labels.tolist() == [n % 3 for n in range(10)]
        assert len(data.images[:]) == 10


def test_a_split_that_is_not_there_lists_those_that_are(prepared):
    data_dir, _ = prepared
    path = data_dir / "tiny/1.0.0/dataset_info.json"
    info = json.loads(path.read_text())
    info["splits"] = [split for split in info["splits"] if split["name"] == "train"]
    path.write_text(json.dumps(info))
    with pytest.raises(errors.InputError, match=r"no split 'test', it has \['train'\]"):
        sources.load("tiny", split="test", data_dir=data_dir)


@pytest.mark.parametrize(
    ("content", "printed"), [(b"a\nb", "2 class names"), (b"\xff\n1\n2", "labels.txt")]
)
def test_class_names_that_do_not_fit_are_refused(prepared, content, printed):
    data_dir, _ = prepared
    (data_dir / "tiny/1.0.0/label.labels.txt").write_bytes(content)
    with pytest.raises(errors.InputError, match=printed) as error:
        sources.load("tiny", split="test", data_dir=data_dir)
    one_line(error)
