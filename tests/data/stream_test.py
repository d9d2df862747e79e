# SPDX-License-Identifier: Apache-2.0
"""The stream: one order, whoever reads it, and from wherever it goes on."""

import contextlib
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from nad_jax import errors
from nad_jax.data import sources, stored, stream

ROOT = pathlib.Path(__file__).parent.parent.parent
NUM, BATCH, STEPS, EPOCHS = 31, 4, 7, 3  # 3 images of every epoch are left over


def order_of_epoch(epoch: int) -> np.ndarray:
    order = np.random.default_rng(epoch).permutation(NUM)[: STEPS * BATCH]
    return order.reshape(STEPS, BATCH)


ORDER = np.concatenate([order_of_epoch(epoch) for epoch in range(EPOCHS)])


@pytest.fixture(scope="module")
def data(tmp_path_factory, write_npz) -> sources.Dataset:
    """In a file, with two images changed in memory."""
    path = tmp_path_factory.mktemp("stream") / "x.npz"
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (NUM, 5, 4, 3), dtype=np.uint8)
    labels = draw.integers(0, 3, NUM).astype(np.int32)
    write_npz(path, images, labels)
    data = sources.load("npz", split="train", data_dir=path, in_memory=False)
    rows = np.array([17, 3])
    return data.replaced(rows, images[rows] ^ 255, labels[rows])


def open_stream(data: sources.Dataset, **changes):
    options = dict(
        order_of_epoch=order_of_epoch,
        steps_per_epoch=STEPS,
        epochs=EPOCHS,
        columns=slice(0, BATCH),
    )
    made = stream.Stream(data.images, data.labels, **{**options, **changes})
    return contextlib.closing(made)


def take_all(data: sources.Dataset, *, step: int = 0, **changes):
    with open_stream(data, step=step, **changes) as batches:
        return batches.take(len(ORDER) - step)


def assert_batches(got, data, rows):
    images, labels = got
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    expected = data.images[rows.reshape(-1)].reshape(images.shape)
    np.testing.assert_array_equal(images, expected)
    np.testing.assert_array_equal(labels, data.labels[rows])


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "later"), [(0, [0]), (2, [2, 0])])
def test_batches_follow_the_order_whoever_reads_them(data, workers, later):
    """And so does the stream that goes on from there, with as many workers or others.

    Signals to all processes of a group do not take the workers from the stream.
    """
    with open_stream(data, workers=workers) as batches:
        assert_batches(batches.take(2), data, ORDER[:2])
        for worker in multiprocessing.active_children():
            for number in (signal.SIGINT, signal.SIGTERM):
                os.kill(worker.pid, number)
        for step in range(2, 10):
            assert_batches(batches.take(1), data, ORDER[step : step + 1])
        state = json.loads(json.dumps(batches.state()))
        assert_batches(batches.take(11), data, ORDER[10:])
    assert multiprocessing.active_children() == []
    assert state["step"] == 10 and state["iterator"] is not None
    for number in later:
        resumed = take_all(data, step=10, workers=number, state=state)
        assert_batches(resumed, data, ORDER[10:])


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_parts_of_several_processes_are_the_batches_of_one(data, processes):
    width = BATCH // processes
    parts = [
        take_all(data, columns=slice(p * width, (p + 1) * width))
        for p in range(processes)
    ]
    joined = tuple(np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    assert_batches(joined, data, ORDER)


@pytest.mark.parametrize("limit", [1, 60, 2**22])
def test_where_a_pipeline_ends_changes_nothing(data, limit, monkeypatch):
    """Pipelines of one, two or all epochs; streams begun in the middle of one."""
    monkeypatch.setattr(stream, "_ROWS_PER_PIPELINE", limit)
    assert_batches(take_all(data), data, ORDER)
    for step in (3, STEPS, 2 * STEPS + 1, EPOCHS * STEPS - 1):
        with open_stream(data, step=step - 1) as batches:
            batches.take(1)
            state = batches.state()
        for known in (None, state):
            assert_batches(take_all(data, step=step, state=known), data, ORDER[step:])


def test_the_state_of_grain_is_what_is_gone_back_to(data):
    """And one that is not of the step is noticed, before wrong images are used."""
    with open_stream(data) as batches:
        batches.take(5)
        state = batches.state()
    assert state["iterator"] == {"next_index": 5} and state["first"] == 0
    state["iterator"]["next_index"] = 6
    with open_stream(data, step=5, state=state) as batches:
        with pytest.raises(errors.InputError, match="not that of step 5") as raised:
            batches.take(1)
    assert "\n" not in str(raised.value)


class CountingReader:
    """Counts the batches that were read, and those that are in memory at once."""

    def __init__(self, reader: stored.Reader):
        self._reader = reader
        self.shape, self.identity = reader.shape, reader.identity
        self.read_batches = 0
        self._lock = threading.Lock()

    def read(self, rows: np.ndarray) -> np.ndarray:
        with self._lock:
            self.read_batches += 1
        return self._reader.read(rows)


def test_only_a_few_batches_are_read_ahead(data):
    """So that what is in memory does not grow with the data set."""
    reader = CountingReader(data.images.reader)
    counted = stored.Images(reader)
    made = stream.Stream(
        counted,
        data.labels,
        order_of_epoch=order_of_epoch,
        steps_per_epoch=STEPS,
        epochs=EPOCHS,
        columns=slice(0, BATCH),
    )
    with contextlib.closing(made) as batches:
        assert reader.read_batches == 0
        for taken in range(1, 12):
            batches.take(1)
            time.sleep(0.01)  # time enough to read on, were it allowed
            assert taken <= reader.read_batches <= taken + stream._THREADS


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_goes_away_is_one_line(data, workers, tmp_path):
    """What was read until then is right, also if a single worker did it."""
    images = data.images[:]
    path = tmp_path / "x.npz"
    split = {"images_train": images, "labels_train": data.labels}
    np.savez(path, **split, labels_test=data.labels)
    gone = sources.load("npz", split="train", data_dir=path, in_memory=False)
    with open_stream(gone, workers=workers) as batches:
        assert_batches(batches.take(4), data, ORDER[:4])
        path.unlink()
        with pytest.raises(errors.InputError, match=str(path)) as raised:
            batches.take(len(ORDER) - 4)
    assert "\n" not in str(raised.value)
    assert multiprocessing.active_children() == []


def test_without_grain_the_way_to_get_it_is_said(data, monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(errors.InputError, match=r"pip install 'nad_jax\[large\]'") as e:
        open_stream(data)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workers": -1}, "workers must be >= 0, got -1"),
        ({"step": 3, "state": {"step": 4}}, "stands at step 4, training at 3"),
    ],
)
def test_misuse_is_one_line(data, changes, words):
    with pytest.raises(errors.InputError, match=words) as raised:
        open_stream(data, **changes)
    assert "\n" not in str(raised.value)


_ORPHANS = """
import multiprocessing, os, sys
import numpy as np
from nad_jax.data import sources, stream
data = sources.load("npz", split="train", data_dir=sys.argv[1], in_memory=False)
batches = stream.Stream(
    data.images, data.labels, order_of_epoch=lambda epoch: np.zeros((9, 1), int),
    steps_per_epoch=9, epochs=9, columns=slice(0, 1), workers=1,
)
batches.take(1)
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_workers_end_with_the_process_that_started_them(tmp_path):
    """Also when it is killed."""
    np.savez(
        tmp_path / "x.npz", images=np.zeros((9, 1, 1, 1), np.uint8), labels=[0] * 9
    )
    done = subprocess.run(
        [sys.executable, "-c", _ORPHANS, str(tmp_path / "x.npz")],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == -9, done.stderr
    # It had the same stdout, whose end `run` has waited for.
    assert len(done.stdout.split()) == 1
