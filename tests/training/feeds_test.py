# SPDX-License-Identifier: Apache-2.0
"""Training from files is training from the device, bit by bit."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nad_jax import errors
from nad_jax.data import sources
from nad_jax.training import commits, loop, sharding, steps
from nad_jax.training import state as state_lib

EPOCHS = 2
BATCH_SIZE = 16  # 3 steps an epoch from 52 images, 4 of which are left over


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture(scope="module")
def in_files(toy_data, tmp_path_factory, write_npz) -> sources.Dataset:
    path = tmp_path_factory.mktemp("feeds") / "x.npz"
    images, labels = toy_data
    write_npz(path, images, labels)
    return sources.load("npz", split="train", data_dir=path, in_memory=False)


TX = optax.sgd(0.2, momentum=0.9, nesterov=True)


def linear_loss(params, batch_stats, batch, key):
    """Compiled in a moment; depends on every pixel, label and key of a batch."""
    noise = jax.random.uniform(key, batch["labels"].shape)
    pixels = batch["images"].reshape(len(noise), -1)
    losses = steps.cross_entropy(pixels @ params, batch["labels"])
    return jnp.mean(losses * noise), (batch_stats, {"noise": jnp.mean(noise)})


@pytest.fixture(scope="module")
def fit(toy_make_batch):
    """(data, options) -> (final state, metrics of every epoch), all in numpy."""
    linear_step = steps.make_train_step(linear_loss, TX)

    def fit(data, variables=None, **changes):
        history = []
        options = dict(
            step_fn=linear_step,
            epochs=EPOCHS,
            batch_size=BATCH_SIZE,
            make_batch=toy_make_batch,
            on_epoch=lambda state, metrics: history.append(metrics),
        )
        variables = variables or {"params": jnp.zeros((36, 3))}
        final = loop.fit(
            state_lib.create(variables, TX, jax.random.key(11)),
            data.images,
            data.labels,
            **{**options, **changes},
        )
        return as_numpy(final), history

    return fit


def as_numpy(state):
    return jax.device_get(state.replace(key=jax.random.key_data(state.key)))


def assert_same(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got[0], expected[0])
    assert got[1] == expected[1] and len(got[1]) > 0


@pytest.fixture(scope="module")
def from_device(fit, toy_data):
    return fit(toy_data)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"steps_per_dispatch": 2, "workers": 1},
        {"batch_size": 99},
        {"mesh": "eight"},
    ],
)
def test_training_from_files_is_training_from_the_device(
    fit, toy_data, in_files, options
):
    """Params, optimiser and metrics of two epochs, bitwise."""
    if "mesh" in options:
        options = {**options, "mesh": sharding.data_mesh()}
    got = fit(in_files, **options)
    assert_same(got, fit(toy_data, **{**options, "workers": 0}))


@pytest.mark.slow
def test_a_net_is_trained_bitwise_alike(
    fit, toy_data, in_files, toy_net, toy_variables
):
    """With convolution and BatchNorm, where another fusion could round otherwise."""
    step_fn = steps.make_train_step(steps.classification_loss(toy_net.apply), TX)
    results = [
        fit(data, variables=toy_variables, step_fn=step_fn)
        for data in (in_files, toy_data)
    ]
    assert_same(*results)
    assert results[0][1][1]["loss"] < results[0][1][0]["loss"]


@pytest.mark.slow
@pytest.mark.parametrize("programs_done", [0, 1, 3, 4])
def test_a_stopped_run_goes_on_bitwise_exactly(
    fit, from_device, toy_data, in_files, tmp_path, programs_done
):
    """Stopped after any step, in the middle of an epoch or at its edge.

    From files and again from files, from files and on from the device, and back.
    """
    for before, after in (
        (in_files, in_files),
        (in_files, toy_data),
        (toy_data, in_files),
    ):
        folder = tmp_path / f"{id(before)}-{id(after)}"
        asked = iter([False] * programs_done + [True])
        with pytest.raises(loop.TrainingInterrupted, match=f"{programs_done} steps"):
            fit(
                before,
                commits=commits.Commits(folder),
                should_stop=lambda asked=asked: next(asked),
            )
        final, history = fit(after, commits=commits.Commits(folder))
        expected, metrics = from_device
        assert_same((final, history), (expected, metrics[-len(history) :]))
        assert len(history) == EPOCHS - programs_done // 3


@pytest.mark.slow
def test_a_commit_holds_the_place_in_the_data(fit, in_files, tmp_path):
    """Grain's state too, which says how many batches were handed out."""
    asked = iter([False] * 4 + [True])
    with pytest.raises(loop.TrainingInterrupted):
        fit(
            in_files,
            commits=commits.Commits(tmp_path),
            should_stop=lambda: next(asked),
        )
    places = []

    class Spy(commits.Commits):
        def restore(self, like):
            tree, metadata = super().restore(like)
            places.append(metadata["place"])
            return tree, metadata

    fit(in_files, commits=Spy(tmp_path))
    (place,) = places
    assert place["step"] == 4 and place["iterator"] == {"next_index": 4}


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_epoch(fit, in_files):
    compiled = [0]

    def listener(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled[-1] += 1

    jax.monitoring.register_event_duration_secs_listener(listener)
    fit(in_files, epochs=4, on_epoch=lambda state, metrics: compiled.append(0))
    jax.monitoring.unregister_event_duration_listener(listener)
    assert len(compiled) == 5 and compiled[2:] == [0, 0, 0]


@pytest.mark.slow
def test_a_file_that_goes_away_ends_training_in_one_line(fit, toy_data, tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=toy_data.images, labels=toy_data.labels)
    data = sources.load("npz", split="train", data_dir=path, in_memory=False)
    with pytest.raises(errors.InputError, match=str(path)) as raised:
        fit(data, epochs=20, batch_size=4, on_epoch=lambda *_: path.unlink())
    assert "\n" not in str(raised.value)
    for thread in threading.enumerate():
        if thread.name.startswith("grain"):
            thread.join(10)
            assert not thread.is_alive(), thread.name


def test_workers_have_nothing_to_do_for_an_array(fit, toy_data):
    with pytest.raises(errors.InputError, match="these are an array; got 2") as raised:
        fit(toy_data, workers=2)
    assert "\n" not in str(raised.value)


# --- over several devices and processes ---


@pytest.mark.parametrize("mesh", [None, "eight"])
def test_a_single_process_reads_whole_batches(mesh):
    if mesh is not None:
        mesh = sharding.data_mesh()
    assert sharding.own_columns(24, mesh) == slice(0, 24)


def test_a_batch_that_cannot_be_split_is_refused():
    with pytest.raises(errors.InputError, match="12 cannot be split over 8"):
        sharding.own_columns(12, sharding.data_mesh())


@pytest.mark.parametrize(
    ("owned", "expected"), [((0, 1), slice(0, 6)), ((2, 3), slice(6, 12))]
)
def test_a_process_reads_what_its_devices_need(monkeypatch, owned, expected):
    mesh = sharding.data_mesh(jax.devices()[:4])
    _pretend_to_own(monkeypatch, mesh, owned)
    assert sharding.own_columns(12, mesh) == expected


def test_devices_that_are_no_neighbours_are_refused(monkeypatch):
    mesh = sharding.data_mesh(jax.devices()[:4])
    _pretend_to_own(monkeypatch, mesh, (0, 2))
    with pytest.raises(errors.InputError, match="must be neighbours") as raised:
        sharding.own_columns(12, mesh)
    assert "\n" not in str(raised.value)


def _pretend_to_own(monkeypatch, mesh, owned):
    """As if only these devices of the mesh belonged to this process."""
    devices = {mesh.devices[number] for number in owned}
    real = jax.sharding.NamedSharding.devices_indices_map
    monkeypatch.setattr(
        jax.sharding.NamedSharding,
        "addressable_devices_indices_map",
        lambda self, shape: {
            device: place
            for device, place in real(self, shape).items()
            if device in devices
        },
    )


@pytest.mark.slow
def test_companions_come_with_their_images(fit, toy_data):
    """Also through a mesh, in several steps a program, at a batch's own rows."""
    images, labels = toy_data
    count = len(labels)
    numbers = np.arange(count, dtype=np.float32)
    seen = {"number": numbers, "first": images.reshape(count, -1)[:, 0]}

    def make_batch(key, images, labels, companions):
        del key
        own = images.reshape(len(labels), -1)[:, 0]
        wrong = jnp.sum(own != companions["first"])
        return {
            "images": images,
            "labels": labels,
            "number": companions["number"],
            "wrong": jnp.full(labels.shape, wrong),
        }

    def loss_fn(params, batch_stats, batch, key):
        del key
        metrics = {"sum": jnp.sum(batch["number"]), "wrong": jnp.mean(batch["wrong"])}
        return jnp.sum(params) * 0.0, (batch_stats, metrics)

    means = {}
    for mesh in (None, sharding.data_mesh(jax.devices()[:2])):
        _, history = fit(
            toy_data,
            step_fn=steps.make_train_step(loss_fn, TX),
            make_batch=make_batch,
            companions=(seen,),
            steps_per_dispatch=2,
            mesh=mesh,
        )
        assert [epoch["wrong"] for epoch in history] == [0.0, 0.0]
        means[mesh is None] = [epoch["sum"] for epoch in history]
    assert means[True] == means[False]
    # 48 of the 52 numbers 0 .. 51 in three batches: not all, and not the same.
    assert means[True][0] != means[True][1]
    assert 3 * means[True][0] == pytest.approx(sum(range(52)), rel=0.2)


def test_companions_of_images_in_files_are_refused(fit, in_files):
    with pytest.raises(errors.InputError, match="stay in their files; got 1"):
        fit(in_files, companions=(np.zeros(52),))


def test_companions_that_are_too_few_are_refused(fit, toy_data):
    with pytest.raises(errors.InputError, match=r"must be \[52, ...\].*got \(20,\)"):
        fit(toy_data, companions=(np.zeros(20),))
