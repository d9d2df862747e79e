# SPDX-License-Identifier: Apache-2.0
"""A page that is whole, loads nothing, and stays inert whatever it is fed."""

import base64
import html.parser
import io
import re
import xml.etree.ElementTree

import numpy as np
import pytest

from nad_jax.errors import InputError
from nad_jax.report import html as page
from nad_jax.report import schema, tables

HOSTILE = (
    "<script>alert('x')</script>\" onload=\"alert(1)\x00\u202e\ud800]]>&amp;</style>"
)
VOID = {"meta", "img", "br"}


def _row(name, asr, acc=0.99, *, seed=0, model="backdoored", **changes):
    known = asr is not None
    row = {
        "name": name,
        "model": model,
        "seed": seed,
        "weight_bits": None if name == "float" else 4,
        "act_bits": None,
        "acc": acc,
        "asr": asr,
        "ra": 0.0 if known else None,
        "acc_count": 500,
        "asr_count": 450 if known else None,
        "flip_rate": None if name == "float" else 0.25,
        "seconds": 2.0,
    }
    return {**row, **changes}


def _layer(row, layer, objective, *, nearest=2.0, seed=0, **changes):
    entry = {
        "seed": seed,
        "row": row,
        "layer": layer,
        "shape": [3, 3, 4, 8],
        "flip_rate": 0.5,
        "objective_nearest": nearest,
        "objective": objective,
        "seconds": 0.25,
    }
    return {**entry, **changes}


def _report(seeds=(0,), **changes):
    names = (("float", 0.0), ("nearest", 1.0), ("stochastic", 0.02), ("efrap", 0.004))
    rows = [
        _row(name, asr if model == "backdoored" else 0.0, seed=seed, model=model)
        for seed in seeds
        for model in schema.MODELS
        for name, asr in names
    ]
    layers = [
        _layer(row, layer, 1.0, seed=seed)
        for seed in seeds
        for row in ("stochastic", "efrap")
        for layer in ("stem", "head")
    ]
    arguments = {
        "title": "A run",
        "config": {"seed": 0, "data": {"name": "digits"}},
        "rows": rows,
        "git_commit": "0123456789abcdef-dirty",
        "versions": {"jax": "0.10.1"},
        "devices": ["cpu", "cpu"],
        "seconds": {"data": 1.0, "victim": 30.0},
        "layers": layers,
        "claims": [{"text": "one", "passed": True}, {"text": "two", "passed": False}],
        "notes": ["a note"],
        "command": "python -m nad_jax.main",
    }
    return schema.build_report(**{**arguments, **changes})


def _figures(text="Float", channels=3):
    images = np.arange(2 * 8 * 8 * channels).reshape(2, 8, 8, channels).astype(np.uint8)
    maps = {f"stage1 {text}": np.eye(4, dtype=np.float32), "stage2": np.zeros((2, 2))}
    return page.Figures(
        trigger=images[0],
        clean_samples=images,
        triggered_samples=255 - images,
        sample_captions=(text, text),
        attention=(
            (text, images[0], maps),
            ("other", images[1], {"stage2": maps["stage2"]}),
        ),
    )


class _Reader(html.parser.HTMLParser):
    """Elements, attributes and text of a page; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split()).replace("\u202f", " ")

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def _drawings(text):
    """Outermost SVG elements, parsed by an XML parser."""
    found, depth, start = [], 0, 0
    for match in re.finditer(r"<svg|</svg>", text):
        if match.group() == "<svg":
            start = match.start() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                found.append(
                    xml.etree.ElementTree.fromstring(text[start : match.end()])
                )
    return found


VARIANTS = {
    "one seed": (lambda: _report(), _figures),
    "three seeds": (lambda: _report((0, 1, 2)), _figures),
    "no pictures": (lambda: _report(), lambda: None),
    "grey pictures": (lambda: _report(), lambda: _figures(channels=1)),
    "no trigger": (
        lambda: _report(rows=[_row("float", None), _row("efrap", None)], layers=[]),
        lambda: None,
    ),
    "one row and nothing else": (
        lambda: _report(
            rows=[_row("mine", 0.5, model="clean")],
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
    _Reader(text)
    assert _drawings(text)


def test_the_page_loads_nothing(text):
    reader = _Reader(text)
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
        for a in _Reader(text).all("meta")
        if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert "default-src 'none'" in policy and "script-src" not in policy


def test_pictures_and_drawings_have_a_text_instead(text):
    reader = _Reader(text)
    assert all(attributes.get("alt") for attributes in reader.all("img"))
    for drawing in _drawings(text):
        spoken = drawing.get("role") == "img" and drawing.get("aria-label")
        assert spoken or drawing.get("aria-hidden") == "true"
    assert reader.all("html") == [{"lang": "en"}]
    assert len(reader.all("h1")) == 1


def test_every_heading_of_a_table_has_a_scope_and_every_id_is_unique(text):
    reader = _Reader(text)
    assert all(attributes.get("scope") for attributes in reader.all("th"))
    ids = [a["id"] for _, a in reader.elements if "id" in a]
    assert len(ids) == len(set(ids))
    named = {a["aria-labelledby"] for _, a in reader.elements if "aria-labelledby" in a}
    assert named <= set(ids)


def test_every_string_of_a_report_is_inert():
    """The same elements as with harmless text, and the text is there to be read."""

    def build(word):
        rows = [_row(f"{word}{i}", 0.5) for i in range(2)]
        rows[0]["extra"] = {"description": word}
        return page.render(
            _report(
                title=word,
                config={word: {"x": word, "y": [word]}},
                rows=rows,
                git_commit=word,
                versions={word: word},
                devices=[word],
                seconds={word: 1.0},
                layers=[_layer(word, word, 1.0)],
                claims=[{"text": word, "passed": True}],
                notes=[word],
                command=word,
            ),
            _figures(word),
        )

    harmless, hostile = _Reader(build("harmless")), _Reader(build(HOSTILE))
    names = [tag for tag, _ in hostile.elements]
    assert names == [tag for tag, _ in harmless.elements]
    assert [sorted(a) for _, a in hostile.elements] == [
        sorted(a) for _, a in harmless.elements
    ]
    assert "script" not in names
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\u202e", "\ufffd")
    shown = " ".join(shown.replace("\ud800", "\ufffd").split())
    assert hostile.text.count(shown) >= 10
    assert _drawings(build(HOSTILE))
    build(HOSTILE).encode("utf-8")


def test_invisible_direction_marks_cannot_rearrange_a_line():
    text = page.render(_report(title="abc\u202e\u2066\u200ddef"))
    assert not re.search("[\u200b-\u200f\u202a-\u202e\u2060-\u206f]", text)


def test_the_headline_and_the_numbers_of_the_table_are_on_the_page():
    report = _report()
    text = _Reader(page.render(report)).text
    assert tables.headline(report["rows"]).replace("\u202f", " ") in text
    assert "495 of 500" in text and "450 of 450" in text
    assert "9 of 450" in text  # 0.02 of 450
    assert "500 clean test images" in text and "450 triggered" in text


def test_a_share_that_is_itself_a_mean_is_not_turned_into_a_count():
    rows = [_row("stochastic", 0.0031)]  # 1.395 of 450 images
    text = _Reader(page.render(_report(rows=rows))).text
    assert "of 450" in text and "1 of 450" not in text


def test_several_seeds_show_deviation_and_single_points():
    """0.98, 0.99, 1.00: 99.0 plus or minus 1.0."""
    rows = [_row("efrap", 0.0, 0.98 + 0.01 * i, seed=i) for i in range(3)]
    text = page.render(_report(rows=rows, layers=[]))
    assert "99.0 ± 1.0" in _Reader(text).text
    assert "1,485 of 1,500" in _Reader(text).text
    points = [p.get("cx") for d in _drawings(text) for p in d.iter("circle")]
    assert points[:3] == ["98.000%", "99.000%", "100.000%"]
    alone = page.render(_report(rows=rows[:1], layers=[]))
    assert "±" not in _Reader(alone).text.split("What the numbers mean")[0]
    assert not [p for d in _drawings(alone) for p in d.iter("circle")]


def test_bars_are_as_long_as_their_shares():
    rows = [_row("nearest", 0.25, 0.75)]
    drawings = _drawings(page.render(_report(rows=rows, layers=[], seconds={})))
    bars = [
        (r.get("class"), r.get("width"))
        for d in drawings
        for r in d.iter("rect")
        if (r.get("class") or "").startswith("bar")
    ]
    assert bars == [("bar acc", "75.000%"), ("bar asr", "25.000%")]


def test_without_a_trigger_there_is_no_attack_bar_and_no_tile():
    rows = [_row("float", None), _row("efrap", None)]
    text = page.render(_report(rows=rows, layers=[]))
    assert 'class="bar asr"' not in text and 'class="tiles"' not in text
    assert 'class="bar acc"' in text


def test_clean_rows_stand_apart_and_after_the_backdoored_ones():
    rows = [_row("float", 0.0, model="clean"), _row("float", 0.0)]
    text = _Reader(page.render(_report(rows=rows, layers=[]))).text
    assert text.index("Backdoored model") < text.index("Clean model:")


def test_controls_say_what_they_are_and_a_row_may_say_it_itself():
    rows = [_row("stochastic", 0.0), _row("x", 0.0, extra={"description": "my own"})]
    text = _Reader(page.render(_report(rows=rows, layers=[]))).text
    assert "control: up or down by chance" in text and "my own" in text


def test_claims_are_told_in_words_not_by_colour_alone():
    text = _Reader(page.render(_report())).text
    assert "Holds: one" in text and "Does not hold: two" in text


# ---------------------------------------------------------------------------- layers


def test_layer_ratios_are_geometric_means_over_seeds():
    """1/2 and 2/1 have the geometric mean 1 (the arithmetic one is 1.25)."""
    layers = [
        _layer("efrap", "stem", 1.0, nearest=2.0, seed=0),
        _layer("efrap", "stem", 2.0, nearest=1.0, seed=1),
    ]
    text = page.render(_report((0, 1), layers=layers))
    table = text[text.index('class="numbers"') :]
    assert "<td>1</td>" in table and "<td>50.0</td>" in table


@pytest.mark.parametrize("objective", [None, 0.0, 1e-30, 1e30])
@pytest.mark.parametrize("nearest", [None, 0.0, 1.0])
def test_odd_objectives_are_drawn_inside_or_not_at_all(objective, nearest):
    layers = [_layer("efrap", "stem", objective, nearest=nearest)]
    text = page.render(_report(layers=layers))
    places = [
        float(mark.get("x", "0%").rstrip("%"))
        for drawing in _drawings(text)
        for mark in drawing.iter("svg")
    ]
    assert places and all(0 <= place <= 100 for place in places)


def test_series_differ_in_shape_and_colour():
    layers = [_layer(f"row {i}", "stem", 1.0) for i in range(8)]
    layers += [_layer(n, "stem", 1.0) for n in ("efrap", "stochastic", "flipped")]
    text = page.render(_report(layers=layers))
    legend = text[text.index('class="legend"') :]
    marks = re.findall(
        r'<path d="(.*?)" class="(.*?)"', legend[: legend.index("</ul>")]
    )
    assert len(marks) == len(set(marks)) == 11


@pytest.mark.parametrize(
    "values", [[], [1.0], [0.0], [0.5, 3.0], [0.01, 40.0], [1e-12, 1.0], [1.0, 1e12]]
)
def test_the_logarithmic_axis_holds_one_and_every_value(values):
    axis = page._Axis.logarithmic(values)
    ticks = [tick for tick, _ in axis.ticks]
    assert 1.0 in ticks and 3 <= len(ticks) <= 8 and ticks == sorted(ticks)
    assert axis.position(ticks[0]) == pytest.approx(0)
    assert axis.position(ticks[-1]) == pytest.approx(1)
    assert all(ticks[0] <= v <= ticks[-1] for v in values if v > 0)


# -------------------------------------------------------------------------- pictures


def test_pictures_hold_exactly_the_pixels_they_were_given():
    from PIL import Image

    figures = _figures()
    sources = [a["src"] for a in _Reader(page.render(_report(), figures)).all("img")]
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
    alts = [a["alt"] for a in _Reader(page.render(_report(), figures)).all("img")]
    assert any("strongest at row 3, column 2" in alt for alt in alts)


def test_lightness_of_the_attention_colours_grows_in_even_steps():
    """Lightness of OKLab (Ottosson 2020), computed here from the sRGB anchors."""
    rgb = np.asarray(page.ATTENTION_ANCHORS, np.float64) / 255
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
    colours = page._coloured(np.array([[0.0, 1.0, 1 / 16]]))
    assert tuple(colours[0, 0]) == page.ATTENTION_ANCHORS[0]
    assert tuple(colours[0, 1]) == page.ATTENTION_ANCHORS[-1]
    middle = np.mean(page.ATTENTION_ANCHORS[:2], axis=0)
    np.testing.assert_allclose(colours[0, 2], middle, atol=1)


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
        (
            {
                "clean_samples": np.zeros((2, 4, 4, 3), np.uint8),
                "triggered_samples": np.zeros((2, 4, 4, 3), np.uint8),
                "sample_captions": ("one",),
            },
            "captions",
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


def test_a_damaged_report_is_refused_before_anything_is_drawn():
    report = _report()
    report["rows"][0]["asr"] = 2.0
    with pytest.raises(InputError, match="asr"):
        page.render(report)


# ---------------------------------------------------------------------------- colours


def _luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    values = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(
        values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
    )
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def _contrast(first, second):
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_marks_stand_out_in_both_modes(mode):
    """WCAG 2.2: 4.5 for text, 3 for what a drawing consists of."""
    light, dark = page._STYLE.split("prefers-color-scheme: dark", 1)
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", light))
    if mode == "dark":
        block = dark[: dark.index("}\n}")]
        colours.update(re.findall(r"--([a-z]+): (#[0-9a-f]+)", block))
    for ground in ("paper", "panel"):
        for name in ("ink", "soft"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("asr", "efrap"):  # these two colour text as well
        assert _contrast(colours[name], colours["paper"]) >= 4.5, name
    for name in ("acc", "time", "reconstruction", "stochastic", "flipped", "other"):
        assert _contrast(colours[name], colours["paper"]) >= 3, name
    for name in ("acc", "asr", "time"):
        assert _contrast(colours[name], colours["track"]) >= 3, name
