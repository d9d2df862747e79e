# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning, the loop of all repairs, and the split of the defender's images."""

import dataclasses

import jax
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.data import sources
from nad_jax.defenses import base, fine_tuning
from nad_jax.training import commits, loop

KEY = jax.random.key(5)


def _replace_training(tuning, **values):
    training = dataclasses.replace(tuning.training, **values)
    return dataclasses.replace(tuning, training=training)


@pytest.fixture(scope="module")
def tuned(victim, clean_data, tuning):
    return fine_tuning.run(victim, clean_data, tuning, key=KEY)


@pytest.mark.slow
def test_it_learns_what_the_clean_images_teach(victim, clean_data, tuning):
    longer = _replace_training(tuning, epochs=15, learning_rate=0.1)
    result = fine_tuning.run(victim, clean_data, longer, key=KEY)
    accuracy = base.validation_accuracy(victim, clean_data)
    assert accuracy(victim.variables) < 0.7
    assert accuracy(result.variables) > 0.9
    assert [entry["epoch"] for entry in result.history] == list(range(1, 16))


@pytest.mark.slow
def test_the_key_decides_everything(victim, clean_data, tuning, tuned, assert_same):
    again = fine_tuning.run(victim, clean_data, tuning, key=KEY)
    assert_same(again.variables, tuned.variables)
    other = fine_tuning.run(victim, clean_data, tuning, key=jax.random.key(6))
    kernel = ("params", "head", "kernel")
    assert not np.array_equal(_leaf(other, kernel), _leaf(tuned, kernel))


@pytest.mark.slow
def test_held_out_images_do_not_matter_without_patience(
    victim, clean_data, tuning, tuned, assert_same
):
    spoilt = dataclasses.replace(
        clean_data, validation_labels=np.zeros_like(clean_data.validation_labels)
    )
    result = fine_tuning.run(victim, spoilt, tuning, key=KEY)
    assert_same(result.variables, tuned.variables)


@pytest.mark.slow
def test_patience_returns_the_epoch_after_which_nothing_rose(
    victim, clean_data, tuning, assert_same
):
    """With a rate of almost nothing no epoch beats the first."""
    still = _replace_training(tuning, epochs=9, learning_rate=1e-12)
    patient = dataclasses.replace(still, patience=3)
    result = fine_tuning.run(victim, clean_data, patient, key=KEY)
    assert len(result.history) == 4
    first = fine_tuning.run(
        victim, clean_data, _replace_training(still, epochs=1), key=KEY
    )
    assert_same(result.variables, first.variables)


@pytest.mark.slow
def test_patience_needs_held_out_images(victim, clean_data, tuning):
    none = dataclasses.replace(
        clean_data,
        validation_images=clean_data.validation_images[:0],
        validation_labels=clean_data.validation_labels[:0],
    )
    with pytest.raises(errors.InputError, match="held-out images"):
        patient = dataclasses.replace(tuning, patience=1)
        fine_tuning.run(victim, none, patient, key=KEY)


@pytest.mark.slow
def test_a_sharpness_radius_changes_the_result(victim, clean_data, tuning, tuned):
    sam = dataclasses.replace(tuning, sharpness_radius=0.1)
    result = fine_tuning.run(victim, clean_data, sam, key=KEY)
    kernel = ("params", "head", "kernel")
    assert not np.allclose(_leaf(result, kernel), _leaf(tuned, kernel), atol=1e-5)


@pytest.mark.slow
def test_smoothed_labels_leave_it_less_certain(victim, clean_data, tuning):
    longer = _replace_training(tuning, epochs=8)

    def certainty(**options):
        result = fine_tuning.run(victim, clean_data, longer, key=KEY, **options)
        images = clean_data.images / np.float32(255)
        return float(
            jax.nn.softmax(victim.logits(result.variables, images)).max(-1).mean()
        )

    assert certainty(label_smoothing=0.3) < certainty() - 0.05


@pytest.mark.slow
def test_it_stops_when_asked(victim, clean_data, tuning):
    with pytest.raises(loop.TrainingInterrupted):
        fine_tuning.run(victim, clean_data, tuning, key=KEY, should_stop=lambda: True)


@pytest.mark.slow
def test_an_interrupted_training_remembers_its_patience(
    victim, clean_data, tuning, assert_same, tmp_path
):
    """Waits no longer, keeps the same best epoch, and says the same of every epoch."""
    patient = dataclasses.replace(
        _replace_training(tuning, epochs=9, learning_rate=1e-12), patience=3
    )
    expected = fine_tuning.run(victim, clean_data, patient, key=KEY)

    def run(**options):
        return fine_tuning.run(
            victim,
            clean_data,
            patient,
            key=KEY,
            commits=lambda part: commits.Commits(tmp_path / part),
            **options,
        )

    # Three steps an epoch: in the middle of the fourth, which is the last.
    asked = iter([False] * 10 + [True])
    with pytest.raises(loop.TrainingInterrupted, match="10 steps"):
        run(should_stop=lambda: next(asked))
    result = run()
    assert_same(result.variables, expected.variables)
    assert result.history == expected.history and len(result.history) == 4


@pytest.mark.slow
def test_clean_indices_are_disjoint_stratified_and_seeded():
    labels = np.repeat(np.arange(10), 40).astype(np.int32)
    draw = dict(fraction=0.25, validation_fraction=0.2)
    rows, held_out = base.clean_indices(KEY, labels, **draw)
    assert (len(rows), len(held_out)) == (80, 20)
    assert not set(rows) & set(held_out)
    assert np.bincount(labels[rows]).tolist() == [8] * 10
    assert np.bincount(labels[held_out]).tolist() == [2] * 10
    again, _ = base.clean_indices(KEY, labels, **draw)
    np.testing.assert_array_equal(again, rows)
    other, _ = base.clean_indices(jax.random.key(6), labels, **draw)
    assert not np.array_equal(other, rows)


@pytest.mark.slow
def test_no_validation_fraction_holds_nothing_out():
    labels = np.zeros(20, np.int32)
    rows, held_out = base.clean_indices(
        KEY, labels, fraction=0.5, validation_fraction=0.0
    )
    assert (len(rows), len(held_out)) == (10, 0)


def test_tuning_settings_refuse_nonsense(tuning):
    for wrong in ({"patience": 0}, {"sharpness_radius": -1.0}):
        with pytest.raises(errors.InputError, match=next(iter(wrong))):
            settings.TuningSettings(tuning.training, **wrong)


def _leaf(defended, path):
    leaf = defended.variables
    for name in path:
        leaf = leaf[name]
    return np.asarray(leaf)


@pytest.mark.slow
def test_nothing_need_be_held_out():
    """No fraction, and so few images that the fraction rounds down to none."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (40, 4, 4, 1), np.uint8)
    labels = np.repeat(np.arange(4), 10).astype(np.int32)
    dataset = sources.Dataset(images, labels, num_classes=4, name="toy")
    for fraction, share in ((1.0, 0.0), (0.2, 0.1)):
        rows, held_out = base.clean_indices(
            KEY, labels, fraction=fraction, validation_fraction=share
        )
        data = base.clean_data(dataset, rows, held_out)
        np.testing.assert_array_equal(data.images, images[rows])
        assert data.validation_images.shape == (0, 4, 4, 1)
        assert data.validation_labels.shape == (0,)
