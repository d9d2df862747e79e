# SPDX-License-Identifier: Apache-2.0
"""Result files of the sweeps: cases found in pieces, merged into one file."""

import importlib.metadata
import json
import os
import pathlib
import platform
import sys

_PACKAGES = ("jax", "jaxlib", "orbax-checkpoint", "tensorstore", "numpy")


def merge(
    path: str, cases: list[dict], *, seed: int, planned: int, seconds: float
) -> dict:
    """The report at `path` with these cases in place of those of the same name.

    A case is named by "kind" and "number". Cases of another seed or commit are dropped.
    """
    from nad_jax import pipeline

    report = {
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
        "cases": [],
    }
    known = {}
    file = pathlib.Path(path)
    if file.exists():
        earlier = json.loads(file.read_text("utf-8"))
        if (earlier["seed"], earlier["git_commit"]) == (seed, report["git_commit"]):
            known = {(c["kind"], c["number"]): c for c in earlier["cases"]}
            report["seconds"] = round(seconds + earlier["seconds"], 1)
    known |= {(case["kind"], case["number"]): case for case in cases}
    report["cases"] = list(known.values())
    return report


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
