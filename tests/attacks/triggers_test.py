# SPDX-License-Identifier: Apache-2.0
import doctest

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nad_jax import errors
from nad_jax.attacks import triggers, warps

CIFAR = (32, 32, 3)

# Options that draw each registered trigger.
OPTIONS = {
    "blend": {"alpha": 0.2, "key": jax.random.key(0)},
    "four_corner": {},
    "grid": {},
    "reflection": {
        "opacity": 0.3,
        "count": 3,
        "ghost_rate": 0.5,
        "key": jax.random.key(0),
    },
    "sinusoid": {"amplitude": 20 / 255, "frequency": 6},
    "square": {"size": 3, "margin": 1},
    "warp": {"grid_size": 3, "strength": 1.0, "key": jax.random.key(0)},
}

apply_trigger = jax.jit(triggers.apply_trigger)


def random_images(seed=0, count=2, shape=CIFAR):
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)


def touched_pixels(trigger):
    """Rows and columns of the mask, as sorted lists."""
    rows, columns, _ = np.nonzero(np.asarray(trigger.mask))
    return sorted(set(rows.tolist())), sorted(set(columns.tolist()))


def test_every_registered_trigger_has_options_here():
    assert set(OPTIONS) == set(triggers.TRIGGERS)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [CIFAR, (8, 13, 1)])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_trigger_changes_images_and_keeps_them_images(name, shape):
    trigger = triggers.TRIGGERS[name](shape, **OPTIONS[name])
    assert triggers.check_trigger(trigger, shape) is trigger
    images = np.concatenate(
        [np.zeros((1, *shape)), np.ones((1, *shape)), random_images(shape=shape)]
    ).astype(np.float32)
    stamped = apply_trigger(images, trigger)
    assert stamped.shape == images.shape and stamped.dtype == jnp.float32
    assert stamped.min() >= 0 and stamped.max() <= 1
    change = np.abs(np.asarray(stamped) - images).max(axis=(1, 2, 3))
    # A white patch is invisible on the white image, and a plain one cannot be bent.
    assert change[0] > 0.05 or name == "warp"
    assert (change[2:] > 0.05).all()


@pytest.mark.parametrize(
    ("size", "margin", "first", "last"),
    [(3, 1, 28, 30), (4, 1, 27, 30), (6, 2, 24, 29)],
)
def test_squares_lie_where_the_published_attacks_put_them(size, margin, first, last):
    trigger = triggers.square_trigger(CIFAR, size=size, margin=margin)
    inside = list(range(first, last + 1))
    assert touched_pixels(trigger) == (inside, inside)
    images = random_images()
    expected = images.copy()
    expected[:, first : last + 1, first : last + 1] = 1.0
    np.testing.assert_array_equal(apply_trigger(images, trigger), expected)


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    height=strategies.integers(1, 9),
    width=strategies.integers(1, 9),
    size=strategies.integers(-1, 9),
    margin=strategies.integers(-1, 9),
)
def test_a_square_fits_or_is_refused(height, width, size, margin):
    """A slice that runs out of the image would silently draw less, or nothing."""
    shape = (height, width, 1)
    if size >= 1 and margin >= 0 and size + margin <= min(height, width):
        trigger = triggers.square_trigger(shape, size=size, margin=margin)
        assert np.sum(trigger.mask) == size**2
        assert touched_pixels(trigger)[0][-1] == height - 1 - margin
        assert touched_pixels(trigger)[1][-1] == width - 1 - margin
    else:
        with pytest.raises(errors.InputError, match=f"{height}x{width}"):
            triggers.square_trigger(shape, size=size, margin=margin)


def test_a_grey_square_hides_the_image_completely():
    trigger = triggers.square_trigger(CIFAR, size=2, margin=0, value=0.25)
    stamped = apply_trigger(random_images(), trigger)
    np.testing.assert_array_equal(stamped[:, 30:, 30:], 0.25)


def test_the_grid_is_the_checker_of_the_released_models():
    images = random_images()
    expected = images.copy()
    checker = np.asarray([[0, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)
    expected[:, 29:32, 29:32, :] = checker[:, :, None]
    stamped = apply_trigger(images, triggers.grid_trigger(CIFAR))
    np.testing.assert_array_equal(stamped, expected)


def test_four_corners_are_inset_at_top_and_left_only():
    trigger = triggers.four_corner_trigger(CIFAR)
    assert touched_pixels(trigger) == ([1, 2, 3, 29, 30, 31],) * 2
    grid = triggers.grid_trigger(CIFAR).pattern[29:, 29:]
    for rows in (slice(1, 4), slice(29, 32)):
        for columns in (slice(1, 4), slice(29, 32)):
            np.testing.assert_array_equal(trigger.pattern[rows, columns], grid)
    assert np.sum(trigger.mask) == 4 * 9


@pytest.mark.parametrize("name", ["square", "grid", "four_corner"])
def test_stamping_a_patch_twice_is_stamping_it_once(name):
    trigger = triggers.TRIGGERS[name](CIFAR, **OPTIONS[name])
    once = apply_trigger(random_images(), trigger)
    np.testing.assert_array_equal(apply_trigger(once, trigger), once)


@pytest.mark.slow
def test_a_blend_mixes_one_fixed_noise_picture_into_every_image():
    trigger = triggers.blend_trigger(CIFAR, alpha=0.2, key=jax.random.key(1))
    images = random_images(count=3)
    noise = (
        np.asarray(apply_trigger(images, trigger), np.float64) - 0.8 * images
    ) / 0.2
    np.testing.assert_allclose(noise[0], noise[2], atol=1e-5)
    assert 0.25 < noise.std() < 0.33  # uniform on [0, 1): 0.289
    other = triggers.blend_trigger(CIFAR, alpha=0.2, key=jax.random.key(2))
    again = triggers.blend_trigger(CIFAR, alpha=0.2, key=jax.random.key(1))
    assert (other.pattern != trigger.pattern).any()
    np.testing.assert_array_equal(again.pattern, trigger.pattern)


@pytest.mark.slow
def test_the_sinusoid_is_added_and_clipped():
    trigger = triggers.sinusoid_trigger((4, 24, 2), amplitude=0.1, frequency=3)
    images = random_images(shape=(4, 24, 2))
    wave = 0.1 * np.sin(2 * np.pi * np.arange(24) * 3 / 24).reshape(1, 1, 24, 1)
    expected = np.clip(images.astype(np.float64) + wave, 0, 1)
    np.testing.assert_allclose(apply_trigger(images, trigger), expected, atol=1e-6)
    assert (expected == 1).any() and wave.min() < 0


@pytest.mark.slow
def test_an_additive_trigger_can_be_removed_where_nothing_was_clipped():
    trigger = triggers.sinusoid_trigger(CIFAR, amplitude=0.1, frequency=6)
    images = 0.25 + 0.5 * random_images()
    removed = apply_trigger(images, trigger) - np.asarray(trigger.offset)[None]
    np.testing.assert_allclose(removed, images, atol=1e-6)


@pytest.mark.slow
def test_a_reflection_is_chosen_by_the_sum_of_grey_levels():
    options = OPTIONS["reflection"]
    trigger = triggers.reflection_trigger((4, 5, 1), **options)
    generator = np.random.default_rng(2)
    stored = generator.integers(0, 256, (12, 4, 5, 1))
    images = (stored / 255).astype(np.float32)
    chosen = stored.sum(axis=(1, 2, 3)) % 3
    assert set(chosen) == {0, 1, 2}
    expected = 0.7 * images + 0.3 * np.asarray(trigger.pattern, np.float64)[chosen]
    np.testing.assert_allclose(apply_trigger(images, trigger), expected, atol=1e-6)


@pytest.mark.slow
def test_a_warp_bends_and_nothing_else():
    trigger = triggers.warp_trigger(CIFAR, **OPTIONS["warp"])
    images = random_images()
    expected = warps.bend(images, trigger.field)
    np.testing.assert_allclose(apply_trigger(images, trigger), expected, atol=1e-6)
    plain = np.full((1, *CIFAR), 0.3, np.float32)
    np.testing.assert_allclose(apply_trigger(plain, trigger), plain, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("name", ["square", "sinusoid"])
def test_images_keep_their_dtype(name, dtype):
    trigger = triggers.TRIGGERS[name](CIFAR, **OPTIONS[name])
    images = random_images().astype(dtype)
    stamped = apply_trigger(images, trigger)
    assert stamped.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(stamped, np.float32),
        apply_trigger(images.astype(np.float32), trigger),
        atol=0.01,
    )


@pytest.mark.slow
def test_stamping_maps_over_an_axis_of_triggers():
    squares = [triggers.square_trigger(CIFAR, size=n, margin=0) for n in (1, 5)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *squares)
    images = random_images()
    stamped = jax.vmap(apply_trigger, in_axes=(None, 0))(images, stacked)
    for i, square in enumerate(squares):
        np.testing.assert_array_equal(stamped[i], apply_trigger(images, square))


@pytest.mark.slow
def test_the_trigger_itself_can_be_optimised():
    """Trigger inversion needs a gradient of pattern, mask and offset."""
    trigger = triggers.sinusoid_trigger((4, 4, 1), amplitude=0.1, frequency=1)
    trigger = trigger._replace(mask=jnp.full((4, 4, 1), 0.5))
    images = 0.25 + 0.5 * random_images(shape=(4, 4, 1))
    gradient = jax.grad(lambda t: jnp.sum(triggers.apply_trigger(images, t)))(trigger)
    np.testing.assert_allclose(gradient.pattern, 1.0)  # two images, half opaque
    np.testing.assert_allclose(gradient.offset, 2.0)
    np.testing.assert_allclose(gradient.mask, -images.sum(axis=0), rtol=1e-6)


def test_the_gradient_is_halved_at_the_bounds_and_ends_beyond_them():
    """A black and a white pixel that the offset leaves alone; one that is clipped."""
    trigger = triggers.Trigger(
        pattern=jnp.zeros((1, 4, 1)),
        mask=jnp.zeros((1, 4, 1)),
        offset=jnp.asarray([0.0, 0.0, 0.5, 0.25])[None, :, None],
    )
    images = jnp.asarray([0.0, 1.0, 0.75, 0.5])[None, None, :, None]
    gradient = jax.grad(lambda x: jnp.sum(triggers.apply_trigger(x, trigger)))(images)
    np.testing.assert_array_equal(gradient.ravel(), [0.5, 0.5, 0.0, 1.0])


@pytest.mark.parametrize(
    ("name", "shape", "options", "message"),
    [
        ("grid", (2, 5, 3), {}, "at least 3x3, got 2x5"),
        ("four_corner", (6, 32, 3), {}, "at least 7x7, got 6x32"),
        ("square", (8, 8, 3), {"size": 7, "margin": 2}, "size 7 with margin 2"),
        ("square", (8, 8, 3), {"size": 1, "margin": 0, "value": 255}, "got 255"),
        ("blend", CIFAR, {"alpha": 1.5, "key": OPTIONS["blend"]["key"]}, "got 1.5"),
        ("sinusoid", CIFAR, {"amplitude": 20, "frequency": 6}, "amplitude.*got 20"),
        (
            "sinusoid",
            CIFAR,
            {"amplitude": float("nan"), "frequency": 6},
            "amplitude.*got nan",
        ),
        ("sinusoid", CIFAR, {"amplitude": 0.1, "frequency": 0}, "got 0"),
        (
            "sinusoid",
            (8, 12, 1),
            {"amplitude": 0.1, "frequency": 6},
            "frequency .* half the width, 6, got 6",
        ),
        ("warp", CIFAR, {**OPTIONS["warp"], "strength": 0.0}, "pixels, got 0.0"),
        ("warp", CIFAR, {**OPTIONS["warp"], "grid_size": 1}, "at least 2, got 1"),
        ("reflection", CIFAR, {**OPTIONS["reflection"], "count": 0}, "got 0"),
        ("reflection", CIFAR, {**OPTIONS["reflection"], "opacity": 2.0}, "got 2.0"),
        ("grid", (32, 32), {}, r"\(H, W, C\), all positive, got \(32, 32\)"),
        ("grid", (32, 32, 0), {}, r"got \(32, 32, 0\)"),
    ],
)
def test_drawing_errors_name_the_value(name, shape, options, message):
    with pytest.raises(errors.InputError, match=message):
        triggers.TRIGGERS[name](shape, **options)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("pattern", 2.0, r"pattern must have values in \[0, 1\], got 0.0 to 2.0"),
        ("pattern", np.nan, "pattern .* nan"),
        ("mask", -0.5, r"mask must have values in \[0, 1\], got -0.5"),
        ("offset", -1.5, r"offset must have values in \[-1, 1\], got -1.5"),
    ],
)
def test_a_picture_from_outside_is_checked_value_by_value(part, value, message):
    zeros = np.zeros((4, 4, 3), np.float32)
    trigger = triggers.Trigger(zeros, zeros[..., :1], zeros)
    broken = np.array(getattr(trigger, part))
    broken[1, 2, 0] = value
    with pytest.raises(errors.InputError, match=message):
        triggers.check_trigger(trigger._replace(**{part: broken}), (4, 4, 3))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((2, 32, 32, 3), np.uint8), "floating point, got dtype uint8"),
        (np.zeros(CIFAR, np.float32), "4 axes"),
        (np.zeros((2, 28, 28, 1), np.float32), r"pattern .* got \(32, 32, 3\)"),
    ],
)
def test_images_the_trigger_does_not_fit_are_refused(images, message):
    with pytest.raises(errors.InputError, match=message):
        apply_trigger(images, triggers.grid_trigger(CIFAR))


@pytest.mark.slow
def test_a_field_from_outside_is_finite():
    trigger = triggers.warp_trigger((4, 4, 3), **OPTIONS["warp"])
    broken = np.array(trigger.field)
    broken[0, 0, 0] = np.nan
    with pytest.raises(errors.InputError, match="field must be finite"):
        triggers.check_trigger(trigger._replace(field=broken), (4, 4, 3))


def test_a_mask_per_channel_is_refused():
    trigger = triggers.Trigger(jnp.zeros((4, 4, 3)), jnp.zeros((4, 4, 3)))
    with pytest.raises(errors.InputError, match=r"mask must have shape \(4, 4, 1\)"):
        apply_trigger(np.zeros((1, 4, 4, 3), np.float32), trigger)


@pytest.mark.slow
def test_docstring_examples_are_true():
    outcome = doctest.testmod(triggers)
    assert outcome.attempted > 0 and outcome.failed == 0
