# SPDX-License-Identifier: Apache-2.0
"""Times this library and PyTorch in turn, and writes benchmarks/results/<case>.json.

    python -m benchmarks.run --case=nad_step --torch_python=PATH
    python -m benchmarks.run --list

Both sides run as child processes: ours with this interpreter, PyTorch's with the one of
--torch_python (by default this one, too). They work one after the other, never at once:
A B A B. Nothing is reported while another process uses the machine: exit code 2.
"""

import argparse
import functools
import json
import pathlib
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import cases as cases_lib
from benchmarks import machine, protocol, results

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = pathlib.Path(__file__).parent / "results"
_PATHS = {
    "torch_python": "PATH",
    "data_dir": "DIR",
    "checkpoint": "FILE",
    "out": "DIR",
}
_SECONDS_TO_LOOK = 2.0
_SECONDS_TO_WAIT = 5.0
# Facts of a side that have their place elsewhere in the result file.
_NOT_IN_ROWS = ("event", "versions", "threads", "extra_seconds")


class Refused(RuntimeError):
    """What was measured, or would be, means nothing."""


class Quiet:
    """Keeps runs beside busy neighbours out of the results.

    Args:
      limit: Cores that other processes may use.
      stolen_limit: Cores that the host may give to other guests during a run.
      patience: Seconds to wait and to repeat in, all in all; 0 gives up at once.

    Attributes:
      worst: Largest number of cores that others used during a run that was kept.
      stolen: Largest number of cores that the host took during a run that was kept.
    """

    def __init__(self, *, limit: float, stolen_limit: float, patience: float):
        self._limit = limit
        self._stolen_limit = stolen_limit
        self._patience = patience
        self.worst = 0.0
        self.stolen = 0.0

    def wait(self) -> None:
        """Returns when the machine is idle; gives up after the patience is used."""
        while True:
            watch = machine.Watch()
            time.sleep(_SECONDS_TO_LOOK)
            seen = watch.lap()
            if seen.other_cores <= self._limit:
                return
            self._give_up_or_sleep(seen)

    def run(self, work: Callable[[], Any]) -> Any:
        """The result of `work`, repeated until a run was undisturbed."""
        while True:
            watch = machine.Watch()
            result = work()
            seen = watch.lap()
            undisturbed = seen.stolen_cores <= self._stolen_limit
            if undisturbed and seen.other_cores <= self._limit:
                self.worst = max(self.worst, seen.other_cores)
                self.stolen = max(self.stolen, seen.stolen_cores)
                return result
            self._give_up_or_sleep(seen)

    def _give_up_or_sleep(self, seen: machine.Usage) -> None:
        if self._patience <= 0:
            raise Refused(
                f"other processes use {seen.other_cores:.2f} cores "
                f"({seen.busiest} most) and other guests of the host "
                f"{seen.stolen_cores:.2f}, more than {self._limit:g} and "
                f"{self._stolen_limit:g}; wait for an idle machine"
            )
        self._patience -= _SECONDS_TO_WAIT
        time.sleep(_SECONDS_TO_WAIT)


def add_quiet_options(parser: argparse.ArgumentParser) -> None:
    """What `quiet_of` reads."""
    parser.add_argument(
        "--max_other_cores",
        type=float,
        default=0.1,
        help="cores that other processes may use",
    )
    parser.add_argument(
        "--max_stolen_cores",
        type=float,
        default=0.25,
        help="cores that the host may give to other guests during a run",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=0.0,
        help="seconds to wait, in all, for a busy machine to become idle",
    )


def quiet_of(arguments: argparse.Namespace) -> Quiet:
    """As the options of the command say."""
    return Quiet(
        limit=arguments.max_other_cores,
        stolen_limit=arguments.max_stolen_cores,
        patience=arguments.patience,
    )


class Bench:
    """Everything that the runs of one case share."""

    def __init__(
        self,
        case: cases_lib.Case,
        *,
        pythons: dict[str, str],
        work: pathlib.Path,
        quiet: Quiet,
        own_cache: bool = True,
    ):
        """`own_cache`: compile caches in `work`, not those of the user."""
        self._own_cache = own_cache
        self._case = case
        self._pythons = pythons
        self._work = work
        self._quiet = quiet
        self._count = 0

    def start(self, who: str, side: cases_lib.Side) -> protocol.Child:
        """A running process of that side."""
        self._count += 1
        cache = self._work / "cache"
        if side.cold:
            cache = self._work / f"cache_{self._count}"
        options = {**side.options, "work": str(self._work)}
        return protocol.Child(
            [
                self._pythons[who],
                "-m",
                f"benchmarks.{who}",
                side.task,
                json.dumps(options),
            ],
            log=self._work / f"{who}_{self._count}.log",
            environment={
                "NAD_JAX_CACHE": str(cache / "xla"),
                "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
            }
            if self._own_cache
            else {},
            folder=ROOT,
        )

    def process(self, who: str, side: cases_lib.Side, *, to_ready: bool):
        """One process: (seconds to its exit or to "ready", facts, peak bytes)."""
        child = self.start(who, side)
        try:
            facts = child.expect("ready")
            seconds = time.perf_counter() - child.started
            peak = child.stop()
        finally:
            child.kill()
        if not to_ready:
            seconds = time.perf_counter() - child.started
        # What was extrapolated was not waited for.
        return seconds + facts.get("extra_seconds", 0.0), facts, peak

    def measure(self, rounds: int) -> dict[tuple[str, str], dict[str, Any]]:
        """(who, variant) -> {"seconds", "facts", "peak_bytes"} of each side."""
        sides = [("ours", side) for side in self._case.ours]
        sides += [("theirs", side) for side in self._case.theirs]
        if self._case.timing == "units":
            return self._measure_units(sides, rounds)
        to_ready = self._case.timing == "startup"
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for who, side in sides:
            found[who, side.variant] = {"seconds": [], "facts": {}, "peak_bytes": 0}
            if who == "ours" and not side.cold:
                # Fills the compile cache; PyTorch's processes have none.
                self.process(who, side, to_ready=to_ready)
        for _ in range(rounds):
            for who, side in sides:
                seconds, facts, peak = self._quiet.run(
                    lambda who=who, side=side: self.process(
                        who, side, to_ready=to_ready
                    )
                )
                one = found[who, side.variant]
                one["seconds"].append(seconds)
                one["facts"] = facts
                one["peak_bytes"] = max(one["peak_bytes"], peak)
        return found

    def _measure_units(self, sides, rounds: int):
        children: dict[tuple[str, str], protocol.Child] = {}
        found: dict[tuple[str, str], dict[str, Any]] = {}
        try:
            for who, side in sides:
                child = children[who, side.variant] = self.start(who, side)
                try:
                    facts = child.expect("ready")
                except protocol.SideFailed as failure:
                    if not side.options.get("compiled"):
                        raise
                    # A compiler is not part of PyTorch.
                    print(f"{who}, {side.variant}: left out: {failure}", flush=True)
                    del children[who, side.variant]
                    continue
                found[who, side.variant] = {"seconds": [], "facts": facts}
            for _ in range(rounds):
                for who, side in sides:
                    child = children.get((who, side.variant))
                    if child is None:
                        continue
                    done = self._quiet.run(child.go)
                    found[who, side.variant]["seconds"].append(
                        done["seconds"] / side.options.get("batches", 1)
                    )
            for key, child in children.items():
                found[key]["peak_bytes"] = child.stop()
        finally:
            for child in children.values():
                child.kill()
        return found


def rows_of(
    case: cases_lib.Case, found: dict[tuple[str, str], Any], peaks: dict[str, float]
) -> list[dict[str, Any]]:
    """Each of our sides against each of theirs; "strongest" is their fastest."""
    floor = None
    if case.work is not None and peaks:
        floor = case.work.seconds(**peaks)
    medians = {
        variant: statistics.median(side["seconds"])
        for (who, variant), side in found.items()
        if who == "theirs"
    }
    rows = []
    for (who, ours_variant), ours in found.items():
        if who != "ours":
            continue
        for (other, variant), theirs in found.items():
            if other != "theirs":
                continue
            more = {
                f"{name}_{key}": value
                for name, side in (("ours", ours), ("theirs", theirs))
                for key, value in side["facts"].items()
                if key not in _NOT_IN_ROWS
            }
            rows.append(
                results.row(
                    case.name,
                    variant=variant,
                    ours_variant=ours_variant,
                    ours=ours["seconds"],
                    theirs=theirs["seconds"],
                    ours_peak_bytes=ours["peak_bytes"],
                    theirs_peak_bytes=theirs["peak_bytes"],
                    floor_seconds=floor,
                    strongest=variant == min(medians, key=medians.__getitem__),
                    extrapolated="extra_seconds" in theirs["facts"],
                    **more,
                )
            )
    return rows


def measure_peaks(bench: Bench, quiet: Quiet) -> dict[str, float]:
    """Operations and bytes per second, each by whichever side is better at it."""
    best = {"operations_per_second": 0.0, "bytes_per_second": 0.0}
    for who in ("ours", "theirs"):
        _, facts, _ = quiet.run(
            lambda who=who: bench.process(
                who, cases_lib.Side("", "peaks"), to_ready=True
            )
        )
        best = {name: max(value, facts[name]) for name, value in best.items()}
    return best


def run_case(
    case: cases_lib.Case, arguments: argparse.Namespace, work: pathlib.Path
) -> list[dict[str, Any]]:
    """Times one case, writes its file, returns its rows."""
    pythons = {"ours": sys.executable, "theirs": arguments.torch_python}
    quiet = quiet_of(arguments)
    quiet.wait()
    bench = Bench(case, pythons=pythons, work=work, quiet=quiet)
    load = [round(value, 2) for value in _load_average()]
    if case.arch is not None:
        _prepare(bench, case, arguments)
    peaks = measure_peaks(bench, quiet) if case.work is not None else {}
    found = bench.measure(arguments.rounds)
    rows = rows_of(case, found, peaks)
    if case.arch is not None:
        _judge(bench, case, rows)
    facts = {
        "command": _command(arguments),
        "quick": arguments.quick,
        "unit": case.unit,
        "machine": machine.describe(),
        "versions": {
            who: side["facts"]["versions"] for (who, _), side in found.items()
        },
        "threads": {who: side["facts"]["threads"] for (who, _), side in found.items()},
        "load_average_before": load,
        "other_cores_limit": arguments.max_other_cores,
        "stolen_cores_limit": arguments.max_stolen_cores,
        "other_cores_worst": quiet.worst,
        "stolen_cores_worst": quiet.stolen,
        **({"peaks": peaks} if peaks else {}),
    }
    path = arguments.out / f"{case.name}.json"
    results.write(path, results.document(rows, facts=facts))
    return rows


def _command(arguments: argparse.Namespace) -> str:
    """What was asked for, without paths that exist on this machine only."""
    words = [f"--case={name}" for name in arguments.case]
    for name, value in vars(arguments).items():
        if name == "case" or value == _parser().get_default(name):
            continue
        value = _PATHS.get(name, value)
        words.append(f"--{name}" if value is True else f"--{name}={value}")
    return " ".join(["python -m benchmarks.run", *words])


def _load_average() -> Sequence[float]:
    words = pathlib.Path("/proc/loadavg").read_text("ascii").split()
    return [float(word) for word in words[:3]]


def _prepare(bench: Bench, case, arguments: argparse.Namespace) -> None:
    """Data and the victim's checkpoint, in the working folder; made once."""
    data = {
        "data_dir": arguments.data_dir,
        "train": 512 if arguments.quick else 5000,
        "test": 256 if arguments.quick else 2000,
    }
    # Enough that the small nets learn; of ResNet-18 the statistics are what counts.
    steps = 20 if arguments.quick or case.arch == "resnet_18" else 240
    victim = {"arch": case.arch, "steps": steps}
    bench.process("ours", cases_lib.Side("", "data", data), to_ready=True)
    if arguments.checkpoint is not None:
        victim["checkpoint"] = str(pathlib.Path(arguments.checkpoint).absolute())
    bench.process("theirs", cases_lib.Side("", "victim", victim), to_ready=True)


def _judge(bench: Bench, case, rows: list[dict[str, Any]]) -> None:
    """Adds ACC and ASR of every checkpoint that was written, by one evaluator.

    A side whose work was extrapolated has none to show.
    """

    def rates(file: str) -> tuple[float, float]:
        side = cases_lib.Side("", "judge", {"file": file, "arch": case.arch})
        _, facts, _ = bench.process("ours", side, to_ready=True)
        return facts["acc"], facts["asr"]

    rates = functools.cache(rates)
    for row in rows:
        row["victim_acc"], row["victim_asr"] = rates("victim")
        for who in ("ours", "theirs"):
            file = row.pop(f"{who}_file", None)
            if file is not None:
                row[f"{who}_acc"], row[f"{who}_asr"] = rates(file)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", action="append", help="may be given again")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    parser.add_argument("--torch_python", default=sys.executable)
    parser.add_argument("--rounds", type=int, default=7, help="runs of each side")
    parser.add_argument(
        "--torch_steps",
        type=int,
        default=200,
        help="Adam steps a layer of the EFRAP reference, of 10,000; the rest is "
        "extrapolated",
    )
    parser.add_argument(
        "--data_dir", help="CIFAR-10 in TFDS layout; default: made-up pictures"
    )
    parser.add_argument(
        "--checkpoint", help="PyTorch file of the victim; default: one is trained"
    )
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    add_quiet_options(parser)
    parser.add_argument("--quick", action="store_true", help="only see that it runs")
    return parser


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 done, 2 refused or impossible, in one line."""
    arguments = _parser().parse_args(argv)
    known = cases_lib.build(quick=arguments.quick, torch_steps=arguments.torch_steps)
    if arguments.list:
        print("\n".join(known))
        return 0
    unknown = set(arguments.case or ()) - set(known)
    if unknown or not arguments.case:
        print(
            f"benchmarks: --case must be of {', '.join(known)}, "
            f"got {', '.join(sorted(unknown)) or 'none'}",
            file=sys.stderr,
        )
        return 2
    work = pathlib.Path(tempfile.mkdtemp(prefix="nad_jax_benchmark_"))
    try:
        for name in arguments.case:
            print(results.table(run_case(known[name], arguments, work)), flush=True)
    except (Refused, protocol.SideFailed) as failure:
        print(f"benchmarks: {failure}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return 0


if __name__ == "__main__":
    # A polite end must not leave sides behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
