# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import pytest

from nad_jax import errors
from nad_jax.core import shapes


def test_rank_message_prints_the_axes_wanted_and_the_shape_given():
    shapes.check_rank("features", jnp.ones((2, 3, 4, 5)), "B H W C")
    with pytest.raises(
        errors.InputError, match=r"4 axes \[B, H, W, C\], got shape \[2, 3\]"
    ):
        shapes.check_rank("features", jnp.ones((2, 3)), "B H W C")


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.uint8, bool])
def test_only_floating_point_counts_as_floating(dtype):
    for floating in (jnp.float32, jnp.bfloat16, jnp.float16):
        shapes.check_floating("images", jnp.ones(2, floating))
    with pytest.raises(errors.InputError, match=f"got dtype {jnp.dtype(dtype)}"):
        shapes.check_floating("images", jnp.ones(2, dtype))


def test_shapes_that_would_broadcast_are_still_different():
    shapes.check_same_shape("a", jnp.ones((2, 1)), "b", jnp.zeros((2, 1)))
    with pytest.raises(errors.InputError, match=r"got \[2, 1\] and \[2, 2\]"):
        shapes.check_same_shape("a", jnp.ones((2, 1)), "b", jnp.ones((2, 2)))


def test_names_are_compared_as_sets_and_both_lists_are_printed():
    shapes.check_same_names("a", {"x": 1, "y": 2}, "b", ["y", "x"])
    with pytest.raises(errors.InputError, match=r"\['x', 'y'\] and \['x', 'z'\]"):
        shapes.check_same_names("a", ["y", "x"], "b", ["z", "x"])


def test_checks_work_on_traced_arrays():
    def checked(x):
        shapes.check_rank("x", x, "B C")
        shapes.check_floating("x", x)
        shapes.check_same_shape("x", x, "x", x)
        return x.astype(shapes.accumulation_dtype(x))

    assert jax.jit(checked)(jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.float32
    assert jax.vmap(checked)(jnp.ones((4, 2, 3))).shape == (4, 2, 3)


def test_half_precision_is_summed_in_float32_and_double_stays_double():
    for half in (jnp.bfloat16, jnp.float16, jnp.float32):
        assert shapes.accumulation_dtype(jnp.ones(2, half)) == jnp.float32
    with jax.enable_x64(True):
        assert shapes.accumulation_dtype(jnp.ones(2, jnp.float64)) == jnp.float64
