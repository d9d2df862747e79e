# SPDX-License-Identifier: Apache-2.0
"""Rates of a whole data set against a numpy count of every image."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.attacks import triggers
from nad_jax.data import batches
from nad_jax.training import evaluation, sharding

NUM_CLASSES = 4


def linear(variables, images):
    """A model whose logits numpy can repeat."""
    return images.reshape(images.shape[0], -1) @ variables["weights"]


@pytest.fixture(scope="module")
def variables():
    generator = np.random.default_rng(5)
    return {
        "weights": jnp.asarray(generator.normal(size=(48, NUM_CLASSES)), jnp.float32)
    }


@pytest.fixture(scope="module")
def trigger():
    mask = np.zeros((4, 4, 1), np.float32)
    mask[2:, 2:] = 0.75
    return triggers.Trigger(jnp.ones((4, 4, 3)), jnp.asarray(mask))


def dataset(num_examples):
    generator = np.random.default_rng(num_examples)
    images = generator.integers(0, 256, (num_examples, 4, 4, 3)).astype(np.uint8)
    return images, generator.integers(0, NUM_CLASSES, num_examples)


def oracle(images, labels, variables, trigger, targets):
    """The definitions of the rates, image by image, in float64."""
    weights = np.asarray(variables["weights"], np.float64)
    mask = np.asarray(trigger.mask, np.float64)
    hits = attacks = robust = attacked = 0
    for image, label, target in zip(images, labels, targets, strict=True):
        image = image / 255.0
        hits += np.argmax(image.ravel() @ weights) == label
        if label == target:
            continue
        attacked += 1
        stamped = image * (1 - mask) + np.asarray(trigger.pattern, np.float64) * mask
        prediction = np.argmax(stamped.ravel() @ weights)
        attacks += prediction == target
        robust += prediction == label
    return {
        "acc": hits / len(images),
        "asr": attacks / attacked,
        "ra": robust / attacked,
        "acc_count": len(images),
        "asr_count": attacked,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_examples", "batch_size"), [(37, 8), (8, 8), (9, 8), (7, 8), (1, 5), (37, 37)]
)
def test_every_image_counts_exactly_once(variables, trigger, num_examples, batch_size):
    """Odd sizes: no tail dropped, no padding counted."""
    images, labels = dataset(num_examples)
    if num_examples == 1:
        labels[:] = 1
    rates = evaluation.evaluate(
        linear,
        variables,
        images,
        labels,
        trigger=trigger,
        target_labels=2,
        batch_size=batch_size,
    )
    targets = np.full(num_examples, 2)
    assert rates == oracle(images, labels, variables, trigger, targets)


@pytest.mark.slow
def test_each_image_may_have_its_own_target(variables, trigger):
    images, labels = dataset(29)
    targets = (labels + 1) % NUM_CLASSES
    rates = evaluation.evaluate(
        linear,
        variables,
        images,
        labels,
        trigger=trigger,
        target_labels=targets,
        batch_size=10,
    )
    assert rates == oracle(images, labels, variables, trigger, targets)
    assert rates["asr_count"] == 29


@pytest.mark.slow
def test_without_a_trigger_only_accuracy_is_counted(variables):
    images, labels = dataset(11)
    rates = evaluation.evaluate(linear, variables, images, labels, batch_size=4)
    assert (rates["acc_count"], rates["asr_count"]) == (11, 0)
    assert rates["asr"] is None and rates["ra"] is None


@pytest.mark.slow
def test_a_model_may_return_features_beside_its_logits(variables):
    images, labels = dataset(11)
    with_features = evaluation.evaluate(
        lambda v, x: (linear(v, x), {"stage1": x}), variables, images, labels
    )
    assert with_features == evaluation.evaluate(linear, variables, images, labels)


@pytest.mark.parametrize(
    ("backend", "on_mesh", "sizes"),
    [
        ("cpu", False, [125, 37]),
        # Each program on a mesh sums over devices, so there are to be few.
        ("cpu", True, [504, 40]),
        ("tpu", False, [500, 37]),
    ],
)
def test_a_batch_is_what_the_device_computes_fastest(
    monkeypatch, backend, on_mesh, sizes
):
    monkeypatch.setattr(evaluation.jax, "default_backend", lambda: backend)
    seen = []

    def spy(num_examples, batch_size):
        seen.append(batch_size)
        return batches.evaluation_batches(num_examples, batch_size)

    monkeypatch.setattr(
        evaluation, "batches", types.SimpleNamespace(evaluation_batches=spy)
    )
    mesh = sharding.data_mesh() if on_mesh else None
    for count in (600, 37):
        evaluation.make_evaluator(linear, *dataset(count), mesh=mesh)
    assert seen == sizes


@pytest.mark.slow
@pytest.mark.parametrize("on_mesh", [False, True])
def test_one_program_serves_all_batches_and_all_variables(
    monkeypatch, variables, trigger, on_mesh
):
    programs = []
    jit = jax.jit

    def spy(fun, **options):
        programs.append(jit(fun, **options))
        return programs[-1]

    images, labels = dataset(37)
    mesh = sharding.data_mesh() if on_mesh else None
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.jax, "jit", spy)
        evaluator = evaluation.make_evaluator(
            linear,
            images,
            labels,
            trigger=trigger,
            target_labels=0,
            batch_size=8,
            mesh=mesh,
        )
    zeros = {"weights": jnp.zeros_like(variables["weights"])}
    expected = oracle(images, labels, variables, trigger, np.zeros(37, int))
    assert evaluator(variables) == expected
    assert evaluator(zeros)["asr"] == 1.0  # a tie is class 0
    assert evaluator(variables) == expected
    assert [program._cache_size() for program in programs] == [1]


@pytest.mark.slow
def test_variables_that_live_on_a_mesh_are_welcome(variables):
    images, labels = dataset(11)
    expected = evaluation.evaluate(linear, variables, images, labels)
    spread = sharding.replicate(variables, sharding.data_mesh())
    assert evaluation.evaluate(linear, spread, images, labels) == expected


@pytest.mark.slow
def test_a_mesh_really_splits_the_images(variables, trigger):
    shapes = []

    def spy(variables, images):
        jax.debug.inspect_array_sharding(
            images, callback=lambda s: shapes.append(s.shard_shape(images.shape))
        )
        return linear(variables, images)

    evaluation.evaluate(
        spy,
        variables,
        *dataset(32),
        trigger=trigger,
        target_labels=0,
        batch_size=16,
        mesh=sharding.data_mesh(),
    )
    assert shapes == [(2, 4, 4, 3)] * 2  # clean and triggered


@pytest.mark.slow
def test_a_mesh_takes_variables_from_any_device(variables):
    """11 images in a batch of 11 become a batch of 16 for 8 devices."""
    images, labels = dataset(11)
    expected = evaluation.evaluate(linear, variables, images, labels)
    mesh = sharding.data_mesh()
    moved = jax.device_put(variables, jax.devices()[3])
    got = evaluation.evaluate(linear, moved, images, labels, mesh=mesh)
    assert got == expected


@pytest.mark.slow
@pytest.mark.parametrize("with_mesh", [False, True])
def test_predictions_are_those_that_were_counted(variables, trigger, with_mesh):
    """One for each image, in order, with the same rates as without them."""
    images, labels = dataset(23)
    options = {
        "trigger": trigger,
        "target_labels": 1,
        "batch_size": 10,
        "mesh": sharding.data_mesh() if with_mesh else None,
    }
    plain = evaluation.make_evaluator(linear, images, labels, **options)
    predicting = evaluation.make_predicting_evaluator(linear, images, labels, **options)
    rates, predictions = predicting(variables)
    assert rates == plain(variables)
    logits = images.reshape(23, -1) / 255.0 @ np.asarray(variables["weights"])
    np.testing.assert_array_equal(predictions, np.argmax(logits, -1))
    assert rates["acc"] == np.mean(predictions == labels)


def test_misuse_is_one_line(variables, trigger):
    images, labels = dataset(5)
    with pytest.raises(errors.InputError, match="needs target_labels"):
        evaluation.evaluate(linear, variables, images, labels, trigger=trigger)
    with pytest.raises(errors.InputError, match=r"labels must be an int or \[5\]"):
        evaluation.evaluate(linear, variables, images, labels[:4])
    with pytest.raises(errors.InputError, match="no images"):
        evaluation.evaluate(linear, variables, images[:0], labels[:0])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_labels": NUM_CLASSES}, "target_labels must be below 4, the number"),
        ({"target_labels": [0, 1, 2, 3, 7]}, "below 4, the number of logits, got 7"),
        ({"target_labels": -1}, "target_labels must be >= 0, got -1"),
        ({"labels": [0, 0, 0, 0, 4]}, "^labels must be below 4.*got 4"),
        ({"labels": [0, 0, -3, 0, 0]}, "^labels must be >= 0, got -3"),
    ],
)
def test_a_label_that_no_logit_is_of_is_refused(variables, trigger, changes, words):
    """A target beyond the logits would be an ASR of 0, -1 one of 1 for NaN logits."""
    images, labels = dataset(5)
    options = {"labels": labels, "trigger": trigger, "target_labels": 0, **changes}
    with pytest.raises(errors.InputError, match=words) as raised:
        evaluation.evaluate(linear, variables, images, **options)
    assert "\n" not in str(raised.value)
