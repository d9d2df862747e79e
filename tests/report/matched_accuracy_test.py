# SPDX-License-Identifier: Apache-2.0
"""Repairs compared where they are equally accurate: by hand, on made-up reports."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from nad_jax import errors
from nad_jax.report import matched_accuracy, schema

TUNED, NAD = "fine_tuning", "nad"


def _report(attack, rate, *rows, dataset="digits"):
    return {
        "title": "t",
        "attack": attack,
        "dataset": dataset,
        "config": {"defense": {"training": {"learning_rate": rate}}},
        "rows": [
            {
                "name": name,
                "seed": seed,
                "acc": acc,
                "asr": asr,
                "model": "backdoored",
                "extra": {"held_out_acc": held_out},
            }
            for name, seed, acc, asr, held_out in rows
        ],
    }


# Fine-tuning goes from (0.98, 0.8) to (0.94, 0.2): a point of ACC costs 15 of ASR.
REPORTS = [
    _report(
        "sig",
        0.1,
        (TUNED, 0, 0.98, 0.7, 0.98),
        (TUNED, 1, 0.98, 0.9, 0.96),
        (NAD, 0, 0.97, 0.25, 0.95),
        (NAD, 1, 0.97, 0.35, 0.95),
    ),
    _report(
        "sig",
        0.2,
        (TUNED, 0, 0.95, 0.2, 0.96),
        (TUNED, 1, 0.93, 0.2, 0.90),
        (NAD, 0, 0.93, 0.1, 0.90),
        (NAD, 1, 0.91, 0.1, 0.94),
    ),
]


def _found(*reports):
    return matched_accuracy.points(reports or REPORTS)


def _with(report, **defense):
    defense = {**report["config"]["defense"], **defense}
    return {**report, "config": {"defense": defense}}


def test_one_factor_of_the_rate_is_part_of_it():
    (point,) = {p.learning_rate for p in _found(_with(REPORTS[1], rate_factors=[0.5]))}
    assert point == 0.1


def test_attacks_count_once_however_many_of_their_points_can_be_compared():
    other = [
        _report("blend", 0.1, (TUNED, 0, 0.98, 0.5, 1.0), (NAD, 0, 0.98, 0.7, 1.0)),
        _report("blend", 0.2, (TUNED, 0, 0.94, 0.5, 1.0), (NAD, 0, 0.94, 0.7, 1.0)),
    ]
    told = matched_accuracy.text(_found(*REPORTS, *other), reference=TUNED, within=0.0)
    line = told.splitlines()[-1].split(" | ")
    # Sig's one point is 35 lower, both of Blend's are 20 higher.
    assert line == ["| NAD", "-7.5", "+20.0", "-35.0", "3 |"]


def test_asr_is_compared_at_the_accuracy_that_both_have():
    corners = [(0.94, 0.2), (0.98, 0.8)]
    assert matched_accuracy.asr_at(0.97, corners) == pytest.approx(0.65)
    assert matched_accuracy.asr_at(0.98, corners[::-1]) == pytest.approx(0.8)
    assert matched_accuracy.asr_at(0.94 - 1e-12, corners) == pytest.approx(0.2)
    assert matched_accuracy.asr_at(0.98, [*corners, (0.98, 0.6)]) == pytest.approx(0.7)
    for outside in (0.939, 0.981):
        assert matched_accuracy.asr_at(outside, corners) is None
    # NAD's mean ASR at 0.97 is 0.3; at 0.92 fine-tuning never is.
    gaps = matched_accuracy.differences(_found(), row=NAD, reference=TUNED)
    assert gaps == {"sig": [pytest.approx(0.3 - 0.65)]}
    of_itself = matched_accuracy.differences(_found(), row=TUNED, reference=TUNED)
    assert of_itself == {"sig": [pytest.approx(0.0), pytest.approx(0.0)]}


def test_another_attack_is_compared_with_itself_only():
    other = _report("blend", 0.1, (NAD, 0, 0.97, 0.9, 1.0))
    gaps = matched_accuracy.differences(
        _found(*REPORTS, other), row=NAD, reference=TUNED
    )
    assert gaps["blend"] == [] and len(gaps["sig"]) == 1


def test_the_fastest_rate_that_held_out_images_allow_is_taken():
    found = _found()

    def rate(row, seed, within):
        own = [p for p in found if (p.row, p.seed) == (row, seed)]
        return matched_accuracy.chosen(own, within=within).learning_rate

    # 0.96 of 0.98: within 0.02, whatever binary fractions make of it.
    assert rate(TUNED, 0, 0.02) == 0.2 and rate(TUNED, 0, 0.01) == 0.1
    assert rate(TUNED, 1, 0.02) == 0.1 and rate(TUNED, 1, 1.0) == 0.2
    assert rate(NAD, 1, 0.02) == 0.2


def test_the_tables_show_means_over_seeds():
    told = matched_accuracy.text(_found(), reference=TUNED, within=0.02)
    by_rate, by_held_out, equal = (
        [line.split(" | ") for line in table.splitlines()]
        for table in told.split("\n\n")
    )
    assert by_rate[0][1:] == ["0.1", "0.2 |"]
    assert by_rate[2] == ["| Fine-tuning", "98.0 / 80.0", "94.0 / 20.0 |"]
    # Seed 0 takes 0.2, seed 1 stays at 0.1.
    assert by_held_out[2][1:] == ["96.5 / 55.0", "96.5 / 55.0", "0.1: 1, 0.2: 1 |"]
    assert equal[3][1:] == ["-35.0", "-35.0", "1 |"]


def test_a_mean_over_attacks_is_of_all_attacks():
    other = _report("blend", 0.1, (TUNED, 0, 0.96, 0.4, 1.0))  # Never at 0.2.
    told = matched_accuracy.text(_found(*REPORTS, other), reference=TUNED, within=0.0)
    line = told.splitlines()[2].split(" | ")
    assert line == ["| Fine-tuning", "97.0 / 60.0 (80.0)", "– |"]


def test_what_cannot_be_compared_is_refused():
    for reports, message in (
        ([{**REPORTS[0], "config": {}}], "none of configs/nad.py"),
        ([REPORTS[0], _report("sig", 0.2, dataset="cifar10")], "of one data set"),
        ([REPORTS[0], REPORTS[0]], "two reports hold fine_tuning of sig"),
        ([_report("sig", 0.2, (NAD, 0, 0.9, 0.1, None))], "has no held_out_acc"),
        ([REPORTS[0], _with(REPORTS[1], epochs=3)], "in their learning rate alone"),
        ([_with(REPORTS[1], rate_factors=[1.0, 2.0])], "rate_factors must be one"),
        (
            [REPORTS[0], _report("sig", 0.2, (NAD, 1, 0.9, 0.1, 1.0))],
            r"nad of sig must have the same seeds .* \[0, 1\] at 0.1 and \[1\] at 0.2",
        ),
        ([_report("sig", 0.2, (NAD, 0, 0.9, None, 1.0))], "has no ASR"),
        ([_report("sig", 0.2, ("float", 0, 0.9, 0.1, 1.0))], "no repair"),
    ):
        with pytest.raises(errors.InputError, match=message):
            matched_accuracy.points(reports)


def test_the_command_prints_draws_and_refuses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schema, "read_report", lambda path: json.loads(path))
    files = [json.dumps(report) for report in REPORTS]
    drawing = tmp_path / "drawing.svg"
    assert matched_accuracy.main([*files, f"--drawing={drawing}"]) == 0
    assert "| NAD | -35.0" in capsys.readouterr().out
    tree = ElementTree.parse(drawing)
    kinds = [element.tag.rpartition("}")[2] for element in tree.iter()]
    assert kinds.count("circle") == 4 and kinds.count("path") == 1 + 2
    for wrong in (
        "--within=2",
        "--reference=ft_sam",
        f"--drawing={tmp_path / 'none' / 'drawing.svg'}",
    ):
        assert matched_accuracy.main([*files, wrong]) == 2
        said = capsys.readouterr().err
        assert said.startswith("nad_jax: ") and said.count("\n") == 1
