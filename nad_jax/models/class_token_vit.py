# SPDX-License-Identifier: Apache-2.0
"""ViT-B/16 in torchvision's layout: a class token carries the decision.

Patches -> convolution "patch_embed" -> class token put in front -> learned position
embedding -> pre-norm blocks of `vit` -> LayerNorm "norm" -> its class token -> fc.
LayerNorm has epsilon 1e-6, GELU is the exact one, dropout is left out.

The tokens are a sequence `[B, 1 + n, dim]` here, patches row by row behind the class
token. A stage is the output of a block without the class token, laid out as the grid of
patches, `[B, h, w, dim]`: what is to be compared must have a place in the image.

The number of position embeddings ties trained weights to one image size. They are not
interpolated: another size is refused.

Names, ours <- torchvision's (`[k]` counts from 1):

    patch_embed                      conv_proj
    class_token                      class_token
    position_embedding               encoder.pos_embedding
    block[k]/norm1, norm2            encoder.layers.encoder_layer_[k-1].ln_1, ln_2
    block[k]/{query,key,value}       ....self_attention.in_proj_weight, in_proj_bias
    block[k]/out                     ....self_attention.out_proj
    block[k]/mlp_in, mlp_out         ....mlp.0, mlp.3
    norm, fc                         encoder.ln, heads.head

Before torchvision 0.13 the MLP's layers were linear_1 and linear_2.

References:
  Dosovitskiy et al.: An Image is Worth 16x16 Words, ICLR 2021, section 3.1.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from nad_jax import errors
from nad_jax.models import common, vit


class ClassTokenTransformer(nn.Module):
    """Vision transformer with a class token; stage k is `[B, H/patch, W/patch, dim]`.

    Images must be square, with sides that are a multiple of `patch`; the size of the
    first ones (those of `init`) is the only one afterwards.

    Attributes:
      patch: side of a patch in pixels.
      dim: channels of a token. The number used is the multiple of `head_dim` nearest to
        `dim * width`, at least `head_dim`.
      depth: number of blocks, hence of stages.
      head_dim: channels of an attention head; `dim / head_dim` heads.
      mlp_ratio: hidden size of the MLP over `dim`.
    """

    patch: int
    dim: int
    depth: int
    head_dim: int
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
        side = self._patches_per_side(images)
        batch = images.shape[0]
        heads = max(1, round(self.dim * self.width / self.head_dim))
        dim = heads * self.head_dim
        x = nn.Conv(
            dim,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding="VALID",
            dtype=self.dtype,
            kernel_init=common.kernel_init,
            name="patch_embed",
        )(images)
        token = self.param("class_token", nn.initializers.zeros, (1, 1, dim))
        x = jnp.concatenate(
            [
                jnp.broadcast_to(token.astype(x.dtype), (batch, 1, dim)),
                x.reshape(batch, side * side, dim),
            ],
            axis=1,
        )
        features = {}
        blocks = vit.encode(
            self,
            x,
            depth=self.depth,
            heads=heads,
            mlp_dim=self.mlp_ratio * dim,
            dtype=self.dtype,
        )
        for stage, x in enumerate(blocks, start=1):
            if self.keep_features:
                maps = x[:, 1:].reshape(batch, side, side, dim)
                features[f"stage{stage}"] = maps
        x = common.LayerNorm(name="norm")(x)[:, 0]
        # In float32, as every model's last layer.
        x = common.dense(self.num_classes, dtype=jnp.float32, name="fc")(
            x.astype(jnp.float32)
        )
        return x, features

    def _patches_per_side(self, images: jax.Array) -> int:
        height, width = images.shape[1:3]
        if height != width or height % self.patch:
            raise errors.InputError(
                f"images must be square with a multiple of {self.patch} pixels on a "
                f"side, got {height} x {width}"
            )
        side = height // self.patch
        if self.has_variable("params", "position_embedding"):
            stored = self.get_variable("params", "position_embedding").shape[1]
            if stored != 1 + side**2:
                pixels = self.patch * math.isqrt(stored - 1)
                raise errors.InputError(
                    f"{stored} position embeddings take images of {pixels} x {pixels} "
                    f"pixels, got {height} x {width}"
                )
        return side


def vit_b(
    patch: int,
    *,
    dim: int = 768,
    depth: int = 12,
    head_dim: int = 64,
    bn_axis_name: str | None = None,
    **options,
) -> ClassTokenTransformer:
    """torchvision's ViT-B/`patch`; `options` are the other fields of the module.

    `bn_axis_name` is accepted because every model is built with it, and has no effect.
    """
    del bn_axis_name
    return ClassTokenTransformer(
        patch=patch, dim=dim, depth=depth, head_dim=head_dim, **options
    )
