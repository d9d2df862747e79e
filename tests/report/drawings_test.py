# SPDX-License-Identifier: Apache-2.0
"""Lengths, positions and colours that are those of the numbers."""

import numpy as np
import pytest
import sample_page as sample

from nad_jax.report import drawings
from nad_jax.report import html as page


def test_bars_are_as_long_as_their_shares():
    rows = [sample.make_row("nearest", 0.25, 0.75)]
    found = sample.find_drawings(
        page.render(sample.make_report(rows=rows, layers=[], seconds={}))
    )
    bars = [
        (r.get("class"), r.get("width"))
        for d in found
        for r in d.iter("rect")
        if (r.get("class") or "").startswith("bar")
    ]
    assert bars == [("bar acc", "75.000%"), ("bar asr", "25.000%")]


@pytest.mark.parametrize(
    "values", [[], [1.0], [0.0], [0.5, 3.0], [0.01, 40.0], [1e-12, 1.0], [1.0, 1e12]]
)
def test_the_logarithmic_axis_holds_one_and_every_value(values):
    axis = drawings.Axis.logarithmic(values)
    ticks = [tick for tick, _ in axis.ticks]
    assert 1.0 in ticks and 3 <= len(ticks) <= 8 and ticks == sorted(ticks)
    assert axis.position(ticks[0]) == pytest.approx(0)
    assert axis.position(ticks[-1]) == pytest.approx(1)
    assert all(ticks[0] <= v <= ticks[-1] for v in values if v > 0)


def test_lightness_of_the_attention_colours_grows_in_even_steps():
    """Lightness of OKLab (Ottosson 2020), computed here from the sRGB anchors."""
    rgb = np.asarray(drawings.ATTENTION_ANCHORS, np.float64) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    lms = linear @ np.array(
        [
            [0.4122214708, 0.2119034982, 0.0883024619],
            [0.5363325363, 0.6806995451, 0.2817188376],
            [0.0514459929, 0.1073969566, 0.6299787005],
        ]
    )
    lightness = np.cbrt(lms) @ np.array([0.2104542553, 0.7936177850, -0.0040720468])
    steps = np.diff(lightness)
    np.testing.assert_allclose(steps, (0.97 - 0.20) / 8, atol=0.006)


def test_map_colours_meet_the_anchors_and_lie_between_them():
    colours = drawings.coloured(np.array([[0.0, 1.0, 1 / 16]]))
    assert tuple(colours[0, 0]) == drawings.ATTENTION_ANCHORS[0]
    assert tuple(colours[0, 1]) == drawings.ATTENTION_ANCHORS[-1]
    middle = np.mean(drawings.ATTENTION_ANCHORS[:2], axis=0)
    np.testing.assert_allclose(colours[0, 2], middle, atol=1)
