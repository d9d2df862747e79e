# SPDX-License-Identifier: Apache-2.0
"""Residual networks, post-activation, in three families.

- ResNet-8, -14, -20, -32: three stages of 1, 2, 3, 5 basic blocks with 16, 32, 64
  channels, the CIFAR nets of He et al. and of NAD's code (whose "ResNet34" builds
  ResNet-32).
- ResNet-18, -34: four stages of (2, 2, 2, 2) or (3, 4, 6, 3) blocks with 64, 128, 256,
  512 channels after a 3x3 stem of stride 1 without max-pooling, the layout of
  kuangliu's CIFAR collection, which EFRAP's code uses.
- ImageNet-ResNet-18, -34, -50: the layout of torchvision, for larger images. The stem
  is 7x7 with stride 2, then a 3x3 max-pool with stride 2; the stages of -18 and -34 are
  those above, -50 has (3, 4, 6, 3) bottleneck blocks with 4 times the channels behind
  them and the stride in their 3x3 convolution ("v1.5"; the paper has it in the first).

Stages after the first start with stride 2. Where the shape changes the shortcut is a
1x1 convolution with BatchNorm ("option B"; the original CIFAR paper used zero padding).
A stage is what leaves its last block, after the ReLU. Images may have any size.

Names, ours <- PyTorch's (`[n]` counts from 0):

    conv1, bn1                           conv1, bn1
    layer2_[n]/{conv1,bn1,conv2,bn2}     layer2.[n].{conv1,bn1,conv2,bn2}
    layer2_[n]/{conv3,bn3}               layer2.[n].{conv3,bn3}   (bottleneck)
    layer2_0/shortcut                    layer2.0.shortcut.0
    layer2_0/shortcut_bn                 layer2.0.shortcut.1
    fc                                   linear

NAD and torchvision say downsample.0, downsample.1 and fc instead of the last three.

References:
  He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from nad_jax import errors
from nad_jax.models import common

# depth -> (blocks per stage, channels per stage)
_WIDE_STAGES = (64, 128, 256, 512)
_LAYOUTS = {
    8: ((1, 1, 1), (16, 32, 64)),
    14: ((2, 2, 2), (16, 32, 64)),
    20: ((3, 3, 3), (16, 32, 64)),
    32: ((5, 5, 5), (16, 32, 64)),
    18: ((2, 2, 2, 2), _WIDE_STAGES),
    34: ((3, 4, 6, 3), _WIDE_STAGES),
}
# depth -> (blocks per stage, whether they are bottlenecks)
_IMAGENET_LAYOUTS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
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
        return _add_shortcut(x, y, stride=self.stride, norm=norm, dtype=self.dtype)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last with 4 times `channels`, and shortcut."""

    channels: int
    stride: int
    dtype: DTypeLike = jnp.float32
    bn_axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(common.conv, dtype=self.dtype)
        norm = functools.partial(
            common.batch_norm, train=train, axis_name=self.bn_axis_name
        )
        y = conv(self.channels, 1, name="conv1")(x)
        y = nn.relu(norm(name="bn1")(y))
        y = conv(self.channels, 3, self.stride, name="conv2")(y)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(4 * self.channels, 1, name="conv3")(y)
        y = norm(name="bn3")(y)
        return _add_shortcut(x, y, stride=self.stride, norm=norm, dtype=self.dtype)


def _add_shortcut(
    x: jax.Array,
    y: jax.Array,
    *,
    stride: int,
    norm: Callable[..., nn.Module],
    dtype: DTypeLike,
) -> jax.Array:
    """The end of a block: what entered it (`x`) plus its branch (`y`), then ReLU."""
    channels = y.shape[-1]
    if x.shape[-1] != channels or stride != 1:
        x = common.conv(channels, 1, stride, dtype=dtype, name="shortcut")(x)
        x = norm(name="shortcut_bn")(x)
    return nn.relu(x + y)


class ResNet(nn.Module):
    """Post-activation ResNet; stage k is the output of layer k.

    Attributes:
      stage_sizes: blocks of each stage.
      stage_channels: channels of each stage; of bottlenecks, of their 3x3 convolution.
      bottleneck: the kind of block.
      imagenet_stem: 7x7 with stride 2 and a max-pool instead of 3x3 with stride 1.
    """

    stage_sizes: tuple[int, ...]
    stage_channels: tuple[int, ...]
    num_classes: int
    bottleneck: bool = False
    imagenet_stem: bool = False
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    bn_axis_name: str | None = None
    keep_features: bool = True

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        common.check_images(images)
        channels = [common.scaled(c, self.width) for c in self.stage_channels]
        size, stride = (7, 2) if self.imagenet_stem else (3, 1)
        x = common.conv(channels[0], size, stride, dtype=self.dtype, name="conv1")(
            images
        )
        x = common.batch_norm(train=train, axis_name=self.bn_axis_name, name="bn1")(x)
        x = nn.relu(x)
        if self.imagenet_stem:
            # The largest of 3x3 with stride 2, padded with -inf, as PyTorch does.
            window, strides = (1, 3, 3, 1), (1, 2, 2, 1)
            pads = ((0, 0), (1, 1), (1, 1), (0, 0))
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, strides, pads)

        block_type = Bottleneck if self.bottleneck else Block
        features = {}
        for stage, num_blocks in enumerate(self.stage_sizes, start=1):
            for block in range(num_blocks):
                x = block_type(
                    channels=channels[stage - 1],
                    stride=2 if stage > 1 and block == 0 else 1,
                    dtype=self.dtype,
                    bn_axis_name=self.bn_axis_name,
                    name=f"layer{stage}_{block}",
                )(x, train=train)
            if self.keep_features:
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


def imagenet_resnet(depth: int, **options) -> ResNet:
    """torchvision's ResNet-`depth`; `options` are the other fields of `ResNet`.

    Raises:
      InputError: a depth other than 18, 34 and 50.
    """
    if depth not in _IMAGENET_LAYOUTS:
        raise errors.InputError(
            "ImageNet-ResNet depth must be one of "
            f"{', '.join(map(str, _IMAGENET_LAYOUTS))}, got {depth}"
        )
    stage_sizes, bottleneck = _IMAGENET_LAYOUTS[depth]
    return ResNet(
        stage_sizes=stage_sizes,
        stage_channels=_WIDE_STAGES,
        bottleneck=bottleneck,
        imagenet_stem=True,
        **options,
    )
