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
from nad_jax.training import state as state_lib

KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def plain(tuning):
    """One batch of all images, not augmented, so that statistics are exact."""
    training = dataclasses.replace(tuning.training, batch_size=48, crop_padding=0)
    return dataclasses.replace(tuning, training=training)


def _run(*arguments):
    return _defended(*arguments).variables


def _defended(victim, clean_data, tuning, other_variables, position, tolerance=0.0):
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
    )


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
@pytest.mark.parametrize("momentum", [0.0, 0.8, 0.99])
def test_statistics_belong_to_the_point(
    victim, clean_data, plain, other_variables, momentum
):
    """Mean and variance of what the BatchNorm sees with these very weights."""
    victim = victim._replace(model=type(victim.model)(momentum))
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
def test_statistics_are_means_over_batches(victim, clean_data, plain, monkeypatch):
    """Of other images each, varied with keys that no training of this key draws."""
    seen = []

    def make_batch(training):
        def batch_of(key, images, labels):
            pixels = batches.to_float(images)
            late = victim.model.apply(
                victim.variables, pixels, capture_intermediates=True, mutable=True
            )[1]["intermediates"]["late"]["__call__"][0]
            found = (
                jax.random.key_data(key),
                late.mean((0, 1, 2)),
                late.var((0, 1, 2)),
            )
            jax.debug.callback(lambda *values: seen.append(values), *found)
            return {"images": pixels, "labels": labels}

        return batch_of

    monkeypatch.setattr(mode_connectivity.augmentation, "make_batch", make_batch)
    training = dataclasses.replace(plain.training, batch_size=12)
    measured = mode_connectivity._measure_statistics(victim, clean_data, training, KEY)
    jax.effects_barrier()
    keys, means, variances = (np.stack(values) for values in zip(*seen, strict=True))
    assert len(np.unique(means, axis=0)) == len(np.unique(keys, axis=0)) == len(seen)
    stats = measured["batch_stats"]["norm"]
    np.testing.assert_allclose(stats["mean"], means.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(stats["var"], variances.mean(0), rtol=1e-4)
    purposes = [
        v for name, v in vars(state_lib).items() if name.isupper() and type(v) is int
    ]
    assert len(set(purposes)) == len(purposes)
    of_training = jax.vmap(lambda purpose: jax.random.fold_in(KEY, purpose))(
        jnp.asarray(purposes)
    )
    taken = np.asarray(jax.random.key_data(of_training)).tolist()
    assert not [key for key in keys.tolist() if key in taken]


@pytest.mark.slow
def test_statistics_that_never_move_stay(victim, clean_data, plain):
    """Those of frozen layers; by its own rule momentum 1 keeps them, too."""
    net = victim._replace(model=type(victim.model)(1.0))
    measured = mode_connectivity._measure_statistics(
        net, clean_data, plain.training, KEY
    )
    kept = victim.variables["batch_stats"]["norm"]
    for name, values in measured["batch_stats"]["norm"].items():
        np.testing.assert_array_equal(values, kept[name])


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
    result = _defended(victim, clean_data, plain, other_variables, positions)
    assert result.chosen == {"position": best}
