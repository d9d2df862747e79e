# SPDX-License-Identifier: Apache-2.0
"""Rows, their check, their means, and files that are whole or not there."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest

from nad_jax import whole_file
from nad_jax.errors import InputError
from nad_jax.report import schema


def _row(**changes):
    row = {
        "name": "nearest",
        "model": "backdoored",
        "seed": 0,
        "weight_bits": 4,
        "act_bits": None,
        "acc": 0.98,
        "asr": 0.9,
        "ra": 0.05,
        "acc_count": 500,
        "asr_count": 450,
        "flip_rate": 0.0,
        "seconds": 0.5,
        "extra": {},
    }
    return {**row, **changes}


_POINT = {"flip_weight": 0.1, "output_error": 2.0, "flip_rate": 0.5}


def _report(**changes):
    report = {
        "schema": schema.SCHEMA,
        "title": "A run",
        "config": {"seed": 0, "model": {"width": 16}},
        "git_commit": "abc",
        "versions": {"jax": "0.10.1"},
        "devices": ["cpu"],
        "seconds": {"data": 1.5},
        "rows": [_row()],
        "layers": [
            {
                "seed": 0,
                "row": "efrap",
                "layer": "stem",
                "shape": [3, 3, 3, 16],
                "flip_rate": 0.5,
                "objective_nearest": 2.0,
                "objective": 1.0,
                "seconds": 0.1,
            }
        ],
        "claims": [{"text": "it holds", "passed": True}],
        "notes": ["a note"],
    }
    return {**report, **changes}


def _without(mapping, key):
    return {k: v for k, v in mapping.items() if k != key}


def test_a_complete_report_is_accepted():
    schema.validate(_report())


@pytest.mark.parametrize(
    "key", ["schema", "config", "git_commit", "versions", "devices", "seconds", "rows"]
)
def test_each_required_key_is_missed_by_name(key):
    with pytest.raises(InputError, match=key):
        schema.validate(_without(_report(), key))


@pytest.mark.parametrize("key", ["title", "layers", "claims", "notes"])
def test_what_a_report_need_not_have_may_be_absent(key):
    schema.validate(_without(_report(), key))


@pytest.mark.parametrize("key", [k for k in _row() if k != "extra"])
def test_each_field_of_a_row_is_missed_by_name(key):
    with pytest.raises(InputError, match=rf"rows\[0\] lacks '{key}'"):
        schema.validate(_report(rows=[_without(_row(), key)]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 3),
        ("name", ""),
        ("model", "poisoned"),
        ("seed", 0.5),
        ("seed", True),
        ("weight_bits", 0),
        ("weight_bits", "4"),
        ("act_bits", 4.0),
        ("acc", None),
        ("acc", 98.0),
        ("acc", -0.01),
        ("acc", math.nan),
        ("acc", "0.9"),
        ("acc", True),
        ("acc_count", -1),
        ("acc_count", 0),
        ("acc_count", 500.0),
        ("asr", 1.0001),
        ("asr_count", None),
        ("asr_count", 0),
        ("ra", 0.2),  # 0.9 + 0.2 > 1: no image can be both
        ("flip_rate", 2),
        ("seconds", -1.0),
        ("seconds", math.inf),
        ("extra", []),
    ],
)
def test_an_impossible_row_is_refused_in_one_line_that_names_the_field(key, value):
    with pytest.raises(InputError) as caught:
        schema.validate(_report(rows=[_row(), _row(**{"seed": 1, key: value})]))
    message = str(caught.value)
    assert "rows[1]" in message and key in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("schema", "nad_jax.report/0"),
        ("config", "efrap"),
        ("git_commit", 5),
        ("title", ["a"]),
        ("versions", {"jax": 0.1}),
        ("devices", "cpu"),
        ("devices", [0]),
        ("seconds", {"data": -1}),
        ("rows", []),
        ("rows", {}),
        ("rows", [[]]),
        *(
            ("layers", [{**_report()["layers"][0], **wrong}])
            for wrong in (
                {"objective_descent": -1.0},
                {"soft_output_error": -1.0},
                {"hard_output_error": "1"},
                {"trace": 1.0},
                {"trace": [2.0, None]},
                {"converged": 1},
            )
        ),
        *(
            ("layers", [{**_report()["layers"][0], "path": [{**_POINT, **wrong}]}])
            for wrong in (
                {"flip_weight": -0.1},
                {"output_error": None},
                {"flip_rate": 1.5},
            )
        ),
        ("layers", [{"seed": 0}]),
        ("claims", [{"text": "x", "passed": 1}]),
        ("acceptance", {"seed": 0, "accepted": True}),
        ("acceptance", [{"seed": 0, "accepted": 1}]),
        ("acceptance", [{"accepted": True}]),
        ("acceptance", [{"seed": 0, "accepted": True}] * 2),
        ("notes", "one"),
        ("notes", [None]),
    ],
)
def test_an_ill_typed_report_is_refused(key, value):
    with pytest.raises(InputError, match=key):
        schema.validate(_report(**{key: value}))


@pytest.mark.parametrize("value", [None, [], "text", 3])
def test_what_is_not_a_mapping_is_no_report(value):
    with pytest.raises(InputError, match="mapping"):
        schema.validate(value)


def test_a_row_without_a_known_trigger_is_accepted():
    schema.validate(_report(rows=[_row(asr=None, ra=None, asr_count=None)]))
    schema.validate(_report(rows=[_row(asr=None, ra=None, asr_count=0)]))


def test_the_same_measurement_twice_is_refused():
    with pytest.raises(InputError, match="twice"):
        schema.validate(_report(rows=[_row(), _row(acc=0.5)]))
    layers = _report()["layers"] * 2
    with pytest.raises(InputError, match="twice"):
        schema.validate(_report(layers=layers))


def test_validate_changes_nothing():
    report = _report()
    before = copy.deepcopy(report)
    schema.validate(report)
    assert report == before


# ------------------------------------------------------------------------------ rows


def test_a_row_survives_the_way_to_json_and_back():
    row = schema.Row(**_row(extra={"draws": 5}))
    again = schema.Row.from_dict(json.loads(json.dumps(row.to_dict())))
    assert again == row


def test_numpy_scalars_become_plain_numbers():
    row = schema.Row(
        **_row(acc=np.float32(0.5), acc_count=np.int64(4), seed=np.int32(3))
    )
    assert type(row.acc) is float and type(row.acc_count) is int
    assert type(row.seed) is int


def test_a_row_checks_itself_and_cannot_be_changed():
    with pytest.raises(InputError, match="asr"):
        schema.Row(**_row(asr=1.5))
    with pytest.raises(dataclasses.FrozenInstanceError):
        schema.Row(**_row()).acc = 0.1  # pyright: ignore


def test_keys_a_row_does_not_know_are_kept_as_extra():
    row = schema.Row.from_dict(_row(draws=5, extra={"rho": 0.1}))
    assert row.extra == {"draws": 5, "rho": 0.1}


def test_build_report_makes_something_valid_and_plain():
    report = schema.build_report(
        title="t",
        config={"widths": (16, 32), "rate": np.float32(0.5)},
        rows=[schema.Row(**_row())],
        git_commit=None,
        versions={},
        devices=("cpu",),
        seconds={"all": np.float64(2.0)},
    )
    schema.validate(report)
    assert report["config"] == {"widths": [16, 32], "rate": 0.5}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


# ----------------------------------------------------------------------- aggregation


def test_mean_and_sample_deviation_are_those_computed_by_hand():
    """0.90, 0.92, 0.97: mean 0.93; squares 9, 1, 16 e-4; 26e-4 / 2 = 13e-4."""
    rows = [_row(seed=i, acc=a) for i, a in enumerate((0.90, 0.92, 0.97))]
    (group,) = schema.aggregate(rows)
    assert group.n == 3
    assert group.stats["acc"].mean == pytest.approx(0.93, abs=1e-12)
    assert group.stats["acc"].std == pytest.approx(math.sqrt(13e-4), abs=1e-12)
    assert group.stats["acc"].n == 3
    assert group.counts("acc_count") == (500, 500, 500)


def test_one_seed_has_a_mean_but_no_deviation():
    (group,) = schema.aggregate([_row()])
    assert group.stats["acc"] == schema.Stat(0.98, None, 1)


def test_seeds_without_a_value_are_left_out_of_mean_and_count():
    unknown = {"asr": None, "ra": None, "asr_count": None}
    rows = [_row(seed=0, asr=0.2), _row(seed=1, **unknown), _row(seed=2, asr=0.4)]
    (group,) = schema.aggregate(rows)
    assert group.stats["asr"].mean == pytest.approx(0.3)
    assert group.stats["asr"].n == 2
    (none,) = schema.aggregate([_row(**unknown)])
    assert none.stats["asr"] == schema.Stat(None, None, 0)


def test_groups_come_in_first_seen_order_and_differ_by_model_name_and_bits():
    rows = [
        _row(name="nearest"),
        _row(name="efrap"),
        _row(name="nearest", model="clean"),
        _row(name="nearest", weight_bits=8),
        _row(name="nearest", act_bits=8),
        _row(name="efrap", seed=1),
    ]
    groups = schema.aggregate(rows)
    assert [(g.name, g.model, g.weight_bits, g.act_bits, g.n) for g in groups] == [
        ("nearest", "backdoored", 4, None, 1),
        ("efrap", "backdoored", 4, None, 2),
        ("nearest", "clean", 4, None, 1),
        ("nearest", "backdoored", 8, None, 1),
        ("nearest", "backdoored", 4, 8, 1),
    ]


def test_a_seed_that_is_there_twice_does_not_count_twice():
    with pytest.raises(InputError, match="twice for seed 0"):
        schema.aggregate([_row(), _row(acc=0.1)])


# ----------------------------------------------------------------------------- files


def test_what_is_written_is_read_back(tmp_path):
    path = tmp_path / "report.json"
    report = _report(title="Zürich \u202e \ud800 <b>")
    whole_file.write_json(path, report)
    assert schema.read_report(path) == report


def test_numpy_values_and_paths_become_plain(tmp_path):
    value = {1: np.arange(3), "b": np.bool_(True), "p": tmp_path, "s": np.float32(0.25)}
    plain = {"1": [0, 1, 2], "b": True, "p": str(tmp_path), "s": 0.25}
    assert schema.plain(value) == plain


@pytest.mark.parametrize(
    "bad", [math.nan, math.inf, -math.inf, np.float32("nan"), np.array([1.0, np.inf])]
)
def test_numbers_that_json_does_not_have_are_refused(bad):
    with pytest.raises(InputError, match=r"value\.a\[1\]"):
        schema.plain({"a": [0, bad]})


@pytest.mark.parametrize("bad", [{1.5: 0}, {None: 0}, object(), b"bytes", {1, 2}])
def test_types_that_json_does_not_have_are_refused(bad):
    with pytest.raises(InputError):
        schema.plain(bad)


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2", '{"a": NaN}', "\x00", "[" * 100_000]
)
def test_a_damaged_file_is_one_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(InputError, match="not a JSON file") as caught:
        schema.read_report(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_or_no_report_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        schema.read_report(tmp_path / "none.json")
    path = tmp_path / "other.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"other\.json.*schema"):
        schema.read_report(path)
