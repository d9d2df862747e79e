# SPDX-License-Identifier: Apache-2.0
"""The models by name; importing this package loads no flax.

Every model keeps one contract:

    logits, features = model.apply(variables, images, train=False)

`images` are float `[B, H, W, C]` in [0, 1], `logits` float32 `[B, num_classes]`, and
`features` maps "stage1", "stage2", ... to `[B, h, w, c]` maps in the model's `dtype`.
With `train=True` BatchNorm uses and updates batch statistics, so pass
`mutable=["batch_stats"]`. Ask for stages by name: `jax.jit` hands dicts back sorted,
and "stage10" sorts before "stage2". With the field `keep_features=False` there are
none: a pass that is not compiled would otherwise keep every stage until its end.

To add a model: one file here with a factory function that returns a flax module, one
line in `MODELS`, one test of its forward pass against an independent oracle.
"""

import importlib
import re
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from nad_jax import errors

# name -> "module:function". The integers of a name are the function's positional
# arguments: "wrn_16_1" calls wide_resnet.wrn(16, 1, ...), "vit_tiny" vit.vit_tiny(...).
MODELS: dict[str, str] = {
    "wrn_10_1": "nad_jax.models.wide_resnet:wrn",
    "wrn_16_1": "nad_jax.models.wide_resnet:wrn",
    "wrn_16_2": "nad_jax.models.wide_resnet:wrn",
    "wrn_28_10": "nad_jax.models.wide_resnet:wrn",
    "wrn_40_1": "nad_jax.models.wide_resnet:wrn",
    "wrn_40_2": "nad_jax.models.wide_resnet:wrn",
    "resnet_8": "nad_jax.models.resnet:resnet",
    "resnet_14": "nad_jax.models.resnet:resnet",
    "resnet_20": "nad_jax.models.resnet:resnet",
    "resnet_32": "nad_jax.models.resnet:resnet",
    "resnet_18": "nad_jax.models.resnet:resnet",
    "resnet_34": "nad_jax.models.resnet:resnet",
    "preact_resnet_18": "nad_jax.models.preact_resnet:preact_resnet",
    "imagenet_resnet_18": "nad_jax.models.resnet:imagenet_resnet",
    "imagenet_resnet_34": "nad_jax.models.resnet:imagenet_resnet",
    "imagenet_resnet_50": "nad_jax.models.resnet:imagenet_resnet",
    "vit_tiny": "nad_jax.models.vit:vit_tiny",
    "vit_b_16": "nad_jax.models.class_token_vit:vit_b",
}

_ANY_WIDE_RESNET = re.compile(r"wrn_(10|16|28|40)_[1-9][0-9]*")


def model_names() -> tuple[str, ...]:
    """Names of the table, in its order; further `wrn_D_K` are accepted by `build`."""
    return tuple(MODELS)


def build(
    name: str,
    *,
    num_classes: int,
    width: float = 1.0,
    dtype: DTypeLike = jnp.float32,
    bn_axis_name: str | None = None,
    **options: Any,
) -> Any:
    """The flax module of that name, without parameters; see `common.init` for those.

    Args:
      name: a name of `model_names()`, or any `wrn_D_K` with D in 10, 16, 28, 40 and
        K >= 1.
      num_classes: number of logits.
      width: factor on every channel count, rounded, at least one channel (for
        "vit_tiny": at least one per head; for "vit_b_16": whole heads of 64, at least
        one). 1.0 is the published architecture.
      dtype: of the computation and of `features`. Parameters, BatchNorm statistics and
        logits stay float32.
      bn_axis_name: name of a `pmap`/`vmap`/`shard_map` axis over which BatchNorm
        averages its batch statistics; None uses the batch it is given. (Under plain
        `jit` with a sharded batch the statistics are global already.)
      **options: what only one architecture has, such as `patch=2` for "vit_tiny".

    Returns:
      A flax Linen module with the contract of the package docstring.

    Raises:
      InputError: unknown name, no classes, or a width that is not positive.

    Example:
      >>> build("wrn_16_1", num_classes=10).depth
      16
    """
    target = MODELS.get(name)
    if target is None and _ANY_WIDE_RESNET.fullmatch(name):
        target = MODELS["wrn_16_1"]
    if target is None:
        raise errors.InputError(
            f"unknown model {name!r}; known: {', '.join(model_names())}, "
            "and any wrn_D_K with D in 10, 16, 28, 40 and K >= 1"
        )
    if num_classes < 1:
        raise errors.InputError(f"num_classes must be at least 1, got {num_classes}")
    if not 0.0 < width < float("inf"):
        raise errors.InputError(f"width must be a positive number, got {width}")
    module_name, function_name = target.split(":")
    factory = getattr(importlib.import_module(module_name), function_name)
    numbers = [int(word) for word in name.split("_") if word.isdigit()]
    return factory(
        *numbers,
        num_classes=num_classes,
        width=width,
        dtype=dtype,
        bn_axis_name=bn_axis_name,
        **options,
    )
