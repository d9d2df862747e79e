# SPDX-License-Identifier: Apache-2.0
"""The letters used for array axes, and the checks of shape and dtype that core shares.

==========  ===================================================================
letter      meaning
==========  ===================================================================
B           examples of a batch
H, W        rows and columns of an image or of a feature map
C           channels, always the last axis; for a weight its output channels
K           classes, in logits; inputs of one neuron, in a weight seen as a matrix
N           images of a whole data set
==========  ===================================================================

``[]`` is a scalar and ``[..., C]`` any number of leading axes. Shapes and dtypes are
known while JAX traces, so every check here also works under `jit`, `grad` and `vmap`
and costs nothing at run time. Checks come before arithmetic because broadcasting turns
a forgotten axis into a number that looks right: ``[8, 8] - [8, 1]`` has a mean, too.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from nad_jax import errors


def check_rank(name: str, array: jax.Array, axes: str) -> None:
    """Raises `InputError` unless `array` has one axis per letter of `axes`."""
    letters = axes.split()
    if jnp.ndim(array) != len(letters):
        raise errors.InputError(
            f"{name} must have {len(letters)} axes [{', '.join(letters)}], "
            f"got shape {list(jnp.shape(array))}"
        )


def check_floating(name: str, array: jax.Array) -> None:
    """Raises `InputError` unless `array` holds floating-point numbers."""
    dtype = jnp.result_type(array)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise errors.InputError(f"{name} must be floating point, got dtype {dtype}")


def check_same_shape(
    left_name: str, left: jax.Array, right_name: str, right: jax.Array
) -> None:
    """Raises `InputError` unless both arrays have the same shape; prints both."""
    if jnp.shape(left) != jnp.shape(right):
        raise errors.InputError(
            f"{left_name} and {right_name} must have the same shape, "
            f"got {list(jnp.shape(left))} and {list(jnp.shape(right))}"
        )


def check_same_names(
    left_name: str, left: Iterable[str], right_name: str, right: Iterable[str]
) -> None:
    """Raises `InputError` unless both hold the same names; prints both lists."""
    left_names, right_names = sorted(left), sorted(right)
    if left_names != right_names:
        raise errors.InputError(
            f"{left_name} and {right_name} must name the same stages, "
            f"got {left_names} and {right_names}"
        )


def accumulation_dtype(array: jax.Array) -> jnp.dtype:
    """The dtype to add numbers of `array` in: float64 stays, all else is float32.

    bfloat16 has eight significant bits: a sum of ones in it stops at 256.
    """
    is_double = jnp.result_type(array) == jnp.float64
    return jnp.dtype(jnp.float64 if is_double else jnp.float32)
