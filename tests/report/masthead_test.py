# SPDX-License-Identifier: Apache-2.0
"""A top of the page that says what the rows show."""

import sample_page as sample

from nad_jax.report import html as page
from nad_jax.report import tables


def test_the_headline_is_on_the_page():
    report = sample.make_report()
    text = sample.Reader(page.render(report)).text
    assert tables.headline(report["rows"]).replace("\u202f", " ") in text


def test_without_a_trigger_there_is_no_tile():
    rows = [sample.make_row("float", None), sample.make_row("efrap", None)]
    assert 'class="tiles"' in page.render(sample.make_report())
    assert 'class="tiles"' not in page.render(sample.make_report(rows=rows, layers=[]))


def test_claims_are_told_in_words_not_by_colour_alone():
    text = sample.Reader(page.render(sample.make_report())).text
    assert "Holds: one" in text and "Does not hold: two" in text
