# SPDX-License-Identifier: Apache-2.0
"""One training loop for victims, teachers, students and fine-tuning.

The data set lives on the device as uint8, and one program gathers a batch, prepares
it, and takes the step; the host only starts programs and, once per epoch, fetches the
metrics. Or the data set stays in its files (`stored.Images`): then the host reads
batches ahead and sends them, and the program does the rest. A batch is a function of
(state.key, state.epoch, state.step) and nothing else, the same in both cases, which is
why continuing from a saved state is exact. With `commits` the loop does so by itself,
also in the middle of an epoch.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nad_jax import errors
from nad_jax.training import commits as commits_lib
from nad_jax.training import feeds, sharding, steps
from nad_jax.training import state as state_lib

# (key, images uint8 [B, H, W, C], labels [B], *companions) -> batch
MakeBatch = Callable[..., steps.Batch]
OnEpoch = Callable[[state_lib.TrainState, dict[str, float]], None]

# How many programs the host starts before it waits for the first of them.
_PROGRAMS_AHEAD = 3


class TrainingDiverged(errors.InputError):
    """The loss stopped being a number; the settings, not the program, are at fault."""


class TrainingInterrupted(RuntimeError):
    """`should_stop` asked to stop before the last epoch was finished."""


@dataclasses.dataclass
class Memory:
    """What `on_epoch` carries from one epoch to the next; each commit holds it.

    Attributes:
        arrays: pytree of arrays whose structure, shapes and dtypes stay the same.
        notes: what JSON can hold.
    """

    arrays: Any = ()
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


def fit(
    state: state_lib.TrainState,
    images: Any,
    labels: Any,
    *,
    step_fn: steps.StepFn,
    epochs: int,
    batch_size: int,
    make_batch: MakeBatch,
    steps_per_dispatch: int = 1,
    on_epoch: OnEpoch | None = None,
    should_stop: Callable[[], bool] | None = None,
    commits: commits_lib.Commits | None = None,
    memory: Memory | None = None,
    mesh: Mesh | None = None,
    workers: int = 0,
    companions: tuple[Any, ...] = (),
) -> state_lib.TrainState:
    """State after `epochs` epochs in all, those already done by `state` included.

    Args:
        state: where to begin: `state.create(...)`, or the state that `on_epoch` saw at
            the end of any epoch, after which the result is bitwise what it would have
            been without the stop. The arrays of `state` stay valid.
        images: uint8 `[N, H, W, C]`, or `stored.Images`, which are read while training
            goes on; of several processes each then reads its part of every batch. The
            result is the same, bitwise.
        labels: int `[N]`.
        step_fn: from `steps.make_train_step`, not jitted.
        epochs: total number of epochs of the run.
        batch_size: examples per step, over all devices. What is left over at the end
            of an epoch is dropped, other examples each time; a smaller data set is one
            batch.
        make_batch: `(key, images, labels, *companions) -> batch`, pure and traceable,
            of the images uint8 `[B, H, W, C]` and labels `[B]` of one step; every leaf
            of the batch has the leading axis `[B]`.
        steps_per_dispatch: steps per compiled program. More means fewer gaps between
            programs and a longer compilation; results agree to rounding, not bitwise.
        on_epoch: called after each epoch with the state and the means of the metrics
            over the epoch. The loop reuses the memory of that state afterwards: save
            or copy what is to be kept.
        should_stop: asked between programs; True raises `TrainingInterrupted`, so a
            signal handler only has to set a flag.
        commits: where the run is kept between programs, where it stands in the data
            included. If it holds a commit, the run goes on from there, bitwise as if it
            had never stopped; `state` then only gives shapes and dtypes. It may go on
            with other `workers`, or with images from elsewhere.
        memory: what `on_epoch` changes besides; a commit brings it back, in place.
        mesh: from `sharding.data_mesh`, to split each batch over devices; the data set
            and the states are then replicated over them. Every process of a mesh that
            spans several must make this call, with the same arguments.
        workers: processes that read `stored.Images`; 0 reads them in threads.
        companions: pytrees of arrays `[N, ...]`, what else belongs to each image; the
            rows of a batch are further arguments of `make_batch`. Not for
            `stored.Images`, and no part of a commit.

    Raises:
        InputError: arrays, sizes or the state do not fit together; images cannot be
            read.
        TrainingDiverged: a loss of the finished epoch is not finite.
        TrainingInterrupted: `should_stop` returned True. With `commits` all steps done
            are committed; without, the unfinished epoch is lost: continue from the
            state of the last `on_epoch`.
    """
    images, labels = checked(images, labels)
    for leaf in jax.tree.leaves(companions):
        # A row beyond the end would be another image's, without a word.
        if leaf.shape[:1] != images.shape[:1]:
            raise errors.InputError(
                f"companions must be [{images.shape[0]}, ...], one row per image, got "
                f"{leaf.shape}"
            )
    steps_per_epoch, examples_per_step = feeds.shape_of_epoch(
        images.shape[0], batch_size
    )
    memory = Memory() if memory is None else memory
    history: list[Any] = []
    place = None
    if commits is not None:
        state, history, place = _restore(commits, state, memory)
    counts = _dispatch_sizes(steps_per_epoch, steps_per_dispatch)
    # Steps of the unfinished epoch that are done.
    position = _check_start(state, history, steps_per_epoch, counts)
    if mesh is not None:
        sharding.check_divisible(examples_per_step, mesh)
    feed = feeds.open_feed(
        images,
        labels,
        companions=companions,
        state=state,
        batch_size=batch_size,
        epochs=epochs,
        mesh=mesh,
        workers=workers,
        place=place,
    )
    # The programs donate the state, so work on a copy, or the caller's arrays die.
    state = jax.tree.map(jnp.copy, state)
    if mesh is not None:
        state = sharding.replicate(state, mesh)
    run_steps = _compile_steps(step_fn, make_batch, mesh)

    with contextlib.closing(feed):
        for epoch in range(int(state.epoch), epochs):
            feed.begin_epoch(state)
            first_step = epoch * steps_per_epoch
            for count in _remaining(counts, position):
                stopping = should_stop is not None and should_stop()
                if commits is not None and (stopping or commits.is_due()):
                    step = first_step + position
                    _commit(commits, step, state, memory, history, feed)
                if stopping:
                    raise TrainingInterrupted(
                        f"stopped in epoch {epoch + 1} of {epochs}; "
                        + (
                            f"the last finished epoch is {epoch}"
                            if commits is None
                            else f"{first_step + position} steps are kept"
                        )
                    )
                state, metrics = run_steps(state, feed.take(count), count=count)
                position += count
                history.append(metrics)
                wait_for_device(history)
            state = state.replace(epoch=state.epoch + 1)
            means = _epoch_means(history, epoch, first_step)
            position, history = 0, []
            if on_epoch is not None:
                on_epoch(state, means)
            if commits is not None and commits.is_due():
                step = first_step + steps_per_epoch
                _commit(commits, step, state, memory, history, feed)
    return state


def checked(images: Any, labels: Any) -> tuple[Any, jax.Array]:
    """Images as they are and labels as int32, after the checks."""
    if images.dtype != np.uint8 or images.ndim != 4:
        raise errors.InputError(
            f"images must be uint8 [N, H, W, C], got {images.dtype} {images.shape}"
        )
    if labels.shape != images.shape[:1]:
        raise errors.InputError(
            f"labels must be [{images.shape[0]}], one per image, got {labels.shape}"
        )
    return images, jnp.asarray(labels).astype(jnp.int32)


def wait_for_device(history: list[Any]) -> None:
    """Waits while more than a few programs are on their way.

    The device stays busy, a stop need not wait for a long queue, and only so many
    batches from files lie on the device.

    Args:
        history: what the programs of the epoch return, the newest last.
    """
    if len(history) >= _PROGRAMS_AHEAD:
        jax.block_until_ready(history[-_PROGRAMS_AHEAD])


def _restore(
    commits: commits_lib.Commits, state: state_lib.TrainState, memory: Memory
) -> tuple[state_lib.TrainState, list[Any], Any]:
    """What the last commit holds: state, metrics of the unfinished epoch, and place."""
    restored = commits.restore({"state": state, "memory": memory.arrays})
    if restored is None:
        return state, [], None
    tree, metadata = restored
    memory.arrays = tree["memory"]
    memory.notes.clear()
    memory.notes.update(metadata["notes"])
    done = {
        name: np.asarray(values, np.float64)
        for name, values in metadata["epoch_metrics"].items()
    }
    # Version 0.1.0 kept no place.
    return tree["state"], [done] if done else [], metadata.get("place")


def _commit(
    commits: commits_lib.Commits,
    step: int,
    state: state_lib.TrainState,
    memory: Memory,
    history: list[Any],
    feed: feeds.Feed,
) -> None:
    # As float64: exact for every float type, in JSON too.
    epoch_metrics = {
        name: values.tolist() for name, values in _concatenate(history).items()
    }
    metadata = {
        "notes": memory.notes,
        "epoch_metrics": epoch_metrics,
        "place": feed.place(),
    }
    commits.save(step, {"state": state, "memory": memory.arrays}, metadata)


def _check_start(
    state: state_lib.TrainState,
    history: list[Any],
    steps_per_epoch: int,
    counts: list[int],
) -> int:
    """Steps done of the unfinished epoch, 0 at an epoch boundary.

    Raises InputError if `state` does not stand there, or not between two programs.
    """
    step, epoch = int(state.step), int(state.epoch)
    position = sum(len(metrics["loss"]) for metrics in history)
    starts = np.cumsum([0, *counts[:-1]])
    if step != epoch * steps_per_epoch + position or position not in starts:
        raise errors.InputError(
            f"state at step {step}, epoch {epoch} is not at an epoch boundary of "
            f"{steps_per_epoch} steps; was batch_size or the data changed?"
        )
    return position


def _remaining(counts: list[int], position: int) -> list[int]:
    """The programs of an epoch whose first `position` steps are done."""
    starts = np.cumsum([0, *counts[:-1]])
    return [
        count for count, start in zip(counts, starts, strict=True) if start >= position
    ]


def _dispatch_sizes(steps_per_epoch: int, steps_per_dispatch: int) -> list[int]:
    """How many steps each program of an epoch takes; no step is left out.

    What does not fill a program is run step by step: a third program for the rest
    would cost another compilation to save a few gaps.
    """
    if steps_per_dispatch < 1:
        raise errors.InputError(
            f"steps_per_dispatch must be at least 1, got {steps_per_dispatch}"
        )
    full, rest = divmod(steps_per_epoch, steps_per_dispatch)
    return [steps_per_dispatch] * full + [1] * rest


def _compile_steps(
    step_fn: steps.StepFn, make_batch: MakeBatch, mesh: Mesh | None
) -> Any:
    """Jitted `(state, supply, count) -> (state, metrics [count])`."""

    def run_steps(
        state: state_lib.TrainState, supply: feeds.Supply, *, count: int
    ) -> tuple[state_lib.TrainState, steps.Metrics]:
        def one_step(state: state_lib.TrainState, part: Any) -> Any:
            key = state_lib.derive_key(state.key, state_lib.AUGMENT, state.step)
            batch = make_batch(key, *supply.batch(part))
            if mesh is not None:
                batch = sharding.constrain_batch(batch, mesh)
            return step_fn(state, batch)

        return _repeat(one_step, state, supply.parts(state, count), count)

    return jax.jit(
        run_steps,
        static_argnames="count",
        donate_argnums=0,
        # Left to itself the compiler may return split params, and the next call would
        # compile again.
        out_shardings=None if mesh is None else sharding.replicated(mesh),
    )


def _repeat(one_step: Callable[..., Any], state: Any, parts: Any, count: int) -> Any:
    """`one_step` over the rows of `parts`: unrolled on CPU, `lax.scan` elsewhere.

    On CPU a convolution's gradient inside a rolled loop misses the fast code path and
    takes some 40 times longer, silently.
    """
    if jax.default_backend() != "cpu":
        return jax.lax.scan(one_step, state, parts)
    history = []
    for i in range(count):
        part = jax.tree.map(lambda leaf, i=i: leaf[i], parts)
        state, metrics = one_step(state, part)
        history.append(metrics)
    return state, jax.tree.map(lambda *values: jnp.stack(values), *history)


def _concatenate(history: list[Any]) -> dict[str, np.ndarray]:
    """float64 `[steps]` of every metric; {} of no steps."""
    fetched = jax.device_get(history)
    # Plain float64 sums of exact float32 values: the same however steps were grouped.
    return {
        name: np.concatenate([metrics[name] for metrics in fetched]).astype(np.float64)
        for name in (fetched[0] if fetched else ())
    }


def _epoch_means(history: list[Any], epoch: int, first_step: int) -> dict[str, float]:
    """Mean of every metric over the steps of an epoch; the one fetch of the epoch."""
    values = _concatenate(history)
    bad_steps = np.flatnonzero(~np.isfinite(values["loss"]))
    if bad_steps.size:
        raise TrainingDiverged(
            f"loss is {values['loss'][bad_steps[0]]} in epoch {epoch + 1} at step "
            f"{first_step + bad_steps[0] + 1}; lower the learning rate"
        )
    return {name: float(np.mean(series)) for name, series in values.items()}
