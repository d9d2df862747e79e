# SPDX-License-Identifier: Apache-2.0
"""One run's folder: config, metrics, checkpoints, report; and what the user sees.

    config.json     the resolved configuration; a different one is refused
    metrics.jsonl   one line per epoch, layer and row, as they happen
    checkpoints/    finished stages (Orbax); a repeated command does not repeat them
    report.json     written last, atomically
    report.html

Everything is append-only or replaced atomically, so an interrupted run leaves files
that are true as far as they go.
"""

import contextlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from nad_jax import errors
from nad_jax.report import schema


class Interrupted(Exception):
    """The user asked to stop; the message says what is safe."""


class Workdir:
    """The folder of a run, opened for writing.

    Attributes:
      path: The folder.
      seconds: Wall time by stage, in the order they happened.
      should_stop: Asked between steps, layers and rows.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        should_stop: Callable[[], bool] = lambda: False,
    ):
        self.path = pathlib.Path(path)
        self.seconds: dict[str, float] = {}
        self.should_stop = should_stop
        config = schema.plain(config, "config")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            stored = self._stored_config()
            if stored is None:
                schema.write_json(self.path / "config.json", config)
            elif stored != config:
                raise errors.InputError(
                    f"workdir {self.path} belongs to another configuration "
                    f"({_difference(stored, config)}); use another --workdir"
                )
            # Unwritable files should be known before the work, not after.
            self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")
        except OSError as error:
            raise errors.InputError(
                f"workdir {self.path} cannot be written: {error.strerror or error}"
            ) from None

    def _stored_config(self) -> Any:
        try:
            return json.loads((self.path / "config.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        except ValueError:
            raise errors.InputError(
                f"{self.path / 'config.json'} is damaged; remove it or use another "
                "--workdir"
            ) from None

    def close(self) -> None:
        self._metrics.close()

    def record(self, kind: str, **values: Any) -> None:
        """Appends a line to metrics.jsonl; a line is whole or absent."""
        line = json.dumps(schema.plain({"kind": kind, **values}), allow_nan=False)
        self._metrics.write(line + "\n")
        self._metrics.flush()

    def say(self, text: str) -> None:
        """A plain line for the user."""
        print(text, flush=True)

    def progress(self, name: str, total: int) -> "Progress":
        """Progress of one stage: a bar on a terminal, one line at the end elsewhere."""
        return Progress(name, total)

    def check_stop(self) -> None:
        """Raises `Interrupted` if the user asked to stop."""
        if self.should_stop():
            raise Interrupted("stopped; finished stages are kept")

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the block to `seconds[stage]`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent

    def stage(self, name: str, like: Any, compute: Callable[[], Any]) -> Any:
        """The result of `compute`, from the checkpoint if the stage was finished.

        Args:
          name: Folder under checkpoints/.
          like: Pytree of arrays with the result's structure, shapes and dtypes.
          compute: Does the work.
        """
        from nad_jax.training import checkpoints

        folder = self.path / "checkpoints" / name
        if checkpoints.steps(folder):
            result, metadata = checkpoints.restore(folder, like)
            self.seconds[name] = metadata["seconds"]
            self.say(f"{name}: restored from {folder}")
            return result
        self.check_stop()
        with self.timed(name):
            result = compute()
        checkpoints.save(folder, 0, result, {"seconds": self.seconds[name]})
        return result


class Progress:
    """Shows `total` units of work being done."""

    def __init__(self, name: str, total: int):
        self._name = name
        self._started = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty():
            import tqdm

            self._bar = tqdm.tqdm(total=total, desc=name, leave=False)

    def advance(self, note: str = "") -> None:
        """One unit done."""
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update()

    def done(self, note: str) -> None:
        """Replaces the bar by one line."""
        if self._bar is not None:
            self._bar.close()
        seconds = time.perf_counter() - self._started
        print(f"{self._name}: {note} ({seconds:.1f} s)", flush=True)


def _difference(stored: Any, config: Any, where: str = "config") -> str:
    """The first key in which two configurations differ."""
    if isinstance(stored, dict) and isinstance(config, dict):
        for key in [*stored, *config]:
            if stored.get(key) != config.get(key):
                return _difference(stored.get(key), config.get(key), f"{where}.{key}")
    return f"{where} was {stored!r}, now {config!r}"
