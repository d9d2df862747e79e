# SPDX-License-Identifier: Apache-2.0
"""EFRAP's differentiable objective inside somebody else's quantization loop.

A linear classifier goes to 2 bits by Adam on rounding logits. The loop is foreign; the
grid, the soft rounding and the three terms of the objective are ours.
"""

import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

import nad_jax

images, labels = load_digits(return_X_y=True)
images = jnp.asarray(images / 16.0, jnp.float32)
classifier = LogisticRegression(max_iter=300).fit(images[:1200], labels[:1200])
weights = jnp.asarray(classifier.coef_.T, jnp.float32)
bias = jnp.asarray(classifier.intercept_, jnp.float32)

spec = nad_jax.QuantSpec(bits=2)
params = nad_jax.calibrate(weights, spec)
placement = nad_jax.place(weights, params, spec)
error = nad_jax.rounding_error(weights, placement, params)
logits = nad_jax.rounding_logits(placement)


@jax.jit
def learn(logits, state):
    def loss_fn(logits):
        soft = nad_jax.soft_rounding(logits)
        kernel = nad_jax.rounded_weights(placement, soft, params)
        preserved = nad_jax.activation_preservation_loss(
            images[:1200] @ kernel, images[:1200] @ weights
        )
        flips = nad_jax.flip_loss(soft, placement.nearest, jnp.abs(error))
        penalty = nad_jax.binarization_penalty(soft)
        return jnp.mean(preserved) + 1e-3 * flips + 1e-2 * penalty

    updates, state = tx.update(jax.grad(loss_fn)(logits), state)
    return optax.apply_updates(logits, updates), state


tx = optax.adam(1e-2)
state = tx.init(logits)
for _ in range(500):
    logits, state = learn(logits, state)
for name, chosen in {
    "nearest": nad_jax.nearest_rounding(placement),
    "EFRAP": nad_jax.hard_rounding(logits),
}.items():
    kernel = nad_jax.rounded_weights(placement, chosen, params)
    accuracy = jnp.mean((images[1200:] @ kernel + bias).argmax(-1) == labels[1200:])
    print(f"{name} at 2 bits: ACC {float(accuracy):.1%}")
