# SPDX-License-Identifier: Apache-2.0
"""Rows in order, with what they are, their deviation and their counts."""

import sample_page as sample

from nad_jax.report import html as page


def test_the_numbers_of_the_table_are_on_the_page():
    text = sample.Reader(page.render(sample.make_report())).text
    assert "495 of 500" in text and "450 of 450" in text
    assert "9 of 450" in text  # 0.02 of 450


def test_a_share_that_is_itself_a_mean_is_not_turned_into_a_count():
    rows = [sample.make_row("stochastic", 0.0031)]  # 1.395 of 450 images
    text = sample.Reader(page.render(sample.make_report(rows=rows))).text
    assert "of 450" in text and "1 of 450" not in text


def test_a_mean_over_draws_tells_the_worst_draw_of_any_seed():
    rows = [
        sample.make_row("noise", 0.2, seed=i, extra={"asr_draws": draws})
        for i, draws in enumerate(([0.1, 0.3], [0.0, 0.413]))
    ]
    text = sample.Reader(page.render(sample.make_report(rows=rows, layers=[]))).text
    assert "mean over draws, in the worst 41.3 % ASR" in text
    rows = [sample.make_row("noise", None, extra={"asr_draws": [None, None]})]
    text = sample.Reader(page.render(sample.make_report(rows=rows, layers=[]))).text
    assert "mean over draws" in text and "in the worst" not in text


def test_several_seeds_show_deviation_and_single_points():
    """0.98, 0.99, 1.00: 99.0 plus or minus 1.0."""
    rows = [sample.make_row("efrap", 0.0, 0.98 + 0.01 * i, seed=i) for i in range(3)]
    text = page.render(sample.make_report(rows=rows, layers=[]))
    assert "99.0 ± 1.0" in sample.Reader(text).text
    assert "1,485 of 1,500" in sample.Reader(text).text
    points = [p.get("cx") for d in sample.find_drawings(text) for p in d.iter("circle")]
    assert points[:3] == ["98.000%", "99.000%", "100.000%"]
    alone = page.render(sample.make_report(rows=rows[:1], layers=[]))
    assert "±" not in sample.Reader(alone).text.split("What the numbers mean")[0]
    assert not [p for d in sample.find_drawings(alone) for p in d.iter("circle")]


def test_clean_rows_stand_apart_and_after_the_backdoored_ones():
    rows = [sample.make_row("float", 0.0, model="clean"), sample.make_row("float", 0.0)]
    text = sample.Reader(page.render(sample.make_report(rows=rows, layers=[]))).text
    assert text.index("Backdoored model") < text.index("Clean model:")


def test_controls_say_what_they_are_and_a_row_may_say_it_itself():
    rows = [
        sample.make_row("stochastic", 0.0),
        sample.make_row("x", 0.0, extra={"description": "my own"}),
    ]
    text = sample.Reader(page.render(sample.make_report(rows=rows, layers=[]))).text
    assert "control: up or down by chance" in text and "my own" in text


def test_without_a_trigger_there_is_no_attack_bar():
    rows = [sample.make_row("float", None), sample.make_row("efrap", None)]
    text = page.render(sample.make_report(rows=rows, layers=[]))
    assert 'class="bar asr"' not in text and 'class="bar acc"' in text
    assert "Attack success on triggered images" not in text
