# SPDX-License-Identifier: Apache-2.0
"""One self-contained page that shows a report: table, bars, layers, pictures.

The page loads nothing: pictures are data URIs, drawings are inline SVG, there is no
script, and a content policy in its head forbids all of that even to a name that should
slip through the escaping. It follows the reader's light or dark mode, prints, and works
from 320 px up; every drawing has its numbers as text somewhere on the page.

Here is which sections there are and in which order. What they hold is made in
- `masthead`: the top of the page down to the claims,
- `results`: the table and the bars,
- `curves`: accuracy and attack success by epoch,
- `pictures`: trigger, samples and attention maps,
- `layers`: dots and numbers by layer,
- `appendix`: time, meaning of the numbers, how to repeat the run;
and what those are made of in `markup` (elements), `drawings` (SVG), `style` (CSS).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from nad_jax.errors import InputError
from nad_jax.report import (
    appendix,
    curves,
    layers,
    markup,
    masthead,
    pictures,
    results,
    schema,
    style,
    tables,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Figures:
    """The pictures of a page; each may be absent.

    Attributes:
      trigger: The trigger on a plain background, uint8 `[H, W, C]`.
      clean_samples: Test images, uint8 `[N, H, W, C]`.
      triggered_samples: The same images with the trigger, uint8 `[N, H, W, C]`.
      attention: One entry per network and image: the network's name, the image it
        saw, uint8 `[H, W, C]`, and its attention maps by stage, float `[h, w]` in
        [0, 1]. For each name one triggered image, or a clean one and then the same with
        the trigger.

    Raises:
      InputError: For another dtype or shape, or a map with values outside [0, 1].
    """

    trigger: np.ndarray | None = None
    clean_samples: np.ndarray | None = None
    triggered_samples: np.ndarray | None = None
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
      The page, from doctype to end. Write it with `whole_file.write_text`.

    Raises:
      InputError: If the report is not one.
    """
    schema.validate(report)
    report = schema.plain(report, "report")
    figures = figures or Figures()
    groups = schema.aggregate(report["rows"])
    decimals = tables.decimals_for(row for group in groups for row in group.rows)
    title = report.get("title") or "Report"
    samples = pictures.samples(
        figures.trigger, figures.clean_samples, figures.triggered_samples
    )
    sections = [
        markup.section("Results", results.table(groups, decimals)),
        markup.section("Accuracy and attack success", results.bars(groups, decimals)),
        markup.section("Epoch by epoch", curves.content(report.get("curves", []))),
        markup.section("The trigger", samples),
        markup.section(
            "Where the networks look", pictures.attention(figures.attention)
        ),
        markup.section("Layer by layer", layers.content(report.get("layers", []))),
        markup.section("Time", appendix.time(report["seconds"])),
        markup.section("What the numbers mean", appendix.definitions(groups)),
        markup.section("How to repeat it", appendix.reproduction(report)),
    ]
    head = markup.el(
        "head",
        markup.el("meta", charset="utf-8"),
        markup.el(
            "meta",
            http_equiv="Content-Security-Policy",
            content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
            "base-uri 'none'; form-action 'none'",
        ),
        markup.el(
            "meta", name="viewport", content="width=device-width, initial-scale=1"
        ),
        markup.el("meta", name="color-scheme", content="light dark"),
        markup.el("title", f"{title} – nad_jax"),
        markup.el("style", markup.Markup(style.STYLE)),
    )
    body = markup.el(
        "body",
        masthead.header(report, groups, decimals, title),
        markup.el("main", sections),
    )
    return "<!doctype html>\n" + markup.el("html", head, "\n", body, lang="en") + "\n"
