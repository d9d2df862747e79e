# SPDX-License-Identifier: Apache-2.0
"""Writes a data set in the TFDS layout, without TensorFlow and without the network.

    python -m nad_jax.data.prepare \\
        --source=cifar-10-binary.tar.gz --out=~/tensorflow_datasets --name=cifar10

PATH may be the binary CIFAR-10 archive, an .npz file, or a folder of images per class
(see `nad_jax.data.npz` and `nad_jax.data.folder`). Images are stored as PNG, so nothing
is lost. Afterwards `nad_jax.data.sources.load(NAME, split=..., data_dir=DATA_DIR)` and
`tfds.data_source(NAME, split=..., data_dir=DATA_DIR, download=False)` read them.
"""

import contextlib
import io
import pathlib
import re
import sys
import tempfile
from collections.abc import Sequence

from absl import flags

from nad_jax import errors
from nad_jax.data import cifar_binary, pictures, sources

_NAME = re.compile(r"[a-z][a-z0-9_]*")

# TFDS finds a data set it knows only under the version its own code has.
_VERSIONS = {"cifar10": "3.0.2"}

_REQUIRED = {
    "source": "archive, .npz file or folder to read",
    "out": "DATA_DIR to write into",
    "name": "what to call the data set: cifar10, or lower case letters, digits and _",
}
_IMAGE_SIZE = "height and width to resize to (optional)"


def read_source(
    path: pathlib.Path, *, image_size: int | None = None
) -> dict[str, sources.Dataset]:
    """The train and test split of an archive, a file or a folder."""
    if path.is_dir() or path.suffix == ".npz":
        kind = "folder" if path.is_dir() else "npz"
        return {
            split: sources.load(kind, split=split, data_dir=path, image_size=image_size)
            for split in sources.SPLITS
        }
    if not path.is_file():
        raise errors.InputError(f"--source={path} does not exist")
    if ".tar" not in path.suffixes and path.suffix != ".tgz":
        raise errors.InputError(
            f"--source={path} must be a .tar or .tar.gz, an .npz or a folder"
        )
    splits = cifar_binary.read(path)
    if image_size not in (None, 32):
        raise errors.InputError(f"--image_size={image_size}: CIFAR-10 is stored as 32")
    return splits


def write(
    splits: dict[str, sources.Dataset], *, out: pathlib.Path, name: str
) -> pathlib.Path:
    """Writes `splits` as the TFDS data set `name` under `out`.

    Returns:
      The folder made, `out/name/version`. It appears only when it is complete.

    Raises:
      InputError: if the name is not lower case letters, digits and `_`, if the folder
        exists already, or if the splits differ in classes or image shape.
    """
    if not _NAME.fullmatch(name):
        raise errors.InputError(f"--name={name!r} must be like cifar10 or my_images")
    version = _VERSIONS.get(name, "1.0.0")
    folder = out / name / version
    if folder.exists():
        raise errors.InputError(f"{folder} exists already; remove it or change --name")
    facts = {(data.images.shape[1:], data.class_names) for data in splits.values()}
    if len(facts) != 1:
        raise errors.InputError("train and test differ in image shape or classes")
    builder = _make_builder(splits, out, name, version)
    # TFDS announces a download on stdout; there is none.
    with (
        tempfile.TemporaryDirectory() as unused,
        contextlib.redirect_stdout(io.StringIO()),
    ):
        builder.download_and_prepare(download_dir=unused)
    return folder


def _make_builder(
    splits: dict[str, sources.Dataset],
    out: pathlib.Path,
    dataset_name: str,
    version: str,
):
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    example = next(iter(splits.values()))

    class Info(tfds.core.DatasetInfo):
        """Of this data set alone, not of one that is published under its name."""

        def initialize_from_bucket(self):
            # TFDS would ask the network, and leave a temporary folder behind.
            pass

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """The arrays of `splits`, as TFDS wants to be told of them."""

        VERSION = tfds.core.Version(version)
        name = dataset_name

        def _info(self):
            return Info(
                builder=self,
                features=tfds.features.FeaturesDict(
                    {
                        "id": tfds.features.Text(),
                        "image": tfds.features.Image(shape=example.images.shape[1:]),
                        "label": tfds.features.ClassLabel(names=example.class_names),
                    }
                ),
                supervised_keys=("image", "label"),
            )

        def _split_generators(self, dl_manager):
            del dl_manager  # Nothing to download.
            return {split: self._generate_examples(split) for split in splits}

        def _generate_examples(self, split):
            data = splits[split]
            # Of one width, so that sorting by `id` restores the order.
            width = max(5, len(str(len(data))))
            for row, (image, label) in enumerate(
                zip(data.images, data.labels, strict=True)
            ):
                yield (
                    row,
                    {
                        "id": f"{split}_{row:0{width}}",
                        # Encoded here: TFDS would need TensorFlow for that.
                        "image": pictures.encode_png(image),
                        "label": int(label),
                    },
                )

    return Builder(data_dir=out, file_format="array_record")


def _parse(argv: Sequence[str]) -> flags.FlagValues:
    options = flags.FlagValues()  # Our own: importing this file defines no flag.
    for name, meaning in _REQUIRED.items():
        flags.DEFINE_string(name, None, meaning, flag_values=options)
    flags.DEFINE_integer("image_size", None, _IMAGE_SIZE, flag_values=options)
    flags.DEFINE_boolean("help", False, "", flag_values=options)
    try:
        rest = options(argv)[1:]
    except flags.Error as error:
        raise errors.InputError(str(error).splitlines()[0]) from error
    if rest:
        raise errors.InputError(f"unexpected argument {rest[0]!r}")
    missing = [name for name in _REQUIRED if not options[name].value]
    if missing and not options.help:
        raise errors.InputError(f"--{missing[0]} is missing; see --help")
    return options


def _help() -> str:
    meanings = {**_REQUIRED, "image_size": _IMAGE_SIZE}
    lines = [f"  --{name}: {meaning}" for name, meaning in meanings.items()]
    return "\n".join([str(__doc__), *lines])


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns its exit code: 0, or 2 with one line on stderr."""
    try:
        options = _parse(argv)
        if options.help:
            print(_help())
            return 0
        splits = read_source(
            sources.user_path(options.source), image_size=options.image_size
        )
        out = sources.user_path(options.out)
        folder = write(splits, out=out, name=options.name)
    except (errors.InputError, OSError) as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    counts = ", ".join(f"{len(data)} {split}" for split, data in splits.items())
    shape = "x".join(map(str, splits["train"].images.shape[1:]))
    print(f"{folder}: {counts} images {shape}, {splits['train'].num_classes} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
