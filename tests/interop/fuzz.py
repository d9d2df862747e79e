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

Case i of a seed is the same file on every machine and whatever ran before it. With
--out, finished pieces are kept in FILE.pieces until all are done: a command that was
stopped, repeated, continues, as long as it is the same commit. Exit code 1 as well if a
process has grown by more than 300 MB over its files, none of which is large.
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

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import mutations  # noqa: E402
import oracles  # noqa: E402
import result_file  # noqa: E402

from nad_jax import errors, whole_file  # noqa: E402
from nad_jax.interop import reader  # noqa: E402

OUTCOMES = ("accepted", "rejected", "wrong_accept", "crash", "hang")
FORMATS = tuple(mutations.MUTATORS)
_HANG_SECONDS = 5.0
_KEPT_FAILURES = 20
MAX_GROWTH_MB = 300.0
# Cases of one piece: half a minute or so, and seldom a new process.
_PIECE = 5000


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
        **result_file.provenance(),
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


def fuzz(seed: int, cases: int, jobs: int = 1, pieces: Path | None = None) -> dict:
    """Runs all cases, in `jobs` processes; `pieces` holds what an earlier run did.

    "seconds" is the time of all pieces together, whenever and beside what they ran.
    """
    made_by = result_file.provenance()
    done = {} if pieces is None else _read_pieces(pieces, seed, made_by)
    ranges = [(start, min(start + _PIECE, cases)) for start in range(0, cases, _PIECE)]

    def keep(piece):
        done[piece["range"]] = piece
        if pieces is not None:
            with open(pieces, "a", encoding="utf-8") as stream:
                line = json.dumps({"seed": seed, "made_by": made_by, **piece})
                # On a line of its own, whatever a stop left before it.
                stream.write(f"\n{line}\n")

    todo = [limits for limits in ranges if limits not in done]
    if jobs == 1:
        for limits in todo:
            keep(_timed_piece(seed, limits))
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
            waiting = [pool.submit(_timed_piece, seed, limits) for limits in todo]
            for future in concurrent.futures.as_completed(waiting):
                keep(future.result())
    parts = [done[limits] for limits in ranges]
    return summary(seed, cases, parts, sum(part["seconds"] for part in parts))


def _timed_piece(seed: int, limits: tuple[int, int]) -> dict:
    began = time.perf_counter()
    piece = run(seed, *limits)
    return {**piece, "range": limits, "seconds": time.perf_counter() - began}


def _read_pieces(path: Path, seed: int, made_by: dict) -> dict[tuple[int, int], dict]:
    """Range of cases -> what came of them; a line cut off by a stop is left out.

    So are pieces of another seed, another commit or other versions.
    """
    found = {}
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    for line in lines:
        try:
            piece = json.loads(line)
        except ValueError:
            continue
        same_code = result_file.is_same(piece.pop("made_by", {}), made_by)
        if piece.pop("seed") == seed and same_code:
            piece["range"] = tuple(piece["range"])
            found[piece["range"]] = piece
    return found


def main() -> int:
    """Exit code 1 if a case is bad."""
    parser = argparse.ArgumentParser(description="Fuzz the model file readers.")
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", default="")
    options = parser.parse_args()
    pieces = None
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        pieces = Path(options.out + ".pieces")
    report = fuzz(options.seed, options.cases, options.jobs, pieces)
    if pieces is not None:
        whole_file.write_json(options.out, report)
        pieces.unlink()
    print(json.dumps({k: v for k, v in report.items() if k != "failures"}, indent=2))
    for failure in report["failures"]:
        print(failure["case"], failure["format"], failure["outcome"], failure["why"])
    return 1 if is_bad(report) else 0


def is_bad(report: dict) -> bool:
    """Whether a case was bad, or took too much memory."""
    bad = sum(report["outcomes"][name] for name in ("wrong_accept", "crash", "hang"))
    return bad > 0 or report["peak_memory_growth_mb"] > MAX_GROWTH_MB


if __name__ == "__main__":
    sys.exit(main())
