# SPDX-License-Identifier: Apache-2.0
"""Accuracy and attack success of every repair after every epoch, and as numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax.report import drawings, markup, tables


def content(curves: Sequence[Mapping[str, Any]]) -> list[markup.Child]:
    """A small drawing for each repair and seed, and a table of all of them."""
    if not curves:
        return []
    panels, lines = [], []
    for curve in curves:
        title = f"{tables.row_label(curve['row'])}, {curve['model']} model"
        title += f", seed {curve['seed']}"
        acc, asr = (
            [share for share in curve[key] if share is not None]
            for key in ("acc", "asr")
        )
        epochs = f"epochs 0 to {len(curve['acc']) - 1}"
        panels.append(
            markup.el(
                "figure",
                markup.el(
                    "figcaption", title, markup.el("span", epochs, class_="about")
                ),
                drawings.line_chart(
                    [("acc", acc), ("asr", asr)], title=f"{title}, {epochs}"
                ),
            )
        )
        for label, shares in (("ACC", acc), ("ASR", asr)):
            cells = [
                markup.el("td", tables.hundredfold(s), class_="num") for s in shares
            ]
            head = markup.el("th", f"{title}, {label}", scope="row")
            lines.append(markup.el("tr", head, cells))
    key = markup.el(
        "p",
        [
            markup.el("span", class_="swatch acc", aria_hidden="true"),
            "ACC ",
            markup.el("span", class_="swatch asr", aria_hidden="true"),
            "ASR, per cent of test images. For display: no repair sees these numbers, "
            "and none is chosen by them. Epoch 0 is the model before the repair.",
        ],
        class_="note",
    )
    table = markup.el("table", markup.el("tbody", lines), class_="numbers")
    return [
        markup.el("div", panels, class_="panels"),
        key,
        markup.el(
            "details",
            markup.el("summary", "The numbers, epoch by epoch"),
            markup.scroll(table, "Accuracy and attack success by epoch"),
        ),
    ]
