# SPDX-License-Identifier: Apache-2.0
"""Result files of the sweeps: cases found in pieces, merged into one file."""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys

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
    pathlib.Path(path).write_text(
        f'{head},\n  "cases": [\n    {lines}\n  ]\n}}\n', "utf-8"
    )
    report["cases"] = cases
