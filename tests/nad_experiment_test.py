# SPDX-License-Identifier: Apache-2.0
"""The repair job from its config to its report."""

import importlib.util
import json
import math
import pathlib

import pytest

from nad_jax import errors, main, pipeline, settings
from nad_jax.attacks import triggers
from nad_jax.report import schema

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "nad.py"


def _config(variant=""):
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(variant).to_dict()


ATTACKS = ("badnets", "trojan", "blend", "clean_label", "sig", "refool", "wanet")


@pytest.mark.parametrize(
    "variant",
    ["", "smoke", "cifar10", *ATTACKS, "cifar10+sig", "wanet+smoke", "controls"],
)
def test_every_variant_is_valid_and_names_every_setting(variant):
    """So no default of a repair lives in two places."""
    mapping = _config(variant)
    config = settings.parse(mapping)
    assert isinstance(config, settings.NadExperimentSettings)
    for section, cls in (
        (mapping["defense"], settings.RepairSettings),
        (mapping["defense"]["training"], settings.TrainingSettings),
        (mapping["defense"]["nad"], settings.NadSettings),
        (mapping["defense"]["ft_sam"], settings.FtSamSettings),
        (mapping["attack"], settings.PoisoningSettings),
    ):
        assert set(section) == set(cls.__dataclass_fields__)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("attack", "noise_ratio"), 10.0, "so that poison and noise fit the data"),
        (("job",), "neither", "config.job must be of .*nad.*, got 'neither'"),
        (("attack", "poison_rate"), 0.0, "config.attack.poison_rate must be in"),
        (("attack", "perturbation"), 0.1, "for label_mode clean_label only"),
        (("defense", "rows"), ("magic",), "config.defense.rows must be of"),
        (("defense", "clean_fraction"), 1.5, "config.defense.clean_fraction"),
        (("defense", "nad", "beta_unit"), "feet", "config.defense.nad.beta_unit"),
        (("defense", "training", "milestones"), (3, 2), "milestones must be ascending"),
        (("defense", "training", "milestones"), (-2, 2), "ascending, from 1 on, got"),
        (("defense", "training", "milestones"), (0, 2), "ascending, from 1 on, got"),
        (("defense", "nad", "beta_factors"), (1.0, 1.0), "factors must be all differ"),
        (
            ("defense", "nad", "beta_factors"),
            (0.5, math.inf),
            "must be finite, got inf",
        ),
        (("defense", "nad", "beta_factors"), (math.nan,), "must be finite, got nan"),
        (
            ("defense", "nad", "beta_factors"),
            (-1.0,),
            "one or more finite numbers >= 0",
        ),
        (("defense", "nad", "beta_factors"), (), "one or more finite numbers >= 0"),
        (("defense", "nad", "p"), math.inf, "config.defense.nad.p must be finite, got"),
        (("defense", "rate_factors"), (), "one or more finite numbers > 0"),
        (("defense", "rate_factors"), (0.0, 1.0), "one or more finite numbers > 0"),
        (("defense", "rate_factors"), (2.0, 2.0), "factors must be all different"),
        (("defense", "rate_tolerance"), 1.5, "rate_tolerance must be in"),
        (("defense", "ft_sam", "radius"), 0.0, "ft_sam.radius must be > 0"),
        (("defense", "ft_sam", "label_smoothing"), 1.0, "label_smoothing must be in"),
        (("victim", "learning_rate"), math.nan, "_rate must be finite, got nan"),
        (("defense", "patience"), 0, "defense.patience must be at least 1 or None"),
        (("defense", "rows"), ("nad", "nad"), "defense.rows must be all different"),
        (("defense", "nad", "betas"), {}, "betas must be numbers >= 0 by stage"),
        (("defense", "nad", "betas"), {"stage1": -1.0}, "betas must be numbers >= 0"),
    ],
)
def test_a_wrong_setting_is_named(path, value, message):
    mapping = _config()
    section = mapping
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(errors.InputError, match=message):
        settings.parse(mapping)


def test_held_out_images_may_be_missing_where_nothing_is_decided():
    mapping = _config()
    mapping["defense"] |= {
        "rows": ("fine_tuning", "nad"),
        "validation_fraction": 0.0,
    }
    assert settings.parse(mapping).defense.validation_fraction == 0.0
    every = _config("controls")
    every["defense"]["validation_fraction"] = 0.0
    with pytest.raises(errors.InputError, match="above 0 for fine_pruning, mode_con"):
        settings.parse(every)
    for changed in (
        {"patience": 3},
        {"rows": ("mode_connectivity",)},
        {"rate_factors": (1.0, 2.0)},
    ):
        other = {**mapping, "defense": {**mapping["defense"], **changed}}
        with pytest.raises(errors.InputError, match="decide on held-out images"):
            settings.parse(other)


def test_the_controls_are_every_row_on_any_data_and_attack():
    plain, every = _config("cifar10+sig"), _config("controls+sig+cifar10")
    assert set(every["defense"]["rows"]) == set(settings.REPAIRS)
    assert set(plain["defense"]["rows"]) < set(every["defense"]["rows"])
    for rows in ("rows", "clean_model_rows"):
        every["defense"][rows] = plain["defense"][rows]
    assert every == plain


@pytest.mark.parametrize(
    "variant",
    ["smoke+cifar10", "blend+sig", "smoke/blend", "controls+controls", "none+blend"],
)
def test_a_variant_that_is_none_says_what_there_is(variant, capsys):
    assert main.main(["main", f"--config={CONFIG}:{variant}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "badnets, trojan" in said and variant in said


@pytest.mark.parametrize("change", ["blend", "controls+controls", "smoke", ""])
def test_a_victim_of_the_zoo_takes_no_other_variant(change, capsys):
    assert main.main(["main", f"--config={CONFIG}:zoo/digits-blend+{change}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "zoo/NAME+controls, got" in said


@pytest.mark.slow
@pytest.mark.parametrize("attack", ATTACKS)
def test_every_attack_draws_its_trigger_on_every_scale(attack):
    """All sizes of image that the shipped configs have."""
    for scale, shape in (("smoke", (8, 8, 3)), ("cifar10", (32, 32, 3))):
        config = settings.parse(_config(f"{scale}+{attack}"))
        trigger = pipeline.build_trigger(config.attack.trigger, shape)
        triggers.check_trigger(trigger, shape)


@pytest.mark.slow
def test_the_smoke_run_is_whole_and_repeatable(few_digits, tmp_path, capsys):
    """Rows of both models, the index file, and stages that are not repeated."""
    wanted = ("fine_tuning", "mode_connectivity", "nad")
    command = ["main", f"--config={CONFIG}:smoke", f"--workdir={tmp_path / 'run'}"]
    command += [f"--config.data.{key}={value}" for key, value in few_digits.items()]
    command += [f"--config.defense.rows={wanted!r}"]
    command.append("--config.defense.clean_model_rows=('fine_tuning',)")
    assert main.main(command) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text("utf-8"))
    schema.validate(report)
    rows = {(row["model"], row["name"]): row for row in report["rows"]}
    expected = [("backdoored", name) for name in ("float", *wanted)]
    expected += [("clean", name) for name in ("float", "fine_tuning")]
    assert sorted(rows) == sorted(expected)
    for row in rows.values():
        before = rows[row["model"], "float"]
        drop = max(0, before["asr"] - row["asr"]) - max(0, before["acc"] - row["acc"])
        assert row["extra"]["der"] == pytest.approx((drop + 1) / 2)
        assert row["acc_count"] == 200 and 100 < row["asr_count"] < 200
        held_out = 4 * row["extra"]["held_out_acc"]  # 0.1 of 0.2 of 200 images
        assert 0 <= held_out <= 4 and held_out == round(held_out)
    assert 0 <= rows["backdoored", "mode_connectivity"]["extra"]["position"] <= 1
    facts = ("attack", "dataset", "clean_fraction", "poison_rate", "seed")
    assert [report[key] for key in facts] == ["badnets", "npz", 0.2, 0.1, 0]
    curves = {(curve["model"], curve["row"]): curve for curve in report["curves"]}
    assert ("backdoored", "mode_connectivity") not in curves
    for place in (("backdoored", "nad"), ("clean", "fine_tuning")):
        for rate in ("acc", "asr"):
            assert len(curves[place][rate]) == 1 + 2
            assert curves[place][rate][-1] == rows[place][rate]
    record = json.loads((tmp_path / "run" / "clean_indices-seed0.json").read_text())
    assert len(record["train"]) + len(record["validation"]) == 0.2 * 200
    assert not set(record["train"]) & set(record["validation"])

    capsys.readouterr()
    assert main.main(command) == 0
    again = json.loads((tmp_path / "run" / "report.json").read_text("utf-8"))
    assert again["rows"] == report["rows"]
    assert "epochs, loss" not in capsys.readouterr().out
