# SPDX-License-Identifier: Apache-2.0
"""The pure training step, and the cross-entropy it usually minimises.

A method is a `LossFn`; the step never changes. The same step function runs

- under `jax.jit` on one device,
- under `jax.jit` with the batch sharded over a mesh: batch statistics and gradient
  means are then global without a line of code,
- under `jax.pmap(step, axis_name)` when made with that `axis_name`. The model must be
  built with it too (`bn_axis_name` in `nad_jax.models`), otherwise each device
  normalises with its own part of the batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from nad_jax.training import state as state_lib

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
# (params, batch_stats, batch, key) -> (scalar loss, (new batch_stats, metrics))
LossFn = Callable[[Any, Any, Batch, jax.Array], tuple[jax.Array, tuple[Any, Metrics]]]
# The same arguments -> ((loss, (new batch_stats, metrics)), gradient of params)
GradientFn = Callable[[Any, Any, Batch, jax.Array], tuple[Any, Any]]
StepFn = Callable[[state_lib.TrainState, Batch], tuple[state_lib.TrainState, Metrics]]


def make_train_step(
    loss_fn: LossFn,
    tx: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    project: Callable[[Any], Any] | None = None,
    sharpness_radius: float = 0.0,
    sharpness_by_weight: bool = False,
) -> StepFn:
    """Step function `(state, batch) -> (state, metrics)` for one loss and optimiser.

    Args:
        loss_fn: the method, see `LossFn`. Its loss is a mean over the batch.
        tx: optimiser.
        axis_name: name of the `pmap` axis whose devices share the batch; None under
            `jit`, sharded or not.
        project: applied to the params after every update, for instance to keep each
            weight in its rounding cell.
        sharpness_radius: L2 length of the ascent step of sharpness-aware minimisation
            (SAM), in weight units; 0 is the plain gradient. Doubles the cost.
        sharpness_by_weight: measure that length in units of each weight's own size
            (adaptive SAM): weights of 0 stay, large ones climb further.

    Returns:
        A function that does not jit itself. Its metrics are those of `loss_fn` and
        "loss", float scalars.
    """
    gradient_fn: GradientFn = jax.value_and_grad(loss_fn, has_aux=True)
    if sharpness_radius:
        gradient_fn = _sharpness_aware(
            gradient_fn, sharpness_radius, sharpness_by_weight, axis_name
        )

    def step(
        state: state_lib.TrainState, batch: Batch
    ) -> tuple[state_lib.TrainState, Metrics]:
        key = state_lib.derive_key(state.key, state_lib.LOSS, state.step)
        if axis_name is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        (loss, (batch_stats, metrics)), gradient = gradient_fn(
            state.params, state.batch_stats, batch, key
        )
        metrics = {**metrics, "loss": loss}
        gradient, batch_stats, metrics = _mean_over_devices(
            (gradient, batch_stats, metrics), axis_name
        )
        # Some of optax mixes dtypes (adam: a float to the power of the int32 count).
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if project is not None:
            params = project(params)
        state = state.replace(
            params=params,
            batch_stats=batch_stats,
            opt_state=opt_state,
            step=state.step + 1,
        )
        return state, metrics

    return step


def classification_loss(
    apply_fn: Callable[..., Any],
    *,
    label_smoothing: float = 0.0,
) -> LossFn:
    """Mean cross-entropy of a classifier as a `LossFn`, with metric "accuracy".

    Args:
        apply_fn: `model.apply` of a model returning (logits, features). The batch
            holds "images", float in [0, 1] `[B, H, W, C]`, and "labels", int `[B]`.
        label_smoothing: fraction of the target mass spread over all classes.
    """

    def loss_fn(
        params: Any, batch_stats: Any, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[Any, Metrics]]:
        del key  # No model of this library draws random numbers.
        (logits, _), batch_stats = apply_training(
            apply_fn,
            params,
            batch_stats,
            batch["images"],
        )
        losses = cross_entropy(logits, batch["labels"], label_smoothing=label_smoothing)
        return jnp.mean(losses), (
            batch_stats,
            {"accuracy": accuracy(logits, batch["labels"])},
        )

    return loss_fn


def apply_training(
    apply_fn: Callable[..., Any],
    params: Any,
    batch_stats: Any,
    images: jax.Array,
) -> tuple[Any, Any]:
    """Output of the model during training and the new batch statistics."""
    variables = {"params": params, "batch_stats": batch_stats}
    output, updated = apply_fn(variables, images, train=True, mutable=["batch_stats"])
    return output, updated.get("batch_stats", batch_stats)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """Cross-entropy between labels and softmax of the logits, one value per example.

    Args:
        logits: `[B, K]`.
        labels: int `[B]`.
        label_smoothing: fraction of the target mass spread over all K classes.

    Returns:
        float32 `[B]`, whatever the dtype of the logits.
    """
    logits = logits.astype(jnp.float32)
    num_classes = logits.shape[-1]
    targets = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    targets = (1.0 - label_smoothing) * targets + label_smoothing / num_classes
    return -jnp.sum(targets * jax.nn.log_softmax(logits), axis=-1)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Fraction of the batch whose largest logit is that of the label, float32 `[]`."""
    return jnp.mean((jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32))


def _sharpness_aware(
    gradient_fn: GradientFn, radius: float, by_weight: bool, axis_name: str | None
) -> GradientFn:
    """Gradient at the point `radius` uphill; loss and statistics of the point itself.

    References:
        Foret, Kleiner, Mobahi, Neyshabur. Sharpness-Aware Minimization for Efficiently
        Improving Generalization. ICLR 2021, equation 2 and algorithm 1.
        Kwon, Kim, Park, Choi. ASAM: Adaptive Sharpness-Aware Minimization. ICML 2021,
        equation 8: by weight, without its small constant.
    """

    def sharp_gradient_fn(
        params: Any, batch_stats: Any, batch: Batch, key: jax.Array
    ) -> tuple[Any, Any]:
        value, gradient = gradient_fn(params, batch_stats, batch, key)
        # The devices of a pmap must climb together, or they differentiate at
        # different points.
        gradient = _mean_over_devices(gradient, axis_name)
        if by_weight:
            gradient = jax.tree.map(lambda p, g: jnp.abs(p) * g, params, gradient)
        # A zero gradient must give a zero step, not 0 / 0.
        scale = radius / jnp.maximum(optax.tree.norm(gradient), 1e-12)
        if by_weight:
            gradient = jax.tree.map(lambda p, g: jnp.abs(p) * g, params, gradient)
        uphill = jax.tree.map(lambda p, g: p + scale * g, params, gradient)
        _, gradient = gradient_fn(uphill, batch_stats, batch, key)
        return value, gradient

    return sharp_gradient_fn


def _mean_over_devices(tree: Any, axis_name: str | None) -> Any:
    return tree if axis_name is None else jax.lax.pmean(tree, axis_name)
