# SPDX-License-Identifier: Apache-2.0
"""Repairs at several learning rates: which is better where both are equally accurate.

    python -m nad_jax.report.matched_accuracy results/nad/rates_digits_*.json \\
        [--reference=fine_tuning] [--within=0.02] [--drawing=FILE.svg]

A repair that trains faster mostly forgets more, of the backdoor and of the task. One
learning rate for all of them therefore compares rates as much as methods. From reports
of `configs/nad.py` that differ in `defense.training.learning_rate`:

- The first table: each repair at each rate, means over attacks of the means over seeds.
- The second: each repair at the rate that a defender would take, for each attack and
  seed the fastest one whose accuracy on held-out images is within `--within` of the
  best rate's. Nothing else of the defender's is looked at.
- The third: each repair's ASR less that of the reference at equal ACC. The reference's
  points of one attack, its means over seeds at each rate, are joined by lines in the
  order of their ACC; a point that is more or less accurate than all of them is compared
  with nothing. Means are over the points of an attack, then over the attacks that have
  any.
- The drawing: ACC and ASR of each attack, a line for each repair.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nad_jax import errors, settings, whole_file
from nad_jax.core import metrics
from nad_jax.report import attack_table, markup, schema, tables


@dataclasses.dataclass(frozen=True)
class Point:
    """One repair of one victim at one learning rate.

    Attributes:
      attack: Name of the attack.
      row: Name of the repair.
      learning_rate: Of its training.
      seed: Of its run.
      acc: Accuracy on test images, in [0, 1].
      asr: Attack success rate, in [0, 1].
      held_out_acc: Accuracy on the defender's held-out images, in [0, 1].
    """

    attack: str
    row: str
    learning_rate: float
    seed: int
    acc: float
    asr: float
    held_out_acc: float


def points(reports: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Every repair of a backdoored model in the reports.

    Args:
      reports: Of `configs/nad.py`, as `schema.read_report` returns them.

    Raises:
      InputError: a report of something else, from before held-out accuracies were
        recorded, or with several `rate_factors`; reports of two data sets, or of one
        attack that differ in more than the rate; the same repair twice, or not with
        the same seeds at every rate.
    """
    found: dict[tuple[Any, ...], Point] = {}
    setups: dict[str, str] = {}
    for report in reports:
        try:
            defense = report["config"]["defense"]
            rate = float(defense["training"]["learning_rate"])
            attack, dataset = report["attack"], report["dataset"]
            setup = _setup_but_rate(report)
        except (KeyError, TypeError, ValueError):
            raise errors.InputError(
                f"report {report.get('title')!r} is none of configs/nad.py, which has "
                "attack, dataset and config.defense.training.learning_rate"
            ) from None
        if dataset != reports[0]["dataset"]:
            raise errors.InputError(
                f"reports must be of one data set, got {reports[0]['dataset']} and "
                f"{dataset}"
            )
        factors = defense.get("rate_factors", [1.0])
        if len(factors) > 1:
            raise errors.InputError(
                f"rows of report {report.get('title')!r} have no one learning rate: "
                f"rate_factors must be one, got {factors}"
            )
        rate *= factors[0]
        if setups.setdefault(attack, setup) != setup:
            raise errors.InputError(
                f"reports of one attack must differ in their learning rate alone, got "
                f"two of {attack} that differ in more"
            )
        for row in report["rows"]:
            if row["model"] != "backdoored" or row["name"] not in settings.REPAIRS:
                continue
            held_out = row.get("extra", {}).get("held_out_acc")
            if held_out is None or row["asr"] is None:
                missing = "held_out_acc" if held_out is None else "ASR"
                raise errors.InputError(
                    f"row {row['name']!r} of report {report.get('title')!r} has no "
                    f"{missing}"
                )
            key = attack, row["name"], rate, row["seed"]
            if key in found:
                raise errors.InputError(
                    f"two reports hold {row['name']} of {attack} at learning rate "
                    f"{rate:g}, seed {row['seed']}"
                )
            found[key] = Point(*key, row["acc"], row["asr"], held_out)
    if not found:
        raise errors.InputError("the reports hold no repair of a backdoored model")
    _check_seeds(list(found.values()))
    return list(found.values())


def _setup_but_rate(report: Mapping[str, Any]) -> str:
    """Equal for reports that differ in learning rate, seeds and rows alone."""
    config = report["config"]
    apart = ("rows", "clean_model_rows", "rate_factors", "rate_tolerance")
    defense = {k: v for k, v in config["defense"].items() if k not in apart}
    training = dict(defense["training"])
    del training["learning_rate"]
    config = {**config, "defense": {**defense, "training": training}}
    return tables.experiment_key({**report, "config": config})


def _check_seeds(found: Sequence[Point]) -> None:
    """Raises InputError unless each repair of an attack has the same seeds everywhere.

    Means over other victims are not to be compared, and a seed that has one rate only
    chooses nothing.
    """
    seeds: dict[tuple[str, str], dict[float, set[int]]] = {}
    for point in found:
        of_row = seeds.setdefault((point.attack, point.row), {})
        of_row.setdefault(point.learning_rate, set()).add(point.seed)
    for (attack, row), by_rate in seeds.items():
        (first, wanted), *others = by_rate.items()
        for rate, own in others:
            if own != wanted:
                raise errors.InputError(
                    f"{row} of {attack} must have the same seeds at every rate, got "
                    f"{sorted(wanted)} at {first:g} and {sorted(own)} at {rate:g}"
                )


def chosen(of_victim: Sequence[Point], *, within: float) -> Point:
    """The point at the fastest rate that costs little accuracy on held-out images.

    Args:
      of_victim: Points of one repair, attack and seed, one for each rate.
      within: How far below the best held-out accuracy is little, in [0, 1].
    """
    taken = metrics.strongest_affordable(
        [point.learning_rate for point in of_victim],
        [point.held_out_acc for point in of_victim],
        tolerance=within,
    )
    return of_victim[taken]


def asr_at(acc: float, reference: Sequence[tuple[float, float]]) -> float | None:
    """ASR of a polyline at an ACC, or None where it has no such ACC.

    Args:
      acc: Where, in [0, 1].
      reference: (ACC, ASR) of its corners, joined in the order of their ACC; of equal
        ones the mean counts.
    """
    by_acc: dict[float, list[float]] = {}
    for corner, asr in reference:
        by_acc.setdefault(corner, []).append(asr)
    accs = sorted(by_acc)
    # Means of the same shares may differ in their last bit.
    if not accs[0] - 1e-9 <= acc <= accs[-1] + 1e-9:
        return None
    return float(np.interp(acc, accs, [statistics.fmean(by_acc[a]) for a in accs]))


def means(found: Sequence[Point]) -> dict[tuple[str, str, float], tuple[float, float]]:
    """(attack, row, learning rate) -> ACC and ASR, means over seeds."""
    groups: dict[tuple[str, str, float], list[Point]] = {}
    for point in found:
        key = point.attack, point.row, point.learning_rate
        groups.setdefault(key, []).append(point)
    return {
        key: (
            statistics.fmean(point.acc for point in group),
            statistics.fmean(point.asr for point in group),
        )
        for key, group in groups.items()
    }


def differences(
    found: Sequence[Point], *, row: str, reference: str
) -> dict[str, list[float]]:
    """Attack -> ASR of `row` less that of `reference` at equal ACC, slow to fast.

    Without the rates at which the reference is never as accurate, or always more so.
    """
    mean = means(found)
    result: dict[str, list[float]] = {}
    for (attack, name, _), (acc, asr) in sorted(mean.items()):
        if name != row:
            continue
        corners = [
            value
            for (other, its_row, _), value in mean.items()
            if (other, its_row) == (attack, reference)
        ]
        there = asr_at(acc, corners) if corners else None
        result.setdefault(attack, [])
        if there is not None:
            result[attack].append(asr - there)
    return result


def text(found: Sequence[Point], *, reference: str, within: float) -> str:
    """The three tables, in Markdown."""
    rates = sorted({point.learning_rate for point in found})
    attacks = sorted({point.attack for point in found})
    rows = [name for name in settings.REPAIRS if any(p.row == name for p in found)]
    mean = means(found)

    def over_attacks(values: Sequence[tuple[float, float]]) -> str:
        if len(values) < len(attacks):
            return "–"
        return attack_table.rates_cell(*zip(*values, strict=True))

    def at_rate(row: str, rate: float) -> str:
        keys = [(attack, row, rate) for attack in attacks]
        return over_attacks([mean[key] for key in keys if key in mean])

    lines = _table(
        ["repair, ACC / ASR (worst attack)", *(f"{rate:g}" for rate in rates)],
        [
            [tables.row_label(row), *(at_rate(row, rate) for rate in rates)]
            for row in rows
        ],
    )
    lines.append("")
    by_victim: dict[tuple[str, str, int], list[Point]] = {}
    for point in found:
        by_victim.setdefault((point.row, point.attack, point.seed), []).append(point)
    taken = [chosen(group, within=within) for group in by_victim.values()]
    mean_taken = means([dataclasses.replace(p, learning_rate=0.0) for p in taken])
    body = []
    for row in rows:
        own = [point.learning_rate for point in taken if point.row == row]
        counts = ", ".join(f"{rate:g}: {own.count(rate)}" for rate in sorted({*own}))
        values = {
            attack: mean_taken[attack, row, 0.0]
            for attack in attacks
            if (attack, row, 0.0) in mean_taken
        }
        cells = [
            attack_table.rates_cell(*([rate] for rate in values[attack]))
            if attack in values
            else "–"
            for attack in attacks
        ]
        total = over_attacks(list(values.values()))
        body.append([tables.row_label(row), total, *cells, counts])
    lines += _table(
        ["repair, rate by held-out images", "all", *attacks, "rates taken"], body
    )
    lines.append("")
    body = []
    for row in rows:
        gaps = differences(found, row=row, reference=reference)
        # Each attack counts once, however many of its points can be compared.
        every = [statistics.fmean(one) for one in gaps.values() if one]
        cells = [
            "–"
            if not gaps.get(attack)
            else f"{100 * statistics.fmean(gaps[attack]):+.1f}"
            for attack in attacks
        ]
        total = f"{100 * statistics.fmean(every):+.1f}" if every else "–"
        counted = sum(map(len, gaps.values()))
        body.append([tables.row_label(row), total, *cells, str(counted)])
    lines += _table(
        [
            f"repair, ASR less that of {tables.row_label(reference)} at equal ACC",
            "all",
            *attacks,
            "points",
        ],
        body,
    )
    return "\n".join(lines)


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rule = "|---|" + "---:|" * (len(head) - 1)
    return [f"| {' | '.join(head)} |", rule, *(f"| {' | '.join(r)} |" for r in body)]


# ------------------------------------------------------------------------------ drawing

_PANEL, _LEFT, _TOP, _GAP, _COLUMNS = 200, 50, 70, 60, 4
_COLOURS = (
    "#000000",
    "#c14600",
    "#0072b2",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#777777",
)


def draw(found: Sequence[Point]) -> str:
    """ACC across and ASR up, a panel for each attack, a line for each repair."""
    attacks = sorted({point.attack for point in found})
    rows = [name for name in settings.REPAIRS if any(p.row == name for p in found)]
    colours = {row: _COLOURS[i % len(_COLOURS)] for i, row in enumerate(rows)}
    mean = means(found)
    # Whole points around all of them, so that panels can be compared.
    accs = [acc for acc, _ in mean.values()]
    low, high = np.floor(100 * min(accs)) / 100, np.ceil(100 * max(accs)) / 100
    high = max(high, low + 0.01)
    columns = min(_COLUMNS, len(attacks))
    width = max(_LEFT + columns * (_PANEL + _GAP), 8 + 130 * len(rows))
    shapes: list[markup.Child] = [
        markup.label(8, 20, "ACC across, ASR up, per cent; a corner is a learning rate")
    ]
    for i, row in enumerate(rows):
        name = tables.row_label(row)
        shapes.append(markup.label(8 + 130 * i, 42, name, fill=colours[row]))
    for i, attack in enumerate(attacks):
        left = _LEFT + i % columns * (_PANEL + _GAP)
        top = _TOP + i // columns * (_PANEL + _GAP)

        def place(acc, asr, left=left, top=top):
            across = left + _PANEL * (acc - low) / (high - low)
            return round(float(across), 1), round(float(top + _PANEL * (1 - asr)), 1)

        shapes.append(markup.label(left, top - 6, attack))
        frame = [place(low, 1), place(low, 0), place(high, 0)]
        shapes.append(_path(frame, "#999", 1))
        for acc in (low, high):
            x, y = place(acc, 0)
            shapes.append(markup.label(x, y + 16, f"{100 * acc:.0f}", anchor="middle"))
        for asr in (0.0, 0.5, 1.0):
            x, y = place(low, asr)
            shapes.append(markup.label(x - 6, y + 4, f"{100 * asr:.0f}", anchor="end"))
        for row in rows:
            corners = [
                place(*value)
                for (its_attack, name, _), value in sorted(
                    mean.items(), key=lambda item: item[1]
                )
                if (its_attack, name) == (attack, row)
            ]
            if len(corners) > 1:
                shapes.append(_path(corners, colours[row], 2))
            shapes += [
                markup.el("circle", cx=x, cy=y, r=3, fill=colours[row])
                for x, y in corners
            ]
    lines = -(-len(attacks) // columns)
    return markup.picture(shapes, width=width, height=_TOP + lines * (_PANEL + _GAP))


def _path(
    corners: Sequence[tuple[float, float]], colour: str, width: int
) -> markup.Markup:
    line = "M " + " L ".join(f"{x},{y}" for x, y in corners)
    return markup.el("path", d=line, stroke=colour, stroke_width=width, fill="none")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nad_jax.report.matched_accuracy",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reports", nargs="+")
    parser.add_argument("--reference", choices=settings.REPAIRS, default="fine_tuning")
    parser.add_argument("--within", type=float, default=0.02)
    parser.add_argument("--drawing", type=pathlib.Path)
    arguments = parser.parse_args(argv)

    def run():
        if not 0 <= arguments.within <= 1:
            raise errors.InputError(
                f"--within must be in [0, 1], got {arguments.within:g}"
            )
        found = points([schema.read_report(path) for path in arguments.reports])
        if arguments.reference not in {point.row for point in found}:
            raise errors.InputError(
                f"--reference must be a repair in the reports, got "
                f"{arguments.reference!r}"
            )
        print(text(found, reference=arguments.reference, within=arguments.within))
        if arguments.drawing is None:
            return
        try:
            whole_file.write_text(arguments.drawing, draw(found))
        except OSError as error:
            raise errors.InputError(
                f"--drawing must be a file that can be written, got "
                f"{str(arguments.drawing)!r}: {error.strerror}"
            ) from None

    return errors.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
