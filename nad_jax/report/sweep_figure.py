# SPDX-License-Identifier: Apache-2.0
"""One drawing of many cells: NAD minus fine-tuning, with its spread.

A picture by itself, for a README: an SVG with a size, black on white.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax.report import markup

_LEFT, _PANEL, _GAP, _RIGHT = 230, 260, 40, 20
_ROW, _TOP = 18, 56
_PANELS = (
    ("asr", "Attack success (left is better)"),
    ("acc", "Accuracy (right is better)"),
)


def draw(cells: Sequence[Mapping[str, Any]]) -> str:
    """The drawing as text.

    Args:
      cells: As `nad_jax.nad_sweep.cell` makes them; drawn in their order.
    """
    height = _TOP + _ROW * len(cells) + 30
    width = _LEFT + 2 * _PANEL + _GAP + _RIGHT
    shapes = [
        markup.label(8, 20, "NAD minus fine-tuning, points of per cent", weight="bold"),
        markup.label(8, 40, "attack, poisoned, clean images"),
    ]
    for i, (rate, title) in enumerate(_PANELS):
        left = _LEFT + i * (_PANEL + _GAP)
        shapes += _panel(cells, rate, title, left)
    for row, one in enumerate(cells):
        label = (
            f"{one['attack']}, {100 * one['poison_rate']:g} %, "
            f"{100 * one['clean_fraction']:g} %"
        )
        shapes.append(markup.label(8, _TOP + _ROW * (row + 0.5) + 4, label))
    return markup.picture(shapes, width=width, height=height)


def _panel(
    cells: Sequence[Mapping[str, Any]], rate: str, title: str, left: float
) -> list[markup.Child]:
    ends = [
        abs(one["difference"][rate]["mean"]) + one["difference"][rate]["std"]
        for one in cells
    ]
    # Whole multiples of 5 points on both sides of 0.
    reach = max(0.05, -(-max(ends, default=0.0) // 0.05) * 0.05)

    def across(value):
        return round(left + _PANEL * (value + reach) / (2 * reach), 2)

    bottom = _TOP + _ROW * len(cells)
    shapes: list[markup.Child] = [markup.label(left, 40, title)]
    for tick in (-reach, 0.0, reach):
        x = across(tick)
        shade = "black" if tick == 0 else "#bbb"
        shapes.append(_line(x, _TOP, x, bottom, shade))
        shapes.append(
            markup.label(x, bottom + 16, f"{100 * tick:+.0f}", anchor="middle")
        )
    for row, one in enumerate(cells):
        value = one["difference"][rate]
        y = _TOP + _ROW * (row + 0.5)
        low, high = value["mean"] - value["std"], value["mean"] + value["std"]
        better = value["mean"] < 0 if rate == "asr" else value["mean"] > 0
        colour = "#0072b2" if better else "#c14600"
        shapes.append(_line(across(low), y, across(high), y, colour))
        dot = markup.el("circle", cx=across(value["mean"]), cy=y, r=4, fill=colour)
        shapes.append(dot)
    return shapes


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> markup.Markup:
    return markup.el("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour)
