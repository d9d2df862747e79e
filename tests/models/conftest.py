# SPDX-License-Identifier: Apache-2.0
"""Layers in float64 NumPy, written from their definitions, as oracle for the models."""

import math
import types

import jax
import numpy as np
import pytest


def _conv(x, kernel, *, stride=1):
    """Cross-correlation, zero padding (size - 1) / 2 on every side; kernel HWIO."""
    size = kernel.shape[0]
    pad = (size - 1) // 2
    batch, height, width, channels = x.shape
    padded = np.zeros((batch, height + 2 * pad, width + 2 * pad, channels))
    padded[:, pad : pad + height, pad : pad + width] = x
    out_height = (height + 2 * pad - size) // stride + 1
    out_width = (width + 2 * pad - size) // stride + 1
    out = np.zeros((batch, out_height, out_width, kernel.shape[3]))
    for row in range(out_height):
        for column in range(out_width):
            top, left = row * stride, column * stride
            window = padded[:, top : top + size, left : left + size]
            out[:, row, column] = np.tensordot(window, kernel, axes=3)
    return out


def _max_pool(x):
    """The largest of 3 x 3 pixels around every second pixel; outside there are none."""
    batch, height, width, channels = x.shape
    out = np.zeros((batch, (height + 1) // 2, (width + 1) // 2, channels))
    for row in range(out.shape[1]):
        for column in range(out.shape[2]):
            top, left = max(0, 2 * row - 1), max(0, 2 * column - 1)
            window = x[:, top : 2 * row + 2, left : 2 * column + 2]
            out[:, row, column] = window.max(axis=(1, 2))
    return out


def _batch_norm(x, params, stats):
    centred = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5)
    return centred * params["scale"] + params["bias"]


def _layer_norm(x, params):
    mean = x.mean(axis=-1, keepdims=True)
    var = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-6) * params["scale"] + params["bias"]


def _dense(x, params):
    return x @ params["kernel"] + params["bias"]


def _relu(x):
    return np.maximum(x, 0.0)


def _gelu(x):
    return x * 0.5 * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))


@pytest.fixture(scope="session")
def oracle():
    """The float64 layers under their usual names."""
    return types.SimpleNamespace(
        conv=_conv,
        max_pool=_max_pool,
        batch_norm=_batch_norm,
        layer_norm=_layer_norm,
        dense=_dense,
        relu=_relu,
        gelu=_gelu,
    )


_EMBEDDINGS = ("position_embedding", "class_token")


@pytest.fixture(scope="session")
def trained_looking():
    """Replaces fresh variables by random ones: no scale, bias or mean stays idle.

    The leaves are NumPy's, so that the oracle does not fall into JAX's float32.
    """

    def randomise(variables):
        generator = np.random.default_rng(0)

        def draw(path, leaf):
            if path[-1].key in ("scale", "var"):
                values = generator.uniform(0.5, 1.5, leaf.shape)
            elif path[-1].key in ("bias", "mean", *_EMBEDDINGS):
                values = generator.normal(0.0, 0.3, leaf.shape)
            else:
                values = generator.normal(0.0, np.asarray(leaf).std(), leaf.shape)
            return values.astype(np.float32)

        return jax.tree_util.tree_map_with_path(draw, variables)

    return randomise


@pytest.fixture(scope="session")
def assert_forward_equal():
    """Logits and stages of a model against the oracle's, to 1e-5 of their size."""

    def check(model, variables, images, expected_logits, expected_features):
        logits, features = jax.jit(model.apply)(variables, images.astype(np.float32))
        assert list(features) == list(expected_features)
        pairs = [(logits, expected_logits)]
        pairs += [(features[name], expected_features[name]) for name in features]
        for actual, expected in pairs:
            np.testing.assert_allclose(
                actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max()
            )

    return check
