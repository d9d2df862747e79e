# SPDX-License-Identifier: Apache-2.0
"""Layers whose means are right and whose marks stay apart and inside."""

import re

import pytest
import sample_page as sample

from nad_jax.report import html as page


def test_layer_ratios_are_geometric_means_over_seeds():
    """1/2 and 2/1 have the geometric mean 1 (the arithmetic one is 1.25)."""
    layers = [
        sample.make_layer("efrap", "stem", 1.0, nearest=2.0, seed=0),
        sample.make_layer("efrap", "stem", 2.0, nearest=1.0, seed=1),
    ]
    text = page.render(sample.make_report((0, 1), layers=layers))
    table = text[text.index('class="numbers"') :]
    assert "<td>1</td>" in table and "<td>50.0</td>" in table


def test_what_hardening_costs_and_what_converged_is_shown_where_it_is_known():
    """3/2 and 6/1 have the geometric mean 3; one of two seeds converged."""
    layers = [
        sample.make_layer("adam", "stem", 1.0, seed=seed, **errors)
        for seed, errors in enumerate(
            (
                {"soft_output_error": 2.0, "hard_output_error": 3.0},
                {"soft_output_error": 1.0, "hard_output_error": 6.0},
            )
        )
    ]
    layers += [
        sample.make_layer("efrap", name, 1.0, seed=seed, converged=converged)
        for name, ends in {"stem": (True, False), "head": (True, True)}.items()
        for seed, converged in enumerate(ends)
    ]
    layers += [
        sample.make_layer("reconstruction", "stem", 1.0, seed=0, converged=False)
    ]
    text = page.render(sample.make_report((0, 1), layers=layers))
    table = text[text.index('class="numbers"') :]
    table = table[: table.index("</table>")]
    assert "relative to before" in table
    usual = ["flips %", "objective", "s"]
    heads = re.findall('scope="col">(.*?)</th>', table)
    assert heads == [*usual, "hard/soft", *usual, "converged", *usual, "converged"]
    assert re.findall('colspan="(.)"', table) == ["4", "4", "4"]
    stem, head = (
        re.findall("<td>(.*?)</td>", line)[1:]
        for line in table.split("<tr>")
        if 'scope="row"' in line
    )
    usual = ["50.0", "0.5", "0.2"]
    assert stem == [*usual, "3", *usual, "1/2", *usual, "no"]
    assert head == ["–"] * 4 + [*usual, "yes"] + ["–"] * 4
    plain = page.render(sample.make_report(layers=[sample.make_layer("efrap", "a", 1)]))
    assert "hard/soft" not in plain and "converged" not in plain


def test_other_flip_weights_are_told_by_their_cost():
    """Errors 2 -> 4 and 1 -> 8: geometric mean 4. 4 and 2 of 12 weights: 50 %."""
    layers = []
    for name, shape, errors, flips in (
        ("stem", [2, 2], (2.0, 4.0), (0.0, 1.0)),
        ("head", [4, 2], (1.0, 8.0), (0.0, 0.25)),
    ):
        path = [
            {"flip_weight": w, "output_error": e, "flip_rate": f}
            for w, e, f in zip((0.0, 0.03), errors, flips, strict=True)
        ]
        layers.append(sample.make_layer("efrap", name, 1.0, shape=shape, path=path))
    text = page.render(sample.make_report(layers=layers))
    table = text[text.index("What other flip weights") :]
    cells = re.findall("<td>(.*?)</td>", table[: table.index("</table>")])
    assert cells == ["EFRAP", "0", "0.0", "1", "EFRAP", "0.03", "50.0", "4"]
    plain = page.render(sample.make_report(layers=[sample.make_layer("efrap", "a", 1)]))
    assert "What other flip weights" not in plain


@pytest.mark.parametrize("objective", [None, 0.0, 1e-30, 1e30])
@pytest.mark.parametrize("nearest", [None, 0.0, 1.0])
def test_odd_objectives_are_drawn_inside_or_not_at_all(objective, nearest):
    layers = [sample.make_layer("efrap", "stem", objective, nearest=nearest)]
    text = page.render(sample.make_report(layers=layers))
    places = [
        float(mark.get("x", "0%").rstrip("%"))
        for drawing in sample.find_drawings(text)
        for mark in drawing.iter("svg")
    ]
    assert places and all(0 <= place <= 100 for place in places)


def test_series_differ_in_shape_and_colour():
    layers = [sample.make_layer(f"row {i}", "stem", 1.0) for i in range(8)]
    layers += [
        sample.make_layer(n, "stem", 1.0) for n in ("efrap", "stochastic", "flipped")
    ]
    text = page.render(sample.make_report(layers=layers))
    legend = text[text.index('class="legend"') :]
    marks = re.findall(
        r'<path d="(.*?)" class="(.*?)"', legend[: legend.index("</ul>")]
    )
    assert len(marks) == len(set(marks)) == 11
