# SPDX-License-Identifier: Apache-2.0
"""Interrupts a run at point after point and compares it with one that ran through.

    python tests/resume_sweep.py --out results/reliability/resume_sweep.json
    python tests/resume_sweep.py --chains 0:1 --out FILE    # a part, merged in

A chain is one workdir: the same command is started, interrupted at the first point,
started again, interrupted at the second, and so on, and at last runs to its end. Points
alternate between SIGKILL and SIGTERM; the next seed takes them the other way round.
Compared with an uninterrupted run, bit for bit: every array of every finished stage,
the whole state (optimiser, key, counters) at the end of every training, the lines of
metrics.jsonl and the rows of the report, times apart. Every stage and training that the
points name must be there, and nothing unfinished.

The uninterrupted run is a new interpreter, with a hash seed of its own. Those of the
chain are forked from a process that has imported what it had imported, before JAX has
looked for devices: each traces, loads or compiles and runs by itself.

A SIGTERM is acted on a few steps after its point, after the programs on their way.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile

import forking
import result_file

_CASE = (
    "one forked process of a command interrupted at one point, and the end of its "
    "chain compared with an uninterrupted run in a new interpreter"
)
_ROOT = pathlib.Path(__file__).parent.parent
SEEDS = (0, 1, 2)
# Steps: 10 an epoch for the victims of nad, 7 for repairs; 20 for all of efrap.
POINTS = {
    "nad": [
        ["training", "seed{seed}-clean.unfinished/clean-model-seed-{seed}", 4],
        ["training", "seed{seed}-clean.unfinished/clean-model-seed-{seed}", 10],
        ["training", "seed{seed}-backdoored.unfinished/victim-seed-{seed}", 3],
        ["training", "seed{seed}-backdoored.unfinished/victim-seed-{seed}", 17],
        ["training", "seed{seed}-backdoored-fine_tuning.unfinished/tuned", 7],
        ["training", "seed{seed}-backdoored-fine_pruning.unfinished/tuned", 5],
        ["training", "seed{seed}-backdoored-teacher.unfinished/tuned", 4],
        ["training", "seed{seed}-backdoored-nad.unfinished/student-1.0", 5],
        ["training", "seed{seed}-backdoored-nad.unfinished/student-1.0", 7],
        ["training", "seed{seed}-backdoored-nad_sam.unfinished/student-1.0", 11],
        ["training", "seed{seed}-clean-nad.unfinished/student-1.0", 9],
    ],
    "efrap": [
        ["training", "seed{seed}-clean.unfinished/victim-seed-{seed}", 5],
        ["training", "seed{seed}-clean.unfinished/victim-seed-{seed}", 20],
        ["training", "seed{seed}-backdoored.unfinished/wake-seed-{seed}", 8],
        ["training", "seed{seed}-backdoored.unfinished/wake-seed-{seed}", 20],
        ["training", "seed{seed}-backdoored.unfinished/hide-seed-{seed}", 13],
        ["training", "seed{seed}-backdoored.unfinished/hide-seed-{seed}", 31],
        ["layer", "reconstruction, backdoored, seed {seed}", 3],
        ["layer", "efrap, backdoored, seed {seed}", 2],
        ["layer", "efrap, backdoored, seed {seed}", 6],
        ["layer", "reconstruction, clean, seed {seed}", 1],
        ["layer", "efrap, clean, seed {seed}", 5],
    ],
}
_OPTIONS = {
    "nad": [
        "--config.defense.rows=('fine_tuning','fine_pruning','nad','nad_sam')",
        "--config.defense.clean_model_rows=('nad',)",
    ],
    "efrap": [],
}


def arguments(job: str, seed: int, folder: pathlib.Path) -> list[str]:
    return [
        f"--config={_ROOT / 'configs' / job}.py:smoke",
        f"--config.seeds=({seed},)",
        f"--workdir={folder / 'run'}",
        *_OPTIONS[job],
    ]


def run_through(
    job: str, seed: int, folder: pathlib.Path, point=None, number: int = 0
) -> tuple[int, str]:
    """A run in a new interpreter, interrupted or not: exit code and last words."""
    order = {"point": point, "signal": number, "states": str(folder / "states")}
    finished = subprocess.run(
        [
            sys.executable,
            _ROOT / "tests" / "resume_child.py",
            json.dumps(order),
            *arguments(job, seed, folder),
        ],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        check=False,
    )
    return finished.returncode, _last_line(finished.stderr)


def start(job: str, seed: int, folder: pathlib.Path, point, number: int):
    """One session of a chain; its exit code, or - its signal, and its last words."""
    said = folder / "stderr"

    def work(tell):
        del tell
        import resume_child

        from nad_jax import main

        os.chdir(_ROOT)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        resume_child.install(point, number, str(folder / "states"))
        return main.main(["main", *arguments(job, seed, folder)])

    outcome = forking.call(work)
    last = outcome.error or _last_line(said.read_text("utf-8", "replace"))
    if os.WIFSIGNALED(outcome.status):
        return -os.WTERMSIG(outcome.status), last
    return (1 if outcome.result is None else outcome.result), last


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def import_as(folder: pathlib.Path) -> None:
    """Imports here what the run in `folder` has imported."""
    names = json.loads((folder / "states.modules").read_text("utf-8"))
    forking.import_all(
        name for name in names if name != "__main__" and not name.startswith("_")
    )


def outcome(folder: pathlib.Path) -> dict:
    """Everything of a finished run that must not depend on interruptions."""
    from nad_jax.training import checkpoints

    run = folder / "run"
    stages = {
        stage.name: checkpoints._read_record(stage, 0)["leaves"]
        for stage in sorted((run / "checkpoints").iterdir())
        if checkpoints.steps(stage) == [0]
    }
    lines = _lines(run / "metrics.jsonl")
    rows = json.loads((run / "report.json").read_text("utf-8"))["rows"]
    for entry in [*lines, *rows]:
        entry.pop("seconds", None)
    unfinished = {path.name for path in (run / "checkpoints").iterdir()} - set(stages)
    temporary = [path.name for path in run.rglob("*") if "tmp" in path.name]
    return {
        "arrays": stages,
        "states": dict(_lines(folder / "states")),
        "lines": lines,
        "rows": rows,
        "litter": sorted([*unfinished, *temporary]),
    }


def named_by_points(job: str, seed: int) -> tuple[set[str], set[str]]:
    """Stages and trainings that an outcome must hold."""
    stages, trainings = set(), set()
    for kind, name, _ in POINTS[job]:
        name = name.format(seed=seed)
        if kind == "training":
            trainings.add(name)
            stages.add(name.partition(".unfinished/")[0])
        else:
            stages.add(re.sub(r"\W+", "-", name))
    return stages, trainings


def is_complete(found: dict, job: str, seed: int) -> bool:
    """Whether there is something of everything to compare."""
    stages, trainings = named_by_points(job, seed)
    return (
        stages <= found["arrays"].keys()
        and all(found["arrays"].values())
        and trainings <= found["states"].keys()
        and bool(found["lines"] and found["rows"])
    )


def _lines(path: pathlib.Path) -> list:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run_chain(job: str, seed: int, scratch: pathlib.Path) -> list[dict]:
    """The cases of one chain, one for each of its points."""
    kind = f"{job}, seed {seed}"
    whole, broken = scratch / "whole", scratch / "broken"
    for folder in (whole, broken):
        folder.mkdir(parents=True)
    code, line = run_through(job, seed, whole)
    if code:
        error = f"uninterrupted: exit code {code}, {line}"
        return [{"kind": kind, "number": 0, "error": error}]
    import_as(whole)
    cases = []
    for number, (what, name, place) in enumerate(POINTS[job]):
        kills = (number + seed) % 2 == 0
        chosen = signal.SIGKILL if kills else signal.SIGTERM
        point = [what, name.format(seed=seed), place]
        code, line = start(job, seed, broken, point, chosen)
        stopped = code == -signal.SIGKILL if kills else "goes on from there" in line
        cases.append(
            {
                "kind": kind,
                "number": number,
                "point": " ".join(map(str, point)),
                "signal": chosen.name,
                "exit_code": code,
                "interrupted": stopped and not (broken / "run/report.json").exists(),
            }
        )
    code, line = start(job, seed, broken, None, 0)
    if code != 0:
        return [{**case, "error": f"the last: {code}, {line}"} for case in cases]
    # In a child, since reading checkpoints starts JAX.
    compared = forking.call(lambda tell: compare(job, seed, whole, broken))
    ending = compared.result or {"error": compared.error or str(compared.status)}
    return [case | ending for case in cases]


def compare(job: str, seed: int, whole: pathlib.Path, broken: pathlib.Path) -> dict:
    """What of two runs is there and the same."""
    expected, found = outcome(whole), outcome(broken)
    same = {key: found[key] == expected[key] for key in expected if key != "litter"}
    complete = is_complete(expected, job, seed) and is_complete(found, job, seed)
    return {**same, "complete": complete, "litter": found["litter"]}


def is_good(case: dict) -> bool:
    """Whether the point was hit and the end was the same."""
    same = ("interrupted", "complete", "arrays", "states", "lines", "rows")
    return (
        "error" not in case and all(case[key] for key in same) and case["litter"] == []
    )


def main() -> int:
    """Exit code 1 if a case is bad."""
    parser = argparse.ArgumentParser(description="Interrupt runs and compare.")
    parser.add_argument("--chains", default=":", help="slice A:B of the six chains")
    parser.add_argument("--seed", type=int, default=0, help="added to all seeds")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    # Before JAX is imported, here and in the children.
    os.environ |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    chains = [(job, seed + options.seed) for job in POINTS for seed in SEEDS]
    results = result_file.Results(
        options.out,
        seed=options.seed,
        planned=sum(len(POINTS[job]) for job, _ in chains),
        case_is=_CASE,
    )
    first, _, last = options.chains.partition(":")
    with tempfile.TemporaryDirectory(dir=result_file.scratch_folder()) as scratch:
        for job, seed in chains[int(first or 0) : int(last or len(chains))]:
            if (f"{job}, seed {seed}", len(POINTS[job]) - 1) in results:
                continue
            folder = pathlib.Path(scratch) / f"{job}-{seed}"
            for case in run_chain(job, seed, folder):
                results.add(case)
    return results.finish(
        is_good=is_good,
        summarize=lambda cases: {"good": sum(map(is_good, cases))},
    )


if __name__ == "__main__":
    sys.exit(main())
