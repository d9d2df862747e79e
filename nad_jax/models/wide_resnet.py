# SPDX-License-Identifier: Apache-2.0
"""Wide residual networks WRN-D-K, as in NAD's code and released checkpoints.

D = 6 n + 4 layers: a 3x3 stem of 16 channels, three groups of n pre-activation blocks
with 16 K, 32 K and 64 K channels (groups 2 and 3 start with stride 2), BatchNorm, ReLU,
global mean, fc. There is no dropout.

A stage is the raw sum that leaves a group, before the next BatchNorm and ReLU: that is
where NAD reads its attention maps.

Names, ours <- PyTorch's (`[n]` counts from 0):

    conv1, bn1, fc                       conv1, bn1, fc
    block2_layer[n]/{bn1,conv1,...}      block2.layer.[n].{bn1,conv1,bn2,conv2}
    block2_layer0/shortcut               block2.layer.0.convShortcut

References:
  Zagoruyko, Komodakis: Wide Residual Networks, BMVC 2016.
  Li, Lyu, Koren, Lyu, Li, Ma: Neural Attention Distillation, ICLR 2021.
"""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from nad_jax import errors
from nad_jax.models import common


class Block(nn.Module):
    """Pre-activation basic block: two 3x3 convolutions and a shortcut.

    Where the shape changes, relu(bn1(x)) feeds the 1x1 shortcut as well as the
    convolutions; otherwise the shortcut is the raw x.
    """

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
        # The original asks for the channels only. At extreme `width` rounding can make
        # them equal across a stride, where an identity would not fit.
        if x.shape[-1] != self.channels or self.stride != 1:
            shortcut = conv(1, self.stride, name="shortcut")(activated)
        else:
            shortcut = x
        y = conv(3, self.stride, name="conv1")(activated)
        y = nn.relu(norm(name="bn2")(y))
        y = conv(3, name="conv2")(y)
        return shortcut + y


class WideResNet(nn.Module):
    """WRN-`depth`-`widen_factor`; stages 1-3 are the outputs of block1-block3."""

    depth: int
    widen_factor: int
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
            common.scaled(16, self.width), 3, dtype=self.dtype, name="conv1"
        )(images)

        features = {}
        for group in (1, 2, 3):
            channels = 16 * 2 ** (group - 1) * self.widen_factor
            for layer in range((self.depth - 4) // 6):
                x = Block(
                    channels=common.scaled(channels, self.width),
                    stride=2 if group > 1 and layer == 0 else 1,
                    dtype=self.dtype,
                    bn_axis_name=self.bn_axis_name,
                    name=f"block{group}_layer{layer}",
                )(x, train=train)
            if self.keep_features:
                features[f"stage{group}"] = x

        x = common.batch_norm(train=train, axis_name=self.bn_axis_name, name="bn1")(x)
        return common.pool_and_classify(nn.relu(x), self.num_classes), features


def wrn(depth: int, widen_factor: int, **options) -> WideResNet:
    """WRN-`depth`-`widen_factor`; `options` are the other fields of `WideResNet`.

    Raises:
      InputError: unless depth is 6 n + 4 with n >= 1.
    """
    if depth < 10 or (depth - 4) % 6:
        raise errors.InputError(
            f"a WRN has depth 6 n + 4 (10, 16, 22, 28, 34, 40, ...), got {depth}"
        )
    return WideResNet(depth=depth, widen_factor=widen_factor, **options)
