# SPDX-License-Identifier: Apache-2.0
"""One self-contained page that shows a report: table, bars, layers, pictures.

The page loads nothing: pictures are data URIs, drawings are inline SVG, there is no
script, and a content policy in its head forbids all of that even to a name that should
slip through the escaping. It follows the reader's light or dark mode, prints, and works
from 320 px up; every drawing has its numbers as text somewhere on the page.

How it is made
- Markup is built by `_el`, which escapes each child that is not itself markup. Text is
  therefore safe by default; there is no other way into the page.
- Drawings have no `viewBox`: across they are measured in per cent of the column, down
  in pixels. They stretch with the page while their text keeps its size.
"""

import base64
import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from nad_jax.errors import InputError
from nad_jax.report import schema, tables

# Colours of the attention maps, from 0 to 1. Lightness grows evenly in OKLab (0.20 to
# 0.97), so equal steps of a map look equal, also in grey and to colour-blind readers.
ATTENTION_ANCHORS = (
    (22, 1, 70),
    (60, 4, 106),
    (110, 7, 126),
    (162, 28, 123),
    (209, 57, 106),
    (248, 95, 77),
    (253, 155, 85),
    (254, 205, 123),
    (255, 250, 170),
)

_MAX_SAMPLES = 12
_MAX_LABEL = 34  # characters of a name inside a drawing, where text cannot wrap


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """The pictures of a page; each may be absent.

    Attributes:
      trigger: The trigger on a plain background, uint8 `[H, W, C]`.
      clean_samples: Test images, uint8 `[N, H, W, C]`.
      triggered_samples: The same images with the trigger, uint8 `[N, H, W, C]`.
      sample_captions: One line under each pair (say, what each network makes of it);
        empty, or `N` of them.
      attention: One entry per network: its name, the image it saw, uint8
        `[H, W, C]`, and its attention maps by stage, float `[h, w]` in [0, 1].

    Raises:
      InputError: For another dtype or shape, or a map with values outside [0, 1].
    """

    trigger: np.ndarray | None = None
    clean_samples: np.ndarray | None = None
    triggered_samples: np.ndarray | None = None
    sample_captions: tuple[str, ...] = ()
    attention: tuple[tuple[str, np.ndarray, Mapping[str, np.ndarray]], ...] = ()

    def __post_init__(self) -> None:
        if self.trigger is not None:
            _check_image(self.trigger, "trigger")
        if (self.clean_samples is None) != (self.triggered_samples is None):
            raise InputError("clean_samples and triggered_samples come together")
        if self.clean_samples is not None and self.triggered_samples is not None:
            shapes = (self.clean_samples.shape, self.triggered_samples.shape)
            if shapes[0] != shapes[1] or len(shapes[0]) != 4:
                raise InputError(
                    f"clean_samples {shapes[0]} and triggered_samples {shapes[1]}; "
                    "both are [N, H, W, C] of one shape"
                )
            if self.sample_captions and len(self.sample_captions) != shapes[0][0]:
                raise InputError(
                    f"{len(self.sample_captions)} sample_captions for {shapes[0][0]} "
                    "samples; give one each or none"
                )
            for pair in zip(self.clean_samples, self.triggered_samples, strict=True):
                _check_image(pair[0], "clean_samples")
                _check_image(pair[1], "triggered_samples")
        for caption, image, maps in self.attention:
            _check_image(image, f"attention image of {caption!r}")
            for stage, values in maps.items():
                array = np.asarray(values)
                # False for NaN as well.
                good = array.ndim == 2 and array.size and np.all(array >= 0)
                if not (good and np.all(array <= 1 + 1e-6)):
                    raise InputError(
                        f"attention map {stage!r} of {caption!r} has shape "
                        f"{array.shape}; a map is [h, w] with values in [0, 1]"
                    )


def _check_image(image: np.ndarray, where: str) -> None:
    good = image.ndim == 3 and image.size and image.shape[-1] in (1, 3)
    if image.dtype != np.uint8 or not good:
        raise InputError(
            f"{where} is {image.dtype} {image.shape}; an image is uint8 [H, W, C] with "
            "C of 1 or 3"
        )


def render(report: Mapping[str, Any], figures: Figures | None = None) -> str:
    """The whole page as one string of HTML.

    Args:
      report: A report as `schema.validate` accepts it.
      figures: Its pictures; sections without pictures are left out.

    Returns:
      The page, from doctype to end. Write it with `schema.write_text`.

    Raises:
      InputError: If the report is not one.
    """
    schema.validate(report)
    report = schema.plain(report, "report")
    figures = figures or Figures()
    groups = schema.aggregate(report["rows"])
    decimals = tables.decimals_for(row for group in groups for row in group.rows)
    title = report.get("title") or "Report"
    sections = [
        _section("Results", _results(groups, decimals)),
        _section("Accuracy and attack success", _bars(groups, decimals)),
        _section("The trigger", _samples(figures)),
        _section("Where the networks look", _attention(figures)),
        _section("Layer by layer", _layers(report.get("layers", []))),
        _section("Time", _time(report["seconds"])),
        _section("What the numbers mean", _definitions(groups)),
        _section("How to repeat it", _reproduction(report)),
    ]
    head = _el(
        "head",
        _el("meta", charset="utf-8"),
        _el(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'",
        ),
        _el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        _el("meta", name="color-scheme", content="light dark"),
        _el("title", f"{title} – nad_jax"),
        _el("style", _Markup(_STYLE)),
    )
    body = _el(
        "body", _masthead(report, groups, decimals, title), _el("main", sections)
    )
    return "<!doctype html>\n" + _el("html", head, "\n", body, lang="en") + "\n"


# ---------------------------------------------------------------------------- markup


class _Markup(str):
    """Text that is already HTML and passes through `_el` as it is."""


_Child = str | None | Iterable["_Child"]

# Elements without content; written as <tag />, which both HTML and XML accept.
_EMPTY = frozenset({"meta", "img", "br", "rect", "line", "circle", "path", "stop"})


def _el(tag: str, /, *children: _Child, **attributes: object) -> _Markup:
    """One element; children that are not markup are escaped.

    In attribute names a trailing underscore is dropped and the others become hyphens;
    an attribute of None is left out.
    """
    parts = [f"<{tag}"]
    for name, value in attributes.items():
        if value is not None:
            name = name.rstrip("_").replace("_", "-")
            parts.append(f' {name}="{_escape(str(value))}"')
    if tag in _EMPTY:
        return _Markup("".join(parts) + " />")
    parts.append(">")
    parts.extend(_flatten(children))
    parts.append(f"</{tag}>")
    return _Markup("".join(parts))


def _flatten(children: Iterable[_Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, _Markup):
            yield child
        elif isinstance(child, str):
            yield _escape(child)
        elif child is not None:
            yield from _flatten(child)


# What a page must not contain even as text: control characters and half characters,
# which no parser accepts, and invisible ones, with which one name could rearrange the
# line it stands in.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\ud800-\udfff\ufeff\ufff9-\ufffb\ufffe\uffff]"
)


def _escape(text: str) -> str:
    return html.escape(_UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text), quote=True)


def _short(text: str) -> str:
    """The text, or its two ends if it is too long for a drawing."""
    if len(text) <= _MAX_LABEL:
        return text
    half = (_MAX_LABEL - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


def _section(title: str, content: Sequence[_Child]) -> _Markup | None:
    if not content:
        return None
    name = title.lower().replace(" ", "-")
    return _el(
        "section", _el("h2", title, id=name), content, aria_labelledby=name, class_=name
    )


def _swatch(css: str) -> _Markup:
    return _el("span", class_=f"swatch {css}", aria_hidden="true")


# -------------------------------------------------------------------------- masthead


def _masthead(
    report: Mapping[str, Any],
    groups: Sequence[schema.Aggregate],
    decimals: int,
    title: str,
) -> _Markup:
    total = sum(report["seconds"].values())
    facts = [f"{total:,.0f} s in all"] if report["seconds"] else []
    if report["devices"]:
        facts.append(_devices(report["devices"]))
    if report["git_commit"]:
        commit, _, dirty = report["git_commit"].partition("-")
        changed = " with local changes" if dirty else ""
        facts.append(f"commit {commit[:12]}{changed}")
    comparison = tables.comparison(report["rows"])
    return _el(
        "header",
        _el("p", "nad_jax", _el("span", " report"), class_="brand"),
        _el("h1", title),
        _el("p", tables.headline(report["rows"]), class_="lead"),
        _el("p", comparison, class_="comparison") if comparison else None,
        _tiles(groups, decimals),
        _claims(report.get("claims", [])),
        _el("p", " · ".join(facts), class_="facts") if facts else None,
    )


def _devices(devices: Sequence[str]) -> str:
    """Each kind of device once, with how many there are."""
    names = list(dict.fromkeys(devices))
    return ", ".join(
        name if devices.count(name) == 1 else f"{devices.count(name)} × {name}"
        for name in names
    )


def _tiles(groups: Sequence[schema.Aggregate], decimals: int) -> _Markup | None:
    """Float, deployed, defended: the attack success rate as three large numbers."""
    tiles = []
    for group in tables.pick_story(groups):
        asr = None if group is None else group.mean("asr")
        if group is None or asr is None:
            continue
        state = tables.describe_state(asr)
        bits = tables.bits_label(group.weight_bits, group.act_bits)
        label = tables.row_label(group.name)
        label += "" if group.weight_bits is None else f" {bits}"
        tiles.append(
            _el(
                "li",
                _el("span", label, class_="tile-label"),
                _el("span", state, class_="tile-state"),
                _el("span", tables.percent(asr, decimals), class_="tile-number"),
                _el("span", "attack success", class_="tile-unit"),
                _el(
                    "span",
                    f"accuracy {tables.percent(group.mean('acc'), decimals)}",
                    class_="tile-acc",
                ),
                class_=f"tile {state.replace(' ', '-')}",
            )
        )
    if not tiles:
        return None
    return _el("ol", tiles, class_="tiles", aria_label="From float to defended")


def _claims(claims: Sequence[Mapping[str, Any]]) -> _Markup | None:
    items = [
        _el(
            "li",
            _el("span", "✓" if claim["passed"] else "✗", aria_hidden="true"),
            _el("strong", "Holds: " if claim["passed"] else "Does not hold: "),
            claim["text"],
            class_="holds" if claim["passed"] else "fails",
        )
        for claim in claims
    ]
    return _el("ul", items, class_="claims", aria_label="Claims") if items else None


# --------------------------------------------------------------------------- results

_COLUMNS = (
    ("ACC", "acc", "accuracy on clean images, per cent"),
    ("ASR", "asr", "attack success rate, per cent"),
    ("RA", "ra", "robust accuracy, per cent"),
    ("Flip rate", "flip_rate", "weights not rounded to nearest, per cent"),
)
_MODEL_TITLES = {
    "backdoored": "Backdoored model",
    "clean": "Clean model: the same defence where there is nothing to defend",
}


def _results(groups: Sequence[schema.Aggregate], decimals: int) -> list[_Child]:
    # The roles repeat what the elements say: on a narrow screen the style sheet turns
    # rows into blocks, and browsers then forget that this is a table.
    heads = [_el("th", "Network", scope="col", role="columnheader")]
    heads.append(_el("th", "Bits", scope="col", role="columnheader", class_="bits"))
    for label, _, meaning in _COLUMNS:
        unit = _el("span", " %", class_="unit")
        head = _el("abbr", label, title=meaning)
        heads.append(
            _el("th", head, unit, scope="col", role="columnheader", class_="num")
        )
    unit = _el("span", " s", class_="unit")
    heads.append(
        _el("th", "Time", unit, scope="col", role="columnheader", class_="num")
    )
    bodies = []
    for model, members in _by_model(groups):
        title = _el(
            "th",
            _MODEL_TITLES[model],
            colspan=len(heads),
            scope="rowgroup",
            role="rowheader",
        )
        lines = [_el("tr", title, role="row", class_="group")]
        lines += [_result_line(group, decimals) for group in members]
        bodies.append(_el("tbody", lines, role="rowgroup"))
    seeds = sorted({row.seed for group in groups for row in group.rows})
    if len(seeds) > 1:
        note = (
            f"Mean ± sample standard deviation over {len(seeds)} seeds "
            f"({', '.join(map(str, seeds))}); below it, images counted over all seeds. "
        )
    else:
        note = f"One seed ({seeds[0]}); below each share, images counted. "
    note += "RA and ASR are shares of the same images. Time is that of the defence."
    table = _el(
        "table",
        _el("thead", _el("tr", heads, role="row"), role="rowgroup"),
        bodies,
        role="table",
        class_="results-table",
        aria_label="Results",
    )
    return [table, _el("p", note, class_="note")]


def _by_model(
    groups: Sequence[schema.Aggregate],
) -> Iterable[tuple[str, list[schema.Aggregate]]]:
    for model in schema.MODELS:
        members = [group for group in groups if group.model == model]
        if members:
            yield model, members


def _result_line(group: schema.Aggregate, decimals: int) -> _Markup:
    description = tables.row_description(group.rows[0])
    describe = description and group.model == "backdoored"
    cells = [
        _el(
            "th",
            _el("span", tables.row_label(group.name), class_="name"),
            _el("span", description, class_="about") if describe else None,
            scope="row",
            role="rowheader",
        ),
        _el(
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
            _el(
                "td",
                _el("span", tables.hundredfold(value.mean, decimals), class_="value"),
                _spread(value, lambda std: tables.hundredfold(std, decimals)),
                _counted(group, metric, under) if under else None,
                role="cell",
                data_label=label,
                class_=f"num {metric}",
            )
        )
    value = group.stats["seconds"]
    cells.append(
        _el(
            "td",
            _el("span", tables.duration(value.mean), class_="value"),
            _spread(value, tables.duration),
            role="cell",
            data_label="Time, s",
            class_="num",
        )
    )
    css = "defence" if tables.is_defence(group.name) else None
    return _el("tr", cells, role="row", class_=css)


def _spread(value: schema.Stat, text_of: Any) -> _Markup | None:
    if value.std is None:
        return None
    return _el("span", f" ± {text_of(value.std)}", class_="std")


def _counted(group: schema.Aggregate, metric: str, under: str) -> _Markup | None:
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
    return _el("span", text, class_="count")


# ------------------------------------------------------------------------------ bars


@dataclasses.dataclass(frozen=True)
class _Bar:
    """One line of a bar drawing; `share` of the full width, None if unmeasured."""

    label: str
    value: str
    share: float | None
    points: tuple[float, ...] = ()
    heading: bool = False


def _bars(groups: Sequence[schema.Aggregate], decimals: int) -> list[_Child]:
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
                bars.append(_Bar("Clean model", "", None, heading=True))
            for group in members:
                values = [getattr(row, metric) for row in group.rows]
                known = tuple(value for value in values if value is not None)
                bars.append(
                    _Bar(
                        label=_full_label(group),
                        value=tables.percent(group.mean(metric), decimals),
                        share=group.mean(metric),
                        points=known if len(known) > 1 else (),
                    )
                )
        panels.append(
            _el(
                "figure",
                _el("figcaption", _swatch(css), title),
                _bar_drawing(bars, css=css, title=title, axis=True),
            )
        )
    seeds = max(group.n for group in groups)
    note = "Each dot is one seed." if seeds > 1 else None
    return [
        _el("div", panels, class_="panels"),
        _el("p", note, class_="note") if note else None,
    ]


def _full_label(group: schema.Aggregate) -> str:
    label = tables.row_label(group.name)
    bits = tables.bits_label(group.weight_bits, group.act_bits)
    return label if bits == label.lower() else f"{label} {bits}"


def _bar_drawing(
    bars: Sequence[_Bar], *, css: str, title: str, axis: bool = False
) -> _Markup:
    """Bars below their labels, so that no label competes with a bar for width."""
    step, thickness = 42, 12
    y = 0
    shapes: list[_Markup] = []
    for bar in bars:
        if bar.heading:
            shapes.append(_el("text", bar.label, x=0, y=y + 20, class_="heading"))
            y += 30
            continue
        top = y + 21
        shapes.append(_el("text", _short(bar.label), x=0, y=y + 14))
        shapes.append(
            _el(
                "text", bar.value, x="100%", y=y + 14, class_="value", text_anchor="end"
            )
        )
        shapes.append(
            _el("rect", x=0, y=top, width="100%", height=thickness, class_="track")
        )
        if bar.share:
            shapes.append(
                _el(
                    "rect",
                    x=0,
                    y=top,
                    width=_across(bar.share),
                    height=thickness,
                    class_=f"bar {css}",
                )
            )
        for point in bar.points:
            middle = top + thickness / 2
            shapes.append(
                _el("circle", cx=_across(point), cy=middle, r=3, class_="seed")
            )
        y += step
    if axis:
        for tick, anchor in ((0, "start"), (50, "middle"), (100, "end")):
            label = f"{tick}\N{NARROW NO-BREAK SPACE}%"
            shapes.append(
                _el(
                    "text",
                    label,
                    x=f"{tick}%",
                    y=y + 8,
                    class_="tick",
                    text_anchor=anchor,
                )
            )
        y += 14
    spoken = "; ".join(f"{bar.label} {bar.value}" for bar in bars if not bar.heading)
    return _svg(shapes, height=y, label=f"{title}: {spoken}")


def _svg(shapes: Sequence[_Child], *, height: float, label: str | None) -> _Markup:
    if label is None:
        return _el("svg", shapes, width="100%", height=height, aria_hidden="true")
    return _el("svg", shapes, width="100%", height=height, role="img", aria_label=label)


def _across(share: float) -> str:
    return f"{100 * share:.3f}%"


# -------------------------------------------------------------------------- pictures


def _png(image: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _picture(image: np.ndarray, *, size: int, alt: str) -> _Markup:
    """Image enlarged by a whole factor with visible pixels, or as it is if large."""
    height, width = image.shape[:2]
    factor = max(1, size // max(height, width))
    shrink = min(1.0, size / max(height, width))
    return _el(
        "img",
        src=_png(np.ascontiguousarray(image)),
        width=round(width * factor * shrink),
        height=round(height * factor * shrink),
        alt=alt,
        class_="pixels" if shrink == 1 else None,
    )


def _samples(figures: Figures) -> list[_Child]:
    content: list[_Child] = []
    if figures.trigger is not None:
        height, width = figures.trigger.shape[:2]
        alt = f"The trigger, {width} by {height} pixels"
        content.append(
            _el(
                "figure",
                _picture(figures.trigger, size=160, alt=alt),
                _el("figcaption", "The trigger alone"),
                class_="trigger",
            )
        )
    if figures.clean_samples is not None and figures.triggered_samples is not None:
        pairs = []
        count = min(len(figures.clean_samples), _MAX_SAMPLES)
        for i in range(count):
            caption = figures.sample_captions[i] if figures.sample_captions else None
            clean, triggered = figures.clean_samples[i], figures.triggered_samples[i]
            pairs.append(
                _el(
                    "li",
                    _picture(clean, size=80, alt=f"Test image {i + 1}"),
                    _picture(triggered, size=80, alt=f"Test image {i + 1}, triggered"),
                    _el("span", caption) if caption else None,
                )
            )
        if pairs:
            content.append(
                _el(
                    "figure",
                    _el("ul", pairs, class_="pairs"),
                    _el(
                        "figcaption",
                        "Test images as they are (above) and with the trigger (below)",
                    ),
                )
            )
    return [_el("div", content, class_="pictures")] if content else []


def _coloured(values: np.ndarray) -> np.ndarray:
    """Map in [0, 1], `[h, w]`, as uint8 colours `[h, w, 3]`."""
    anchors = np.asarray(ATTENTION_ANCHORS, dtype=np.float64)
    positions = np.linspace(0.0, 1.0, len(anchors))
    channels = [np.interp(values, positions, anchors[:, c]) for c in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def _attention(figures: Figures) -> list[_Child]:
    if not figures.attention:
        return []
    stages = list(dict.fromkeys(s for _, _, maps in figures.attention for s in maps))
    heads = [_el("th", "Network", scope="col"), _el("th", "Input", scope="col")]
    for stage in stages:
        sizes = {
            "×".join(map(str, np.shape(maps[stage])))
            for _, _, maps in figures.attention
            if stage in maps
        }
        size = _el("span", ", ".join(sorted(sizes)), class_="about")
        heads.append(_el("th", stage, size, scope="col"))
    lines = []
    for caption, image, maps in figures.attention:
        cells = [
            _el("th", caption, scope="row"),
            _el("td", _picture(image, size=96, alt="The triggered input")),
        ]
        for stage in stages:
            if stage not in maps:
                cells.append(_el("td", "–"))
                continue
            values = np.clip(np.asarray(maps[stage], dtype=np.float64), 0.0, 1.0)
            row, column = np.unravel_index(np.argmax(values), values.shape)
            alt = (
                f"Attention of {caption} at {stage}, {values.shape[0]} by "
                f"{values.shape[1]}, strongest at row {row + 1}, column {column + 1}"
            )
            cells.append(_el("td", _picture(_coloured(values), size=96, alt=alt)))
        lines.append(_el("tr", cells))
    table = _el(
        "table", _el("thead", _el("tr", heads)), _el("tbody", lines), class_="maps"
    )
    note = (
        "Attention maps of one triggered image: how strong the features of a stage are "
        "at each place, scaled to [0, 1]. A network whose backdoor is awake tends to "
        "look at the trigger, one whose backdoor sleeps at the object."
    )
    return [
        _scroll(table, "Attention maps"),
        _el("div", "0 ", _colour_bar(), " 1", class_="legend colours"),
        _el("p", note, class_="note"),
    ]


def _colour_bar() -> _Markup:
    last = len(ATTENTION_ANCHORS) - 1
    stops = [
        _el("stop", offset=_across(i / last), stop_color=f"rgb{colour}")
        for i, colour in enumerate(ATTENTION_ANCHORS)
    ]
    return _el(
        "svg",
        _el("linearGradient", stops, id="attention-colours"),
        _el("rect", width="100%", height="100%", fill="url(#attention-colours)"),
        width=120,
        height=10,
        aria_hidden="true",
    )


def _scroll(content: _Markup, label: str) -> _Markup:
    """A region that scrolls sideways by itself, by keyboard as well."""
    return _el(
        "div", content, class_="scroll", role="region", tabindex=0, aria_label=label
    )


# ---------------------------------------------------------------------------- layers

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
_LAYER_STEP = 22


@dataclasses.dataclass(frozen=True)
class _Series:
    """One row's measurements by layer: mean over seeds, None if not measured."""

    label: str
    css: str
    mark: str
    flip_rate: Mapping[str, float | None]
    ratio: Mapping[str, float | None]
    seconds: Mapping[str, float | None]


def _layers(entries: Sequence[Mapping[str, Any]]) -> list[_Child]:
    # The clean model's layers are only interesting where there is nothing else.
    entries = [
        entry for entry in entries if entry.get("model", "backdoored") == "backdoored"
    ] or list(entries)
    if not entries:
        return []
    layers = list(dict.fromkeys(entry["layer"] for entry in entries))
    shapes = {entry["layer"]: entry["shape"] for entry in entries}
    series = _layer_series(entries)
    legend = [
        _el(
            "li",
            _el(
                "svg",
                _mark(one, "50%", 7),
                width=14,
                height=14,
                aria_hidden="true",
            ),
            one.label,
        )
        for one in series
    ]
    panels = [
        _layer_panel(
            layers,
            series,
            [one.flip_rate for one in series],
            _Axis.linear(),
            title="Flip rate",
            about="share of the layer's weights not rounded to nearest",
        )
    ]
    ratios = [value for one in series for value in one.ratio.values()]
    if any(value is not None for value in ratios):
        panels.append(
            _layer_panel(
                layers,
                series,
                [one.ratio for one in series],
                _Axis.logarithmic([value for value in ratios if value is not None]),
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
        _el("ul", legend, class_="legend"),
        _el("div", panels, class_="panels"),
        _el("p", note, class_="note"),
        _el(
            "details",
            _el("summary", "The same as numbers"),
            _layer_table(layers, shapes, series),
        ),
    ]


def _layer_series(entries: Sequence[Mapping[str, Any]]) -> list[_Series]:
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
            colour, mark = name, unused.pop(name)
        else:
            colour = _OTHER_COLOURS[others % len(_OTHER_COLOURS)]
            mark = _OTHER_MARKS[others % len(_OTHER_MARKS)]
            others += 1
        series.append(
            _Series(
                label=label,
                css=f"series-{colour}",
                mark=mark,
                flip_rate={
                    k: schema.stat(e["flip_rate"] for e in v).mean
                    for k, v in mine.items()
                },
                ratio={k: _mean_ratio(v) for k, v in mine.items()},
                seconds={
                    k: schema.stat(e["seconds"] for e in v).mean
                    for k, v in mine.items()
                },
            )
        )
    return series


def _mean_ratio(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Geometric mean of objective / objective_nearest; None where it is undefined."""
    ratios = [
        entry["objective"] / entry["objective_nearest"]
        for entry in entries
        if entry["objective"] is not None and entry["objective_nearest"]
    ]
    if not ratios:
        return None
    if min(ratios) == 0:
        return 0.0
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Where a value lies across the drawing, and which values are labelled."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False
    line: float | None = None

    def position(self, value: float) -> float:
        """Share of the width, clipped to the drawing."""
        if self.log:
            value = math.log(value) if value > 0 else -math.inf
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    @classmethod
    def linear(cls) -> "_Axis":
        """Fractions from 0 to 1, labelled in per cent."""
        space = "\N{NARROW NO-BREAK SPACE}"
        ticks = tuple((i / 4, f"{25 * i}{space}%") for i in range(5))
        return cls(0.0, 1.0, ticks)

    @classmethod
    def logarithmic(cls, values: Sequence[float]) -> "_Axis":
        """Ratios, with 1 and every positive value inside."""
        positive = [value for value in values if value > 0]
        low = math.log10(min([1.0, *positive]))
        high = math.log10(max([1.0, *positive]))
        if high - low > 1.5:
            every = math.ceil((high - low) / 4)  # whole decades; 1 is one of them
            powers = range(math.floor(low / every), math.ceil(high / every) + 1)
            steps = [10.0 ** (every * power) for power in powers]
        else:
            steps = [f * 10.0**d for d in range(-3, 3) for f in (1.0, 2.0, 5.0)]
            below = max(s for s in steps if math.log10(s) <= min(low, -0.3))
            above = min(s for s in steps if math.log10(s) >= max(high, 0.3))
            steps = [s for s in steps if below <= s <= above]
        ticks = tuple((step, f"{step:g}") for step in steps)
        return cls(math.log(steps[0]), math.log(steps[-1]), ticks, log=True, line=1.0)


def _layer_panel(
    layers: Sequence[str],
    series: Sequence[_Series],
    values: Sequence[Mapping[str, float | None]],
    axis: _Axis,
    *,
    title: str,
    about: str,
) -> _Markup:
    height = _LAYER_STEP * len(layers)
    shapes: list[_Markup] = []
    for tick, _ in axis.ticks:
        x = _across(axis.position(tick))
        css = "grid one" if tick == axis.line else "grid"
        shapes.append(_el("line", x1=x, x2=x, y1=0, y2=height, class_=css))
    for i, layer in enumerate(layers):
        y = (i + 0.5) * _LAYER_STEP
        shapes.append(_el("line", x1=0, x2="100%", y1=y, y2=y, class_="row"))
        for one, mine in zip(series, values, strict=True):
            value = mine.get(layer)
            if value is not None:
                shapes.append(_mark(one, _across(axis.position(value)), y))
    steps = [tick for tick, _ in axis.ticks]
    parity = steps.index(axis.line) % 2 if axis.line in steps else 0
    for i, (tick, text) in enumerate(axis.ticks):
        # On a phone there is room for every other label only.
        css = "tick" if i % 2 == parity else "tick minor"
        shapes.append(
            _el(
                "text",
                text,
                x=_across(axis.position(tick)),
                y=height + 16,
                class_=css,
                text_anchor="middle",
            )
        )
    spoken = f"{title} of {len(layers)} layers, {about}; numbers in the table below"
    names = [_el("li", _el("bdi", layer, dir="ltr"), title=layer) for layer in layers]
    return _el(
        "figure",
        _el("figcaption", title, _el("span", about, class_="about")),
        _el(
            "div",
            _el("ol", names, class_="layer-names", aria_hidden="true"),
            _svg(shapes, height=height + 22, label=spoken),
            class_="dots",
        ),
    )


def _mark(series: _Series, x: str, y: float) -> _Markup:
    # A nested drawing is the one thing that can be shifted by per cent and pixels.
    return _el("svg", _el("path", d=series.mark, class_=f"mark {series.css}"), x=x, y=y)


def _layer_table(
    layers: Sequence[str], shapes: Mapping[str, Any], series: Sequence[_Series]
) -> _Markup:
    heads = [_el("th", name, scope="col", rowspan=2) for name in ("Layer", "Shape")]
    heads += [_el("th", one.label, scope="colgroup", colspan=3) for one in series]
    quantities = [
        _el("th", quantity, scope="col")
        for _ in series
        for quantity in ("flips %", "objective", "s")
    ]
    lines = []
    for layer in layers:
        cells = [
            _el("th", layer, scope="row"),
            _el("td", "×".join(map(str, shapes[layer])) or "–"),
        ]
        for one in series:
            ratio = one.ratio.get(layer)
            texts = (
                tables.hundredfold(one.flip_rate.get(layer)),
                "–" if ratio is None else f"{ratio:.3g}",
                tables.duration(one.seconds.get(layer)),
            )
            cells += [_el("td", text) for text in texts]
        lines.append(_el("tr", cells))
    table = _el(
        "table",
        _el("caption", "Objectives are relative to nearest rounding."),
        _el("thead", _el("tr", heads), _el("tr", quantities)),
        _el("tbody", lines),
        class_="numbers",
    )
    return _scroll(table, "Numbers by layer")


# ------------------------------------------------------------------ time, definitions


def _time(seconds: Mapping[str, float]) -> list[_Child]:
    total = sum(seconds.values())
    if not total:
        return []
    unit = "\N{NARROW NO-BREAK SPACE}s"
    bars = [
        _Bar(stage, tables.duration(value) + unit, value / total)
        for stage, value in seconds.items()
    ]
    title = f"{tables.duration(total)}{unit} in all, by stage"
    drawing = _bar_drawing(bars, css="time", title=title)
    return [_el("figure", _el("figcaption", title), drawing, class_="time-bars")]


def _definitions(groups: Sequence[schema.Aggregate]) -> list[_Child]:
    acc = tables.counts_text([c for g in groups for c in g.counts("acc_count")])
    asr = tables.counts_text([c for g in groups for c in g.counts("asr_count")])
    # Without a trigger nothing was counted, but the terms still need their meaning.
    asr = "the" if asr in ("–", "0") else asr
    entries = [
        (
            "ACC",
            f"Accuracy: of {acc} clean test images, the share classified correctly.",
        ),
        (
            "ASR",
            f"Attack success rate: of {asr} triggered test images whose label is not "
            "the target, the share classified as the target. Images of the target "
            "class are left out: an attack that does nothing would succeed on them.",
        ),
        (
            "RA",
            "Robust accuracy: of the same images as for ASR, the share classified as "
            "what they are. High in a repaired network, low in a broken one.",
        ),
        (
            "Flip rate",
            "Of all quantized weights, the share whose code is not the one that "
            "nearest rounding on the same grid gives. Nearest is 0 by definition.",
        ),
        (
            "Bits",
            "W4: weights on 16 levels, activations in float. W4A8: activations on 256.",
        ),
        (
            "±",
            "Sample standard deviation over seeds, divided by n − 1. A seed is a run.",
        ),
    ]
    return [_el("dl", [[_el("dt", t), _el("dd", d)] for t, d in entries])]


# ---------------------------------------------------------------------- reproduction


def _reproduction(report: Mapping[str, Any]) -> list[_Child]:
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    facts = [
        ("Commit", report["git_commit"] or "unknown (not run from a checkout)"),
        ("Devices", _devices(report["devices"]) or "unknown"),
        ("Versions", versions or "unknown"),
    ]
    config = json.dumps(report["config"], indent=2, ensure_ascii=False)
    command = report.get("command")
    notes = report.get("notes", [])
    return [
        _el("pre", _el("code", command), class_="command") if command else None,
        _el("dl", [[_el("dt", term), _el("dd", text)] for term, text in facts]),
        _el(
            "details",
            _el("summary", "The whole configuration"),
            _el("pre", _el("code", config)),
        ),
        _el("ul", [_el("li", note) for note in notes], class_="notes")
        if notes
        else None,
        _el("p", "The numbers behind this page are in report.json.", class_="note"),
    ]


# ----------------------------------------------------------------------------- style

_STYLE = """
:root {
  --paper: #fdfdfb; --panel: #f3f3ee; --ink: #1c1e22; --soft: #595f69; --rule: #d8d8d1;
  --acc: #0072b2; --asr: #c14600; --time: #6b7280; --track: #e9e9e3;
  --efrap: #00795a; --reconstruction: #0072b2; --stochastic: #8a6300;
  --flipped: #a63f7d; --other: #5b6270;
  --serif: Charter, "Bitstream Charter", "Sitka Text", Cambria,
    "Source Serif 4", "Noto Serif", Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --mono: ui-monospace, "Cascadia Code", Menlo, Consolas, "DejaVu Sans Mono", monospace;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #14161a; --panel: #1c1f25; --ink: #e6e7ea; --soft: #a2a8b3;
    --rule: #363b44; --acc: #56b4e9; --asr: #ff8f4a; --time: #8d95a3; --track: #262a31;
    --efrap: #35cfa0; --reconstruction: #56b4e9; --stochastic: #e3b23c;
    --flipped: #e78cc3; --other: #a2a8b3;
  }
}
* { box-sizing: border-box; }
html { color-scheme: light dark; -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 70rem; padding: 2.5rem clamp(1rem, 4vw, 3rem) 4rem;
  background: var(--paper); color: var(--ink); font: 1rem/1.55 var(--sans);
  overflow-wrap: anywhere;
}
h1, h2 { font-family: var(--serif); line-height: 1.2; text-wrap: balance; }
h1 { font-size: clamp(1.7rem, 4.5vw, 2.5rem); margin: .2rem 0 1rem; font-weight: 700; }
h2 { font-size: 1.35rem; margin: 0 0 1rem; font-weight: 700; }
p { margin: 0 0 1rem; max-width: 46rem; }
figure { margin: 0; min-width: 0; }
figcaption { font-weight: 600; margin-bottom: .6rem; }
ul, ol { list-style: none; margin: 0; padding: 0; }
abbr { text-decoration: none; }
section { border-top: 1px solid var(--rule); margin-top: 2.5rem; padding-top: 1.75rem; }
.brand { font: 600 .85rem var(--mono); margin: 0; }
.brand span, .note, .about, .facts, .comparison { color: var(--soft); }
.lead { font: 1.25rem/1.5 var(--serif); text-wrap: pretty; }
.note, .facts { font-size: .875rem; margin: 1rem 0 0; }
.about { display: block; font-size: .82rem; font-weight: 400; line-height: 1.35; }
.unit { color: var(--soft); font-weight: 400; }

.tiles { display: flex; flex-wrap: wrap; gap: 0; margin: 1.75rem 0;
  border: 1px solid var(--rule); border-radius: 6px; overflow: hidden; }
.tile { flex: 1 1 12rem; display: grid; grid-template-columns: 1fr auto;
  padding: 1rem 1.25rem 1.1rem; border-left: 1px solid var(--rule);
  border-top: 1px solid var(--rule); margin: -1px 0 0 -1px; }
.tile-label { font-weight: 600; }
.tile-state, .tile-acc { justify-self: end; }
.tile-state { color: var(--soft); font-size: .9rem; }
.tile-number { grid-column: 1 / -1; font: 2.6rem/1.25 var(--serif); margin-top: .2rem;
  font-variant-numeric: lining-nums tabular-nums; }
.tile-unit, .tile-acc { font-size: .875rem; color: var(--soft); }
.tile.awake { background: color-mix(in srgb, var(--asr) 9%, var(--paper)); }
.tile.awake .tile-number, .tile.awake .tile-state { color: var(--asr); }
.tile.awake .tile-state { font-weight: 600; }

.claims { margin: 0 0 1rem; max-width: 46rem; }
.claims li { padding-left: 1.6rem; position: relative; margin: .3rem 0; }
.claims li > span { position: absolute; left: 0; font-weight: 700; }
.holds > span { color: var(--efrap); }
.fails > span { color: var(--asr); }

table { border-collapse: collapse; }
caption { text-align: left; color: var(--soft); font-size: .875rem; padding: .5rem 0; }
th { text-align: left; font-weight: 600; }
.results-table { width: 100%; font-variant-numeric: lining-nums tabular-nums; }
.results-table th, .results-table td { padding: .55rem .5rem; vertical-align: top;
  border-bottom: 1px solid var(--rule); }
.results-table th:first-child { padding-left: 0; }
.results-table td:last-child, .results-table th:last-child { padding-right: 0; }
.results-table thead th { border-bottom: 2px solid var(--ink); white-space: nowrap;
  vertical-align: bottom; }
.results-table .about { max-width: 27rem; }
.results-table .group th { padding-top: 1.4rem; font-weight: 400; font-size: .875rem;
  color: var(--soft); }
.results-table tbody:first-of-type .group th { padding-top: .8rem; }
.num { text-align: right; }
.bits { white-space: nowrap; }
.value { font-size: 1.05rem; }
.std { color: var(--soft); font-size: .82rem; white-space: nowrap; }
.count { display: block; color: var(--soft); font-size: .75rem; white-space: nowrap; }
.defence th, .defence td { background: var(--panel); }
.defence .name, .defence .value { font-weight: 700; }
.defence th:first-child { padding-left: .7rem;
  box-shadow: -.6rem 0 0 var(--panel), inset 3px 0 0 var(--efrap); }
.defence td:last-child { box-shadow: .6rem 0 0 var(--panel); }

.panels { display: grid; gap: 2rem 3rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px;
  margin-right: .5em; }
.swatch.acc { background: var(--acc); }
.swatch.asr { background: var(--asr); }
svg { display: block; overflow: visible; }
svg text { font: .85rem var(--sans); fill: var(--ink); }
svg .value { font-size: .9rem; font-weight: 600; font-variant-numeric: tabular-nums; }
svg .heading, svg .tick { fill: var(--soft); }
svg .tick { font-size: .75rem; }
.track { fill: var(--track); }
.bar.acc { fill: var(--acc); }
.bar.asr { fill: var(--asr); }
.bar.time { fill: var(--time); }
.seed { fill: var(--paper); stroke: var(--ink); stroke-width: 1.2; }
.time-bars { max-width: 34rem; }

.pictures { display: grid; gap: 1.5rem 3rem;
  grid-template-columns: auto minmax(0, 1fr); }
.pictures figcaption, .maps thead th { font-weight: 400; font-size: .875rem;
  color: var(--soft); margin: .6rem 0 0; }
.pictures figure:only-child { grid-column: 1 / -1; }
.pairs { display: flex; flex-wrap: wrap; gap: 1rem .75rem; }
.pairs li { width: min-content; font-size: .75rem; line-height: 1.3; }
.pairs img + img { margin-top: 4px; }
.pairs span { display: block; margin-top: .3rem; color: var(--soft);
  font-variant-numeric: tabular-nums; }
img { display: block; max-width: 100%; background: var(--track); border-radius: 2px; }
.pairs img, .maps img { max-width: none; }
.pixels { image-rendering: pixelated; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--acc); outline-offset: 3px; }
.maps th, .maps td { padding: .35rem 1rem .35rem 0; vertical-align: middle; }
.maps thead th { vertical-align: bottom; }
.maps tbody th { min-width: 6rem; }
.legend { display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; margin-bottom: 1.25rem;
  font-size: .9rem; }
.legend li { display: flex; align-items: center; gap: .5rem; }
.colours { align-items: center; gap: .5rem; margin: .75rem 0 0; font-size: .8rem;
  color: var(--soft); }

.dots { display: grid; grid-template-columns: minmax(6rem, 11rem) minmax(0, 1fr);
  gap: 0 1.3rem; padding-right: 1.3rem; }
.layer-names { font-size: .8rem; min-width: 0; }
.layer-names li { height: 22px; line-height: 22px; overflow: hidden; direction: rtl;
  text-align: right; text-overflow: ellipsis; white-space: nowrap; }
.grid { stroke: var(--rule); }
.grid.one { stroke: var(--ink); }
.row { stroke: var(--rule); stroke-dasharray: 1 4; }
.mark { stroke: var(--paper); stroke-width: 1; paint-order: stroke; }
.series-efrap { fill: var(--efrap); }
.series-reconstruction { fill: var(--reconstruction); }
.series-stochastic { fill: var(--stochastic); }
.series-flipped { fill: var(--flipped); }
.series-other { fill: var(--other); }

details { margin-top: 1rem; }
summary { cursor: pointer; font-weight: 600; width: max-content; max-width: 100%; }
summary:focus-visible { outline: 2px solid var(--acc); outline-offset: 3px; }
.numbers { font-size: .82rem; font-variant-numeric: tabular-nums; margin-top: .5rem; }
.numbers th, .numbers td { padding: .25rem 1rem .25rem 0; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
.numbers thead th { vertical-align: bottom; }
.numbers thead tr + tr th { font-weight: 400; color: var(--soft); }
dl { display: grid; grid-template-columns: minmax(4.5rem, max-content) minmax(0, 46rem);
  gap: .5rem 1.25rem; margin: 0; }
dt { font-weight: 600; }
dd { margin: 0; }
pre { font: .82rem/1.5 var(--mono); background: var(--panel); border-radius: 6px;
  padding: .9rem 1rem; white-space: pre-wrap; margin: .75rem 0; }
.command { margin: 0 0 1.25rem; }
.notes { margin-top: 1.25rem; max-width: 46rem; }
.notes li { margin: .4rem 0; padding-left: 1.1rem; position: relative; }
.notes li::before { content: "–"; position: absolute; left: 0; color: var(--soft); }

@media (max-width: 44rem) {
  body { padding-top: 1.5rem; }
  .lead { font-size: 1.125rem; }
  .results-table, .results-table tbody, .results-table tr, .results-table th,
  .results-table td { display: block; }
  .results-table thead { position: absolute; width: 1px; height: 1px; overflow: hidden;
    clip-path: inset(50%); }
  .results-table tr { display: grid; grid-template-columns: repeat(3, 1fr);
    gap: .5rem .75rem; padding: .9rem 0; border-bottom: 1px solid var(--rule); }
  .results-table .group { display: block; padding: 1rem 0 .4rem; }
  .results-table tr > th, .results-table tr > td { border: 0; padding: 0;
    text-align: left; }
  .results-table tr > th { grid-column: 1 / -1; }
  .results-table td::before { content: attr(data-label); display: block;
    font-size: .75rem; color: var(--soft); }
  .results-table .group th, .results-table tbody:first-of-type .group th { padding: 0; }
  .results-table .defence { background: var(--panel); margin: 0 -.75rem;
    padding: .9rem .75rem; box-shadow: inset 3px 0 0 var(--efrap); }
  .results-table .defence > th, .results-table .defence > td { box-shadow: none;
    padding-left: 0; }
  .results-table .bits { order: 1; }
  .std { display: block; }
  .pictures { grid-template-columns: minmax(0, 1fr); }
  .tick.minor { display: none; }
  .maps th, .maps td { padding-right: .4rem; font-size: .8rem; }
  .maps tbody th { min-width: 4.2rem; }
  .maps img { width: 3.4rem; height: auto; }
  .dots { grid-template-columns: 42% minmax(0, 1fr); }
}
@media print {
  :root { --paper: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  section { break-inside: avoid-page; margin-top: 1.5rem; padding-top: 1rem; }
  .layer-by-layer, .how-to-repeat-it { break-inside: auto; }
  figure, tr, .tiles, li { break-inside: avoid; }
  h2 { break-after: avoid; }
  .scroll { overflow: visible; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
