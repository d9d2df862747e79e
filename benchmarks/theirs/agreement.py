# SPDX-License-Identifier: Apache-2.0
"""What PyTorch's side computes for given weights: the other half of a test."""

import pathlib

import numpy as np
import torch

from benchmarks import protocol
from benchmarks.theirs import nets, steps, training


def run(channel: protocol.Channel, options: dict) -> None:
    """Writes victim checkpoints and, for "images.npy", logits and NAD's loss.

    The student is in evaluation mode here, so that both nets are plain functions.
    """
    folder = pathlib.Path(options["work"])
    torch.manual_seed(0)
    student, teacher = nets.build("wrn_16_1"), nets.build("wrn_16_1")
    for net in (student, teacher):
        for module in net.modules():
            # Fresh statistics are 0 and 1 and would hide a wrong one.
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        net.eval()
    torch.save(student.state_dict(), folder / "student")
    torch.save(teacher.state_dict(), folder / "teacher")
    images = np.load(folder / "images.npy", allow_pickle=False)
    prepared = training.to_float(images, channels_last=False)
    logits, features = student(prepared)
    loss = training.nad_loss(features, teacher(prepared)[1])
    loss.backward()
    gradient = student.conv1.weight.grad
    np.save(folder / "logits.npy", logits.detach().numpy())
    np.save(folder / "gradient.npy", gradient.numpy())
    channel.ready(loss=loss.item(), **steps.facts())
