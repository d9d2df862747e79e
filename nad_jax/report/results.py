# SPDX-License-Identifier: Apache-2.0
"""The table of results and the same numbers as bars: accuracy and attack success."""

from collections.abc import Iterable, Sequence
from typing import Any

from nad_jax.report import drawings, markup, schema, tables

# ----------------------------------------------------------------------------- table

_COLUMNS = (
    ("ACC", "acc", "accuracy on clean images, per cent"),
    ("ASR", "asr", "attack success rate, per cent"),
    ("RA", "ra", "robust accuracy, per cent"),
    ("Flip rate", "flip_rate", "weights not rounded to nearest, per cent"),
)
_MODEL_TITLES = {
    "backdoored": "Backdoored model",
    "given": "The model that was handed over",
    "clean": "Clean model: the same defence where there is nothing to defend",
}


def table(groups: Sequence[schema.Aggregate], decimals: int) -> list[markup.Child]:
    """All rows, by model, with deviation and images counted under each share."""
    # The roles repeat what the elements say: on a narrow screen the style sheet turns
    # rows into blocks, and browsers then forget that this is a table.
    heads = [markup.el("th", "Network", scope="col", role="columnheader")]
    heads.append(
        markup.el("th", "Bits", scope="col", role="columnheader", class_="bits")
    )
    for label, _, meaning in _COLUMNS:
        unit = markup.el("span", " %", class_="unit")
        head = markup.el("abbr", label, title=meaning)
        heads.append(
            markup.el("th", head, unit, scope="col", role="columnheader", class_="num")
        )
    unit = markup.el("span", " s", class_="unit")
    heads.append(
        markup.el("th", "Time", unit, scope="col", role="columnheader", class_="num")
    )
    bodies = []
    for model, members in _by_model(groups):
        title = markup.el(
            "th",
            _MODEL_TITLES[model],
            colspan=len(heads),
            scope="rowgroup",
            role="rowheader",
        )
        lines = [markup.el("tr", title, role="row", class_="group")]
        lines += [_line(group, decimals) for group in members]
        bodies.append(markup.el("tbody", lines, role="rowgroup"))
    seeds = sorted({row.seed for group in groups for row in group.rows})
    if len(seeds) > 1:
        note = (
            f"Mean ± sample standard deviation over {len(seeds)} seeds "
            f"({', '.join(map(str, seeds))}); below it, images counted over all seeds. "
        )
    else:
        note = f"One seed ({seeds[0]}); below each share, images counted. "
    note += "RA and ASR are shares of the same images. Time is that of the defence."
    table = markup.el(
        "table",
        markup.el("thead", markup.el("tr", heads, role="row"), role="rowgroup"),
        bodies,
        role="table",
        class_="results-table",
        aria_label="Results",
    )
    return [table, markup.el("p", note, class_="note")]


def _line(group: schema.Aggregate, decimals: int) -> markup.Markup:
    description = tables.row_description(group.rows[0])
    describe = description and group.model != "clean"
    worst = tables.worst_draw(group.rows)
    if worst is not None:
        description += f", in the worst {tables.percent(worst, decimals)} ASR"
    cells = [
        markup.el(
            "th",
            markup.el("span", tables.row_label(group.name), class_="name"),
            markup.el("span", description, class_="about") if describe else None,
            scope="row",
            role="rowheader",
        ),
        markup.el(
            "td",
            tables.bits_label(group.weight_bits, group.act_bits),
            role="cell",
            data_label="Bits",
            class_="bits",
        ),
    ]
    for label, metric, _ in _COLUMNS:
        value = group.stats[metric]
        under = {"acc": "acc_count", "asr": "asr_count", "ra": "asr_count"}.get(metric)
        cells.append(
            markup.el(
                "td",
                markup.el(
                    "span", tables.hundredfold(value.mean, decimals), class_="value"
                ),
                _spread(value, lambda std: tables.hundredfold(std, decimals)),
                _counted(group, metric, under) if under else None,
                role="cell",
                data_label=label,
                class_=f"num {metric}",
            )
        )
    value = group.stats["seconds"]
    cells.append(
        markup.el(
            "td",
            markup.el("span", tables.duration(value.mean), class_="value"),
            _spread(value, tables.duration),
            role="cell",
            data_label="Time, s",
            class_="num",
        )
    )
    css = "defence" if tables.is_defence(group.name) else None
    return markup.el("tr", cells, role="row", class_=css)


def _spread(value: schema.Stat, text_of: Any) -> markup.Markup | None:
    if value.std is None:
        return None
    return markup.el("span", f" ± {text_of(value.std)}", class_="std")


def _counted(group: schema.Aggregate, metric: str, under: str) -> markup.Markup | None:
    """Images counted, as in 496 of 500, over all seeds.

    The first number is left out where a share is itself a mean (over draws, say).
    """
    pairs = [(getattr(row, metric), getattr(row, under)) for row in group.rows]
    pairs = [(share, count) for share, count in pairs if share is not None]
    if not pairs:
        return None
    hits = [share * count for share, count in pairs]
    total = sum(count for _, count in pairs)
    whole = all(abs(hit - round(hit)) < 0.02 for hit in hits)
    text = f"{sum(map(round, hits)):,} of {total:,}" if whole else f"of {total:,}"
    return markup.el("span", text, class_="count")


# ------------------------------------------------------------------------------ bars


def bars(groups: Sequence[schema.Aggregate], decimals: int) -> list[markup.Child]:
    """ACC and ASR of all rows as two drawings, with a dot for each of several seeds."""
    panels = []
    for metric, title, css in (
        ("acc", "Accuracy on clean images (ACC)", "acc"),
        ("asr", "Attack success on triggered images (ASR)", "asr"),
    ):
        if all(group.mean(metric) is None for group in groups):
            continue
        bars = []
        for model, members in _by_model(groups):
            if model == "clean":
                bars.append(drawings.Bar("Clean model", "", None, heading=True))
            for group in members:
                values = [getattr(row, metric) for row in group.rows]
                known = tuple(value for value in values if value is not None)
                bars.append(
                    drawings.Bar(
                        label=_full_label(group),
                        value=tables.percent(group.mean(metric), decimals),
                        share=group.mean(metric),
                        points=known if len(known) > 1 else (),
                    )
                )
        panels.append(
            markup.el(
                "figure",
                markup.el("figcaption", _swatch(css), title),
                drawings.bar_chart(bars, css=css, title=title, axis=True),
            )
        )
    seeds = max(group.n for group in groups)
    note = "Each dot is one seed." if seeds > 1 else None
    return [
        markup.el("div", panels, class_="panels"),
        markup.el("p", note, class_="note") if note else None,
    ]


def _full_label(group: schema.Aggregate) -> str:
    label = tables.row_label(group.name)
    bits = tables.bits_label(group.weight_bits, group.act_bits)
    return label if bits == label.lower() else f"{label} {bits}"


def _swatch(css: str) -> markup.Markup:
    return markup.el("span", class_=f"swatch {css}", aria_hidden="true")


def _by_model(
    groups: Sequence[schema.Aggregate],
) -> Iterable[tuple[str, list[schema.Aggregate]]]:
    for model in schema.MODELS:
        members = [group for group in groups if group.model == model]
        if members:
            yield model, members
