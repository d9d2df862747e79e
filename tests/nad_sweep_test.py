# SPDX-License-Identifier: Apache-2.0
"""The sweep: what a cell says, and that finished cells are not run again."""

import dataclasses
import json
import os
import signal
import time
import xml.etree.ElementTree

import numpy as np
import pytest

from nad_jax import nad_experiment, nad_sweep, settings
from nad_jax.report import sweep_figure


def _report(rates):
    """Rates: row name -> (acc, asr) by seed."""
    rows = [
        {"model": "backdoored", "name": name, "seed": seed, "acc": acc, "asr": asr}
        for name, pairs in rates.items()
        for seed, (acc, asr) in enumerate(pairs)
    ]
    facts = {"attack": "blend", "dataset": "d", "poison_rate": 0.1}
    return {**facts, "clean_fraction": 0.05, "rows": rows}


def _cell():
    return nad_sweep.cell(
        _report(
            {
                "nad": [(0.75, 0.25), (0.5, 0.0)],
                "fine_tuning": [(0.5, 0.5), (0.5, 1.0)],
                "float": [(1.0, 1.0), (1.0, 1.0)],
            }
        )
    )


def test_differences_are_paired_by_seed():
    cell = _cell()
    assert cell["difference"]["asr"]["mean"] == (-0.25 - 1.0) / 2
    assert cell["difference"]["asr"]["std"] == pytest.approx(0.75 / 2**0.5)
    assert cell["difference"]["acc"]["mean"] == 0.125
    assert cell["seeds"] == [0, 1] and cell["float"]["asr"] == [1.0, 1.0]


def test_the_drawing_puts_a_gain_on_the_better_side():
    root = xml.etree.ElementTree.fromstring(sweep_figure.draw([_cell()]))
    space = "{http://www.w3.org/2000/svg}"
    asr, acc = root.iter(f"{space}circle")
    zero = [e for e in root.iter(f"{space}line") if e.get("stroke") == "black"]
    assert float(asr.get("cx")) < float(zero[0].get("x1"))
    assert float(acc.get("cx")) > float(zero[1].get("x1"))
    assert asr.get("fill") == acc.get("fill") == "#0072b2"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--variant=huge", "variant must be"),
        ("--poison_rates=2", "poison_rate must"),
        ("--data_dir=here", "config.data.data_dir must be None for digits"),
        ("--clean_fractions=0.1,7", "clean_fraction must be in (0, 1], got 7.0"),
        ("--poison_rates=0.1,0.10000001", "badnets-0.1"),
        ("--clean_fractions=0.1,0.10000001", "clean-0.1;"),
        ("--out=.", "--out must be a file, and so its drawing (.svg), got '.'"),
        ("--out=x.svg", "--out must not end in .svg"),
        ("--out=/dev/null/o.json", "--out must be in a folder that can be written"),
    ],
)
def test_a_wrong_argument_is_one_line_before_any_run(
    argument, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(nad_experiment, "run", lambda *a, **k: 1 / 0)
    paths = [f"--out={tmp_path / 'o.json'}", f"--workdir={tmp_path / 'w'}"]
    assert nad_sweep.main([*paths, "--variant=smoke", argument]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--attacks=,", "must be names of attacks, with commas between them, each"),
        ("--attacks=sig,sig", "each once, got 'sig,sig'"),
        ("--poison_rates=0.1,", "must be numbers in (0, 1], with commas"),
        ("--seeds=x", "must be integers from 0 on, with commas between them, each"),
        ("--seeds=1,01", "each once, got '1,01'"),
    ],
)
def test_a_list_names_what_it_takes(argument, message, tmp_path, capsys):
    """Before a result that is there is replaced by one without cells."""
    paths = [f"--out={tmp_path / 'o.json'}", f"--workdir={tmp_path}"]
    with pytest.raises(SystemExit) as caught:
        nad_sweep.main([*paths, argument])
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10", "smoke", "blend+smoke", "zoo/x"])
def test_a_scale_is_no_attack(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(nad_experiment, "run", lambda *a, **k: 1 / 0)
    paths = [f"--out={tmp_path / 'o.json'}", f"--workdir={tmp_path / 'w'}"]
    assert nad_sweep.main([*paths, f"--attacks=badnets,{name}"]) == 2
    said = capsys.readouterr().err
    assert f"--attacks must name attacks, got {name!r}" in said
    assert said.count("\n") == 1 and not (tmp_path / "w").exists()


def test_a_clean_label_attack_gets_what_its_class_can_give():
    attack = settings.PoisoningSettings(
        settings.TriggerSettings("grid"), label_mode="clean_label", target_label=1
    )
    labels = np.array([0, 0, 0, 1])
    rates = nad_sweep._rates(attack, (0.5, 0.3, 0.1), labels)
    assert rates == pytest.approx([0.9 / 4, 0.1])
    other = dataclasses.replace(attack, label_mode="all_to_one")
    assert nad_sweep._rates(other, (0.5, 0.3), labels) == [0.5, 0.3]


def test_a_sweep_trains_its_own_victims(tmp_path, capsys):
    paths = [f"--out={tmp_path / 'o.json'}", f"--workdir={tmp_path}"]
    assert nad_sweep.main([*paths, "--variant=zoo/digits-blend"]) == 2
    assert "zoo" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_sweep_is_whole_and_continues(tmp_path, capsys):
    out = tmp_path / "out.json"
    command = [f"--out={out}", f"--workdir={tmp_path / 'w'}", "--variant=smoke"]
    command += ["--attacks=badnets", "--poison_rates=0.1", "--clean_fractions=0.1"]
    command += ["--seeds=0"]
    assert nad_sweep.main(command) == 0
    (cell,) = json.loads(out.read_text())["cells"]
    assert (cell["attack"], cell["poison_rate"]) == ("badnets", 0.1)
    gap = cell["nad"]["asr"][0] - cell["fine_tuning"]["asr"][0]
    assert cell["difference"]["asr"] == {"mean": gap, "std": 0.0}
    assert out.with_suffix(".svg").read_text().startswith("<svg")
    # The clean model has no rows, so nobody trained it.
    assert "clean model" not in capsys.readouterr().out
    assert nad_sweep.main(command) == 0
    assert json.loads(out.read_text())["cells"] == [cell]
    assert "loss" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)]
)
def test_a_signal_ends_the_sweep_after_the_step_at_work(
    tmp_path, monkeypatch, capsys, number, code
):
    def stopped(config, workdir):
        del config
        os.kill(os.getpid(), number)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            workdir.check_stop()
            time.sleep(0.01)

    monkeypatch.setattr(nad_experiment, "run", stopped)
    paths = [f"--out={tmp_path / 'o.json'}", f"--workdir={tmp_path}"]
    assert nad_sweep.main([*paths, "--variant=smoke", "--attacks=badnets"]) == code
    said = capsys.readouterr().err
    assert "the same command goes on from there" in said and said.count("\n") == 1
    assert not (tmp_path / "o.json").exists()


def test_a_bug_in_a_sweep_is_exit_code_2(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(nad_sweep, "sweep", lambda *a, **k: 1 / 0)
    paths = [f"--out={tmp_path / 'o.json'}", f"--workdir={tmp_path}"]
    assert nad_sweep.main([*paths, "--variant=smoke", "--attacks=badnets"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("when", ["sweep", "_config"])
def test_an_interruption_at_any_time_is_one_line(tmp_path, monkeypatch, capsys, when):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(nad_sweep, when, interrupt)
    paths = [f"--out={tmp_path / 'o.json'}", f"--workdir={tmp_path}"]
    assert nad_sweep.main([*paths, "--variant=smoke", "--attacks=badnets"]) == 130
    assert capsys.readouterr().err.count("\n") == 1
