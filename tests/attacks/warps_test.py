# SPDX-License-Identifier: Apache-2.0
"""Warps: where each pixel comes from, against a loop over pixels in float64."""

import jax
import numpy as np
import pytest

from nad_jax.attacks import warps


def _bend_by_hand(image, field):
    """Bilinear interpolation with clamped borders, one pixel at a time."""
    height, width, _ = image.shape
    bent = np.zeros(image.shape, np.float64)
    for row in range(height):
        for column in range(width):
            y = min(max(row + field[row, column, 0], 0.0), height - 1.0)
            x = min(max(column + field[row, column, 1], 0.0), width - 1.0)
            for r in {int(np.floor(y)), min(int(np.floor(y)) + 1, height - 1)}:
                for c in {int(np.floor(x)), min(int(np.floor(x)) + 1, width - 1)}:
                    share = max(0.0, 1 - abs(y - r)) * max(0.0, 1 - abs(x - c))
                    bent[row, column] += share * image[r, c]
    return bent


@pytest.mark.slow
def test_each_pixel_is_fetched_from_between_its_neighbours():
    generator = np.random.default_rng(0)
    images = generator.random((3, 5, 7, 2)).astype(np.float32)
    fields = generator.uniform(-2, 2, (3, 5, 7, 2)).astype(np.float32)
    bent = jax.jit(warps.bend)(images, fields)
    for image, field, result in zip(images, fields, bent, strict=True):
        expected = _bend_by_hand(image.astype(np.float64), field)
        np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.slow
def test_a_field_of_whole_pixels_shifts_down_and_right():
    image = np.arange(12, dtype=np.float32).reshape(1, 3, 4, 1)
    field = np.zeros((3, 4, 2), np.float32)
    field[..., 0], field[..., 1] = 1, 2
    bent = np.asarray(warps.bend(image, field))[0, :, :, 0]
    expected = [[6, 7, 7, 7], [10, 11, 11, 11], [10, 11, 11, 11]]
    np.testing.assert_array_equal(bent, expected)


@pytest.mark.slow
def test_no_displacement_changes_nothing():
    images = np.random.default_rng(1).random((2, 4, 4, 3)).astype(np.float32)
    bent = warps.bend(images, np.zeros((4, 4, 2), np.float32))
    np.testing.assert_array_equal(bent, images)


@pytest.mark.slow
@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_the_field_is_smooth_and_as_strong_as_asked(strength):
    field = np.asarray(
        warps.elastic_field(
            (32, 32, 3), grid_size=4, strength=strength, key=jax.random.key(3)
        )
    )
    assert field.shape == (32, 32, 2)
    assert 0.5 * strength < np.abs(field).mean() < 1.5 * strength
    # Control points are 8 pixels apart and at most some strengths different.
    for axis in (0, 1):
        assert np.abs(np.diff(field, axis=axis)).max() < 0.75 * strength
