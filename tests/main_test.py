# SPDX-License-Identifier: Apache-2.0
"""The command line: mistakes are one line and exit code 2; the smoke run is whole."""

import contextlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from nad_jax import inspect_experiment, main
from nad_jax.report import schema

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import resume_sweep  # noqa: E402

CONFIG = f"--config={ROOT / 'configs' / 'efrap.py'}"
SMOKE = f"{CONFIG}:smoke"


@pytest.fixture(scope="module", autouse=True)
def _children_compile_a_little():
    """They train, all with the same programs, and keep those: twice as fast so."""
    quick = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = quick.replace(
        "optimization_level=0", "optimization_level=1"
    )
    yield
    os.environ["XLA_FLAGS"] = quick


def _fails(capsys, *arguments):
    """The one line that a bad command line prints."""
    assert main.main(["main", *arguments]) == 2
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "Traceback" not in output.err
    return output.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["--config is missing", "configs/efrap.py"]),
        (["--config=nowhere.py"], ["'nowhere.py' is not there", "configs/efrap.py"]),
        ([f"{CONFIG}:giant"], ["variant must be", "'giant'"]),
        ([CONFIG, "--config.lrr=1"], ["--config.lrr", "no key 'lrr'"]),
        ([CONFIG, "--config.victim.epoch=1"], ["'epoch'", "did you mean 'epochs'"]),
        ([CONFIG, "--config.victim.epochs=abc"], ["--config.victim.epochs=abc"]),
        ([CONFIG, "--config.title.x=1"], ["--config.title.x=1", "not a section"]),
        ([CONFIG, "--config.defense.weight_bits=11"], ["2 to 8, got 11"]),
        ([CONFIG, "--config.attack.grid.range_method=mse"], ["absmax or minmax"]),
        ([CONFIG, "--config.defense.grid.range_method=avg"], ["range_method", "avg"]),
        (
            [CONFIG, "--config.data.data_dir=here"],
            ["config.data.data_dir must be None for digits", "got 'here'"],
        ),
        ([CONFIG, "--bogus=1"], ["bogus"]),
        ([CONFIG, "stray"], ["unexpected argument 'stray'"]),
        ([CONFIG, "--config.lr=1", SMOKE], ["given 2 times", "efrap.py:smoke)"]),
        ([CONFIG, "--config", "configs/nad.py"], ["given 2 times", "configs/nad.py)"]),
        (["--config", "nowhere.py"], ["'nowhere.py' is not there", "configs/nad.py"]),
        (["--config=."], ["'.' is a folder", "configs/efrap.py"]),
        (["--config=audit.py:abc"], ["audit.py': variant must be empty, got 'abc'"]),
        (["--config=inspect.py:abc"], ["variant must be empty, got 'abc'"]),
        (
            ["--config=nad.py", "--config.attack.trojan.neurons=1"],
            ["--config.attack.trojan.neurons: config.attack.trojan is off in this"],
        ),
        ([CONFIG, "--config.repairs.rows=x"], ["config.repairs is off in this"]),
        ([CONFIG, "--config.victim_workdir.x=1"], ["victim_workdir is not a section"]),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, words):
    error = _fails(capsys, *arguments)
    for word in words:
        assert word in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_judge_gives_no_verdict(monkeypatch, tmp_path, number):
    """0 would say that nothing was found."""

    def stopped(config, workdir, *, command):
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            workdir.check_stop()
            time.sleep(0.01)

    monkeypatch.setattr(inspect_experiment, "run", stopped)
    command = ["--config=configs/inspect.py", "--config.float_model=any"]
    code = main.main(["main", *command, f"--workdir={tmp_path}"])
    assert code == 128 + number


def test_a_bug_is_not_a_verdict(monkeypatch, capsys, tmp_path):
    """Python's own exit code after a traceback would say "rejected"."""

    def broken(*arguments):
        raise RuntimeError("a bug")

    monkeypatch.setattr(main, "_run", broken)
    assert main.main(["main", SMOKE, f"--workdir={tmp_path}"]) == 2
    assert "RuntimeError: a bug" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.name=nothing_like_it", ["nothing_like_it"]),
        ("model.name=alexnet", ["alexnet", "resnet_14"]),
        ("attack.target_label=10", ["config.attack.target_label", "below 10, "]),
        ("attack.trigger.name=cross", ["config.attack.trigger.name", "square"]),
        ("attack.trigger.size=40", ["size 40", "does not fit"]),
        ("victim_workdir=/nowhere", ["/nowhere", "not the folder of a run"]),
    ],
)
def test_a_mistake_found_later_is_one_line(capsys, tmp_path, override, words):
    error = _fails(capsys, SMOKE, f"--config.{override}", f"--workdir={tmp_path}/run")
    for word in words:
        assert word in error
    assert not (tmp_path / "run" / "report.json").exists()


@pytest.mark.parametrize("returned", ["{'job': 'efrap'}", "None", "[1]"])
def test_a_config_file_must_return_a_config(capsys, tmp_path, returned):
    path = tmp_path / "own.py"
    path.write_text(f"def get_config():\n  return {returned}\n")
    error = _fails(capsys, f"--config={path}")
    assert "get_config of" in error and "ml_collections.ConfigDict" in error


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no function get_config"),
        ("def get_config():\n  open('/nowhere')\n", "cannot be read: [Errno 2]"),
        ("open('/nowhere')\n", "cannot be read: Failed loading"),
        ("import nothing_like_it\n", "No module named 'nothing_like_it'"),
        ("def get_config(:\n", "cannot be read: invalid syntax"),
    ],
)
def test_a_config_file_that_is_none_is_named(
    capsys, tmp_path, monkeypatch, text, words
):
    # The library loads a second file over the first, whose functions then stay.
    monkeypatch.delitem(sys.modules, "config_config", raising=False)
    (tmp_path / "own.py").write_text(text)
    error = _fails(capsys, "--config", f"{tmp_path / 'own.py'}")
    assert f"config file '{tmp_path / 'own.py'}'" in error and words in error


def test_a_run_of_which_the_config_is_a_list_is_none(capsys, tmp_path):
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "config.json").write_text("[]")
    override = f"--config.victim_workdir={tmp_path / 'earlier'}"
    error = _fails(capsys, SMOKE, override, f"--workdir={tmp_path}/run")
    assert "not the folder of a run" in error and "mapping, got []" in error


def test_help_is_exit_code_0_and_names_the_configs(capsys):
    assert main.main(["main", "--help"]) == 0
    assert "efrap.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [["--config=configs/efrap.py"], ["--config", "configs/efrap.py"]]
)
def test_a_shipped_config_is_found_from_any_folder(
    capsys, tmp_path, monkeypatch, arguments
):
    monkeypatch.chdir(tmp_path)
    error = _fails(capsys, *arguments, "--config.defense.weight_bits=1")
    assert "config.defense.weight_bits must be 2 to 8" in error


def _start(workdir, *arguments, stderr=subprocess.PIPE):
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "nad_jax.main",
            SMOKE,
            f"--workdir={workdir}",
            *arguments,
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a smoke run."""
    path = tmp_path_factory.mktemp("smoke") / "run"
    process = _start(path)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return path


@pytest.mark.slow
def test_a_run_leaves_everything_it_promises(finished):
    report = schema.read_report(finished / "report.json")
    rows = {(row["model"], row["name"]): row for row in report["rows"]}
    for model in ("backdoored", "clean"):
        for name in ("float", "nearest", "stochastic", "reconstruction", "efrap"):
            row = rows[model, name]
            assert row["acc_count"] == 500 and row["asr_count"] == 450
            assert 0 <= row["acc"] <= 1 and 0 <= row["asr"] + row["ra"] <= 1
        assert rows[model, "nearest"]["flip_rate"] == 0
        assert rows[model, "efrap"]["flip_rate"] > 0
    assert report["config"]["defense"]["weight_bits"] == 4
    assert (report["attack"], report["weight_bits"]) == ("pq", 4)
    assert (report["dataset"], report["seed"]) == ("digits", 0)
    (facts,) = report["acceptance"]
    assert facts["defender_grid"]["asr"] == rows["backdoored", "nearest"]["asr"]
    assert facts["own_grid"] == [{"weight_bits": 4, "same_grid": True}]
    assert facts["float"]["asr"] == rows["backdoored", "float"]["asr"]
    config = json.loads((finished / "config.json").read_text("utf-8"))
    assert config == report["config"]
    kinds = {
        json.loads(line)["kind"]
        for line in (finished / "metrics.jsonl").read_text("utf-8").splitlines()
    }
    assert kinds == {"epoch", "layer", "row"}
    page = (finished / "report.html").read_text("utf-8")
    assert "<svg" in page and "data:image/png" in page
    assert "http://" not in page and "https://" not in page


@pytest.mark.slow
def test_a_repeated_command_gives_the_same_rows_without_training(finished):
    before = schema.read_report(finished / "report.json")["rows"]
    process = _start(finished)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "restored from" in output and "victim, seed 0" not in output
    after = schema.read_report(finished / "report.json")["rows"]
    for row in [*before, *after]:
        row.pop("seconds")
    assert before == after


@pytest.mark.slow
def test_a_run_killed_in_a_layer_ends_as_if_it_had_not_been(finished, tmp_path):
    """Bitwise; the sweep over all points is in results/reliability."""
    stage = "efrap, backdoored, seed 0"
    code, _ = resume_sweep.run_through("efrap", 0, tmp_path, ["layer", stage, 4], 9)
    assert code == -signal.SIGKILL
    code, line = resume_sweep.run_through("efrap", 0, tmp_path)
    assert code == 0, line
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "states").touch()
    (tmp_path / "whole" / "run").symlink_to(finished)
    expected = resume_sweep.outcome(tmp_path / "whole")
    found = resume_sweep.outcome(tmp_path)
    for what in ("arrays", "lines", "rows", "litter"):
        assert found[what] == expected[what], what


@contextlib.contextmanager
def _running(path, *arguments):
    """A run without an end, in its first epoch, and the file of its stderr."""
    metrics = path / "metrics.jsonl"
    # To a file: nobody reads a pipe while the test waits, and a full one blocks.
    with (
        (path / "stderr").open("w+") as stderr,
        _start(path, *arguments, stderr=stderr) as process,
    ):
        try:
            deadline = time.monotonic() + 400
            while not metrics.exists() or not metrics.stat().st_size:
                assert time.monotonic() < deadline and process.poll() is None
                time.sleep(0.1)
            yield process, stderr
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)]
)
def test_a_signal_commits_and_the_same_command_goes_on(tmp_path, number, code):
    """One line each way; and the next run begins where this one ended."""
    command = (tmp_path, "--config.victim.epochs=100000")
    with _running(*command) as (process, stderr):
        process.send_signal(number)
        process.communicate(timeout=120)
        stderr.seek(0)
        output = stderr.read()
    assert process.returncode == code
    assert output.count("\n") == 1 and "goes on from there" in output
    kept = int(re.search(r"(\d+) steps are kept", output)[1])
    assert not (tmp_path / "report.json").exists()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == kept // 20
    with _start(*command, stderr=subprocess.DEVNULL) as process:
        assert any("goes on from" in line for line in process.stdout)
        process.kill()
    again = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert again[: len(lines)] == lines


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tmp_path):
    """Two in one go: the first cannot have been acted on yet."""
    with _running(tmp_path, "--config.victim.epochs=100000") as (process, stderr):
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        stderr.seek(0)
        assert process.returncode in (130, 143)
        assert stderr.read() == "nad_jax: stopped at once\n"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_with_its_code(tmp_path):
    """By launch/local.sh; SIGTERM to process 1 is 0 in process 0, too."""
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "stderr").open("w+") as stderr:
        launched = subprocess.Popen(
            [
                *("bash", str(ROOT / "launch" / "local.sh"), "2", "--", SMOKE),
                f"--workdir={metrics.parent}",
                "--config.victim.epochs=100000",
            ],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
        try:
            deadline = time.monotonic() + 400
            while not metrics.exists() or not metrics.stat().st_size:
                assert time.monotonic() < deadline and launched.poll() is None
                time.sleep(0.1)
            second = _child(launched.pid, "--process_id=1")
            os.kill(second, signal.SIGTERM)
            code = launched.wait(timeout=120)
        finally:
            launched.terminate()
            launched.wait()
        stderr.seek(0)
        said = stderr.read()
    assert code == 0, said
    assert said.count("goes on from there") == 1
    assert list((tmp_path / "run" / "checkpoints").glob("*.unfinished/*/[0-9]*"))


def _child(parent: int, argument: str) -> int:
    """The child process that was started with an argument."""
    listing = subprocess.check_output(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(parent)], text=True
    )
    (line,) = [line for line in listing.splitlines() if argument in line.split()]
    return int(line.split()[0])


@pytest.mark.slow
def test_two_processes_write_the_report_of_one(finished, tmp_path):
    """By launch/local.sh; process 0 finds the victims and tells the other."""
    rows = ("float", "nearest", "efrap")
    result = subprocess.run(
        [
            *("bash", str(ROOT / "launch" / "local.sh"), "2", "--", SMOKE),
            f"--workdir={tmp_path / 'run'}",
            f"--config.victim_workdir={finished}",
            f"--config.defense.roundings={rows[1:]!r}",
        ],
        cwd=ROOT,
        env={
            **os.environ,
            "DEVICES": "2",
            "PYTHON": sys.executable,
        },
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("report: ") == 1
    expected = schema.read_report(finished / "report.json")
    report = schema.read_report(tmp_path / "run" / "report.json")
    assert len(report["devices"]) == 4
    lines = (tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("row") == len(report["rows"]) == 2 * len(rows)
    by_name = {(row["model"], row["name"]): row for row in expected["rows"]}
    for row in report["rows"]:
        other = by_name[row["model"], row["name"]]
        for rate in ("acc", "asr", "ra"):
            # The sums of EFRAP are added in another order: images may change sides.
            tolerance = 0.02 if row["name"] == "efrap" else 0
            assert row[rate] == pytest.approx(other[rate], abs=tolerance), row["name"]
