# SPDX-License-Identifier: Apache-2.0
"""EFRAP's reference loop: 10,000 Adam steps on the rounding of every layer.

Weights on an affine grid per output channel whose range has the least squared error of
80 shrunken ones; 4 bits, 8 in the first and last layer; BatchNorm not folded. Layer by
layer, inputs come from the model whose earlier layers are rounded, targets from the
float model behind BatchNorm and ReLU. Activations stay float, as in the rows of the
authors' log, and as our side does it here.

Not charged to the reference: each layer's two passes stop at that layer, and constants
of the loss are computed once.
"""

import pathlib
import time
from collections.abc import Callable

import torch
from torch import nn

from benchmarks import protocol
from benchmarks.theirs import nets, steps, training, whole

STEPS = 10_000
_BATCH = 32
_SHRINKS = 80
_PENALTY = 0.01


class _Reached(Exception):
    """The pass has come to the layer it was for."""


def efrap(channel: protocol.Channel, options: dict) -> None:
    """Rounds the victim; takes `measured_steps` of each layer's steps."""
    folder = pathlib.Path(options["work"])
    last = options.get("channels_last", False)
    torch.manual_seed(0)
    net = nets.build(options["arch"])
    net.load_state_dict(whole.read(folder / whole.VICTIM))
    layout = torch.channels_last if last else torch.contiguous_format
    net = net.to(memory_format=layout).eval().requires_grad_(False)
    images, _ = whole.read_data(folder, "clean")
    chosen = images[torch.randperm(len(images))[: options["images"]]]
    chosen = training.augment(chosen, hole=0)
    batches = [
        training.to_float(some, channels_last=last) for some in chosen.split(_BATCH)
    ]
    names: list[str] = []
    net(batches[0], lambda name, *rest: names.append(name) or nets.plain(name, *rest))

    rounded: dict[str, torch.Tensor] = {}
    layers, extra = [], 0.0
    for name in names:
        bits = 8 if name in (names[0], names[-1]) else 4
        inputs, targets, parts = _inputs_and_targets(net, batches, name, rounded)
        taken = min(options["measured_steps"], STEPS)
        rounded[name], seconds = _reconstruct(inputs, targets, parts, bits, taken)
        rest = seconds / taken * (STEPS - taken)
        extra += rest
        layers.append(
            {
                "name": name,
                "measured_steps": taken,
                "measured_seconds": seconds,
                "extrapolated_seconds": rest,
            }
        )
    state = net.state_dict()
    state |= {f"{name}.weight": weight for name, weight in rounded.items()}
    file = f"theirs_rounded_{'channels_last' if last else 'shipped'}"
    torch.save({k: v.contiguous() for k, v in state.items()}, folder / file)
    # Weights after a few of the steps are nobody's result.
    more = {"extra_seconds": extra} if extra else {"file": file}
    channel.ready(layers=layers, **more, **steps.facts())


def _inputs_and_targets(net, batches, wanted: str, rounded):
    """Of one layer, for every batch: rounded model's inputs, float model's outputs."""
    inputs, targets, parts = [], [], []

    def until(take: Callable, weights):
        def unit(name, layer, norm, relu, x):
            if name == wanted:
                take(name, layer, norm, relu, x)
                raise _Reached
            return _apply(layer, norm, relu, x, weights.get(name, layer.weight))

        return unit

    def take_input(name, layer, norm, relu, x):
        inputs.append(x)
        parts[:] = [layer, norm, relu]

    def take_target(*unit):
        targets.append(nets.plain(*unit))

    for batch in batches:
        for take, weights in ((take_input, rounded), (take_target, {})):
            try:
                net(batch, until(take, weights))
            except _Reached:
                pass
    return inputs, targets, parts


def _apply(layer, norm, relu, x, weight) -> torch.Tensor:
    """A unit with another weight."""
    if isinstance(layer, nn.Conv2d):
        x = nn.functional.conv2d(x, weight, None, layer.stride, layer.padding)
    else:
        x = nn.functional.linear(x, weight, layer.bias)
    if norm is not None:
        x = norm(x)
    return nn.functional.relu(x) if relu else x


def _reconstruct(inputs, targets, parts, bits: int, count: int):
    """The rounded weight after `count` Adam steps, and the seconds these took."""
    layer, norm, relu = parts
    weight = layer.weight.detach()
    scale, zero, top = grid(weight, bits)
    lower = torch.floor(weight / scale)
    share = weight / scale - lower

    def on_grid(up: torch.Tensor) -> torch.Tensor:
        return scale * ((lower + up + zero).clamp(0, top) - zero)

    nearest = torch.round(share)
    error = (weight - on_grid(nearest)).abs()
    flipped = 1 - nearest
    logits = nn.Parameter(-torch.log(1 / share - 1))
    adam = torch.optim.Adam([logits], lr=1e-3)
    order = torch.randint(len(inputs), (count,)).tolist()

    def loss_of(index: int) -> torch.Tensor:
        soft = torch.sigmoid(logits)
        output = _apply(layer, norm, relu, inputs[index], on_grid(soft))
        preserved = (output - targets[index]).pow(2).sum(1).mean()
        cross = flipped * torch.log(soft + 1e-8)
        cross = cross + (1 - flipped) * torch.log(1 - soft + 1e-8)
        penalty = (1 - (2 * soft - 1).pow(2)).sum()
        return preserved - (error * cross).sum() + _PENALTY * penalty

    # Not timed, or what a first step sets up would be extrapolated with the rest.
    loss_of(order[0]).backward()
    started = time.perf_counter()
    for index in order:
        adam.zero_grad(set_to_none=True)
        loss_of(index).backward()
        adam.step()
    seconds = time.perf_counter() - started
    return on_grid((logits.detach() >= 0).to(weight.dtype)), seconds


def grid(weight: torch.Tensor, bits: int):
    """(scale, zero point, largest code) per output channel, of least squared error."""
    top = 2**bits - 1
    rows = weight.flatten(1)
    low = rows.amin(1, keepdim=True).clamp(max=0)
    high = rows.amax(1, keepdim=True).clamp(min=0)
    least = torch.full_like(low, torch.inf)
    scale, zero = torch.ones_like(low), torch.zeros_like(low)
    for index in range(_SHRINKS):
        factor = 1 - 0.01 * index
        a_scale = ((high - low) * factor / top).clamp(min=1e-8)
        a_zero = torch.round(-low * factor / a_scale)
        codes = (torch.round(rows / a_scale) + a_zero).clamp(0, top)
        loss = (rows - (codes - a_zero) * a_scale).pow(2).sum(1, keepdim=True)
        better = loss < least
        least = torch.where(better, loss, least)
        scale, zero = (
            torch.where(better, a_scale, scale),
            torch.where(better, a_zero, zero),
        )
    shape = (-1, *[1] * (weight.dim() - 1))
    return scale.reshape(shape), zero.reshape(shape), top
