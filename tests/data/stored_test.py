# SPDX-License-Identifier: Apache-2.0
"""Images in files: the same as in memory, or one line that says what is wrong."""

import io
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
from PIL import Image

from nad_jax import errors
from nad_jax.data import prepare, sources, stored

SOURCES = ("folder", "npz", "tfds")
NUM, CLASSES = 23, ("a", "b", "c")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def _images() -> np.ndarray:
    draw = np.random.default_rng(5)
    return draw.integers(0, 256, (NUM, 7, 6, 3), dtype=np.uint8)


LABELS = np.arange(NUM) % len(CLASSES)


def _write(kind: str, tmp_path: pathlib.Path) -> dict:
    """The same images in files; arguments of `sources.load`."""
    images = _images()
    path = tmp_path / kind
    if kind == "npz":
        names = np.array(CLASSES)
        np.savez(tmp_path / "x.npz", images=images, labels=LABELS, class_names=names)
        return {"name": "npz", "data_dir": tmp_path / "x.npz"}
    if kind == "folder":
        for row, (image, label) in enumerate(zip(images, LABELS, strict=True)):
            file = path / CLASSES[label] / f"{row:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)
        return {"name": "folder", "data_dir": path}
    labels = LABELS.astype(np.int32)
    whole = sources.Dataset(images, labels, len(CLASSES), "tiny", CLASSES)
    splits = {"train": whole, "test": whole.take(np.arange(4))}
    prepare.write(splits, out=path, name="tiny")
    return {"name": "tiny", "data_dir": path}


def _open(place: dict, **options) -> sources.Dataset:
    return sources.load(**place, split="train", in_memory=False, **options)


def _one_line(raised: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.slow
@pytest.mark.parametrize("image_size", [None, 5])
@pytest.mark.parametrize("kind", SOURCES)
def test_images_in_files_are_those_in_memory(kind, image_size, tmp_path):
    """All of them, any rows of them or none, and in the hands of another process."""
    place = _write(kind, tmp_path)
    whole = sources.load(**place, split="train", image_size=image_size)
    data = _open(place, image_size=image_size)
    assert isinstance(data.images, stored.Images)
    assert data.images.shape == whole.images.shape
    assert data.class_names == whole.class_names == CLASSES
    assert (data.name, data.num_classes) == (whole.name, whole.num_classes)
    np.testing.assert_array_equal(data.labels, whole.labels)
    np.testing.assert_array_equal(data.images[:], whole.images)
    rows = np.array([9, 0, 9, 3])
    np.testing.assert_array_equal(data.images[rows], whole.images[rows])
    np.testing.assert_array_equal(data.images[2:11:3], whole.images[2:11:3])
    for none in (rows[:0], slice(4, 4)):
        assert data.images[none].dtype == np.uint8
        assert data.images[none].shape == whole.images[none].shape
    np.testing.assert_array_equal(data.take(rows).images, whole.images[rows])
    reader = pickle.loads(pickle.dumps(data.images.reader))
    assert reader.identity == _open(place, image_size=image_size).images.reader.identity
    np.testing.assert_array_equal(reader.read(rows), whole.images[rows])


def test_labels_and_order_of_records_are_read_once(tmp_path, monkeypatch):
    from nad_jax.data import tfds_directory

    place = _write("tfds", tmp_path)
    first = _open(place)
    monkeypatch.setattr(tfds_directory, "_read_split", lambda *_, **__: pytest.fail())
    np.testing.assert_array_equal(_open(place).images[:], first.images[:])


@pytest.mark.parametrize("kind", SOURCES)
def test_no_array_is_made_of_all_images(kind, tmp_path):
    data = _open(_write(kind, tmp_path))
    with pytest.raises(errors.InputError, match="data.loader=device") as raised:
        np.asarray(data.images)
    _one_line(raised)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (np.array([0, 99]), "0 to 99"),
        (np.array([-1]), "-1 to -1"),
        (np.array([True, False]), "bool"),
        (np.array([[1]]), r"\[1, 1\]"),
    ],
)
def test_rows_that_are_not_there_are_refused(rows, words, tmp_path):
    data = _open(_write("npz", tmp_path))
    with pytest.raises(errors.InputError, match=words) as raised:
        data.images[rows]
    _one_line(raised)


def test_changed_images_cover_those_in_the_files(tmp_path):
    """In any order, twice, in arrays as in files, and never in the original."""
    place = _write("npz", tmp_path)
    whole, data = sources.load(**place, split="train"), _open(place)
    new = np.full((3, *data.images.shape[1:]), [[[[7]]], [[[8]]], [[[9]]]], np.uint8)
    rows, more = np.array([11, 2, 5]), np.array([5, 0])
    results = []
    for given in (whole, data):
        changed = given.replaced(rows, new, np.array([0, 1, 2], np.int32))
        results.append(changed.replaced(more, new[:2], np.array([2, 2], np.int32)))
        np.testing.assert_array_equal(given.images[:], whole.images)
    in_memory, in_files = results
    assert in_memory.images[[11, 2, 5, 0], 0, 0, 0].tolist() == [7, 8, 7, 8]
    np.testing.assert_array_equal(in_files.images[:], in_memory.images)
    np.testing.assert_array_equal(in_files.labels, in_memory.labels)
    assert in_files.labels[rows].tolist() == [0, 1, 2]
    shuffled = np.random.default_rng(0).permutation(len(data))
    np.testing.assert_array_equal(in_files.images[shuffled], in_memory.images[shuffled])


@pytest.mark.parametrize("kind", ["folder", "tfds"])
def test_other_images_of_the_same_names_have_another_identity(kind, tmp_path):
    """A run that goes on is to notice them; files of records are padded to one size."""
    place = _write(kind, tmp_path)
    before = _open(place).images.reader.identity
    assert _open(place).images.reader.identity == before
    if kind == "folder":
        path = _file_of(kind, place)
        Image.new("RGB", (6, 7)).save(path)
    else:
        other = {"name": "tiny", "data_dir": tmp_path / "other"}
        labels = LABELS.astype(np.int32)
        whole = sources.Dataset(_images()[::-1], labels, len(CLASSES), "tiny", CLASSES)
        splits = {"train": whole, "test": whole.take(np.arange(4))}
        prepare.write(splits, out=other["data_dir"], name="tiny")
        sizes = [_file_of(kind, each).stat().st_size for each in (place, other)]
        assert sizes[0] == sizes[1]
        place = other
    assert _open(place).images.reader.identity != before


# --- what cannot be read by rows ---


def test_digits_have_no_files():
    with pytest.raises(errors.InputError, match="'digits'.*data.loader=device") as e:
        sources.load("digits", split="train", in_memory=False)
    _one_line(e)


@pytest.mark.parametrize(
    ("save", "order", "words"),
    [(np.savez_compressed, "C", "compressed"), (np.savez, "F", "Fortran")],
)
def test_an_npz_that_does_not_lie_in_rows_is_refused(save, order, words, tmp_path):
    images = np.asarray(_images(), order=order)
    save(tmp_path / "x.npz", images=images, labels=LABELS)
    with pytest.raises(errors.InputError, match=words) as raised:
        _open({"name": "npz", "data_dir": tmp_path / "x.npz"})
    _one_line(raised)


def test_tfrecord_files_are_refused(tmp_path):
    place = _write("tfds", tmp_path)
    info = place["data_dir"] / "tiny/1.0.0/dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(errors.InputError, match="TFRecord.*data.loader=device") as e:
        _open(place)
    _one_line(e)


# --- missing and damaged files ---


def _file_of(kind: str, place: dict) -> pathlib.Path:
    if kind == "npz":
        return place["data_dir"]
    pattern = "a/*.png" if kind == "folder" else "*/*/*train*"
    return sorted(place["data_dir"].glob(pattern))[0]


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        *((kind, damage) for kind in SOURCES for damage in ("removed", "cut")),
        ("folder", "other"),
        ("tfds", "other"),
    ],
)
def test_files_that_change_under_a_reader_are_one_line(kind, damage, tmp_path):
    """After opening, so that nothing that was checked then can be relied upon."""
    place = _write(kind, tmp_path)
    reader = pickle.loads(pickle.dumps(_open(place).images.reader))
    path = _file_of(kind, place)
    if damage == "removed":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        path.write_bytes(b"nonsense" * 100)
    with pytest.raises(errors.InputError, match=str(place["data_dir"])) as raised:
        reader.read(np.arange(reader.shape[0]))
    _one_line(raised)


@pytest.mark.parametrize("kind", ["npz", "tfds"])
def test_a_file_that_is_damaged_already_is_not_opened(kind, tmp_path):
    place = _write(kind, tmp_path)
    path = _file_of(kind, place)
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], good[:900] + b"\xff" + good[901:], b""):
        path.write_bytes(bad)
        with pytest.raises(errors.InputError, match=str(place["data_dir"])) as raised:
            data = _open(place)
            if kind == "tfds":  # a picture is looked at when it is read
                data.images[:]
        _one_line(raised)


def test_a_wrong_pixel_far_inside_of_an_npz_is_noticed(tmp_path):
    """Its checksum is compared over all of the images, not where reading begins."""
    images = np.zeros((40, 40, 40, 3), np.uint8)
    path = tmp_path / "x.npz"
    np.savez(path, images=images, labels=np.arange(40) % 2)
    bad = bytearray(path.read_bytes())
    bad[images.nbytes // 2] ^= 1
    path.write_bytes(bad)
    with pytest.raises(errors.InputError, match=str(path)) as raised:
        _open({"name": "npz", "data_dir": path})
    _one_line(raised)


def test_a_picture_of_another_size_is_named(tmp_path):
    place = _write("folder", tmp_path)
    Image.new("RGB", (3, 3)).save(place["data_dir"] / "b" / "001.png")
    data = _open(place)
    with pytest.raises(errors.InputError, match=r"b/001.png is \[3, 3, 3\] but") as e:
        data.images[:]
    _one_line(e)


@pytest.mark.parametrize("extra", [b"", b"\x01\x00\x04\x00abcd"])
def test_an_npz_is_read_where_its_entries_say(extra, tmp_path):
    """Local headers of zip entries may have another length than the directory says."""
    images = _images()
    header = io.BytesIO()
    np.save(header, images)
    labels = io.BytesIO()
    np.save(labels, LABELS)
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", labels.getvalue())
        entry = zipfile.ZipInfo("images.npy")
        entry.extra = extra
        archive.writestr(entry, header.getvalue())
    place = {"name": "npz", "data_dir": path}
    whole = sources.load(**place, split="train")
    np.testing.assert_array_equal(_open(place).images[:], whole.images)
