# SPDX-License-Identifier: Apache-2.0
"""NAD: what the attention term adds to fine-tuning, and where it could not."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.data import batches
from nad_jax.defenses import base, fine_tuning, nad, view_bank
from nad_jax.models import capture

KEY = jax.random.key(5)
BETAS = {"stage1": 50.0, "stage2": 20.0}


@pytest.fixture(scope="module")
def teacher(victim, other_variables):
    return base.Net(victim.model, other_variables)


@pytest.fixture(scope="module")
def batch(clean_data):
    images = batches.to_float(jnp.asarray(clean_data.images[:8]))
    return {"images": images, "labels": jnp.asarray(clean_data.labels[:8])}


@pytest.fixture(scope="module")
def loss_of(victim, batch):
    """(student params, teacher variables, betas) -> (loss, (statistics, metrics))."""

    def loss(params, teacher_variables, betas=BETAS, apply=victim.model.apply):
        loss_fn = nad.distillation_loss(apply, apply, teacher_variables, betas=betas)
        return loss_fn(params, victim.variables["batch_stats"], batch, KEY)

    return loss


def _numpy_distance(student, teacher):
    """The reference's attention term in float64, from its definition."""

    def attention(features):
        strength = np.sum(np.asarray(features, np.float64) ** 2, axis=-1)
        return strength / np.sqrt(np.sum(strength**2, axis=(1, 2), keepdims=True))

    return np.mean((attention(student) - attention(teacher)) ** 2)


@pytest.mark.slow
def test_all_betas_zero_is_fine_tuning_bit_for_bit(
    victim, teacher, clean_data, tuning, assert_same
):
    zero = settings.NadSettings({"stage1": 0.0, "stage2": 0.0})
    distilled = nad.run(victim, clean_data, tuning, zero, key=KEY, teacher=teacher)
    tuned = fine_tuning.run(victim, clean_data, tuning, key=KEY)
    assert_same(distilled.variables, tuned.variables)


@pytest.mark.slow
def test_the_term_is_that_of_the_reference(victim, teacher, batch, loss_of):
    """Student features in training mode, teacher features in evaluation mode."""
    _, (_, metrics) = jax.jit(loss_of)(victim.variables["params"], teacher.variables)
    (_, student), _ = victim.model.apply(
        victim.variables, batch["images"], train=True, mutable=["batch_stats"]
    )
    _, taught = teacher.model.apply(teacher.variables, batch["images"], train=False)
    expected = sum(
        beta * _numpy_distance(student[stage], taught[stage])
        for stage, beta in BETAS.items()
    )
    np.testing.assert_allclose(metrics["distillation_loss"], expected, rtol=1e-5)


@pytest.mark.slow
def test_the_loss_is_the_sum_of_its_terms(victim, teacher, loss_of):
    loss, (_, metrics) = jax.jit(loss_of)(victim.variables["params"], teacher.variables)
    total = metrics["task_loss"] + metrics["distillation_loss"]
    np.testing.assert_allclose(loss, total, rtol=1e-6)


@pytest.mark.slow
def test_the_teacher_gets_no_gradient_and_the_student_does(victim, teacher, loss_of):
    def distillation(params, teacher_variables):
        return loss_of(params, teacher_variables)[1][1]["distillation_loss"]

    of_student, of_teacher = jax.jit(jax.grad(distillation, argnums=(0, 1)))(
        victim.variables["params"], teacher.variables
    )
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_teacher))
    for layer in ("early", "late"):
        assert np.abs(of_student[layer]["kernel"]).max() > 1e-3


@pytest.mark.slow
def test_a_step_on_the_attention_term_brings_the_maps_together(
    victim, teacher, loss_of
):
    @jax.jit
    def distillation(params):
        return loss_of(params, teacher.variables)[1][1]["distillation_loss"]

    params = victim.variables["params"]
    gradient = jax.jit(jax.grad(distillation))(params)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
    assert distillation(moved) < distillation(params)


def test_a_step_runs_each_net_once(victim, teacher, loss_of):
    modes = []

    def apply(variables, images, **kwargs):
        modes.append(kwargs["train"])
        return victim.model.apply(variables, images, **kwargs)

    jax.eval_shape(
        lambda p, t: loss_of(p, t, apply=apply),
        victim.variables["params"],
        teacher.variables,
    )
    assert sorted(modes) == [False, True]


LOGITS = settings.LogitSettings(weight=3.0, temperature=2.0)


def _with_logits(victim, params, betas, batch):
    loss_fn = nad.distillation_loss(
        victim.model.apply,
        victim.model.apply,
        victim.variables,
        betas=betas,
        victim_variables=victim.variables,
        victim_logits=LOGITS,
    )
    return jax.jit(lambda p: loss_fn(p, victim.variables["batch_stats"], batch, KEY))(
        params
    )


def _numpy_divergence(victim, params, batch):
    """Mean of 4 KL at temperature 2 in float64: student training, victim evaluating."""
    (student, _), _ = victim.model.apply(
        {**victim.variables, "params": params},
        batch["images"],
        train=True,
        mutable=["batch_stats"],
    )
    wanted, _ = victim.model.apply(victim.variables, batch["images"], train=False)
    soft, wanted = (
        np.exp(x / 2) / np.exp(x / 2).sum(axis=-1, keepdims=True)
        for x in (np.asarray(student, np.float64), np.asarray(wanted, np.float64))
    )
    return 4 * np.sum(wanted * np.log(wanted / soft), axis=-1).mean()


@pytest.mark.slow
@pytest.mark.parametrize("betas", [BETAS, {"stage1": 0.0}])
def test_the_logit_term_is_that_of_the_frozen_victim(
    victim, other_variables, batch, betas
):
    """And it adds up with the rest."""
    params = other_variables["params"]
    loss, (_, metrics) = _with_logits(victim, params, betas, batch)
    expected = LOGITS.weight * _numpy_divergence(victim, params, batch)
    np.testing.assert_allclose(metrics["logit_loss"], expected, rtol=1e-4)
    assert ("distillation_loss" in metrics) == any(betas.values())
    terms = sum(v for name, v in metrics.items() if name.endswith("_loss"))
    np.testing.assert_allclose(loss, terms, rtol=1e-6)


@pytest.mark.slow
def test_a_step_on_the_logit_term_brings_the_logits_together(
    victim, other_variables, batch
):
    def logit_loss(params):
        return _with_logits(victim, params, BETAS, batch)[1][1]["logit_loss"]

    params = other_variables["params"]
    gradient = jax.grad(logit_loss)(params)
    moved = jax.tree.map(lambda p, g: p - 1e-3 * g, params, gradient)
    before = _numpy_divergence(victim, params, batch)
    assert _numpy_divergence(victim, moved, batch) < before


@pytest.mark.slow
def test_a_run_is_told_whether_logits_count(victim, teacher, clean_data, tuning):
    def losses_of(logits, views=0):
        result = nad.run(
            victim,
            clean_data,
            tuning,
            settings.NadSettings(BETAS, teacher_views=views),
            key=KEY,
            teacher=teacher,
            victim_logits=logits,
        )
        return {name for name in result.history[-1] if name.endswith("_loss")}

    terms = {"task_loss", "distillation_loss"}
    assert losses_of(None) == terms
    assert losses_of(LOGITS) == {*terms, "logit_loss"}
    assert losses_of(LOGITS, views=2) == {*terms, "logit_loss"}


@pytest.mark.slow
def test_the_student_moves_towards_the_teacher(victim, teacher, clean_data, tuning):
    """And ends nearer to it than fine-tuning does, with the same batches."""
    images = batches.to_float(jnp.asarray(clean_data.images))
    forward = jax.jit(lambda v: victim.model.apply(v, images, train=False)[1])
    taught = forward(teacher.variables)

    def distance(result):
        return _numpy_distance(forward(result.variables)["stage1"], taught["stage1"])

    strong = settings.NadSettings({"stage1": 500.0})
    distilled = nad.run(victim, clean_data, tuning, strong, key=KEY, teacher=teacher)
    tuned = fine_tuning.run(victim, clean_data, tuning, key=KEY)
    assert distance(distilled) < 0.5 * distance(tuned)


@pytest.mark.slow
def test_the_teacher_is_a_fine_tuned_victim(victim, clean_data, tuning, assert_same):
    own = settings.NadSettings(BETAS, teacher_epochs=1)
    made = nad.make_teacher(victim, clean_data, tuning, epochs=1, key=KEY)
    given = base.Net(victim.model, made.variables)
    left = nad.run(victim, clean_data, tuning, own, key=KEY)
    right = nad.run(victim, clean_data, tuning, own, key=KEY, teacher=given)
    assert_same(left.variables, right.variables)


@pytest.mark.slow
def test_held_out_accuracy_decides_about_the_factor(
    victim, teacher, clean_data, tuning, assert_same
):
    """A factor that ruins the student is refused, unless everything is tolerated."""
    longer = dataclasses.replace(
        tuning, training=dataclasses.replace(tuning.training, epochs=4)
    )

    def student(factors, tolerance):
        chosen = settings.NadSettings(
            BETAS, beta_factors=factors, accuracy_tolerance=tolerance
        )
        result = nad.run(victim, clean_data, longer, chosen, key=KEY, teacher=teacher)
        told.append(dict(result.chosen))
        return result.variables

    told = []
    mild, ruinous = student((0.0,), 0.0), student((100.0,), 0.0)
    accuracy = base.validation_accuracy(victim, clean_data)
    assert accuracy(mild) > accuracy(ruinous) + 0.1
    assert_same(student((100.0, 0.0), 0.1), mild)
    assert_same(student((0.0, 100.0), 1.0), ruinous)
    # Of one student nothing was decided.
    assert told == [{}, {}, {"beta_factor": 0.0}, {"beta_factor": 100.0}]


def test_betas_in_both_units(victim, clean_data):
    """Maps are 6x6 and 3x3: a squared distance is so many times the mean square."""
    own = settings.NadSettings(
        {"stage1": 2.0, "stage2": 3.0}, beta_unit="squared_distance"
    )
    converted = nad.mean_square_betas(victim, clean_data, own)
    assert converted == {"stage1": 2.0 * 36, "stage2": 3.0 * 9}


class _Flat(nn.Module):
    """A stage with a map, and one without."""

    @nn.compact
    def __call__(self, images, train=False):
        good = nn.Conv(2, (3, 3), name="conv")(images)
        flat = good.mean(axis=(1, 2))
        return flat, {"good": good, "flat": flat}


@pytest.mark.parametrize("unit", ["squared_distance", "mean_square"])
def test_a_stage_without_positions_is_refused_in_either_unit(clean_data, unit):
    net = base.Net(_Flat(), _pooled_net().variables)
    own = settings.NadSettings({"good": 1.0, "flat": 1.0}, beta_unit=unit)
    with pytest.raises(errors.InputError, match=r"stage 'flat' .* \[2\] per image"):
        nad.check(net, clean_data, own)


def test_a_stage_without_positions_may_have_a_beta_of_0(clean_data):
    net = base.Net(_Flat(), _pooled_net().variables)
    own = settings.NadSettings({"flat": 0.0, "good": 2.0}, beta_unit="squared_distance")
    nad.check(net, clean_data, own)
    converted = nad.mean_square_betas(net, clean_data, own)
    assert list(converted.items()) == [("flat", 0.0), ("good", 2.0 * 36)]


class _Pooled(nn.Module):
    """Stages that teach nothing, and one that does."""

    @nn.compact
    def __call__(self, images, train=False):
        good = nn.Conv(2, (3, 3), name="conv")(images)
        pooled = good.mean(axis=(1, 2), keepdims=True)
        features = {
            "good": good,
            "pooled": pooled,
            "spread": jnp.broadcast_to(pooled, good.shape),
        }
        return pooled[:, 0, 0], features


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (["pooled"], "stage 'pooled' of the teacher is \\[1, 1, 2\\] per image"),
        (["good", "spread"], "'spread' of the teacher has the same attention every"),
        (["stage9"], "stages of good, pooled, spread, got stage9"),
        ([], "got none"),
    ],
)
def test_a_stage_that_cannot_teach_is_refused(clean_data, stages, words):
    model, variables = _pooled_net()
    nets = {"teacher": variables}
    nad.check_stages(model, nets, clean_data.images, ["good"])
    with pytest.raises(errors.InputError, match=words):
        nad.check_stages(model, nets, clean_data.images, stages)


def _pooled_net():
    kernel = np.random.default_rng(0).normal(size=(3, 3, 1, 2)).astype(np.float32)
    params = {"conv": {"kernel": kernel, "bias": np.zeros(2, np.float32)}}
    return base.Net(_Pooled(), {"params": params})


class _Trained(Exception):
    """A training has begun."""


@pytest.fixture
def no_training(monkeypatch):
    def begin(*arguments, **options):
        raise _Trained

    monkeypatch.setattr(base, "tune", begin)
    monkeypatch.setattr(nad, "make_teacher", begin)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"betas": {"stage9": 1.0}}, "betas must name stages"),
        ({"betas": {"pooled": 1.0}}, "'pooled' of the victim is"),
        ({"betas": {"spread": 1.0}}, "'spread' of the victim has the same"),
        ({"betas": {"good": 1.0}, "beta_factors": (0.5, 1.0)}, "needs held-out images"),
    ],
)
def test_a_teacher_is_not_trained_before_the_victim_is_looked_at(
    no_training, clean_data, tuning, options, words
):
    nothing = clean_data.validation_images[:0], clean_data.validation_labels[:0]
    data = base.CleanData(clean_data.images, clean_data.labels, *nothing)
    with pytest.raises(errors.InputError, match=words):
        nad.run(_pooled_net(), data, tuning, settings.NadSettings(**options), key=KEY)
    with pytest.raises(_Trained):
        own = settings.NadSettings({"good": 1.0})
        nad.run(_pooled_net(), data, tuning, own, key=KEY)


@pytest.mark.parametrize(
    ("betas", "factors"), [({"stage1": 0.0}, (1.0,)), (BETAS, (0.0,))]
)
def test_no_teacher_is_trained_where_no_stage_counts(
    monkeypatch, victim, clean_data, tuning, betas, factors
):
    """And a student is, which is fine-tuning."""
    monkeypatch.setattr(nad, "make_teacher", None)
    tuned = base.Defended(victim.variables, ())
    monkeypatch.setattr(base, "tune", lambda *arguments, **options: tuned)
    own = settings.NadSettings(betas, beta_factors=factors)
    assert nad.run(victim, clean_data, tuning, own, key=KEY) is tuned


@pytest.mark.slow
def test_a_teacher_with_other_maps_is_refused_before_it_is_asked(
    no_training, monkeypatch, victim, teacher, clean_data, tuning
):
    """Their sizes are looked at before any map of it is computed and kept."""
    swapped = _captured({"stage1": "norm", "stage2": "early"})
    monkeypatch.setattr(view_bank, "build", None)
    own = settings.NadSettings(BETAS, teacher_views=2)
    with pytest.raises(
        errors.InputError, match=r"map of \[3, 3\], of the victim one of"
    ):
        nad.run(
            victim,
            clean_data,
            tuning,
            own,
            key=KEY,
            teacher=teacher._replace(model=swapped),
        )


@pytest.mark.slow
def test_a_teacher_for_other_images_is_refused_in_one_line(
    no_training, victim, clean_data, tuning
):
    kernel = np.ones((3, 3, 3, 4), np.float32)
    params = {**victim.variables["params"], "early": {"kernel": kernel}}
    teacher = base.Net(victim.model, {**victim.variables, "params": params})
    own = settings.NadSettings(BETAS)
    with pytest.raises(errors.InputError) as caught:
        nad.run(victim, clean_data, tuning, own, key=KEY, teacher=teacher)
    message = str(caught.value)
    assert message.startswith("the teacher cannot be given images of shape [6, 6, 1]")
    assert "(3, 3, 3, 4)" in message and "\n" not in message and "http" not in message


@pytest.mark.slow
def test_of_several_students_each_epoch_says_whose_it_is(
    monkeypatch, victim, teacher, clean_data, tuning
):
    def tune(victim, *arguments, on_epoch, **options):
        for epoch in (1, 2):
            on_epoch(victim.variables, {"epoch": epoch})
        return base.Defended(victim.variables, ())

    def told(*factors):
        seen = []
        nad.run(
            victim,
            clean_data,
            tuning,
            settings.NadSettings(BETAS, beta_factors=factors),
            key=KEY,
            teacher=teacher,
            on_epoch=lambda _, metrics: seen.append(metrics),
        )
        return seen

    monkeypatch.setattr(base, "tune", tune)
    assert told(2.0) == [{"epoch": 1}, {"epoch": 2}]
    assert told(2.0, 0.5) == [
        {"epoch": epoch, "beta_factor": factor}
        for factor in (0.5, 2.0)
        for epoch in (1, 2)
    ]


class _Foreign(nn.Module):
    """Somebody's module: no features, another name for `train`."""

    @nn.compact
    def __call__(self, images, *, deterministic):
        early = nn.relu(nn.Conv(4, (3, 3), use_bias=False, name="early")(images))
        late = nn.Conv(5, (3, 3), strides=2, use_bias=False, name="late")(early)
        late = nn.BatchNorm(
            use_running_average=deterministic, momentum=0.8, name="norm"
        )(late)
        return nn.Dense(3, name="head")(nn.relu(late).mean(axis=(1, 2)))


def _captured(stages):
    return capture.Captured(
        _Foreign(),
        stages=stages,
        train_kwargs={"deterministic": False},
        eval_kwargs={"deterministic": True},
    )


@pytest.mark.slow
def test_a_foreign_module_is_distilled_at_any_submodule(
    victim, teacher, clean_data, tuning
):
    model = _captured({"anywhere": "early"})
    nets = [base.Net(model, net.variables) for net in (victim, teacher)]
    own = settings.NadSettings({"anywhere": 10.0})
    result = nad.run(nets[0], clean_data, tuning, own, key=KEY, teacher=nets[1])
    assert result.history[-1]["distillation_loss"] > 0


@pytest.mark.slow
def test_captured_outputs_are_those_of_the_submodule(victim, batch):
    model = _captured({"a": "early", "b": "norm"})
    logits, features = model.apply(victim.variables, batch["images"], train=False)
    expected, stages = victim.model.apply(victim.variables, batch["images"])
    np.testing.assert_allclose(logits, expected, rtol=1e-6)
    # ReLU comes behind both submodules.
    np.testing.assert_allclose(nn.relu(features["a"]), stages["stage1"], rtol=1e-6)
    np.testing.assert_allclose(nn.relu(features["b"]), stages["stage2"], rtol=1e-6)


def test_capturing_nothing_lists_what_there_is(victim, batch):
    model = _captured({"a": "Conv_7"})
    with pytest.raises(errors.InputError, match="no submodule 'Conv_7'.*early, head"):
        model.apply(victim.variables, batch["images"])


class _Pair(nn.Module):
    """Returns two arrays where stages are one."""

    @nn.compact
    def __call__(self, images):
        return images, images


class _Paired(nn.Module):
    @nn.compact
    def __call__(self, images, train):
        one, _ = _Pair(name="pair")(images)
        return one.mean(axis=(1, 2)), {}


def test_a_submodule_of_several_outputs_is_no_stage(clean_data):
    net = base.Net(capture.Captured(_Paired(), {"two": "pair"}), {})
    words = "stage 'two' of the victim must be one array, got tuple"
    with pytest.raises(errors.InputError, match=words):
        nad.check(net, clean_data, settings.NadSettings({"two": 1.0}))
