# SPDX-License-Identifier: Apache-2.0
"""Mode connectivity: the curve, its ends, and statistics measured where it is used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import settings
from nad_jax.data import batches
from nad_jax.defenses import base, mode_connectivity

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def plain(tuning):
    """One batch of all images, not augmented, so that statistics are exact."""
    training = dataclasses.replace(tuning.training, batch_size=48, crop_padding=0)
    return dataclasses.replace(tuning, training=training)


def _run(victim, clean_data, tuning, other_variables, position, tolerance=0.0):
    return mode_connectivity.run(
        victim,
        clean_data,
        tuning,
        settings.ModeConnectivitySettings(
            (position,) if isinstance(position, float) else position,
            learning_rate=0.1,
            accuracy_tolerance=tolerance,
        ),
        key=KEY,
        tuned=base.Net(victim.model, other_variables),
    ).variables


@pytest.mark.slow
def test_the_curve_by_hand():
    start, bend, end = (jnp.asarray(value) for value in (1.0, 10.0, 3.0))
    for position, expected in ((0.0, 1.0), (0.5, 6.0), (1.0, 3.0), (0.1, 2.64)):
        point = mode_connectivity.on_curve(start, bend, end, jnp.asarray(position))
        np.testing.assert_allclose(point, expected, rtol=1e-6)


@pytest.mark.slow
def test_the_ends_are_the_two_nets(
    victim, clean_data, plain, other_variables, assert_same
):
    for position, expected in ((0.0, victim.variables), (1.0, other_variables)):
        result = _run(victim, clean_data, plain, other_variables, position)
        assert_same(result["params"], expected["params"])


@pytest.mark.slow
def test_in_between_the_bend_was_trained(victim, clean_data, plain, other_variables):
    result = _run(victim, clean_data, plain, other_variables, 0.5)["params"]
    straight = jax.tree.map(
        lambda a, b: (a + b) / 2, victim.variables["params"], other_variables["params"]
    )
    gap = np.abs(result["head"]["kernel"] - straight["head"]["kernel"]).max()
    assert gap > 1e-3


@pytest.mark.slow
def test_statistics_belong_to_the_point(victim, clean_data, plain, other_variables):
    """Mean and variance of what the BatchNorm sees with these very weights."""
    result = _run(victim, clean_data, plain, other_variables, 0.3)
    images = batches.to_float(jnp.asarray(clean_data.images))
    _, seen = victim.model.apply(
        result, images, train=False, capture_intermediates=True, mutable=True
    )
    inputs = np.asarray(seen["intermediates"]["late"]["__call__"][0], np.float64)
    stats = result["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], inputs.mean((0, 1, 2)), rtol=1e-4)
    np.testing.assert_allclose(stats["var"], inputs.var((0, 1, 2)), rtol=1e-4)


@pytest.mark.slow
def test_held_out_accuracy_decides_how_far_to_go(
    victim, clean_data, plain, other_variables, assert_same
):
    """The furthest point that is good enough, whatever the order they come in."""
    positions = (1.0, 0.0, 0.5)

    def params(*arguments):
        return _run(victim, clean_data, plain, other_variables, *arguments)["params"]

    accuracy = base.validation_accuracy(victim, clean_data)
    points = {
        position: _run(victim, clean_data, plain, other_variables, position)
        for position in positions
    }
    best = max(positions, key=lambda position: accuracy(points[position]))
    assert len({accuracy(point) for point in points.values()}) == 3
    assert_same(params(positions), points[best]["params"])
    assert_same(params(positions, 1.0), points[1.0]["params"])
