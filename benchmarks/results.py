# SPDX-License-Identifier: Apache-2.0
"""From seconds to rows, from rows to a result file and a table.

A row compares one of our variants with one of theirs:

    ratio = theirs_seconds / ours_seconds      above 1: ours is faster
    memory_ratio = ours_peak / theirs_peak     below 1: ours needs less
    distance = ours_seconds / floor_seconds    1 would be perfect
"""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax import whole_file

FORMAT = 1


def spread(seconds: Sequence[float]) -> float:
    """Largest minus smallest, as a share of the median; 0 for a single run."""
    return (max(seconds) - min(seconds)) / statistics.median(seconds)


def row(
    name: str,
    *,
    variant: str,
    ours_variant: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    ours_peak_bytes: int | None = None,
    theirs_peak_bytes: int | None = None,
    floor_seconds: float | None = None,
    **more: Any,
) -> dict[str, Any]:
    """One comparison, from the seconds of every run of both sides.

    Args:
      name: Case.
      variant: What the PyTorch side was.
      ours_variant: What our side was.
      ours: Seconds of each run, in order.
      theirs: The same of the other side.
      ours_peak_bytes: Largest resident memory of our processes.
      theirs_peak_bytes: Of theirs.
      floor_seconds: What the machine could do at best.
      **more: Further entries of the row.
    """
    ours_seconds, theirs_seconds = statistics.median(ours), statistics.median(theirs)
    result = {
        "name": name,
        "variant": variant,
        "ours_variant": ours_variant,
        "ours_seconds": ours_seconds,
        "theirs_seconds": theirs_seconds,
        "ratio": theirs_seconds / ours_seconds,
        "runs": {"ours": list(ours), "theirs": list(theirs)},
        "spread": {"ours": spread(ours), "theirs": spread(theirs)},
    }
    if ours_peak_bytes and theirs_peak_bytes:
        result |= {
            "ours_peak_bytes": ours_peak_bytes,
            "theirs_peak_bytes": theirs_peak_bytes,
            "memory_ratio": ours_peak_bytes / theirs_peak_bytes,
        }
    if floor_seconds:
        result |= {
            "floor_seconds": floor_seconds,
            "ours_distance": ours_seconds / floor_seconds,
            "theirs_distance": theirs_seconds / floor_seconds,
        }
    return result | more


def over_seeds(
    entries: Sequence[Mapping[str, Any]], *, by: Sequence[str]
) -> list[dict[str, Any]]:
    """ACC and ASR of entries that differ in their seed only.

    Args:
      entries: Each with "acc" and "asr".
      by: Names of what tells the groups apart.

    Returns:
      For each group what tells it apart, "seeds", the number of entries, and of "acc"
      and "asr" each mean, sample standard deviation (None of one entry) and worst.
    """
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[name] for name in by), []).append(entry)
    rows = []
    for names, group in groups.items():
        one: dict[str, Any] = {**dict(zip(by, names, strict=True)), "seeds": len(group)}
        for rate, worst in (("acc", min), ("asr", max)):
            values = [entry[rate] for entry in group]
            one[rate] = {
                "mean": statistics.mean(values),
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "worst": worst(values),
            }
        rows.append(one)
    return rows


def document(
    cases: Sequence[Mapping[str, Any]], *, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The content of a result file: the rows and what they depend on."""
    return {"format": FORMAT, **facts, "cases": list(cases)}


def write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a result file, whole or not at all, with the commit of the code."""
    # Loads JAX, which a driver that only waits for its children does without.
    from nad_jax import pipeline

    content = {"git_commit": pipeline.git_commit(), **content}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole_file.write_json(path, content)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a terminal or a Markdown page."""
    lines = [
        "| case | ours | theirs | ours s | theirs s | ratio | spread | memory | "
        "distance to the floor |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for one in rows:
        widest = max(one["spread"].values())
        memory, distance = one.get("memory_ratio"), one.get("ours_distance")
        theirs = one["variant"] + (" (extrapolated)" if one.get("extrapolated") else "")
        lines.append(
            f"| {one['name']} | {one['ours_variant']} | {theirs} "
            f"| {one['ours_seconds']:.4g} | {one['theirs_seconds']:.4g} "
            f"| {one['ratio']:.2f} | {widest:.0%} "
            f"| {'–' if memory is None else f'{memory:.2f}'} "
            f"| {'–' if distance is None else f'{distance:.1f}'} |"
        )
    return "\n".join(lines)
