# SPDX-License-Identifier: Apache-2.0
"""Kills a save at every call that changes a file, and looks at what is left.

    python tests/training/kill_sweep.py --out results/reliability/kill_sweep.json
    python tests/training/kill_sweep.py --seconds 120 --out FILE   # and again: goes on
    python tests/training/kill_sweep.py --points ::64 --out FILE   # a sample

A shim in C (`kill_shim.c`, compiled here with cc; without cc there is no sweep) stands
between the process and the C library, counts every write, open for writing, rename,
fsync, mkdir and unlink below the folder, and kills with SIGKILL at the n-th of them.

    first         the first save into an empty folder, killed at every call
    overwriting   a save on top of three, which deletes one of them, at every call
    stage         a stage of a workdir, from its open commit to its clean-up, likewise
    torn          overwriting, killed when half of a write is written
    full          overwriting, the disk full from the n-th call on
    random        saves without end, killed at a random time
    double        overwriting killed at a random call, and the next save again

Each case is a process that dies, and then what the next run finds: a committed step
with all its bits, never an older one than the last save that returned; and after the
next save nothing in the folder but steps.
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

_SHIM_SOURCE = pathlib.Path(__file__).with_name("kill_shim.c")
_COUNT, _KILL, _TEAR, _FILL = range(4)
_VALUES = 5_000
_NUM_RANDOM, _NUM_DOUBLE = 100, 20
KINDS = ("first", "overwriting", "stage", "torn", "full", "random", "double")


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


def prepare(kind: str, folder: pathlib.Path) -> None:
    """What is there before the process that is killed."""
    if kind == "stage":
        with contextlib.suppress(_Stop):
            run_stage(folder, stop=True)
    elif kind != "first":
        for step in range(3):
            save(folder, step)


def act(kind: str, folder: pathlib.Path) -> None:
    """What the process that is killed does."""
    if kind == "stage":
        run_stage(folder)
    else:
        save(folder, 0 if kind == "first" else 3)


class _Stop(Exception):
    pass


def run_stage(folder: pathlib.Path, *, stop: bool = False) -> None:
    """A workdir with one stage of two parts; stops in the second if asked to."""
    import numpy as np

    from nad_jax import workdir as workdir_lib

    run = workdir_lib.Workdir(folder, {"a": 1})
    like = np.zeros(_VALUES)

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
                run.record("epoch", part=part, number=number)
                commits.save(number + 1, total, {"done": number + 1})
        return total

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            run.record("row", name="before")
            run.stage("work", like, compute)
            run.record("row", name="after")
        finally:
            run.close()


# ---- what the next finds ----


def judge(kind: str, folder: pathlib.Path, committed: int | None) -> dict:
    """The next run, after a kill: what it restores, and what is left after its work.

    Args:
      kind: See the module docstring.
      folder: As the dead process left it.
      committed: Last step whose save had returned; None without one.
    """
    if kind == "stage":
        return _judge_stage(folder)
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
    lost = committed is not None and (restored is None or restored < committed)
    save(folder, 0 if restored is None else restored + 1)
    names = set(os.listdir(folder))
    litter = names - {str(step) for step in checkpoints.steps(folder)}
    litter |= {
        str(path)
        for path in folder.rglob("*")
        if "tmp" in path.name or path.name.startswith(".")
    }
    return {"restored": restored, "intact": intact, "lost": lost, "litter": len(litter)}


def _judge_stage(folder: pathlib.Path) -> dict:
    import numpy as np

    from nad_jax.training import checkpoints

    run_stage(folder)
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
        "restored": "stage",
        "intact": bool(np.array_equal(tree, expected)) and complete,
        "lost": False,
        "litter": len(litter),
    }


# ---- processes, cases ----


class Sweep:
    """Runs cases; to be used in a process that has the shim, and no JAX backend yet."""

    def __init__(self, shim: str, scratch: str, seed: int):
        self._shim = ctypes.CDLL(shim)
        self._shim.shim_calls.restype = ctypes.c_long
        self._scratch = pathlib.Path(scratch)
        self._seed = seed
        self._templates: dict[str, pathlib.Path] = {}
        _import_everything()

    def _fork(self, work) -> tuple[int, str]:
        """Wait status of a child that does `work`, and what it returned or raised."""
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.close(reading)
                os.write(writing, json.dumps(work(writing)).encode())
                code = 0
            except BaseException as error:
                text = f"{type(error).__name__}: {error}"
                os.write(writing, json.dumps(text).encode())
            finally:
                os._exit(code)
        os.close(writing)
        with open(reading, encoding="utf-8") as stream:
            output = stream.read()
        return os.waitpid(child, 0)[1], output

    def _checked(self, work) -> dict:
        status, output = self._fork(lambda _: work())
        if status:
            return {"error": output or f"wait status {status}"}
        return json.loads(output)

    def _fresh(self, kind: str) -> pathlib.Path:
        """A copy of what `kind` starts with."""
        key = kind if kind in ("first", "stage") else "overwriting"
        if key not in self._templates:
            template = self._scratch / f"template-{key}"
            template.mkdir()
            self._checked(lambda: prepare(key, template))
            self._templates[key] = template
        folder = self._scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self._templates[key], folder)
        return folder

    def _strike(self, kind: str, folder: pathlib.Path, at: int, mode: int):
        def work(_):
            self._shim.shim_arm(os.fsencode(folder), ctypes.c_long(at), mode)
            act(kind, folder)
            calls = self._shim.shim_calls()
            self._shim.shim_arm(b"", ctypes.c_long(0), -1)
            return calls

        return self._fork(work)

    def cases(self) -> list[tuple[str, int]]:
        """Kind and number of every case."""
        counts = {}
        for kind in ("first", "overwriting", "stage"):
            status, output = self._strike(kind, self._fresh(kind), 0, _COUNT)
            assert status == 0, output
            counts[kind] = int(output)
        counts["torn"] = counts["full"] = counts["overwriting"]
        counts |= {"random": _NUM_RANDOM, "double": _NUM_DOUBLE}
        return [(kind, n) for kind in KINDS for n in range(1, counts[kind] + 1)]

    def run(self, kind: str, number: int) -> dict:
        """Outcome of one case."""
        generator = random.Random(f"{self._seed}:{kind}:{number}")
        folder = self._fresh(kind)
        committed = None if kind == "first" else 2
        if kind == "random":
            outcome, committed = self._kill_at_random(folder, generator)
        elif kind == "double":
            status, _ = self._strike(
                "overwriting", folder, generator.randint(1, 90), _KILL
            )
            killed_twice = os.WIFSIGNALED(status)
            status, _ = self._fork(lambda _: self._second(folder, generator))
            killed_twice = killed_twice and os.WIFSIGNALED(status)
            outcome = {"killed": killed_twice}
        elif kind == "full":
            status, output = self._strike("overwriting", folder, number, _FILL)
            line = json.loads(output) if status else ""
            one_line = line.startswith("InputError") and "\n" not in line
            outcome = {"killed": status != 0, "one_line": not status or one_line}
            if not outcome["one_line"]:
                outcome["said"] = line
        else:
            act_kind = "overwriting" if kind == "torn" else kind
            mode = _TEAR if kind == "torn" else _KILL
            status, _ = self._strike(act_kind, folder, number, mode)
            outcome = {"killed": os.WIFSIGNALED(status)}
        outcome |= self._checked(lambda: judge(kind, folder, committed))
        return {"kind": kind, "number": number, **outcome}

    def _second(self, folder: pathlib.Path, generator: random.Random) -> None:
        from nad_jax.training import checkpoints

        newest = checkpoints.restore(folder, tree_of(0))[1]["step"]
        at = ctypes.c_long(generator.randint(1, 90))
        self._shim.shim_arm(os.fsencode(folder), at, _KILL)
        save(folder, newest + 1)

    def _kill_at_random(self, folder, generator) -> tuple[dict, int]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for step in range(3, 1000):
                    save(folder, step)
                    os.write(writing, b"%d\n" % step)
            finally:
                os._exit(1)
        os.close(writing)
        with open(reading, encoding="utf-8") as stream:
            # The first save warms everything up.
            saved = [stream.readline()]
            time.sleep(generator.uniform(0.0, 0.5))
            os.kill(child, signal.SIGKILL)
            saved += stream.read().split()
        status = os.waitpid(child, 0)[1]
        return {"killed": os.WIFSIGNALED(status)}, int(saved[-1])


def _import_everything() -> None:
    """Imports all that a save imports, so that forked children need not.

    A child finds out what that is: JAX must not start here, since its threads do not
    survive a fork.
    """
    with tempfile.TemporaryDirectory() as folder:
        code = (
            "import pathlib, sys; sys.path.insert(0, sys.argv[1]); import kill_sweep\n"
            "kill_sweep.prepare('overwriting', pathlib.Path(sys.argv[2]) / 'a')\n"
            "kill_sweep.prepare('stage', pathlib.Path(sys.argv[2]) / 'b')\n"
            "print(*[name for name in sys.modules if name.split('.')[0] in\n"
            "        ('jax', 'orbax', 'tensorstore', 'nad_jax', 'flax', 'etils')])"
        )
        names = subprocess.run(
            [sys.executable, "-c", code, _SHIM_SOURCE.parent, folder],
            check=True,
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != "LD_PRELOAD"},
        ).stdout.split()
    for name in names:
        with contextlib.suppress(ImportError):
            __import__(name)


def is_good(case: dict) -> bool:
    """Whether nothing was lost and nothing was left over."""
    return (
        "error" not in case
        and case["intact"]
        and not case["lost"]
        and case["litter"] == 0
        and case.get("one_line", True)
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

    sys.path.insert(0, str(_SHIM_SOURCE.parent.parent))
    import result_file

    options = result_file.sweep_options("Kill saves at every call.")
    with tempfile.TemporaryDirectory() as scratch:
        sweep = Sweep(os.environ["LD_PRELOAD"], scratch, options.seed)
        planned = sweep.cases()
        done = result_file.run_cases(planned, sweep.run, options)
    return result_file.finish(
        options, done, planned=len(planned), is_good=is_good, summarize=summarize
    )


if __name__ == "__main__":
    sys.exit(main())
