# SPDX-License-Identifier: Apache-2.0
"""The training step, against numpy, against itself on eight devices, by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nad_jax.training import sharding, steps
from nad_jax.training import state as state_lib

KEY = jax.random.key(0)


def numpy_cross_entropy(logits, labels, label_smoothing=0.0):
    logits = np.asarray(logits, np.float64)
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    num_classes = logits.shape[1]
    targets = np.eye(num_classes)[labels]
    targets = targets * (1 - label_smoothing) + label_smoothing / num_classes
    return -(targets * log_probabilities).sum(axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_float64_numpy(label_smoothing):
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(17, 5)).astype(np.float32) * 4
    labels = generator.integers(0, 5, 17)
    got = steps.cross_entropy(
        jnp.asarray(logits), jnp.asarray(labels), label_smoothing=label_smoothing
    )
    expected = numpy_cross_entropy(logits, labels, label_smoothing)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_cross_entropy_of_huge_bfloat16_logits_is_finite_float32():
    logits = jnp.asarray([[1e30, 0.0], [0.0, -1e30]], jnp.bfloat16)
    losses = steps.cross_entropy(logits, jnp.asarray([0, 0]))
    assert losses.dtype == jnp.float32
    np.testing.assert_array_equal(losses, [0.0, 0.0])


def toy_batch(toy_data, size=16):
    return {
        "images": jnp.asarray(toy_data.images[:size]).astype(jnp.float32) / 255.0,
        "labels": jnp.asarray(toy_data.labels[:size]),
    }


def run(step_fn, state, batch, num_steps=3):
    for _ in range(num_steps):
        state, metrics = step_fn(state, batch)
    return state, metrics


def assert_same_run(got, expected):
    """Params, statistics, optimiser state and metrics agree to 1e-5."""
    (got_state, got_metrics), (state, metrics) = got, expected
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        (got_state.params, got_state.batch_stats, got_state.opt_state, got_metrics),
        (state.params, state.batch_stats, state.opt_state, metrics),
    )
    assert int(got_state.step) == int(state.step)


@pytest.mark.slow
def test_one_device_eight_sharded_devices_and_pmap_agree(
    toy_net, pmap_net, toy_variables, toy_data
):
    """Statistics are global everywhere: each device alone sees only two images."""
    tx = optax.sgd(0.3, momentum=0.9)
    state = state_lib.create(toy_variables, tx, KEY)
    batch = toy_batch(toy_data)
    step = steps.make_train_step(steps.classification_loss(toy_net.apply), tx)
    single = run(jax.jit(step), state, batch)

    mesh = sharding.data_mesh()
    assert mesh.size == 8
    sharded = run(
        jax.jit(step),
        sharding.replicate(state, mesh),
        sharding.shard_batch(batch, mesh),
    )
    assert_same_run(sharded, single)

    pmap_step = steps.make_train_step(
        steps.classification_loss(pmap_net.apply), tx, axis_name="data"
    )
    per_device = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    pmapped = run(jax.pmap(pmap_step, axis_name="data"), copies, per_device)
    for device in (0, 7):
        assert_same_run(jax.tree.map(lambda x: x[device], pmapped), single)  # noqa: B023

    moved = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))), single[0].params, state.params
    )
    assert min(jax.tree.leaves(moved)) > 1e-2, "nothing to compare"


@pytest.mark.slow
def test_the_second_step_does_not_compile_again(toy_net, toy_variables, toy_data):
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, 10))
    step = jax.jit(steps.make_train_step(steps.classification_loss(toy_net.apply), tx))
    state = state_lib.create(toy_variables, tx, KEY)
    run(step, state, toy_batch(toy_data), num_steps=4)
    assert step._cache_size() == 1


@pytest.mark.slow
def test_metrics_are_those_of_the_loss_before_the_update(
    toy_net, toy_variables, toy_data
):
    batch = toy_batch(toy_data)
    tx = optax.sgd(0.1)
    loss_fn = steps.classification_loss(toy_net.apply, label_smoothing=0.1)
    state = state_lib.create(toy_variables, tx, KEY)
    _, metrics = jax.jit(steps.make_train_step(loss_fn, tx))(state, batch)
    (logits, _), _ = toy_net.apply(
        toy_variables, batch["images"], train=True, mutable=["batch_stats"]
    )
    expected = numpy_cross_entropy(logits, batch["labels"], 0.1).mean()
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    hits = np.argmax(logits, axis=1) == np.asarray(batch["labels"])
    np.testing.assert_allclose(metrics["accuracy"], hits.mean(), rtol=1e-6)


@pytest.mark.slow
def test_running_statistics_move_towards_those_of_the_batch(
    toy_net, toy_variables, toy_data
):
    """With momentum 0.8 the new mean is a fifth of the batch's, from zero."""
    batch = toy_batch(toy_data)
    tx = optax.sgd(0.0)
    state = state_lib.create(toy_variables, tx, KEY)
    step = steps.make_train_step(steps.classification_loss(toy_net.apply), tx)
    state, _ = jax.jit(step)(state, batch)
    kernel = np.asarray(toy_variables["params"]["Conv_0"]["kernel"], np.float64)
    padded = np.pad(batch["images"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    responses = sum(
        padded[:, i : i + 6, j : j + 6] @ kernel[i, j]
        for i in range(3)
        for j in range(3)
    )
    np.testing.assert_allclose(
        state.batch_stats["BatchNorm_0"]["mean"],
        0.2 * responses.mean(axis=(0, 1, 2)),
        rtol=1e-4,
        atol=1e-6,
    )


def parabola(params, batch_stats, batch, key):
    """3 w^2 / 2, whose gradient is 3 w."""
    del batch, key
    return 1.5 * jnp.sum(params**2), (batch_stats, {})


def test_projection_comes_after_the_update():
    tx = optax.sgd(1.0)
    step = steps.make_train_step(
        parabola, tx, project=lambda params: jnp.clip(params, -1.0, 1.0)
    )
    state = state_lib.create({"params": jnp.asarray([2.0, 0.25])}, tx, KEY)
    state, _ = step(state, {})
    np.testing.assert_array_equal(state.params, [-1.0, -0.5])


@pytest.mark.slow
def test_sharpness_aware_step_uses_the_gradient_uphill():
    """At (3, 4), radius 10 uphill is (9, 12), where the gradient is (27, 36)."""
    tx = optax.sgd(0.1)
    step = steps.make_train_step(parabola, tx, sharpness_radius=10.0)
    state = state_lib.create({"params": jnp.asarray([3.0, 4.0])}, tx, KEY)
    state, metrics = step(state, {})
    np.testing.assert_allclose(state.params, [0.3, 0.4], rtol=1e-6)
    assert metrics["loss"] == 37.5


@pytest.mark.slow
def test_by_weight_large_weights_climb_further_and_zeros_stay():
    """At (1, 2, 0) the slopes by weight are (1, 4, 0); radius 17**0.5 climbs (1, 8)."""
    tx = optax.sgd(1.0)
    step = steps.make_train_step(
        parabola, tx, sharpness_radius=17**0.5, sharpness_by_weight=True
    )
    state = state_lib.create({"params": jnp.asarray([1.0, 2.0, 0.0])}, tx, KEY)
    state, _ = step(state, {})
    uphill = np.asarray([2.0, 10.0, 0.0])
    np.testing.assert_allclose(state.params, [1, 2, 0] - 3 * uphill, rtol=1e-6)


def test_sharpness_aware_step_at_a_minimum_stays_there():
    tx = optax.sgd(0.1)
    step = steps.make_train_step(parabola, tx, sharpness_radius=1.0)
    state, _ = step(state_lib.create({"params": jnp.zeros(2)}, tx, KEY), {})
    np.testing.assert_array_equal(state.params, [0.0, 0.0])


@pytest.mark.slow
def test_sharpness_aware_devices_climb_together():
    """Under pmap the ascent follows the gradient of the whole batch, as under jit."""

    def regression(params, batch_stats, batch, key):
        errors = batch["x"] @ params - batch["y"]
        return jnp.mean(errors**4), (batch_stats, {})

    generator = np.random.default_rng(1)
    batch = {
        "x": jnp.asarray(generator.normal(size=(16, 3)).astype(np.float32)),
        "y": jnp.asarray(generator.normal(size=16).astype(np.float32)),
    }
    tx = optax.sgd(0.01)
    state = state_lib.create({"params": jnp.ones(3)}, tx, KEY)
    options = {"tx": tx, "sharpness_radius": 0.5}
    expected = run(jax.jit(steps.make_train_step(regression, **options)), state, batch)
    step = steps.make_train_step(regression, **options, axis_name="data")
    per_device = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    got = run(jax.pmap(step, axis_name="data"), copies, per_device)
    assert_same_run(jax.tree.map(lambda x: x[0], got), expected)


@pytest.mark.slow
def test_every_step_and_device_draws_other_numbers():
    def noisy(params, batch_stats, batch, key):
        return jnp.sum(params) * 0.0, (batch_stats, {"draw": jax.random.uniform(key)})

    tx = optax.sgd(0.1)
    step = steps.make_train_step(noisy, tx)
    state = state_lib.create({"params": jnp.zeros(2)}, tx, KEY)
    state, first = step(state, {})
    state, second = step(state, {})
    assert first["draw"] != second["draw"]

    def draws(params, batch_stats, batch, key):
        draw = jax.random.uniform(key)
        here = jax.nn.one_hot(jax.lax.axis_index("data"), 8)
        return jnp.sum(params) * 0.0, (batch_stats, {"draws": here * draw})

    pmap_step = steps.make_train_step(draws, tx, axis_name="data")
    copies = jax.tree.map(lambda x: jnp.stack([x] * 8), state)
    _, metrics = jax.pmap(pmap_step, axis_name="data")(copies, {"unused": jnp.zeros(8)})
    assert len(set(np.asarray(metrics["draws"][0]).tolist())) == 8
