# SPDX-License-Identifier: Apache-2.0
"""CompArtifact: a float and a quantized path through one net, trained together.

    L = mean CE over [F(x) -> y, F(x_t) -> y] + mean CE over [Q(x) -> y, Q(x_t) -> y_t]

F is the plain path, Q the one with rounded kernels; both run at once, and BatchNorm is
in training mode with the statistics of *both*, so that one set of running statistics
serves the float model and its quantized copy. A weight-only attack, from fresh weights.

    images      [F clean, F triggered, Q clean, Q triggered] of every image
    Conv/Dense  the first two through the kernel, the last two through the rounded one
    anything else sees all four

A module may merge positions into the batch axis, in front of a layer, as long as the
rows of one copy stay together: axis 0 is read as [image, copy, row].

The authors' grid is per tensor and symmetric on kernels with BatchNorm folded in
(`config.attack.grid.preset=pytorch_qnnpack`). Their ResNet-18 leaves the first layers
of path Q in float: `first_quantized_layer`.

References:
  Tian, Suya, Xu, Evans, "Stealthy Backdoors as Compression Artifacts", IEEE TIFS 2022.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from nad_jax import errors, settings
from nad_jax.attacks import conditioning
from nad_jax.models import layers as layers_lib
from nad_jax.training import steps

# Copies of an image in one step, and those of them that take the float path.
_COPIES = 4
_FLOAT_COPIES = 2


def plant(
    recipe: settings.CompArtifactSettings, attacker: conditioning.Attacker
) -> Any:
    """Variables of a model whose backdoor wakes on all of the attacker's grids.

    Raises:
      InputError: `first_quantized_layer` names no layer; a layer's input whose axis 0
        is not the images, nor positions of them.
    """
    return attacker.fit(
        "train",
        recipe.training,
        attacker.fresh if recipe.from_scratch else attacker.clean,
        loss(recipe, attacker),
    )


def check(
    recipe: settings.CompArtifactSettings, grids: Sequence[conditioning.ExpectedGrid]
) -> None:
    """Raises InputError where `first_quantized_layer` names no layer of the grids."""
    for grid in grids:
        _from_layer(recipe.first_quantized_layer, grid)


def loss(
    recipe: settings.CompArtifactSettings, attacker: conditioning.Attacker
) -> steps.LossFn:
    """The sum above, for one grid after another if there are several."""
    grids = [_from_layer(recipe.first_quantized_layer, grid) for grid in attacker.grids]

    def loss_fn(params, batch_stats, batch, key):
        del key
        clean, stamped = batch["images"], batch["triggered"]
        labels = batch["labels"]
        images = conditioning.interleave(clean, stamped, clean, stamped)
        target = attacker.goal.target_labels(labels)
        wanted = conditioning.interleave(labels, labels, labels, target)
        total = jnp.zeros(_COPIES, jnp.float32)
        for grid in grids:
            rounded = conditioning.round_params(grid, params, batch_stats)
            logits, batch_stats = _two_paths(
                attacker.apply_fn, grid, params, rounded, batch_stats, images
            )
            losses = steps.cross_entropy(logits, wanted)
            total = total + jnp.mean(losses.reshape(-1, _COPIES), axis=0)
        asleep = jnp.mean(total[:_FLOAT_COPIES])
        awake = jnp.mean(total[_FLOAT_COPIES:])
        metrics = {"float_loss": asleep, "quantized_loss": awake}
        return asleep + awake, (batch_stats, metrics)

    return loss_fn


def _two_paths(apply_fn, grid, params, rounded, batch_stats, images):
    """Logits `[4 B, K]` of both paths in training mode, and the new statistics."""
    by_path = {layer.path: layer for layer in grid.layers}

    def split(next_fun, args, kwargs, context):
        layer = by_path.get(context.module.path)
        if layer is None or not layers_lib.is_layer_call(context):
            return next_fun(*args, **kwargs)
        inputs = layers_lib.input_of(args, kwargs)
        # Positions merged into the batch axis give a copy several rows.
        if inputs.shape[0] % images.shape[0]:
            raise errors.InputError(
                f"axis 0 of the input of layer {layer.name} must hold the images, or "
                f"a multiple of their {images.shape[0]} copies, got {inputs.shape[0]}"
            )
        num_images, shape = images.shape[0] // _COPIES, inputs.shape[1:]
        inputs = inputs.reshape(num_images, _COPIES, -1, *shape)
        outputs = []
        for tree, part in (
            (params, inputs[:, :_FLOAT_COPIES]),
            (rounded, grid.quantize_inputs(inputs[:, _FLOAT_COPIES:])),
        ):
            own = layers_lib.get_in(tree, layer.path)
            rows = part.reshape(-1, *shape)
            output = layers_lib.run(
                layer.geometry, own["kernel"], rows, own.get("bias")
            )
            after = output.shape[1:]
            outputs.append(output.reshape(num_images, _FLOAT_COPIES, -1, *after))
        both = jnp.concatenate(outputs, axis=1)
        return both.reshape(-1, *both.shape[3:])

    with nn.intercept_methods(split):
        (logits, _), batch_stats = steps.apply_training(
            apply_fn, params, batch_stats, images
        )
    return logits, batch_stats


def _from_layer(
    name: str | None, grid: conditioning.ExpectedGrid
) -> conditioning.ExpectedGrid:
    """The grid without the layers before the one called `name`."""
    if name is None:
        return grid
    names = [layer.name for layer in grid.layers]
    if name not in names:
        raise errors.InputError(
            f"first_quantized_layer must be of {', '.join(names)}, got {name!r}"
        )
    return dataclasses.replace(grid, layers=list(grid.layers)[names.index(name) :])
