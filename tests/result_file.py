# SPDX-License-Identifier: Apache-2.0
"""Result files of the sweeps: cases found in pieces, merged into one file."""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
from collections.abc import Callable, Sequence

from nad_jax import whole_file

_PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")


def known(path: str, seed: int) -> dict[tuple, dict]:
    """Cases at `path` that need not be run again, by kind and number.

    Those of another seed or of another commit of the library do not count.
    """
    from nad_jax import pipeline

    file = pathlib.Path(path)
    if not file.exists():
        return {}
    report = json.loads(file.read_text("utf-8"))
    if (report["seed"], report["git_commit"]) != (seed, pipeline.git_commit()):
        return {}
    return {(case["kind"], case["number"]): case for case in report["cases"]}


def merge(
    path: str, cases: list[dict], *, seed: int, planned: int, seconds: float
) -> dict:
    """The report of these cases and of those known already."""
    from nad_jax import pipeline

    earlier = known(path, seed)
    if earlier:
        seconds += json.loads(pathlib.Path(path).read_text("utf-8"))["seconds"]
    earlier |= {(case["kind"], case["number"]): case for case in cases}
    return {
        "schema": 1,
        "git_commit": pipeline.git_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "command": f"python {os.path.relpath(sys.argv[0])} --seed {seed} --out FILE",
        "seed": seed,
        "planned": planned,
        "seconds": round(seconds, 1),
        "cases": list(earlier.values()),
    }


def write(path: str, report: dict) -> None:
    """Writes the report, one case a line."""
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    cases = report.pop("cases")
    head = json.dumps(report, indent=2)[:-2]
    lines = ",\n    ".join(json.dumps(case) for case in cases)
    whole_file.write_text(path, f'{head},\n  "cases": [\n    {lines}\n  ]\n}}\n')
    report["cases"] = cases


def sweep_options(description: str) -> argparse.Namespace:
    """Command line of a sweep whose cases can be run in pieces."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--points", default=":", help="slice A:B:STEP of cases")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    options.began = time.perf_counter()
    return options


def run_cases(
    planned: Sequence[tuple], run: Callable[..., dict], options: argparse.Namespace
) -> list[dict]:
    """Runs the chosen cases that are not known yet, while there is time.

    A case is a tuple that begins with its kind and number.
    """
    chosen = slice(*(int(n) if n else None for n in options.points.split(":")))
    earlier = known(options.out, options.seed)
    done = []
    for case in planned[chosen]:
        if time.perf_counter() - options.began > options.seconds:
            break
        if case[:2] not in earlier:
            done.append(run(*case))
    return done


def finish(
    options: argparse.Namespace,
    cases: list[dict],
    *,
    planned: int,
    is_good: Callable[[dict], bool],
    summarize: Callable[[list[dict]], object],
) -> int:
    """Writes the report and tells of it; exit code 1 if a case is bad."""
    seconds = time.perf_counter() - options.began
    report = merge(
        options.out, cases, seed=options.seed, planned=planned, seconds=seconds
    )
    bad = [case for case in report["cases"] if not is_good(case)]
    report["summary"] = summarize(report["cases"])
    report["bad"] = len(bad)
    write(options.out, report)
    print(json.dumps(report["summary"], indent=2))
    print(f"{len(report['cases'])} of {planned} cases, {len(bad)} bad")
    for case in bad[:20]:
        print(case)
    return 1 if bad else 0
