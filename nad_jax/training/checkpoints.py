# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: what was saved comes back bit for bit, or not at all.

Orbax writes, and makes each step appear in one rename. A step holds two items: "record"
(see `records`: path, dtype, shape and sha256 of every leaf) and "arrays", the bytes of
all leaves in the order of the record, as one array. One array and not one for each leaf
since Orbax casts leaves to what is asked for, refuses empty ones, and reads them
concurrently, which leaves stray errors of other threads behind when one is damaged.

Ours, too: the hash of every file (`receipts`), falling back to the previous step when
the newest is damaged, and the choice of the steps to keep: the newest, since what a
training holds for its best is part of every tree it saves. Nothing is pickled. The
directory is the only memory: every call lists it afresh, so a step that a crash took
away is never asked for. One writer per directory; of several processes (`agreement`)
the first, which must not be waiting for the others here.
"""

import contextlib
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nad_jax import errors
from nad_jax.training import receipts, records

_LOGGER = logging.getLogger(__name__)
_BYTES = "bytes"  # Name of the one array in the item "arrays".
_ORBAX_TEMPORARY = ".orbax-checkpoint-tmp"
# How tensorstore speaks of errno.
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")

DirectoryPath = str | os.PathLike[str]


def save(
    directory: DirectoryPath,
    step: int,
    tree: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    keep_newest: int = 2,
) -> None:
    """Saves a step and returns when it is on disk.

    Args:
        directory: of one run; made if missing. Leftovers of a killed save are removed.
        step: larger than every step on disk. Damaged steps at or after it are removed.
        tree: pytree of arrays, typed keys among them.
        metadata: what JSON can hold.
        keep_newest: how many of the newest intact steps to keep, at least 1.

    Raises:
        InputError: a leaf is not an array, the metadata are not JSON, the directory
            already holds this step or a later one, or the disk does not take it; then
            all earlier steps are as they were.
    """
    import orbax.checkpoint as ocp

    if step < 0 or keep_newest < 1:
        raise errors.InputError(
            f"step must be at least 0 and keep_newest at least 1, got {step} and "
            f"{keep_newest}"
        )
    root = _local(directory)
    leaves = records.name_leaves(tree)
    contents = {name: records.to_bytes(leaf) for name, leaf in leaves.items()}
    record = records.seal(leaves, contents, step, metadata)
    content = np.frombuffer(b"".join(contents.values()), np.uint8)
    if not content.size:
        raise errors.InputError(f"there is nothing to save in step {step}")
    with _as_unwritable(root, step):
        tidy(root)
        _make_room(root, step, tree)
        # Ours, since Orbax's `max_to_keep` counts damaged steps.
        keep = {step, *_intact_steps(root)[::-1][: keep_newest - 1]}
        is_new = not root.is_dir()
        root.mkdir(parents=True, exist_ok=True)  # Orbax does not for one process.
        if is_new:
            receipts.sync_parents(root)
        options = ocp.CheckpointManagerOptions(
            create=False,
            multiprocessing_options=_alone(),
            enable_async_checkpointing=False,
            cleanup_tmp_directories=True,
            preservation_policy=_KeepSteps(keep),
        )
        with _quiet_orbax(), ocp.CheckpointManager(root, options=options) as manager:
            manager.save(
                step,
                args=ocp.args.Composite(
                    arrays=ocp.args.StandardSave({_BYTES: content}),
                    record=ocp.args.JsonSave(record),
                ),
            )
        receipts.write(root / str(step))
    if step not in steps(root):
        raise RuntimeError(f"step {step} was not saved in {root}, and Orbax was silent")


def restore(
    directory: DirectoryPath, like: Any, *, settle: bool = False
) -> tuple[Any, dict[str, Any]]:
    """Tree and metadata of the newest undamaged step.

    Damaged steps are passed over with a warning that names them; they stay on disk.

    Args:
        directory: as given to `save`.
        like: pytree of the same structure, of arrays or `jax.ShapeDtypeStruct`. Only
            shapes and dtypes are used; where it holds numpy arrays, numpy comes back.
        settle: also finishes what a save was killed in: forces a step without receipt
            to disk and gives it one. For the writer of the directory.

    Raises:
        InputError: there is no step, none is undamaged, or the newest undamaged one is
            of another model: leaves missing or left over, or of another shape or
            dtype. Nothing is ever cast.
    """
    root = _local(directory)
    damages = []
    for step in reversed(steps(root)):
        try:
            restored = _read(root, step, like)
        except records.DamagedStep as damage:
            damages.append(f"step {step}: {damage}")
            _LOGGER.warning("checkpoint %s is damaged: %s", root / str(step), damage)
            continue
        if settle and not receipts.exists(root / str(step)):
            with _as_unwritable(root, step):
                receipts.sync_parents(root)
                receipts.write(root / str(step))
        return restored
    if damages:
        raise errors.InputError(
            f"no undamaged checkpoint in {root} ({'; '.join(damages)}); remove it to "
            "begin afresh"
        )
    raise errors.InputError(f"no checkpoint in {root}")


def steps(directory: DirectoryPath) -> list[int]:
    """Steps on disk, ascending; [] if there is no such directory."""
    root = _local(directory)
    if not root.is_dir():
        return []
    names = (entry.name for entry in root.iterdir())
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]*", name))


def tidy(directory: DirectoryPath) -> None:
    """Removes what killed saves have left besides whole steps.

    `save` does so first; this is for a directory that will see no further save.
    """
    root = _local(directory)
    if not root.is_dir():
        return
    for entry in root.iterdir():
        if _ORBAX_TEMPORARY in entry.name:
            shutil.rmtree(entry)
        elif receipts.is_leftover(entry.name):
            entry.unlink()


def _local(directory: DirectoryPath) -> pathlib.Path:
    if "://" in os.fspath(directory):
        raise errors.InputError(
            f"checkpoints need a local or mounted directory, got {directory}"
        )
    return pathlib.Path(directory).absolute()


class _KeepSteps:
    """Orbax preservation policy: the steps of a set."""

    def __init__(self, keep: set[int]):
        self._keep = keep

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        del context
        return [checkpoint.step in self._keep for checkpoint in checkpoints]


def _intact_steps(root: pathlib.Path) -> list[int]:
    """Steps whose files and record are intact, ascending."""
    intact = []
    for step in steps(root):
        with contextlib.suppress(records.DamagedStep):
            _check_files(root, step)
            _read_record(root, step)
            intact.append(step)
    return intact


def _make_room(root: pathlib.Path, step: int, tree: Any) -> None:
    """Removes damaged steps from `step` on; raises InputError if one is good."""
    for other in steps(root):
        if other < step:
            continue
        try:
            _read(root, other, tree)
        except records.DamagedStep as damage:
            _LOGGER.warning("removing damaged %s: %s", root / str(other), damage)
            shutil.rmtree(root / str(other))
        else:
            raise errors.InputError(
                f"cannot save step {step}: {root} already holds step {other}; "
                "continue from that or use another directory"
            )


def _read(root: pathlib.Path, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
    """Tree and metadata of one step, every leaf checked against its hash."""
    _check_files(root, step)
    record = _read_record(root, step)
    leaves = records.name_leaves(like)
    records.check_leaves(record, leaves)
    sizes = {name: records.num_bytes(leaves[name]) for name in record["leaves"]}
    content = _read_bytes(root / str(step) / "arrays", sum(sizes.values()))
    values, start = {}, 0
    for name, size in sizes.items():
        part = content[start : start + size].tobytes()
        records.check_content(record, name, part)
        values[name] = records.from_bytes(part, leaves[name])
        start += size
    tree = jax.tree.unflatten(jax.tree.structure(like), [values[n] for n in leaves])
    return tree, record["metadata"]


def _check_files(root: pathlib.Path, step: int) -> None:
    with _as_damage("receipt"):
        receipts.check(root / str(step))


def _read_record(root: pathlib.Path, step: int) -> dict[str, Any]:
    import orbax.checkpoint as ocp

    folder = root / str(step) / "record"
    with (
        _as_damage("record"),
        ocp.Checkpointer(
            ocp.JsonCheckpointHandler(), multiprocessing_options=_alone()
        ) as reader,
    ):
        sealed = reader.restore(folder)
    return records.open_sealed(sealed, step)


def _read_bytes(folder: pathlib.Path, size: int) -> np.ndarray:
    import orbax.checkpoint as ocp

    with (
        _as_damage("array"),
        ocp.StandardCheckpointer(multiprocessing_options=_alone()) as reader,
    ):
        declared = reader.metadata(folder).item_metadata
        # Before anything is allocated: a damaged shape may ask for any amount.
        if declared is None or declared[_BYTES].shape != (size,):
            raise records.DamagedStep(f"its array is not one of {size} bytes")
        return reader.restore(folder, {_BYTES: np.empty(size, np.uint8)})[_BYTES]


def _alone() -> Any:
    """Orbax option: process 0 does this, and waits for nobody."""
    import orbax.checkpoint as ocp

    return ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})


@contextlib.contextmanager
def _as_unwritable(root: pathlib.Path, step: int) -> Iterator[None]:
    """Turns what the operating system refuses into one line, and cleans up."""
    try:
        yield
    except errors.InputError:
        raise
    except Exception as error:
        found = _OS_ERROR.search(str(error))
        code = int(found[1]) if found else getattr(error, "errno", None)
        if code is None:
            raise
        with contextlib.suppress(OSError):
            tidy(root)
        raise errors.InputError(
            f"checkpoint {root / str(step)} cannot be written: "
            f"{os.strerror(code)}; earlier commits are kept"
        ) from error


@contextlib.contextmanager
def _as_damage(what: str) -> Iterator[None]:
    """Turns whatever a parser makes of damaged bytes into DamagedStep."""
    try:
        with _quiet_orbax():
            yield
    except records.DamagedStep:
        raise
    except Exception as error:
        raise records.DamagedStep(
            f"its {what} cannot be read ({type(error).__name__})"
        ) from error


@contextlib.contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Orbax logs a page per save under absl's default verbosity."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
