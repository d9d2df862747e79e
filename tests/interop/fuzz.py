# SPDX-License-Identifier: Apache-2.0
"""Reads mutated model files and counts what happens.

    python tests/interop/fuzz.py --cases 1000000 --seed 7 --jobs 2 --out fuzz.json

Outcomes of a case, of which the last three must never occur:

    accepted      read, and an independent reader (`oracles`) finds the same arrays
    rejected      one InputError with one line
    wrong_accept  read, but the independent reader refuses the file or finds other
                  names, dtypes, shapes or bytes; or a value is not finite
    crash         any other exception, or a message of several lines or 1,000 characters
    hang          more than 5 seconds

Case i of a seed is the same file on every machine and whatever ran before it.
"""

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import mutations  # noqa: E402
import oracles  # noqa: E402

from nad_jax import errors  # noqa: E402
from nad_jax.interop import reader  # noqa: E402

OUTCOMES = ("accepted", "rejected", "wrong_accept", "crash", "hang")
FORMATS = tuple(mutations.MUTATORS)
_HANG_SECONDS = 5.0
_KEPT_FAILURES = 20


class _Hang(BaseException):
    """Not an Exception, so that no reader can swallow it."""


def _on_alarm(*_: object) -> None:
    raise _Hang


def mutant(seed: int, index: int) -> tuple[str, bytes]:
    """Format and bytes of one case."""
    rng = random.Random(f"{seed}:{index}")
    format_name = FORMATS[index % len(FORMATS)]
    return format_name, mutations.MUTATORS[format_name](rng)


def outcome_of(path: str, data: bytes) -> tuple[str, str]:
    """Outcome of one case, whose file is at `path`, and, if it is bad, why."""
    signal.setitimer(signal.ITIMER_REAL, _HANG_SECONDS)
    try:
        checkpoint = reader.read_checkpoint(path)
    except errors.InputError as error:
        message = str(error)
        if len(message.splitlines()) != 1 or len(message) > 1000:
            return "crash", f"message {message[:200]!r}"
        return "rejected", ""
    except _Hang:
        return "hang", ""
    except Exception as problem:
        return "crash", repr(problem)[:500]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    try:
        oracles.check(checkpoint.format, data, checkpoint.arrays)
    except oracles.Disagreement as problem:
        return "wrong_accept", str(problem)[:500]
    return "accepted", ""


def run(seed: int, start: int, stop: int) -> dict:
    """Cases `start` to `stop` of a seed, in this process."""
    counts = {name: collections.Counter() for name in FORMATS}
    failures: list[dict] = []
    slowest = 0.0
    previous = signal.signal(signal.SIGALRM, _on_alarm)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # One file for all cases: creating one takes longer than reading it.
    with tempfile.NamedTemporaryFile(buffering=0) as stream:
        for index in range(start, stop):
            format_name, data = mutant(seed, index)
            os.pwrite(stream.fileno(), data, 0)
            os.ftruncate(stream.fileno(), len(data))
            began = time.perf_counter()
            outcome, why = outcome_of(stream.name, data)
            slowest = max(slowest, time.perf_counter() - began)
            counts[format_name][outcome] += 1
            if why or outcome == "hang":
                failure = {"case": index, "format": format_name, "outcome": outcome}
                failures.append(failure | {"why": why, "bytes": data[:8192].hex()})
    signal.signal(signal.SIGALRM, previous)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {
        "counts": {name: dict(counts[name]) for name in FORMATS},
        "failures": failures,
        "slowest_seconds": slowest,
        "peak_memory_growth_mb": grown / 1024,
    }


def summary(seed: int, cases: int, parts: list[dict], seconds: float) -> dict:
    """One report from the parts of a run."""
    by_format = {
        name: {
            outcome: sum(part["counts"][name].get(outcome, 0) for part in parts)
            for outcome in OUTCOMES
        }
        for name in FORMATS
    }
    totals = {
        outcome: sum(counts[outcome] for counts in by_format.values())
        for outcome in OUTCOMES
    }
    failures = [failure for part in parts for failure in part["failures"]]
    return {
        "cases": cases,
        "seed": seed,
        "seconds": round(seconds, 1),
        "outcomes": totals,
        "by_format": by_format,
        "slowest_seconds": round(max(part["slowest_seconds"] for part in parts), 3),
        "peak_memory_growth_mb": round(
            max(part["peak_memory_growth_mb"] for part in parts), 1
        ),
        "failures": failures[:_KEPT_FAILURES],
    }


def fuzz(seed: int, cases: int, jobs: int = 1) -> dict:
    """Runs all cases, in `jobs` processes."""
    began = time.perf_counter()
    if jobs == 1:
        parts = [run(seed, 0, cases)]
    else:
        size = 5000
        starts = range(0, cases, size)
        stops = [min(start + size, cases) for start in starts]
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
            parts = list(pool.map(run, [seed] * len(starts), starts, stops))
    return summary(seed, cases, parts, time.perf_counter() - began)


def main() -> int:
    """Exit code 1 if a case crashed, hung or was accepted wrongly."""
    parser = argparse.ArgumentParser(description="Fuzz the model file readers.")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    report = fuzz(options.seed, options.cases, options.jobs)
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k != "failures"}, indent=2))
    for failure in report["failures"]:
        print(failure["case"], failure["format"], failure["outcome"], failure["why"])
    bad = sum(report["outcomes"][name] for name in ("wrong_accept", "crash", "hang"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
