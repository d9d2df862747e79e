# SPDX-License-Identifier: Apache-2.0
"""Children forked from a process that has imported all they need.

A new interpreter takes seconds to import JAX and Orbax; a fork takes none. JAX must not
have looked for devices before, since its threads do not survive a fork.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TextIO


class Outcome(NamedTuple):
    """What came of a child.

    Attributes:
      status: Wait status.
      told: What it told before its end, in order.
      result: What its work returned.
      error: Type and message of what its work raised.
    """

    status: int
    told: list
    result: Any = None
    error: str | None = None

    @property
    def was_killed(self) -> bool:
        """Whether SIGKILL ended it, and nothing else."""
        return (
            os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGKILL
        )


# (tell) -> what JSON can hold; `tell` gives the parent such a value at once.
Work = Callable[[Callable[[Any], None]], Any]


def import_all(names: Iterable[str]) -> None:
    """Imports those of the modules that can be imported by name."""
    for name in names:
        with contextlib.suppress(ImportError):
            __import__(name)


def call(work: Work) -> Outcome:
    """Does `work` in a child, and waits for its end."""
    return finish(*start(work))


def start(work: Work) -> tuple[int, TextIO]:
    """Process id of a child that does `work`, and the stream of what it tells."""
    from jax._src import xla_bridge

    assert not xla_bridge.backends_are_initialized(), "JAX's threads do not fork"
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, open(reading, encoding="utf-8")

    def send(key: str, value: Any) -> None:
        os.write(writing, json.dumps({key: value}).encode() + b"\n")

    code = 1
    try:
        os.close(reading)
        send("result", work(lambda value: send("told", value)))
        code = 0
    except BaseException as error:
        send("error", f"{type(error).__name__}: {error}")
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def finish(child: int, stream: TextIO) -> Outcome:
    """What came of a child; `stream` from where it was left."""
    with stream:
        messages = [json.loads(line) for line in stream if line.endswith("\n")]
    status = os.waitpid(child, 0)[1]
    ends = {key: value for message in messages for key, value in message.items()}
    ends.pop("told", None)
    return Outcome(status, [m["told"] for m in messages if "told" in m], **ends)


class Server:
    """A child that answers one question after the other; a new one after its death."""

    def __init__(self, answer: Callable[..., dict]):
        self._answer = answer
        self._child: int | None = None

    def __call__(self, *arguments: Any) -> dict:
        """What `answer` returned, or "error" and what it raised."""
        if self._child is None:
            self._start()
        line = ""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._questions, json.dumps(arguments).encode() + b"\n")
            line = self._told.readline()
        if not line:
            status = finish(self._child, self._told).status
            os.close(self._questions)
            self._child = None
            return {"error": f"the answering child ended with wait status {status}"}
        return json.loads(line)["told"]

    def _start(self) -> None:
        reading, self._questions = os.pipe()

        def work(tell):
            # Or it would wait for itself once the parent is gone.
            os.close(self._questions)
            with open(reading, encoding="utf-8") as questions:
                for line in questions:
                    try:
                        tell(self._answer(*json.loads(line)))
                    except Exception as error:
                        tell({"error": f"{type(error).__name__}: {error}"})

        self._child, self._told = start(work)
        os.close(reading)
