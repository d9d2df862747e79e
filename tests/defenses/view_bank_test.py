# SPDX-License-Identifier: Apache-2.0
"""Kept maps of a teacher: they belong to the views that the student is shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.defenses import base, nad, view_bank
from nad_jax.training import evaluation, loop

KEY = jax.random.key(11)
STAGES = ("stage1", "stage2")
BETAS = {"stage1": 50.0, "stage2": 20.0}


@pytest.fixture(scope="module")
def teacher(victim, other_variables):
    return base.Net(victim.model, other_variables)


@pytest.fixture(scope="module")
def training(tuning):
    return dataclasses.replace(tuning.training, crop_padding=2, flip=True)


@pytest.fixture(scope="module")
def build(teacher, clean_data, training):
    def build(views, *, p=2.0, reduction="sum", should_stop=None):
        return view_bank.build(
            view_bank.maps_fn(
                teacher.model, training, stages=STAGES, p=p, reduction=reduction
            ),
            teacher.variables,
            clean_data.images[:24],
            views=views,
            key=KEY,
            should_stop=should_stop,
        )

    return build


@pytest.fixture(scope="module")
def batch_of(build, clean_data, training):
    """(bank, key) -> the batch of all of its images."""

    def batch_of(bank, key=KEY):
        count = len(bank.views)
        return view_bank.make_batch(training)(
            key,
            jnp.asarray(clean_data.images[:count]),
            jnp.asarray(clean_data.labels[:count]),
            *jax.tree.map(jnp.asarray, bank),
        )

    return batch_of


def _attention(features, p):
    """The operator in float64, from its definition."""
    strength = np.sum(np.abs(np.asarray(features, np.float64)) ** p, axis=-1)
    return strength / np.sqrt(np.sum(strength**2, axis=(1, 2), keepdims=True))


@pytest.mark.slow
@pytest.mark.parametrize("p, reduction", [(2.0, "sum"), (1.0, "mean")])
def test_the_maps_are_those_of_the_pixels_shown(build, batch_of, teacher, p, reduction):
    batch = batch_of(build(3, p=p, reduction=reduction))
    _, features = teacher.model.apply(teacher.variables, batch["images"])
    assert set(batch["teacher_maps"]) == set(STAGES)
    for stage in STAGES:
        np.testing.assert_allclose(
            batch["teacher_maps"][stage], _attention(features[stage], p), atol=2e-6
        )


def test_an_image_is_shown_in_so_many_ways_and_no_more(build, batch_of):
    bank = build(3)
    shown = np.stack(
        [batch_of(bank, jax.random.key(i))["images"] for i in range(30)], axis=1
    )
    kinds = [len(np.unique(one.reshape(30, -1), axis=0)) for one in shown]
    # Two views may happen to be the same crop.
    assert max(kinds) == 3
    assert np.mean(kinds) > 2.5


def test_views_of_images_and_of_keys_differ(build):
    views = build(4).views
    assert views.shape == (24, 4, 5)
    assert len(np.unique(views)) == views.size


@pytest.mark.slow
def test_images_beyond_whole_batches_have_their_maps(monkeypatch, build):
    whole = build(2)
    monkeypatch.setattr(evaluation, "DEFAULT_BATCH_SIZE", 7)
    parts = build(2)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), whole, parts)


@pytest.mark.slow
def test_the_loss_is_that_of_a_teacher_pass(build, batch_of, victim, teacher):
    batch = batch_of(build(2))
    loss_fn = nad.distillation_loss(
        victim.model.apply, teacher.model.apply, teacher.variables, betas=BETAS
    )

    def gradient(batch):
        return jax.grad(loss_fn, has_aux=True)(
            victim.variables["params"], victim.variables["batch_stats"], batch, KEY
        )

    kept, (_, kept_metrics) = gradient(batch)
    passed, (_, passed_metrics) = gradient(
        {name: batch[name] for name in ("images", "labels")}
    )
    assert float(kept_metrics["distillation_loss"]) > 0
    for ours, expected in zip(
        jax.tree.leaves((kept, kept_metrics)),
        jax.tree.leaves((passed, passed_metrics)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_kept_maps_get_no_gradient(build, batch_of, victim, teacher):
    batch = batch_of(build(2))
    loss_fn = nad.distillation_loss(
        victim.model.apply, teacher.model.apply, teacher.variables, betas=BETAS
    )
    gradient = jax.grad(
        lambda maps: loss_fn(
            victim.variables["params"],
            victim.variables["batch_stats"],
            {**batch, "teacher_maps": maps},
            KEY,
        )[0]
    )(batch["teacher_maps"])
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient))


def test_a_stop_is_asked_for_between_batches(build):
    answers = iter([False, True])
    with pytest.raises(loop.TrainingInterrupted, match="view 2 of 3"):
        build(3, should_stop=lambda: next(answers))


@pytest.mark.slow
@pytest.mark.parametrize("views, factor", [(2, 1.0), (2, 0.0), (0, 1.0)])
def test_a_student_is_trained_on_the_bank_only_where_it_has_one(
    monkeypatch, victim, teacher, clean_data, tuning, views, factor
):
    given = {}
    monkeypatch.setattr(
        base, "tune", lambda *a, **k: given.update(k) or base.Defended(None, ())
    )
    recipe = settings.NadSettings(BETAS, teacher_views=views, beta_factors=(factor,))
    nad.run(victim, clean_data, tuning, recipe, key=KEY, teacher=teacher)
    if views and factor:
        assert given["companions"].views.shape[:2] == (len(clean_data.labels), views)
        assert given["make_batch"] is not None and given["frozen"] == ((), ())
    else:
        assert given["companions"] == () and given["make_batch"] is None
        # With all betas 0 there is nobody to learn from.
        expected = teacher.variables if factor else victim.variables
        assert given["frozen"][0] is expected


@pytest.mark.slow
def test_a_student_learns_the_kept_maps(victim, teacher, clean_data, tuning):
    """Two views, many epochs: the student comes closer to the teacher than it was."""
    training = dataclasses.replace(tuning.training, epochs=20)
    recipe = settings.NadSettings({"stage1": 0.0, "stage2": 200.0}, teacher_views=2)
    result = nad.run(
        victim,
        clean_data,
        settings.TuningSettings(training),
        recipe,
        key=KEY,
        teacher=teacher,
    )
    first, last = result.history[0], result.history[-1]
    assert last["distillation_loss"] < 0.7 * first["distillation_loss"]


@pytest.mark.slow
def test_the_step_calls_no_teacher(build, batch_of, victim):
    def never(*arguments, **options):
        raise AssertionError("the teacher was called")

    loss_fn = nad.distillation_loss(victim.model.apply, never, (), betas=BETAS)
    variables = victim.variables
    loss, _ = loss_fn(
        variables["params"], variables["batch_stats"], batch_of(build(2)), KEY
    )
    assert np.isfinite(loss)


def test_a_negative_number_of_views_is_refused():
    with pytest.raises(errors.InputError, match="teacher_views must be >= 0, got -1"):
        settings.NadSettings(BETAS, teacher_views=-1)
