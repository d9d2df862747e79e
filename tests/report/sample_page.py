# SPDX-License-Identifier: Apache-2.0
"""Reports and pictures to put on a page, and readers of the page that comes out."""

import html.parser
import re
import xml.etree.ElementTree

import numpy as np

from nad_jax.report import html as page
from nad_jax.report import schema

HOSTILE = (
    "<script>alert('x')</script>\" onload=\"alert(1)\x00\u202e\ud800]]>&amp;</style>"
)
VOID = {"meta", "img", "br"}


def make_row(name, asr, acc=0.99, *, seed=0, model="backdoored", **changes):
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


def make_layer(row, layer, objective, *, nearest=2.0, seed=0, **changes):
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


def make_report(seeds=(0,), **changes):
    names = (("float", 0.0), ("nearest", 1.0), ("stochastic", 0.02), ("efrap", 0.004))
    rows = [
        make_row(name, asr if model == "backdoored" else 0.0, seed=seed, model=model)
        for seed in seeds
        for model in schema.MODELS
        for name, asr in names
    ]
    layers = [
        make_layer(row, layer, 1.0, seed=seed)
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


def make_figures(text="Float", channels=3):
    images = np.arange(2 * 8 * 8 * channels).reshape(2, 8, 8, channels).astype(np.uint8)
    maps = {f"stage1 {text}": np.eye(4, dtype=np.float32), "stage2": np.zeros((2, 2))}
    return page.Figures(
        trigger=images[0],
        clean_samples=images,
        triggered_samples=255 - images,
        attention=(
            (text, images[0], maps),
            ("other", images[1], {"stage2": maps["stage2"]}),
        ),
    )


class Reader(html.parser.HTMLParser):
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


def find_drawings(text):
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
