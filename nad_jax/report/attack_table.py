# SPDX-License-Identifier: Apache-2.0
"""One line for each report, one column for each rounding: the table over attacks.

    python -m nad_jax.report.attack_table results/efrap/digits_*_w4.json

A cell is "ACC / ASR" of the backdoored model in per cent, means over seeds, and the
worst ASR of any seed in parentheses where there are several; a dash where a report has
no such row. The last column is the clean model in float.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax import errors
from nad_jax.report import schema, tables

ROWS = ("float", "nearest", "stochastic", "gptq", "reconstruction", "efrap")


def attack_table(
    reports: Sequence[Mapping[str, Any]], *, rows: Sequence[str] = ROWS
) -> str:
    """A Markdown table.

    Args:
      reports: Of `configs/efrap.py`, as `schema.read_report` returns them.
      rows: Names of the columns' rows, in order.

    Raises:
      InputError: a report of another job.
    """
    labels = ", ".join(tables.row_label(name) for name in rows)
    lines = [
        f"| attack | bits | {labels.replace(', ', ' | ')} | clean model, float |",
        "|---|---|" + "---:|" * (len(rows) + 1),
    ]
    for report in reports:
        if "attack" not in report or "weight_bits" not in report:
            raise errors.InputError(
                f"report {report.get('title')!r} names no attack and weight_bits; "
                "accepted are those of configs/efrap.py"
            )
        cells = [_cell(report, "backdoored", name) for name in rows]
        cells.append(_cell(report, "clean", "float"))
        bits = f"W{report['weight_bits']}"
        lines.append(f"| {report['attack']} | {bits} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(report: Mapping[str, Any], model: str, name: str) -> str:
    found = [r for r in report["rows"] if r["model"] == model and r["name"] == name]
    if not found:
        return "–"
    acc, asr = ([row[rate] for row in found] for rate in ("acc", "asr"))
    cell = f"{100 * statistics.fmean(acc):.1f} / {100 * statistics.fmean(asr):.1f}"
    return cell if len(found) == 1 else f"{cell} ({100 * max(asr):.1f})"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nad_jax.report.attack_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reports", nargs="+")
    parser.add_argument("--rows", default=",".join(ROWS))
    arguments = parser.parse_args(argv)
    try:
        reports = [schema.read_report(path) for path in arguments.reports]
        print(attack_table(reports, rows=arguments.rows.split(",")))
    except errors.InputError as error:
        print(f"nad_jax: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
