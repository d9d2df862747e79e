# SPDX-License-Identifier: Apache-2.0
"""The loop: nothing left out, nothing depends on how it is dispatched or stopped."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nad_jax import errors
from nad_jax.training import commits, loop, sharding, steps
from nad_jax.training import state as state_lib

EPOCHS = 3
BATCH_SIZE = 16  # 3 steps an epoch from 52 images


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def setting(toy_net, toy_variables, toy_data, toy_make_batch):
    """State, and `fit` with all its arguments but the number of epochs."""
    tx = optax.sgd(0.2, momentum=0.9, nesterov=True)
    step_fn = steps.make_train_step(steps.classification_loss(toy_net.apply), tx)
    state = state_lib.create(toy_variables, tx, jax.random.key(11))

    def fit(state, epochs=EPOCHS, **changes):
        options = dict(
            step_fn=step_fn, batch_size=BATCH_SIZE, make_batch=toy_make_batch
        )
        options |= changes
        images, labels = toy_data
        return loop.fit(state, images, labels, epochs=epochs, **options)

    return state, fit


def as_numpy(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_equal_trees(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def assert_close_trees(got, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        got,
        expected,
    )


@pytest.fixture(scope="module")
def uninterrupted(setting):
    """States (as numpy) and metrics after every epoch of a run in one go."""
    state, fit = setting
    history = []
    final = fit(state, on_epoch=lambda s, m: history.append((as_numpy(s), m)))
    assert_equal_trees(as_numpy(final), history[-1][0])
    return history


@pytest.mark.slow
def test_training_learns_and_counts(uninterrupted):
    assert [int(state.epoch) for state, _ in uninterrupted] == [1, 2, 3]
    assert [int(state.step) for state, _ in uninterrupted] == [3, 6, 9]
    first, last = uninterrupted[0][1], uninterrupted[-1][1]
    assert set(first) == {"loss", "accuracy"}
    assert last["loss"] < first["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("epochs_done", [1, 2])
def test_resuming_at_an_epoch_boundary_is_bitwise_exact(
    setting, uninterrupted, epochs_done
):
    """Params, statistics, optimiser, key and metrics, from arrays that were on disk."""
    _, fit = setting
    saved, _ = uninterrupted[epochs_done - 1]
    resumed = jax.tree.map(jnp.asarray, saved)
    resumed = resumed.replace(key=jax.random.wrap_key_data(resumed.key))
    history = []
    final = fit(resumed, on_epoch=lambda s, m: history.append((as_numpy(s), m)))
    assert_equal_trees(as_numpy(final), uninterrupted[-1][0])
    for got, expected in zip(history, uninterrupted[epochs_done:], strict=True):
        assert_equal_trees(got[0], expected[0])
        assert got[1] == expected[1]


@pytest.mark.slow
def test_steps_per_dispatch_changes_nothing_but_rounding(setting, uninterrupted):
    """Two of three steps unrolled, the third alone: equal to 1e-5, not bitwise."""
    state, fit = setting
    history = []
    final = fit(state, steps_per_dispatch=2, on_epoch=lambda s, m: history.append(m))
    assert int(final.step) == 9
    assert_close_trees(as_numpy(final), uninterrupted[-1][0])
    for got, (_, expected) in zip(history, uninterrupted, strict=True):
        assert got == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_a_mesh_changes_nothing_but_rounding(setting, uninterrupted):
    state, fit = setting
    final = fit(state, mesh=sharding.data_mesh())
    assert_close_trees(as_numpy(final), uninterrupted[-1][0])
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(final))


@pytest.mark.slow
def test_a_mesh_really_splits_the_batch():
    """Each of eight devices works on one of eight images."""
    shapes = []

    def spy(state, batch):
        jax.debug.inspect_array_sharding(
            batch["index"], callback=lambda s: shapes.append(s.shard_shape((8,)))
        )
        return VISIT_STEP(state, batch)

    fit_visits(step_fn=spy, mesh=sharding.data_mesh())
    assert shapes == [(1,)]


@pytest.mark.slow
def test_a_state_made_of_the_batch_stays_whole_on_a_mesh():
    """Left alone, the compiler splits statistics that are rows of a split batch."""

    def tempting(params, batch_stats, batch, key):
        return jnp.sum(params), (batch["index"] * 2, {})

    variables = {"params": jnp.ones(8), "batch_stats": jnp.zeros(8, jnp.int32)}
    state = state_lib.create(variables, PLAIN_SGD, jax.random.key(0))
    step_fn = steps.make_train_step(tempting, PLAIN_SGD)
    final = fit_visits(step_fn=step_fn, state=state, mesh=sharding.data_mesh())
    assert final.batch_stats.sharding.is_fully_replicated


@pytest.mark.slow
@pytest.mark.parametrize("on_mesh", [False, True])
def test_nothing_is_compiled_after_the_first_epoch(on_mesh):
    """Neither the step nor any little thing around it."""
    compiled = [0]

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listener)
    fit_visits(
        epochs=4,
        steps_per_dispatch=4,
        mesh=sharding.data_mesh() if on_mesh else None,
        on_epoch=lambda state, metrics: compiled.append(0),
    )
    jax.monitoring.unregister_event_duration_listener(listener)
    in_first_epoch, *later = compiled
    assert in_first_epoch >= 2  # four steps, and one step
    assert later == [0, 0, 0, 0]


def count_visits(params, batch_stats, batch, key):
    """A loss whose gradient is the number of times each image is in the batch."""
    counts = jnp.zeros(52).at[batch["index"]].add(1.0)
    return jnp.sum(params * counts), (batch_stats, {})


PLAIN_SGD = optax.sgd(1.0)
VISIT_STEP = steps.make_train_step(count_visits, PLAIN_SGD)


def batch_of_indices(key, images, labels):
    return {"index": images[:, 0, 0, 0].astype(jnp.int32)}


def fit_visits(epochs=2, images=None, state=None, **changes):
    """Runs the loop on images that hold their own index, in batches of 8.

    With `VISIT_STEP`, params are minus the number of visits of each image.
    """
    if images is None:
        images = np.arange(52, dtype=np.uint8).reshape(52, 1, 1, 1)
    if state is None:
        state = state_lib.create(
            {"params": jnp.zeros(52)}, PLAIN_SGD, jax.random.key(0)
        )
    options = dict(step_fn=VISIT_STEP, batch_size=8, make_batch=batch_of_indices)
    return loop.fit(
        state, images, np.zeros(len(images), int), epochs=epochs, **options | changes
    )


@pytest.mark.parametrize("steps_per_dispatch", [1, 4, 6, 100])
def test_an_epoch_takes_every_step_on_different_images(steps_per_dispatch):
    """48 of the 52 images once each, however many steps make a program."""
    visits = [np.zeros(52)]
    done = []

    def on_epoch(state, metrics):
        visits.append(-np.asarray(state.params))
        done.append(int(state.step))

    fit_visits(steps_per_dispatch=steps_per_dispatch, on_epoch=on_epoch)
    assert done == [6, 12]
    orders = np.diff(visits, axis=0)
    for order in orders:
        assert sorted(order) == [0] * 4 + [1] * 48
    assert not np.array_equal(*orders)


@pytest.mark.slow
def test_fewer_images_than_a_batch_are_one_batch():
    assert sorted(fit_visits(batch_size=100).params) == [-2] * 52


def test_the_state_given_to_the_loop_survives():
    first = fit_visits(epochs=1)
    before = as_numpy(first)
    fit_visits(epochs=2, state=first)
    assert_equal_trees(as_numpy(first), before)


def test_a_finished_run_is_left_alone():
    finished = fit_visits(epochs=1)
    again = fit_visits(epochs=1, state=finished, on_epoch=pytest.fail)
    assert_equal_trees(as_numpy(again), as_numpy(finished))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_is_named_with_epoch_and_step():
    """The ninth step of all is the third of the second epoch."""

    def explodes(params, batch_stats, batch, key):
        # The gradient is 1 everywhere, so after eight steps of sgd params are -8.
        value = jnp.sum(params)
        return jnp.where(params[0] <= -8, jnp.nan, 1.0) * value, (batch_stats, {})

    with pytest.raises(loop.TrainingDiverged, match="nan in epoch 2 at step 9;"):
        fit_visits(step_fn=steps.make_train_step(explodes, PLAIN_SGD), epochs=5)


@pytest.mark.slow
@pytest.mark.parametrize("programs_done", [0, 1, 3, 5, 8])
def test_a_stopped_run_with_commits_goes_on_bitwise_exactly(
    setting, uninterrupted, tmp_path, programs_done
):
    """Stopped after any step, in the middle of an epoch or at its edge.

    State, metrics of the epoch that was cut in two, and what the caller remembers.
    """
    state, fit = setting
    asked = iter([False] * programs_done + [True])
    seen = loop.Memory(np.zeros(2), {"losses": []})

    def run(memory, **options):
        def on_epoch(state, metrics):
            memory.arrays = memory.arrays + np.asarray([1.0, metrics["loss"]])
            memory.notes["losses"].append(metrics["loss"])

        return fit(
            state,
            commits=commits.Commits(tmp_path),
            memory=memory,
            on_epoch=on_epoch,
            **options,
        )

    with pytest.raises(
        loop.TrainingInterrupted, match=f"; {programs_done} steps are kept$"
    ):
        run(loop.Memory(np.zeros(2), {"losses": []}), should_stop=lambda: next(asked))
    final = run(seen)
    assert_equal_trees(as_numpy(final), uninterrupted[-1][0])
    losses = [metrics["loss"] for _, metrics in uninterrupted]
    assert seen.notes["losses"] == losses
    assert seen.arrays.tolist() == [3.0, sum(losses[:2]) + losses[2]]


@pytest.mark.slow
def test_commits_happen_at_their_time_and_end_with_the_epochs(setting, tmp_path):
    """Every step when each is due; what was committed at the end is not done again."""
    state, fit = setting
    kept = Eager(tmp_path)
    fit(state, commits=kept)
    assert kept.saved == list(range(1, 10))
    again = Eager(tmp_path)
    final = fit(state, commits=again, on_epoch=pytest.fail)
    assert int(final.step) == 9 and again.saved == []


class Eager(commits.Commits):
    """Commits that are always due; a list of them."""

    def __init__(self, folder):
        super().__init__(folder)
        self.saved = []

    def is_due(self):
        return True

    def save(self, step, tree, metadata):
        if step != 0 and step not in self.saved:
            self.saved.append(step)
            super().save(step, tree, metadata)


def test_stopping_is_asked_between_programs_and_keeps_whole_epochs():
    saved = []
    asked = iter([False] * 8 + [True])  # six in epoch 1, the third of epoch 2
    with pytest.raises(loop.TrainingInterrupted, match="last finished epoch is 1$"):
        fit_visits(
            should_stop=lambda: next(asked),
            on_epoch=lambda s, m: saved.append(jax.tree.map(jnp.copy, s)),
        )
    assert len(saved) == 1
    assert_equal_trees(as_numpy(fit_visits(state=saved[0])), as_numpy(fit_visits()))


@pytest.mark.slow
def test_a_stop_does_not_wait_for_programs_started_long_ago():
    """When the host asks, at most a few programs are unfinished."""
    states = []

    def spy(state, batch):
        jax.debug.callback(lambda step: states.append(int(step)), state.step)
        return VISIT_STEP(state, batch)

    behind = []

    def should_stop():
        behind.append(len(behind) - len(states))
        return False

    fit_visits(epochs=4, step_fn=spy, should_stop=should_stop)
    assert len(behind) == 24 and max(behind) <= loop._PROGRAMS_AHEAD


def test_a_state_between_epochs_is_refused():
    one = fit_visits(epochs=1)
    with pytest.raises(errors.InputError, match="step 6, epoch 1 .* 13 steps"):
        fit_visits(state=one, batch_size=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 12, "mesh": "eight"}, "12 cannot be split over 8 devices"),
        ({"batch_size": 56, "mesh": "eight"}, "52 cannot be split over 8 devices"),
        ({"steps_per_dispatch": 0}, "at least 1, got 0"),
        ({"images": np.zeros((52, 1, 1, 1), np.float32)}, "uint8 .* float32"),
        ({"images": np.zeros((52, 3), np.uint8)}, r"uint8 .* \(52, 3\)"),
    ],
)
def test_misuse_is_one_line(changes, message):
    if "mesh" in changes:
        changes = changes | {"mesh": sharding.data_mesh()}
    with pytest.raises(errors.InputError, match=message) as caught:
        fit_visits(**changes)
    assert "\n" not in str(caught.value)


def test_one_label_per_image(toy_data):
    with pytest.raises(errors.InputError, match=r"labels must be \[52\]"):
        loop.checked(toy_data.images, toy_data.labels[:-1])
