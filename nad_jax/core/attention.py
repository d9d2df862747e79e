# SPDX-License-Identifier: Apache-2.0
"""Feature maps to normalised attention maps.

"Attention" here is activation-based spatial attention, as in attention transfer: where
in the image a stage responds strongly. It has nothing to do with transformers.
"""

import jax
import jax.numpy as jnp

from nad_jax import errors
from nad_jax.core import shapes

_REDUCTIONS = {"sum": jnp.sum, "mean": jnp.mean}


def attention_map(
    features: jax.Array, *, p: float = 2, reduction: str = "sum", eps: float = 1e-6
) -> jax.Array:
    """Where a stage responds: one map of unit L2 norm per example.

    With ``m`` the largest absolute feature of the example::

        a[h, w]   = sum over c of |features[h, w, c] / m| ** p
        map[h, w] = a[h, w] / sqrt(sum over h, w of a ** 2 + eps ** 2)

    The two reductions and p = 1 or p > 1 give the four operators of the paper: A_sum,
    A_sum^p, A_mean, A_mean^p. After the normalisation sum and mean agree up to eps.

    The public code divides by ``norm + eps`` and does not divide by ``m``. Two
    deviations, both without effect (below 1e-6) on ordinary features: the square root
    keeps the gradient finite where the map is zero, and dividing by ``m`` keeps powers
    in range, so the map does not depend on the scale of the features, however large or
    small. An example whose features all lie below the smallest normal number of their
    dtype is dead: its map is zero and so is its gradient, on every device.

    Args:
      features: Output of one stage, ``[B, H, W, C]``, floating point, with more than
        one position (the normalised map of a 1x1 stage is constant).
      p: Power, above 0; the public code uses 2.
      reduction: ``"sum"`` or ``"mean"``, over channels.
      eps: Floor of the norm, in units of the map of features divided by ``m``;
        at least 1e-18, so that its square exists in float32.

    Returns:
      ``[B, H, W]``, not negative; float64 for float64 features, otherwise float32,
      which is also the dtype of the sums. NaN or infinite features give NaN.

    Raises:
      InputError: For features without four axes, of integer dtype, without channels or
        with fewer than two positions; for p, eps or reduction out of range.

    Gradients:
      ``m`` is treated as a constant, exact up to eps ** 2 because the map does not
      depend on it. Where a feature is 0 its gradient is 0, for p <= 1 too.

    Example:
      >>> features = jnp.asarray([[[[3.0], [0.0]], [[0.0], [4.0]]]])  # [1, 2, 2, 1]
      >>> print(attention_map(features, p=1)[0])  # norm 5
      [[0.6 0. ]
       [0.  0.8]]
      >>> print(attention_map(features * 2.0**100, p=1)[0])
      [[0.6 0. ]
       [0.  0.8]]

    References:
      Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017.
      Li et al., "Neural Attention Distillation", ICLR 2021, section 3.
    """
    _check_arguments(features, p, reduction, eps)
    dtype = shapes.accumulation_dtype(features)
    smallest_normal = float(jnp.finfo(features.dtype).tiny)

    magnitude = jnp.abs(features.astype(dtype))
    largest = jnp.max(jax.lax.stop_gradient(magnitude), axis=(1, 2, 3), keepdims=True)
    # Written so that NaN is not "dead": a broken stage must stay visible.
    is_dead = largest < smallest_normal
    # XLA may divide by multiplying with the reciprocal, which underflows beyond this.
    divisor = jnp.minimum(largest, float(jnp.finfo(dtype).max) / 8)
    relative = jnp.where(is_dead, 0.0, magnitude / jnp.where(is_dead, 1.0, divisor))

    powers = _safe_power(relative, p)
    strength = _REDUCTIONS[reduction](powers, axis=-1)
    sum_of_squares = jnp.sum(jnp.square(strength), axis=(1, 2), keepdims=True)
    return strength / jnp.sqrt(sum_of_squares + eps**2)


def _safe_power(base: jax.Array, exponent: float) -> jax.Array:
    """``base ** exponent`` for base >= 0, with derivative 0 at 0 for any exponent.

    Up to 1 the one-sided derivative at 0 is not 0 (below 1 it is infinite), and half
    of all features behind a ReLU are 0. The inner `where` keeps that infinity from
    becoming 0 * inf = NaN.
    """
    if exponent > 1:
        return base**exponent
    is_zero = base == 0
    return jnp.where(is_zero, 0.0, jnp.where(is_zero, 1.0, base) ** exponent)


def _check_arguments(features: jax.Array, p: float, reduction: str, eps: float) -> None:
    shapes.check_rank("features", features, "B H W C")
    shapes.check_floating("features", features)
    _, height, width, channels = features.shape
    if height * width < 2 or channels < 1:
        raise errors.InputError(
            "features must have a channel and more than one position (a normalised "
            "1x1 map is constant and teaches nothing), "
            f"got shape {list(features.shape)}"
        )
    if not 0 < p < float("inf"):
        raise errors.InputError(f"p must be a finite number above 0, got {p}")
    if not 1e-18 <= eps < float("inf"):
        raise errors.InputError(f"eps must be at least 1e-18, got {eps}")
    if reduction not in _REDUCTIONS:
        raise errors.InputError(
            f"reduction must be one of {sorted(_REDUCTIONS)}, got {reduction!r}"
        )
