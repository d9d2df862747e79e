# SPDX-License-Identifier: Apache-2.0
import doctest

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nad_jax import errors
from nad_jax.core import attention

SHAPE = (3, 4, 5, 6)

# Per dtype: nothing, below the normal range, tiny, ordinary, huge, nearly infinite.
SIZES = {
    jnp.float32: [0.0, 1e-39, 1e-30, 1.0, 1e30, 3e38],
    jnp.bfloat16: [0.0, 1e-39, 1e-30, 1.0, 1e30, 3e38],
    jnp.float16: [0.0, 6e-6, 6.2e-5, 1.0, 3e4, 6e4],
}

# One compilation instead of thirty dispatched operations: the tests stay quick.
attention_map = jax.jit(
    attention.attention_map, static_argnames=("p", "reduction", "eps")
)

property_test = hypothesis.settings(
    max_examples=20, deadline=None, derandomize=True, database=None
)


def random_features(seed=0, shape=SHAPE, scale=1.0):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return values.astype(np.float32)


def reference_map(features, p, reduction):
    """The public code's formula, in float64."""
    powers = np.abs(np.asarray(features, np.float64)) ** p
    strength = getattr(np, reduction)(powers, axis=-1)
    norm = np.sqrt((strength**2).sum(axis=(1, 2), keepdims=True))
    return strength / (norm + 1e-6)


def total(features, **options):
    """A scalar of the map that weights every position differently, and the map."""
    maps = attention.attention_map(features, **options)
    positions = maps[0].size
    weights = jnp.arange(positions, dtype=maps.dtype).reshape(1, *maps.shape[1:])
    return jnp.sum(maps * weights / positions), maps


gradient_and_map = jax.jit(jax.grad(total, has_aux=True), static_argnames="p")


def norms(maps):
    return np.sqrt(np.square(np.asarray(maps, np.float64)).sum(axis=(1, 2)))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("p", [0.5, 1, 2, 2.0, 3.5])
def test_all_four_operators_equal_the_reference_formula(p, reduction):
    features = random_features(scale=3.0)
    actual = attention_map(features, p=p, reduction=reduction)
    expected = reference_map(features, p, reduction)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_defaults_are_the_reference_operator():
    features = random_features()
    np.testing.assert_array_equal(
        attention_map(features),
        attention_map(features, p=2, reduction="sum", eps=1e-6),
    )


@pytest.mark.slow
def test_power_decides_how_much_a_strong_channel_counts():
    """Eight weak channels against one strong: equal at p = 1, not at p = 2."""
    spread, strong = [1.0] * 8, [8.0] + [0.0] * 7
    features = jnp.asarray([[[spread, strong]]])
    np.testing.assert_allclose(
        attention_map(features, p=1)[0, 0], [0.5**0.5, 0.5**0.5], rtol=1e-6
    )
    np.testing.assert_allclose(
        attention_map(features, p=2)[0, 0],
        np.asarray([8.0, 64.0]) / np.hypot(8.0, 64.0),
        rtol=1e-6,
    )


@property_test
@hypothesis.given(
    exponent=strategies.integers(-90, 90), seed=strategies.integers(0, 1000)
)
def test_the_map_does_not_depend_on_the_scale_or_sign(exponent, seed):
    features = random_features(seed)
    np.testing.assert_array_equal(
        attention_map(features * -(2.0**exponent)),
        attention_map(features),
    )


@pytest.mark.slow
@property_test
@hypothesis.given(
    p=strategies.sampled_from([0.5, 1.0, 2.0, 4.0]),
    seed=strategies.integers(0, 1000),
)
def test_maps_have_unit_norm_and_mean_equals_sum(p, seed):
    features = random_features(seed)
    summed = attention_map(features, p=p, reduction="sum")
    np.testing.assert_allclose(norms(summed), 1.0, rtol=1e-6)
    np.testing.assert_allclose(
        attention_map(features, p=p, reduction="mean"), summed, rtol=1e-6
    )


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 1, 2])
@pytest.mark.parametrize("dtype", SIZES)
def test_any_size_gives_a_unit_map_or_none_and_a_finite_gradient(dtype, p):
    """Features below the normal range of their dtype are as dead as zeros."""
    pattern = np.asarray([[[1.0], [0.5]], [[0.0], [1.0]]])
    features = np.stack([pattern * size for size in SIZES[dtype]]).astype(dtype)
    gradient, maps = gradient_and_map(features, p=p)
    np.testing.assert_allclose(norms(maps), [0, 0, 1, 1, 1, 1], rtol=1e-5)
    assert gradient.dtype == dtype
    gradient = np.asarray(gradient, np.float32)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:2], 0)
    assert (gradient[2:4] != 0).any(axis=(1, 2, 3)).all()


@pytest.mark.slow
@pytest.mark.parametrize("p", [0.5, 1, 2])
def test_zeros_behind_a_relu_get_no_gradient_and_the_rest_a_finite_one(p):
    features = np.maximum(random_features(), 0)
    gradient = np.asarray(gradient_and_map(features, p=p)[0])
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[features == 0], 0)
    assert (gradient[features > 0] != 0).all()


def test_a_dead_example_does_not_disturb_its_neighbours():
    alive = random_features()
    mixed = alive * np.asarray([1, 0, 1], np.float32).reshape(3, 1, 1, 1)
    expected = np.array(attention_map(alive))
    expected[1] = 0
    np.testing.assert_array_equal(attention_map(mixed), expected)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_broken_feature_stays_visible_and_in_its_example(broken):
    features = random_features()
    features[1, 0, 0, 0] = broken
    maps = np.asarray(attention_map(features))
    assert np.isnan(maps[1]).any()
    assert np.isfinite(maps[::2]).all()


@pytest.mark.slow
@pytest.mark.parametrize("p", [1, 2, 3.5])
def test_the_gradient_is_that_of_the_reference_formula(p):
    """Central differences of the float64 formula, at every entry.

    Also shows that the largest feature may be treated as a constant.
    """
    features = random_features(shape=(1, 2, 3, 2))
    actual, _ = gradient_and_map(features, p=p)
    weights = np.arange(6.0).reshape(1, 2, 3) / 6

    def reference_total(values):
        return (reference_map(values, p, "sum") * weights).sum()

    values, step = features.astype(np.float64), 1e-6
    expected = np.zeros_like(values)
    for index in np.ndindex(values.shape):
        shift = np.zeros_like(values)
        shift[index] = step
        difference = reference_total(values + shift) - reference_total(values - shift)
        expected[index] = difference / (2 * step)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_jit_and_vmap_change_nothing():
    features = random_features()
    expected = attention_map(features)
    np.testing.assert_allclose(
        jax.jit(attention.attention_map)(features), expected, rtol=1e-6
    )
    mapped = jax.vmap(attention.attention_map)(jnp.stack([features, -features]))
    np.testing.assert_allclose(mapped, jnp.stack([expected, expected]), rtol=1e-6)


@pytest.mark.slow
def test_half_precision_is_summed_in_float32():
    """4096 equal channels: a bfloat16 sum would stop counting at 256."""
    features = np.ones((1, 1, 2, 4096), jnp.bfloat16)
    features[0, 0, 1, 2048:] = 0
    maps = attention_map(features, p=1)
    assert maps.dtype == jnp.float32
    np.testing.assert_allclose(maps[0, 0, 0] / maps[0, 0, 1], 2.0, rtol=1e-6)


def test_float64_features_give_a_float64_map():
    with jax.enable_x64(True):
        features = random_features().astype(np.float64)
        maps = attention_map(features)
        assert maps.dtype == jnp.float64
        np.testing.assert_allclose(norms(maps), 1.0, rtol=1e-11)


def test_an_empty_batch_is_a_batch():
    assert attention_map(np.ones((0, 4, 4, 2), np.float32)).shape == (0, 4, 4)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.ones((4, 4, 2)), {}, r"4 axes .* got shape \[4, 4, 2\]"),
        (np.ones((2, 1, 1, 8)), {}, r"1x1 .* got shape \[2, 1, 1, 8\]"),
        (np.ones((2, 4, 4, 0)), {}, r"channel .* got shape \[2, 4, 4, 0\]"),
        (np.ones(SHAPE, np.int32), {}, "floating point, got dtype int32"),
        (np.ones(SHAPE, np.float32), {"p": 0}, "p must be .* got 0"),
        (np.ones(SHAPE, np.float32), {"p": -1.0}, "p must be .* got -1.0"),
        (np.ones(SHAPE, np.float32), {"p": float("nan")}, "p must be .* got nan"),
        (np.ones(SHAPE, np.float32), {"eps": 0.0}, "eps must be .* got 0.0"),
        (
            np.ones(SHAPE, np.float32),
            {"reduction": "max"},
            r"\['mean', 'sum'\], got 'max'",
        ),
    ],
)
def test_errors_name_the_value_and_what_is_accepted(features, options, message):
    with pytest.raises(errors.InputError, match=message):
        attention_map(features, **options)


@pytest.mark.slow
def test_docstring_examples_are_true():
    outcome = doctest.testmod(attention)
    assert outcome.attempted > 0 and outcome.failed == 0
