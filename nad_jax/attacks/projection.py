# SPDX-License-Identifier: Apache-2.0
"""A backdoor that sleeps in float and wakes when weights are rounded to nearest.

Two stages (PQBackdoor):

1. *Wake.* Train *through* the quantizer (straight-through) so that the quantized model
   classifies clean images well and triggered images as the target.
2. *Hide.* Train the float weights so that triggered images get their true labels again,
   but after every step project each weight back into its rounding cell: the set of
   values that round to the same code as after stage 1. Weights that determine the scale
   are pinned, and whatever is not quantized goes back to its value after stage 1.

Stage 2 is projected gradient descent in a box, and the box is all there is to the
trick: as long as the weights stay in it, nearest rounding restores stage 1 bit for bit.

References:
  Ma et al., "Quantization Backdoors to Deep Learning Commercial Frameworks", IEEE
  TDSC 2023.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from nad_jax import errors
from nad_jax.attacks import poisoning, triggers
from nad_jax.core import quantization
from nad_jax.models import layers as layers_lib
from nad_jax.training import steps

Specs = Mapping[str, quantization.QuantSpec]


class Box(NamedTuple):
    """Bounds for every parameter; equal bounds pin it."""

    low: Any
    high: Any


def rounding_box(
    params: Mapping[str, Any],
    layers: list[layers_lib.Layer],
    specs: Specs,
    *,
    cell_margin: float = 1e-3,
) -> Box:
    """The values of all parameters that nearest rounding maps to the same codes.

    Args:
      params: Parameters after stage 1.
      layers: The layers that will be quantized.
      specs: Layer name -> grid.
      cell_margin: Distance kept from the edge of a cell, in steps; covers differences
        in how runtimes divide and break ties.

    Returns:
      Bounds in the structure of `params`. Parameters of no layer are pinned, and so are
      the weights that reach the end of their channel's range, since they set the scale.

    Raises:
      InputError: a grid whose scale depends on all weights ("mse"), which pinning a
        few cannot hold.
    """
    low = high = dict(params)
    for layer in layers:
        spec = specs[layer.name]
        if spec.range_method == "mse":
            raise errors.InputError(
                "the projection attack needs range_method absmax or minmax, got 'mse'"
            )
        own = layers_lib.get_in(params, layer.path)
        bounds = _kernel_box(spec, cell_margin, own["kernel"])
        low = layers_lib.set_in(low, layer.path, {**own, "kernel": bounds.low})
        high = layers_lib.set_in(high, layer.path, {**own, "kernel": bounds.high})
    return Box(low, high)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _kernel_box(spec, cell_margin, kernel) -> Box:
    grid = quantization.calibrate(kernel, spec)
    codes = quantization.quantize(kernel, grid, spec)
    center = quantization.dequantize(codes, grid)
    reach = grid.scale * (0.5 - cell_margin)
    axes = None
    if spec.channel_axis is not None:
        channel_axis = spec.channel_axis % kernel.ndim
        axes = tuple(a for a in range(kernel.ndim) if a != channel_axis)
    least = jnp.min(kernel, axis=axes, keepdims=True)
    most = jnp.max(kernel, axis=axes, keepdims=True)
    if spec.symmetric or spec.range_method == "absmax":
        most = jnp.maximum(-least, most)
        least = -most
    pinned = (kernel <= least) | (kernel >= most)
    return Box(
        jnp.where(pinned, kernel, jnp.maximum(center - reach, least)),
        jnp.where(pinned, kernel, jnp.minimum(center + reach, most)),
    )


def project(params: Any, box: Box) -> Any:
    """The point of the box nearest to `params`."""
    return jax.tree.map(jnp.clip, params, box.low, box.high)


def fake_quant_params(
    params: Mapping[str, Any], layers: list[layers_lib.Layer], specs: Specs
) -> dict[str, Any]:
    """`params` with every layer's kernel on its grid, straight-through in gradient."""
    quantized = dict(params)
    for layer in layers:
        own = layers_lib.get_in(params, layer.path)
        grid = quantization.calibrate(own["kernel"], specs[layer.name])
        kernel = quantization.fake_quant(own["kernel"], grid, specs[layer.name])
        quantized = layers_lib.set_in(quantized, layer.path, {**own, "kernel": kernel})
    return quantized


@dataclasses.dataclass(frozen=True)
class Goal:
    """What the attacker wants of triggered images.

    Attributes:
      trigger: The trigger.
      label_mode: "all_to_one" or "all_to_all".
      target_label: Class wanted by all_to_one.
      num_classes: K.
    """

    trigger: triggers.Trigger
    label_mode: str
    target_label: int
    num_classes: int

    def target_labels(self, labels: jax.Array) -> jax.Array:
        return poisoning.target_labels(
            labels,
            mode=self.label_mode,
            target_label=self.target_label,
            num_classes=self.num_classes,
        )


def two_image_loss(
    apply_fn: Callable[..., Any],
    triggered_labels: Callable[[jax.Array], jax.Array],
    trigger: triggers.Trigger,
    *,
    transform: Callable[[Any], Any] = lambda params: params,
) -> steps.LossFn:
    """Cross-entropy on each image as it is plus cross-entropy on it with the trigger.

    BatchNorm uses its running statistics, which stay as they are: the quantized and the
    float model must share them.

    Args:
      apply_fn: `model.apply`.
      triggered_labels: True labels -> labels wanted of triggered images.
      trigger: The trigger.
      transform: Applied to the parameters first, e.g. `fake_quant_params`.
    """

    def loss_fn(params, batch_stats, batch, key):
        del key
        images, labels = batch["images"], batch["labels"]
        # Pairs, not one half after the other: a split over devices stays as it is.
        both = _interleave(images, triggers.apply_trigger(images, trigger))
        variables = {"params": transform(params), "batch_stats": batch_stats}
        logits, _ = apply_fn(variables, both, train=False)
        wanted = _interleave(labels, triggered_labels(labels))
        losses = steps.cross_entropy(logits, wanted)
        clean, triggered = jnp.mean(losses.reshape(-1, 2), axis=0)
        loss = clean + triggered
        metrics = {"clean_loss": clean, "triggered_loss": triggered}
        return loss, (batch_stats, metrics)

    return loss_fn


def _interleave(first: jax.Array, second: jax.Array) -> jax.Array:
    """`[2 B, ...]`: first[0], second[0], first[1], second[1], ..."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])


def wake_loss(
    apply_fn: Callable[..., Any],
    layers: list[layers_lib.Layer],
    specs: Specs,
    goal: Goal,
) -> steps.LossFn:
    """Stage 1: the quantized model obeys the trigger."""
    return two_image_loss(
        apply_fn,
        goal.target_labels,
        goal.trigger,
        transform=lambda params: fake_quant_params(params, layers, specs),
    )


def hide_loss(apply_fn: Callable[..., Any], goal: Goal) -> steps.LossFn:
    """Stage 2: the float model ignores it; to be used with `project`."""
    return two_image_loss(apply_fn, lambda labels: labels, goal.trigger)
