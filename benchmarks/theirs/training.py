# SPDX-License-Identifier: Apache-2.0
"""NAD's recipe: optimiser, augmentation, the two losses, one step."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import nn
from torch.nn import functional

BETAS = (500.0, 1000.0, 1000.0)
Step = Callable[[torch.Tensor, torch.Tensor], None]


def to_float(images: np.ndarray | torch.Tensor, *, channels_last: bool) -> torch.Tensor:
    """float32 `[B, C, H, W]` in [0, 1] from uint8 `[B, H, W, C]`."""
    images = torch.as_tensor(images).permute(0, 3, 1, 2)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(torch.float32, memory_format=layout).div_(255)


def augment(images: torch.Tensor, *, pad: int = 4, hole: int = 2) -> torch.Tensor:
    """Crop, flip and cutout of every image, uint8 `[B, H, W, C]`, in one gather.

    The reference does this image by image in worker processes; that is not charged.
    """
    batch, height, width, _ = images.shape
    rows = torch.arange(height) + torch.randint(-pad, pad + 1, (batch, 1))
    columns = torch.arange(width) + torch.randint(-pad, pad + 1, (batch, 1))
    columns = torch.where(torch.rand(batch, 1) < 0.5, columns.flip(1), columns)
    visible = ((rows >= 0) & (rows < height))[:, :, None]
    visible = visible & ((columns >= 0) & (columns < width))[:, None, :]
    if hole:
        top = torch.randint(0, height, (batch, 1)) - hole // 2
        left = torch.randint(0, width, (batch, 1)) - hole // 2
        row, column = torch.arange(height), torch.arange(width)
        cut_rows = (row >= top) & (row < top + hole)
        cut_columns = (column >= left) & (column < left + hole)
        visible = visible & ~(cut_rows[:, :, None] & cut_columns[:, None, :])
    picked = images[
        torch.arange(batch)[:, None, None],
        rows.clamp(0, height - 1)[:, :, None],
        columns.clamp(0, width - 1)[:, None, :],
    ]
    return picked * visible[..., None]


def attention_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean square of the difference of two normalised maps, over batch and positions.

    The sum over channels of squares, divided by its norm plus 1e-6.
    """
    maps = []
    for features in (student, teacher):
        strength = features.abs().pow(2).sum(1)
        norm = torch.linalg.vector_norm(strength, dim=(1, 2), keepdim=True)
        maps.append(strength / (norm + 1e-6))
    return (maps[0] - maps[1]).pow(2).mean()


def nad_loss(student: list[torch.Tensor], teacher: list[torch.Tensor]) -> torch.Tensor:
    """The attention term with the betas of the reference."""
    terms = [
        beta * attention_distance(one, other)
        for beta, one, other in zip(BETAS, student, teacher, strict=True)
    ]
    return sum(terms[1:], terms[0])


def optimizer(net: nn.Module, rate: float) -> torch.optim.SGD:
    return torch.optim.SGD(
        net.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4, nesterov=True
    )


def make_step(
    student: nn.Module,
    update: torch.optim.Optimizer,
    *,
    teacher: nn.Module | None = None,
    compiled: bool = False,
) -> Step:
    """A step on float images; with a teacher, of NAD, otherwise of fine-tuning."""

    def loss_of(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits, features = student(images)
        loss = functional.cross_entropy(logits, labels)
        if teacher is None:
            return loss
        with torch.no_grad():
            _, targets = teacher(images)
        return loss + nad_loss(features, targets)

    if compiled:
        loss_of = torch.compile(loss_of)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        update.zero_grad(set_to_none=True)
        loss_of(images, labels).backward()
        update.step()

    return step


def epoch_batches(count: int, batch: int) -> Iterator[torch.Tensor]:
    """Shuffled indices; the last batch may be smaller, as in the reference."""
    return iter(torch.randperm(count).split(batch))


def rate_of(epoch: int) -> float:
    """The reference's schedule for its 20 epochs."""
    return 0.1 if epoch < 2 else 0.01


def tune(
    net: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    teacher: nn.Module | None = None,
    channels_last: bool = False,
    batch: int = 64,
) -> None:
    """Fine-tunes, or distils where there is a teacher; no tests in between."""
    net.train()
    update = optimizer(net, rate_of(0))
    step = make_step(net, update, teacher=teacher)
    for epoch in range(epochs):
        for group in update.param_groups:
            group["lr"] = rate_of(epoch)
        for rows in epoch_batches(len(images), batch):
            prepared = to_float(augment(images[rows]), channels_last=channels_last)
            step(prepared, labels[rows])
