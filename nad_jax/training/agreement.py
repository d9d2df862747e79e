# SPDX-License-Identifier: Apache-2.0
"""What several processes that run as one program tell each other.

Every process runs the same program with the same settings, in step: what is computed on
arrays that are split over all devices must be started by all of them. So what one of
them finds out alone must reach all:

- `from_first`: files belong to process 0. What it finds there, an error included, it
  tells the others, so that no process takes another way.
- `in_all`, `read_in_all`: files that each process reads for itself must be the same.
- `AgreedFlag`: a signal reaches processes at different moments; they must stop at the
  same one.

In a single process all of this is the plain function call it looks like.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from nad_jax import errors
from nad_jax.training import records

# Programs are compiled for the length of a message.
_MESSAGE_BYTES = 1024
# Questions to an `AgreedFlag` from one agreement to the next.
_QUESTIONS = 10

Json = TypeVar("Json")
Value = TypeVar("Value")


class AgreedError(errors.InputError):
    """The same error in every process, at the same point."""


def is_first() -> bool:
    """Whether this is process 0, the only one that writes files."""
    return jax.process_index() == 0


def from_first(compute: Callable[[], Json]) -> Json:
    """The value of `compute` in process 0, for all processes.

    Args:
        compute: called in process 0 only; returns what JSON can hold.

    Raises:
        AgreedError: `compute` raised InputError; the same line in all processes.
        RuntimeError: it raised something else, in the other processes.
    """
    if jax.process_count() == 1:
        return compute()
    return json.loads(_bytes_from_first(lambda: json.dumps(compute()).encode()))


def tree_from_first(
    compute: Callable[[], tuple[Any, Json]], like: Any
) -> tuple[Any, Json]:
    """As `from_first`, for a pytree of arrays and what comes with it.

    Args:
        compute: returns (tree, what JSON can hold).
        like: pytree of arrays or `jax.ShapeDtypeStruct` of the tree's structure.
    """
    if jax.process_count() == 1:
        return compute()
    leaves = records.name_leaves(like)

    def pack() -> bytes:
        tree, extra = compute()
        values = records.name_leaves(tree)
        head = json.dumps(extra).encode()
        return b"".join(
            [
                len(head).to_bytes(8, "big"),
                head,
                *map(records.to_bytes, values.values()),
            ]
        )

    message = _bytes_from_first(pack)
    start = 8 + int.from_bytes(message[:8], "big")
    extra = json.loads(message[8:start])
    values = []
    for leaf in leaves.values():
        end = start + records.num_bytes(leaf)
        values.append(records.from_bytes(message[start:end], leaf))
        start = end
    return jax.tree.unflatten(jax.tree.structure(like), values), extra


def in_all(compute: Callable[[], Json]) -> Json:
    """The value of `compute`, called in every process, which must be the same in all.

    For what each process reads for itself: if one of them cannot, or reads something
    else, all stop.

    Raises:
        AgreedError: `compute` raised InputError in some process, or two values differ.
    """
    if jax.process_count() == 1:
        return compute()
    value, error = None, None
    try:
        value = compute()
    except errors.InputError as problem:
        error = str(problem)
    answers = gather({"error": error, "value": value})
    for process, answer in enumerate(answers):
        if answer["error"] is not None:
            raise AgreedError(f"{answer['error']} (process {process})") from None
    for process, answer in enumerate(answers):
        if answer["value"] != answers[0]["value"]:
            raise AgreedError(
                f"process {process} does not have what process 0 has: "
                f"{answer['value']!r}, not {answers[0]['value']!r}"
            )
    return value  # pyright: ignore[reportReturnType]


def read_in_all(read: Callable[[], tuple[Value, Json]]) -> tuple[Value, Json]:
    """As `in_all`, for what is too large to be compared.

    Args:
        read: called in every process; returns a value and the digest of what was read.
    """
    values: list[Value] = []

    def digest() -> Json:
        value, of_value = read()
        values.append(value)
        return of_value

    agreed = in_all(digest)
    return values[0], agreed


class AgreedFlag:
    """A flag that any process may raise, and that all see at the same question.

    Every process must ask equally often. An agreement costs a round over the network
    and waits for what the devices have to do, so that only every tenth question is one;
    with a single process the flag is seen at once.

    Attributes:
        number: The largest that any process has raised, 0 until the flag is seen.
    """

    def __init__(self, raised: Callable[[], int]):
        """`raised`: number that this process has raised, such as a signal's, or 0."""
        self._raised = raised
        self._asked = 0
        self.number = 0

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            self.number = self._raised()
        elif self._asked % _QUESTIONS == 0 and not self.number:
            self.number = max(gather(self._raised()))
        self._asked += 1
        return self.number != 0


def meet() -> None:
    """Waits until every process is here.

    Who ends while process 0 still writes may be taken for lost, and end it, too.
    """
    from_first(lambda: None)


def _bytes_from_first(compute: Callable[[], bytes]) -> bytes:
    """Bytes that process 0 computes; an exception there is one everywhere."""
    from jax.experimental import multihost_utils

    content, failure = b"", None
    if is_first():
        try:
            content = compute()
        except Exception as error:
            failure = error
    head = {"size": len(content), "error": None, "is_input_error": False}
    if failure is not None:
        head["error"] = str(failure) or type(failure).__name__
        head["is_input_error"] = isinstance(failure, errors.InputError)
    head = gather(head)[0]
    if head["is_input_error"]:
        raise AgreedError(head["error"]) from failure
    if head["error"] is not None:
        raise failure or RuntimeError(f"process 0 failed: {head['error']}")
    size = head["size"]
    padded = np.zeros(max(_MESSAGE_BYTES, 1 << (size - 1).bit_length()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    received = multihost_utils.broadcast_one_to_all(padded)
    return np.asarray(received, np.uint8)[:size].tobytes()


def gather(value: Any) -> list[Any]:
    """The value of every process, in their order; what JSON can hold."""
    from jax.experimental import multihost_utils

    content = json.dumps(value).encode()
    sizes = multihost_utils.process_allgather(np.asarray([len(content)], np.int32))
    longest = int(np.max(sizes))
    longest += -longest % _MESSAGE_BYTES
    padded = np.zeros(longest, np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [
        json.loads(row[:size].tobytes())
        for row, size in zip(rows, sizes.reshape(-1), strict=True)
    ]
