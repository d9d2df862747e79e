# SPDX-License-Identifier: Apache-2.0
"""A victim for both sides, and NAD's reference recipe from file to file."""

import copy
import pathlib

import numpy as np
import torch

from benchmarks import protocol
from benchmarks.theirs import nets, steps, training

VICTIM = "victim"
TEACHER_EPOCHS, EPOCHS = 10, 20


def victim(channel: protocol.Channel, options: dict) -> None:
    """Writes the victim: that of `checkpoint`, or one trained on poisoned images."""
    folder = pathlib.Path(options["work"])
    torch.manual_seed(0)
    net = nets.build(options["arch"]).to(memory_format=torch.channels_last)
    if "checkpoint" in options:
        net.load_state_dict(read(pathlib.Path(options["checkpoint"])))
    else:
        images, labels = read_data(folder, "poisoned")
        net.train()
        # The reference's rate for victims, without augmentation.
        step = training.make_step(net, training.optimizer(net, 0.1))
        done = 0
        while done < options["steps"]:
            for rows in training.epoch_batches(len(images), 64):
                step(training.to_float(images[rows], channels_last=True), labels[rows])
                done += 1
                if done == options["steps"]:
                    break
    torch.save(net.state_dict(), folder / VICTIM)
    channel.ready(**steps.facts())


def erase(channel: protocol.Channel, options: dict) -> None:
    """A teacher of 10 epochs of fine-tuning, then 20 epochs of distillation."""
    folder = pathlib.Path(options["work"])
    last = options.get("channels_last", False)
    torch.manual_seed(0)
    student = nets.build("wrn_16_1")
    student.load_state_dict(read(folder / VICTIM))
    layout = torch.channels_last if last else torch.contiguous_format
    student = student.to(memory_format=layout)
    images, labels = read_data(folder, "clean")
    teacher = copy.deepcopy(student)
    teacher_epochs = options.get("teacher_epochs", TEACHER_EPOCHS)
    epochs = options.get("epochs", EPOCHS)
    training.tune(
        teacher,
        images,
        labels,
        epochs=teacher_epochs,
        channels_last=last,
    )
    training.tune(
        student,
        images,
        labels,
        epochs=epochs,
        teacher=teacher.eval().requires_grad_(False),
        channels_last=last,
    )
    file = f"theirs_repaired_{'channels_last' if last else 'shipped'}"
    state = {name: value.contiguous() for name, value in student.state_dict().items()}
    torch.save(state, folder / file)
    channel.ready(
        file=file, epochs=epochs, teacher_epochs=teacher_epochs, **steps.facts()
    )


def read(path: pathlib.Path) -> dict:
    """A state dict, without executing what the file says."""
    stored = torch.load(path, map_location="cpu", weights_only=True)
    return stored.get("state_dict", stored)


def read_data(folder: pathlib.Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = (
        np.load(folder / f"{kind}_{name}.npy", allow_pickle=False)
        for kind in ("images", "labels")
    )
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))
