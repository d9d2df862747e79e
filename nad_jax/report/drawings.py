# SPDX-License-Identifier: Apache-2.0
"""Inline SVG: bars, an axis, dots along it, and the colours of attention maps.

Drawings have no `viewBox`: across they are measured in per cent of the column, down in
pixels. They stretch with the page while their text keeps its size.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from nad_jax.report import markup


def _svg(
    shapes: Sequence[markup.Child], *, height: float, label: str | None
) -> markup.Markup:
    if label is None:
        return markup.el("svg", shapes, width="100%", height=height, aria_hidden="true")
    return markup.el(
        "svg", shapes, width="100%", height=height, role="img", aria_label=label
    )


def _across(share: float) -> str:
    return f"{100 * share:.3f}%"


# ------------------------------------------------------------------------------ bars

_MAX_LABEL = 34  # characters of a name inside a drawing, where text cannot wrap


@dataclasses.dataclass(frozen=True)
class Bar:
    """One line of a bar drawing; `share` of the full width, None if unmeasured."""

    label: str
    value: str
    share: float | None
    points: tuple[float, ...] = ()
    heading: bool = False


def bar_chart(
    bars: Sequence[Bar], *, css: str, title: str, axis: bool = False
) -> markup.Markup:
    """Bars below their labels, so that no label competes with a bar for width."""
    step, thickness = 42, 12
    y = 0
    shapes: list[markup.Markup] = []
    for bar in bars:
        if bar.heading:
            shapes.append(markup.el("text", bar.label, x=0, y=y + 20, class_="heading"))
            y += 30
            continue
        top = y + 21
        shapes.append(markup.el("text", _short(bar.label), x=0, y=y + 14))
        shapes.append(
            markup.el(
                "text", bar.value, x="100%", y=y + 14, class_="value", text_anchor="end"
            )
        )
        shapes.append(
            markup.el(
                "rect", x=0, y=top, width="100%", height=thickness, class_="track"
            )
        )
        if bar.share:
            shapes.append(
                markup.el(
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
                markup.el("circle", cx=_across(point), cy=middle, r=3, class_="seed")
            )
        y += step
    if axis:
        for tick, anchor in ((0, "start"), (50, "middle"), (100, "end")):
            label = f"{tick}\N{NARROW NO-BREAK SPACE}%"
            shapes.append(
                markup.el(
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


def _short(text: str) -> str:
    """The text, or its two ends if it is too long for a drawing."""
    if len(text) <= _MAX_LABEL:
        return text
    half = (_MAX_LABEL - 1) // 2
    return f"{text[:half]}…{text[-half:]}"


# ----------------------------------------------------------------------------- lines

_LINES_HEIGHT = 120


def line_chart(
    series: Sequence[tuple[str, Sequence[float]]], *, title: str
) -> markup.Markup:
    """Shares in [0, 1] from left to right, one line per series.

    Args:
      series: Class of the colour ("acc", "asr") and the values, at equal distances.
      title: What is shown, for who cannot see it.
    """
    shapes: list[markup.Markup] = []
    for tick in (0, 50, 100):
        y = _line_height(tick / 100)
        shapes.append(markup.el("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
        shapes.append(markup.el("text", str(tick), x=0, y=y - 3, class_="tick"))
    for css, values in series:
        last = max(1, len(values) - 1)
        points = [(_across(i / last), _line_height(v)) for i, v in enumerate(values)]
        # Single pieces: the points of a polyline cannot be per cent.
        for (x1, y1), (x2, y2) in zip(points[:-1], points[1:], strict=True):
            shapes.append(
                markup.el("line", x1=x1, x2=x2, y1=y1, y2=y2, class_=f"curve {css}")
            )
    return _svg(shapes, height=_LINES_HEIGHT, label=title)


def _line_height(share: float) -> float:
    top, bottom = 14.0, _LINES_HEIGHT - 4.0
    return round(bottom + (top - bottom) * share, 2)


# ------------------------------------------------------------------------------ axis


@dataclasses.dataclass(frozen=True)
class Axis:
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
    def linear(cls) -> "Axis":
        """Fractions from 0 to 1, labelled in per cent."""
        space = "\N{NARROW NO-BREAK SPACE}"
        ticks = tuple((i / 4, f"{25 * i}{space}%") for i in range(5))
        return cls(0.0, 1.0, ticks)

    @classmethod
    def logarithmic(cls, values: Sequence[float]) -> "Axis":
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


# ------------------------------------------------------------------------------ dots

_ROW_STEP = 22


@dataclasses.dataclass(frozen=True)
class Mark:
    """How a series is drawn: an SVG path around (0, 0) and the class of its colour."""

    path: str
    css: str


def dot_chart(
    layers: Sequence[str],
    marks: Sequence[Mark],
    values: Sequence[Mapping[str, float | None]],
    axis: Axis,
    *,
    title: str,
    about: str,
) -> markup.Markup:
    """A line for each layer, and on it a dot for each of the series.

    `values` are by layer and go with `marks` one to one; None or absent is no dot.
    """
    height = _ROW_STEP * len(layers)
    shapes: list[markup.Markup] = []
    for tick, _ in axis.ticks:
        x = _across(axis.position(tick))
        css = "grid one" if tick == axis.line else "grid"
        shapes.append(markup.el("line", x1=x, x2=x, y1=0, y2=height, class_=css))
    for i, layer in enumerate(layers):
        y = (i + 0.5) * _ROW_STEP
        shapes.append(markup.el("line", x1=0, x2="100%", y1=y, y2=y, class_="row"))
        for mark, mine in zip(marks, values, strict=True):
            value = mine.get(layer)
            if value is not None:
                shapes.append(dot(mark, _across(axis.position(value)), y))
    steps = [tick for tick, _ in axis.ticks]
    parity = steps.index(axis.line) % 2 if axis.line in steps else 0
    for i, (tick, text) in enumerate(axis.ticks):
        # On a phone there is room for every other label only.
        css = "tick" if i % 2 == parity else "tick minor"
        shapes.append(
            markup.el(
                "text",
                text,
                x=_across(axis.position(tick)),
                y=height + 16,
                class_=css,
                text_anchor="middle",
            )
        )
    spoken = f"{title} of {len(layers)} layers, {about}; numbers in the table below"
    names = [
        markup.el("li", markup.el("bdi", layer, dir="ltr"), title=layer)
        for layer in layers
    ]
    return markup.el(
        "figure",
        markup.el("figcaption", title, markup.el("span", about, class_="about")),
        markup.el(
            "div",
            markup.el("ol", names, class_="layer-names", aria_hidden="true"),
            _svg(shapes, height=height + 22, label=spoken),
            class_="dots",
        ),
    )


def dot(mark: Mark, x: str, y: float) -> markup.Markup:
    """The mark with its centre at `x` (per cent) and `y` (pixels)."""
    # A nested drawing is the one thing that can be shifted by per cent and pixels.
    return markup.el(
        "svg", markup.el("path", d=mark.path, class_=f"mark {mark.css}"), x=x, y=y
    )


# ------------------------------------------------------------------------ colour map

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


def coloured(values: np.ndarray) -> np.ndarray:
    """Map in [0, 1], `[h, w]`, as uint8 colours `[h, w, 3]`."""
    anchors = np.asarray(ATTENTION_ANCHORS, dtype=np.float64)
    positions = np.linspace(0.0, 1.0, len(anchors))
    channels = [np.interp(values, positions, anchors[:, c]) for c in range(3)]
    return np.round(np.stack(channels, axis=-1)).astype(np.uint8)


def colour_bar() -> markup.Markup:
    """The colours from 0 to 1, as a key to the maps."""
    last = len(ATTENTION_ANCHORS) - 1
    stops = [
        markup.el("stop", offset=_across(i / last), stop_color=f"rgb{colour}")
        for i, colour in enumerate(ATTENTION_ANCHORS)
    ]
    return markup.el(
        "svg",
        markup.el("linearGradient", stops, id="attention-colours"),
        markup.el("rect", width="100%", height="100%", fill="url(#attention-colours)"),
        width=120,
        height=10,
        aria_hidden="true",
    )
