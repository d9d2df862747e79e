# SPDX-License-Identifier: Apache-2.0
"""Gram matrices of overlapping windows, against sums of outer products in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.defenses import moments as moments_lib
from nad_jax.defenses import window_gram
from nad_jax.models import layers as layers_lib
from nad_jax.training import sharding

# Kernel shape, padding, inputs.
CASES = {
    "same": ((3, 3, 5, 2), "SAME", (4, 6, 7, 5)),
    "torch": ((3, 3, 5, 2), ((1, 1), (1, 1)), (4, 6, 7, 5)),
    "valid": ((3, 3, 5, 2), "VALID", (4, 6, 7, 5)),
    "circular": ((3, 3, 2, 2), "CIRCULAR", (3, 4, 4, 2)),
    "reflected": ((3, 3, 2, 2), "REFLECT", (3, 4, 4, 2)),
    "even window": ((2, 4, 3, 1), "SAME", (3, 5, 4, 3)),
    "window wider than the image": ((5, 5, 2, 1), "SAME", (3, 2, 3, 2)),
    "one pixel": ((3, 3, 2, 2), "SAME", (3, 1, 1, 2)),
    "causal": ((3, 4, 2), "CAUSAL", (3, 9, 4)),
    "cropping": ((3, 4, 2), ((-1, 2),), (3, 9, 4)),
    "a row": ((1, 3, 2, 2), "SAME", (3, 4, 4, 2)),
    "volume": ((2, 3, 2, 2, 2), "SAME", (2, 4, 3, 4, 2)),
}


def geometry_of(kernel_shape, padding):
    ones = (1,) * (len(kernel_shape) - 2)
    return layers_lib.Geometry(
        kernel_shape, strides=ones, dilation=ones, padding=padding
    )


def gram_by_hand(geometry, inputs):
    """Sum of x x' over every window of every padded image."""
    images = np.asarray(layers_lib.padded(geometry, inputs), np.float64)
    window = geometry.window
    counts = [
        size - taps + 1 for size, taps in zip(images.shape[1:], window, strict=False)
    ]
    gram = 0.0
    for image in images:
        for start in itertools.product(*map(range, counts)):
            part = tuple(slice(s, s + w) for s, w in zip(start, window, strict=True))
            x = image[part].ravel()
            gram = gram + np.outer(x, x)
    return gram


@pytest.fixture(autouse=True)
def any_size(monkeypatch):
    monkeypatch.setattr(window_gram, "_LEAST_PRODUCTS", 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shared_sums_make_the_gram_matrix_of_all_windows(name):
    kernel_shape, padding, shape = CASES[name]
    geometry = geometry_of(kernel_shape, padding)
    assert window_gram.applies(geometry, shape[1:-1])
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    positions = shape[1:-1]
    with jax.disable_jit():
        sums = window_gram.shared_sums(geometry, inputs)
        assert sums.shape == window_gram.num_sums(geometry, positions)
        gram = window_gram.gram_matrix(geometry, positions, sums)
    np.testing.assert_allclose(gram, gram_by_hand(geometry, inputs), atol=1e-4)


def test_a_3x3_window_needs_13_distances_in_9_regions():
    geometry = geometry_of((3, 3, 64, 64), "SAME")
    assert window_gram.num_sums(geometry, (32, 32)) == (9, 64, 13, 64)


@pytest.mark.parametrize(
    "changes",
    [
        {"strides": (2, 2)},
        {"dilation": (2, 1)},
        {"groups": 2},
        {"kernel_shape": (1, 1, 5, 2)},
        {"kernel_shape": (7, 7, 5, 2)},
    ],
)
def test_windows_that_share_nothing_are_left_to_plain_products(changes):
    fields = {"strides": (1, 1), "dilation": (1, 1), "groups": 1}
    geometry = layers_lib.Geometry(
        **{"kernel_shape": (3, 3, 5, 2), "padding": "SAME", **fields, **changes}
    )
    assert not window_gram.applies(geometry, (8, 8))
    assert not window_gram.applies(layers_lib.Geometry((64, 3)), ())


def test_small_layers_are_not_worth_the_compilation(monkeypatch):
    monkeypatch.undo()
    of_digits = geometry_of((3, 3, 64, 64), "SAME")
    assert not window_gram.applies(of_digits, (4, 4))
    assert window_gram.applies(of_digits, (32, 32))


GEOMETRY = geometry_of((3, 3, 4, 2), "SAME")


def some_inputs(count):
    """Inputs, float inputs and a kernel."""
    generator = np.random.default_rng(1)
    return [
        jnp.asarray(generator.normal(size=shape), jnp.float32)
        for shape in ((count, 4, 4, 4), (count, 4, 4, 4), (3, 3, 4, 2))
    ]


@pytest.fixture
def calls(monkeypatch):
    """Images of each piece that was summed; pieces of one size are traced once."""
    calls = []
    shared_sums = window_gram.shared_sums

    def counting(geometry, inputs):
        calls.append(inputs.shape[0])
        return shared_sums(geometry, inputs)

    monkeypatch.setattr(window_gram, "shared_sums", counting)
    moments_lib._add_chunk.clear_cache()
    return calls


@pytest.mark.slow
def test_the_collector_uses_them_in_chunks_and_once_per_tensor(monkeypatch, calls):
    # The sums have 9 * 4 * 13 * 4 values, an unfolded image 16 * 36: 3 images a chunk.
    monkeypatch.setattr(moments_lib, "_UNFOLDED_BYTES", 1)
    inputs, float_inputs, kernel = some_inputs(5)
    collector = moments_lib.Collector()
    first = collector.collect(GEOMETRY, kernel, float_inputs, inputs)
    expected = gram_by_hand(GEOMETRY, inputs)
    np.testing.assert_allclose(first.gram[0], expected, atol=1e-4)
    assert calls == [3, 2]
    again = collector.collect(GEOMETRY, kernel + 1.0, float_inputs, inputs)
    assert calls == [3, 2]
    np.testing.assert_array_equal(again.gram, first.gram)
    assert not np.allclose(again.drift, first.drift)


@pytest.mark.slow
def test_devices_add_up_the_sums_of_their_own_images(monkeypatch, calls):
    monkeypatch.setattr(moments_lib, "_UNFOLDED_BYTES", 1)
    mesh = sharding.mesh_for_batch(8)
    assert mesh is not None and mesh.size > 1
    inputs, float_inputs, kernel = some_inputs(8)
    whole = moments_lib.Collector().collect(GEOMETRY, kernel, float_inputs, inputs)
    calls.clear()
    split = moments_lib.Collector(mesh).collect(
        GEOMETRY,
        sharding.replicate(kernel, mesh),
        *(sharding.shard_batch(x, mesh) for x in (float_inputs, inputs)),
    )
    assert calls and max(calls) <= 8 // mesh.size
    for name in whole._fields:
        np.testing.assert_allclose(
            getattr(split, name), getattr(whole, name), atol=1e-4, err_msg=name
        )
    np.testing.assert_allclose(split.gram[0], gram_by_hand(GEOMETRY, inputs), atol=1e-4)
