# SPDX-License-Identifier: Apache-2.0
"""A page that is whole, loads nothing, and stays inert whatever it is fed."""

import re

import numpy as np
import pytest
import sample_page as sample

from nad_jax.errors import InputError
from nad_jax.report import html as page

VARIANTS = {
    "one seed": (lambda: sample.make_report(), sample.make_figures),
    "three seeds": (lambda: sample.make_report((0, 1, 2)), sample.make_figures),
    "no pictures": (lambda: sample.make_report(), lambda: None),
    "grey pictures": (
        lambda: sample.make_report(),
        lambda: sample.make_figures(channels=1),
    ),
    "no trigger": (
        lambda: sample.make_report(
            rows=[sample.make_row("float", None), sample.make_row("efrap", None)],
            layers=[],
        ),
        lambda: None,
    ),
    "one row and nothing else": (
        lambda: sample.make_report(
            rows=[sample.make_row("mine", 0.5, model="clean")],
            layers=[],
            claims=[],
            notes=[],
            seconds={},
            versions={},
            devices=[],
            git_commit=None,
            command=None,
        ),
        lambda: None,
    ),
}


@pytest.fixture(params=VARIANTS, name="text")
def _text(request):
    report, figures = VARIANTS[request.param]
    return page.render(report(), figures())


def test_tags_are_balanced_and_drawings_are_xml(text):
    sample.Reader(text)
    assert sample.find_drawings(text)


def test_the_page_loads_nothing(text):
    reader = sample.Reader(text)
    names = {tag for tag, _ in reader.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in reader.elements:
        assert not any(name.startswith("on") for name in attributes), tag
        assert "href" not in attributes and "srcset" not in attributes
        if "src" in attributes:
            assert attributes["src"].startswith("data:image/png;base64,")
    assert not re.search(r"https?:|@import", text)
    assert set(re.findall(r"url\((.*?)\)", text)) <= {"#attention-colours"}


def test_the_page_forbids_scripts_to_itself(text):
    (policy,) = [
        a["content"]
        for a in sample.Reader(text).all("meta")
        if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_pictures_and_drawings_have_a_text_instead(text):
    reader = sample.Reader(text)
    assert all(attributes.get("alt") for attributes in reader.all("img"))
    for drawing in sample.find_drawings(text):
        spoken = drawing.get("role") == "img" and drawing.get("aria-label")
        assert spoken or drawing.get("aria-hidden") == "true"
    assert reader.all("html") == [{"lang": "en"}]
    assert len(reader.all("h1")) == 1


def test_every_heading_of_a_table_has_a_scope_and_every_id_is_unique(text):
    reader = sample.Reader(text)
    assert all(attributes.get("scope") for attributes in reader.all("th"))
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    named = {a["aria-labelledby"] for _, a in reader.elements if "aria-labelledby" in a}
    assert named <= set(ids)


def test_every_string_of_a_report_is_inert():
    """The same elements as with harmless text, and the text is there to be read."""

    def build(word):
        rows = [sample.make_row(f"{word}{i}", 0.5) for i in range(2)]
        rows[0]["extra"] = {"description": word}
        return page.render(
            sample.make_report(
                title=word,
                config={word: {"x": word, "y": [word]}},
                rows=rows,
                git_commit=word,
                versions={word: word},
                devices=[word],
                seconds={word: 1.0},
                layers=[sample.make_layer(word, word, 1.0)],
                claims=[{"text": word, "passed": True}],
                notes=[word],
                command=word,
            ),
            sample.make_figures(word),
        )

    harmless, hostile = (
        sample.Reader(build("harmless")),
        sample.Reader(build(sample.HOSTILE)),
    )
    names = [tag for tag, _ in hostile.elements]
    assert names == [tag for tag, _ in harmless.elements]
    assert [sorted(a) for _, a in hostile.elements] == [
        sorted(a) for _, a in harmless.elements
    ]
    assert "script" not in names
    shown = sample.HOSTILE.replace("\x00", "\ufffd").replace("\u202e", "\ufffd")
    shown = " ".join(shown.replace("\ud800", "\ufffd").split())
    assert hostile.text.count(shown) >= 10
    assert sample.find_drawings(build(sample.HOSTILE))
    build(sample.HOSTILE).encode("utf-8")


def test_a_damaged_report_is_refused_before_anything_is_drawn():
    report = sample.make_report()
    report["rows"][0]["asr"] = 2.0
    with pytest.raises(InputError, match="asr"):
        page.render(report)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"trigger": np.zeros((4, 4, 3))}, "uint8"),
        ({"trigger": np.zeros((4, 4), np.uint8)}, "H, W, C"),
        ({"trigger": np.zeros((4, 4, 2), np.uint8)}, "C of 1 or 3"),
        ({"clean_samples": np.zeros((1, 4, 4, 3), np.uint8)}, "together"),
        (
            {
                "clean_samples": np.zeros((1, 4, 4, 3), np.uint8),
                "triggered_samples": np.zeros((2, 4, 4, 3), np.uint8),
            },
            "one shape",
        ),
    ],
)
def test_pictures_of_the_wrong_kind_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        page.Figures(**changes)


@pytest.mark.parametrize(
    "values",
    [np.full((2, 2), np.nan), np.full((2, 2), 1.5), np.full((2, 2), -0.1), np.zeros(4)],
)
def test_maps_outside_zero_and_one_are_refused(values):
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(InputError, match="attention map 's'"):
        page.Figures(attention=(("Float", image, {"s": values}),))
