# SPDX-License-Identifier: Apache-2.0
"""The table over attacks: means, the worst seed, and what is not there."""

import pathlib

import pytest

from nad_jax import errors
from nad_jax.report import attack_table, schema

ROOT = pathlib.Path(__file__).parents[2]


def _row(name, seed, acc, asr, model="backdoored"):
    return {"name": name, "seed": seed, "acc": acc, "asr": asr, "model": model}


REPORT = {
    "attack": "pq",
    "weight_bits": 4,
    "rows": [
        _row("float", 0, 0.9, 0.0),
        _row("float", 1, 0.8, 0.1),
        _row("nearest", 0, 0.5, 1.0),
        _row("float", 0, 0.75, 0.25, model="clean"),
    ],
}


def test_cells_are_means_and_the_worst_of_several_seeds():
    table = attack_table.attack_table([REPORT], rows=("float", "nearest", "efrap"))
    head, _, line = table.splitlines()
    assert head == "| attack | bits | Float | Nearest | EFRAP | clean model, float |"
    cells = ["85.0 / 5.0 (10.0)", "50.0 / 100.0", "–", "75.0 / 25.0"]
    assert line == f"| pq | W4 | {' | '.join(cells)} |"


def test_a_report_of_another_job_is_refused(tmp_path, capsys):
    with pytest.raises(errors.InputError, match="names no attack"):
        attack_table.attack_table([{"title": "t", "rows": []}])
    assert attack_table.main([str(tmp_path / "nowhere.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_table_of_the_readme_is_that_of_the_result_files():
    files = sorted((ROOT / "results" / "efrap").glob("digits_*_w4.json"))
    table = attack_table.attack_table([schema.read_report(path) for path in files])
    assert len(files) >= 3 and table in (ROOT / "README.md").read_text("utf-8")
