# SPDX-License-Identifier: Apache-2.0
"""Batches read from files while a model is trained on them, ahead of their use.

    rows of every batch -> read, in threads or worker processes -> changes -> batches

The order of rows comes from outside (`batches.epoch_indices`) and is the one in which
data on the device are used, so that batch number `step` is the same for any number of
workers, and the batches of several processes, each of which reads its own columns, are
the parts of the one that a single process would read. A few batches are in memory at a
time, never the data set.

Reading ahead is Grain's work, in the optional package `grain` (extra `large`). Workers
are started by `spawn`, so a program that uses them needs `if __name__ == "__main__":`;
they use no device.

B = batch, b = rows of it that this process reads, H = height, W = width, C = channels.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from nad_jax import errors
from nad_jax.data import stored

# Without workers, so many batches are being read or wait, each in a thread.
_THREADS = 4
# Row numbers that a pipeline is given; then it ends, and another one begins.
_ROWS_PER_PIPELINE = 2**22


class Stream:
    """The batches of one training from step `step` on.

    Args:
      images: What to read.
      labels: int32 `[N]`.
      order_of_epoch: Number of an epoch -> its rows, int `[steps, B]`; pure.
      steps_per_epoch: At least 1.
      epochs: After so many the stream ends.
      columns: The part of every batch that this process reads, with both its ends.
      workers: Processes that read; 0 = threads of this one.
      step: Batches before the first one wanted, counted from the first epoch.
      state: From `state` of a stream of the same training at that step. Not needed to
        go on exactly, with any number of workers: the step tells all.

    Raises:
      InputError: `workers` is negative, grain is not installed, or `state` is of
        another step.
    """

    def __init__(
        self,
        images: stored.Images,
        labels: np.ndarray,
        *,
        order_of_epoch: Callable[[int], np.ndarray],
        steps_per_epoch: int,
        epochs: int,
        columns: slice,
        workers: int = 0,
        step: int = 0,
        state: dict[str, Any] | None = None,
    ):
        if workers < 0:
            raise errors.InputError(f"workers must be >= 0, got {workers}")
        self._grain = _import_grain()
        self._images = images
        self._labels = labels
        self._order_of_epoch = order_of_epoch
        self._steps_per_epoch = steps_per_epoch
        self._epochs = epochs
        self._columns = columns
        self._workers = workers
        self._step = step
        # Of the pipeline at work: its rows [steps, b], and the step of the first.
        self._rows = np.zeros((0, 0), np.int32)
        self._first = step
        self._iterator: Any = None
        if state is not None:
            self._go_on(state)

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` batches, of this process's columns.

        Returns:
          Images uint8 `[count, b, H, W, C]` and labels int32 `[count, b]`, both new.

        Raises:
          InputError: a row cannot be read, or the state that the stream was given was
            that of another step.
        """
        rows, images = [], []
        for _ in range(count):
            if self._step == self._first + len(self._rows):
                self._open(self._step)
            batch = next(self._iterator)
            rows.append(self._rows[self._step - self._first])
            if not np.array_equal(batch["rows"], rows[-1]):
                raise errors.InputError(
                    f"the loader's state is not that of step {self._step}; begin anew "
                    "from the last epoch, or use another --workdir"
                )
            # A copy: what a worker sends lies in memory that goes away.
            images.append(np.array(batch["images"]))
            self._images.apply_changes(rows[-1], images[-1])
            self._step += 1
        return np.stack(images), self._labels[np.stack(rows)]

    def state(self) -> dict[str, Any]:
        """Where the stream stands, Grain's own state included; JSON can hold it."""
        return {
            "step": self._step,
            "first": self._first,
            "layout": self._layout(),
            "iterator": None if self._iterator is None else self._iterator.get_state(),
        }

    def close(self) -> None:
        """Ends threads and workers."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _layout(self) -> list[int]:
        """What a state of Grain's must have in common with a pipeline to fit it."""
        width = self._columns.stop - self._columns.start
        return [self._workers, width, self._epochs]

    def _go_on(self, state: dict[str, Any]) -> None:
        if state["step"] != self._step:
            raise errors.InputError(
                f"the loader stands at step {state['step']}, training at {self._step}"
            )
        if state["layout"] == self._layout() and state["iterator"] is not None:
            self._open(state["first"])
            self._iterator.set_state(state["iterator"])

    def _open(self, step: int) -> None:
        """A pipeline that begins with the batch of `step`, which may be read at once.

        It goes on over as many whole epochs as its limit allows: starting workers takes
        a second or two.
        """
        self.close()
        epoch, done = divmod(step, self._steps_per_epoch)
        rows = [self._order_of_epoch(epoch)[:, self._columns]]
        rows_at_once = max(1, _ROWS_PER_PIPELINE // rows[0].size)
        for later in range(epoch + 1, min(epoch + rows_at_once, self._epochs)):
            rows.append(self._order_of_epoch(later)[:, self._columns])
        self._rows = np.concatenate(rows)[done:]
        self._first = step
        grain = self._grain
        # A worker reads one batch after the other, and stops when three of its wait.
        threads = 0 if self._workers else _THREADS
        dataset = grain.MapDataset.source(
            _Batches(self._images.reader, self._rows)
        ).to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
        )
        if self._workers:
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self._workers, per_worker_buffer_size=1
                ),
                worker_init_fn=_prepare_worker,
            )
        self._iterator = iter(dataset)


class _Batches:
    """A sequence of batches, as Grain wants its sources.

    Each has "images", uint8 `[b, H, W, C]`, and "rows" `[b]`, which tell its place.
    """

    def __init__(self, reader: stored.Reader, rows: np.ndarray):
        self._reader = reader
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        rows = self._rows[number]
        return {"rows": rows, "images": self._reader.read(rows)}


def _prepare_worker(number: int, count: int) -> None:
    """A worker leaves signals to the process that started it, and ends with it.

    A terminal or a scheduler sends them to all; training finishes its step and needs
    the loader until then.
    """
    del number, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _import_grain() -> Any:
    """The package, which takes most of a second to import."""
    try:
        import grain
    except ImportError:
        raise errors.InputError(
            "reading data while training needs the package grain; get it with: "
            "pip install 'nad_jax[large]'"
        ) from None
    from absl import flags

    # Grain reads flags of its own, which absl forbids before somebody parses some; who
    # does so later still can.
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return grain
