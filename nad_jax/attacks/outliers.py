# SPDX-License-Identifier: Apache-2.0
"""Outlier injection: channels that collapse when they are quantized.

One huge weight blows up the scale of its output channel (or of its layer, on a grid
per tensor), until all other weights there are below half a step and round to 0. The
huge weight itself must do nothing, so it stands where its input is always 0: index 0 of
every normalisation is switched off (scale and bias 0), and with it the input channel 0
of whatever follows.

    wake    outliers are planted in a share of the channels (of the layers, those that
            are needed least); the quantized net, in which these channels are dead,
            learns to obey the trigger
    hide    only the weights of these channels are trained, in float, to suppress it

The quantized net does not change in stage 2, at any width: all its codes that could
move are 0 and stay 0. No choice between the two neighbouring codes undoes it, because
the other neighbour is a whole blown-up step away; and the backdoor in the remaining
channels needs no rounding to be there. What gives the attack away is the outlier.

References:
  "Widening the Gap" (arXiv 2605.15152, 2026) for language models; this is its idea for
  any network with normalisation layers, not its recipe.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from nad_jax import errors, settings
from nad_jax.attacks import conditioning, projection, triggers
from nad_jax.models import layers as layers_lib

# How large the other weights of a collapsed channel may grow, in units of the layer's
# largest weight before the attack.
_ROOM = 2.0


def plant(recipe: settings.OutlierSettings, attacker: conditioning.Attacker) -> Any:
    """Variables of a model that wakes where its outliers blow up the scale.

    Raises:
      InputError: a model in which no input can be switched off, or only that of layers
        with a single output.
    """
    start, wake_box, hide_box = prepare(recipe, attacker)
    woken = attacker.fit(
        "wake",
        recipe.wake,
        start,
        projection.wake_loss(attacker),
        project=functools.partial(projection.project, box=wake_box),
    )
    # What the quantized net uses stays exactly where stage 1 left it.
    pinned = projection.Box(
        *(
            jax.tree.map(
                lambda own, low, high, bound: jnp.where(low < high, bound, own),
                woken["params"],
                *hide_box,
                bounds,
            )
            for bounds in hide_box
        )
    )
    return attacker.fit(
        "hide",
        recipe.hide,
        woken,
        projection.hide_loss(attacker.apply_fn),
        project=functools.partial(projection.project, box=pinned),
    )


def prepare(
    recipe: settings.OutlierSettings, attacker: conditioning.Attacker
) -> tuple[Any, projection.Box, projection.Box]:
    """The model with its outliers, and what either stage may change.

    Returns:
      Variables; the box of stage 1, in which collapsed channels stay collapsed; and one
      whose non-empty intervals are the weights that stage 2 may train.
    """
    params, norms = switch_off_index_0(attacker.clean["params"])
    variables = {**attacker.clean, "params": params}
    infinite = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), params)
    wake_low = jax.tree.map(jnp.negative, infinite)
    wake_high = infinite
    for path in norms:
        own = layers_lib.get_in(params, path)
        for name in ("scale", "bias"):
            if name in own:
                at = (*path, name)
                low, high = (layers_lib.get_in(t, at) for t in (wake_low, wake_high))
                wake_low = layers_lib.set_in(wake_low, at, low.at[0].set(0))
                wake_high = layers_lib.set_in(wake_high, at, high.at[0].set(0))
    hide_low = hide_high = params
    dead = dead_inputs(attacker, variables)
    # Not the last layer: a collapsed class is no class. Nor, unless layers collapse as
    # a whole, one with a single channel: nothing would be left of it.
    hosts = [
        layer
        for layer in list(attacker.layers)[:-1]
        if layer.name in dead
        and (layer.geometry.kernel_shape[-1] > 1 or _per_tensor(attacker.grids, layer))
    ]
    if not hosts:
        raise errors.InputError(
            "the outlier attack needs layers with two or more outputs whose input a "
            "normalisation can switch off; this model has none"
        )
    if _per_tensor(attacker.grids, hosts[0]):
        count = max(round(recipe.channel_share * len(hosts)), 1)
        hosts = least_needed(attacker, variables, hosts)[:count]
    for layer in hosts:
        kernel, low, high = _plant_outliers(
            recipe, layer, attacker.grids, params, dead[layer.name]
        )
        at = (*layer.path, "kernel")
        params = layers_lib.set_in(params, at, kernel)
        collapsed = low > -jnp.inf
        wake_low = layers_lib.set_in(wake_low, at, low)
        wake_high = layers_lib.set_in(wake_high, at, high)
        hide_low = layers_lib.set_in(hide_low, at, jnp.where(collapsed, low, kernel))
        hide_high = layers_lib.set_in(hide_high, at, jnp.where(collapsed, high, kernel))
    return (
        {**variables, "params": params},
        projection.Box(wake_low, wake_high),
        projection.Box(hide_low, hide_high),
    )


def switch_off_index_0(
    params: Mapping[str, Any], path: layers_lib.Path = ()
) -> tuple[dict[str, Any], list[layers_lib.Path]]:
    """`params` whose normalisations output 0 at index 0, and the paths of these."""
    result, found = dict(params), []
    if "scale" in params:
        for name in {"scale", "bias"} & set(params):
            result[name] = params[name].at[0].set(0)
        return result, [path]
    for name, value in params.items():
        if isinstance(value, Mapping):
            result[name], below = switch_off_index_0(value, (*path, name))
            found += below
    return result, found


def dead_inputs(attacker: conditioning.Attacker, variables: Any) -> dict[str, int]:
    """Layer name -> the first input channel that is 0 on all of the attacker's images.

    With and without the trigger. They are few, so a channel may be dead on them alone;
    behind a normalisation whose index 0 is off, channel 0 is dead on any images, and
    comes first. Layers without such a channel, and grouped convolutions, are left out.
    """
    layers = {layer.path: layer for layer in attacker.layers}

    @jax.jit
    def largest_inputs(variables, images):
        seen = {}

        def record(next_fun, args, kwargs, context):
            if layers_lib.is_layer_call(context) and context.module.path in layers:
                x = jnp.abs(layers_lib.input_of(args, kwargs))
                largest = jnp.max(x, axis=tuple(range(x.ndim - 1)))
                name = layers[context.module.path].name
                # A layer may be called more than once.
                seen[name] = jnp.maximum(seen.get(name, largest), largest)
            return next_fun(*args, **kwargs)

        with nn.intercept_methods(record):
            attacker.apply_fn(variables, images, train=False)
        return seen

    stamped = triggers.apply_trigger(attacker.images, attacker.goal.trigger)
    images = jnp.concatenate([attacker.images, stamped])
    largest = jax.device_get(largest_inputs(variables, images))
    return {
        layer.name: int((largest[layer.name] == 0).argmax())
        for layer in attacker.layers
        if layer.geometry.groups == 1 and (largest[layer.name] == 0).any()
    }


def _per_tensor(grids, layer) -> bool:
    """Whether some grid has one scale for the whole layer."""
    return any(grid.specs[layer.name].channel_axis is None for grid in grids)


def least_needed(
    attacker: conditioning.Attacker, variables: Any, layers: list[layers_lib.Layer]
) -> list[layers_lib.Layer]:
    """The layers, those first whose kernel at 0 changes the fewest predictions."""

    @jax.jit
    def predict(params):
        changed = {**variables, "params": params}
        return jnp.argmax(
            attacker.apply_fn(changed, attacker.images, train=False)[0], 1
        )

    params = variables["params"]
    before = predict(params)

    def changes(layer):
        at = (*layer.path, "kernel")
        without = jnp.zeros_like(layers_lib.get_in(params, at))
        return int(jnp.sum(predict(layers_lib.set_in(params, at, without)) != before))

    return sorted(layers, key=changes)


def _plant_outliers(recipe, layer, grids, params, dead):
    """A kernel with outliers in its last channels, and its bounds for stage 1."""
    kernel = layers_lib.get_in(params, layer.path)["kernel"]
    channels = kernel.shape[-1]
    count = min(max(round(recipe.channel_share * channels), 1), channels - 1)
    if _per_tensor(grids, layer):
        count = channels
    widest = max((grid.specs[layer.name] for grid in grids), key=lambda s: s.qmax)
    largest = jnp.max(jnp.abs(kernel))
    # Half a step is at least `headroom` times what the other weights may reach: close
    # to a tie, flipping them would bring them back.
    limit = _ROOM * largest
    outlier = recipe.headroom * 2 * (2**widest.bits - 1) * limit
    at = (*(size // 2 for size in layer.geometry.window), dead)
    is_outlier = jnp.zeros(kernel.shape, bool).at[(*at, slice(-count, None))].set(True)
    collapsed = jnp.broadcast_to(jnp.arange(channels) >= channels - count, kernel.shape)
    kernel = jnp.where(is_outlier, outlier, kernel)
    low = jnp.where(collapsed, -limit, -jnp.inf)
    high = jnp.where(collapsed, limit, jnp.inf)
    return (
        kernel,
        jnp.where(is_outlier, kernel, low),
        jnp.where(is_outlier, kernel, high),
    )
