# SPDX-License-Identifier: Apache-2.0
"""The adversarial change stays small and makes images harder."""

import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.attacks import clean_label

WEIGHTS = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)


def _logits(images):
    return images.reshape(images.shape[0], -1) @ jnp.asarray(WEIGHTS)


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(1)
    return generator.integers(0, 256, (5, 2, 2, 3)).astype(np.uint8)


def _loss(images, labels):
    logits = images.reshape(len(images), -1).astype(np.float64) / 255 @ WEIGHTS
    logits -= logits.max(axis=1, keepdims=True)
    rows = np.arange(len(labels))
    return np.log(np.exp(logits).sum(axis=1)) - logits[rows, labels]


@pytest.mark.slow
def test_every_image_gets_harder_within_the_radius(images):
    labels = np.asarray([0, 1, 2, 0, 1])
    before = images.copy()
    changed = clean_label.perturb(
        _logits, images, labels, radius=8.5 / 255, num_steps=5
    )
    np.testing.assert_array_equal(images, before)
    distance = np.abs(changed.astype(int) - images.astype(int))
    assert changed.dtype == np.uint8 and distance.max() == 8
    assert np.all(_loss(changed, labels) > _loss(images, labels))


@pytest.mark.slow
def test_a_linear_model_is_fooled_as_far_as_it_goes():
    """Two classes: the best change is the radius times the sign of their difference."""
    images = np.full((1, 2, 2, 3), 128, np.uint8)
    two = WEIGHTS[:, :2]
    changed = clean_label.perturb(
        lambda x: x.reshape(x.shape[0], -1) @ jnp.asarray(two),
        images,
        np.asarray([0]),
        radius=4 / 255,
        num_steps=4,
    )
    expected = 128 + 4 * np.sign(two[:, 1] - two[:, 0])
    np.testing.assert_array_equal(changed.ravel(), expected)


@pytest.mark.parametrize("radius", [-0.1, 0.003, 1.1])
def test_a_change_of_less_than_a_grey_level_is_refused(radius):
    with pytest.raises(errors.InputError, match=f"stored in 255 steps.*{radius}"):
        settings_of(radius)


def test_no_change_and_one_grey_level_are_accepted():
    assert [settings_of(r).perturbation for r in (0.0, 1 / 255)] == [0.0, 1 / 255]


def settings_of(radius):
    return settings.PoisoningSettings(
        settings.TriggerSettings("grid"), label_mode="clean_label", perturbation=radius
    )
