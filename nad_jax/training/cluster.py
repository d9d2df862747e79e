# SPDX-License-Identifier: Apache-2.0
"""Several processes that run as one program.

Every process runs the same program with the same settings, in step: what is computed on
arrays that are split over all devices must be started by all of them. Three things
follow, and each has a function here:

- `join`: before JAX computes anything, all processes find each other, or the job stops.
  A pod that runs as N single machines would train N models and say nothing.
- `from_first`: files belong to process 0. What it finds there, an error included, it
  tells the others, so that no process takes another way.
- `AgreedFlag`: a signal reaches processes at different moments; they must stop at the
  same one.

In a single process all of this is the plain function call it looks like.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.training import records, sharding

MODES = ("auto", "off", "required")
# What JAX is told beyond our own limit.
_PATIENCE_SECONDS = 3600

# The others must have left before process 0, whose end ends them without a word.
_GRACE_SECONDS = 2.0
# Programs are compiled for the length of a message.
_MESSAGE_BYTES = 1024
# Questions to an `AgreedFlag` from one agreement to the next.
_QUESTIONS = 10

# JAX calls itself initialized from the first attempt on.
_joined = threading.Event()

Json = TypeVar("Json")


class AgreedError(errors.InputError):
    """The same error in every process, at the same point."""


class Announcement(NamedTuple):
    """What the surroundings say about a cluster.

    Attributes:
        source: who says so.
        num_processes: how many processes there are to be; None if only JAX's own
            detection can tell.
    """

    source: str
    num_processes: int | None


# ------------------------------------------------------------------------------ joining


def join(
    mode: str = "auto",
    *,
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    wait_seconds: int = 300,
) -> int:
    """Makes this process part of its cluster; the first thing a program does.

    Args:
        mode: "auto" joins if a cluster is announced (`announced`), or if an address is
            given; "required" fails where none is; "off" never joins.
        coordinator_address: "host:port" of process 0, free there. Given for clusters
            that JAX does not know, always with the two below.
        num_processes: how many processes there are.
        process_id: which one this is, from 0.
        wait_seconds: how long to wait for the others.

    Returns:
        The number of processes, 1 without a cluster.

    Raises:
        InputError: the process could not join, or joined another number of processes
            than was announced. It must not go on by itself.
    """
    if mode not in MODES:
        raise errors.InputError(
            f"--distributed must be of {', '.join(MODES)}, got {mode!r}"
        )
    explicit = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    given = [name for name, value in explicit.items() if value is not None]
    if given and len(given) < len(explicit):
        missing = [f"--{name}" for name in explicit if name not in given]
        raise errors.InputError(f"--{given[0]} needs {' and '.join(missing)}, too")
    if mode == "off":
        if given:
            raise errors.InputError(f"--distributed=off cannot go with --{given[0]}")
        return 1
    if given:
        found = Announcement("the command line", num_processes)
    else:
        found = _announced_or_detected()
    if found is None:
        if mode == "required":
            raise errors.InputError(
                "--distributed=required, and neither SLURM, Open MPI, Kubernetes nor a "
                "TPU pod is announced; give --coordinator_address, --num_processes and "
                "--process_id"
            )
        return 1
    if found.num_processes == 1:
        return 1
    _initialize(found, explicit, wait_seconds)
    return jax.process_count()


def announced(environ: Mapping[str, str]) -> Announcement | None:
    """The cluster that environment variables tell of, if any.

    It is announced even where it cannot be joined, as to a program that is started in
    an allocation but not by `srun`: there it must be refused, not overlooked.
    """
    for source, names in (
        ("SLURM", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
        ("Open MPI", ("OMPI_COMM_WORLD_SIZE",)),
        ("MPI", ("PMI_SIZE",)),
    ):
        for name in names:
            if environ.get(name):
                return Announcement(source, _number(name, environ[name]))
    slices = environ.get("MEGASCALE_NUM_SLICES") or "1"
    workers = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES"))
    if workers:
        per_slice = len(workers.split(","))
        return Announcement(
            "TPU pod", per_slice * _number("MEGASCALE_NUM_SLICES", slices)
        )
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        return Announcement("Kubernetes", None)
    return None


def _announced_or_detected() -> Announcement | None:
    if found := announced(os.environ):
        return found
    # A TPU VM announces its pod on a metadata server alone, and the one who knows how
    # to ask is not public.
    from jax._src import clusters

    for detected in clusters.ClusterEnv._cluster_types:
        if detected.name == "gcetpu" and detected.is_env_present():
            return Announcement("TPU pod", int(detected.get_process_count()))
    return None


def _number(name: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise errors.InputError(f"{name} must be a number, got {value!r}") from None


def _initialize(
    found: Announcement, explicit: Mapping[str, Any], wait_seconds: int
) -> None:
    """`jax.distributed.initialize`, and a look at what came of it."""
    options = dict(explicit)
    try:
        if None in options.values():
            # The numbers that JAX would take anyway; known before, they can be checked.
            from jax._src import clusters

            detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
            address, count, index, devices = detect(
                None, None, None, None, None, wait_seconds
            )
            options = {
                "coordinator_address": address,
                "num_processes": count,
                "process_id": index,
                "local_device_ids": devices,
            }
        if None in (options["coordinator_address"], options["num_processes"]):
            raise errors.InputError(
                "JAX does not detect it; start every process with srun or mpirun (on "
                "Kubernetes install the package kubernetes), or give "
                "--coordinator_address, --num_processes and --process_id"
            )
        _initialize_in_time(options, wait_seconds)
        _joined.set()
        joined = jax.process_count()
        devices = len(jax.devices())
        if joined != (found.num_processes or options["num_processes"]):
            raise errors.InputError(f"{joined} processes joined")
        if devices != joined * jax.local_device_count():
            raise errors.InputError(
                f"process {jax.process_index()} has {jax.local_device_count()} of "
                f"{devices} devices; every process needs equally many"
            )
        _meet()
    # Whatever JAX, its detection or a network raises: the job cannot go on.
    except Exception as error:
        what = found.num_processes or "several"
        raise errors.InputError(
            f"{found.source} announces {what} processes, but they did not come "
            f"together: {_first_line(error)}; --distributed=off runs this process alone"
        ) from None


def _initialize_in_time(options: Mapping[str, Any], wait_seconds: int) -> None:
    """`jax.distributed.initialize`, or TimeoutError.

    JAX's own limit ends the process with a stack trace of C++, so ours must come first;
    the thread that still waits then dies with the process.
    """
    failures = []

    def initialize():
        try:
            jax.distributed.initialize(
                **options,
                cluster_detection_method="deactivate",
                initialization_timeout=wait_seconds + _PATIENCE_SECONDS,
            )
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    thread.join(wait_seconds)
    if thread.is_alive():
        raise TimeoutError(
            f"process {options['process_id']} of {options['num_processes']} waited "
            f"{wait_seconds} s at {options['coordinator_address']}"
        )
    if failures:
        raise failures[0]


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _meet() -> None:
    """Every device and every process exchange something.

    Processes on CPU connect at the first exchange, and give up if the others do not
    come within 30 s: now, while none of them is busy compiling or reading.
    """
    mesh = sharding.data_mesh()
    ones = sharding.shard_batch(np.ones(mesh.size, np.float32), mesh)
    total = jax.jit(jnp.sum, out_shardings=sharding.replicated(mesh))(ones)
    met = _gather(jax.process_index())
    if float(total) != mesh.size or met != list(range(jax.process_count())):
        raise errors.InputError(f"processes {met} and {total} devices answer")
    from_first(lambda: None)


def is_joined() -> bool:
    """Whether this process has tried to be one of several, with success or without."""
    return jax.distributed.is_initialized()


def abandon(exit_code: int) -> None:
    """Ends this process at once if it is one of several; to call after an error.

    The usual way out waits minutes for the others, who may be waiting for this one.
    """
    if not is_joined():
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if _joined.is_set() and is_first():
        time.sleep(_GRACE_SECONDS)
    os._exit(exit_code)


# ---------------------------------------------------------------------------- agreement


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
    answers = _gather({"error": error, "value": value})
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


class AgreedFlag:
    """A flag that any process may raise, and that all see at the same question.

    Every process must ask equally often. An agreement costs a round over the network
    and waits for what the devices have to do, so that only every tenth question is one;
    with a single process the flag is seen at once.
    """

    def __init__(self, is_set: Callable[[], bool]):
        self._is_set = is_set
        self._asked = 0
        self._agreed = False

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._is_set()
        if self._asked % _QUESTIONS == 0 and not self._agreed:
            self._agreed = any(_gather(self._is_set()))
        self._asked += 1
        return self._agreed


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
    head = _gather(head)[0]
    if head["is_input_error"]:
        raise AgreedError(head["error"]) from failure
    if head["error"] is not None:
        raise failure or RuntimeError(f"process 0 failed: {head['error']}")
    size = head["size"]
    padded = np.zeros(max(_MESSAGE_BYTES, 1 << (size - 1).bit_length()), np.uint8)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    received = multihost_utils.broadcast_one_to_all(padded)
    return np.asarray(received, np.uint8)[:size].tobytes()


def _gather(value: Any) -> list[Any]:
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
