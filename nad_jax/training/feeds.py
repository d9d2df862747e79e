# SPDX-License-Identifier: Apache-2.0
"""Where the batches of a training come from: the device, or files.

Both give what a program of several steps needs as one pytree, from which the program
takes its batches by itself; both follow `batches.epoch_indices`, so the batches are the
same. The loop (`nad_jax.training.loop`) does not know which one it has.

B = batch, S = steps of a program, N = examples, H = height, W = width, C = channels.
"""

import functools
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nad_jax import errors
from nad_jax.data import batches, stored, stream
from nad_jax.training import sharding
from nad_jax.training import state as state_lib


class Supply(Protocol):
    """What one program is given, a pytree; its methods are traced."""

    def parts(self, state: state_lib.TrainState, count: int) -> Any:
        """What tells `count` steps apart: every leaf has the leading axis `[S]`."""
        ...

    def batch(self, part: Any) -> tuple[Any, ...]:
        """Images uint8 `[B, H, W, C]`, labels `[B]` and companions of one step."""
        ...


class Feed(Protocol):
    """The batches of one training, one after the other."""

    def begin_epoch(self, state: state_lib.TrainState) -> None:
        """To be called with the state at the beginning of, or within, each epoch."""
        ...

    def take(self, count: int) -> Supply:
        """For the next `count` steps, all of one epoch."""
        ...

    def place(self) -> Any:
        """Where the feed stands, for a commit; None where the state tells all."""
        ...

    def close(self) -> None: ...


def shape_of_epoch(num_examples: int, batch_size: int) -> tuple[int, int]:
    """Steps of an epoch and examples of a step."""
    order = jax.eval_shape(
        lambda seed: order_of_epoch(
            jax.random.key(seed),
            seed,
            num_examples=num_examples,
            batch_size=batch_size,
        ),
        jnp.int32(0),
    )
    return order.shape


@functools.partial(jax.jit, static_argnames=("num_examples", "batch_size"))
def order_of_epoch(
    key: jax.Array, epoch: jax.Array, *, num_examples: int, batch_size: int
) -> jax.Array:
    """Rows int32 `[steps, B]` of the images of one epoch; `key` is that of the run."""
    key = state_lib.derive_key(key, state_lib.SHUFFLE)
    return batches.epoch_indices(key, epoch, num_examples, batch_size)


def open_feed(
    images: Any,
    labels: jax.Array,
    *,
    companions: tuple[Any, ...] = (),
    state: state_lib.TrainState,
    batch_size: int,
    epochs: int,
    mesh: Mesh | None,
    workers: int,
    place: Any,
) -> Feed:
    """The batches of a training from `state` on.

    Args:
        images: uint8 `[N, H, W, C]` or `stored.Images`.
        labels: int32 `[N]`.
        companions: as for `loop.fit`.
        state: where training begins; its arrays are kept.
        batch_size: examples per step, over all devices.
        epochs: total number of epochs of the run.
        mesh: as for `loop.fit`.
        workers: as for `loop.fit`.
        place: of a feed of the same training at the same step, or None.
    """
    if isinstance(images, stored.Images):
        if companions:
            raise errors.InputError(
                "companions belong to images that are an array, and these stay in "
                f"their files; got {len(companions)}"
            )
        return _FromFiles(
            images,
            labels,
            state=state,
            batch_size=batch_size,
            epochs=epochs,
            mesh=mesh,
            workers=workers,
            place=place,
        )
    if workers:
        raise errors.InputError(
            f"workers read images that stay in their files, and these are an array; "
            f"got {workers}"
        )
    return _OnDevice(images, labels, companions, batch_size=batch_size, mesh=mesh)


class Resident(NamedTuple):
    """The whole data set, and the order of an epoch."""

    images: jax.Array
    labels: jax.Array
    companions: tuple[Any, ...]
    order: jax.Array

    def parts(self, state: state_lib.TrainState, count: int) -> jax.Array:
        first = state.step - state.epoch * self.order.shape[0]
        return jax.lax.dynamic_slice_in_dim(self.order, first, count)

    def batch(self, part: jax.Array) -> tuple[Any, ...]:
        companions = jax.tree.map(lambda leaf: leaf[part], self.companions)
        return self.images[part], self.labels[part], *companions


class _OnDevice:
    def __init__(
        self,
        images: Any,
        labels: jax.Array,
        companions: tuple[Any, ...],
        *,
        batch_size: int,
        mesh: Mesh | None,
    ):
        self._order_of_epoch = functools.partial(
            order_of_epoch, num_examples=images.shape[0], batch_size=batch_size
        )
        data = (images, labels, companions)
        if mesh is None:
            self._data = jax.tree.map(jnp.asarray, data)
        else:
            self._data = sharding.replicate(data, mesh)
        self._order = jnp.zeros((0, 0), jnp.int32)

    def begin_epoch(self, state: state_lib.TrainState) -> None:
        self._order = self._order_of_epoch(state.key, state.epoch)

    def take(self, count: int) -> Resident:
        del count  # The state says which steps come next.
        images, labels, companions = self._data
        return Resident(images, labels, companions, self._order)

    def place(self) -> None:
        return None

    def close(self) -> None:
        """Nothing to end."""


class Sent(NamedTuple):
    """The batches themselves, `[S, B, ...]`."""

    images: jax.Array
    labels: jax.Array

    def parts(
        self, state: state_lib.TrainState, count: int
    ) -> tuple[jax.Array, jax.Array]:
        del state, count
        return self.images, self.labels

    def batch(self, part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return part


class _FromFiles:
    def __init__(
        self,
        images: stored.Images,
        labels: jax.Array,
        *,
        state: state_lib.TrainState,
        batch_size: int,
        epochs: int,
        mesh: Mesh | None,
        workers: int,
        place: Any,
    ):
        key = state.key
        steps_per_epoch, examples_per_step = shape_of_epoch(len(images), batch_size)
        self._mesh = mesh
        self._stream = stream.Stream(
            images,
            np.asarray(labels),
            order_of_epoch=lambda epoch: np.asarray(
                order_of_epoch(
                    key,
                    jnp.int32(epoch),
                    num_examples=len(images),
                    batch_size=batch_size,
                )
            ),
            steps_per_epoch=steps_per_epoch,
            epochs=epochs,
            columns=sharding.own_columns(examples_per_step, mesh),
            workers=workers,
            step=int(state.step),
            state=place,
        )

    def begin_epoch(self, state: state_lib.TrainState) -> None:
        """Nothing to do: the stream goes from epoch to epoch by itself."""

    def take(self, count: int) -> Sent:
        return Sent(*sharding.join_columns(self._stream.take(count), self._mesh))

    def place(self) -> dict[str, Any]:
        return self._stream.state()

    def close(self) -> None:
        self._stream.close()
