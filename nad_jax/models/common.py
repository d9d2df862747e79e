# SPDX-License-Identifier: Apache-2.0
"""What the architectures share: layers with PyTorch's arithmetic, and a fast `init`.

Conventions, so that weights trained in PyTorch give the same outputs here:

- Convolutions have no bias and pad symmetrically by (size - 1) / 2, written out as
  ((p, p), (p, p)). "SAME" would not do: at stride 2 on an even size it pads (0, 1),
  which shifts the sampling grid by a pixel.
- BatchNorm has epsilon 1e-5 and keeps 0.9 of its running value per step, which PyTorch
  calls momentum 0.1. One difference remains, in training only: flax stores the biased
  batch variance, PyTorch the unbiased one, larger by n / (n - 1) with n = B * h * w.
- Kernels start as in `kernel_std`, biases at 0, BatchNorm and LayerNorm at scale 1 and
  bias 0.

Not here: anything only one architecture needs.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.typing import DTypeLike

from nad_jax import errors

# Position embeddings of vision transformers; kept here because `init` fills by name.
POSITION_EMBEDDING_STD = 0.02


def kernel_std(shape: tuple[int, ...]) -> float:
    """Standard deviation of the normal distribution a fresh kernel is drawn from.

    Convolution `[h, w, in, out]`: sqrt(2 / (h w out)), He's rule over the fan-out, as
    in the CIFAR WRN and ResNet code that NAD builds on. Dense `[in, out]`:
    sqrt(1 / in), LeCun's rule; those codes use PyTorch's uniform default there, which
    is narrower by sqrt(3). (The kuangliu ResNet-18 family uses that default for
    convolutions too.)

    Args:
      shape: kernel shape, rank 2 for Dense, higher for Conv.

    Returns:
      The standard deviation; the distribution is not truncated.

    Example:
      >>> kernel_std((3, 3, 7, 32))  # sqrt(2 / 288)
      0.08333333333333333
      >>> kernel_std((16, 10))
      0.25

    References:
      He, Zhang, Ren, Sun: Delving Deep into Rectifiers, ICCV 2015, section 2.2.
      LeCun, Bottou, Orr, Mueller: Efficient BackProp, 1998, section 4.6.
    """
    if len(shape) == 2:
        return math.sqrt(1.0 / shape[0])
    return math.sqrt(2.0 / (math.prod(shape[:-2]) * shape[-1]))


def kernel_init(
    key: jax.Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """A kernel with the distribution of `kernel_std`, for flax's own `model.init`."""
    return jax.random.normal(key, shape, dtype) * jnp.asarray(kernel_std(shape), dtype)


def scaled(channels: int, width: float) -> int:
    """`channels` times `width`, rounded to an integer (ties to even), at least 1."""
    return max(1, round(channels * width))


def check_images(images: jax.Array) -> None:
    """Refuses what would run and be wrong: integer pixels, or a missing batch axis.

    Raises:
      InputError: unless `images` is floating point of rank 4.
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise errors.InputError(
            "a model takes float images [B, H, W, C] in [0, 1], got "
            f"{images.dtype} {list(images.shape)}"
        )


def conv(
    channels: int, size: int, stride: int = 1, *, dtype: DTypeLike, name: str
) -> nn.Conv:
    """A `size` x `size` convolution (odd) without bias, padded as PyTorch pads."""
    pad = (size - 1) // 2
    return nn.Conv(
        channels,
        (size, size),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=False,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


class BatchNorm(nn.BatchNorm):
    """flax's BatchNorm in float32, returning the dtype it was given.

    flax computes bfloat16 inputs in float32 as well, but by implicit promotion, which
    strict dtype rules forbid. The casts are inside the module so that a hook sees the
    convolution's own output arrive here.
    """

    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
    ) -> jax.Array:
        y = super().__call__(x.astype(jnp.float32), use_running_average, mask=mask)
        return y.astype(x.dtype)


class LayerNorm(nn.LayerNorm):
    """flax's LayerNorm in float32, returning the dtype it was given."""

    def __call__(self, x: jax.Array, *, mask: jax.Array | None = None) -> jax.Array:
        return super().__call__(x.astype(jnp.float32), mask=mask).astype(x.dtype)


def batch_norm(*, train: bool, axis_name: str | None, name: str) -> BatchNorm:
    """A BatchNorm with PyTorch's default constants; see the module docstring."""
    return BatchNorm(
        use_running_average=not train,
        momentum=0.9,
        epsilon=1e-5,
        axis_name=axis_name,
        name=name,
    )


def dense(features: int, *, dtype: DTypeLike, name: str) -> nn.Dense:
    """A Dense layer with bias."""
    return nn.Dense(features, dtype=dtype, kernel_init=kernel_init, name=name)


def pool_and_classify(maps: jax.Array, num_classes: int) -> jax.Array:
    """Logits `[B, num_classes]` from `[B, h, w, C]`: spatial mean, then Dense "fc".

    Both run in float32 whatever the model's dtype: they are cheap, and softmax losses
    need the digits.
    """
    pooled = jnp.mean(maps.astype(jnp.float32), axis=(1, 2))
    return dense(num_classes, dtype=jnp.float32, name="fc")(pooled)


def expected_shapes(
    model: nn.Module, image_shape: tuple[int, int, int]
) -> dict[str, dict]:
    """What `init` would fill, `jax.ShapeDtypeStruct`s, by tracing alone.

    Allocates no array, however large the model says it is.

    Args:
      model: as for `init`.
      image_shape: `(H, W, C)`.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    return {
        "batch_stats": {},
        **jax.eval_shape(model.init, jax.random.key(0), images),
    }


def init(
    model: nn.Module, key: jax.Array, image_shape: tuple[int, int, int]
) -> dict[str, dict]:
    """Fresh variables of a model, filled on the host without compiling anything.

    `model.init` spends seconds in the compiler. Here shapes come from tracing alone and
    each leaf is filled by NumPy: kernels normal with `kernel_std`, "position_embedding"
    normal with 0.02, "bias", "mean" and "class_token" 0, "scale" and "var" 1. The
    distribution is that of `model.init`, the numbers are not.

    Every leaf has its own generator, seeded with the key and the leaf's path, so it
    does not depend on what else the model contains. The values are the same on every
    device and process with the same NumPy.

    Args:
      model: a model of this package, or any flax module with those leaf names that is
        called on images.
      key: typed key, concrete: `init` works on the host and not under `jit` or `vmap`
        (use `model.init` there).
      image_shape: `(H, W, C)`. The vision transformers' position embeddings have the
        size this implies; for the other models H and W are free.

    Returns:
      `{"params": ..., "batch_stats": ...}` of float32 arrays on the default device.
      "batch_stats" is present, and empty, for models without BatchNorm.

    Raises:
      InputError: the model has a leaf whose name has no rule.
    """
    shapes = expected_shapes(model, image_shape)
    key_words = np.asarray(jax.random.key_data(key)).ravel().tolist()

    def fresh(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        names = [entry.key for entry in path]
        seed = [*key_words, *"/".join(names).encode()]
        return _fresh_leaf(names, leaf.shape, np.random.default_rng(seed))

    # One device_put for the tree: jnp.asarray would compile a copy for every new shape.
    return jax.device_put(jax.tree_util.tree_map_with_path(fresh, shapes))


def _fresh_leaf(
    names: list[str], shape: tuple[int, ...], generator: np.random.Generator
) -> np.ndarray:
    match names[-1]:
        case "kernel":
            std = np.float32(kernel_std(shape))
            return std * generator.standard_normal(shape, np.float32)
        case "position_embedding":
            std = np.float32(POSITION_EMBEDDING_STD)
            return std * generator.standard_normal(shape, np.float32)
        case "bias" | "mean" | "class_token":
            return np.zeros(shape, np.float32)
        case "scale" | "var":
            return np.ones(shape, np.float32)
    raise errors.InputError(
        f"no rule to initialise {'/'.join(names)!r}; known leaf names: "
        "kernel, position_embedding, class_token, bias, mean, scale, var"
    )
