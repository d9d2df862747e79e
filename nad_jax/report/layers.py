# SPDX-License-Identifier: Apache-2.0
"""Layer by layer: flip rate and objective as dots, and the same as numbers."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax.report import drawings, markup, schema, tables

# Shape and colour both tell series apart. Fixed by name, so that two pages agree.
_MARKS = {
    "efrap": "M0-4.6A4.6 4.6 0 1 0 0 4.6A4.6 4.6 0 1 0 0-4.6Z",
    "reconstruction": "M-4-4H4V4H-4Z",
    "stochastic": "M0-5.2L5 3.8H-5Z",
    "flipped": "M0-5.6L5.6 0L0 5.6L-5.6 0Z",
}
# For any other name; three shapes and four colours make twelve pairs.
_OTHER_MARKS = (
    "M-1.5-5H1.5V-1.5H5V1.5H1.5V5H-1.5V1.5H-5V-1.5H-1.5Z",
    "M0 5.2L5-3.8H-5Z",
    "M-5.5-2H5.5V2H-5.5Z",
)
_OTHER_COLOURS = ("other", "flipped", "stochastic", "reconstruction")

_HARDENING = "hard/soft"


@dataclasses.dataclass(frozen=True)
class _Series:
    """One row's measurements by layer: mean over seeds, None if not measured.

    `hardening` is the output error after hardening relative to before; `converged` is
    in words.
    """

    label: str
    mark: drawings.Mark
    flip_rate: Mapping[str, float | None]
    ratio: Mapping[str, float | None]
    hardening: Mapping[str, float | None]
    converged: Mapping[str, str | None]
    seconds: Mapping[str, float | None]


def content(entries: Sequence[Mapping[str, Any]]) -> list[markup.Child]:
    """Legend, drawings and numbers of the layers in `entries` of a report."""
    # The clean model's layers are only interesting where there is nothing else.
    entries = [
        entry for entry in entries if entry.get("model", "backdoored") != "clean"
    ] or list(entries)
    if not entries:
        return []
    layers = list(dict.fromkeys(entry["layer"] for entry in entries))
    shapes = {entry["layer"]: entry["shape"] for entry in entries}
    series = _series(entries)
    marks = [one.mark for one in series]
    legend = [
        markup.el(
            "li",
            markup.el(
                "svg",
                drawings.dot(one.mark, "50%", 7),
                width=14,
                height=14,
                aria_hidden="true",
            ),
            one.label,
        )
        for one in series
    ]
    panels = [
        drawings.dot_chart(
            layers,
            marks,
            [one.flip_rate for one in series],
            drawings.Axis.linear(),
            title="Flip rate",
            about="share of the layer's weights not rounded to nearest",
        )
    ]
    ratios = [value for one in series for value in one.ratio.values()]
    if any(value is not None for value in ratios):
        panels.append(
            drawings.dot_chart(
                layers,
                marks,
                [one.ratio for one in series],
                drawings.Axis.logarithmic(
                    [value for value in ratios if value is not None]
                ),
                title="Objective relative to nearest",
                about="what the rounding minimises; 1 is nearest, log scale",
            )
        )
    seeds = len({entry["seed"] for entry in entries})
    note = (
        f"Layers in order of execution. Means over {seeds} seeds; geometric for ratios."
        if seeds > 1
        else "Layers in order of execution."
    )
    return [
        markup.el("ul", legend, class_="legend"),
        markup.el("div", panels, class_="panels"),
        markup.el("p", note, class_="note"),
        markup.el(
            "details",
            markup.el("summary", "The same as numbers"),
            _table(layers, shapes, series),
        ),
        *_paths(entries),
    ]


def _series(entries: Sequence[Mapping[str, Any]]) -> list[_Series]:
    keys = list(
        dict.fromkeys(
            (e["row"], e.get("weight_bits"), e.get("act_bits")) for e in entries
        )
    )
    several_bits = len({key[1:] for key in keys}) > 1
    unused, others = dict(_MARKS), 0
    series = []
    for name, weight_bits, act_bits in keys:
        mine: dict[str, list[Mapping[str, Any]]] = {}
        for entry in entries:
            if (entry["row"], entry.get("weight_bits"), entry.get("act_bits")) == (
                name,
                weight_bits,
                act_bits,
            ):
                mine.setdefault(entry["layer"], []).append(entry)
        label = tables.row_label(name)
        if several_bits:
            label += f" {tables.bits_label(weight_bits, act_bits)}"
        if name in unused:
            colour, path = name, unused.pop(name)
        else:
            colour = _OTHER_COLOURS[others % len(_OTHER_COLOURS)]
            path = _OTHER_MARKS[others % len(_OTHER_MARKS)]
            others += 1
        series.append(
            _Series(
                label=label,
                mark=drawings.Mark(path, f"series-{colour}"),
                flip_rate={
                    k: schema.stat(e["flip_rate"] for e in v).mean
                    for k, v in mine.items()
                },
                ratio={k: _mean_ratio(v) for k, v in mine.items()},
                hardening={
                    k: _mean_ratio(v, "hard_output_error", "soft_output_error")
                    for k, v in mine.items()
                },
                converged={k: _converged(v) for k, v in mine.items()},
                seconds={
                    k: schema.stat(e["seconds"] for e in v).mean
                    for k, v in mine.items()
                },
            )
        )
    return series


def _mean_ratio(
    entries: Sequence[Mapping[str, Any]],
    over: str = "objective",
    under: str = "objective_nearest",
) -> float | None:
    """Geometric mean of one key over another; None where it is undefined."""
    ratios = [
        entry[over] / entry[under]
        for entry in entries
        if entry.get(over) is not None and entry.get(under)
    ]
    if not ratios:
        return None
    if min(ratios) == 0:
        return 0.0
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def _converged(entries: Sequence[Mapping[str, Any]]) -> str | None:
    """ "yes", "no", or how many seeds did; None where nothing could converge."""
    known = [e["converged"] for e in entries if e.get("converged") is not None]
    if not known:
        return None
    if len(set(known)) > 1:
        return f"{sum(known)}/{len(known)}"
    return "yes" if known[0] else "no"


def _columns(one: _Series) -> dict[str, dict[str, str]]:
    """Heading -> layer -> cell; the last two only if a layer has them."""

    def cells(values, shown):
        return {k: shown(v) for k, v in values.items() if v is not None}

    columns = {
        "flips %": cells(one.flip_rate, tables.hundredfold),
        "objective": cells(one.ratio, "{:.3g}".format),
        "s": cells(one.seconds, tables.duration),
    }
    if hardening := cells(one.hardening, "{:.3g}".format):
        columns[_HARDENING] = hardening
    if converged := cells(one.converged, str):
        columns["converged"] = converged
    return columns


def _table(
    layers: Sequence[str], shapes: Mapping[str, Any], series: Sequence[_Series]
) -> markup.Markup:
    heads = [
        markup.el("th", name, scope="col", rowspan=2) for name in ("Layer", "Shape")
    ]
    columns = [_columns(one) for one in series]
    heads += [
        markup.el("th", one.label, scope="colgroup", colspan=len(mine))
        for one, mine in zip(series, columns, strict=True)
    ]
    quantities = [
        markup.el("th", heading, scope="col") for mine in columns for heading in mine
    ]
    lines = []
    for layer in layers:
        cells = [
            markup.el("th", layer, scope="row"),
            markup.el("td", "×".join(map(str, shapes[layer])) or "–"),
        ]
        cells += [
            markup.el("td", column.get(layer, "–"))
            for mine in columns
            for column in mine.values()
        ]
        lines.append(markup.el("tr", cells))
    caption = "Objectives are relative to nearest rounding."
    if any(_HARDENING in mine for mine in columns):
        caption += f" {_HARDENING}: output error after hardening, relative to before."
    table = markup.el(
        "table",
        markup.el("caption", caption),
        markup.el("thead", markup.el("tr", heads), markup.el("tr", quantities)),
        markup.el("tbody", lines),
        class_="numbers",
    )
    return markup.scroll(table, "Numbers by layer")


def _paths(entries: Sequence[Mapping[str, Any]]) -> list[markup.Child]:
    """What other flip weights cost, by row and weight; nothing where none was asked."""
    lines = []
    for name in dict.fromkeys(entry["row"] for entry in entries if entry.get("path")):
        mine = [e for e in entries if e["row"] == name and e.get("path")]
        sizes = [math.prod(entry["shape"]) for entry in mine]
        for i, point in enumerate(mine[0]["path"]):
            ratio = _mean_ratio(
                [
                    {
                        "objective": entry["path"][i]["output_error"],
                        "objective_nearest": entry["path"][0]["output_error"],
                    }
                    for entry in mine
                ]
            )
            flips = (
                e["path"][i]["flip_rate"] * n for e, n in zip(mine, sizes, strict=True)
            )
            texts = (
                tables.row_label(name),
                f"{point['flip_weight']:g}",
                tables.hundredfold(math.fsum(flips) / sum(sizes)),
                "–" if ratio is None else f"{ratio:.3g}",
            )
            lines.append(markup.el("tr", [markup.el("td", text) for text in texts]))
    if not lines:
        return []
    heads = ("Row", "flip weight", "flips %", "output error")
    table = markup.el(
        "table",
        markup.el(
            "caption",
            "Output errors are relative to the first weight's, as geometric means over "
            "layers on the inputs of this run; flips are shares of all weights.",
        ),
        markup.el(
            "thead",
            markup.el("tr", [markup.el("th", head, scope="col") for head in heads]),
        ),
        markup.el("tbody", lines),
        class_="numbers",
    )
    return [
        markup.el(
            "details",
            markup.el("summary", "What other flip weights would have cost"),
            markup.scroll(table, "Flip weights"),
        )
    ]
