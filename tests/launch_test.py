# SPDX-License-Identifier: Apache-2.0
"""The scripts of launch/ parse, are clean, name what is missing, and hide nothing."""

import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml

ROOT = pathlib.Path(__file__).parent.parent
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(path for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
TAIL = ["--", "--config=configs/efrap.py:smoke", '--config.title=it\'s a "title"']
# Everything that each script must be told, as (arguments, environment).
TOLD = {
    "local.sh": (["2", *TAIL], {}),
    "slurm.sh": (
        [*TAIL, "--workdir=shared"],
        {"ACCOUNT": "acc", "PARTITION": "part", "TIME": "1:00:00", "NODES": "2"},
    ),
    "slurm.sbatch": ([*TAIL[1:], "--workdir=shared"], {}),
    "tpu_vm.sh": (
        ["run", *TAIL],
        {"PROJECT": "proj", "ZONE": "zone", "NAME": "slice"},
    ),
    "gke_jobset.sh": (
        [*TAIL, "--workdir=/runs/one"],
        {
            "NAME": "job",
            "IMAGE": "image:1",
            "TPU_ACCELERATOR": "tpu-v4-podslice",
            "TPU_TOPOLOGY": "2x2x4",
            "HOSTS": "4",
            "VOLUME": "claim",
            "MOUNT": "/runs",
        },
    ),
}


def _run(name, arguments, variables, *, timeout=60):
    environment = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(LAUNCH / name), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def _dry_run(name, **more):
    arguments, variables = TOLD[name]
    result = _run(name, ["--dry-run", *arguments], {**variables, **more})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_script_is_tested_and_stands_in_the_readme():
    assert {path.name for path in SCRIPTS} == set(TOLD)
    table = (LAUNCH / "README.md").read_text("utf-8")
    rows = dict(re.findall(r"^\| `(.+?)` \|.*\| (.+?) \|$", table, re.M))
    assert rows.keys() == set(TOLD) | {"Dockerfile"}
    for name, executed in rows.items():
        assert executed.startswith("yes:" if name == "local.sh" else "never")


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse_stop_at_errors_and_please_shellcheck(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert re.search("^set -euo pipefail$", path.read_text("utf-8"), re.M)
    shellcheck = pathlib.Path(sys.executable).parent / "shellcheck"
    result = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", TOLD)
def test_whatever_is_missing_is_named_in_one_line(name):
    arguments, variables = TOLD[name]
    incomplete = [
        ({k: v for k, v in variables.items() if k != m}, m) for m in variables
    ]
    for remaining, missing in incomplete:
        result = _run(name, arguments, remaining)
        assert result.returncode == 2
        assert re.fullmatch(f"{name}: .*{missing} is missing\n", result.stderr)
    for shorter in (
        [],
        arguments[: arguments.index("--")] if "--" in arguments else [],
    ):
        result = _run(name, shorter, variables)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith(f"{name}: ")


def _commands(output):
    return [shlex.split(line) for line in output.splitlines()]


def test_local_starts_every_process_with_its_number():
    commands = _commands(_dry_run("local.sh"))
    assert [command[-1] for command in commands] == ["--process_id=0", "--process_id=1"]
    for command in commands:
        assert command[1:5] == ["-m", "nad_jax.main", *TAIL[1:]]
        assert "--num_processes=2" in command and "--distributed=required" in command


def test_local_waits_for_every_process_and_says_nothing_itself(tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nsleep 0.1\n")
    python.chmod(0o755)
    result = _run(
        "local.sh", ["4", *TAIL[:1], "x"], {"PYTHON": str(python), "PORT": "1"}
    )
    assert (result.returncode, result.stderr) == (0, "")


def test_slurm_submits_the_batch_job_which_starts_every_task():
    (submit,) = _commands(_dry_run("slurm.sh", GPUS_PER_TASK="1"))
    told = [*TAIL[1:], "--workdir=shared"]
    assert submit[0] == "sbatch" and submit[-3:] == told
    assert {"--account=acc", "--partition=part", "--nodes=2"} <= set(submit)
    assert "--gpus-per-task=1" in submit
    assert pathlib.Path(submit[-4]).name == "slurm.sbatch"
    (step,) = _commands(_dry_run("slurm.sbatch"))
    assert step[:2] == ["srun", "--kill-on-bad-exit=1"]
    assert step[3:] == ["-m", "nad_jax.main", *told, "--distributed=required"]


@pytest.mark.parametrize(
    ("code", "result", "requeued"),
    [
        (0, None, True),
        (0, "report.json", False),
        (0, "audit.json", False),
        (0, "inspection.json", False),
        (143, None, True),
        (143, "report.json", False),
        (1, None, False),
        (2, None, False),
        (130, None, False),
    ],
)
def test_a_job_that_was_asked_to_stop_is_queued_again(tmp_path, code, result, requeued):
    """SLURM calls 0 completed; where 0 is a verdict, it is 143 after SIGTERM."""
    said = tmp_path / "said"
    workdir = tmp_path / "a run"
    workdir.mkdir()
    if result is not None:
        (workdir / result).write_text("{}")
    for name, body in (("srun", f"exit {code}"), ("scontrol", f"echo $* >> {said}")):
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    arguments = ["--config=any", f"--workdir={workdir}"]
    ended = _run("slurm.sbatch", arguments, {"PATH": path, "SLURM_JOB_ID": "7"})
    assert ended.returncode == (0 if requeued else code), ended.stderr
    assert said.exists() == requeued
    assert not requeued or said.read_text() == "requeue 7\n"


@pytest.mark.parametrize(("given", "told"), [("6", "6"), (None, "none")])
def test_the_tasks_get_the_cpus_that_the_job_was_given(tmp_path, given, told):
    """srun reads its own variable only, since SLURM 22.05."""
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "srun").write_text("#!/bin/sh\necho ${SRUN_CPUS_PER_TASK:-none}\n")
    (tmp_path / "srun").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    if given is not None:
        variables["SLURM_CPUS_PER_TASK"] = given
    ended = _run("slurm.sbatch", ["--config=any", f"--workdir={tmp_path}"], variables)
    assert (ended.returncode, ended.stdout) == (0, f"{told}\n"), ended.stderr


@pytest.mark.parametrize("name", ["slurm.sh", "slurm.sbatch"])
def test_a_job_that_could_not_go_on_is_not_submitted(name):
    arguments, variables = TOLD[name]
    result = _run(name, ["--dry-run", *arguments[:-1]], variables)
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch("slurm.sbatch: --workdir=.* is missing.*\n", result.stderr)


def test_tpu_commands_name_project_and_zone_and_quote_what_the_workers_run():
    commands = _commands(_dry_run("tpu_vm.sh"))
    remote = [command for command in commands if command[0] == "gcloud"]
    for command in remote:
        assert {"--project=proj", "--zone=zone", "--worker=all"} <= set(command)
    (start,) = [part for part in remote[-1] if part.startswith("--command=")]
    words = shlex.split(start.partition("=")[2])
    assert set(TAIL[1:]) <= set(words) and "--distributed=required" in words
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)
    assert f"NAD_JAX_COMMIT={head.strip()}" in words
    assert [command[4] for command in remote] == ["scp", "ssh", "ssh", "ssh"]
    (install,) = [part for part in remote[2] if part.startswith("--command=")]
    assert "--constraint nad_jax/constraints.txt" in install


@pytest.mark.parametrize(
    ("version", "code"), [((3, 10, 12), 1), ((3, 11, 0), 0), ((3, 13, 1), 0)]
)
def test_a_worker_with_an_old_python_says_so_in_one_line(version, code):
    """Whatever comes after the check is not run then."""
    (check,) = [
        part.partition("=")[2]
        for command in _commands(_dry_run("tpu_vm.sh"))
        for part in command
        if part.startswith("--command=python3 -c")
    ]
    words = shlex.split(check)
    told = f"import sys; sys.version_info = {version}; sys.version = '3.x (old)'; "
    result = subprocess.run(
        [sys.executable, *words[1:-1], told + words[-1]], capture_output=True, text=True
    )
    assert result.returncode == code
    expected = "tpu_vm.sh: python3 must be 3.11 or newer, got 3.x\n"
    assert result.stderr == (expected if code else "")


def test_a_tpu_gets_a_commit_and_nothing_is_left_of_a_failed_copy(tmp_path):
    checkout, fakes, scratch = (tmp_path / name for name in ("checkout", "bin", "tmp"))
    for folder in (checkout / "launch", fakes, scratch):
        folder.mkdir(parents=True)
    script = checkout / "launch" / "tpu_vm.sh"
    script.write_bytes((LAUNCH / "tpu_vm.sh").read_bytes())
    (fakes / "gcloud").write_text(f"#!/bin/sh\necho $4 >> {tmp_path}/said\nexit 7\n")
    (fakes / "gcloud").chmod(0o755)

    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        subprocess.run(["git", *identity, *arguments], cwd=checkout, check=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=one")
    arguments, variables = TOLD["tpu_vm.sh"]
    path = f"{fakes}:{os.environ['PATH']}"

    def run():
        return subprocess.run(
            ["bash", script, *arguments],
            env={**variables, "PATH": path, "TMPDIR": str(scratch)},
            capture_output=True,
            text=True,
        )

    assert run().returncode == 7 and (tmp_path / "said").read_text() == "scp\n"
    (checkout / "new.py").write_text("")
    refused = run()
    assert refused.returncode == 2
    assert re.fullmatch("tpu_vm.sh: the checkout differs from .*\n", refused.stderr)
    assert (tmp_path / "said").read_text() == "scp\n"
    assert not list(scratch.iterdir())
    assert [p.name for p in checkout.iterdir() if "tar" in p.name] == []


def test_a_queued_resource_needs_its_type():
    _, variables = TOLD["tpu_vm.sh"]
    result = _run("tpu_vm.sh", ["--dry-run", "create"], variables)
    assert result.returncode == 2 and "ACCELERATOR_TYPE is missing" in result.stderr
    variables = {
        **variables,
        "ACCELERATOR_TYPE": "v4-32",
        "RUNTIME_VERSION": "v",
        "SPOT": "yes",
    }
    result = _run("tpu_vm.sh", ["--dry-run", "create"], variables)
    create = _commands(result.stdout)[0]
    assert create[3:6] == ["queued-resources", "create", "slice"]
    assert {"--accelerator-type=v4-32", "--spot"} <= set(create)
    result = _run("tpu_vm.sh", ["--dry-run", "explode"], variables)
    assert result.returncode == 2 and "'explode'" in result.stderr


def test_the_jobset_has_an_indexed_pod_on_every_host():
    jobset = yaml.safe_load(_dry_run("gke_jobset.sh"))
    assert jobset["kind"] == "JobSet" and jobset["metadata"]["name"] == "job"
    (workers,) = jobset["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    assert job["completionMode"] == "Indexed"
    (container,) = job["template"]["spec"]["containers"]
    assert container["args"] == [
        *TAIL[1:],
        "--workdir=/runs/one",
        "--distributed=required",
    ]
    (volume,) = job["template"]["spec"]["volumes"]
    assert volume["persistentVolumeClaim"] == {"claimName": "claim"}
    # Else the image's user could not write the volume.
    group = job["template"]["spec"]["securityContext"]["fsGroup"]
    dockerfile = (LAUNCH / "Dockerfile").read_text("utf-8")
    assert f"--gid {group} runner" in dockerfile and "\nUSER runner\n" in dockerfile
    assert container["volumeMounts"] == [{"name": volume["name"], "mountPath": "/runs"}]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}


@pytest.mark.parametrize(
    ("code", "result", "index", "ends_with"),
    [
        (0, None, 0, 143),
        (0, None, 1, 0),
        *((0, name, 0, 0) for name in ("report", "audit", "inspection")),
        (143, None, 0, 143),
        (1, "report", 0, 1),
        (2, None, 1, 2),
    ],
)
def test_a_pod_without_a_result_fails(tmp_path, code, result, index, ends_with):
    """The program ends with 0 when it was asked to stop, which is no success."""
    jobset = yaml.safe_load(_dry_run("gke_jobset.sh"))
    (workers,) = jobset["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    assert container["env"] == [{"name": "WORKDIR", "value": "/runs/one"}]
    (tmp_path / "nad_jax").mkdir()
    (tmp_path / "nad_jax" / "__init__.py").write_text("")
    fake = f"def main(argv):\n    print(argv[1:])\n    return {code}\n"
    (tmp_path / "nad_jax" / "main.py").write_text(fake)
    if result is not None:
        (tmp_path / f"{result}.json").write_text("{}")
    python, *command = container["command"]
    assert python == "python"
    ended = subprocess.run(
        [sys.executable, *command, *container["args"]],
        env={
            "PYTHONPATH": str(tmp_path),
            "WORKDIR": str(tmp_path),
            "JOB_COMPLETION_INDEX": str(index),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == ends_with, ended.stderr
    assert ended.stdout == f"{container['args']}\n"


@pytest.mark.parametrize(
    ("mount", "workdir"),
    [
        ("/runs", "/other/one"),
        ("/runs", "runs/one"),
        ("/runs", "/runs"),
        ("/runs", "/runs/"),
        ("/runs", "/runsandmore/one"),
        ("/runs", "/runs/../tmp"),
        ("/runs", None),
        ("runs", "runs/one"),
    ],
)
def test_a_jobset_whose_restarts_would_find_nothing_is_refused(mount, workdir):
    _, variables = TOLD["gke_jobset.sh"]
    arguments = TAIL if workdir is None else [*TAIL, f"--workdir={workdir}"]
    variables = {**variables, "MOUNT": mount}
    result = _run("gke_jobset.sh", ["--dry-run", *arguments], variables)
    assert result.returncode == 2 and not result.stdout
    assert re.fullmatch("gke_jobset.sh: .*MOUNT.*\n", result.stderr)


def test_the_image_copies_what_exists_and_starts_the_program():
    lines = (LAUNCH / "Dockerfile").read_text("utf-8").splitlines()
    everything = []
    for line in lines:
        if line.startswith("COPY"):
            *copied, _ = line.split()[1:]
            assert all((ROOT / name).exists() for name in copied)
            everything += copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"]} <= set(everything)
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    assert json.loads(entry.partition(" ")[2]) == ["python", "-m", "nad_jax.main"]
    # No checkout is copied; `pipeline.git_commit` reads this instead.
    assert {"ARG NAD_JAX_COMMIT=", "ENV NAD_JAX_COMMIT=${NAD_JAX_COMMIT}"} <= {*lines}


def test_nothing_of_ours_and_nobodys_project_is_in_launch():
    for path in SCRIPTS:
        text = path.read_text("utf-8")
        assert "import nad_jax" not in text
        assert not re.search(r"(PROJECT|ZONE|ACCOUNT|PARTITION)=[\w\"']", text)
