# SPDX-License-Identifier: Apache-2.0
import doctest

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nad_jax import errors
from nad_jax.core import metrics

CLASSES = 4


@jax.jit
def count(clean, triggered, labels, mask, targets):
    return metrics.count_batch(clean, triggered, labels, mask, target_labels=targets)


def random_batch(seed, size=12):
    random = np.random.default_rng(seed)
    clean, triggered = random.normal(size=(2, size, CLASSES)).astype(np.float32)
    labels, targets = random.integers(0, CLASSES, (2, size), dtype=np.int32)
    mask = random.random(size) < 0.8
    return clean, triggered, labels, mask, targets


def count_by_hand(clean, triggered, labels, mask, targets):
    """One image at a time, in plain Python."""
    counts = dict.fromkeys(metrics.Counts._fields, 0)
    for i in range(len(labels)):
        if not mask[i]:
            continue
        counts["clean_count"] += 1
        counts["clean_correct"] += int(clean[i].argmax() == labels[i])
        if labels[i] != targets[i]:
            counts["attack_count"] += 1
            counts["attack_success"] += int(triggered[i].argmax() == targets[i])
            counts["robust_correct"] += int(triggered[i].argmax() == labels[i])
    return counts


def as_dict(counts):
    return {name: int(value) for name, value in counts._asdict().items()}


def one_hot_logits(classes):
    return np.eye(CLASSES, dtype=np.float32)[np.asarray(classes)]


@pytest.mark.slow
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
@hypothesis.given(seed=strategies.integers(0, 10_000))
def test_counts_agree_with_counting_image_by_image(seed):
    batch = random_batch(seed)
    counts = count(*batch)
    assert as_dict(counts) == count_by_hand(*batch)
    assert counts.attack_success + counts.robust_correct <= counts.attack_count


def test_counts_are_int32_scalars():
    for counts in (metrics.zero_counts(), count(*random_batch(0))):
        for value in counts:
            assert value.dtype == jnp.int32 and value.shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (5, 7), (1, 11)])
def test_merged_batches_equal_one_batch_however_it_is_cut(sizes):
    batch = random_batch(3)
    merged, start = metrics.zero_counts(), 0
    for size in sizes:
        part = [array[start : start + size] for array in batch]
        merged, start = metrics.merge(merged, count(*part)), start + size
    assert as_dict(merged) == count_by_hand(*batch)


@pytest.mark.slow
def test_a_padded_last_batch_counts_only_its_images():
    """The mean of batch means would be (1 + 0) / 2 here."""
    labels = np.zeros(4, np.int32)
    full = count(one_hot_logits([0] * 4), None, labels, np.ones(4), None)
    padding = np.asarray([1, 0, 0, 0])
    rest = count(one_hot_logits([1, 0, 0, 0]), None, labels, padding, None)
    assert metrics.summarize(metrics.merge(full, rest))["acc"] == 4 / 5


@pytest.mark.slow
def test_images_that_already_have_the_target_label_are_not_attacked():
    """Ten per cent of CIFAR-10 would count as success with any model."""
    labels, targets = np.asarray([2, 2, 0, 1]), np.full(4, 2)
    logits = one_hot_logits(labels)
    rates = metrics.summarize(count(logits, logits, labels, np.ones(4), targets))
    assert rates == {"acc": 1.0, "asr": 0.0, "ra": 1.0, "acc_count": 4, "asr_count": 2}


def test_all_to_all_attacks_every_image():
    labels = np.arange(CLASSES)
    targets = (labels + 1) % CLASSES
    triggered = one_hot_logits([1, 2, 2, 3])
    rates = metrics.summarize(
        count(one_hot_logits(labels), triggered, labels, np.ones(CLASSES), targets)
    )
    assert rates["asr_count"] == CLASSES
    assert (rates["asr"], rates["ra"]) == (0.5, 0.5)


def test_a_broken_model_is_wrong_about_everything():
    """`argmax` of NaN is class 0: a perfect attack, or a perfect class 0."""
    broken = np.full((2, CLASSES), np.nan, np.float32)
    for label, target in ((0, 1), (1, 0)):
        labels, targets = np.full(2, label), np.full(2, target)
        counts = count(broken, broken, labels, np.ones(2), targets)
        assert as_dict(counts) == {
            "clean_correct": 0,
            "clean_count": 2,
            "attack_success": 0,
            "robust_correct": 0,
            "attack_count": 2,
        }


def test_without_an_attack_the_attack_rates_are_none():
    labels = np.asarray([0, 1])
    counts = count(one_hot_logits([0, 0]), None, labels, np.ones(2), None)
    expected = {"acc": 0.5, "asr": None, "ra": None, "acc_count": 2, "asr_count": 0}
    assert metrics.summarize(counts) == expected


def test_rates_are_python_numbers_divided_in_double_precision():
    counts = metrics.Counts(*(np.int32(n) for n in (1, 3, 2, 1, 7)))
    rates = metrics.summarize(counts)
    assert (rates["acc"], rates["asr"], rates["ra"]) == (1 / 3, 2 / 7, 1 / 7)
    assert [type(value) for value in rates.values()] == [float] * 3 + [int] * 2


@pytest.mark.slow
def test_counts_do_not_depend_on_the_devices_the_batch_is_spread_over():
    batch = random_batch(5, size=8 * jax.device_count())
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("batch",))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    spread = [jax.device_put(array, rows) for array in batch]
    assert as_dict(count(*spread)) == count_by_hand(*batch)


@pytest.mark.slow
def test_counting_maps_over_an_axis_of_models():
    first, second = random_batch(1), random_batch(2)
    stacked = [np.stack(pair) for pair in zip(first, second, strict=True)]
    counts = jax.vmap(count)(*stacked)
    for i, batch in enumerate((first, second)):
        expected = list(count_by_hand(*batch).values())
        np.testing.assert_array_equal([value[i] for value in counts], expected)


@pytest.mark.slow
def test_small_integer_labels_and_half_precision_logits_are_accepted():
    clean, triggered, labels, mask, targets = random_batch(7)
    clean, triggered = clean.astype(jnp.bfloat16), triggered.astype(jnp.bfloat16)
    counts = count(clean, triggered, labels.astype(np.uint8), mask, targets)
    assert as_dict(counts) == count_by_hand(clean, triggered, labels, mask, targets)


@pytest.mark.parametrize(
    ("position", "replacement", "message"),
    [
        (0, np.ones(3), r"clean_logits must have 2 axes \[B, K\], got shape \[3\]"),
        (0, np.ones((5, 4)), r"got \[12\] and \[5\]"),
        (1, np.ones((12, 3)), r"got \[12, 4\] and \[12, 3\]"),
        (2, np.ones((12, 1), int), r"labels must have 1 axes \[B\]"),
        (3, np.ones(5), r"labels and mask .* got \[12\] and \[5\]"),
        (4, np.ones((), int), r"target_labels .* got \[12\] and \[\]"),
        (4, None, "target_labels, got None"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(position, replacement, message):
    batch = list(random_batch(0))
    batch[position] = replacement
    with pytest.raises(errors.InputError, match=message):
        count(*batch)


# Published rows: accuracy and ASR before, accuracy and ASR after, DER; per cent.
# FT-SAM paper, table 1 (CIFAR-10, PreAct-ResNet18).
PUBLISHED_DER = [
    ("BadNets, FT", 91.82, 93.79, 90.29, 1.70, 95.28),
    ("BadNets, NAD", 91.82, 93.79, 88.82, 1.96, 94.42),
    ("Blended, ANP", 93.44, 97.71, 93.00, 57.38, 69.95),
    ("CLA, FT: accuracy rises", 84.55, 99.93, 90.38, 10.76, 94.59),
    ("WaNet, i-BAU", 92.80, 98.90, 90.70, 0.88, 97.96),
]


@pytest.mark.parametrize("row", PUBLISHED_DER, ids=lambda row: row[0])
def test_der_reproduces_published_values(row):
    acc_before, asr_before, acc_after, asr_after, expected = (
        percent / 100 for percent in row[1:]
    )
    rating = metrics.defense_effectiveness_rating(
        acc_before=acc_before,
        asr_before=asr_before,
        acc_after=acc_after,
        asr_after=asr_after,
    )
    assert rating == pytest.approx(expected, abs=1.01e-4)


def test_der_punishes_a_loss_of_accuracy():
    """With the sign of one public version, a ruined model would score above 1."""
    rating = metrics.defense_effectiveness_rating
    attack = {"asr_before": 1.0, "asr_after": 0.0, "acc_before": 0.9}
    assert rating(**attack, acc_after=0.1) == pytest.approx(0.6)
    assert rating(**attack, acc_after=0.9) == 1.0
    assert rating(acc_before=1, asr_before=0, acc_after=0, asr_after=1) == 0.0
    assert rating(acc_before=0.5, asr_before=0.5, acc_after=1, asr_after=1) == 0.5


def test_rir_rewards_true_labels_and_punishes_a_loss_of_accuracy():
    rating = metrics.robust_improvement_rating
    assert rating(acc_before=1, ra_before=0, acc_after=1, ra_after=1) == 1.0
    assert rating(acc_before=0.9, ra_before=0.1, acc_after=0.9, ra_after=0.1) == 0.5
    assert rating(acc_before=1, ra_before=0, acc_after=0.5, ra_after=0) == 0.25
    assert rating(acc_before=0.5, ra_before=0.5, acc_after=1, ra_after=0) == 0.5


@pytest.mark.parametrize("name", ["acc_before", "asr_before", "acc_after", "asr_after"])
@pytest.mark.parametrize("value", [91.8, -0.1, float("nan")])
def test_der_refuses_what_is_not_a_fraction(name, value):
    rates = dict.fromkeys(["acc_before", "asr_before", "acc_after", "asr_after"], 0.5)
    with pytest.raises(errors.InputError, match=f"{name} must be .* got {value}"):
        metrics.defense_effectiveness_rating(**rates | {name: value})


def test_rir_refuses_a_percentage():
    with pytest.raises(errors.InputError, match="ra_after must be .* got 88"):
        metrics.robust_improvement_rating(
            acc_before=0.9, ra_before=0.1, acc_after=0.9, ra_after=88
        )


@pytest.mark.slow
def test_docstring_examples_are_true():
    outcome = doctest.testmod(metrics)
    assert outcome.attempted > 0 and outcome.failed == 0


def test_the_strongest_repair_that_is_accurate_enough_is_kept():
    def kept(tolerance):
        return metrics.strongest_affordable(
            [0.2, 0.05, 0.1], [0.90, 0.98, 0.96], tolerance=tolerance
        )

    assert [kept(t) for t in (0.0, 0.019, 0.02, 0.07, 0.08)] == [1, 1, 2, 2, 0]
    # One of 50 images may be lost, whatever its share is in binary fractions.
    for right in range(1, 51):
        accuracies = [right / 50, (right - 1) / 50]
        assert metrics.strongest_affordable([1, 2], accuracies, tolerance=0.02) == 1
    # A weaker one that is less accurate is never kept.
    assert metrics.strongest_affordable([1.0, 2.0], [0.5, 0.9], tolerance=0.1) == 1
    for strengths, accuracies in (([], []), ([1.0], [0.5, 0.6])):
        with pytest.raises(errors.InputError, match="one accuracy for each"):
            metrics.strongest_affordable(strengths, accuracies, tolerance=0.0)
