# SPDX-License-Identifier: Apache-2.0
"""The last layer of a classifier and what it sees of each image: its neurons."""

from typing import Any

import flax.linen as nn
import jax

from nad_jax import errors
from nad_jax.models import layers as layers_lib


def find(model: Any, variables: Any, images: jax.Array) -> layers_lib.Path:
    """Path of the last Dense layer.

    Args:
      model: Has `apply` with the contract of `nad_jax.models`.
      variables: Its variables.
      images: float `[B, H, W, C]`; of the first the shape is looked at.

    Raises:
      InputError: the last layer is a convolution.
    """
    found = layers_lib.find_layers(
        model, variables, images[:1], apply_kwargs={"train": False}
    )
    if found[-1].geometry.window:
        raise errors.InputError(
            f"the model must end in a Dense layer, but {found[-1].name} is a "
            "convolution"
        )
    return found[-1].path


def inputs(
    model: Any, variables: Any, images: jax.Array, path: layers_lib.Path
) -> jax.Array:
    """What the layer at `path` sees in evaluation mode, `[B, K]`; traceable.

    Raises:
      InputError: it does not see one vector per image.
    """
    seen = []

    def record(next_fun, args, kwargs, context):
        if layers_lib.is_layer_call(context) and context.module.path == path:
            seen.append(layers_lib.input_of(args, kwargs))
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(record):
        model.apply(variables, images, train=False)
    if seen[-1].ndim != 2:
        raise errors.InputError(
            f"there must be one vector per image before {'/'.join(path)}, got inputs "
            f"of shape {list(seen[-1].shape)}"
        )
    return seen[-1]
