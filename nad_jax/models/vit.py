# SPDX-License-Identifier: Apache-2.0
"""A small vision transformer for images of 8 to 32 pixels.

Patches -> Dense "patch_embed" -> learned position embedding -> pre-norm blocks
(attention, then MLP, each added to its input) -> LayerNorm "norm" -> mean over the
tokens -> fc. Query, key, value and out are separate Dense layers, so that a layer-wise
method (pruning, EFRAP) meets the same two layer types as in the convolutional nets.

The tokens are averaged; there is no class token. Every token is then a place in the
image and all of them carry the decision, which is what a spatial attention map needs. A
class token is neither, and small ViTs classify as well without one (Beyer et al.).

Tokens keep their grid, `[B, h, w, C]` with h = H / patch, so a stage is simply the
output of a block (the residual stream) and needs no reshaping. "Attention" below means
the transformer's; NAD's attention map is a norm over the channels of a stage.

Names, ours <- those of timm's ViT. A converter has work to do beyond names: timm fuses
query, key and value, and embeds patches by a convolution whose kernel, reshaped to
`[patch * patch * C, dim]` in the order (row, column, channel), is our Dense kernel.

    patch_embed                          patch_embed.proj
    position_embedding                   pos_embed
    block[k]/norm1, norm2                blocks.[k-1].norm1, norm2
    block[k]/{query,key,value}, out      blocks.[k-1].attn.qkv, attn.proj
    block[k]/mlp_in, mlp_out             blocks.[k-1].mlp.fc1, mlp.fc2
    norm, fc                             norm, head

References:
  Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021.
  Beyer, Zhai, Kolesnikov: Better plain ViT baselines for ImageNet-1k, 2022.
"""

import functools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from nad_jax import errors
from nad_jax.models import common


class Block(nn.Module):
    """Pre-norm transformer block on tokens `[B, ..., dim]`, a grid or a sequence."""

    heads: int
    mlp_dim: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, *positions, dim = x.shape
        head_dim = dim // self.heads
        dense = functools.partial(common.dense, dtype=self.dtype)

        def split_heads(tokens: jax.Array) -> jax.Array:
            return tokens.reshape(batch, math.prod(positions), self.heads, head_dim)

        y = common.LayerNorm(name="norm1")(x)
        query = split_heads(dense(dim, name="query")(y))
        key = split_heads(dense(dim, name="key")(y))
        value = split_heads(dense(dim, name="value")(y))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(head_dim)
        # Softmax in float32: bfloat16 has too few digits for a sum over many tokens.
        weights = nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        x = x + dense(dim, name="out")(mixed.reshape(x.shape))

        y = common.LayerNorm(name="norm2")(x)
        y = nn.gelu(dense(self.mlp_dim, name="mlp_in")(y), approximate=False)
        return x + dense(dim, name="mlp_out")(y)


class VisionTransformer(nn.Module):
    """Vision transformer; stage k is block k's output, `[B, H/patch, W/patch, dim]`.

    Attributes:
      patch: side of a patch in pixels; H and W must be multiples of it.
      dim: channels of a token. The number used is the multiple of `heads` nearest to
        `dim * width`, at least `heads`.
      depth: number of blocks, hence of stages.
      heads: attention heads per block.
      mlp_ratio: hidden size of the MLP over `dim`.
    """

    patch: int
    dim: int
    depth: int
    heads: int
    num_classes: int
    mlp_ratio: int = 4
    width: float = 1.0
    dtype: DTypeLike = jnp.float32
    keep_features: bool = True

    @nn.compact
    def __call__(
        self, images: jax.Array, train: bool = False
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del train  # The same function either way: no BatchNorm, no dropout.
        common.check_images(images)
        dim = self.heads * max(1, round(self.dim * self.width / self.heads))
        x = common.dense(dim, dtype=self.dtype, name="patch_embed")(
            _patches(images, self.patch)
        )
        features = {}
        blocks = encode(
            self,
            x,
            depth=self.depth,
            heads=self.heads,
            mlp_dim=self.mlp_ratio * dim,
            dtype=self.dtype,
        )
        for stage, x in enumerate(blocks, start=1):
            if self.keep_features:
                features[f"stage{stage}"] = x
        x = common.LayerNorm(name="norm")(x)
        return common.pool_and_classify(x, self.num_classes), features


def encode(
    module: nn.Module,
    x: jax.Array,
    *,
    depth: int,
    heads: int,
    mlp_dim: int,
    dtype: DTypeLike,
) -> Iterator[jax.Array]:
    """Position embeddings and blocks of a transformer, made in `module`'s own call.

    Args:
      module: Whose parameters they are; it is in its compact `__call__`.
      x: Tokens `[B, ..., dim]`.
      depth: Number of blocks, at least 1.
      heads: As in `Block`.
      mlp_dim: As in `Block`.
      dtype: As in `Block`.

    Yields:
      The output of each block, of x's shape.
    """
    position = module.param(
        "position_embedding",
        nn.initializers.normal(common.POSITION_EMBEDDING_STD),
        (1, *x.shape[1:]),
    )
    x = x + position.astype(x.dtype)
    for i in range(1, depth + 1):
        x = Block(heads=heads, mlp_dim=mlp_dim, dtype=dtype, name=f"block{i}")(x)
        yield x


def _patches(images: jax.Array, patch: int) -> jax.Array:
    """`[B, H, W, C]` -> `[B, H/patch, W/patch, patch * patch * C]`."""
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise errors.InputError(
            f"image size {height} x {width} is not a multiple of the patch size {patch}"
        )
    rows, columns = height // patch, width // patch
    x = images.reshape(batch, rows, patch, columns, patch, channels)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows, columns, -1)


def vit_tiny(
    *,
    patch: int = 4,
    dim: int = 96,
    depth: int = 4,
    heads: int = 3,
    bn_axis_name: str | None = None,
    **options,
) -> VisionTransformer:
    """A ViT that costs about as much as WRN-16-1 at 32 x 32 pixels.

    `options` are the other fields of `VisionTransformer`. `bn_axis_name` is accepted
    because every model is built with it, and has no effect.
    """
    del bn_axis_name
    return VisionTransformer(patch=patch, dim=dim, depth=depth, heads=heads, **options)
