# SPDX-License-Identifier: Apache-2.0
"""The networks of both references, with the names of their checkpoints."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

# (name, convolution or linear, batch norm or None, whether ReLU follows, x) -> output
Unit = Callable[[str, nn.Module, nn.Module | None, bool, torch.Tensor], torch.Tensor]


def _conv(cin: int, cout: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, size, stride, padding=size // 2, bias=False)


class _WideBlock(nn.Module):
    """Pre-activation; a changed shape takes the activated input to the shortcut."""

    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(cin)
        self.conv1 = _conv(cin, cout, 3, stride)
        self.bn2 = nn.BatchNorm2d(cout)
        self.conv2 = _conv(cout, cout, 3)
        self.convShortcut = None if cin == cout else _conv(cin, cout, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        activated = functional.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(activated)
        y = functional.relu(self.bn2(self.conv1(activated)))
        return shortcut + self.conv2(y)


class _WideGroup(nn.Module):
    def __init__(self, count: int, cin: int, cout: int, stride: int):
        super().__init__()
        self.layer = nn.Sequential(
            *(
                _WideBlock(cin if not n else cout, cout, stride if not n else 1)
                for n in range(count)
            )
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """WRN-16-1: logits and the outputs of the three groups."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.conv1 = _conv(3, 16, 3)
        self.block1 = _WideGroup(2, 16, 16, 1)
        self.block2 = _WideGroup(2, 16, 32, 2)
        self.block3 = _WideGroup(2, 32, 64, 2)
        self.bn1 = nn.BatchNorm2d(64)
        self.fc = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = []
        x = self.conv1(x)
        for group in (self.block1, self.block2, self.block3):
            x = group(x)
            features.append(x)
        x = functional.relu(self.bn1(x)).mean((2, 3))
        return self.fc(x), features


def plain(name, layer, norm, relu, x):
    """A unit as it was trained."""
    x = layer(x)
    if norm is not None:
        x = norm(x)
    return functional.relu(x) if relu else x


class _BasicBlock(nn.Module):
    def __init__(self, cin: int, cout: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(cin, cout, 3, stride), nn.BatchNorm2d(cout)
        self.conv2, self.bn2 = _conv(cout, cout, 3), nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if cin != cout or stride != 1:
            self.shortcut = nn.Sequential(
                _conv(cin, cout, 1, stride), nn.BatchNorm2d(cout)
            )

    def forward(self, x: torch.Tensor, unit: Unit, name: str) -> torch.Tensor:
        y = unit(f"{name}.conv1", self.conv1, self.bn1, True, x)
        y = unit(f"{name}.conv2", self.conv2, self.bn2, False, y)
        if len(self.shortcut):
            conv, norm = self.shortcut
            x = unit(f"{name}.shortcut.0", conv, norm, False, x)
        return functional.relu(x + y)


class ResNet(nn.Module):
    """Post-activation ResNet, as a sequence of units that a defence can replace."""

    def __init__(self, channels: tuple[int, ...], classes: int = 10):
        super().__init__()
        self.conv1, self.bn1 = _conv(3, channels[0], 3), nn.BatchNorm2d(channels[0])
        cin = channels[0]
        for number, cout in enumerate(channels, start=1):
            first = _BasicBlock(cin, cout, 1 if number == 1 else 2)
            layer = nn.Sequential(first, _BasicBlock(cout, cout, 1))
            self.add_module(f"layer{number}", layer)
            cin = cout
        self._stages = len(channels)
        self.linear = nn.Linear(cin, classes)

    def forward(
        self, x: torch.Tensor, unit: Unit = plain
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        features = []
        x = unit("conv1", self.conv1, self.bn1, True, x)
        for number in range(1, self._stages + 1):
            for index, block in enumerate(getattr(self, f"layer{number}")):
                x = block(x, unit, f"layer{number}.{index}")
            features.append(x)
        return unit("linear", self.linear, None, False, x.mean((2, 3))), features


def build(arch: str) -> nn.Module:
    """The network of that name, freshly initialised as the references do it."""
    if arch == "wrn_16_1":
        net = WideResNet()
    else:
        widths = {"resnet_14": (16, 32, 64), "resnet_18": (64, 128, 256, 512)}
        net = ResNet(widths[arch])
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net
