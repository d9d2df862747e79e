# SPDX-License-Identifier: Apache-2.0
"""Pictures: the trigger, test images with and without it, and attention maps.

Each picture is a PNG inside the page. Small ones are enlarged with visible pixels.
"""

import base64
import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nad_jax.report import drawings, markup

_MAX_SAMPLES = 12
_SIDE = 96  # pixels of an attention map on the page


def visible(images: np.ndarray) -> np.ndarray:
    """What a page can show of images with any number of channels.

    Args:
      images: uint8 `[..., C]`.

    Returns:
      uint8 `[..., 1 or 3]`: the same for C of 1 or 3, the first three channels for 4,
      which leaves out transparency, and the mean of all channels as grey otherwise.
    """
    channels = images.shape[-1]
    if channels in (1, 3):
        return images
    if channels == 4:
        return images[..., :3]
    return images.mean(axis=-1, keepdims=True).round().astype(np.uint8)


def samples(
    trigger: np.ndarray | None,
    clean_samples: np.ndarray | None,
    triggered_samples: np.ndarray | None,
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
            clean, triggered = clean_samples[i], triggered_samples[i]
            pairs.append(
                markup.el(
                    "li",
                    _picture(clean, size=80, alt=f"Test image {i + 1}"),
                    _picture(triggered, size=80, alt=f"Test image {i + 1}, triggered"),
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
    """A table of attention maps: a line for each network, a column for each stage.

    Two entries of one name that follow each other are one line: first a clean image,
    then the same with the trigger.
    """
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
    for caption, group in itertools.groupby(entries, key=lambda entry: entry[0]):
        members = list(group)
        named = zip(_views(members), members, strict=True)
        views = [(view, image, maps) for view, (_, image, maps) in named]
        cells = [
            markup.el("th", caption, scope="row"),
            _cell([_picture(i, size=_SIDE, alt=f"The {n} input") for n, i, _ in views]),
        ]
        for stage in stages:
            cells.append(_cell([_map(caption, stage, n, maps) for n, _, maps in views]))
        lines.append(markup.el("tr", cells))
    table = markup.el(
        "table",
        markup.el("thead", markup.el("tr", heads)),
        markup.el("tbody", lines),
        class_="maps",
    )
    paired = any(
        len(list(g)) > 1 for _, g in itertools.groupby(entries, lambda e: e[0])
    )
    seen = "a clean image and of the same image with the trigger, side by side"
    note = (
        f"Attention maps of {seen if paired else 'one triggered image'}: how strong "
        "the features of a stage are at each place, scaled to [0, 1]. A network whose "
        "backdoor is awake tends to look at the trigger, one whose backdoor sleeps at "
        "the object."
    )
    return [
        markup.scroll(table, "Attention maps"),
        markup.el("div", "0 ", drawings.colour_bar(), " 1", class_="legend colours"),
        markup.el("p", note, class_="note"),
    ]


def _views(entries: Sequence[Any]) -> list[str]:
    """What the inputs of one network are; a single one is triggered."""
    return ["triggered"] if len(entries) == 1 else ["clean", "triggered"]


def _cell(parts: Sequence[markup.Child]) -> markup.Markup:
    return markup.el("td", [child for part in parts for child in (part, " ")][:-1])


def _map(
    caption: str, stage: str, view: str, maps: Mapping[str, np.ndarray]
) -> markup.Child:
    if stage not in maps:
        return "–"
    values = np.clip(np.asarray(maps[stage], dtype=np.float64), 0.0, 1.0)
    row, column = np.unravel_index(np.argmax(values), values.shape)
    alt = (
        f"Attention of {caption} at {stage}, {view} input, {values.shape[0]} by "
        f"{values.shape[1]}, strongest at row {row + 1}, column {column + 1}"
    )
    return _picture(drawings.coloured(values), size=_SIDE, alt=alt)


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
