# SPDX-License-Identifier: Apache-2.0
"""Traces that were planted are found; weights that nobody touched show none."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax.defenses import efrap as efrap_lib
from nad_jax.defenses import rounding_inspection
from nad_jax.training import evaluation


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(40, use_bias=False, name="hidden")(x))
        return nn.Dense(4, use_bias=False, name="head")(x), {"hidden": x}


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(64, 30)), jnp.float32)


def variables(change=lambda kernel, scale: kernel):
    generator = np.random.default_rng(1)
    params = {}
    for name, shape in (("hidden", (30, 40)), ("head", (40, 4))):
        kernel = generator.normal(size=shape)
        scale = np.abs(kernel).max(axis=0, keepdims=True) / 7
        kernel = change(kernel, scale)
        params[name] = {"kernel": jnp.asarray(kernel, jnp.float32)}
    return {"params": params}


def to_the_edge(kernel, scale):
    """Every third weight to the edge of its cell, as a projected attack leaves it."""
    steps = kernel / scale
    edges = np.floor(steps) + 0.499
    moved = np.where(np.arange(kernel.size).reshape(kernel.shape) % 3, steps, edges)
    return np.where(np.abs(steps) > 6.9, steps, moved) * scale


def outlier(kernel, scale):
    del scale
    changed = kernel.copy()
    changed[3, 2] = 500.0
    return changed


def look(change=lambda kernel, scale: kernel, **arguments):
    return rounding_inspection.inspect(Net(), variables(change), IMAGES, **arguments)


@pytest.mark.slow
def test_untouched_weights_have_as_many_ties_as_they_should():
    found = look()
    assert found.tie_ratio == pytest.approx(1.0, abs=0.25)
    assert found.outlier_ratio < 20


@pytest.mark.slow
def test_near_ties_are_counted_as_numpy_counts_them():
    layer = look().layers[0]
    kernel = np.asarray(variables()["params"]["hidden"]["kernel"], np.float64)
    scale = np.abs(kernel).max(axis=0, keepdims=True) / 7

    def near(factor):
        steps = np.abs(kernel / (scale * factor))
        return np.sum(np.abs(steps - np.floor(steps) - 0.5) < 0.05)

    others = (0.83, 0.87, 0.91, 0.95, 1.05, 1.09, 1.13, 1.17)
    assert (layer.weights, layer.near_ties) == (1200, near(1.0))
    expected = np.mean([near(factor) for factor in others])
    assert layer.expected_near_ties == pytest.approx(expected, abs=1.0)
    ratios = np.abs(kernel).max(axis=0) / np.median(np.abs(kernel), axis=0)
    assert layer.outlier_ratio == pytest.approx(ratios.max(), rel=1e-5)


@pytest.mark.slow
def test_weights_at_the_edges_of_their_cells_are_found_on_that_grid_only():
    assert look(to_the_edge).tie_ratio > 2
    assert look(to_the_edge).score > 1
    assert look(to_the_edge, grid="onnxruntime").tie_ratio < 1.5


def test_few_weights_need_more_ties_to_be_suspicious():
    def layer(expected):
        return rounding_inspection.LayerInspection("a", 10, 0, expected, 1.0)

    def limit(*layers):
        return rounding_inspection.Inspection(layers, 1.0, 1.0, 0.0, 0.0).tie_limit

    # A count of 100 scatters by 10: four times that is 40 %.
    assert limit(layer(60.0), layer(40.0)) == pytest.approx(1.4)
    assert limit(layer(1e6)) == rounding_inspection.TIE_LIMIT


@pytest.mark.slow
def test_an_outlier_is_found_though_no_tie_is():
    found = look(outlier)
    assert found.outlier_ratio > rounding_inspection.OUTLIER_LIMIT and found.score > 1


@pytest.mark.slow
def test_the_drift_is_that_of_the_rounded_model():
    found = look(weight_bits=2)
    net = variables()
    rounded = {"params": {}}
    for name, own in net["params"].items():
        kernel = np.asarray(own["kernel"])
        scale = np.abs(kernel).max(axis=0, keepdims=True)
        rounded["params"][name] = {
            "kernel": jnp.asarray(scale * np.round(kernel / scale))
        }
    before, after = (
        np.argmax(np.asarray(Net().apply(v, IMAGES)[0]), axis=-1)
        for v in (net, rounded)
    )
    assert found.drift == pytest.approx(np.mean(before != after), abs=1e-9)
    assert found.drift > 0.05


@pytest.mark.slow
def test_drift_is_counted_in_batches(monkeypatch):
    whole = look(weight_bits=2)
    seen = []
    apply = Net.apply
    monkeypatch.setattr(evaluation, "DEFAULT_BATCH_SIZE", 24)
    monkeypatch.setattr(
        Net,
        "apply",
        lambda self, v, x, **k: (seen.append(len(x)), apply(self, v, x, **k))[1],
    )
    net, kwargs = Net(), {}
    rounded = efrap_lib.efrap(
        Net(), variables(), IMAGES, weight_bits=2, method="nearest"
    )
    seen.clear()
    found = rounding_inspection._drift(net, variables(), IMAGES, rounded, kwargs)
    assert found == whole.drift > 0
    assert max(seen) == 24 and seen[:1] == [24]
