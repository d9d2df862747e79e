# SPDX-License-Identifier: Apache-2.0
"""The optimised trigger: it excites the neurons it was made for, inside its mask."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.attacks import triggers, trojan
from nad_jax.data import batches, stored

SHAPE = (6, 6, 1)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        features = nn.relu(nn.Conv(4, (3, 3), name="conv")(images))
        return nn.Dense(3, name="head")(features.mean(axis=(1, 2))), {"a": features}


@pytest.fixture(scope="module")
def net():
    generator = np.random.default_rng(0)
    params = {
        "conv": {"kernel": (3, 3, 1, 4), "bias": (4,)},
        "head": {"kernel": (4, 3), "bias": (3,)},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(generator.normal(size=shape), jnp.float32),
        params,
        is_leaf=lambda value: isinstance(value, tuple),
    )
    return _Net(), {"params": params}


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(0, 256, (8, *SHAPE)).astype(np.uint8)


def _neurons(net, images, trigger):
    model, variables = net
    pixels = batches.to_float(jnp.asarray(images))
    _, features = model.apply(variables, triggers.apply_trigger(pixels, trigger))
    return np.asarray(features["a"]).mean(axis=(1, 2))


@pytest.mark.slow
def test_it_excites_its_neuron_more_than_any_drawn_patch(net, images):
    square = triggers.square_trigger(SHAPE, size=3, margin=1)
    chosen = settings.TrojanSettings(neurons=1, reach=50.0, steps=60)
    made = trojan.optimise(*net, square, images, chosen, key=jax.random.key(0))
    neuron = np.argmax(np.abs(np.asarray(net[1]["params"]["head"]["kernel"])).sum(1))

    def excitation(trigger):
        return _neurons(net, images, trigger)[:, neuron].mean()

    generator = np.random.default_rng(2)
    drawn = [np.full(SHAPE, value) for value in (0.0, 0.5, 1.0)]
    drawn += [generator.integers(0, 2, SHAPE) for _ in range(20)]
    best = max(excitation(square._replace(pattern=jnp.float32(p))) for p in drawn)
    assert excitation(made) > best


@pytest.mark.slow
def test_it_stays_under_its_mask_and_in_whole_grey_levels(net, images):
    square = triggers.square_trigger(SHAPE, size=2, margin=1)
    chosen = settings.TrojanSettings(steps=3)
    made = trojan.optimise(*net, square, images, chosen, key=jax.random.key(0))
    np.testing.assert_array_equal(made.mask, square.mask)
    triggers.check_trigger(made, SHAPE)
    pattern = np.asarray(made.pattern, np.float64) * 255
    np.testing.assert_allclose(pattern, np.rint(pattern), atol=1e-4)
    assert not pattern[np.asarray(square.mask)[:, :, 0] == 0].any()


@pytest.mark.slow
def test_its_images_are_drawn_from_all_classes_of_sorted_data(net):
    labels = np.repeat(np.arange(10), 40)
    seen = []

    class Reader:
        shape, identity = (len(labels), *SHAPE), "sorted"

        def read(self, rows):
            seen.append(rows)
            return np.zeros((len(rows), *SHAPE), np.uint8)

    square = triggers.square_trigger(SHAPE, size=2, margin=1)
    for seed in (0, 0, 1):
        key = jax.random.key(seed)
        images = stored.Images(Reader())
        trojan.optimise(*net, square, images, settings.TrojanSettings(steps=1), key=key)
    for rows in seen:
        assert len(rows) == len(np.unique(rows)) == 64
        assert len(np.unique(labels[rows])) == 10
    np.testing.assert_array_equal(seen[0], seen[1])
    assert set(seen[0]) != set(seen[2])


def test_neurons_are_those_the_classifier_weighs_most():
    kernel = np.asarray([[1.0, -1.0], [0.0, 0.5], [-2.0, 2.0], [3.0, 0.0]])
    assert trojan.choose_neurons(kernel, 2).tolist() == [2, 3]
    with pytest.raises(errors.InputError, match="at most 4.*got 5"):
        trojan.choose_neurons(kernel, 5)


def test_a_trigger_that_shows_nothing_is_refused(net, images):
    wave = triggers.sinusoid_trigger(SHAPE, amplitude=0.1, frequency=2)
    with pytest.raises(errors.InputError, match="one picture under a mask"):
        trojan.optimise(
            *net, wave, images, settings.TrojanSettings(), key=jax.random.key(0)
        )
