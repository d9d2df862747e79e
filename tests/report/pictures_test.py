# SPDX-License-Identifier: Apache-2.0
"""Pictures that are the ones given, with words for who cannot see them."""

import base64
import io

import numpy as np
import pytest
import sample_page as sample

from nad_jax.report import html as page
from nad_jax.report import pictures


def test_pictures_hold_exactly_the_pixels_they_were_given():
    from PIL import Image

    figures = sample.make_figures()
    sources = [
        a["src"]
        for a in sample.Reader(page.render(sample.make_report(), figures)).all("img")
    ]
    assert figures.clean_samples is not None and figures.triggered_samples is not None
    expected = [figures.trigger]
    for pair in zip(figures.clean_samples, figures.triggered_samples, strict=True):
        expected += pair
    for source, image in zip(sources, expected, strict=False):
        data = base64.b64decode(source.split(",")[1])
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), image)
    # Two attention rows: an image each, two maps and one.
    assert len(sources) == len(expected) + 5


def test_the_strongest_place_of_a_map_is_named():
    maps = {"stage1": np.zeros((4, 4))}
    maps["stage1"][2, 1] = 1.0
    image = np.zeros((8, 8, 3), np.uint8)
    figures = page.Figures(attention=(("Float", image, maps),))
    alts = [
        a["alt"]
        for a in sample.Reader(page.render(sample.make_report(), figures)).all("img")
    ]
    assert any("strongest at row 3, column 2" in alt for alt in alts)


def test_clean_and_triggered_image_of_a_network_share_a_line():
    image = np.zeros((8, 8, 3), np.uint8)
    maps = {"stage1": np.eye(4)}
    pair = (("NAD", image, maps), ("NAD", image + 9, maps), ("Float", image, maps))
    text = page.render(sample.make_report(), page.Figures(attention=pair))
    table = text[text.index('class="maps"') :]
    rows = table[: table.index("</table>")].split("<tr")[2:]
    assert [row.count("<img") for row in rows] == [4, 2]
    assert rows[0].index("The clean input") < rows[0].index("The triggered input")
    assert "at stage1, clean input" in rows[0] and "stage1, triggered" in rows[0]
    assert "The triggered input" in rows[1]


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_images_of_any_number_of_channels_are_shown(channels):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, channels), np.uint8)
    shown = pictures.visible(images)
    figures = page.Figures(
        trigger=shown[0], clean_samples=shown, triggered_samples=shown
    )
    assert "The trigger alone" in page.render(sample.make_report(), figures)
    if channels in (1, 3, 4):
        np.testing.assert_array_equal(shown, images[..., :3])
    else:
        mean = np.asarray(images, float).mean(-1)
        assert shown.shape[-1] == 1 and np.abs(shown[..., 0] - mean).max() <= 0.5
