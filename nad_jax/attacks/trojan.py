# SPDX-License-Identifier: Apache-2.0
"""A trigger made to measure: optimised until it excites chosen neurons of a clean net.

A patch that a network already reacts to strongly is learnt from few poisoned images and
is hard to unlearn. The attacker chooses where the patch is; gradient descent chooses
its pixels. The poisoned data are then made with it as with any other trigger.

The neurons are inputs of the classifier, taken by the weight it gives them. (The paper
ranks a layer's neurons by their incoming weights, whose scale means nothing in front of
a BatchNorm.)

References:
  Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from nad_jax import errors, settings
from nad_jax.attacks import triggers
from nad_jax.data import batches
from nad_jax.models import head
from nad_jax.models import layers as layers_lib

_IMAGES = 64


def optimise(
    model: Any,
    variables: Any,
    trigger: triggers.Trigger,
    images: np.ndarray,
    trojan: settings.TrojanSettings,
    *,
    key: jax.Array,
) -> triggers.Trigger:
    """The trigger with another picture under the same mask.

    Minimises the squared distance of the chosen neurons from a height that no clean
    image brings them to, in units of that height, in the mean over triggered images.

    Args:
      model: Ends in a Dense layer.
      variables: Of a clean model.
      trigger: Where; one pattern under a mask that is not empty.
      images: Images the attacker has, uint8 `[N, H, W, C]`; up to 64 are drawn.
      trojan: How many neurons, how high, how long.
      key: Typed key; decides which images are used, and the picture to start from.

    Returns:
      A trigger whose pattern has whole grey levels, so that storing it changes nothing.

    Raises:
      InputError: a trigger that shows nothing, a model that does not end in a Dense
        layer, or one with fewer neurons.
    """
    _check_trigger(trigger)
    pattern = jnp.asarray(trigger.pattern, jnp.float32)
    rows_key, start_key = jax.random.split(key)
    # Not the first: folders come sorted by class.
    rows = jax.random.permutation(rows_key, images.shape[0])[:_IMAGES]
    sample = batches.to_float(jnp.asarray(images[np.sort(rows)]))
    path, neurons = _find_neurons(trojan, model, variables, sample)

    def excitation(pattern):
        stamped = triggers.apply_trigger(sample, trigger._replace(pattern=pattern))
        return head.inputs(model, variables, stamped, path)[:, neurons]

    clean = jax.jit(lambda: head.inputs(model, variables, sample, path))()
    highest = np.asarray(jnp.max(jnp.abs(clean[:, neurons]), axis=0))
    target = jnp.asarray(trojan.reach * np.maximum(highest, 1e-3), jnp.float32)[None]
    tx = optax.adam(trojan.learning_rate)

    @jax.jit
    def step(pattern, opt_state):
        gradient = jax.grad(
            lambda p: jnp.mean(jnp.square((excitation(p) - target) / target))
        )(pattern)
        # Some of optax mixes dtypes (adam: a float to the power of the int32 count).
        with jax.numpy_dtype_promotion("standard"):
            updates, opt_state = tx.update(gradient, opt_state, pattern)
        return jnp.clip(pattern + jnp.asarray(updates), 0.0, 1.0), opt_state

    covered = jnp.asarray(trigger.mask, jnp.float32) > 0
    start = jax.random.uniform(start_key, pattern.shape, jnp.float32)
    pattern = jnp.where(covered, start, 0.0)
    opt_state = tx.init(pattern)
    # A Python loop: a rolled one around a convolution's gradient is slow on CPU.
    for _ in range(trojan.steps):
        pattern, opt_state = step(pattern, opt_state)
    return trigger._replace(pattern=jnp.round(pattern * 255) / 255)


def check(
    trojan: settings.TrojanSettings,
    model: Any,
    variables: Any,
    trigger: triggers.Trigger,
) -> None:
    """Raises InputError for what `optimise` would refuse of these.

    Args:
      trojan: How many neurons.
      model: Ends in a Dense layer.
      variables: Of the model, trained or not.
      trigger: Where.
    """
    _check_trigger(trigger)
    image = jnp.zeros((1, *np.shape(trigger.pattern)))
    _find_neurons(trojan, model, variables, image)


def _find_neurons(trojan, model, variables, images):
    """Path of the classifier, and those of its inputs that are to be excited."""
    path = head.find(model, variables, images)
    kernel = layers_lib.get_in(variables["params"], path)["kernel"]
    return path, choose_neurons(np.asarray(kernel), trojan.neurons)


def _check_trigger(trigger: triggers.Trigger) -> None:
    if np.ndim(trigger.pattern) != 3 or not np.any(np.asarray(trigger.mask)):
        raise errors.InputError(
            "a trojan trigger needs one picture under a mask, such as a square"
        )


def choose_neurons(kernel: np.ndarray, count: int) -> np.ndarray:
    """The inputs of a Dense layer with the largest sum of absolute weights.

    Args:
      kernel: `[K, C]`.
      count: How many, at most K.

    Returns:
      int `[count]`, the heaviest first.
    """
    if count > len(kernel):
        raise errors.InputError(
            f"trojan.neurons must be at most {len(kernel)}, the inputs of the "
            f"classifier, got {count}"
        )
    weight = np.sum(np.abs(kernel.astype(np.float64)), axis=1)
    return np.argsort(-weight, kind="stable")[:count]
