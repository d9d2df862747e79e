# SPDX-License-Identifier: Apache-2.0
"""Settings accept what they promise, and name the key when they refuse."""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys

import pytest

from nad_jax import errors, models, settings
from nad_jax.core import grids

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"


def _config(file="efrap.py", variant=""):
    spec = importlib.util.spec_from_file_location("config", CONFIGS / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*([variant] if variant else [])).to_dict()


def _read(mapping):
    return settings.from_mapping(settings.ExperimentSettings, mapping)


@pytest.mark.parametrize("change", ["", "smoke", "cifar10", "w8", "vit"])
@pytest.mark.parametrize("attack", settings.RECIPES)
def test_every_variant_of_the_shipped_config_is_valid_and_names_every_field(
    attack, change
):
    mapping = _config(variant=f"{change}+{attack}")
    config = _read(mapping)
    assert config.attack.name == attack
    assert config.attack.weight_bits == (config.defense.weight_bits,)
    assert config.attack.trigger.options["size"] >= 1
    fields = settings.RECIPES[attack].__dataclass_fields__
    assert set(mapping["attack"]["recipe"]) == set(fields)


@pytest.mark.parametrize("attack", ["pq", "qu_anti_zation", "compartifact"])
def test_published_recipes_are_valid_and_others_have_none(attack):
    config = _read(_config(variant=f"cifar10+authors+{attack}"))
    assert config.model.name == "resnet_18" and 8 in config.attack.weight_bits
    assert config.defense.weight_bits == config.attack.weight_bits[0]
    with pytest.raises(ValueError, match="authors must come with"):
        _config(variant="authors+outlier")


def test_controls_are_every_rounding_but_the_dear_ones_and_two_repairs():
    for change in ("vit", "cifar10", "smoke"):
        config = _read(_config(variant=f"controls+{change}"))
        dear = {"adam", "adaround", "efrap_chosen"}
        assert set(config.defense.roundings) == set(settings.ROUNDINGS) - dear
        assert config.repairs.rows == ("fine_tuning", "nad")


def test_the_loops_are_added_to_whatever_rows_there_are():
    for variant in ("adaround", "controls+adaround"):
        config = _read(_config(variant=variant))
        before = _read(_config(variant=variant.removesuffix("adaround").rstrip("+")))
        loops = ("adaround", "adam")
        assert config.defense.roundings == (*before.defense.roundings, *loops)
        assert config.defense.adam.steps == 10_000
    assert _read(_config(variant="adaround+smoke")).defense.adam.steps <= 100


def test_controls_in_degrees_make_a_row_for_each_strength():
    """Noise of half a half-width and of the whole, and a sweep of QVec's scale."""
    config = _config()
    controls = _read(config).defense.controls
    assert controls.rows("noise") == [("noise_0.5", 0.5), ("noise_1.0", 1.0)]
    assert len(controls.rows("qvec")) >= 3
    assert controls.rows("ocs") == [("ocs", None)]
    # As an earlier run's config.json has it.
    config["defense"]["controls"].update(noise=1, qvec=2.0)
    controls = _read(config).defense.controls
    assert controls.rows("noise") == [("noise_1.0", 1.0)]
    assert controls.rows("qvec") == [("qvec_2.0", 2.0)]


@pytest.mark.parametrize(
    "wrong", [(), (-0.5,), (0.5, 0.5), (float("inf"),), (float("nan"),)]
)
def test_strengths_that_make_no_row_or_one_twice_are_refused(wrong):
    config = _config()
    config["defense"]["controls"]["noise"] = wrong
    with pytest.raises(errors.InputError, match=r"^config\.defense\.controls\.noise "):
        _read(config)


def test_variants_combine_in_any_order_but_name_one_attack():
    assert _config(variant="w8+smoke+outlier") == _config(variant="outlier+smoke+w8")
    with pytest.raises(ValueError, match="one attack, got pq and outlier"):
        _config(variant="pq+outlier")


def test_every_setting_of_the_shipped_config_is_read():
    """The file names every field of the defence, so no default lives in two places."""
    config = _config()
    fields = settings.QuantizationSettings.__dataclass_fields__
    assert set(config["defense"]) == set(fields)


@pytest.mark.parametrize("attack", ["pq", "adaptive_eot"])
def test_projections_share_the_limits_of_their_cells(attack):
    sections = _config(variant=attack)
    sections["attack"]["recipe"]["cell_margin"] = 0.5
    with pytest.raises(errors.InputError, match=r"recipe.cell_margin must be in"):
        settings.parse(sections)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("defense", "weight_bits"), 9, "config.defense.weight_bits must be 2 to 8"),
        (("defense", "weight_bits"), 1, "config.defense.weight_bits must be 2 to 8"),
        (("defense", "weight_bits"), 4.0, "config.defense.weight_bits must be int"),
        (("defense", "weight_bits"), True, "config.defense.weight_bits must be int"),
        (("defense", "act_bits"), 0, "config.defense.act_bits must be 2 to 8 or None"),
        (("defense", "roundings"), ("up",), "config.defense.roundings must be of"),
        (("defense", "flip_weight"), -1.0, "config.defense.flip_weight must be in"),
        (("defense", "flip_weight"), float("nan"), "config.defense.flip_weight"),
        (("defense", "flip_weight"), 1e300, "flip_weight must be in [0, 1000000]"),
        (("defense", "flip_weight_path"), (0.1, 2e6), "numbers in [0, 1000000]"),
        (("defense", "calibration_images"), 0, "calibration_images must be at least 1"),
        (("attack", "name"), "trojan", "config.attack.name must be of pq, qu_anti"),
        (("attack", "weight_bits"), (4, 9), "config.attack.weight_bits must be 2 to 8"),
        (("attack", "weight_bits"), (), "config.attack.weight_bits must be 2 to 8"),
        (("attack", "weight_bits"), (4, 4), "config.attack.weight_bits must be 2 to 8"),
        (("attack", "recipe", "cell_margin"), 0.5, "recipe.cell_margin must be in"),
        (("attack", "recipe", "headroom"), 2.0, "recipe.headroom is not known"),
        (("defense", "grid", "preset"), "tflite", "grid.preset must be of plain"),
        (("defense", "grid", "percentile"), 99.0, "defense.grid.percentile goes"),
        (("defense", "grid", "first_last_bits"), 1, "first_last_bits must be 2 to 8"),
        (("attack", "grid", "act_range_method"), "mse", "attack.grid.act_range_method"),
        (("attack", "target_label"), -1, "config.attack.target_label must be >= 0"),
        (("attack", "label_mode"), "clean_label", "config.attack.label_mode must be"),
        (("victim", "epochs"), 0, "config.victim.epochs must be at least 1"),
        (("victim", "learning_rate"), 0.0, "config.victim.learning_rate must be > 0"),
        (
            ("victim", "learning_rate"),
            10**400,
            "config.victim.learning_rate must be a float, at most 1.8e308 in size, got "
            "an integer of 1329 bits",
        ),
        (("victim", "optimizer"), "lamb", "config.victim.optimizer must be of"),
        (("victim", "momentum"), 1.0, "config.victim.momentum must be in"),
        (("model", "width"), 0.0, "config.model.width must be > 0"),
        (("seeds",), (), "config.seeds must be at least one"),
        (("seeds",), (1, 1), "config.seeds must be all different"),
        (("seeds",), "x", "config.seeds must be int"),
        (("seeds",), (1, -1), "config.seeds must be 0 to 2**32 - 1, got (1, -1)"),
        (("seeds",), (0, 2**32), "config.seeds must be 0 to 2**32 - 1"),
        (("seeds",), (2**64,), "config.seeds must be 0 to 2**32 - 1"),
        (("data",), 3, "config.data must be a section"),
        (("epoch",), 3, "config.epoch is not known"),
        (("defense", "warm_up"), 0.2, "config.defense.warm_up is not known"),
    ],
)
def test_a_bad_value_is_refused_by_name(path, value, message):
    config = _config()
    section = config
    for key in path[:-1]:
        section = section[key]
    section[path[-1]] = value
    with pytest.raises(errors.InputError) as caught:
        _read(config)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "variant", "sections"),
    [
        ("nad.py", "", ("defense",)),
        ("efrap.py", "controls", ("repairs",)),
        ("vet.py", "", ()),
    ],
)
def test_every_stage_has_a_place_for_a_beta_and_only_named_ones_count(
    file, variant, sections
):
    mapping = _config(file, variant)
    mapping["checkpoint" if file == "vet.py" else "title"] = "x"

    def nad_of(tree, get):
        for name in (*sections, "nad"):
            tree = get(tree, name)
        return tree

    betas = nad_of(mapping, dict.__getitem__)["betas"]
    deepest = models.build("vit_b_16", num_classes=10).depth
    assert sorted(betas) == sorted(f"stage{i + 1}" for i in range(deepest))
    named = ["stage1", "stage2", "stage3"]
    assert sorted(nad_of(settings.parse(mapping), getattr).betas) == named
    betas["stage4"] = 50
    assert nad_of(settings.parse(mapping), getattr).betas["stage4"] == 50.0
    betas["stage4"] = "much"
    with pytest.raises(errors.InputError, match="nad.betas.stage4 must be float"):
        settings.parse(mapping)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("cls", "name"),
    [
        (cls, field.name)
        for cls in (
            *settings.RECIPES.values(),
            settings.TrojanSettings,
            settings.PoisoningSettings,
        )
        for field in dataclasses.fields(cls)
        if field.type is float
    ],
)
def test_no_number_of_an_attack_may_be_infinite(cls, name, value):
    """Not even where no config file is parsed."""
    training = settings.TrainingSettings(epochs=1)
    parts = {
        "training": training,
        "wake": training,
        "hide": training,
        "trigger": settings.TriggerSettings("square"),
    }
    parts = {k: v for k, v in parts.items() if k in cls.__dataclass_fields__}
    cls(**parts)
    with pytest.raises(errors.InputError, match=f"^{name} must be .*, got {value}"):
        cls(**parts, **{name: value})


@pytest.mark.parametrize("job", ["vet", "audit", "inspect"])
@pytest.mark.parametrize("seed", [-1, 2**32, 2**64])
def test_a_judge_takes_the_seeds_that_make_different_keys(job, seed):
    config = _config(f"{job}.py")
    files = ("checkpoint", "float_model", "integer_file")
    config |= {name: "x" for name in files if name in config}
    config["seed"] = 2**32 - 1
    assert settings.parse(config).seed == 2**32 - 1
    config["seed"] = seed
    message = rf"config.seed must be 0 to 2\*\*32 - 1, got {seed}"
    with pytest.raises(errors.InputError, match=message):
        settings.parse(config)


@pytest.mark.parametrize("job", ["vet", "audit", "inspect"])
def test_a_judge_does_not_stream(job):
    """It would load all images into memory and say nothing."""
    config = _config(f"{job}.py")
    files = ("checkpoint", "float_model", "integer_file")
    config |= {name: "x" for name in files if name in config}
    config["data"].update(loader="stream", workers=4)
    message = f"config.data.loader must be device in the job {job}, .* got 'stream'"
    with pytest.raises(errors.InputError, match=message):
        settings.parse(config)


def test_a_grid_is_a_preset_and_what_is_different_about_it():
    config = _config()
    config["defense"]["grid"].update(preset="pytorch_qnnpack", range_method="aciq")
    grid = _read(config).defense.grid.grid()
    expected = dataclasses.replace(grids.GRIDS["pytorch_qnnpack"], range_method="aciq")
    assert grid == expected
    assert _read(config).defense.folds_batch_norm
    config["defense"]["fold_batch_norm"] = False
    assert not _read(config).defense.folds_batch_norm


@pytest.mark.parametrize("side", ["attack", "defense"])
def test_batch_norm_is_folded_as_the_grid_has_it_unless_told(side):
    config = _config()
    config[side]["grid"]["preset"] = "pytorch_fbgemm"
    assert getattr(_read(config), side).folds_batch_norm is True
    config[side]["fold_batch_norm"] = False
    assert getattr(_read(config), side).folds_batch_norm is False
    config[side].update(fold_batch_norm=True, grid={"preset": "plain"})
    assert getattr(_read(config), side).folds_batch_norm is True


def test_the_published_grid_of_compartifact_folds():
    attack = _read(_config(variant="cifar10+authors+compartifact")).attack
    assert attack.folds_batch_norm and not attack.grid.grid().per_channel


@pytest.mark.parametrize("side", ["attack", "defense"])
def test_the_grids_of_the_shipped_config_are_the_plain_one(side):
    shipped = getattr(_read(_config()), side)
    assert shipped.grid.grid() == grids.GRIDS["plain"]
    assert shipped.folds_batch_norm is False


def test_flips_at_the_rate_of_efrap_come_after_it():
    config = _config()
    config["defense"]["roundings"] = ("random", "efrap")
    with pytest.raises(errors.InputError, match="efrap before random"):
        _read(config)
    config["defense"]["roundings"] = ("efrap", "random")
    assert _read(config).defense.controls.flip_share is None
    config["defense"].update(roundings=("top_error",), controls={"flip_share": 0.1})
    assert _read(config).defense.controls.flip_share == 0.1


def test_a_vetted_model_has_one_width_for_layer_inputs():
    config = _config("vet.py")
    config["checkpoint"] = "x"
    config["defense"]["act_bits"] = 4
    config["defense"]["grid"]["preset"] = "efrap_reference"
    with pytest.raises(errors.InputError, match="4 and the first .* have 8 bits"):
        settings.from_mapping(settings.VetSettings, config)


def test_a_missing_section_is_refused_by_name():
    config = _config()
    del config["model"]
    with pytest.raises(errors.InputError, match=r"config\.model is missing"):
        _read(config)


def test_a_single_seed_may_stand_for_a_tuple_and_an_int_for_a_float():
    config = _config()
    config["seeds"] = 3
    config["defense"]["flip_weight"] = 0
    read = _read(config)
    assert read.seeds == (3,)
    assert read.defense.flip_weight == 0.0


def test_settings_load_without_jax():
    """A typing error on the command line is told at once."""
    program = "import nad_jax.settings, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
