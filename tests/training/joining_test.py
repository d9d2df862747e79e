# SPDX-License-Identifier: Apache-2.0
"""Processes find each other or stop; together they compute what one computes."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.training import agreement, joining

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPT = HERE / "in_processes.py"


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    """Whatever surrounds the tests, they see only what they announce."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "TPU_", "MEGASCALE_")):
            monkeypatch.delenv(name)
    for name in ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "7"}, None),
        ({"SLURM_NTASKS": "4"}, ("SLURM", 4)),
        # srun with fewer tasks than the allocation has
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "1"}, ("SLURM", 1)),
        ({"OMPI_COMM_WORLD_SIZE": "8"}, ("Open MPI", 8)),
        ({"PMI_SIZE": "2"}, ("MPI", 2)),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d"}, ("TPU pod", 4)),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, ("TPU pod", 1)),
        (
            {"TPU_PROCESS_ADDRESSES": "", "TPU_WORKER_HOSTNAMES": "a,b"},
            ("TPU pod", 2),
        ),
        # A batch job of one task that starts a pod; a pod of a Kubernetes cluster.
        ({"SLURM_NTASKS": "1", "TPU_WORKER_HOSTNAMES": "a,b"}, ("TPU pod", 2)),
        ({"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "4"}, ("SLURM", 4)),
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": "1"}, ("Open MPI", 1)),
        (
            {
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "JOB_COMPLETION_INDEX": "0",
                "TPU_WORKER_HOSTNAMES": "a,b",
            },
            ("TPU pod", 2),
        ),
        (
            {
                "KUBERNETES_SERVICE_HOST": "10.0.0.1",
                "JOB_COMPLETION_INDEX": "0",
                "PMI_SIZE": "1",
            },
            ("Kubernetes", None),
        ),
        (
            {"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "3"},
            ("TPU pod", 6),
        ),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (
            {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
            ("Kubernetes", None),
        ),
    ],
)
def test_the_surroundings_say_how_many_processes_there_are(environ, expected):
    assert joining.announced(environ) == expected


@pytest.mark.parametrize(
    ("environ", "options", "words"),
    [
        ({}, {"mode": "perhaps"}, ["auto, off, required", "'perhaps'"]),
        ({}, {"mode": "required"}, ["--distributed=required", "SLURM"]),
        (
            {},
            {"num_processes": 2},
            ["--num_processes needs --coordinator_address and --process_id"],
        ),
        (
            {},
            {
                "mode": "off",
                "num_processes": 2,
                "process_id": 0,
                "coordinator_address": "localhost:1",
            },
            ["--distributed=off cannot go with --coordinator_address"],
        ),
        (
            {"SLURM_NTASKS": "4", "OMPI_COMM_WORLD_SIZE": "2"},
            {},
            ["SLURM announces 4 processes and Open MPI 2", "--distributed=off"],
        ),
        (
            {"SLURM_NTASKS": "1"},
            {"mode": "required"},
            ["SLURM announces 1 process", "give --num_processes=1"],
        ),
        ({"SLURM_NTASKS": "many"}, {}, ["SLURM_NTASKS must be a number", "'many'"]),
        # Started in an allocation, but not by srun; or not by mpirun.
        ({"SLURM_NTASKS": "4"}, {}, ["SLURM announces 4", "srun", "off"]),
        ({"PMI_SIZE": "4"}, {"mode": "required"}, ["MPI announces 4 processes"]),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, {}, ["TPU pod announces 2 processes"]),
    ],
)
def test_who_cannot_join_does_not_go_on_alone(monkeypatch, environ, options, words):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.InputError) as raised:
        joining.join(**options)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("environ", "options"),
    [
        ({}, {}),
        ({"SLURM_NTASKS": "1"}, {}),
        ({"SLURM_NTASKS": "1"}, {"mode": "required", "num_processes": 1}),
        ({}, {"num_processes": 1}),
        ({"SLURM_NTASKS": "4"}, {"mode": "off"}),
    ],
)
def test_one_process_is_no_cluster(monkeypatch, environ, options):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert joining.join(**options) == 1
    assert not jax.distributed.is_initialized()


class _TpuVm:
    name = "gcetpu"

    @staticmethod
    def is_env_present():
        return True

    @staticmethod
    def get_process_count():
        return 4


def test_jax_still_detects_tpu_vms_by_the_name_asked_for():
    from jax._src import clusters

    types = clusters.ClusterEnv._cluster_types
    (known,) = [one for one in types if one.name == "gcetpu"]
    assert known.is_env_present() is False


def test_a_pod_on_a_metadata_server_is_found_also_beside_one_task(monkeypatch):
    from jax._src import clusters

    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [_TpuVm])
    for environ in ({}, {"SLURM_NTASKS": "1"}):
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        assert joining._announced_or_detected() == ("TPU pod", 4)


def test_a_jax_without_that_detection_is_told_of_in_one_line(monkeypatch, caplog):
    from jax._src import clusters

    monkeypatch.setattr(clusters.ClusterEnv, "_cluster_types", [])
    assert joining.join() == 1
    (record,) = caplog.records
    assert "has no 'gcetpu'" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_alone_everything_is_the_plain_call():
    flag = agreement.AgreedFlag(iter([False, True, False]).__next__)
    assert [flag(), flag(), flag()] == [False, True, False]
    tree = {"a": np.arange(3)}
    assert agreement.from_first(lambda: tree) is tree
    assert agreement.in_all(lambda: tree) is tree
    assert agreement.tree_from_first(lambda: (tree, 1), tree) == (tree, 1)
    with pytest.raises(OSError, match="full"):
        agreement.from_first(lambda: (_ for _ in ()).throw(OSError("full")))
    joining.abandon(3)  # returns


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def _environment(**more):
    return {
        **os.environ,
        "JAX_NUM_CPU_DEVICES": "2",
        "PYTHONPATH": str(ROOT),
        **more,
    }


@pytest.mark.slow
@pytest.mark.parametrize("process", [1])
def test_a_process_whose_others_never_come_ends_in_one_line(process, tmp_path):
    result = subprocess.run(
        [
            *(sys.executable, "-m", "nad_jax.main", "--config=configs/efrap.py:smoke"),
            f"--workdir={tmp_path / 'run'}",
            f"--coordinator_address=localhost:{_free_port()}",
            *("--num_processes=2", f"--process_id={process}", "--wait_seconds=1"),
        ],
        cwd=ROOT,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert f"process {process} of 2 waited 1 s" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """(what each process agreed to, results of process 0)."""
    out = tmp_path_factory.mktemp("cluster") / "out"
    children = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(out)],
            env=_environment(
                SLURM_JOB_ID="1",
                SLURM_STEP_NODELIST="localhost",
                SLURM_NTASKS="2",
                SLURM_PROCID=str(process),
                SLURM_LOCALID=str(process),
                JAX_COORDINATOR_PORT=str(port),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for port in [_free_port()]
        for process in range(2)
    ]
    try:
        outputs = [child.communicate(timeout=240)[0] for child in children]
    finally:
        for child in children:
            child.kill()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)
    agreed = [json.loads(out.with_suffix(f".{i}.json").read_text()) for i in range(2)]
    return agreed, dict(np.load(f"{out}.npz"))


@pytest.mark.slow
def test_what_process_0_knows_all_know(two_processes):
    for process, agreed in enumerate(two_processes[0]):
        assert agreed["first"] == {"from": 0, "text": "x" * 5000}
        assert agreed["tree"] == [True, {"step": 3}, "int8"] and agreed["key"]
        assert agreed["same"] == "digest"
        assert agreed["agreed error"] == "AgreedError: no such file"
        other = "OSError: disk full", "RuntimeError: process 0 failed: disk full"
        assert agreed["other error"] == other[process]
        assert "process 1 does not have" in agreed["differs"]
        assert agreed["fails in one"] == "AgreedError: no data (process 1)"
        # Raised between two agreements in one process, seen by both at the next.
        assert agreed["flag"] == [10, 15]
        assert agreed["read"] == [process, "digest"]
        # Before the folder is anybody's.
        assert "process 1 does not have what process 0 has" in agreed["other config"]
        assert agreed["same config"] == "nothing was raised"
        # 12 images go to 2 x 2 devices; 9 cannot be shared by 2 processes.
        assert (agreed["shared"], agreed["uneven"]) == (4, None)


@pytest.mark.slow
def test_two_processes_compute_what_one_computes(two_processes):
    specification = importlib.util.spec_from_file_location("in_processes", SCRIPT)
    assert specification is not None and specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    expected, got = script.work(None), two_processes[1]
    assert got.keys() == expected.keys()
    # In two processes, too; each of them read its half of every batch.
    assert got["stream is the same"].all()
    for name, value in expected.items():
        if name.startswith("codes") or name == "rates":
            np.testing.assert_array_equal(got[name], value, err_msg=name)
        else:
            np.testing.assert_allclose(
                got[name], value, rtol=1e-5, atol=1e-6, err_msg=name
            )
