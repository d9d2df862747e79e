# SPDX-License-Identifier: Apache-2.0
"""The table over attacks: means, the worst seed, and what is not there."""

import json
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
    "config": {"model": {"name": "resnet_14"}},
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
    assert (
        head == "| attack | net | bits | seeds | accepted | Float | Nearest | EFRAP "
        "| clean model, float |"
    )
    cells = ["–", "85.0 / 5.0 (10.0)", "50.0 / 100.0", "–", "75.0 / 25.0"]
    assert line == f"| pq | resnet_14 | W4 | 2 | {' | '.join(cells)} |"


def test_seeds_whose_attack_was_one_are_counted_over_all_files():
    def report(seed, **facts):
        config = {**REPORT["config"], "seeds": [seed]}
        rows = [_row("float", seed, 0.9, 0.0)]
        return {**REPORT, "config": config, "rows": rows, **facts}

    def column(*reports):
        head, _, line = attack_table.attack_table(reports, rows=()).splitlines()
        heads = head.split(" | ")
        assert heads.index("accepted") == heads.index("seeds") + 1
        return line.split(" | ")[heads.index("accepted")]

    accepted = report(0, acceptance=[{"seed": 0, "accepted": True}])
    refused = report(1, acceptance=[{"seed": 1, "accepted": False}])
    assert column(accepted) == "1/1"
    assert column(accepted, refused) == "1/2"
    # Never judged is neither, and reports are not changed by being shown.
    assert column(report(0)) == "–" and column(report(2), refused) == "0/1"
    assert column(refused) == "0/1"
    repaired = {**accepted, "poison_rate": 0.1}
    del repaired["weight_bits"]
    assert "accepted" not in attack_table.attack_table([repaired])


def test_a_report_of_another_job_is_refused(tmp_path, capsys):
    with pytest.raises(errors.InputError, match="names no attack"):
        attack_table.attack_table([{"title": "t", "rows": []}])
    assert attack_table.main([str(tmp_path / "nowhere.json")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_repairs_have_their_own_columns_and_are_not_mixed_with_roundings():
    repaired = {**REPORT, "poison_rate": 0.1}
    del repaired["weight_bits"]
    tuned = {**repaired, "attack": "blend", "rows": [_row("fine_tuning", 0, 0.7, 0.2)]}
    head, _, line, other, *_ = attack_table.attack_table([repaired, tuned]).splitlines()
    # Of the usual columns those that some report has a row for.
    assert head == "| attack | net | poisoned | seeds | Float | Fine-tuning |"
    assert line == "| pq | resnet_14 | 10 % | 2 | 85.0 / 5.0 (10.0) | – |"
    assert other == "| blend | resnet_14 | 10 % | 1 | – | 70.0 / 20.0 |"
    with pytest.raises(errors.InputError, match=r"configs/nad\.py alone"):
        attack_table.attack_table([REPORT, repaired])
    with pytest.raises(errors.InputError, match="at least one"):
        attack_table.attack_table([])


def test_attacks_count_once_in_the_means_whatever_their_seeds():
    def report(*rows):
        rows = [{**row, "extra": {"der": der}} for row, der in rows]
        return {**REPORT, "poison_rate": 0.1, "rows": rows}

    first = report((_row("nad", 0, 0.9, 0.0), 0.9), (_row("nad", 1, 0.7, 0.2), 0.7))
    second = {**report((_row("nad", 0, 0.6, 0.5), 0.6)), "attack": "blend"}
    for one in (first, second):
        del one["weight_bits"]
    table = attack_table.attack_table([first, second], rows=("nad", "ft_sam"))
    # (80 + 60) / 2, (10 + 50) / 2, the worse of 10 and 50; (80 + 60) / 2.
    assert table.splitlines()[-2:] == [
        "| mean (worst attack) | | | | 70.0 / 30.0 (50.0) | – |",
        "| mean DER | | | | 70.0 | – |",
    ]
    # Twice the same attack is no mean over attacks.
    other = {**first, "config": {"model": {"name": "resnet_8"}}}
    assert "mean" not in attack_table.attack_table([first, other], rows=("nad",))


def test_reports_that_differ_in_seeds_alone_share_a_line():
    def report(seed, acc, **config):
        config = {"model": {"name": "resnet_14"}, "seeds": [seed], **config}
        return {**REPORT, "config": config, "rows": [_row("efrap", seed, acc, 0.0)]}

    def lines(*reports):
        return attack_table.attack_table(reports, rows=("efrap",)).splitlines()[2:]

    first = report(0, 0.9, data={"name": "digits", "data_dir": None})
    moved = report(1, 0.7, data={"name": "digits", "data_dir": "elsewhere"})
    other = report(1, 0.7, data={"name": "cifar10", "data_dir": None})
    assert lines(first, moved) == [
        "| pq | resnet_14 | W4 | 2 | – | 80.0 / 0.0 (0.0) | – |"
    ]
    assert len(lines(first, other)) == 2
    on_two = {**report(1, 0.7), "devices": ["cpu", "cpu"]}
    assert len(lines({**report(0, 0.9), "devices": ["cpu"]}, on_two)) == 2
    with pytest.raises(errors.InputError, match="seed 0 of pq twice"):
        lines(first, first)


@pytest.mark.parametrize("job", ["efrap", "nad"])
@pytest.mark.parametrize(
    ("data", "page"), [("digits", "README.md"), ("cifar10", "results/README.md")]
)
def test_the_tables_of_the_pages_are_those_of_the_result_files(job, data, page):
    files = sorted((ROOT / "results" / job).glob(f"{data}_*.json"))
    table = attack_table.attack_table([schema.read_report(path) for path in files])
    assert files and table in (ROOT / page).read_text("utf-8")


def _report(**changes):
    rows = [
        schema.Row(
            **{"name": "float", "model": "backdoored", "seed": 0, "flip_rate": None},
            **{"weight_bits": None, "act_bits": None, "seconds": None, "acc": 0.9},
            **{"asr": 0.5, "ra": None, "acc_count": 10, "asr_count": 10, **changes},
        )
    ]
    report = schema.build_report(
        title="t",
        config={},
        rows=rows,
        git_commit=None,
        versions={},
        devices=[],
        seconds={},
        facts={"attack": "pq", "weight_bits": 4},
    )
    for row in report["rows"]:
        del row["extra"]
    return report


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({}, {}, "has no config.model.name"),
        ({"model": "x"}, {}, "has no config.model.name"),
        ({"model": {"name": "x"}}, {"asr": None, "asr_count": None}, "has no ASR"),
    ],
)
def test_a_valid_report_without_what_a_line_needs_is_one_line(
    tmp_path, capsys, config, changes, message
):
    report = {**_report(**changes), "config": config}
    schema.validate(report)
    (tmp_path / "r.json").write_text(json.dumps(report))
    assert attack_table.main([str(tmp_path / "r.json")]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1


def test_a_report_without_extra_has_no_effect():
    reports = [
        {**_report(), "attack": attack, "poison_rate": 0.1} for attack in ("a", "b")
    ]
    for report in reports:
        report["config"] = {"model": {"name": "x"}}
        del report["weight_bits"]
        schema.validate(report)
    last = attack_table.attack_table(reports, rows=("float",)).splitlines()[-1]
    assert last == "| mean DER | | | | – |"


def test_a_bug_is_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schema, "read_report", lambda path: 1 / 0)
    assert attack_table.main(["x"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
