# SPDX-License-Identifier: Apache-2.0
"""One run's folder: config, metrics, checkpoints, report; and what the user sees.

    config.json     the resolved configuration; another one is refused as soon as
                    something is kept that belongs to this one
    inputs.json     hashes of what was read: data, files of models; others are refused
    metrics.jsonl   one line per epoch, layer and row, as they happen
    checkpoints/    finished stages; a repeated command does not repeat them. NAME is
                    a finished one, NAME.unfinished the commits of one at work
    lock            held by the process at work here
    report.json     written last, atomically
    report.html

A repeated command goes on from the last commit, and ends with the files of a run that
was never stopped, times apart. For metrics.jsonl that is so because each commit holds
the lines of its stage: the file is written anew from them.

Of several processes the first alone reads, writes and speaks; the others learn from it
(`training.agreement`).
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from nad_jax import errors, whole_file
from nad_jax.report import schema
from nad_jax.training import agreement, receipts

if TYPE_CHECKING:
    from nad_jax.training import commits as commits_lib


# What tells that a run has ended; the last two have no checkpoints.
RESULTS = ("report.json", "audit.json", "inspection.json")


class Interrupted(Exception):
    """The user asked to stop; the message says what is safe."""


@dataclasses.dataclass
class _Stage:
    """The stage at work.

    Attributes:
      name: Folder under checkpoints/.
      start: Length of metrics.jsonl when it began, in bytes.
      began: When this run began it, by `time.perf_counter`.
      lines: What it has added since, in this run or in those it continues.
      seconds: Spent by the runs it continues, less what was timed apart.
      parts: Names of its trainings so far.
      made_by: Origins of the runs it continues.
    """

    name: str
    start: int
    began: float
    lines: list[str] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    parts: set[str] = dataclasses.field(default_factory=set)
    made_by: list[Any] = dataclasses.field(default_factory=list)


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
        origin: Mapping[str, Any] | None = None,
    ):
        """Opens the folder.

        Args:
          path: Made if missing; that of process 0 counts.
          config: Settings of the run.
          should_stop: Whether the user has asked to stop.
          origin: "git_commit", "versions" and number of "devices" of this run.

        Raises:
          InputError: the folder cannot be written, is in use, or belongs to another
            configuration; or processes differ in configuration or origin.
        """
        self.path = pathlib.Path(path)
        self.seconds: dict[str, float] = {}
        self.should_stop = should_stop
        self._origin = schema.plain(origin)
        self._origins = [self._origin]
        self._stage: _Stage | None = None
        self._metrics: Any = None
        self._has_recorded = False
        self._lock: Any = None
        config = schema.plain(config, "config")
        agreement.in_all(
            lambda: {"config": _short_hash(config), **(self._origin or {})}
        )
        agreement.from_first(lambda: self._claim(config))

    def _claim(self, config: Any) -> None:
        """Makes the folder or recognises it, and holds its lock."""
        with contextlib.ExitStack() as on_failure:
            try:
                is_new = not self.path.is_dir()
                self.path.mkdir(parents=True, exist_ok=True)
                if is_new:
                    receipts.sync_parents(self.path)
                self._lock = on_failure.enter_context(_lock(self.path))
                # What killed writers of whole files have left.
                for leftover in self.path.glob(".*.tmp"):
                    leftover.unlink()
                self._check_config(config)
                # Unwritable files should be known before the work, not after. What a
                # finished run left there stays until this one has something to say:
                # it may yet be refused.
                self._metrics = open(self.path / "metrics.jsonl", "ab")
            except OSError as error:
                raise errors.InputError(
                    f"workdir {self.path} cannot be written: {error.strerror or error}"
                ) from None
            on_failure.pop_all()

    def _check_config(self, config: Any) -> None:
        """Raises InputError if what is kept here is of another configuration."""
        stored = _read_json(self.path / "config.json")
        if stored == config:
            return
        if stored is not None:
            if self._keeps_something():
                changes = "; ".join(config_differences(stored, config))
                raise errors.InputError(
                    f"workdir {self.path} belongs to another configuration "
                    f"({changes}); use another --workdir"
                )
            # Nor do its inputs bind this run.
            (self.path / "inputs.json").unlink(missing_ok=True)
        whole_file.write_json(self.path / "config.json", config)

    def _keeps_something(self) -> bool:
        """Whether a checkpoint or a result is here."""
        from nad_jax.training import checkpoints

        root = self.path / "checkpoints"
        folders = [*root.glob("*"), *root.glob("*.unfinished/*")]
        return any(map(checkpoints.steps, folders)) or any(
            (self.path / name).exists() for name in RESULTS
        )

    def check_input(self, name: str, sha256: str) -> None:
        """Raises InputError if earlier runs here read other bytes under this name.

        What they finished belongs to those bytes, whatever the path says.
        """
        agreement.from_first(lambda: self._check_input(name, sha256))

    def _check_input(self, name: str, sha256: str) -> None:
        stored = read_inputs(self.path)
        if stored.get(name, sha256) != sha256:
            raise errors.InputError(
                f"workdir {self.path} belongs to another {name} "
                f"({hash_change(stored[name], sha256)}); use another --workdir"
            )
        if name not in stored:
            whole_file.write_json(self.path / "inputs.json", {**stored, name: sha256})

    def close(self) -> None:
        if self._metrics is None:
            return
        # What a full disk did not take was reported by `record`.
        with contextlib.suppress(OSError):
            self._metrics.close()
        self._lock.close()

    def record(self, kind: str, **values: Any) -> None:
        """Appends a line to metrics.jsonl; a line is whole or absent."""
        line = json.dumps(schema.plain({"kind": kind, **values}), allow_nan=False)
        self._write([line])

    def _write(self, lines: list[str]) -> None:
        if self._stage is not None:
            self._stage.lines += lines
        if self._metrics is None:
            return
        try:
            self._begin_metrics()
            self._metrics.write("".join(f"{line}\n" for line in lines).encode())
            self._metrics.flush()
        except OSError as error:
            raise errors.InputError(
                f"{self._metrics.name} cannot be written: {error.strerror}; what was "
                "committed is kept"
            ) from None

    def _begin_metrics(self) -> None:
        """Empties metrics.jsonl, once."""
        if self._metrics is not None and not self._has_recorded:
            self._cut_metrics(0)
            self._has_recorded = True

    def _cut_metrics(self, length: int) -> None:
        self._metrics.seek(length)
        self._metrics.truncate()

    def say(self, text: str) -> None:
        """A plain line for the user."""
        if agreement.is_first():
            print(text, flush=True)

    def progress(self, name: str, total: int) -> "Progress":
        """Progress of one stage: a bar on a terminal, one line at the end elsewhere."""
        return Progress(name, total)

    def check_stop(self) -> None:
        """Raises `Interrupted` if the user asked to stop."""
        if self.should_stop():
            raise Interrupted("stopped; what was finished is kept")

    @contextlib.contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the wall time of the block to `seconds[stage]`.

        Inside of an open stage, that one is not charged for it.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - started
            self.seconds[stage] = self.seconds.get(stage, 0.0) + spent
            if self._stage is not None:
                self._stage.seconds -= spent

    def stage(
        self,
        name: str,
        like: Any,
        compute: Callable[[], Any],
        notes: dict[str, Any] | None = None,
    ) -> Any:
        """The result of `compute`, from the checkpoint if the stage was finished.

        Args:
          name: Folder under checkpoints/.
          like: Pytree of arrays with the result's structure, shapes and dtypes.
          compute: Does the work; it may keep what it has done in `commits`.
          notes: Belongs to the result: what JSON can hold, put in by `compute`, or else
            from the checkpoint.
        """
        from nad_jax.training import checkpoints

        notes = {} if notes is None else notes
        folder = self.path / "checkpoints" / name
        if agreement.from_first(lambda: bool(checkpoints.steps(folder))):
            result, metadata = agreement.tree_from_first(
                lambda: checkpoints.restore(folder, like, settle=True), like
            )
            self.seconds[name] = metadata["seconds"]
            # Unknown in folders of earlier commits.
            self.note_origins(name, metadata.get("made_by", [None]))
            self._write(metadata["lines"])
            notes.update(metadata["notes"])
            self.say(f"{name}: restored from {folder}")
        else:
            self.check_stop()
            with self._open(name) as stage:
                result = compute()
                self.seconds[name] = _seconds(stage)
            metadata = {
                "seconds": self.seconds[name],
                "lines": stage.lines,
                "notes": notes,
                "made_by": self._made_by(stage),
            }
            agreement.from_first(lambda: checkpoints.save(folder, 0, result, metadata))
        if agreement.is_first():
            checkpoints.tidy(folder)
            shutil.rmtree(self._unfinished(name), ignore_errors=True)
        return result

    @contextlib.contextmanager
    def _open(self, name: str) -> Iterator[_Stage]:
        if self._stage is not None:
            raise RuntimeError(f"stage {name} inside of stage {self._stage.name}")
        self._begin_metrics()
        start = self._metrics.tell() if self._metrics else 0
        self._stage = _Stage(name, start, began=time.perf_counter())
        try:
            yield self._stage
        finally:
            self._stage = None

    def note_origins(self, what: str, origins: list[Any]) -> None:
        """Takes note of the runs that computed something which this one goes on with.

        Says so where the same bits can no longer be expected.
        """
        now = _arithmetic(self._origin)
        known = {None, *map(_arithmetic, self._origins)}
        for then in dict.fromkeys(map(_arithmetic, origins)):
            if now is not None and then not in known:
                self.say(
                    f"warning: {what} was computed with {then}, this is {now}; the run "
                    "will not be bitwise what one of them gives"
                )
        self._origins = _distinct([*self._origins, *origins])

    def origins(self) -> list[Any]:
        """Those of all runs that had a part in what is here, this one first."""
        return self._origins

    def _made_by(self, stage: _Stage) -> list[Any]:
        return _distinct([*stage.made_by, self._origin])

    def _unfinished(self, name: str) -> pathlib.Path:
        return self.path / "checkpoints" / f"{name}.unfinished"

    def commits(self, part: str) -> "commits_lib.Commits":
        """Where a part of the open stage, such as one training, keeps its commits.

        Restoring one also brings metrics.jsonl and the time spent back to what they
        were at the commit.

        Args:
          part: Its name, another one for each part.
        """
        from nad_jax.training import commits as commits_lib

        stage = self._stage
        if stage is None or part in stage.parts:
            raise RuntimeError(f"no stage is open, or it has a part {part!r} already")
        stage.parts.add(part)
        folder = self._unfinished(stage.name) / folder_name(part)

        def recall(remembered: dict[str, Any]) -> None:
            stage.began = time.perf_counter()
            stage.seconds = remembered["seconds"]
            stage.lines = []
            if self._metrics is not None:
                self._cut_metrics(stage.start)
            self._write(remembered["lines"])
            stage.made_by = remembered.get("made_by", [None])
            self.note_origins(part, stage.made_by)
            self.say(f"{part}: goes on from {folder}")

        return commits_lib.Commits(
            folder,
            remember=lambda: {
                "lines": stage.lines,
                "seconds": _seconds(stage),
                "made_by": self._made_by(stage),
            },
            recall=recall,
        )


def read_inputs(folder: pathlib.Path) -> dict[str, str]:
    """Name -> sha256 of what runs in a folder have read; {} if they kept no record.

    Raises:
      InputError: the record cannot be read or is damaged.
    """
    path = folder / "inputs.json"
    stored = _read_json(path)
    if stored is None:
        return {}
    if not isinstance(stored, dict) or not all(
        isinstance(known, str) for known in stored.values()
    ):
        raise _damaged(path)
    return stored


def hash_change(was: str, now: str) -> str:
    """Two hashes, for a message."""
    return f"sha256 was {was[:12]}..., now {now[:12]}..."


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise errors.InputError(
            f"cannot read {path}: {error.strerror or error}"
        ) from None
    except (ValueError, RecursionError):
        raise _damaged(path) from None


def _damaged(path: pathlib.Path) -> errors.InputError:
    return errors.InputError(f"{path} is damaged; remove it or use another --workdir")


def _short_hash(config: Any) -> str:
    return hashlib.sha256(json.dumps(config).encode()).hexdigest()[:12]


def folder_name(name: str) -> str:
    """A name in words as that of a folder; numbers stay different from each other."""
    return re.sub(r"[^\w.-]+", "-", name)


def _arithmetic(origin: Any) -> str | None:
    """What of an origin decides about the bits of a result."""
    if origin is None:
        return None
    return f"jaxlib {origin['versions'].get('jaxlib')} on {origin['devices']} devices"


def _distinct(values: list[Any]) -> list[Any]:
    return [value for i, value in enumerate(values) if value not in values[:i]]


def _seconds(stage: _Stage) -> float:
    return stage.seconds + time.perf_counter() - stage.began


def _lock(folder: pathlib.Path) -> Any:
    """The open lock file of a folder; nobody else has it until it is closed.

    The kernel gives the lock up when its process dies, so none is ever stale.

    Raises:
      InputError: another process has it.
      OSError: no file can be made or locked there.
    """
    path = folder / "lock"
    file = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise errors.InputError(
            f"workdir {folder} is in use by {holder}; wait for it, or use another "
            "--workdir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


class Progress:
    """Shows `total` units of work being done."""

    def __init__(self, name: str, total: int):
        self._name = name
        self._started = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty() and agreement.is_first():
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
        if agreement.is_first():
            print(f"{self._name}: {note} ({seconds:.1f} s)", flush=True)


def config_differences(stored: Any, config: Any, where: str = "config") -> list[str]:
    """Every key in which two configurations differ, with both values."""
    if not (isinstance(stored, dict) and isinstance(config, dict)):
        return [f"{where} was {stored!r}, now {config!r}"]
    differences = []
    for key in dict.fromkeys([*stored, *config]):
        name = f"{where}.{key}"
        if key not in config:
            differences.append(f"{name} was {stored[key]!r}, now absent")
        elif key not in stored:
            differences.append(f"{name} was absent, now {config[key]!r}")
        elif stored[key] != config[key]:
            differences += config_differences(stored[key], config[key], name)
    return differences
