# SPDX-License-Identifier: Apache-2.0
"""Pre-activation ResNet-18 for small images, the usual net of BackdoorBench's tables.

A 3x3 stem of 64 channels with no BatchNorm after it, four stages of two pre-activation
blocks with 64, 128, 256, 512 channels (stages 2-4 start with stride 2), global mean,
fc. Where the shape changes, a bare 1x1 convolution of relu(bn1(x)) is the shortcut.

What is known about the head: kuangliu's CIFAR collection, the WaNet code and
BackdoorBench, which took it from there, all pool the raw sum of the last block, without
the final BatchNorm and ReLU of He et al., and so do we; this was read in all three.
What is not known: whether weights published by BackdoorBench give the same logits here.
That has not been run; they also expect normalised images, where we see [0, 1].

A stage is the raw sum that leaves its last block. BackdoorBench's own NAD takes the map
after pooling as its last one, which makes that term constant; ours keeps its h x w.

The block computes what the one in `wide_resnet` does. It is repeated because each
architecture should be readable in one file.

Names, ours <- PyTorch's (`[n]` counts from 0):

    conv1                                conv1
    layer2_[n]/{bn1,conv1,bn2,conv2}     layer2.[n].{bn1,conv1,bn2,conv2}
    layer2_0/shortcut                    layer2.0.shortcut.0
    fc                                   linear

References:
  He, Zhang, Ren, Sun: Identity Mappings in Deep Residual Networks, ECCV 2016.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from nad_jax import errors
from nad_jax.models import common

# depth -> blocks per stage
_STAGE_SIZES = {18: (2, 2, 2, 2)}


class Block(nn.Module):
    """Pre-activation basic block: two 3x3 convolutions and a shortcut."""

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
        activated = nn.relu(norm(name="bn1")(x))
        if x.shape[-1] != self.channels or self.stride != 1:
            shortcut = conv(1, self.stride, name="shortcut")(activated)
        else:
            shortcut = x
        y = conv(3, self.stride, name="conv1")(activated)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(3, name="conv2")(y)
        return shortcut + y


class PreActResNet(nn.Module):
    """Pre-activation ResNet; stage k is the output of layer k."""

    stage_sizes: tuple[int, ...]
    num_classes: int
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    bn_axis_name: str | None = None
    keep_features: bool = True

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        common.check_images(images)
        x = common.conv(
            common.scaled(64, self.width), 3, dtype=self.dtype, name="conv1"
        )(images)

        features = {}
        for stage, num_blocks in enumerate(self.stage_sizes, start=1):
            for block in range(num_blocks):
                x = Block(
                    channels=common.scaled(64 * 2 ** (stage - 1), self.width),
                    stride=2 if stage > 1 and block == 0 else 1,
                    dtype=self.dtype,
                    bn_axis_name=self.bn_axis_name,
                    name=f"layer{stage}_{block}",
                )(x, train=train)
            if self.keep_features:
                features[f"stage{stage}"] = x

        return common.pool_and_classify(x, self.num_classes), features


def preact_resnet(depth: int, **options) -> PreActResNet:
    """PreAct-ResNet-`depth`; `options` are the other fields of `PreActResNet`.

    Raises:
      InputError: a depth other than 18.
    """
    if depth not in _STAGE_SIZES:
        raise errors.InputError(
            f"PreAct-ResNet depth must be one of "
            f"{', '.join(map(str, _STAGE_SIZES))}, got {depth}"
        )
    return PreActResNet(stage_sizes=_STAGE_SIZES[depth], **options)
