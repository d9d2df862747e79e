# SPDX-License-Identifier: Apache-2.0
"""Medians, ratios, floors and the file they go to."""

import json

import pytest

from benchmarks import erase_recipes, floors, results
from nad_jax import errors


def test_a_ratio_is_their_time_over_ours_of_medians():
    row = results.row(
        "step",
        variant="shipped",
        ours_variant="plain",
        ours=[2.0, 9.0, 1.0],
        theirs=[6.0, 5.0, 7.0],
    )
    assert row["ours_seconds"] == 2.0 and row["theirs_seconds"] == 6.0
    assert row["ratio"] == 3.0
    assert row["spread"] == {"ours": 4.0, "theirs": pytest.approx(1 / 3)}
    assert row["runs"] == {"ours": [2.0, 9.0, 1.0], "theirs": [6.0, 5.0, 7.0]}


def test_memory_is_ours_over_theirs_and_distance_is_to_the_floor():
    row = results.row(
        "step",
        variant="shipped",
        ours_variant="plain",
        ours=[4.0],
        theirs=[6.0],
        ours_peak_bytes=100,
        theirs_peak_bytes=400,
        floor_seconds=2.0,
    )
    assert row["memory_ratio"] == 0.25
    assert row["ours_distance"] == 2.0 and row["theirs_distance"] == 3.0


def test_a_file_holds_the_rows_and_is_replaced_as_a_whole(tmp_path):
    row = results.row("a", variant="b", ours_variant="c", ours=[1.0], theirs=[2.0])
    path = tmp_path / "deep" / "a.json"
    results.write(path, results.document([row], facts={"machine": "m"}))
    stored = json.loads(path.read_text("utf-8"))
    assert stored["cases"] == [row] and stored["machine"] == "m"
    with pytest.raises(errors.InputError):
        results.write(path, {"cases": [float("nan")]})
    assert json.loads(path.read_text("utf-8")) == stored


def test_the_table_marks_what_was_extrapolated():
    row = results.row(
        "a", variant="loop", ours_variant="c", ours=[1.0], theirs=[2.0]
    ) | {"extrapolated": True}
    assert "loop (extrapolated)" in results.table([row])


def test_the_operations_of_resnet_18_are_the_published_ones():
    """0.555 billion multiply-adds for an image of 32 x 32 pixels."""
    assert floors.forward("resnet_18", 1).operations == pytest.approx(
        2 * 0.5554e9, 1e-3
    )


def test_a_training_pass_is_three_forward_passes_without_one_gradient():
    """The images need no gradient: 2 * 1024 * 27 * 16 operations an image less."""
    forward, training = (f("wrn_16_1", 8) for f in (floors.forward, floors.training))
    stem = 8 * 2 * 1024 * 27 * 16
    assert training.operations == 3 * forward.operations - stem
    distillation = floors.distillation("wrn_16_1", 8)
    assert distillation.operations == training.operations + forward.operations


def test_the_floor_is_the_slower_of_arithmetic_and_memory():
    work = floors.Work(operations=100, bytes=30)
    assert work.seconds(operations_per_second=10.0, bytes_per_second=10.0) == 10.0
    assert work.seconds(operations_per_second=100.0, bytes_per_second=10.0) == 3.0


def test_seeds_are_summed_up_by_what_tells_entries_apart():
    entries = [
        {"recipe": "a", "seed": 0, "acc": 0.9, "asr": 0.1},
        {"recipe": "a", "seed": 1, "acc": 0.7, "asr": 0.3},
        {"recipe": "b", "seed": 0, "acc": 0.5, "asr": 0.0},
    ]
    first, second = results.over_seeds(entries, by=("recipe",))
    assert (first["recipe"], first["seeds"]) == ("a", 2)
    assert first["acc"] == {
        "mean": pytest.approx(0.8),
        "std": pytest.approx(0.02**0.5),
        "worst": 0.7,
    }
    assert first["asr"]["worst"] == 0.3
    assert second["acc"] == {"mean": 0.5, "std": None, "worst": 0.5}


@pytest.mark.parametrize("recipe", ["3", "3+", "3+5/", "a+b", "3+5/4/2"])
def test_a_recipe_that_is_none_is_refused(recipe):
    with pytest.raises(SystemExit, match="a recipe is like"):
        erase_recipes._parse(recipe)


def test_a_recipe_says_epochs_and_views():
    assert erase_recipes._parse("3+5") == (3, 5, 0)
    assert erase_recipes._parse("10+20/4") == (10, 20, 4)
