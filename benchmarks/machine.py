# SPDX-License-Identifier: Apache-2.0
"""Who else is using the processors, and what machine this is; Linux, from /proc.

A timing taken beside a busy neighbour says nothing. `Watch` measures, over a span of
time, the cores that were busy with anything but this process and its descendants.
"""

import dataclasses
import os
import pathlib
import platform
import time
from collections.abc import Mapping

_PROC = pathlib.Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclasses.dataclass(frozen=True)
class Times:
    """Processor time since the machine was started, in seconds.

    Attributes:
      clock: Monotonic time of the reading.
      busy: Of all processors together, whoever used them.
      stolen: Taken by the host for other guests.
      processes: Process id -> (name, parent, its own time, that of its dead children).
    """

    clock: float
    busy: float
    stolen: float
    processes: Mapping[int, tuple[str, int, float, float]]


@dataclasses.dataclass(frozen=True)
class Usage:
    """What happened between two readings.

    Attributes:
      other_cores: Cores busy with other processes, 0 to the number of cores.
      stolen_cores: Cores taken by the host for other guests.
      busiest: "name pid" of the process that used most of `other_cores`, "" if none.
    """

    other_cores: float
    stolen_cores: float
    busiest: str


def read_times(proc: pathlib.Path = _PROC) -> Times:
    """A reading now."""
    line = (proc / "stat").read_text("ascii").splitlines()[0]
    # user nice system idle iowait irq softirq steal; guest time is in user already.
    values = [int(word) / _TICKS for word in line.split()[1:9]]
    processes = {}
    for folder in proc.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            text = (folder / "stat").read_text("utf-8", errors="replace")
        except OSError:  # It ended meanwhile.
            continue
        # The name is in parentheses and may hold any character, parentheses too.
        name, _, rest = text.partition("(")[2].rpartition(")")
        fields = rest.split()
        processes[int(folder.name)] = (
            name,
            int(fields[1]),
            (int(fields[11]) + int(fields[12])) / _TICKS,
            (int(fields[13]) + int(fields[14])) / _TICKS,
        )
    busy = sum(values[:3]) + sum(values[5:7])
    return Times(time.monotonic(), busy, values[7], processes)


def usage(before: Times, after: Times, *, own: int) -> Usage:
    """Use of the processors by all but `own` and its descendants.

    Args:
      before: Reading at the beginning.
      after: Reading at the end.
      own: Process id of the driver.
    """
    span = max(after.clock - before.clock, 1e-9)
    ours = _own_time(after, own) - _own_time(before, own)
    others = max(after.busy - before.busy - ours, 0.0)
    mine = _descendants(after, own)
    spent = {
        pid: times[2] - before.processes.get(pid, ("", 0, 0.0, 0.0))[2]
        for pid, times in after.processes.items()
        if pid not in mine
    }
    busiest = max(spent, key=spent.__getitem__, default=None)
    name = ""
    if busiest is not None and spent[busiest] > 0:
        name = f"{after.processes[busiest][0]} {busiest}"
    return Usage(others / span, (after.stolen - before.stolen) / span, name)


def _descendants(times: Times, own: int) -> set[int]:
    found, grown = {own}, True
    while grown:
        more = {pid for pid, p in times.processes.items() if p[1] in found} - found
        found |= more
        grown = bool(more)
    return found


def _own_time(times: Times, own: int) -> float:
    """Seconds of a process, its descendants, and those of them that have ended."""
    return sum(
        times.processes[pid][2] + times.processes[pid][3]
        for pid in _descendants(times, own)
        if pid in times.processes
    )


class Watch:
    """Measures the neighbours from its making, or the last `lap`, to the next `lap`."""

    def __init__(self):
        self._last = read_times()

    def lap(self) -> Usage:
        now = read_times()
        result = usage(self._last, now, own=os.getpid())
        self._last = now
        return result


def describe() -> dict[str, object]:
    """The machine, as a result file holds it."""
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
    }


def _processor() -> str:
    for line in (_PROC / "cpuinfo").read_text("utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"
