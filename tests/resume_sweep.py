# SPDX-License-Identifier: Apache-2.0
"""Interrupts a run at point after point and compares it with one that ran through.

    python tests/resume_sweep.py --out results/reliability/resume_sweep.json
    python tests/resume_sweep.py --chains 0:1 --out FILE    # a part, merged in

A chain is one workdir: the same command is started, interrupted at the first point,
started again, interrupted at the second, and so on, and at last runs to its end. Points
alternate between SIGKILL and SIGTERM; the next seed takes them the other way round.
Compared with an uninterrupted run, bit for bit: every array of every finished stage,
the whole state (optimiser, key, counters) at the end of every training, the lines of
metrics.jsonl and the rows of the report, times apart.

A SIGTERM is acted on a few steps after its point, after the programs on their way.
"""

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time

import result_file

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


def start(job: str, seed: int, folder: pathlib.Path, point, number: int):
    """One session of a run; returns its exit code and its last line on stderr."""
    order = {"point": point, "signal": number, "states": str(folder / "states")}
    finished = subprocess.run(
        [
            sys.executable,
            _ROOT / "tests" / "resume_child.py",
            json.dumps(order),
            f"--config={_ROOT / 'configs' / job}.py:smoke",
            f"--config.seeds=({seed},)",
            f"--workdir={folder / 'run'}",
            *_OPTIONS[job],
        ],
        capture_output=True,
        text=True,
        cwd=_ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        check=False,
    )
    return finished.returncode, (finished.stderr.strip().splitlines() or [""])[-1]


def outcome(folder: pathlib.Path) -> dict:
    """Everything of a finished run that must not depend on interruptions."""
    run = folder / "run"
    stages = {}
    for record in sorted(run.glob("checkpoints/*/0/record/metadata")):
        leaves = json.loads(record.read_text("utf-8"))["leaves"]
        stages[record.parts[-4]] = {k: leaf["sha256"] for k, leaf in leaves.items()}
    lines = _lines(run / "metrics.jsonl")
    rows = json.loads((run / "report.json").read_text("utf-8"))["rows"]
    for entry in [*lines, *rows]:
        entry.pop("seconds", None)
    return {
        "arrays": stages,
        "states": dict(_lines(folder / "states")),
        "lines": lines,
        "rows": rows,
        "litter": [path.name for path in run.glob("checkpoints/*.unfinished")],
    }


def _lines(path: pathlib.Path) -> list:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def run_chain(job: str, seed: int, scratch: pathlib.Path, points: list) -> list[dict]:
    """The cases of one chain: one for each of the points, which were numbered."""
    whole, broken = scratch / "whole", scratch / "broken"
    for folder in (whole, broken):
        folder.mkdir(parents=True)
    code, line = start(job, seed, whole, None, 0)
    assert code == 0, line
    cases = []
    for number, point in points:
        kills = (number + seed) % 2 == 0
        chosen = signal.SIGKILL if kills else signal.SIGTERM
        kind, name, place = point
        code, line = start(
            job, seed, broken, [kind, name.format(seed=seed), place], chosen
        )
        stopped = code == -signal.SIGKILL if kills else "goes on from there" in line
        cases.append(
            {
                "kind": f"{job}, seed {seed}",
                "number": number,
                "point": f"{kind} {name.format(seed=seed)} {place}",
                "signal": chosen.name,
                "exit_code": code,
                "interrupted": stopped and not (broken / "run/report.json").exists(),
            }
        )
    code, line = start(job, seed, broken, None, 0)
    assert code == 0, line
    expected, found = outcome(whole), outcome(broken)
    for case in cases:
        case.update({key: found[key] == expected[key] for key in expected})
    return cases


def is_good(case: dict) -> bool:
    """Whether the point was hit and the end was the same."""
    same = ("arrays", "states", "lines", "rows", "litter")
    return case["interrupted"] and all(case[key] for key in same)


def main() -> int:
    """Exit code 1 if a case is bad."""
    parser = argparse.ArgumentParser(description="Interrupt runs and compare.")
    parser.add_argument("--chains", default=":", help="slice A:B of the six chains")
    parser.add_argument("--seed", type=int, default=0, help="added to all seeds")
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    options.began = time.perf_counter()
    chains = [(job, seed + options.seed) for job in POINTS for seed in SEEDS]
    first, _, last = options.chains.partition(":")
    done = []
    with tempfile.TemporaryDirectory() as scratch:
        for job, seed in chains[int(first or 0) : int(last or len(chains))]:
            folder = pathlib.Path(scratch) / f"{job}-{seed}"
            done += run_chain(job, seed, folder, list(enumerate(POINTS[job])))
    return result_file.finish(
        options,
        done,
        planned=sum(len(POINTS[job]) for job, _ in chains),
        is_good=is_good,
        summarize=lambda cases: {"good": sum(map(is_good, cases))},
    )


if __name__ == "__main__":
    sys.exit(main())
