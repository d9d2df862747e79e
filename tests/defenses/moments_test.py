# SPDX-License-Identifier: Apache-2.0
"""Moments of layer inputs, against sums in float64 numpy."""

import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.defenses import moments as moments_lib
from nad_jax.models import layers as layers_lib

DENSE = layers_lib.Geometry((3, 4))
# 2 groups of 2 input and 3 output channels, a window of 2, every second position.
GROUPED = layers_lib.Geometry(
    (2, 2, 6), strides=(2,), dilation=(1,), padding="VALID", groups=2
)


def normal(shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rows_of_grouped(inputs):
    """`[N, 7, 4]` -> `[groups, 3 * N, window * 2]`, by hand."""
    rows = []
    for image in np.asarray(inputs, np.float64):
        for first in (0, 2, 4):
            window = image[first : first + 2]
            rows.append([window[:, :2].ravel(), window[:, 2:].ravel()])
    return np.swapaxes(np.asarray(rows), 0, 1)


def matrix_of_grouped(kernel):
    kernel = np.asarray(kernel, np.float64).reshape(4, 6)
    return np.stack([kernel[:, :3], kernel[:, 3:]])


def expected_moments(rows, float_rows, matrix):
    drift = (rows - float_rows) @ matrix
    transposed = np.swapaxes(rows, 1, 2)
    return transposed @ rows, transposed @ drift, np.sum(drift**2, axis=1)


def assert_moments(got, expected):
    for name, value in zip(("gram", "drift", "drift_power"), expected, strict=True):
        moment = getattr(got, name)
        assert moment.dtype == jnp.float32
        np.testing.assert_allclose(moment, value, rtol=1e-4, atol=1e-4, err_msg=name)


def test_the_collector_keeps_no_inputs_alive():
    collector = moments_lib.Collector()
    inputs = normal((6, 3), 0)
    collector.collect(DENSE, normal((3, 4), 1), inputs, inputs)
    alive = weakref.ref(inputs)
    del inputs
    assert alive() is None


def test_what_is_remembered_goes_before_the_next_is_made():
    made, alive = [], []

    def double(x):
        alive.append([old() is not None for old in made])
        result = 2.0 * x
        made.append(weakref.ref(result))
        return result

    remembered = moments_lib.Remembered(double)
    remembered(normal((3,), 0))
    remembered(normal((3,), 1))
    assert alive == [[], [False]]


@pytest.mark.slow
@pytest.mark.parametrize("bytes_alive", [64 * 2**20, 300])
def test_moments_of_a_grouped_convolution_in_one_chunk_and_in_many(
    monkeypatch, bytes_alive
):
    monkeypatch.setattr(moments_lib, "_UNFOLDED_BYTES", bytes_alive)
    inputs, float_inputs = normal((8, 7, 4), 0), normal((8, 7, 4), 1)
    kernel = normal(GROUPED.kernel_shape, 2)
    chunks = []
    add_chunk = moments_lib._add_chunk

    def counting(geometry, with_gram, *arguments):
        chunks.append(arguments[-1].shape[0])
        return add_chunk(geometry, with_gram, *arguments)

    monkeypatch.setattr(moments_lib, "_add_chunk", counting)
    got = moments_lib.Collector().collect(GROUPED, kernel, float_inputs, inputs)
    # One image unfolds to 2 groups x 3 positions x 4 values of 4 bytes.
    assert chunks == ([8] if bytes_alive > 300 else [3, 3, 2])
    assert_moments(
        got,
        expected_moments(
            rows_of_grouped(inputs),
            rows_of_grouped(float_inputs),
            matrix_of_grouped(kernel),
        ),
    )
    np.testing.assert_array_equal(got.count, [24, 24])


@pytest.mark.slow
def test_equal_inputs_have_no_drift():
    inputs = normal((5, 2, 3), 0)
    got = moments_lib.Collector().collect(DENSE, normal((3, 4), 1), inputs, inputs)
    rows = np.asarray(inputs, np.float64).reshape(1, 10, 3)
    assert_moments(got, expected_moments(rows, rows, np.zeros((3, 4))))
    assert float(jnp.max(jnp.abs(got.drift_power))) == 0


@pytest.fixture
def gram_flags(monkeypatch):
    """Whether each chunk computed a Gram matrix."""
    flags = []
    add_chunk = moments_lib._add_chunk

    def counting(geometry, with_gram, *arguments):
        flags.append(with_gram)
        return add_chunk(geometry, with_gram, *arguments)

    monkeypatch.setattr(moments_lib, "_add_chunk", counting)
    return flags


@pytest.mark.slow
def test_layers_fed_by_the_same_tensor_share_its_gram_but_not_their_drift(gram_flags):
    collector = moments_lib.Collector()
    inputs, float_inputs = normal((1, 5, 3), 0), normal((1, 5, 3), 1)
    for seed, geometry in enumerate([DENSE, layers_lib.Geometry((3, 2)), DENSE]):
        kernel = normal(geometry.kernel_shape, seed)
        got = collector.collect(geometry, kernel, float_inputs, inputs)
        rows = np.asarray(inputs, np.float64)
        float_rows = np.asarray(float_inputs, np.float64)
        assert_moments(
            got, expected_moments(rows, float_rows, np.asarray(kernel, np.float64))
        )
    assert gram_flags == [True, False, False]


@pytest.mark.slow
def test_another_tensor_or_another_window_has_its_own_gram(gram_flags):
    collector = moments_lib.Collector()
    inputs, kernel = normal((1, 7, 4), 0), normal((2, 2, 6), 1)
    wider = layers_lib.Geometry(
        (2, 2, 6), strides=(1,), dilation=(1,), padding="VALID", groups=2
    )
    collector.collect(GROUPED, kernel, inputs, inputs)
    collector.collect(wider, kernel, inputs, inputs)
    equal = jnp.array(inputs)
    collector.collect(wider, kernel, equal, equal)
    assert gram_flags == [True, True, True]


def test_a_result_is_remembered_for_the_same_arrays_and_equal_numbers():
    calls = []

    @moments_lib.Remembered
    def double(x, factor):
        calls.append(factor)
        return x * factor

    x, equal = normal((2, 3), 0), normal((2, 3), 0)
    first = double(x, 2.0)
    assert double(x, 2.0) is first and calls == [2.0]
    assert double(x, float("2")) is first and calls == [2.0]
    assert double(equal, 2.0) is not first
    assert double(equal, 3.0) is not first and calls == [2.0, 2.0, 3.0]
    # Only the last one is kept.
    assert double(x, 2.0) is not first


@pytest.mark.slow
def test_half_precision_inputs_are_summed_in_float32():
    """Sums of 4096 ones in bfloat16 stop at 256."""
    inputs = jnp.ones((4096, 3), jnp.bfloat16)
    geometry = layers_lib.Geometry((3, 4), dtype="bfloat16")
    kernel = normal((3, 4), 0)
    got = moments_lib.Collector().collect(geometry, kernel, inputs, inputs)
    np.testing.assert_array_equal(got.gram, np.full((1, 3, 3), 4096.0))
    assert got.drift.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 3])
def test_per_group_is_the_function_of_each_group(groups):
    matrices, vectors = normal((groups, 2, 3), 0), normal((groups, 3), 1)

    def function(matrix, vector):
        return {"product": matrix @ vector, "sum": jnp.sum(vector)}

    got = jax.jit(lambda m, v: moments_lib.per_group(function, m, v))(matrices, vectors)
    for group in range(groups):
        expected = np.asarray(matrices[group]) @ np.asarray(vectors[group])
        np.testing.assert_allclose(got["product"][group], expected, rtol=1e-5)
        np.testing.assert_allclose(
            got["sum"][group], vectors[group].sum(), rtol=1e-5, atol=1e-6
        )
    assert got["sum"].shape == (groups,)
