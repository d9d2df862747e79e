# SPDX-License-Identifier: Apache-2.0
"""Curves by epoch: drawn where the numbers are, and readable as numbers."""

import pytest
import sample_page as sample

from nad_jax.errors import InputError
from nad_jax.report import html as page

CURVE = {
    "seed": 0,
    "model": "backdoored",
    "row": "nad",
    "acc": [1.0, 0.5, 0.75],
    "asr": [1.0, 0.25, None],
}


def _lines(text, css):
    drawings = sample.find_drawings(text)
    (drawing,) = [d for d in drawings if "epochs 0 to 2" in str(d.attrib)]
    lines = [e for e in drawing.iter() if e.get("class") == css]
    return [[line.get(k) for k in ("x1", "y1", "x2", "y2")] for line in lines]


def test_a_line_goes_through_its_values():
    """From epoch 0 at the left to the last at the right; 1 is at 14, 0 at 116."""
    text = page.render(sample.make_report(curves=[CURVE]))
    assert _lines(text, "curve acc") == [
        ["0.000%", "14.0", "50.000%", "65.0"],
        ["50.000%", "65.0", "100.000%", "39.5"],
    ]
    assert _lines(text, "curve asr") == [["0.000%", "14.0", "100.000%", "90.5"]]


def test_the_numbers_are_on_the_page_as_text():
    reader = sample.Reader(page.render(sample.make_report(curves=[CURVE])))
    assert "ACC 100.0 50.0 75.0" in reader.text
    assert "Epoch by epoch" in reader.text
    bare = sample.Reader(page.render(sample.make_report()))
    assert "Epoch by epoch" not in bare.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"acc": [0.5]}, r"curves\[0\] has 1 values of acc and 3 of asr"),
        ({"acc": [2.0, 0.0, 0.0]}, r"curves\[0\].acc\[0\] is 2.0"),
        ({"model": "other"}, r"curves\[0\].model"),
    ],
)
def test_a_damaged_curve_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        sample.make_report(curves=[{**CURVE, **change}])
