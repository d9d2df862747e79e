# SPDX-License-Identifier: Apache-2.0
"""Reflections: blur and ghost by hand, and what is drawn."""

import jax
import numpy as np
import pytest

from nad_jax.attacks import reflections


def test_a_ghost_is_the_scene_twice():
    scene = np.zeros((4, 5, 1))
    scene[1, 1] = 1.0
    both = reflections.ghost(scene, shift=(1, 2), amount=0.0)
    expected = np.zeros((4, 5, 1))
    expected[1, 1] = expected[2, 3] = 0.5
    np.testing.assert_allclose(both, expected)


def test_blur_is_a_gaussian_in_space():
    """One bright pixel becomes the density, sampled where it is smooth enough."""
    scene = np.zeros((32, 32, 1))
    scene[16, 16] = 1.0
    blurred = reflections.blur(scene, sigma=2.0)[:, :, 0]
    rows, columns = np.indices((32, 32)) - 16
    density = np.exp(-(rows**2 + columns**2) / 8.0) / (8.0 * np.pi)
    np.testing.assert_allclose(blurred, density, atol=1e-6)


@pytest.mark.slow
def test_ghosts_are_sharp_and_the_others_are_not():
    drawn = reflections.draw(
        (32, 32, 3), count=8, ghost_rate=0.5, key=jax.random.key(0)
    )
    assert drawn.shape == (8, 32, 32, 3) and drawn.dtype == np.float32
    np.testing.assert_allclose(drawn.min(axis=(1, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(drawn.max(axis=(1, 2, 3)), 1, atol=1e-6)
    edges = np.abs(np.diff(drawn, axis=1)).mean(axis=(1, 2, 3))
    assert edges[:4].min() > edges[4:].max()
