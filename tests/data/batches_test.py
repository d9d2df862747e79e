# SPDX-License-Identifier: Apache-2.0
"""Batches and augmentation, against what NumPy slicing says they should be."""

import doctest
import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.data import batches

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnames=("pad", "flip", "cutout"))
def augment(key, images, **options):
    """Each image at a view drawn from the key."""
    return batches.show_views(
        batches.draw_views(key, images.shape[0]), images, **options
    )


# Exact fit, a tail, one batch too large, single examples.
SIZES = [(12, 4), (13, 4), (3, 5), (1, 1), (7, 1)]


@pytest.mark.slow
def test_docstring_examples_are_true():
    result = doctest.testmod(batches)
    assert result.attempted and not result.failed


@pytest.mark.slow
def test_to_float_is_in_the_unit_interval_and_reversible():
    stored = jnp.arange(256, dtype=jnp.uint8)
    for function in (batches.to_float, jax.jit(batches.to_float)):
        images = function(stored)
        assert images.dtype == jnp.float32
        np.testing.assert_allclose(images, np.arange(256) / 255, rtol=2e-7)
        assert (float(images.min()), float(images.max())) == (0.0, 1.0)
        np.testing.assert_array_equal(np.rint(np.asarray(images) * 255), stored)


# --- indices ---


@pytest.mark.slow
@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES[1:4])
def test_an_epoch_is_a_shuffle_cut_into_equal_batches(num_examples, batch_size):
    indices = np.asarray(batches.epoch_indices(KEY, 0, num_examples, batch_size))
    size = min(batch_size, num_examples)
    assert indices.shape == (num_examples // size, size)
    assert len(set(indices.ravel())) == indices.size
    assert indices.min() >= 0 and indices.max() < num_examples


@pytest.mark.slow
def test_epochs_differ_and_are_repeatable_also_when_traced():
    traced = jax.jit(batches.epoch_indices, static_argnums=(2, 3))
    epochs = [np.asarray(batches.epoch_indices(KEY, n, 100, 10)) for n in range(3)]
    for n, epoch in enumerate(epochs):
        assert sorted(epoch.ravel()) == list(range(100))
        np.testing.assert_array_equal(traced(KEY, jnp.int32(n), 100, 10), epoch)
        assert (epoch != epochs[n - 1]).mean() > 0.9
    other = np.asarray(batches.epoch_indices(jax.random.key(1), 0, 100, 10))
    assert (other != epochs[0]).mean() > 0.9


@pytest.mark.slow
def test_the_examples_dropped_differ_from_epoch_to_epoch():
    dropped = set()
    draw = jax.jit(batches.epoch_indices, static_argnums=(2, 3))
    for epoch in range(30):
        used = np.asarray(draw(KEY, epoch, 10, 4))
        dropped |= set(range(10)) - set(used.ravel().tolist())
    assert dropped == set(range(10))


@pytest.mark.slow
@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_evaluation_counts_every_example_exactly_once(num_examples, batch_size):
    indices, mask = batches.evaluation_batches(num_examples, batch_size)
    assert indices.shape == mask.shape == (-(-num_examples // batch_size), batch_size)
    assert np.asarray(indices)[np.asarray(mask)].tolist() == list(range(num_examples))
    assert 0 <= int(indices.min()) and int(indices.max()) < num_examples


@pytest.mark.parametrize(
    "call",
    [
        lambda: batches.epoch_indices(KEY, 0, 0, 4),
        lambda: batches.epoch_indices(KEY, 0, 4, 0),
        lambda: batches.evaluation_batches(0, 4),
        lambda: batches.evaluation_batches(4, -1),
        lambda: batches.split_indices(KEY, 10, 0.0),
        lambda: batches.split_indices(KEY, 10, 1.5),
        lambda: batches.split_indices(KEY, 10, float("nan")),
        lambda: batches.split_indices(KEY, 10, 0.5, labels=jnp.zeros(9, jnp.int32)),
        lambda: augment(KEY, jnp.zeros((2, 8, 8, 3)), pad=-1),
        lambda: augment(KEY, jnp.zeros((8, 8, 3))),
    ],
)
def test_impossible_requests_are_refused_in_one_line(call):
    with pytest.raises(errors.InputError) as error:
        call()
    assert "\n" not in str(error.value)


# --- the subset of the defender ---


@pytest.mark.slow
@pytest.mark.parametrize("fraction", [0.001, 0.333, 1.0])
@pytest.mark.parametrize("stratified", [False, True])
def test_a_subset_is_sorted_without_repeats_and_of_the_size_asked(fraction, stratified):
    labels = jnp.arange(500) % 7 if stratified else None
    rows = np.asarray(batches.split_indices(KEY, 500, fraction, labels=labels))
    assert rows.size == max(1, round(500 * fraction))
    assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < 500
    again = batches.split_indices(KEY, 500, fraction, labels=labels)
    np.testing.assert_array_equal(rows, again)


@pytest.mark.slow
def test_a_stratified_subset_has_the_proportions_of_the_whole():
    draw = np.random.default_rng(0)
    balanced = draw.permutation(np.repeat(np.arange(10), 100)).astype(np.int32)
    rows = batches.split_indices(KEY, 1000, 0.05, labels=jnp.asarray(balanced))
    assert np.bincount(balanced[rows]).tolist() == [5] * 10

    uneven = draw.permutation(np.repeat(np.arange(4), [700, 200, 90, 10]))
    rows = batches.split_indices(KEY, 1000, 0.1, labels=jnp.asarray(uneven))
    assert np.bincount(uneven[rows]).tolist() == [70, 20, 9, 1]


@pytest.mark.slow
@pytest.mark.parametrize("stratified", [False, True])
def test_every_example_is_as_likely_to_be_chosen(stratified):
    """Over 400 keys each of 40 examples is drawn 100 times, give or take 5 sigma."""
    labels = jnp.arange(40) // 10 if stratified else None
    draw = functools.partial(
        batches.split_indices, num_examples=40, fraction=0.25, labels=labels
    )
    rows = jax.jit(jax.vmap(draw))(jax.random.split(KEY, 400))
    drawn = np.bincount(np.asarray(rows).ravel(), minlength=40)
    assert drawn.sum() == 4000 and np.abs(drawn - 100).max() < 5 * np.sqrt(75)


# --- augmentation ---


def crop(image: np.ndarray, pad: int, top: int, left: int, flip: bool) -> np.ndarray:
    """The oracle: padding, slicing and reversing, as one would by hand."""
    height, width, _ = image.shape
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    cropped = padded[top : top + height, left : left + width]
    return cropped[:, ::-1] if flip else cropped


def images_of(dtype, num=500, height=6, width=8) -> np.ndarray:
    images = np.random.default_rng(0).integers(1, 256, (num, height, width, 3))
    images = images.astype(dtype)
    return images / dtype(255) if dtype == np.float32 else images


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "flip"), [(np.uint8, False), (np.uint8, True), (np.float32, True)]
)
def test_each_image_is_one_crop_and_all_crops_occur(dtype, flip):
    """By exhaustion: each result equals exactly one of the 25 (x 2) possible ones."""
    images, pad = images_of(dtype), 2
    results = np.asarray(augment(KEY, jnp.asarray(images), pad=pad, flip=flip))
    assert results.dtype == dtype and results.shape == images.shape
    offsets = [(top, left) for top in range(5) for left in range(5)]
    choices = [
        (*offset, side) for offset in offsets for side in (False, True)[: flip + 1]
    ]
    seen = Counter()
    for image, result in zip(images, results, strict=True):
        fitting = [
            choice
            for choice in choices
            if np.array_equal(crop(image, pad, *choice), result)
        ]
        assert len(fitting) == 1
        seen[fitting[0]] += 1
    assert set(seen) == set(choices)
    assert max(seen.values()) < 4 * len(images) / len(choices)
    flipped = sum(number for choice, number in seen.items() if choice[2])
    assert not flip or abs(flipped - 250) < 5 * np.sqrt(125)


@pytest.mark.slow
@pytest.mark.parametrize("cutout", [2, 20])
def test_cutout_is_one_square_clipped_at_the_borders(cutout):
    images = images_of(np.uint8)
    settings = {"pad": 0, "flip": False, "cutout": cutout}
    results = np.asarray(augment(KEY, jnp.asarray(images), **settings))
    holes = set()
    for image, result in zip(images, results, strict=True):
        hole = (result == 0).all(axis=-1)
        np.testing.assert_array_equal(result, np.where(hole[..., None], 0, image))
        rows, columns = np.flatnonzero(hole.any(1)), np.flatnonzero(hole.any(0))
        holes.add((rows[0], rows[-1], columns[0], columns[-1]))
        assert hole.sum() == len(rows) * len(columns)
    # The centre may be any pixel, so the holes are these, and all of them occur.
    half = cutout // 2
    expected = {
        (max(y - half, 0), min(y - half + cutout, 6) - 1)
        + (max(x - half, 0), min(x - half + cutout, 8) - 1)
        for y in range(6)
        for x in range(8)
    }
    assert holes == expected


@pytest.mark.slow
def test_switching_one_kind_off_leaves_the_others_as_they_were():
    images = jnp.asarray(images_of(np.uint8))
    both = np.asarray(augment(KEY, images, pad=2, flip=True))
    crops = np.asarray(augment(KEY, images, pad=2, flip=False))
    same = (both == crops).all((1, 2, 3))
    mirrored = (both == crops[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all() and same.any() and mirrored.any()
    holed = np.asarray(augment(KEY, images, pad=2, flip=True, cutout=2))
    np.testing.assert_array_equal(holed, np.where(holed == 0, 0, both))
    assert (holed != both).any((1, 2, 3)).mean() > 0.7  # Others fell on padding.


@pytest.mark.slow
def test_nothing_asked_nothing_changed_and_keys_matter():
    images = jnp.asarray(images_of(np.uint8))
    plain = augment(KEY, images, pad=0, flip=False)
    np.testing.assert_array_equal(plain, images)
    one, same, other = (
        np.asarray(augment(jax.random.key(seed), images, pad=2)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


@pytest.mark.slow
def test_the_gradient_is_the_number_of_copies_of_each_pixel():
    images = jnp.asarray(images_of(np.float32, num=4))

    def total(x):
        return augment(KEY, x, pad=2, flip=True, cutout=2).sum()

    copies = np.asarray(jax.jit(jax.grad(total))(images))
    assert set(np.unique(copies)) == {0.0, 1.0}
    kept = (np.asarray(augment(KEY, images, pad=2, cutout=2)) > 0).sum()
    assert copies.sum() == kept
