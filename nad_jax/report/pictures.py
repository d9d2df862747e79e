# SPDX-License-Identifier: Apache-2.0
"""Pictures: the trigger, test images with and without it, and attention maps.

Each picture is a PNG inside the page. Small ones are enlarged with visible pixels.
"""

import base64
import io
from collections.abc import Mapping, Sequence

import numpy as np

from nad_jax.report import drawings, markup

_MAX_SAMPLES = 12


def samples(
    trigger: np.ndarray | None,
    clean_samples: np.ndarray | None,
    triggered_samples: np.ndarray | None,
    captions: Sequence[str],
) -> list[markup.Child]:
    """The trigger beside pairs of test images; whatever of it there is."""
    content: list[markup.Child] = []
    if trigger is not None:
        height, width = trigger.shape[:2]
        alt = f"The trigger, {width} by {height} pixels"
        content.append(
            markup.el(
                "figure",
                _picture(trigger, size=160, alt=alt),
                markup.el("figcaption", "The trigger alone"),
                class_="trigger",
            )
        )
    if clean_samples is not None and triggered_samples is not None:
        pairs = []
        count = min(len(clean_samples), _MAX_SAMPLES)
        for i in range(count):
            caption = captions[i] if captions else None
            clean, triggered = clean_samples[i], triggered_samples[i]
            pairs.append(
                markup.el(
                    "li",
                    _picture(clean, size=80, alt=f"Test image {i + 1}"),
                    _picture(triggered, size=80, alt=f"Test image {i + 1}, triggered"),
                    markup.el("span", caption) if caption else None,
                )
            )
        if pairs:
            content.append(
                markup.el(
                    "figure",
                    markup.el("ul", pairs, class_="pairs"),
                    markup.el(
                        "figcaption",
                        "Test images as they are (above) and with the trigger (below)",
                    ),
                )
            )
    return [markup.el("div", content, class_="pictures")] if content else []


def attention(
    entries: Sequence[tuple[str, np.ndarray, Mapping[str, np.ndarray]]],
) -> list[markup.Child]:
    """A table of attention maps: a line for each network, a column for each stage."""
    if not entries:
        return []
    stages = list(dict.fromkeys(s for _, _, maps in entries for s in maps))
    heads = [
        markup.el("th", "Network", scope="col"),
        markup.el("th", "Input", scope="col"),
    ]
    for stage in stages:
        sizes = {
            "×".join(map(str, np.shape(maps[stage])))
            for _, _, maps in entries
            if stage in maps
        }
        size = markup.el("span", ", ".join(sorted(sizes)), class_="about")
        heads.append(markup.el("th", stage, size, scope="col"))
    lines = []
    for caption, image, maps in entries:
        cells = [
            markup.el("th", caption, scope="row"),
            markup.el("td", _picture(image, size=96, alt="The triggered input")),
        ]
        for stage in stages:
            if stage not in maps:
                cells.append(markup.el("td", "–"))
                continue
            values = np.clip(np.asarray(maps[stage], dtype=np.float64), 0.0, 1.0)
            row, column = np.unravel_index(np.argmax(values), values.shape)
            alt = (
                f"Attention of {caption} at {stage}, {values.shape[0]} by "
                f"{values.shape[1]}, strongest at row {row + 1}, column {column + 1}"
            )
            cells.append(
                markup.el("td", _picture(drawings.coloured(values), size=96, alt=alt))
            )
        lines.append(markup.el("tr", cells))
    table = markup.el(
        "table",
        markup.el("thead", markup.el("tr", heads)),
        markup.el("tbody", lines),
        class_="maps",
    )
    note = (
        "Attention maps of one triggered image: how strong the features of a stage are "
        "at each place, scaled to [0, 1]. A network whose backdoor is awake tends to "
        "look at the trigger, one whose backdoor sleeps at the object."
    )
    return [
        markup.scroll(table, "Attention maps"),
        markup.el("div", "0 ", drawings.colour_bar(), " 1", class_="legend colours"),
        markup.el("p", note, class_="note"),
    ]


def _picture(image: np.ndarray, *, size: int, alt: str) -> markup.Markup:
    """Image enlarged by a whole factor with visible pixels, or as it is if large."""
    height, width = image.shape[:2]
    factor = max(1, size // max(height, width))
    shrink = min(1.0, size / max(height, width))
    return markup.el(
        "img",
        src=_png(np.ascontiguousarray(image)),
        width=round(width * factor * shrink),
        height=round(height * factor * shrink),
        alt=alt,
        class_="pixels" if shrink == 1 else None,
    )


def _png(image: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray(image[:, :, 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
