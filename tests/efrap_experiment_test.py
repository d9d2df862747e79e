# SPDX-License-Identifier: Apache-2.0
"""What a run of configs/efrap.py promises beside its numbers."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import efrap as config_file
from nad_jax import efrap_experiment, errors, main, pipeline, settings
from nad_jax import workdir as workdir_lib
from nad_jax.report import schema


def test_no_two_purposes_share_randomness():
    """Nor does a key drawn from one of them equal another."""
    keys = efrap_experiment._keys(0)
    derived = [
        jax.random.key_data(key).tolist()
        for own in keys.values()
        for key in (own, *(jax.random.fold_in(own, i) for i in range(3)))
    ]
    assert len({tuple(words) for words in derived}) == len(derived)


def _config(**changes):
    sections = config_file.get_config("smoke").to_dict()
    return dataclasses.replace(settings.parse(sections), **changes)


@pytest.mark.parametrize(
    ("section", "change", "words"),
    [
        ("model", {"width": 0.25}, "config.model.width was 0.5, now 0.25"),
        ("attack", {"target_label": 3}, "config.attack.target_label was 0, now 3"),
    ],
)
def test_models_of_another_config_are_refused(section, change, words, tmp_path):
    """Else they would be reported under its name."""
    (tmp_path / "earlier").mkdir()
    path = tmp_path / "earlier" / "config.json"
    path.write_text(json.dumps(dataclasses.asdict(_config())))
    workdir = workdir_lib.Workdir(tmp_path / "now", {})
    config = _config(victim_workdir=str(tmp_path / "earlier"))
    pipeline.EarlierRun(config, workdir)  # The same: accepted.
    moved = dataclasses.replace(config.data, data_dir="elsewhere")
    pipeline.EarlierRun(dataclasses.replace(config, data=moved), workdir)
    part = dataclasses.replace(getattr(config, section), **change)
    other = dataclasses.replace(config, **{section: part})
    with pytest.raises(errors.InputError, match=words):
        pipeline.EarlierRun(other, workdir)
    workdir.close()


def test_models_are_the_same_where_the_grid_says_what_a_config_said(tmp_path):
    """Configs of older runs say False where None is the grid's own choice."""
    told = dataclasses.asdict(_config())
    told["attack"]["fold_batch_norm"] = False
    (tmp_path / "earlier").mkdir()
    (tmp_path / "earlier" / "config.json").write_text(json.dumps(told))
    workdir = workdir_lib.Workdir(tmp_path / "now", {})
    config = _config(victim_workdir=str(tmp_path / "earlier"))
    assert config.attack.fold_batch_norm is None
    pipeline.EarlierRun(config, workdir)
    folding = dataclasses.replace(config.attack, fold_batch_norm=True)
    with pytest.raises(errors.InputError, match="fold_batch_norm was False, now True"):
        pipeline.EarlierRun(dataclasses.replace(config, attack=folding), workdir)
    workdir.close()


def test_efrap_may_cost_exactly_its_limit():
    """0.856 - 0.846 is a little above 0.01."""

    def row(name, acc):
        return schema.Row(
            name, "clean", 0, None, None, acc, None, None, 500, None, None, 0.0
        )

    (claim,) = efrap_experiment._claims([row("float", 0.856), row("efrap", 0.846)])
    assert claim["passed"] and "worst 1.00%" in claim["text"]
    (claim,) = efrap_experiment._claims([row("float", 0.856), row("efrap", 0.844)])
    assert not claim["passed"]


@pytest.mark.parametrize("variant", ["vit+controls", "vit+cifar10+controls"])
def test_controls_of_a_transformer_are_not_trained_like_a_residual_net(variant):
    """SGD at those rates leaves it at chance, and a control must be a fair one."""
    training = config_file.get_config(variant).repairs.training
    assert training.optimizer == "adam" and training.learning_rate <= 1e-3


@pytest.mark.slow
def test_float_repairs_make_two_rows_each(few_digits, tmp_path):
    sections = config_file.get_config("controls+smoke")
    sections.data.update(few_digits)
    sections.defense.roundings = ("nearest",)
    sections.repairs.rows = ("fine_tuning",)
    config = settings.parse(sections.to_dict())
    workdir = workdir_lib.Workdir(tmp_path, {})
    report = efrap_experiment.run(config, workdir)
    workdir.close()
    rows = [r["name"] for r in report["rows"] if r["model"] == "backdoored"]
    repaired = ["fine_tuning", "fine_tuning_nearest"]
    assert rows == ["float", *config.defense.roundings, *repaired]
    by_name = {r["name"]: r for r in report["rows"] if r["model"] == "backdoored"}
    assert by_name["fine_tuning"]["weight_bits"] is None
    assert by_name["fine_tuning_nearest"]["weight_bits"] == 4
    assert by_name["fine_tuning_nearest"]["flip_rate"] == 0.0
    # Of the repaired net, not of the victim.
    victim, repaired_net = by_name["nearest"], by_name["fine_tuning_nearest"]
    assert any(victim[rate] != repaired_net[rate] for rate in ("acc", "asr", "ra"))
    # Repairs need labels and change floats; what they are given is not the test data.
    assert by_name["fine_tuning"]["seconds"] > 0 and np.isfinite(
        by_name["fine_tuning"]["acc"]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("attack", "roundings", "act_bits"),
    [
        ("qu_anti_zation", ("nearest", "qvec", "efrap", "efrap_chosen"), None),
        ("compartifact", ("nearest",), 8),
    ],
)
def test_an_attack_on_another_grid_than_the_defenders_is_measured_on_both(
    attack, roundings, act_bits, few_digits, tmp_path
):
    sections = config_file.get_config(f"{attack}+smoke").to_dict()
    sections["data"].update(few_digits)
    sections["attack"]["grid"]["per_channel"] = False
    sections["defense"].update(roundings=roundings, act_bits=act_bits)
    sections["defense"]["flip_weight"] = 1e4  # Far beyond what can be chosen.
    workdir = workdir_lib.Workdir(tmp_path, {})
    efrap_experiment.run(settings.parse(sections), workdir)
    workdir.close()
    report = schema.read_report(tmp_path / "report.json")
    rows = {r["name"]: r for r in report["rows"] if r["model"] == "backdoored"}
    (facts,) = report["acceptance"]
    (own,) = facts["own_grid"]
    assert own["weight_bits"] == 4 and 0 <= own["acc"] <= 1 and 0 <= own["asr"] <= 1
    for rate in ("acc", "asr"):
        assert facts["defender_grid"][rate] == rows["nearest"][rate]
    # Of two grids, though both are four bits wide.
    assert own["near_tie_share"] != facts["near_tie_share"]
    # Layer inputs alone depend on calibration images.
    assert ("recalibrated" in facts) == (act_bits is not None)
    if "qvec" in roundings:  # The stronger, the more weights flip.
        strengths = settings.ControlSettings().qvec
        flips = [rows[f"qvec_{strength}"]["flip_rate"] for strength in strengths]
        assert len(flips) > 1 and flips == sorted(set(flips))
    if "efrap_chosen" in roundings:  # The row says what was chosen, from what.
        extra = rows["efrap_chosen"]["extra"]
        assert f"{extra['flip_weight']:g}" in extra["disagreement"]
        rates = [rows[name]["flip_rate"] for name in ("efrap_chosen", "efrap")]
        assert rates[0] < rates[1]


@pytest.mark.slow
def test_what_an_attack_refuses_is_refused_before_anything_is_trained(tmp_path, capsys):
    config = "--config=configs/efrap.py:compartifact+smoke"
    layer = "--config.attack.recipe.first_quantized_layer=layer9"
    assert main.main(["main", config, layer, f"--workdir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "fc, got 'layer9'" in said
    assert not list(tmp_path.glob("checkpoints/*"))
