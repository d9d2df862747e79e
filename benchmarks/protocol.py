# SPDX-License-Identifier: Apache-2.0
"""How the driver and the sides talk: one JSON object a line, over pipes.

    driver                          side
    starts the process         ->   imports, compiles, warms up
                               <-   {"event": "ready", ...facts}
    "go"                       ->   works once
                               <-   {"event": "done", "seconds": 0.1, ...facts}
    "stop", or end of file     ->   exits

A side that is timed from start to exit sends "ready" last and gets "stop". Standard
library only: the driver must stay small, because Linux counts the memory of the process
that starts a child as the child's own peak until the child needs more.
"""

import contextlib
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any


class SideFailed(RuntimeError):
    """A side ended before it said what it should; the message is its last line."""


class Channel:
    """The side's end. Whatever else the side prints goes to its standard error."""

    def __init__(self):
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        # Line by line, or what was printed before an error comes after it.
        sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore

    def ready(self, **facts: Any) -> None:
        """Says that the next "go" will be timed."""
        self._send({"event": "ready", **facts})

    def next(self) -> bool:
        """Waits; False when there is no more to do."""
        return sys.stdin.readline().strip() == "go"

    def done(self, seconds: float, **facts: Any) -> None:
        """Says how long one unit of work took."""
        self._send({"event": "done", "seconds": seconds, **facts})

    def _send(self, message: Mapping[str, Any]) -> None:
        self._out.write(json.dumps(message, allow_nan=False) + "\n")
        self._out.flush()


def serve(tasks: Mapping[str, str], task: str, options: str) -> None:
    """Runs one task of a side.

    Args:
      tasks: Name -> "module:function" with the signature (channel, options).
      task: A name.
      options: What the function is told, as JSON.
    """
    channel = Channel()
    module, function = tasks[task].split(":")
    # Imported before the options are read: `help` must not pay for JAX.
    run = getattr(importlib.import_module(module), function)
    run(channel, json.loads(options))


class Child:
    """The driver's end: one running side.

    Attributes:
      pid: Process id.
      started: `time.perf_counter()` when it was started.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: pathlib.Path,
        environment: Mapping[str, str],
        folder: pathlib.Path,
    ):
        self._log = log
        self.started = time.perf_counter()
        with open(log, "wb") as stderr:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **environment},
                cwd=folder,
                encoding="utf-8",
            )
        self.pid = self._process.pid

    def expect(self, event: str) -> dict[str, Any]:
        """The next message, which must be of that kind."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {}
        if message.get("event") != event:
            self._fail(f"no {event!r}")
        return message

    def go(self) -> dict[str, Any]:
        """One unit of work: its "done" message."""
        try:
            self._write("go\n")
        except BrokenPipeError:
            self._fail("it is gone")
        return self.expect("done")

    def stop(self) -> int:
        """Lets the side exit; returns its peak memory in bytes."""
        # A side that has said all it had to may be gone already.
        with contextlib.suppress(BrokenPipeError):
            self._write("stop\n")
        # wait4 and not wait: it tells this child's memory from that of the others.
        _, status, usage = os.wait4(self.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        if self._process.returncode:
            self._fail(f"exit code {self._process.returncode}")
        return usage.ru_maxrss * 1024

    def kill(self) -> None:
        """Ends the side if it still runs, and closes the pipes."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _write(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def _fail(self, what: str) -> None:
        self.kill()
        lines = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        raise SideFailed(f"{what}; {lines[-1] if lines else 'it said nothing'}")
