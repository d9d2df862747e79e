# SPDX-License-Identifier: Apache-2.0
"""Residual networks for small images, post-activation, in two families.

- ResNet-8, -14, -20, -32: three stages of 1, 2, 3, 5 basic blocks with 16, 32, 64
  channels, the CIFAR nets of He et al. and of NAD's code (whose "ResNet34" builds
  ResNet-32).
- ResNet-18, -34: four stages of (2, 2, 2, 2) or (3, 4, 6, 3) blocks with 64, 128, 256,
  512 channels after a 3x3 stem of stride 1 without max-pooling, the layout of
  kuangliu's CIFAR collection, which EFRAP's code uses. Not torchvision's, whose stem is
  7x7 with stride 2.

Stages after the first start with stride 2. Where the shape changes the shortcut is a
1x1 convolution with BatchNorm ("option B"; the original CIFAR paper used zero padding).
A stage is what leaves its last block, after the ReLU.

Names, ours <- PyTorch's (`[n]` counts from 0):

    conv1, bn1                           conv1, bn1
    layer2_[n]/{conv1,bn1,conv2,bn2}     layer2.[n].{conv1,bn1,conv2,bn2}
    layer2_0/shortcut                    layer2.0.shortcut.0   (NAD: downsample.0)
    layer2_0/shortcut_bn                 layer2.0.shortcut.1   (NAD: downsample.1)
    fc                                   linear                (NAD: fc)

References:
  He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from nad_jax import errors
from nad_jax.models import common

# depth -> (blocks per stage, channels per stage)
_LAYOUTS = {
    8: ((1, 1, 1), (16, 32, 64)),
    14: ((2, 2, 2), (16, 32, 64)),
    20: ((3, 3, 3), (16, 32, 64)),
    32: ((5, 5, 5), (16, 32, 64)),
    18: ((2, 2, 2, 2), (64, 128, 256, 512)),
    34: ((3, 4, 6, 3), (64, 128, 256, 512)),
}


class Block(nn.Module):
    """Basic block: conv-bn-relu-conv-bn, plus the shortcut, then ReLU."""

    channels: int
    stride: int
    dtype: DTypeLike = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(common.conv, self.channels, dtype=self.dtype)
        norm = functools.partial(
            common.batch_norm, train=train, axis_name=self.bn_axis_name
        )
        y = conv(3, self.stride, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(3, name="conv2")(y)
        y = norm(name="bn2")(y)
        if x.shape[-1] != self.channels or self.stride != 1:
            x = conv(1, self.stride, name="shortcut")(x)
            x = norm(name="shortcut_bn")(x)
        return nn.relu(x + y)


class ResNet(nn.Module):
    """Post-activation ResNet; stage k is the output of layer k."""

    stage_sizes: tuple[int, ...]
    stage_channels: tuple[int, ...]
    num_classes: int
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        common.check_images(images)
        channels = [common.scaled(c, self.width) for c in self.stage_channels]
        x = common.conv(channels[0], 3, dtype=self.dtype, name="conv1")(images)
        x = common.batch_norm(train=train, axis_name=self.bn_axis_name, name="bn1")(x)
        x = nn.relu(x)

        features = {}
        for stage, num_blocks in enumerate(self.stage_sizes, start=1):
            for block in range(num_blocks):
                x = Block(
                    channels=channels[stage - 1],
                    stride=2 if stage > 1 and block == 0 else 1,
                    dtype=self.dtype,
                    bn_axis_name=self.bn_axis_name,
                    name=f"layer{stage}_{block}",
                )(x, train=train)
            features[f"stage{stage}"] = x

        return common.pool_and_classify(x, self.num_classes), features


def resnet(depth: int, **options) -> ResNet:
    """ResNet-`depth` of the table above; `options` are the other fields of `ResNet`.

    Raises:
      InputError: a depth that is not in the table.
    """
    if depth not in _LAYOUTS:
        raise errors.InputError(
            f"ResNet depth must be one of {', '.join(map(str, _LAYOUTS))}, got {depth}"
        )
    stage_sizes, stage_channels = _LAYOUTS[depth]
    return ResNet(stage_sizes=stage_sizes, stage_channels=stage_channels, **options)
