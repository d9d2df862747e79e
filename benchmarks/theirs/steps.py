# SPDX-License-Identifier: Apache-2.0
"""Single steps and evaluation on pictures drawn at random, as on our side."""

import time

import numpy as np
import torch

from benchmarks import protocol
from benchmarks.theirs import nets, training


def facts() -> dict:
    return {
        "versions": {"torch": str(torch.__version__), "numpy": np.__version__},
        "threads": torch.get_num_threads(),
    }


def nad_step(channel: protocol.Channel, options: dict) -> None:
    """Augmentation, student forward and backward, teacher forward, update."""
    teacher = _net(options).eval().requires_grad_(False)
    _keep_time(channel, options, teacher=teacher, augmented=True)


def victim_step(channel: protocol.Channel, options: dict) -> None:
    """Forward, backward, update; no augmentation."""
    _keep_time(channel, options, teacher=None, augmented=False)


def evaluation(channel: protocol.Channel, options: dict) -> None:
    """Clean accuracy over all images."""
    net = _net(options).eval()
    images, labels = _pictures(options["images"])
    last = options.get("channels_last", False)

    @torch.inference_mode()
    def accuracy() -> float:
        right = 0
        for start in range(0, len(labels), options["batch"]):
            rows = slice(start, start + options["batch"])
            logits, _ = net(training.to_float(images[rows], channels_last=last))
            right += int((logits.argmax(1) == labels[rows]).sum())
        return right / len(labels)

    accuracy()
    channel.ready(**facts())
    while channel.next():
        started = time.perf_counter()
        accuracy()
        channel.done(time.perf_counter() - started)


def _keep_time(channel, options, *, teacher, augmented) -> None:
    student = _net(options).train()
    step = training.make_step(
        student,
        training.optimizer(student, 1e-4),
        teacher=teacher,
        compiled=options.get("compiled", False),
    )
    batch, last = options["batch"], options.get("channels_last", False)
    images, labels = _pictures(batch * options["steps"])

    def epoch() -> None:
        for rows in training.epoch_batches(len(images), batch):
            chosen = images[rows]
            if augmented:
                chosen = training.augment(chosen)
            step(training.to_float(chosen, channels_last=last), labels[rows])

    epoch()
    channel.ready(**facts())
    while channel.next():
        started = time.perf_counter()
        epoch()
        channel.done((time.perf_counter() - started) / options["steps"])


def _net(options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    net = nets.build(options["arch"])
    return net.to(
        memory_format=torch.channels_last
        if options.get("channels_last")
        else torch.contiguous_format
    )


def _pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    labels = generator.integers(0, 10, count)
    return torch.from_numpy(images), torch.from_numpy(labels)
