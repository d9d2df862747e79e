# SPDX-License-Identifier: Apache-2.0
"""Result files of the sweeps: cases found in pieces, kept as they end."""

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
# A sweep that is killed loses no more than this.
_SAVE_SECONDS = 5.0


def provenance() -> dict:
    """Commit and versions that a result belongs to."""
    from nad_jax import pipeline

    return {
        "git_commit": pipeline.git_commit(),
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in _PACKAGES},
        },
    }


def is_same(earlier: dict, now: dict) -> bool:
    """Whether results of one provenance hold for the other.

    Two trees that differ from their commit may differ from each other.
    """
    commit = now["git_commit"]
    return (
        commit is not None
        and not commit.endswith("-dirty")
        and all(earlier.get(key) == value for key, value in now.items())
    )


def scratch_folder() -> str | None:
    """A file system in memory, whose fsync takes no time; None where there is none."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


class Results:
    """The cases of one sweep: those at `out` that still hold, and new ones.

    Args:
      out: The result file.
      seed: Of the cases; those of another seed do not count.
      planned: How many cases there are in all.
      case_is: What one case is, in a sentence.
    """

    def __init__(self, out: str, *, seed: int, planned: int, case_is: str):
        self._path = pathlib.Path(out)
        self._began = self._saved = time.perf_counter()
        self._head = {
            "schema": 2,
            **provenance(),
            "machine": f"{platform.system()} {platform.machine()}, "
            f"{os.cpu_count()} cores",
            "command": f"python {os.path.relpath(sys.argv[0])} --seed {seed} "
            "--out FILE",
            "scratch": scratch_folder() or "the folder for temporary files",
            "case": case_is,
            "seed": seed,
            "planned": planned,
        }
        self._earlier_seconds = 0.0
        self._cases: dict[tuple, dict] = {}
        if self._path.exists():
            report = json.loads(self._path.read_text("utf-8"))
            if report["seed"] == seed and is_same(report, provenance()):
                self._earlier_seconds = report["seconds"]
                self._cases = {_key(case): case for case in report["cases"]}

    @property
    def cases(self) -> list[dict]:
        return list(self._cases.values())

    def __contains__(self, key: tuple) -> bool:
        """Whether the case of this kind and number is known."""
        return key in self._cases

    def add(self, case: dict) -> None:
        """Keeps a case, in place of an earlier one of its kind and number."""
        self._cases[_key(case)] = case
        if time.perf_counter() - self._saved > _SAVE_SECONDS:
            self._save({})

    def finish(
        self,
        *,
        is_good: Callable[[dict], bool],
        summarize: Callable[[list[dict]], object],
    ) -> int:
        """Writes the report and tells of it; exit code 1 if a case is bad."""
        bad = [case for case in self.cases if not is_good(case)]
        summary = summarize(self.cases)
        self._save({"summary": summary, "bad": len(bad)})
        print(json.dumps(summary, indent=2))
        print(f"{len(self._cases)} of {self._head['planned']} cases, {len(bad)} bad")
        for case in bad[:20]:
            print(case)
        return 1 if bad else 0

    def _save(self, ending: dict) -> None:
        """Writes the report, one case a line; a reader sees the old or the new one."""
        self._saved = time.perf_counter()
        seconds = self._earlier_seconds + self._saved - self._began
        report = {**self._head, "seconds": round(seconds, 1), **ending}
        head = json.dumps(report, indent=2)[:-2]
        lines = ",\n    ".join(json.dumps(case) for case in self.cases)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole_file.write_text(
            self._path, f'{head},\n  "cases": [\n    {lines}\n  ]\n}}\n'
        )


def _key(case: dict) -> tuple:
    return case["kind"], case["number"]


def sweep_options(description: str) -> argparse.Namespace:
    """Command line of a sweep whose cases can be run in pieces."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--points", default=":", help="slice A:B:STEP of cases")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", required=True)
    return parser.parse_args()


def run_cases(
    planned: Sequence[tuple],
    run: Callable[..., dict],
    options: argparse.Namespace,
    *,
    case_is: str,
) -> Results:
    """Runs the chosen cases that are not known yet, while there is time.

    A case is a tuple that begins with its kind and number.
    """
    began = time.perf_counter()
    chosen = slice(*(int(n) if n else None for n in options.points.split(":")))
    results = Results(
        options.out, seed=options.seed, planned=len(planned), case_is=case_is
    )
    for case in planned[chosen]:
        if time.perf_counter() - began > options.seconds:
            break
        if case[:2] not in results:
            results.add(run(*case))
    return results
