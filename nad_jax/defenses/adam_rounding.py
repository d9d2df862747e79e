# SPDX-License-Identifier: Apache-2.0
"""EFRAP's relaxed objective, minimised by Adam on rounding logits, then hardened.

    L = L_A + flip_weight * L_F + penalty_weight * L_P

(the flip weight is part of the prices that a `RoundingProblem` carries)

with the terms of `nad_jax.core.losses`. Two forms of L_A:

* "minibatch": as EFRAP's public code. Each step draws one of the fixed calibration
  batches and compares outputs *after* the BatchNorm and activation that follow the
  layer (`activation_tails`).
* "gram": the expected squared error before them, from second moments; all images in
  every step at the price of one matrix product.

Both leave the soft optimum by thresholding, and what that costs is reported.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nad_jax import settings as settings_lib
from nad_jax.core import losses, rounding, solvers
from nad_jax.defenses import activation_tails
from nad_jax.models import layers as layers_lib

AdamSettings = settings_lib.AdamSettings

# `losses.flip_loss` of a weight that stays at nearest, per unit of its error weight.
_STAY_LOSS = np.float32(-math.log(1e-8))
# A rolled loop around a convolution's gradient is 40 times slower on CPU.
_UNROLLED_STEPS = 10


@dataclasses.dataclass(frozen=True)
class LayerTask:
    """One layer to be rounded; arrays have the kernel's shape unless said otherwise.

    Attributes:
      layer: Which one.
      kernel: Float kernel.
      bias: `[Cout]` or None.
      params: Grid of the kernel.
      placement: The kernel on that grid.
      float_inputs: The layer's inputs in the float network.
      inputs: Its inputs in the network quantized so far.
      problem: Second moments and flip prices, stacked over channel groups.
      tail: What follows the layer; for batches of `AdamSettings.batch_size`.
      num_images: How many calibration images there are; a layer behind a reshape sees
        several rows for each.
      key: Randomness of the batch order.
    """

    layer: layers_lib.Layer
    kernel: jax.Array
    bias: jax.Array | None
    params: Any
    placement: rounding.Placement
    float_inputs: jax.Array
    inputs: jax.Array
    problem: solvers.RoundingProblem
    tail: activation_tails.Tail
    num_images: int
    key: jax.Array


def solve(
    task: LayerTask, settings: AdamSettings
) -> tuple[jax.Array, dict[str, float]]:
    """Hard rounding in the kernel's shape, and the objectives before and after.

    The objectives are those of `solvers.objective` for the problem `at_vertices`. With
    the form "minibatch" that is not quite what is minimised here, as its outputs are
    compared after the tail. What the soft optimum loses by hardening is told by two
    output errors, of the soft rounding and of the hard one: these compare with other
    methods, too.
    """
    logits = rounding.rounding_logits(task.placement, stretch=settings.stretch)
    optimizer = optax.adam(settings.learning_rate)
    run = _run_gram if settings.form == "gram" else _run_minibatches
    logits = run(task, settings, optimizer, logits)
    hard = jnp.where(task.placement.free, rounding.hard_rounding(logits), 0.0)
    as_matrix = functools.partial(layers_lib.as_matrix, task.layer.geometry)
    objective = functools.partial(
        jax.vmap(solvers.objective), at_vertices(task.problem)
    )
    soft_error = jax.vmap(solvers.output_error)(
        task.problem, as_matrix(_soft(logits, settings))
    )
    hard_error = jax.vmap(solvers.output_error)(task.problem, as_matrix(hard))
    return hard, {
        "objective_nearest": float(jnp.sum(objective(task.problem.nearest))),
        "objective": float(jnp.sum(objective(as_matrix(hard)))),
        # Sums of parts that cancel may come out below 0.
        "soft_output_error": max(float(jnp.sum(soft_error)), 0.0),
        "hard_output_error": max(float(jnp.sum(hard_error)), 0.0),
    }


def at_vertices(problem: solvers.RoundingProblem) -> solvers.RoundingProblem:
    """The discrete problem that L_A + flip_weight * L_F is where all weights are hard.

    There, `losses.flip_loss` charges 18.4 times the error weight for staying at nearest
    and nothing for flipping.

    Args:
      problem: Of a layer; its prices are weights of the flip loss.
    """
    return problem._replace(stay_cost=_STAY_LOSS * problem.stay_cost)


def _soft(logits: jax.Array, settings: AdamSettings) -> jax.Array:
    return rounding.soft_rounding(logits, stretch=settings.stretch)


def _regularizers(
    task: LayerTask, settings: AdamSettings, soft: jax.Array, step: jax.Array
):
    """L_F and L_P over the weights that have a choice, at a step counted from 0."""
    free = task.placement.free
    weight = layers_lib.as_kernel(task.layer.geometry, task.problem.stay_cost)
    flip = losses.flip_loss(soft, task.placement.nearest, weight)
    first, last = settings.exponents
    share = step.astype(jnp.float32) / jnp.float32(settings.steps)
    after = (share - settings.warm_up) / jnp.float32(1.0 - settings.warm_up)
    exponent = first + (last - first) * jnp.clip(after, 0.0, 1.0)
    # A number where it stays the same: squares are cheaper than powers.
    exponent = first if first == last else exponent
    penalty = losses.binarization_penalty(jnp.where(free, soft, 0.0), exponent=exponent)
    weight = jnp.where(after >= 0.0, settings.penalty_weight, 0.0)
    return flip + weight * penalty


def _adam_step(loss_fn, optimizer, carry, batch, step):
    logits, opt_state = carry
    gradient = jax.grad(loss_fn)(logits, batch, step)
    # optax raises a float to the power of its int32 step counter.
    with jax.numpy_dtype_promotion("standard"):
        updates, opt_state = optimizer.update(gradient, opt_state)
    return optax.apply_updates(logits, updates), opt_state


def _run_gram(task, settings, optimizer, logits):
    as_matrix = functools.partial(layers_lib.as_matrix, task.layer.geometry)

    def loss_fn(logits, _, step):
        soft = _soft(logits, settings)
        error = jax.vmap(solvers.output_error)(task.problem, as_matrix(soft))
        return jnp.sum(error) + _regularizers(task, settings, soft, step)

    @jax.jit
    def run(logits):
        def body(step, carry):
            return _adam_step(loss_fn, optimizer, carry, None, step)

        carry = (logits, optimizer.init(logits))
        return jax.lax.fori_loop(0, settings.steps, body, carry)[0]

    return run(logits)


def _run_minibatches(task, settings, optimizer, logits):
    num_rows = task.inputs.shape[0]
    rows_per_image = max(num_rows // task.num_images, 1)
    rows = min(settings.batch_size * rows_per_image, num_rows)
    # The last batch overlaps the one before it rather than leave images out.
    starts = [*range(0, num_rows - rows, rows), num_rows - rows]
    geometry = task.layer.geometry

    def output(kernel, inputs):
        outputs = layers_lib.run(geometry, kernel, inputs)
        if task.bias is not None:
            bias = task.bias.astype(outputs.dtype)
            outputs = outputs + bias.reshape((1,) * (outputs.ndim - 1) + (-1,))
        return task.tail(outputs)

    target = jax.jit(lambda x: output(task.kernel, x))
    batches = [slice(start, start + rows) for start in starts]
    targets = [target(task.float_inputs[batch]) for batch in batches]

    def loss_fn(logits, batch, step):
        inputs, targets = batch
        soft = _soft(logits, settings)
        kernel = rounding.rounded_weights(task.placement, soft, task.params)
        preservation = losses.activation_preservation_loss(
            output(kernel, inputs), targets
        )
        return jnp.mean(preservation) + _regularizers(task, settings, soft, step)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry, inputs, targets, first_step):
        for i, batch in enumerate(zip(inputs, targets, strict=True)):
            carry = _adam_step(loss_fn, optimizer, carry, batch, first_step + i)
        return carry

    seed = int(jax.random.bits(task.key, dtype=jnp.uint32))
    order = np.random.default_rng(seed).integers(len(batches), size=settings.steps)
    carry = (logits, optimizer.init(logits))
    for first in range(0, settings.steps, _UNROLLED_STEPS):
        drawn = order[first : first + _UNROLLED_STEPS]
        carry = run(
            carry,
            [task.inputs[batches[b]] for b in drawn],
            [targets[b] for b in drawn],
            jnp.int32(first),
        )
    return carry[0]
