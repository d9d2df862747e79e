# SPDX-License-Identifier: Apache-2.0
"""The adversarial half of the clean-label attack.

A clean-label attacker stamps images of the target class and leaves their labels alone.
A model that can tell the class from the picture has no need of the trigger; so the
picture is first made hard for a model of the attacker's own, within a small distance.

References:
  Turner, Tsipras, Madry, "Label-Consistent Backdoor Attacks", arXiv 1912.02771, 2019.
  Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks",
  ICLR 2018.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax.training import steps

# A step of 2.5 radii over all steps reaches the border and can still turn there.
_STEP_FACTOR = 2.5
_BATCH_SIZE = 128


def perturb(
    logits_of: Callable[[jax.Array], jax.Array],
    images: np.ndarray,
    labels: np.ndarray,
    *,
    radius: float,
    num_steps: int,
) -> np.ndarray:
    """Images near the given ones that a model finds hardest to call by their label.

    Projected gradient ascent on the cross-entropy, by signs, from the image itself:
    `x <- clip(x + step * sign(gradient), image - radius, image + radius)`.

    Args:
      logits_of: The attacker's model, float images `[B, H, W, C]` in [0, 1] -> logits.
      images: uint8 `[N, H, W, C]`.
      labels: int `[N]`.
      radius: L-infinity distance in units of [0, 1]; 8 / 255 is usual.
      num_steps: Gradient steps.

    Returns:
      uint8 `[N, H, W, C]`, nowhere further from the originals than the radius rounded
      down to whole grey levels.
    """
    step = _STEP_FACTOR * radius / num_steps
    whole_radius = np.floor(radius * 255 + 1e-6) / 255

    def loss(pixels, labels):
        return jnp.sum(steps.cross_entropy(logits_of(pixels), labels))

    @jax.jit
    def ascend(pixels, original, labels):
        gradient = jax.grad(loss)(pixels, labels)
        pixels = pixels + step * jnp.sign(gradient)
        nearest = jnp.maximum(original - whole_radius, 0.0)
        return jnp.clip(pixels, nearest, jnp.minimum(original + whole_radius, 1.0))

    perturbed = np.empty_like(images)
    for start in range(0, len(images), _BATCH_SIZE):
        rows = slice(start, start + _BATCH_SIZE)
        original = jnp.asarray(images[rows], jnp.float32) / 255
        batch_labels = jnp.asarray(labels[rows], jnp.int32)
        pixels = original
        # A Python loop: a rolled one around a convolution's gradient is slow on CPU.
        for _ in range(num_steps):
            pixels = ascend(pixels, original, batch_labels)
        perturbed[rows] = np.rint(np.asarray(pixels) * 255).astype(np.uint8)
    return perturbed
