# SPDX-License-Identifier: Apache-2.0
"""The files both sides work on, and one judge of what they make of them.

In the working folder: `{images,labels}_{train,clean,test,poisoned}.npy`, and
checkpoints as PyTorch files.
"""

import pathlib
from typing import Any

import jax
import numpy as np

from benchmarks import protocol
from benchmarks.ours import start
from nad_jax.attacks import poisoning, triggers
from nad_jax.data import sources
from nad_jax.defenses import base
from nad_jax.interop import name_maps, reader
from nad_jax.training import evaluation

# As in the checkpoint that the authors of NAD released.
TARGET = 5
_POISON_RATE = 0.1
_CLASSES = 10
_SIZE = 32


def trigger() -> triggers.Trigger:
    return triggers.grid_trigger((_SIZE, _SIZE, 3))


def write_data(channel: protocol.Channel, options: dict) -> None:
    """Writes the arrays: CIFAR-10 from `data_dir`, or pictures made up here."""
    facts = start.facts()
    folder = pathlib.Path(options["work"])
    if options["data_dir"] is None:
        train = _made_up(options["train"], seed=1)
        test = _made_up(options["test"], seed=2)
    else:
        train, test = (
            _pair(sources.load("cifar10", split=split, data_dir=options["data_dir"]))
            for split in ("train", "test")
        )
    images, labels = train
    # 5 % as NAD has it; of few made-up pictures, half.
    fraction = 0.05 if options["data_dir"] is not None else 0.5
    rows, _ = base.clean_indices(
        jax.random.key(0), labels, fraction=fraction, validation_fraction=0.0
    )
    chosen = poisoning.poison_indices(
        jax.random.key(1),
        labels,
        poison_rate=_POISON_RATE,
        mode="all_to_one",
        target_label=TARGET,
    )
    poisoned = poisoning.poison(
        images,
        labels,
        chosen,
        trigger(),
        mode="all_to_one",
        target_label=TARGET,
        num_classes=_CLASSES,
    )
    clean = (images[rows], labels[rows])
    for name, (some, their) in {
        "train": train,
        "clean": clean,
        "test": test,
        "poisoned": poisoned,
    }.items():
        np.save(folder / f"images_{name}.npy", some)
        np.save(folder / f"labels_{name}.npy", np.asarray(their, np.int32))
    channel.ready(**facts)


def read_data(folder: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    path = pathlib.Path(folder)
    return tuple(
        np.load(path / f"{kind}_{name}.npy", allow_pickle=False)
        for kind in ("images", "labels")
    )


def read_net(path: pathlib.Path, arch: str) -> name_maps.Converted:
    return name_maps.convert(reader.read_checkpoint(path).arrays, arch)


def judge(channel: protocol.Channel, options: dict) -> None:
    """ACC and ASR of a checkpoint, whoever wrote it."""
    facts = start.facts()
    net = read_net(pathlib.Path(options["work"]) / options["file"], options["arch"])
    found = rates(
        base.Net(net.model, net.variables), *read_data(options["work"], "test")
    )
    channel.ready(**found, **facts)


def rates(net: base.Net, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """ACC and ASR of a net."""
    found = evaluation.evaluate(
        net.logits,
        net.variables,
        images,
        labels,
        trigger=trigger(),
        target_labels=TARGET,
    )
    return {"acc": found["acc"], "asr": found["asr"]}


def _pair(dataset: sources.Dataset) -> tuple[np.ndarray, np.ndarray]:
    return dataset.images, dataset.labels


def _made_up(count: int, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures, one per class, under noise: a small net can learn them."""
    coarse = np.random.default_rng(0).uniform(0, 255, (_CLASSES, 4, 4, 3))
    pictures = np.repeat(np.repeat(coarse, _SIZE // 4, 1), _SIZE // 4, 2)
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, _CLASSES, count)
    noise = generator.normal(0, 96, (count, _SIZE, _SIZE, 3))
    images = np.clip(pictures[labels] + noise, 0, 255).astype(np.uint8)
    return images, labels.astype(np.int32)
