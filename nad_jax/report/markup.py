# SPDX-License-Identifier: Apache-2.0
"""Elements of HTML as strings, escaped unless they say that they are markup.

Everything on the page goes through `el`, which escapes each child that is not itself
markup. Text is therefore safe by default; there is no other way into the page.
"""

import html
import re
from collections.abc import Iterable, Sequence


class Markup(str):
    """Text that is already HTML and passes through `el` as it is."""


Child = str | None | Iterable["Child"]

# Elements without content; written as <tag />, which both HTML and XML accept.
_EMPTY = frozenset({"meta", "img", "br", "rect", "line", "circle", "path", "stop"})


def el(tag: str, /, *children: Child, **attributes: object) -> Markup:
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
        return Markup("".join(parts) + " />")
    parts.append(">")
    parts.extend(_flatten(children))
    parts.append(f"</{tag}>")
    return Markup("".join(parts))


def picture(shapes: Iterable[Child], *, width: float, height: float) -> str:
    """The text of an SVG file: `shapes` on white, in pixels."""
    paper = el("rect", width=width, height=height, fill="white")
    drawing = el(
        "svg",
        [paper, *shapes],
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        font_family="sans-serif",
        font_size=12,
    )
    return f"{drawing}\n"


def label(
    x: float,
    y: float,
    text: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    fill: str = "black",
) -> Markup:
    """Text of a `picture`, its base line beginning (or as `anchor` says) at (x, y)."""
    return el(
        "text",
        text,
        x=x,
        y=y,
        text_anchor=anchor,
        font_weight=weight,
        fill=fill,
    )


def _flatten(children: Iterable[Child]) -> Iterable[str]:
    for child in children:
        if isinstance(child, Markup):
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


def section(title: str, content: Sequence[Child]) -> Markup | None:
    """A titled part of the page; None where there is nothing to put into it."""
    if not content:
        return None
    name = title.lower().replace(" ", "-")
    return el(
        "section", el("h2", title, id=name), content, aria_labelledby=name, class_=name
    )


def scroll(content: Markup, label: str) -> Markup:
    """A region that scrolls sideways by itself, by keyboard as well."""
    return el(
        "div", content, class_="scroll", role="region", tabindex=0, aria_label=label
    )
