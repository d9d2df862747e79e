# SPDX-License-Identifier: Apache-2.0
"""Preparing data: nothing is lost, nothing hostile followed, mistakes are one line."""

import bz2
import gzip
import io
import lzma
import pathlib
import pickle
import subprocess
import sys
import tarfile
import tracemalloc
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nad_jax import errors
from nad_jax.data import cifar_binary, prepare, sources

FOLDER = "cifar-10-batches-bin"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NAD_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))


def cifar_members(per_file: int = 3) -> dict[str, bytes]:
    """A small CIFAR-10: six files of random records, and the two others there are."""
    draw = np.random.default_rng(0)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    members = {}
    for name in names:
        records = draw.integers(0, 256, (per_file, 3073), dtype=np.uint8)
        records[:, 0] %= 10
        members[f"{FOLDER}/{name}"] = records.tobytes()
    return {**members, f"{FOLDER}/readme.html": b"<html>", f"{FOLDER}/notes": b""}


def write_tar(path: pathlib.Path, members: dict[str, bytes]) -> pathlib.Path:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def run(*arguments: str) -> int:
    return prepare.main(["prepare", *arguments])


def expected_image(record: bytes) -> np.ndarray:
    """The oracle: pixel (y, x) of channel c is byte 1 + 1024 c + 32 y + x."""
    image = np.empty((32, 32, 3), np.uint8)
    for y in range(32):
        for x in range(32):
            image[y, x] = [record[1 + 1024 * c + 32 * y + x] for c in range(3)]
    return image


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".tar.gz", ".tar"])
def test_cifar_survives_the_round_trip_without_loss(tmp_path, capsys, suffix):
    members = cifar_members()
    source = write_tar(tmp_path / f"cifar-10-binary{suffix}", members)
    out = tmp_path / "out"
    assert run(f"--source={source}", f"--out={out}", "--name=cifar10") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "15 train, 3 test images 32x32x3" in printed
    for split, prefix in (("train", "data"), ("test", "test")):
        stored = b"".join(
            data for name, data in members.items() if f"/{prefix}" in name
        )
        records = [stored[i : i + 3073] for i in range(0, len(stored), 3073)]
        data = sources.load("cifar10", split=split, data_dir=out)
        assert data.labels.tolist() == [record[0] for record in records]
        assert data.class_names[:2] == ("airplane", "automobile")
        for image, record in zip(data.images, records, strict=True):
            np.testing.assert_array_equal(image, expected_image(record))


@pytest.mark.slow
def test_tfds_itself_reads_what_was_prepared(tmp_path):
    import tensorflow_datasets as tfds

    splits = cifar_binary.read(write_tar(tmp_path / "c.tar", cifar_members()))
    for name in ("cifar10", "my_cifar"):
        folder = prepare.write(splits, out=tmp_path / "out", name=name)
        rows: Any = tfds.data_source(
            name,
            split="train",
            data_dir=tmp_path / "out",
            download=False,
            decoders={"image": tfds.decode.SkipDecoding()},
        )
        # TFDS shuffles; the id says which row it was.
        ids = sorted(row["id"] for row in rows)
        assert ids == [f"train_{row:05}".encode() for row in range(15)]
        for row in rows:
            index = int(row["id"].decode().removeprefix("train_"))
            picture = np.asarray(Image.open(io.BytesIO(row["image"])))
            np.testing.assert_array_equal(picture, splits["train"].images[index])
            assert row["label"] == splits["train"].labels[index]
        builder: Any = tfds.builder_from_directory(folder)
        half = builder.as_data_source("train[:40%]")
        assert len(half) == 6
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "cifar10",
        "my_cifar",
    ]


@pytest.mark.slow
def test_writing_asks_no_network_and_leaves_no_temporary_file(tmp_path, monkeypatch):
    from tensorflow_datasets.core.utils import gcs_utils

    asked = []
    monkeypatch.setattr(
        gcs_utils, "gcs_dataset_info_files", lambda name: asked.append(name)
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    splits = cifar_binary.read(write_tar(tmp_path / "c.tar", cifar_members()))
    prepare.write(splits, out=tmp_path / "out", name="cifar10")
    assert asked == []
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_folder_and_an_npz_give_the_same_data_set(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (12, 5, 5, 3), dtype=np.uint8)
    labels = np.repeat([0, 1], 6)
    arrays = {}
    for split, rows in (("train", slice(0, None, 2)), ("test", slice(1, None, 2))):
        arrays[f"images_{split}"], arrays[f"labels_{split}"] = (
            images[rows],
            labels[rows],
        )
        for row, (image, label) in enumerate(
            zip(images[rows], labels[rows], strict=True)
        ):
            path = tmp_path / "folder" / split / "ab"[label] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path)
    np.savez(tmp_path / "x.npz", class_names=np.array(["a", "b"]), **arrays)
    for source, name in (("folder", "one"), ("x.npz", "two")):
        path = tmp_path / source
        assert run(f"--source={path}", f"--out={tmp_path}", f"--name={name}") == 0
        data = sources.load(name, split="test", data_dir=tmp_path)
        np.testing.assert_array_equal(data.images, images[1::2])
        np.testing.assert_array_equal(data.labels, labels[1::2])
        assert data.class_names == ("a", "b")


def test_grey_images_and_resizing(tmp_path):
    grey = np.full((10, 4, 6, 1), 99, np.uint8)
    np.savez(tmp_path / "x.npz", images=grey, labels=np.zeros(10, int))
    options = [f"--source={tmp_path}/x.npz", f"--out={tmp_path}", "--image_size=8"]
    assert run(*options, "--name=grey") == 0
    data = sources.load("grey", split="train", data_dir=tmp_path)
    assert data.images.shape == (8, 8, 8, 1) and (data.images == 99).all()


# --- hostile and damaged archives ---


def damaged(change: str) -> dict[str, bytes]:
    members = cifar_members(per_file=2)
    first = f"{FOLDER}/data_batch_1.bin"
    if change == "missing":
        del members[first]
    elif change == "partial record":
        members[first] += b"x"
    elif change == "empty":
        members[first] = b""
    elif change == "label 10":
        members[first] = b"\x0a" + members[first][1:]
    elif change == "too many":
        members[first] = bytes(3073 * 10_001)
    elif change == "python version":
        evil = pickle.dumps({b"data": [1, 2, 3]})
        members = {"cifar-10-batches-py/data_batch_1": evil}
    elif change == "elsewhere":
        members["../" + first] = members.pop(first)
    elif change == "many members":
        members |= {f"{FOLDER}/{number}": b"" for number in range(100)}
    return members


@pytest.mark.parametrize(
    ("change", "printed"),
    [
        ("missing", "data_batch_1.bin is missing"),
        ("elsewhere", "data_batch_1.bin is missing"),
        ("partial record", "6,147 bytes"),
        ("empty", "has 0 bytes"),
        ("label 10", "accepted 0..9"),
        ("too many", "30,733,073 bytes"),
        ("python version", "cifar-10-binary.tar.gz"),
        ("many members", "far larger"),
    ],
)
def test_a_tar_that_is_not_cifar_is_refused(tmp_path, change, printed):
    before = set(tmp_path.parent.iterdir())
    with pytest.raises(errors.InputError, match=printed) as error:
        cifar_binary.read(write_tar(tmp_path / "c.tar", damaged(change)))
    assert "\n" not in str(error.value)
    assert set(tmp_path.parent.iterdir()) == before


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_in_a_tar_are_not_followed(tmp_path, kind):
    path = tmp_path / "c.tar"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo(f"{FOLDER}/data_batch_1.bin")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(errors.InputError, match="is a link"):
        cifar_binary.read(path)


def test_a_member_that_comes_twice_is_refused(tmp_path):
    members = cifar_members()
    path = tmp_path / "c.tar"
    write_tar(path, members)
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo(f"{FOLDER}/data_batch_1.bin")
        info.size = 3073
        archive.addfile(info, io.BytesIO(bytes(3073)))
    with pytest.raises(errors.InputError, match="twice"):
        cifar_binary.read(path)


def test_a_tar_cut_off_or_damaged_anywhere_is_one_line(tmp_path):
    good = write_tar(tmp_path / "c.tar.gz", cifar_members(per_file=1)).read_bytes()
    for number, place in enumerate(range(0, len(good), len(good) // 25)):
        flipped = good[:place] + bytes([good[place] ^ 0x41]) + good[place + 1 :]
        for bad in (good[:place], flipped):
            path = tmp_path / f"bad{number}.tar.gz"
            path.write_bytes(bad)
            try:
                cifar_binary.read(path)
            except errors.InputError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_a_flipped_bit_in_a_compressed_tar_is_never_a_wrong_pixel(tmp_path, suffix):
    """Its checksum stands at the end, behind the end mark of the tar inside."""
    members = cifar_members(per_file=5)
    plain = write_tar(tmp_path / "c.tar", members).read_bytes()
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    good = compress[suffix](plain)
    path = tmp_path / f"c.tar{suffix}"
    path.write_bytes(good)
    expected = cifar_binary.read(path)
    draw, refused = np.random.default_rng(0), 0
    for place in draw.integers(0, len(good), 60).tolist():
        flipped = bytes([good[place] ^ 1 << int(draw.integers(8))])
        path.write_bytes(good[:place] + flipped + good[place + 1 :])
        try:
            found = cifar_binary.read(path)
        except errors.InputError as error:
            refused += 1
            assert "\n" not in str(error)
            continue
        for split, data in found.items():
            np.testing.assert_array_equal(data.images, expected[split].images)
            np.testing.assert_array_equal(data.labels, expected[split].labels)
    assert refused > 50


def write_extended(path: pathlib.Path, kind: bytes, num_bytes: int) -> None:
    """A good archive, with a block before the first member that says more of it."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        info = tarfile.TarInfo("././@LongLink")
        info.type, info.size = kind, num_bytes
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(num_bytes // 2**20):
            file.write(bytes(2**20))
        file.write(write_tar(path.with_name("plain.tar"), cifar_members()).read_bytes())


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_what_stands_before_a_member_is_not_held_in_memory(tmp_path, kind):
    path = tmp_path / "c.tar.gz"
    write_extended(path, kind, 2**26)
    tracemalloc.start()
    try:
        splits = cifar_binary.read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(splits["train"]) == 15
    assert peak < 2**24


@pytest.mark.parametrize("where", ["before", "extension", "behind"])
def test_a_tar_that_unpacks_to_far_more_is_refused(tmp_path, monkeypatch, where):
    """Counted while it is read: behind the end mark there may be anything."""
    monkeypatch.setattr(cifar_binary, "_MAX_TOTAL_BYTES", 2**20)
    path = tmp_path / "c.tar.gz"
    if where == "extension":
        write_extended(path, tarfile.GNUTYPE_LONGNAME, 2**21)
    else:
        members = cifar_members()
        if where == "before":
            members = {"x": bytes(2**21), **members}
        data = write_tar(tmp_path / "plain.tar", members).read_bytes()
        path.write_bytes(gzip.compress(data + bytes(2**21 * (where == "behind"))))
    with pytest.raises(errors.InputError, match="far larger") as error:
        cifar_binary.read(path)
    assert "\n" not in str(error.value)


def test_more_headers_than_there_are_members_are_refused(tmp_path):
    info = tarfile.TarInfo("././@LongLink")
    info.type = tarfile.GNUTYPE_LONGNAME
    path = tmp_path / "c.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) * 1000)
    with pytest.raises(errors.InputError, match="far larger"):
        cifar_binary.read(path)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_tars_of_other_programs_are_read(tmp_path, form):
    """With folders, `./` before names, and times that need headers of their own."""
    path = tmp_path / "c.tar"
    with tarfile.open(path, "w", format=form) as archive:
        folder = tarfile.TarInfo(f"./{FOLDER}")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in {**cifar_members(), f"{FOLDER}/{'x' * 300}": b"x"}.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size, info.mtime = len(data), 1.5
            archive.addfile(info, io.BytesIO(data))
    assert len(cifar_binary.read(path)["train"]) == 15


# --- the command ---


@pytest.mark.parametrize(
    ("arguments", "printed"),
    [
        ([], "--source is missing"),
        (["--source=x", "--out=y"], "--name is missing"),
        (["--sourc=x"], "'sourc'"),
        (["--image_size=big"], "big"),
        (["extra"], "'extra'"),
        (["--source=nothing", "--out=y", "--name=z"], "nothing does not exist"),
        (["--source=~nobody-here/x", "--out=y", "--name=z"], "~nobody-here/x"),
        (["--source={here}/x.npz", "--out=~nobody-here", "--name=z"], "~nobody-here"),
        (["--source={here}/x.txt", "--out=y", "--name=z"], "must be a .tar"),
        (["--source={here}/x.npz", "--out={here}", "--name=../z"], "'../z'"),
        (["--source={here}/x.npz", "--out={here}", "--name=Z"], "'Z'"),
        (["--source={here}/x.npz", "--out={here}/x.txt", "--name=z"], "x.txt"),
    ],
)
def test_mistakes_end_in_one_line_and_code_2(tmp_path, capsys, arguments, printed):
    (tmp_path / "x.txt").write_text("hello")
    images = np.zeros((10, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.zeros(10, int))
    assert run(*(argument.format(here=tmp_path) for argument in arguments)) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and printed in shown.err


def test_prepared_data_are_never_overwritten(tmp_path, capsys):
    images = np.zeros((10, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.zeros(10, int))
    options = [f"--source={tmp_path}/x.npz", f"--out={tmp_path}", "--name=z"]
    assert (run(*options), run(*options)) == (0, 2)
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_help_is_light_and_importing_defines_no_flag():
    code = (
        "import sys; from absl import flags; before = set(flags.FLAGS);"
        "from nad_jax.data import prepare;"
        "assert set(flags.FLAGS) == before;"
        "assert prepare.main(['prepare', '--help']) == 0;"
        "print({'tensorflow_datasets', 'PIL', 'flax', 'sklearn'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "--source" in done.stdout and done.stdout.endswith("set()\n")
