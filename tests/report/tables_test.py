# SPDX-License-Identifier: Apache-2.0
"""Sentences that claim no more than the rows show, and tables made of files."""

import pathlib
import re
import subprocess
import sys

import pytest

from nad_jax import whole_file
from nad_jax.errors import InputError
from nad_jax.report import schema, tables


def _row(name, asr, acc=0.99, *, bits=4, seed=0, model="backdoored", **changes):
    known = asr is not None
    row = {
        "name": name,
        "model": model,
        "seed": seed,
        "weight_bits": None if name == "float" else bits,
        "act_bits": None,
        "acc": acc,
        "asr": asr,
        "ra": 0.0 if known else None,
        "acc_count": 500,
        "asr_count": 450 if known else None,
        "flip_rate": None if name == "float" else 0.25,
        "seconds": 2.0,
    }
    return {**row, **changes}


def _report(rows, *, config=None, title="Digits"):
    return schema.build_report(
        title=title,
        config=config or {"seed": 0, "defense": {"weight_bits": 4}},
        rows=rows,
        git_commit=None,
        versions={},
        devices=[],
        seconds={},
    )


def _cells(text):
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


# ------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("noise", "Noise"),  # as older files have it
        ("noise_0.5", "Noise 0.5"),
        ("noise_1.0", "Noise 1"),
        ("qvec_1e-05", "QVec 1e-05"),
        ("qvec_10.0", "QVec 10"),
        ("mine_0.5", "mine_0.5"),
        ("top_error", "Largest errors"),
    ],
)
def test_a_row_is_called_by_its_kind_and_strength(name, label):
    assert tables.row_label(name) == label
    described = tables.row_description(schema.Row.from_dict(_row(name, 0.0)))
    kind = name.split("_")[0]
    if kind in ("noise", "qvec"):
        plain = schema.Row.from_dict(_row(kind, 0.0))
        assert described == tables.row_description(plain) != ""


# -------------------------------------------------------------------------- headline


def test_the_headline_tells_the_whole_story_in_one_sentence():
    rows = [
        _row("float", 0.004, 0.992),
        _row("nearest", 0.998),
        _row("efrap", 0.0, 0.988),
    ]
    sentence = tables.headline(rows).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "sleeps in the float model (ASR 0.4 %)" in sentence
    assert "wakes when the weights are rounded to 4 bits (ASR 99.8 %)" in sentence
    assert "EFRAP on the same grid puts it back to sleep (ASR 0.0 %)" in sentence
    assert "98.8 %, against 99.2 % in float" in sentence
    assert len(re.findall(r"\.(?!\d)", sentence)) == 1


@pytest.mark.parametrize(
    ("asr", "says", "never"),
    [
        ((0.0, 1.0, 0.9), "does not stop it", "puts it back"),
        ((0.0, 1.0, 0.3), "weakens it", "puts it back"),
        ((0.0, 0.02, 0.0), "does not wake", "puts it back"),
        ((0.0, 0.02, 0.01), "has nothing to do", "puts it back"),
        ((0.0, 0.01, 0.9), "EFRAP on the same grid wakes it", "puts it back"),
        ((0.9, 0.9, 0.0), "is awake in the float model", "sleeps"),
    ],
)
def test_the_headline_does_not_claim_what_did_not_happen(asr, says, never):
    names = ("float", "nearest", "efrap")
    sentence = tables.headline([_row(n, a) for n, a in zip(names, asr, strict=True)])
    assert says in sentence and never not in sentence


def test_without_a_trigger_only_accuracy_is_told():
    sentence = tables.headline([_row("float", None, 0.992), _row("efrap", None, 0.988)])
    assert "no trigger is known" in sentence.lower()
    assert "99.2" in sentence and "98.8" in sentence and "ASR" not in sentence


def test_the_nearest_row_of_the_headline_has_the_grid_of_the_defence():
    rows = [_row("nearest", 0.1, bits=8), _row("nearest", 0.9), _row("efrap", 0.0)]
    sentence = tables.headline(rows)
    assert "4 bits (ASR 90.0" in sentence and "10.0" not in sentence


def test_several_seeds_are_said_to_be_means():
    rows = [_row("efrap", a, seed=i) for i, a in enumerate((0.0, 0.02))]
    assert "means over 2 seeds" in tables.headline(rows)
    assert "ASR 1.0" in tables.headline(rows)
    assert "seeds" not in tables.headline(rows[:1])


@pytest.mark.parametrize("name", ["float", "nearest", "efrap", "nad", "mine"])
@pytest.mark.parametrize("model", schema.MODELS)
@pytest.mark.parametrize("asr", [None, 0.0, 0.3, 1.0])
def test_every_single_row_has_a_headline(name, model, asr):
    sentence = tables.headline([_row(name, asr, model=model)])
    assert sentence[0].isupper() and sentence.endswith(".")


def test_the_comparison_names_controls_and_the_clean_model():
    rows = [
        _row("float", 0.0),
        _row("nearest", 1.0),
        _row("efrap", 0.0),
        _row("stochastic", 0.031),
        _row("nearest", 0.5, bits=8),
        _row("float", 0.0, 0.996, model="clean"),
        _row("efrap", 0.0, 0.99, model="clean"),
    ]
    text = tables.comparison(rows).replace("\N{NARROW NO-BREAK SPACE}", " ")
    assert "Stochastic 3.1 %, 99.0 %" in text
    assert "Nearest W8 50.0 %" in text
    assert "99.6 % accuracy in float and 99.0 % after EFRAP" in text
    assert tables.comparison([_row("float", 0.0)]) == ""


def test_decimals_follow_the_number_of_images():
    few = schema.Row.from_dict(_row("float", 0.0))
    many = schema.Row.from_dict(_row("float", 0.0, acc_count=10_000))
    assert tables.decimals_for([few]) == 1 and tables.decimals_for([few, many]) == 2


# -------------------------------------------------------------------------- markdown


def test_seeds_from_several_files_become_mean_and_deviation():
    """0.98 and 1.00: mean 99.0, sample deviation sqrt(2) = 1.4 points."""
    reports = [
        _report([_row("efrap", 0.0, acc, seed=i)], config={"seed": i, "lr": 0.1})
        for i, acc in enumerate((0.98, 1.0))
    ]
    text = tables.markdown_table(reports)
    head, rule, row = _cells(text)
    assert len(head) == len(rule) == len(row) == 9
    assert row[:4] == ["backdoored", "**EFRAP**", "W4", "99.0 ± 1.4"]
    assert row[head.index("Seeds")] == "2"
    assert "500 clean test images" in text and "over 450 triggered" in text
    assert "seeds 0, 1" in text


def test_one_seed_has_no_deviation_and_none_is_a_dash():
    head, _, row = _cells(tables.markdown_table([_report([_row("float", None)])]))
    cells = dict(zip(head, row, strict=True))
    assert cells["ACC %"] == "99.0" and cells["Bits"] == "float"
    assert cells["ASR %"] == cells["RA %"] == cells["Flip rate %"] == "–"


def test_rows_keep_their_order():
    rows = [_row(n, 0.0) for n in ("float", "nearest", "stochastic", "efrap", "mine")]
    names = [line[1] for line in _cells(tables.markdown_table([_report(rows)]))[2:]]
    assert names == ["Float", "Nearest", "Stochastic", "**EFRAP**", "mine"]


def test_configs_that_differ_get_tables_of_their_own_that_say_how():
    reports = [
        _report(
            [_row("efrap", 0.0)], config={"seed": 0, "defense": {"weight_bits": 4}}
        ),
        _report(
            [_row("efrap", 0.1)], config={"seed": 0, "defense": {"weight_bits": 3}}
        ),
    ]
    text = tables.markdown_table(reports)
    assert text.count("| Model |") == 2
    assert "(defense.weight_bits=3)" in text


def test_runs_of_one_experiment_share_a_table_wherever_their_files_lie():
    def tables_of(*changes):
        reports = [
            {
                **_report(
                    [_row("efrap", 0.0, seed=seed)],
                    config={"seed": seed, "data": {"name": "digits"}, **change},
                ),
                "devices": ["cpu"] * devices,
            }
            for seed, (devices, change) in enumerate(changes)
        ]
        assert len({*map(tables.experiment_key, reports)}) in (1, len(reports))
        return tables.markdown_table(reports)

    plain = (1, {})
    for same in (
        {"victim_workdir": "x", "workdir": "y"},
        {"data": {"name": "digits", "data_dir": "x", "loader": "stream", "workers": 2}},
    ):
        assert tables_of(plain, (1, same)).count("| Model |") == 1
    assert "(data.name=cifar10)" in tables_of(plain, (1, {"data": {"name": "cifar10"}}))
    assert "(devices=2)" in tables_of(plain, (2, {}))


def test_triggers_of_two_seeds_are_not_seeds_of_one_experiment():
    def report(seed):
        trigger = {"name": "noise", "options": {"seed": seed}}
        config = {"seeds": [seed], "attack": {"trigger": trigger}}
        return _report([_row("efrap", 0.0, seed=seed)], config=config)

    text = tables.markdown_table([report(0), report(1)])
    assert text.count("| Model |") == 2
    assert "(attack.trigger.options.seed=1)" in text


def test_the_same_seed_in_two_files_is_refused():
    report = _report([_row("efrap", 0.0)])
    with pytest.raises(InputError, match="twice"):
        tables.markdown_table([report, report])


def test_no_report_is_refused():
    with pytest.raises(InputError, match="no report"):
        tables.markdown_table([])


def test_a_hostile_name_can_neither_add_a_cell_nor_a_line_nor_markup():
    name = "a|b\n| c <script>alert(1)</script> [x](javascript:1) `code` \\"
    lines = _cells(tables.markdown_table([_report([_row(name, 0.0)])]))
    assert len(lines) == 3 and len(lines[2]) == 9
    cell = lines[2][1]
    assert "<" not in cell and not re.search(r"(?<!\\)[`\[\]]", cell)


# ------------------------------------------------------------------------------- cli


def test_the_command_prints_the_table_of_the_files(tmp_path, capsys):
    paths = []
    for i in range(2):
        paths.append(str(tmp_path / f"{i}.json"))
        whole_file.write_json(paths[-1], _report([_row("efrap", 0.0, seed=i)]))
    assert tables.main(paths) == 0
    printed = capsys.readouterr().out
    assert printed == tables.markdown_table([schema.read_report(p) for p in paths])
    assert tables.main([*paths, "--no-caption", "--decimals", "3"]) == 0
    assert "99.000 ± 0.000" in capsys.readouterr().out


def test_a_damaged_file_is_one_line_and_exit_code_2(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text("{")
    assert tables.main([str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "x.json" in captured.err


@pytest.mark.slow
def test_the_package_needs_no_jax():
    """Checked on this package's own imports; `import nad_jax` itself may load jax."""
    folder = str(pathlib.Path(schema.__file__).parents[1])
    code = (
        "import sys, types; package = types.ModuleType('nad_jax'); "
        f"package.__path__ = [{folder!r}]; sys.modules['nad_jax'] = package; "
        "import nad_jax.report.html, nad_jax.report.tables; "
        "heavy = {'jax', 'flax', 'optax', 'PIL', 'matplotlib'} & set(sys.modules); "
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
