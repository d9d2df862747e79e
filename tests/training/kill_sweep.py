# SPDX-License-Identifier: Apache-2.0
"""Kills a save at every call that changes a file, and looks at what is left.

    python tests/training/kill_sweep.py --out results/reliability/kill_sweep.json
    python tests/training/kill_sweep.py --seconds 120 --out FILE   # and again: goes on
    python tests/training/kill_sweep.py --points ::64 --out FILE   # a sample

A shim in C (`kill_shim.c`, compiled here with cc; without cc there is no sweep) stands
between the process and the C library, counts every write, open for writing, rename,
link, fsync, allocation, mkdir and unlink below the folder, and kills with SIGKILL at
the n-th of them.

    first         the first save into an empty folder, killed at every call
    overwriting   a save on top of three, which deletes one of them, at every call
    stage         a stage of a workdir, from its open commit to its clean-up, likewise
    report        both files of a report, on top of earlier ones, likewise
    artefact      a model file, on top of an earlier one, likewise
    torn          overwriting, killed when half of a write is written
    full          overwriting, the disk full from the n-th call on
    random        saves without end, killed at a random time
    double        overwriting killed at a random call, and the next save again

Each case is a process that dies, and then what the next run finds: a committed step
with all its bits, never an older one than the last save that had returned, no part of a
stage computed again that had been committed; and after the next save nothing in the
folder but steps. The process that dies is forked, for each case anew, from one that has
imported everything; all next runs are the work of one more process, which knows of the
dead ones no more than the folder. A process that was not killed is a bad case, except
on a full disk, where a save that succeeds must have been a save.
"""

import collections
import contextlib
import ctypes
import io
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import forking  # noqa: E402
import result_file  # noqa: E402

_CASE = (
    "one forked process that is killed, or meets a full disk, at one call, and the "
    "next run in its folder by a process that was not killed"
)
_SHIM_SOURCE = pathlib.Path(__file__).with_name("kill_shim.c")
_COUNT, _KILL, _TEAR, _FILL = range(4)
_VALUES = 5_000
_NUM_RANDOM, _NUM_DOUBLE = 100, 20
# Kinds that are killed at every call that they make themselves.
_STRUCK = ("first", "overwriting", "stage", "report", "artefact")
KINDS = (*_STRUCK, "torn", "full", "random", "double")
_PUBLISHED = {"report": ["report.html", "report.json"], "artefact": ["model"]}
# How often calls are counted at different moments of different threads, at most.
_ATTEMPTS = 5


def build_shim(folder: str) -> str | None:
    """Path of the compiled shim; None without a C compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    path = os.path.join(folder, "kill_shim.so")
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", path, _SHIM_SOURCE, "-ldl"],
        check=True,
    )
    return path


# ---- what is done and killed ----


def tree_of(step: int) -> dict:
    import numpy as np

    generator = np.random.default_rng(step)
    return {"values": generator.normal(size=_VALUES), "step": np.asarray(step)}


def save(folder: pathlib.Path, step: int) -> None:
    from nad_jax.training import checkpoints

    checkpoints.save(folder, step, tree_of(step), {"step": step})


def prepare(kind: str, folder: pathlib.Path, tell) -> None:
    """What is there before the process that is killed; tells what was committed."""
    if kind == "stage":
        with contextlib.suppress(_Stop):
            run_stage(folder, tell, stop=True)
    elif kind in _PUBLISHED:
        publish(kind, folder, 0)
        tell(0)
    elif kind != "first":
        for step in range(3):
            save(folder, step)
            tell(step)


def act(kind: str, folder: pathlib.Path, tell) -> None:
    """What the process that is killed does; tells what it has committed, at once."""
    if kind == "stage":
        run_stage(folder, tell)
    elif kind in _PUBLISHED:
        publish(kind, folder, 1)
        tell(1)
    else:
        step = 0 if kind == "first" else 3
        save(folder, step)
        tell(step)


class _Stop(Exception):
    pass


def run_stage(folder: pathlib.Path, tell, *, stop: bool = False) -> list:
    """Runs a workdir with one stage of two parts; stops in the second if asked to.

    Returns (part, number) of all that was computed; tells each when it is committed.
    """
    import numpy as np

    from nad_jax import workdir as workdir_lib

    run = workdir_lib.Workdir(folder, {"a": 1})
    like = np.zeros(_VALUES)
    computed = []

    def compute():
        total = like
        for part in ("one", "two"):
            commits = run.commits(part)
            restored = commits.restore(like)
            total, metadata = (total, {"done": 0}) if restored is None else restored
            for number in range(metadata["done"], 3):
                if stop and (part, number) == ("two", 2):
                    raise _Stop
                total = total + tree_of(number)["values"]
                computed.append([part, number])
                run.record("epoch", part=part, number=number)
                commits.save(number + 1, total, {"done": number + 1})
                tell([part, number])
        return total

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            run.record("row", name="before")
            run.stage("work", like, compute)
            run.record("row", name="after")
        finally:
            run.close()
    return computed


def publish(kind: str, folder: pathlib.Path, version: int) -> None:
    """Writes the last files of a run, which all hold their version."""
    import numpy as np

    from nad_jax import whole_file
    from nad_jax import workdir as workdir_lib
    from nad_jax.interop import safetensors_file

    run = workdir_lib.Workdir(folder, {"a": 1})
    try:
        if kind == "report":
            whole_file.write_text(folder / "report.html", f"{version}\n" * _VALUES)
            whole_file.write_json(folder / "report.json", [version] * _VALUES)
        else:
            arrays = {"a": np.full(_VALUES, version, np.float32)}
            safetensors_file.write_safetensors(folder / "model", arrays)
    finally:
        run.close()


# ---- what the next finds ----


def judge(kind: str, folder: str, committed: list) -> dict:
    """The next run, after a kill: what it restores, and what is left after its work.

    Args:
      kind: See the module docstring.
      folder: As the dead process left it.
      committed: What had been told to be committed.
    """
    if kind == "stage":
        return _judge_stage(pathlib.Path(folder), committed)
    if kind in _PUBLISHED:
        return _judge_published(kind, pathlib.Path(folder), committed)
    return _judge_steps(pathlib.Path(folder), committed)


def _judge_steps(folder: pathlib.Path, committed: list[int]) -> dict:
    import numpy as np

    from nad_jax.training import checkpoints

    found = checkpoints.steps(folder)
    restored, intact = None, True
    if found:
        tree, metadata = checkpoints.restore(folder, tree_of(0))
        restored = metadata["step"]
        intact = all(
            np.array_equal(tree[name], value)
            for name, value in tree_of(restored).items()
        )
    save(folder, 0 if restored is None else restored + 1)
    litter = set(os.listdir(folder)) - {str(step) for step in checkpoints.steps(folder)}
    litter |= _temporaries(folder)
    return {
        "restored": restored,
        "intact": intact,
        "lost": _is_older(restored, committed),
        "litter": len(litter),
    }


def _is_older(restored: int | None, committed: list[int]) -> bool:
    return bool(committed) and (restored is None or restored < max(committed))


def _temporaries(folder: pathlib.Path) -> set[str]:
    return {
        str(path)
        for path in folder.rglob("*")
        if "tmp" in path.name or path.name.startswith(".")
    }


def _judge_stage(folder: pathlib.Path, committed: list) -> dict:
    import numpy as np

    from nad_jax.training import checkpoints

    # What is on disk counts, too, where its writer was killed before it could tell.
    parts = folder / "checkpoints" / "work.unfinished"
    committed = committed + [
        [part.name, number]
        for part in parts.glob("*")
        for number in range(max(checkpoints.steps(part), default=0))
    ]
    computed = run_stage(folder, lambda _: None)
    tree, _ = checkpoints.restore(folder / "checkpoints" / "work", np.zeros(_VALUES))
    # Three numbers in each of two parts; the order of the sums is that of the stage.
    expected = np.zeros(_VALUES)
    for number in (0, 1, 2) * 2:
        expected = expected + tree_of(number)["values"]
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    numbers = [json.loads(line).get("number", "row") for line in lines]
    complete = numbers == ["row", 0, 1, 2, 0, 1, 2, "row"]
    expected_files = {"config.json", "metrics.jsonl", "lock", "checkpoints"}
    litter = set(os.listdir(folder)) - expected_files
    litter |= set(os.listdir(folder / "checkpoints")) - {"work"}
    litter |= set(os.listdir(folder / "checkpoints" / "work")) - {"0"}
    return {
        "restored": f"{6 - len(computed)} of 6",
        "intact": bool(np.array_equal(tree, expected)) and complete,
        "lost": any(part in committed for part in computed),
        "litter": len(litter | _temporaries(folder)),
    }


def _judge_published(kind: str, folder: pathlib.Path, committed: list[int]) -> dict:
    versions = [_version(folder / name) for name in _PUBLISHED[kind]]
    publish(kind, folder, 2)
    expected_files = {"config.json", "metrics.jsonl", "lock", *_PUBLISHED[kind]}
    return {
        # The last file is what tells of the others.
        "restored": versions[-1],
        "intact": None not in versions,
        "lost": any(_is_older(version, committed) for version in versions),
        "litter": len(set(os.listdir(folder)) - expected_files),
    }


def _version(path: pathlib.Path) -> int | None:
    """What every value of a published file is; None if it is not whole."""
    from nad_jax import errors
    from nad_jax.interop import safetensors_file

    try:
        if path.suffix == ".json":
            values = json.loads(path.read_text("utf-8"))
        elif path.suffix == ".html":
            values = [int(line) for line in path.read_text("utf-8").splitlines()]
        else:
            values = safetensors_file.read_safetensors(path)[0]["a"].tolist()
    except (ValueError, OSError, errors.InputError):
        return None
    return int(values[0]) if values == [values[0]] * _VALUES else None


# ---- processes, cases ----


class Sweep:
    """Runs cases; to be used in a process that has the shim, and no JAX backend."""

    def __init__(self, shim: str, scratch: str, seed: int):
        self._shim = ctypes.CDLL(shim)
        self._shim.shim_calls.restype = ctypes.c_long
        self._scratch = pathlib.Path(scratch)
        self._seed = seed
        # What each kind starts with, and what of that is committed.
        self._templates: dict[str, tuple[pathlib.Path, list]] = {}
        self._counts: dict[str, int] = {}
        forking.import_all(_what_a_save_imports())
        self._judge = forking.Server(judge)

    def _template(self, kind: str) -> tuple[pathlib.Path, list]:
        if kind not in self._templates:
            folder = self._scratch / f"template-{kind}"
            folder.mkdir()
            outcome = forking.call(lambda tell: prepare(kind, folder, tell))
            assert outcome.status == 0, outcome
            self._templates[kind] = folder, outcome.told
        return self._templates[kind]

    def _copy(self, template: pathlib.Path) -> pathlib.Path:
        folder = self._scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(template, folder)
        return folder

    def _act(self, template: pathlib.Path, at: int, mode: int, work):
        """A copy of `template`, and the outcome of `work` in it with the shim armed."""
        folder = self._copy(template)

        def armed(tell):
            self._shim.shim_arm(os.fsencode(folder), ctypes.c_long(at), mode)
            work(folder, tell)
            calls = self._shim.shim_calls()
            self._shim.shim_arm(b"", ctypes.c_long(0), -1)
            return calls

        return folder, forking.call(armed)

    def _strike(self, template: pathlib.Path, at: int, mode: int, work):
        """As `_act`, until the process was killed.

        Threads make some calls more or less from one time to the next; one that had
        ended before its number is struck at the last of the calls it had made.
        """
        for _ in range(_ATTEMPTS):
            folder, outcome = self._act(template, at, mode, work)
            if outcome.result is None:
                break
            at = outcome.result
        return folder, outcome

    def cases(self) -> list[tuple[str, int]]:
        """Kind and number of every case."""
        for kind in _STRUCK:
            template, _ = self._template(kind)
            outcome = self._act(template, 0, _COUNT, _worker(kind))[1]
            assert outcome.status == 0 and outcome.result > 0, (kind, outcome)
            self._counts[kind] = outcome.result
        counts = {**self._counts, "random": _NUM_RANDOM, "double": _NUM_DOUBLE}
        counts["torn"] = counts["full"] = counts["overwriting"]
        return [(kind, n) for kind in KINDS for n in range(1, counts[kind] + 1)]

    def run(self, kind: str, number: int) -> dict:
        """Outcome of one case; after `cases`."""
        begins_with = kind if kind in _STRUCK else "overwriting"
        template, committed = self._template(begins_with)
        work = _worker(begins_with)
        generator = random.Random(f"{self._seed}:{kind}:{number}")
        case = {"kind": kind, "number": number}
        if kind == "random":
            folder, outcome = self._kill_at_random(template, generator)
        elif kind == "full":
            folder, outcome = self._act(template, number, _FILL, work)
            failed = outcome.status != 0
            line = outcome.error or ""
            if failed and (not line.startswith("InputError") or "\n" in line):
                case["said"] = line
        elif kind == "double":
            at = [generator.randint(1, self._counts["overwriting"]) for _ in range(2)]
            folder, first = self._strike(template, at[0], _KILL, work)
            after_one = self._scratch / "after-one"
            shutil.rmtree(after_one, ignore_errors=True)
            shutil.copytree(folder, after_one)
            folder, outcome = self._strike(after_one, at[1], _KILL, _save_next)
            committed = committed + first.told
            case["killed_before"] = first.was_killed
        else:
            mode = _TEAR if kind == "torn" else _KILL
            folder, outcome = self._strike(template, number, mode, work)
        case["killed"] = failed if kind == "full" else outcome.was_killed
        committed = committed + outcome.told
        return case | self._judge(begins_with, str(folder), committed)

    def _kill_at_random(self, template, generator):
        folder = self._copy(template)

        def save_on(tell):
            for step in range(3, 1000):
                save(folder, step)
                tell(step)

        child, stream = forking.start(save_on)
        first = json.loads(stream.readline() or "{}")  # it warms everything up
        time.sleep(generator.uniform(0.0, 0.5))
        # One that has ended by itself has its own status, which says so.
        os.kill(child, signal.SIGKILL)
        outcome = forking.finish(child, stream)
        told = [first["told"]] if "told" in first else []
        return folder, outcome._replace(told=told + outcome.told)


def _worker(kind: str):
    return lambda folder, tell: act(kind, folder, tell)


def _save_next(folder: pathlib.Path, tell) -> None:
    """The step after the newest that can be restored."""
    from nad_jax.training import checkpoints

    step = checkpoints.restore(folder, tree_of(0))[1]["step"] + 1
    save(folder, step)
    tell(step)


def _what_a_save_imports() -> list[str]:
    """Names of the modules that the work of all kinds loads, found out by a child."""
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import kill_sweep\n"
            "for kind in ('overwriting', 'stage', 'report', 'artefact'):\n"
            "    folder = pathlib.Path(sys.argv[2]) / kind\n"
            "    kill_sweep.prepare(kind, folder, lambda _: None)\n"
            "    kill_sweep.judge(kind, str(folder), [])\n"
            "print(*[name for name in sys.modules if name.split('.')[0] in\n"
            "        ('jax', 'orbax', 'tensorstore', 'nad_jax', 'flax', 'etils')])"
        )
        return subprocess.run(
            [sys.executable, "-c", code, _SHIM_SOURCE.parent, folder],
            check=True,
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
        ).stdout.split()


def is_good(case: dict) -> bool:
    """Whether it was a kill, and nothing was lost and nothing was left over."""
    return (
        "error" not in case
        and "said" not in case
        and (case["killed"] or case["kind"] == "full")
        and case.get("killed_before", True)
        and case["intact"]
        and not case["lost"]
        and case["litter"] == 0
    )


def summarize(cases: list[dict]) -> dict:
    """Counts by kind."""
    summary = {}
    for kind in KINDS:
        own = [case for case in cases if case["kind"] == kind]
        restored = collections.Counter(str(case.get("restored")) for case in own)
        summary[kind] = {
            "cases": len(own),
            "struck": sum(case["killed"] for case in own),
            "good": sum(is_good(case) for case in own),
            "commits_lost": sum(case.get("lost", True) for case in own),
            "litter": sum(case.get("litter", 1) for case in own),
            # Of a random kill the number depends on the clock.
            "restored": dict(restored) if kind != "random" else None,
        }
    return summary


def main() -> int:
    """Exit code 1 if a case is bad, 2 without a C compiler."""
    if "LD_PRELOAD" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            shim = build_shim(folder)
            if shim is None:
                print("kill_sweep: there is no C compiler called cc", file=sys.stderr)
                return 2
            return subprocess.run(
                [sys.executable, *sys.argv],
                env={**os.environ, "LD_PRELOAD": shim, "JAX_PLATFORMS": "cpu"},
                check=False,
            ).returncode

    options = result_file.sweep_options("Kill saves at every call.")
    with tempfile.TemporaryDirectory(dir=result_file.scratch_folder()) as scratch:
        sweep = Sweep(os.environ["LD_PRELOAD"], scratch, options.seed)
        planned = sweep.cases()
        results = result_file.run_cases(planned, sweep.run, options, case_is=_CASE)
    code = results.finish(is_good=is_good, summarize=summarize)
    for kind, counts in summarize(results.cases).items():
        if counts["cases"] and not counts["struck"]:
            print(f"no case of kind {kind} struck anything")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main())
