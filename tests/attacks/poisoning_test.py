# SPDX-License-Identifier: Apache-2.0
import doctest

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies

from nad_jax import errors
from nad_jax.attacks import poisoning, triggers

CLASSES = 5
LABELS = np.tile(np.arange(CLASSES, dtype=np.int32), 40)  # 200 images, 40 per class
SHAPE = (8, 8, 3)
KEY = jax.random.key(0)
SQUARE = triggers.square_trigger(SHAPE, size=2, margin=1)
WAVE = triggers.sinusoid_trigger(SHAPE, amplitude=0.1, frequency=1.5)


def random_images(count=200, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def choose(rate, mode="all_to_one", key=KEY, target_label=2):
    return poisoning.poison_indices(
        key, LABELS, poison_rate=rate, mode=mode, target_label=target_label
    )


def poison(indices, mode="all_to_one", trigger=SQUARE, **changes):
    arguments = {"images": random_images(), "labels": LABELS} | changes
    return poisoning.poison(
        **arguments,
        indices=indices,
        trigger=trigger,
        mode=mode,
        target_label=2,
        num_classes=CLASSES,
    )


# Labels ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("all_to_one", [2, 2, 2, 2, 2]),
        ("all_to_all", [1, 2, 3, 4, 0]),
        ("clean_label", [2, 2, 2, 2, 2]),
    ],
)
def test_what_each_mode_wants_also_under_jit(mode, expected):
    def target_labels(labels):
        return poisoning.target_labels(
            labels, mode=mode, target_label=2, num_classes=CLASSES
        )

    for wanted in (target_labels(np.arange(5)), jax.jit(target_labels)(np.arange(5))):
        assert wanted.dtype == np.int32
        np.testing.assert_array_equal(wanted, expected)


def test_all_to_all_ignores_the_target_label():
    poisoning.target_labels(
        LABELS, mode="all_to_all", target_label=-1, num_classes=CLASSES
    )


# Choosing --------------------------------------------------------------------------


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    seed=strategies.integers(0, 1000),
    rate=strategies.sampled_from([0.0, 0.005, 0.05, 0.1, 0.2]),
    mode=strategies.sampled_from(poisoning.LABEL_MODES),
)
def test_the_rate_is_of_the_whole_set_in_every_mode(seed, rate, mode):
    indices = choose(rate, mode, jax.random.key(seed))
    assert len(indices) == round(rate * len(LABELS))
    assert (np.diff(indices) > 0).all()  # ascending, so each only once
    assert np.isin(indices, np.arange(len(LABELS))).all()
    if mode == "clean_label":
        assert (LABELS[indices] == 2).all()


@pytest.mark.slow
def test_dirty_label_modes_choose_from_every_class():
    for mode in ("all_to_one", "all_to_all"):
        np.testing.assert_array_equal(choose(1.0, mode), np.arange(len(LABELS)))
        assert set(LABELS[choose(0.3, mode)]) == set(range(CLASSES))


@pytest.mark.slow
def test_clean_label_can_take_its_whole_class_and_no_more():
    np.testing.assert_array_equal(
        choose(40 / 200, "clean_label"), np.flatnonzero(LABELS == 2)
    )
    with pytest.raises(errors.InputError, match="only 40 of 200 .* at most 0.2"):
        choose(41 / 200, "clean_label")


@pytest.mark.parametrize("mode", poisoning.LABEL_MODES)
def test_the_key_decides_and_lower_rates_nest(mode):
    np.testing.assert_array_equal(choose(0.1, mode), choose(0.1, mode))
    assert set(choose(0.05, mode)) < set(choose(0.1, mode))
    other = choose(0.1, mode, jax.random.key(1))
    assert set(other) != set(choose(0.1, mode))


@pytest.mark.slow
def test_every_image_is_chosen_about_equally_often():
    """500 draws of 10 %: 50 each, with a standard deviation of 6.7."""
    times = np.zeros(20)
    for seed in range(500):
        drawn = poisoning.poison_indices(
            jax.random.key(seed),
            LABELS[:20],
            poison_rate=0.1,
            mode="all_to_one",
            target_label=0,
        )
        times[drawn] += 1
    assert times.sum() == 1000
    assert 20 < times.min() and times.max() < 80


@pytest.mark.parametrize(
    ("rate", "mode", "target_label", "message"),
    [
        (1.5, "all_to_one", 2, "fraction in .* got 1.5"),
        (-0.1, "all_to_one", 2, "fraction in .* got -0.1"),
        (float("nan"), "all_to_one", 2, "fraction in .* got nan"),
        (0.001, "all_to_one", 2, "0.001 selects none of 200"),
        (0.1, "all2one", 2, "all_to_one, all_to_all, clean_label, got 'all2one'"),
        (0.1, "clean_label", 9, "20 images of class 9, but only 0 of 200"),
    ],
)
def test_impossible_choices_are_refused(rate, mode, target_label, message):
    with pytest.raises(errors.InputError, match=message):
        choose(rate, mode, target_label=target_label)


# Poisoning -------------------------------------------------------------------------


@pytest.mark.parametrize("mode", poisoning.LABEL_MODES)
def test_poison_changes_the_chosen_images_and_nothing_else(mode):
    images, indices = random_images(), choose(0.1, mode)
    poisoned_images, poisoned_labels = poison(indices, mode, images=images)
    np.testing.assert_array_equal(images, random_images())  # the original survives
    assert poisoned_images.dtype == np.uint8 and poisoned_labels.dtype == np.int32

    expected = images.copy()
    for index in indices:
        expected[index, 5:7, 5:7] = 255
    np.testing.assert_array_equal(poisoned_images, expected)

    wanted = {"all_to_one": 2, "all_to_all": (LABELS + 1) % CLASSES}.get(mode, LABELS)
    chosen = np.isin(np.arange(len(LABELS)), indices)
    np.testing.assert_array_equal(poisoned_labels, np.where(chosen, wanted, LABELS))


def test_poisoning_nothing_is_a_copy():
    images = random_images()
    poisoned_images, poisoned_labels = poison(choose(0.0), images=images)
    np.testing.assert_array_equal(poisoned_images, images)
    np.testing.assert_array_equal(poisoned_labels, LABELS)
    assert not np.shares_memory(poisoned_images, images)
    assert not np.shares_memory(poisoned_labels, LABELS)


@pytest.mark.parametrize(
    ("indices", "changes", "message"),
    [
        ([0, 200], {}, r"indices must be in \[0, 200\), got 0 to 200"),
        ([-1, 5], {}, "got -1 to 5"),
        ([3, 3, 4], {}, "1 are repeated"),
        ([0.5], {}, "integers .* got float64"),
        ([0], {"labels": LABELS[:-1]}, "200 images but 199 labels"),
        ([0], {"labels": np.where(LABELS == 4, 5, LABELS)}, r"in \[0, 5\), got 0 to 5"),
        ([0], {"labels": LABELS - 1}, "got -1 to 3"),
        ([0], {"labels": LABELS / 2}, "labels must be integers"),
        ([0], {"images": random_images() / 255}, "uint8 .* got float64"),
        ([0], {"images": random_images()[:, :7]}, r"images \(7, 8, 3\)"),
        ([1, 2, 3], {"mode": "clean_label"}, "class 2 only, 2 of 3 indices"),
        ([0], {"mode": "dirty"}, "got 'dirty'"),
    ],
)
def test_what_does_not_fit_is_refused(indices, changes, message):
    with pytest.raises(errors.InputError, match=message):
        poison(np.asarray(indices), **changes)


@pytest.mark.parametrize("target_label", [-1, CLASSES])
@pytest.mark.parametrize("mode", ["all_to_one", "clean_label"])
def test_a_target_outside_the_classes_is_refused(mode, target_label):
    with pytest.raises(errors.InputError, match=rf"\[0, 5\), got {target_label}"):
        poisoning.target_labels(
            LABELS, mode=mode, target_label=target_label, num_classes=CLASSES
        )


# Stamping --------------------------------------------------------------------------


@pytest.mark.slow
def test_stamped_levels_are_the_nearest_ones():
    """Also behind the first batch of the loop, in a short last one."""
    images = random_images(count=515)
    wave = 0.1 * np.sin(2 * np.pi * np.arange(8) * 1.5 / 8).reshape(1, 1, 8, 1)
    exact = np.clip(images / 255 + wave, 0, 1) * 255
    stamped = poisoning.stamp(images, WAVE)
    assert np.abs(stamped - exact).max() <= 0.5 + 1e-4
    assert stamped.dtype == np.uint8


@pytest.mark.slow
def test_all_256_levels_survive_where_the_trigger_is_transparent():
    """Dividing by 255 and multiplying again must not lose a grey level."""
    levels = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1).repeat(3, axis=-1)
    nothing = WAVE._replace(offset=WAVE.offset * 0)
    np.testing.assert_array_equal(poisoning.stamp(levels, nothing), levels)
    stamped = poisoning.stamp(levels, SQUARE)
    np.testing.assert_array_equal(stamped[:, :5], levels[:, :5])


def test_a_broken_trigger_is_refused_before_it_is_stored():
    """NaN times 255 as uint8 is some number nobody chose."""
    broken = SQUARE._replace(pattern=SQUARE.pattern * np.float32(np.nan))
    with pytest.raises(errors.InputError, match="pattern must have values"):
        poisoning.stamp(random_images(2), broken)


def test_docstring_examples_are_true():
    outcome = doctest.testmod(poisoning)
    assert outcome.attempted > 0 and outcome.failed == 0


@pytest.mark.slow
def test_noise_images_are_bent_in_ways_of_their_own():
    """Within the jitter of the trigger's field; everything else stays as it is."""
    trigger = triggers.warp_trigger(
        (8, 8, 1), grid_size=2, strength=1.0, key=jax.random.key(0)
    )
    # A ramp across: the grey level of a pixel says where it was fetched from.
    ramp = np.broadcast_to(30 * np.arange(8)[None, None, :, None], (5, 8, 8, 1))
    images = np.array(ramp, np.uint8)
    rows = np.asarray([1, 3])
    bent = poisoning.distract(images, rows, trigger, jitter=0.25, key=jax.random.key(1))
    np.testing.assert_array_equal(bent[[0, 2, 4]], images[[0, 2, 4]])
    place = np.arange(8)[None, :] + np.asarray(trigger.field)[:, :, 1]
    gap = bent[rows, :, :, 0] / 30 - np.clip(place, 0, 7)[None]
    assert 0.15 < np.abs(gap).max() <= 0.25 + 0.5 / 30 + 1e-6
    assert (bent[1] != bent[3]).any()


def test_noise_images_need_a_bend():
    with pytest.raises(errors.InputError, match="a trigger that bends"):
        poisoning.distract(
            np.zeros((2, 8, 8, 1), np.uint8),
            np.asarray([0]),
            triggers.grid_trigger((8, 8, 1)),
            jitter=0.5,
            key=jax.random.key(0),
        )


@pytest.mark.parametrize(
    ("side", "jitter", "message"),
    [
        (6, 0.5, r"trigger pattern must have shape \(8, 8, 1\)"),
        (8, float("nan"), "jitter must be >= 0 and finite, got nan"),
        (8, -1.0, "got -1.0"),
        (8, float("inf"), "got inf"),
    ],
)
def test_noise_images_need_a_trigger_of_their_size_and_a_distance(
    side, jitter, message
):
    trigger = triggers.warp_trigger(
        (side, side, 1), grid_size=2, strength=1.0, key=jax.random.key(0)
    )
    with pytest.raises(errors.InputError, match=message):
        poisoning.distract(
            np.full((2, 8, 8, 1), 200, np.uint8),
            np.asarray([0]),
            trigger,
            jitter=jitter,
            key=jax.random.key(0),
        )
