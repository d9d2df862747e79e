# SPDX-License-Identifier: Apache-2.0
"""Makes several processes one program, before JAX computes anything.

All of them find each other, or the job stops: a pod that runs as N single machines
would train N models and say nothing. What they then agree upon is in `agreement`.
"""

import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.training import agreement, sharding

_LOGGER = logging.getLogger(__name__)

MODES = ("auto", "off", "required")
# What JAX is told beyond our own limit.
_PATIENCE_SECONDS = 3600

# The others must have left before process 0, whose end ends them without a word.
_GRACE_SECONDS = 2.0

# What JAX calls the detection of TPU VMs.
_TPU_VM = "gcetpu"

# JAX calls itself initialized from the first attempt on.
_joined = threading.Event()


class Announcement(NamedTuple):
    """What the surroundings say about a cluster.

    Attributes:
        source: who says so.
        num_processes: how many processes there are to be; None if only JAX's own
            detection can tell.
    """

    source: str
    num_processes: int | None


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
            given; "required" fails where none is, or one of a single process that
            `num_processes` does not ask for; "off" never joins.
        coordinator_address: "host:port" of process 0, free there. Given for clusters
            that JAX does not know, always with the two below.
        num_processes: how many processes there are; 1 needs no address.
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
    alone = num_processes == 1 and given == ["num_processes"]
    if given and len(given) < len(explicit) and not alone:
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
        if mode == "required" and not given:
            raise errors.InputError(
                f"--distributed=required, and {found.source} announces 1 process; if "
                "one is meant, give --num_processes=1"
            )
        return 1
    _initialize(found, explicit, wait_seconds)
    return jax.process_count()


def announced(environ: Mapping[str, str]) -> Announcement | None:
    """The cluster that environment variables tell of, if any.

    It is announced even where it cannot be joined, as to a program that is started in
    an allocation but not by `srun`: there it must be refused, not overlooked.

    Raises:
        InputError: as `_one_of`, or a variable that must be a number is none.
    """
    return _one_of(_announcements(environ))


def _announcements(environ: Mapping[str, str]) -> list[Announcement]:
    """All of them, which may be several: a TPU pod of a Kubernetes cluster is both."""
    found = []
    for source, names in (
        ("SLURM", ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")),
        ("Open MPI", ("OMPI_COMM_WORLD_SIZE",)),
        ("MPI", ("PMI_SIZE",)),
    ):
        told = [name for name in names if environ.get(name)]
        if told:
            found.append(Announcement(source, _number(told[0], environ[told[0]])))
    slices = environ.get("MEGASCALE_NUM_SLICES") or "1"
    workers = environ.get("TPU_PROCESS_ADDRESSES") or environ.get(
        "TPU_WORKER_HOSTNAMES"
    )
    if workers:
        per_slice = len(workers.split(","))
        found.append(
            Announcement("TPU pod", per_slice * _number("MEGASCALE_NUM_SLICES", slices))
        )
    if "KUBERNETES_SERVICE_HOST" in environ and "JOB_COMPLETION_INDEX" in environ:
        found.append(Announcement("Kubernetes", None))
    return found


def _one_of(found: list[Announcement]) -> Announcement | None:
    """The one that counts: several processes, else an unknown number, else one.

    Where a batch job of one task starts a pod, the pod is meant.

    Raises:
        InputError: two of them announce different numbers above 1.
    """
    several = [one for one in found if (one.num_processes or 0) > 1]
    for other in several[1:]:
        if other.num_processes != several[0].num_processes:
            raise errors.InputError(
                f"{several[0].source} announces {several[0].num_processes} processes "
                f"and {other.source} {other.num_processes}; give "
                "--coordinator_address, --num_processes and --process_id, or "
                "--distributed=off"
            )
    unknown = [one for one in found if one.num_processes is None]
    return next(iter([*several, *unknown, *found]), None)


def _announced_or_detected() -> Announcement | None:
    found = _announcements(os.environ)
    if all(one.num_processes == 1 for one in found):
        found += _on_metadata_server()
    return _one_of(found)


def _on_metadata_server() -> list[Announcement]:
    """The pod of a TPU VM, which is announced there alone.

    Who knows how to ask is not public in JAX.
    """
    from jax._src import clusters

    known = [one for one in clusters.ClusterEnv._cluster_types if one.name == _TPU_VM]
    if not known:
        _LOGGER.warning(
            "this version of JAX has no %r: a pod that only a metadata server "
            "announces is not found; give --coordinator_address",
            _TPU_VM,
        )
    return [
        Announcement("TPU pod", int(one.get_process_count()))
        for one in known
        if one.is_env_present()
    ]


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
    met = agreement.gather(jax.process_index())
    if float(total) != mesh.size or met != list(range(jax.process_count())):
        raise errors.InputError(f"processes {met} and {total} devices answer")
    agreement.meet()


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
    if _joined.is_set() and agreement.is_first():
        time.sleep(_GRACE_SECONDS)
    os._exit(exit_code)
