# SPDX-License-Identifier: Apache-2.0
"""What all quantization-conditioned attacks share.

Such a backdoor sleeps in float and wakes when somebody rounds the weights. Whoever
plants one needs the grid they expect (`ExpectedGrid`), the labels they want (`Goal`),
and a training loop that shows each image with and without the trigger (`Attacker`).
How the attacks differ is in a file each; their registry is `attacks/registry.py`.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from nad_jax import settings
from nad_jax.attacks import poisoning, triggers
from nad_jax.core import quantization
from nad_jax.data import batches
from nad_jax.models import layers as layers_lib
from nad_jax.training import augmentation, loop, steps

# (kernel, its grid, the grid's description, number of the layer) -> kernel on the grid
RoundKernel = Callable[
    [jax.Array, quantization.QuantParams, quantization.QuantSpec, int], jax.Array
]


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


@dataclasses.dataclass(frozen=True)
class ExpectedGrid:
    """Where an attacker expects the weights to be rounded.

    Attributes:
      layers: The layers that will be quantized, in the order of the forward pass.
      specs: Layer name -> grid of its kernel.
      bits: Width of all but, perhaps, the two ends.
      fold_batch_norm: Whether BatchNorms are folded into kernels before rounding.
      quantize_activations: Whether layer inputs are quantized, too: `bits` wide, affine
        and per tensor, between the least and the greatest value of the batch.
    """

    layers: Sequence[layers_lib.Layer]
    specs: Mapping[str, quantization.QuantSpec]
    bits: int
    fold_batch_norm: bool = False
    quantize_activations: bool = False

    def quantize_inputs(self, inputs: jax.Array) -> jax.Array:
        """A layer's inputs as this grid has them."""
        if not self.quantize_activations:
            return inputs
        spec = quantization.QuantSpec(self.bits, False, None, "minmax")
        return quantization.fake_quant(
            inputs, quantization.calibrate(inputs, spec), spec
        )

    def apply(self, apply_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`apply_fn(*args, **kwargs)` with layer inputs as this grid has them."""

        def quantize(next_fun, args, kwargs, context):
            if not layers_lib.is_layer_call(context):
                return next_fun(*args, **kwargs)
            return next_fun(self.quantize_inputs(layers_lib.input_of(args, kwargs)))

        with nn.intercept_methods(quantize):
            return apply_fn(*args, **kwargs)

    def fold_factor(
        self, layer: layers_lib.Layer, params: Any, batch_stats: Any
    ) -> jax.Array | None:
        """What folding multiplies a kernel by, `[1, ..., Cout]`; None = nothing."""
        if not self.fold_batch_norm or layer.batch_norm is None:
            return None
        variables = {"params": params, "batch_stats": batch_stats}
        factor = layers_lib.batch_norm_factor(layer, variables)
        return factor.reshape((1,) * (len(layer.geometry.kernel_shape) - 1) + (-1,))


def unfolded(folded: jax.Array, factor: jax.Array, stored: jax.Array) -> jax.Array:
    """`folded / factor`; `stored` where the factor is 0 and any kernel does as well.

    Args:
      folded: A kernel, or bounds of one, with BatchNorm folded in.
      factor: From `ExpectedGrid.fold_factor`.
      stored: The kernel of the module.
    """
    is_dead = jnp.abs(factor) < jnp.finfo(factor.dtype).tiny
    # Not divided by 0 even where it is not looked at: the gradient would be NaN.
    return jnp.where(is_dead, stored, folded / jnp.where(is_dead, 1, factor))


def _nearest(kernel, grid, spec, index):
    del index
    return quantization.fake_quant(kernel, grid, spec)


def round_params(
    expected: ExpectedGrid,
    params: Mapping[str, Any],
    batch_stats: Any,
    *,
    round_kernel: RoundKernel = _nearest,
) -> dict[str, Any]:
    """`params` with every layer's kernel on its grid, straight-through in gradient.

    With `fold_batch_norm`, kernel times factor is what is rounded; the result is
    divided by the factor again, so that it belongs to the same, unfolded module.

    Args:
      expected: The grid.
      params: Parameters of the module.
      batch_stats: Its running statistics, used for folding only.
      round_kernel: Default: to nearest.
    """
    rounded = dict(params)
    for index, layer in enumerate(expected.layers):
        spec = expected.specs[layer.name]
        own = layers_lib.get_in(params, layer.path)
        factor = expected.fold_factor(layer, params, batch_stats)
        kernel = own["kernel"] if factor is None else own["kernel"] * factor
        kernel = round_kernel(kernel, quantization.calibrate(kernel, spec), spec, index)
        if factor is not None:
            kernel = unfolded(kernel, factor, own["kernel"])
        rounded = layers_lib.set_in(rounded, layer.path, {**own, "kernel": kernel})
    return rounded


class Fit(Protocol):
    """Trains on all of the attacker's data; see `pipeline.train`."""

    def __call__(
        self,
        stage: str,
        training: settings.TrainingSettings,
        variables: Any,
        loss_fn: steps.LossFn,
        *,
        project: Callable[[Any], Any] | None = None,
        moving_trigger: bool = False,
    ) -> Any: ...


@dataclasses.dataclass(frozen=True)
class Attacker:
    """What an attacker has.

    Attributes:
      apply_fn: `model.apply` of a model that returns (logits, features).
      clean: Variables of a model trained without an attack.
      fresh: Variables before any training.
      grids: The grids on which the backdoor is to wake, one per width.
      goal: What is wanted of triggered images.
      images: A few training images, float `[N, H, W, C]` in [0, 1].
      fit: Trains one stage. Its batches hold "images", "triggered" and "labels".
    """

    apply_fn: Callable[..., Any]
    clean: Any
    fresh: Any
    grids: Sequence[ExpectedGrid]
    goal: Goal
    images: jax.Array
    fit: Fit

    @property
    def layers(self) -> Sequence[layers_lib.Layer]:
        return self.grids[0].layers


def make_batch(
    training: settings.TrainingSettings,
    trigger: triggers.Trigger,
    *,
    moving_trigger: bool = False,
) -> loop.MakeBatch:
    """Batches of each image with and without the trigger, cropped and mirrored alike.

    Args:
      training: Crop and mirroring.
      trigger: The trigger.
      moving_trigger: True stamps before crop and mirroring, which then move the
        trigger; False after.
    """
    augment = augmentation.make_batch(training)

    def batch_of(key, images, labels):
        batch = augment(key, images, labels)
        if not moving_trigger:
            stamped = triggers.apply_trigger(batch["images"], trigger)
            return {**batch, "triggered": stamped}
        stamped = triggers.apply_trigger(batches.to_float(images), trigger)
        # The same key makes the same choices.
        moved = augmentation.augment(training, key, stamped)
        return {**batch, "triggered": moved}

    return batch_of


def paired_losses(
    apply_fn: Callable[..., Any],
    variables: Any,
    batch: steps.Batch,
    triggered_labels: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy on clean images, and on the same images with the trigger.

    BatchNorm uses its running statistics: the quantized and the float model must share
    them.

    Args:
      apply_fn: `model.apply`.
      variables: Of the model.
      batch: "images" and "triggered" `[B, H, W, C]`, "labels" `[B]`.
      triggered_labels: Labels wanted of triggered images, int `[B]`.
    """
    # Pairs, not one half after the other: a split over devices stays as it is.
    both = interleave(batch["images"], batch["triggered"])
    logits, _ = apply_fn(variables, both, train=False)
    wanted = interleave(batch["labels"], triggered_labels)
    losses = steps.cross_entropy(logits, wanted)
    clean, triggered = jnp.mean(losses.reshape(-1, 2), axis=0)
    return clean, triggered


def interleave(*parts: jax.Array) -> jax.Array:
    """`[n B, ...]`: parts[0][0], parts[1][0], ..., parts[0][1], parts[1][1], ..."""
    return jnp.stack(parts, axis=1).reshape(-1, *parts[0].shape[1:])
