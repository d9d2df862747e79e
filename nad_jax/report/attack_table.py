# SPDX-License-Identifier: Apache-2.0
"""One line for each experiment, one column for each rounding: the table over attacks.

    python -m nad_jax.report.attack_table results/efrap/digits_*_w4.json
    python -m nad_jax.report.attack_table results/nad/digits_*.json

A cell is "ACC / ASR" of the backdoored model in per cent, means over seeds, and the
worst ASR of any seed in parentheses where there are several; a dash where a report has
no such row. Reports of other seeds of one experiment (`tables.experiment_key`) share a
line.

Of roundings, "accepted" counts the seeds whose attack was what it claims to be
(`nad_jax.acceptance`), of those that were judged, and the last column is the clean
model in float. Below repairs of several attacks, one line each, stand the means over
the attacks, with the worst mean ASR of any attack, and the mean DER
(`nad_jax.core.metrics`).
"""

import argparse
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax import errors, settings
from nad_jax.report import schema, tables

# What tells the kinds of reports apart -> its heading, its usual columns, and whether
# there is one for accepted attacks, and one for the clean model.
_KINDS: dict[str, tuple[str, tuple[str, ...], bool]] = {
    "weight_bits": (
        "bits",
        ("float", "nearest", "stochastic", "gptq", "reconstruction", "efrap"),
        True,
    ),
    "poison_rate": (
        "poisoned",
        ("float", *settings.REPAIRS),
        False,
    ),
}


def attack_table(
    reports: Sequence[Mapping[str, Any]], *, rows: Sequence[str] | None = None
) -> str:
    """A Markdown table.

    Args:
      reports: All of `configs/efrap.py` or all of `configs/nad.py`, as
        `schema.read_report` returns them.
      rows: Names of the columns' rows, in order; None = the usual ones, as far as any
        report has them.

    Raises:
      InputError: a report of another job than the first; two of one experiment that
        hold the same seed; a report that names no net, or has a row without ASR.
    """
    fact = next((fact for fact in _KINDS if reports and fact in reports[0]), None)
    for report in reports:
        if fact is None or "attack" not in report or fact not in report:
            raise errors.InputError(
                f"report {report.get('title')!r} names no attack and "
                f"{fact or ' or '.join(_KINDS)}; accepted are reports of "
                "configs/efrap.py alone, or of configs/nad.py alone"
            )
    if fact is None:
        raise errors.InputError("reports must be at least one, got none")
    reports = _joined(reports)
    heading, usual, rounds = _KINDS[fact]
    if rows is None:
        there = {row["name"] for report in reports for row in report["rows"]}
        rows = [name for name in usual if name in there]
    titles = [tables.row_label(name) for name in rows]
    if rounds:
        titles = ["accepted", *titles, "clean model, float"]
    lines = [
        f"| attack | net | {heading} | seeds | {' | '.join(titles)} |",
        "|---|---|---|---:|" + "---:|" * len(titles),
    ]
    for report in reports:
        cells = [_cell(report, "backdoored", name) for name in rows]
        if rounds:
            cells = [_accepted(report), *cells, _cell(report, "clean", "float")]
        value = report[fact]
        shown = f"W{value}" if fact == "weight_bits" else f"{100 * value:g} %"
        net = _net(report)
        seeds = len({r["seed"] for r in report["rows"] if r["model"] == "backdoored"})
        facts = [report["attack"], net, shown, str(seeds)]
        lines.append(f"| {' | '.join([*facts, *cells])} |")
    if not rounds and len({r["attack"] for r in reports}) == len(reports) > 1:
        lines += _means(reports, rows)
    return "\n".join(lines)


def _net(report: Mapping[str, Any]) -> str:
    try:
        return report["config"]["model"]["name"]
    except (KeyError, TypeError):
        raise errors.InputError(
            f"report {report.get('title')!r} has no config.model.name"
        ) from None


def _joined(reports: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Reports, those that differ in their seeds alone as one with all of their rows."""
    joined: dict[str, dict[str, Any]] = {}
    for report in reports:
        key = tables.experiment_key(report)
        if key not in joined:
            judged = report.get("acceptance", ())
            joined[key] = {**report, "acceptance": list(judged)}
            continue
        known = joined[key]["rows"]
        again = {row["seed"] for row in known} & {row["seed"] for row in report["rows"]}
        if again:
            raise errors.InputError(
                f"reports of one experiment must hold different seeds, got seed "
                f"{min(again)} of {report['attack']} twice"
            )
        joined[key]["rows"] = [*known, *report["rows"]]
        joined[key]["acceptance"] += report.get("acceptance", ())
    return list(joined.values())


def _means(reports: Sequence[Mapping[str, Any]], rows: Sequence[str]) -> list[str]:
    """The two lines below the attacks; a dash where a report lacks the row."""
    rates, effects = [], []
    for name in rows:
        of_attacks = [_found(report, "backdoored", name) for report in reports]
        if not all(of_attacks):
            rates.append("–")
            effects.append("–")
            continue
        acc, asr, der = (
            [statistics.fmean(value(row) for row in found) for found in of_attacks]
            for value in (
                lambda row: row["acc"],
                _asr,
                lambda row: row.get("extra", {}).get("der", math.nan),
            )
        )
        rates.append(rates_cell(acc, asr))
        effect = statistics.fmean(der)
        effects.append("–" if math.isnan(effect) else f"{100 * effect:.1f}")
    return [
        f"| mean (worst attack) | | | | {' | '.join(rates)} |",
        f"| mean DER | | | | {' | '.join(effects)} |",
    ]


def _found(report: Mapping[str, Any], model: str, name: str) -> list[Any]:
    return [r for r in report["rows"] if r["model"] == model and r["name"] == name]


def _asr(row: Mapping[str, Any]) -> float:
    if row["asr"] is None:
        raise errors.InputError(
            f"row {row['name']!r} of seed {row['seed']} has no ASR: no trigger was "
            "known; accepted are reports of attacks"
        )
    return row["asr"]


def rates_cell(acc: Sequence[float], asr: Sequence[float]) -> str:
    """Means, and the worst ASR of several."""
    cell = f"{100 * statistics.fmean(acc):.1f} / {100 * statistics.fmean(asr):.1f}"
    return cell if len(asr) == 1 else f"{cell} ({100 * max(asr):.1f})"


def _accepted(report: Mapping[str, Any]) -> str:
    """Seeds with an accepted attack of those judged; a dash where none was."""
    judged = report["acceptance"]
    good = sum(entry["accepted"] for entry in judged)
    return f"{good}/{len(judged)}" if judged else "–"


def _cell(report: Mapping[str, Any], model: str, name: str) -> str:
    found = _found(report, model, name)
    if not found:
        return "–"
    return rates_cell([row["acc"] for row in found], [_asr(row) for row in found])


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nad_jax.report.attack_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reports", nargs="+")
    parser.add_argument("--rows", help="columns, joined by commas")
    arguments = parser.parse_args(argv)

    def run():
        reports = [schema.read_report(path) for path in arguments.reports]
        rows = arguments.rows.split(",") if arguments.rows else None
        print(attack_table(reports, rows=rows))

    return errors.exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
