# SPDX-License-Identifier: Apache-2.0
"""The zoo: what is put in comes out, and what was touched is noticed."""

import contextlib
import dataclasses
import json
import re
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import efrap as config_file
from nad_jax import (
    efrap_experiment,
    errors,
    main,
    models,
    pipeline,
    settings,
    victims,
    whole_file,
    zoo,
)
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import triggers
from nad_jax.interop import artifact, bounded_file, reader
from nad_jax.models import common
from nad_jax.report import schema

TRAINING = {"epochs": 1, "batch_size": 500, "learning_rate": 1e-3}
RECIPE = {
    "data": {"name": "digits", "data_dir": "/a/folder", "image_size": 8},
    "model": {"name": "resnet_8", "width": 0.25},
    "victim": TRAINING,
    "attack": {
        "name": "wanet",
        "trigger": {"name": "warp", "options": {"grid_size": 2, "strength": 1.0}},
        "target_label": 3,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a run that has trained a victim, as far as the zoo looks at it."""
    path = tmp_path_factory.mktemp("run")
    parsed = zoo._parse({"recipe": RECIPE})
    config = settings.NadExperimentSettings(
        title="",
        **parsed,
        defense=settings.RepairSettings(
            parsed["victim"],
            settings.NadSettings({"stage1": 1.0}),
            clean_model_rows=(),
        ),
        seeds=(4,),
    )
    train, _ = pipeline.load_data(config.data)
    model = models.build("resnet_8", num_classes=10, width=0.25)
    key = jax.random.key(4)
    own = workdir_lib.Workdir(path, dataclasses.asdict(config))
    with contextlib.closing(own) as workdir:
        subjects = victims.obtain(
            config, train, model, workdir, seed=4, victim_key=key, poison_key=key
        )
    net = zoo.base.Net(model, subjects.models["backdoored"])
    rates = zoo.measure(
        zoo.Victim(net, subjects.trigger, {"recipe": RECIPE, "num_classes": 10})
    )
    row = schema.Row(
        name="float",
        model="backdoored",
        seed=4,
        weight_bits=None,
        act_bits=None,
        flip_rate=None,
        seconds=0.0,
        **rates,
    )
    report = schema.build_report(
        title="",
        config=dataclasses.asdict(config),
        rows=[row],
        git_commit=None,
        versions={"jax": "1"},
        devices=[],
        seconds={},
    )
    whole_file.write_json(path / "report.json", report)
    return path, subjects, rates


@pytest.fixture
def filled(run, tmp_path):
    command = ["add", str(run[0]), "--name=one", "--seed=4", f"--zoo={tmp_path}"]
    assert zoo.main(command) == 0
    return tmp_path


@pytest.mark.slow
def test_what_is_put_in_comes_out_bit_for_bit(run, filled):
    _, subjects, rates = run
    victim = zoo.load("one", filled)
    stored, kept = victim.net.variables, subjects.models["backdoored"]
    assert jax.tree.structure(stored) == jax.tree.structure(kept)
    jax.tree.map(np.testing.assert_array_equal, stored, kept)
    assert victim.trigger.offset is None
    np.testing.assert_array_equal(victim.trigger.field, subjects.trigger.field)
    assert victim.manifest["acc"] == rates["acc"]
    assert victim.manifest["recipe"]["data"]["data_dir"] is None


@pytest.mark.slow
def test_a_victim_may_be_that_of_an_earlier_run(run, filled, tmp_path):
    report = json.loads((run[0] / "report.json").read_text("utf-8"))
    report["config"]["victim_workdir"] = str(run[0])
    report["made_by"] = [{"git_commit": "later"}, {"git_commit": "earlier"}]
    (tmp_path / "later").mkdir()
    whole_file.write_json(tmp_path / "later" / "report.json", report)
    zoo.add(tmp_path / "later", "again", seed=4, zoo=tmp_path)
    later, first = zoo.load("again", tmp_path), zoo.load("one", filled)
    assert later.manifest["made_by"] == report["made_by"]
    assert "made_by" not in first.manifest
    jax.tree.map(
        np.testing.assert_array_equal, later.net.variables, first.net.variables
    )


@pytest.mark.slow
def test_verifying_measures_what_the_manifest_says(filled, capsys):
    verify = ["verify", "--measure", f"--zoo={filled}"]
    assert zoo.main(verify) == 0
    assert "as in the manifest" in capsys.readouterr().out
    manifest = json.loads((filled / "one.json").read_text())
    manifest["acc"] += 0.02
    (filled / "one.json").write_text(json.dumps(manifest))
    assert zoo.main(verify) == 1


@pytest.mark.slow
def test_one_changed_bit_is_noticed(filled):
    path = filled / "one.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.InputError, match="SHA-256.*damaged or was exchanged"):
        zoo.load("one", filled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "message"),
    [("two", "no victim 'two' in the zoo; there are one"), ("../one", "no victim")],
)
def test_a_stranger_is_named(filled, name, message):
    with pytest.raises(errors.InputError, match=message):
        zoo.load(name, filled)


@pytest.mark.slow
def test_a_run_without_that_victim_is_refused(run, tmp_path, capsys):
    command = ["add", str(run[0]), "--name=one", "--seed=5", f"--zoo={tmp_path}"]
    assert zoo.main(command) == 2
    assert (
        "no victim of configs/nad.py or configs/efrap.py with seed 5"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_a_victim_can_be_a_teacher(run, filled):
    """`config.defense.teacher` takes a file of the zoo."""
    net, sha256 = zoo.read_net(str(filled / "one.safetensors"))
    assert sha256 == zoo.read_manifest("one", filled)["sha256"]
    images = jnp.full((1, 8, 8, 3), 0.5)
    expected = zoo.load("one", filled).net.logits(run[1].models["backdoored"], images)
    np.testing.assert_array_equal(net.logits(net.variables, images), expected)


PARTS = {"pattern": (8, 8, 3), "mask": (8, 8, 1)}


def write_card(path, *, trigger=None, zoo=None, model=RECIPE["model"], tree=None):
    """A file as one of the zoo, of any content."""
    zoo = zoo or {"recipe": {**RECIPE, "model": model}, "num_classes": 10}
    if trigger is None:
        trigger = {name: np.zeros(shape, np.float32) for name, shape in PARTS.items()}
    tree = tree or {"params": {"fc": {"bias": np.zeros(10, np.float32)}}}
    parts = artifact.Artifact(
        {**tree, "trigger": trigger}, {}, {}, {}, {}, None, {"zoo": zoo}
    )
    artifact.write_artifact(path, parts)
    return str(path)


@pytest.mark.slow
def test_a_small_file_cannot_ask_for_the_weights_of_a_large_model(tmp_path):
    path = write_card(tmp_path / "x", model={"name": "resnet_8", "width": 40.0})
    tracemalloc.start()
    try:
        with pytest.raises(errors.InputError, match="arrays of a resnet_8 of width 40"):
            zoo.read_net(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6  # Its weights would take 480 MB.


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "resnet_8", "width": 1e300}, "width 1e.300 is wider"),
        ({"name": "wrn_16_99999999999999999999", "width": 1e-300}, "is wider"),
        ({"name": "vit_tiny", "width": 0.0}, "width must be > 0"),
        ({"name": "resnet_8", "width": 10**400}, "model.width must be a float"),
        ({"name": ["resnet_8"]}, "must be str"),
    ],
)
def test_sizes_of_a_card_are_bounded(tmp_path, model, message):
    with pytest.raises(errors.InputError, match=message):
        zoo.read_net(write_card(tmp_path / "x", model=model))


@pytest.mark.parametrize("classes", [0, True, "10", 10**12, 1e300, None])
def test_the_number_of_classes_of_a_card_is_bounded(tmp_path, classes):
    card = {"recipe": RECIPE, "num_classes": classes}
    with pytest.raises(errors.InputError, match="num_classes must be 1 to 65536"):
        zoo.read_net(write_card(tmp_path / "x", zoo=card))


@pytest.mark.parametrize(
    ("trigger", "message"),
    [
        (np.zeros(3, np.float32), "must have the parts pattern and mask"),
        ({"pattern": np.zeros((8, 8, 3), np.float32)}, "must have the parts"),
        ({**PARTS, "colour": (1,)}, "and has no others"),
        ({**PARTS, "pattern": (8,)}, r"must be \[H, W, C\]"),
        ({**PARTS, "pattern": (0, 8, 3)}, r"must be \[H, W, C\]"),
        ({**PARTS, "mask": (8, 8, 3)}, "trigger mask must have shape"),
        ({**PARTS, "pattern": np.zeros((8, 8, 3), np.int32)}, "must be a float32"),
        ({**PARTS, "pattern": np.full((8, 8, 3), 2, np.float32)}, "values in"),
    ],
)
def test_a_trigger_that_is_none_is_one_line(tmp_path, trigger, message):
    if isinstance(trigger, dict):
        trigger = {
            name: np.zeros(part, np.float32) if isinstance(part, tuple) else part
            for name, part in trigger.items()
        }
    with pytest.raises(errors.InputError, match=message) as refusal:
        zoo.read_net(write_card(tmp_path / "x", trigger=trigger))
    assert "\n" not in str(refusal.value) and str(tmp_path) in str(refusal.value)


@pytest.mark.slow
def test_weights_of_another_dtype_are_refused(tmp_path):
    model = models.build("resnet_8", num_classes=10, width=0.25)
    tree = common.init(model, jax.random.key(0), (8, 8, 3))
    read = zoo.read_net(write_card(tmp_path / "good", tree=tree))[0]
    jax.tree.map(np.testing.assert_array_equal, read.variables, tree)
    tree["params"]["fc"]["bias"] = np.zeros(10, np.float16)
    with pytest.raises(errors.InputError, match="does not hold the arrays"):
        zoo.read_net(write_card(tmp_path / "bad", tree=tree))


@pytest.mark.slow
def test_the_hash_is_of_the_bytes_that_were_read(tmp_path, monkeypatch):
    """Somebody exchanges the file as soon as it has been read."""
    model = models.build("resnet_8", num_classes=10, width=0.25)
    trees = [common.init(model, jax.random.key(i), (8, 8, 3)) for i in range(2)]
    path, other = (write_card(tmp_path / f"{i}", tree=trees[i]) for i in range(2))
    real = reader.read_checkpoint

    def read_and_exchange(path):
        checkpoint = real(path)
        (tmp_path / "0").write_bytes((tmp_path / "1").read_bytes())
        return checkpoint

    monkeypatch.setattr(reader, "read_checkpoint", read_and_exchange)
    expected = bounded_file.sha256(path)
    net, sha256 = zoo.read_net(path)
    assert sha256 == expected != bounded_file.sha256(other)
    jax.tree.map(np.testing.assert_array_equal, net.variables, trees[0])


@pytest.fixture(scope="module")
def sleeper(tmp_path_factory):
    """A zoo with a victim of a run of configs/efrap.py, and the variables of the run.

    Nothing is trained: two random nets stand for the clean and the backdoored one.
    """
    path = tmp_path_factory.mktemp("efrap_run")
    sections = config_file.get_config("smoke").to_dict()
    sections["data"]["image_size"] = 8
    sections["model"] = RECIPE["model"]
    sections["seeds"] = (7,)
    sections["attack"]["weight_bits"] = (4, 2)
    config = settings.parse(sections)
    model = models.build("resnet_8", num_classes=10, width=0.25)
    kept = {
        kind: common.init(model, jax.random.key(place), (8, 8, 3))
        for place, kind in enumerate(("clean", "backdoored"))
    }
    told = dataclasses.asdict(config)
    with contextlib.closing(workdir_lib.Workdir(path, told)) as workdir:
        for kind, variables in kept.items():
            stage = f"seed7-{kind}"
            workdir.stage(stage, variables, lambda variables=variables: variables)
    trigger = pipeline.build_trigger(config.attack.trigger, (8, 8, 3))
    net = zoo.base.Net(model, kept["backdoored"])
    recipe = {key: told[key] for key in zoo._RECIPE}
    victim = zoo.Victim(net, trigger, {"job": "efrap", "recipe": recipe}, kept["clean"])
    rates = zoo.measure(victim)
    assert [entry["weight_bits"] for entry in rates["on_own_grid"]] == [4, 2]
    nothing = {"weight_bits": None, "act_bits": None, "flip_rate": None, "seconds": 0.0}
    counted = ("acc", "asr", "ra", "acc_count", "asr_count")
    measured = {key: rates[key] for key in counted}
    row = schema.Row(name="float", model="backdoored", seed=7, **nothing, **measured)
    four, two = rates["on_own_grid"]
    facts = {
        "seed": 7,
        "own_grid": [{"weight_bits": 4, "same_grid": True}, two],
        "defender_grid": four,
        "accepted": False,
    }
    report = schema.build_report(
        title="",
        config=told,
        rows=[row],
        git_commit=None,
        versions={"jax": "1"},
        devices=[],
        seconds={},
        facts={"acceptance": [facts]},
    )
    whole_file.write_json(path / "report.json", report)
    folder = tmp_path_factory.mktemp("zoo")
    command = ["add", str(path), "--name=sleeper", "--seed=7", f"--zoo={folder}"]
    assert zoo.main(command) == 0
    return folder, kept, rates


@pytest.fixture
def asleep(sleeper, tmp_path):
    """The zoo of `sleeper`, to be changed."""
    shutil.copytree(sleeper[0], tmp_path / "zoo")
    return tmp_path / "zoo"


@pytest.mark.slow
def test_a_backdoor_that_sleeps_comes_with_its_clean_model(sleeper):
    folder, kept, rates = sleeper
    victim = zoo.load("sleeper", folder)
    read = {"backdoored": victim.net.variables, "clean": victim.clean}
    jax.tree.map(np.testing.assert_array_equal, read, kept)
    assert victim.manifest["on_own_grid"] == rates["on_own_grid"]
    assert victim.manifest["accepted"] is False


@pytest.mark.slow
def test_verifying_wakes_a_backdoor_that_sleeps(asleep, capsys):
    verify = ["verify", "--measure", f"--zoo={asleep}"]
    assert zoo.main(verify) == 0
    said = capsys.readouterr().out
    assert "; rounded to 4 bits ACC" in said and "; rounded to 2 bits ACC" in said
    path = asleep / "sleeper.json"
    shifted = json.loads(path.read_text())
    # Its float rates are as promised.
    asr = shifted["on_own_grid"][1]["asr"]
    shifted["on_own_grid"][1]["asr"] = asr + 0.02 if asr < 0.5 else asr - 0.02
    path.write_text(json.dumps(shifted))
    assert zoo.main(verify) == 1
    assert "NOT as in the manifest" in capsys.readouterr().out


@pytest.mark.slow
def test_a_changed_clean_model_is_noticed(asleep):
    (asleep / "sleeper.clean.safetensors").write_bytes(
        (asleep / "sleeper.safetensors").read_bytes()
    )
    with pytest.raises(errors.InputError, match="clean.safetensors has the SHA-256"):
        zoo.load("sleeper", asleep)
    (asleep / "sleeper.clean.safetensors").unlink()
    with pytest.raises(errors.InputError, match="clean.safetensors is missing"):
        zoo.load("sleeper", asleep)


@pytest.mark.slow
def test_a_file_of_another_recipe_is_noticed(asleep):
    """Both hashes are good; the model is applied as the recipe says."""
    path = asleep / "sleeper.json"
    told = json.loads(path.read_text())
    told["recipe"]["model"]["width"] = 0.5
    path.write_text(json.dumps(told))
    with pytest.raises(errors.InputError, match="another recipe than its manifest"):
        zoo.load("sleeper", asleep)


def test_the_trigger_of_a_victim_is_used_before_that_of_the_config():
    config = settings.parse(main.shipped_config("efrap.py", "smoke").to_dict())
    own = pipeline.build_trigger(config.attack.trigger, (8, 8, 3))
    other = own._replace(pattern=1 - own.pattern)
    assert efrap_experiment.set_scene(config, None, other).goal.trigger is other


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("clean_sha256", None, "KeyError 'clean_sha256'"),
        ("on_own_grid", None, "KeyError 'on_own_grid'"),
        ("on_own_grid", [{"weight_bits": 4, "acc": 2, "asr": 0}], "must be in .0, 1."),
        ("on_own_grid", [{"weight_bits": "4", "acc": 1, "asr": 0}], "integers"),
        ("on_own_grid", 4, "TypeError"),
        ("on_own_grid", [], r"must be of \[4, 2\] bits, got \[\]"),
        ("on_own_grid", [{"weight_bits": 8, "acc": 1, "asr": 0}], r"got \[8\]"),
        ("job", "vet", "job must be of nad, efrap"),
        ("job", "nad", "fold_batch_norm is not known"),
    ],
)
def test_a_damaged_manifest_of_a_sleeper_is_one_line(
    asleep, capsys, key, value, message
):
    told = json.loads((asleep / "sleeper.json").read_text())
    told.pop(key) if value is None else told.update({key: value})
    (asleep / "sleeper.json").write_text(json.dumps(told))
    for command in ("list", "verify"):
        assert zoo.main([command, f"--zoo={asleep}"]) == 2
        said = capsys.readouterr().err
        assert "manifest of 'sleeper' is damaged" in said and said.count("\n") == 1
        assert re.search(message, said)


@pytest.mark.parametrize(
    ("config", "name", "other"),
    [("nad", "digits-pq", "efrap"), ("efrap", "digits-blend", "nad")],
)
def test_a_victim_of_the_other_job_is_refused(config, name, other, tmp_path, capsys):
    command = ["main", f"--config={main.shipped(f'{config}.py')}:zoo/{name}"]
    assert main.main([*command, f"--workdir={tmp_path}/run"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"the victim {name} of the zoo is one of configs/{other}.py" in said
    assert not (tmp_path / "run").exists()


def test_a_sleeper_keeps_its_recipe_and_the_defenders_settings():
    sections = main.shipped_config("efrap.py", "zoo/digits-pq")
    plain = zoo.resolve(settings.parse(sections.to_dict()))
    told = zoo.read_manifest("digits-pq", zoo.folder())
    assert plain.attack == zoo._parse(told)["attack"]
    sections.defense.weight_bits = 3
    changed = zoo.resolve(settings.parse(sections.to_dict()))
    assert changed.defense.weight_bits == 3 and changed.attack == plain.attack
    sections.attack.target_label = 4
    with pytest.raises(errors.InputError, match="cannot take config.attack.target_lab"):
        zoo.resolve(settings.parse(sections.to_dict()))


def test_a_sleeper_can_be_given_every_control():
    sections = main.shipped_config("efrap.py", "zoo/digits-pq+controls")
    every = zoo.resolve(settings.parse(sections.to_dict()))
    ours = settings.parse(main.shipped_config("efrap.py", "controls").to_dict())
    assert (every.defense, every.repairs) == (ours.defense, ours.repairs)


def test_a_name_is_not_that_of_a_clean_model(tmp_path, capsys):
    command = ["add", str(tmp_path), "--name=one.clean", f"--zoo={tmp_path}"]
    assert zoo.main(command) == 2
    assert "not ending in .clean, got 'one.clean'" in capsys.readouterr().err


def test_victims_are_known_by_job():
    folder = zoo.folder()
    jobs = {job: set(zoo.names(folder, job)) for job in ("nad", "efrap")}
    assert "digits-blend" in jobs["nad"] and "digits-pq" in jobs["efrap"]
    assert not jobs["nad"] & jobs["efrap"]
    assert jobs["nad"] | jobs["efrap"] == set(zoo.names(folder))


@pytest.mark.parametrize(
    "variant", ["zoo/digits-pq+w8", "zoo/digits-pq+controls+w8", "zoo"]
)
def test_a_victim_is_not_mixed_with_another_attack(variant):
    with pytest.raises(ValueError, match="zoo/NAME"):
        config_file.get_config(variant)


@pytest.mark.slow
def test_a_run_uses_the_victim_and_the_clean_model(sleeper, monkeypatch, tmp_path):
    """Float rows are those of the stored nets, whatever the seed."""
    folder, kept, rates = sleeper
    monkeypatch.setattr(zoo, "_FOLDERS", (folder,))
    sections = main.shipped_config("efrap.py", "zoo/sleeper")
    sections.defense.roundings = ("nearest",)
    config = settings.parse(sections.to_dict())
    used = []
    real = efrap_experiment.set_scene

    def set_scene(config, workdir, trigger):
        used.append(trigger)
        return real(config, workdir, trigger)

    monkeypatch.setattr(efrap_experiment, "set_scene", set_scene)
    with contextlib.closing(workdir_lib.Workdir(tmp_path, {})) as workdir:
        report = efrap_experiment.run(config, workdir)
        pinned = workdir_lib.read_inputs(tmp_path)
    floats = {row["model"]: row for row in report["rows"] if row["name"] == "float"}
    assert floats["backdoored"]["acc"] == rates["acc"]
    (trigger,) = used
    stored = zoo.load("sleeper", folder).trigger
    jax.tree.map(np.testing.assert_array_equal, trigger, stored)
    scene = real(zoo.resolve(config))
    assert floats["clean"]["acc"] == scene.evaluate(kept["clean"])["acc"]
    assert report["claims"][0]["passed"]
    told = zoo.read_manifest("sleeper", folder)
    assert pinned["victim of the zoo"] == told["sha256"]
    assert pinned["clean model of the zoo"] == told["clean_sha256"]


def test_without_a_zoo_one_line_says_where_it_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(zoo, "_FOLDERS", (tmp_path / "nowhere",))
    config = "--config=configs/nad.py:zoo/one"
    assert main.main(["main", config, f"--workdir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "folder zoo/ of the source repository" in said


@pytest.mark.slow
def test_a_run_takes_the_recipe_of_its_victim(filled, monkeypatch):
    monkeypatch.setattr(zoo, "_FOLDERS", (filled,))
    sections = main.shipped_config("nad.py", "zoo/one")
    sections.data.update(data_dir="here", loader="stream", workers=2)
    sections.defense.training.epochs = 7
    resolved = zoo.resolve(settings.parse(sections.to_dict()))
    data = settings.DataSettings("digits", "here", 8, loader="stream", workers=2)
    assert resolved.data == data
    assert resolved.model.name == "resnet_8" and resolved.attack.name == "wanet"
    assert resolved.attack.trigger.options == {"grid_size": 2, "strength": 1.0}
    assert resolved.defense.training.epochs == 7
    assert resolved.defense.clean_model_rows == ()
    assert zoo.resolve(resolved) == resolved


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attack.poison_rate", 0.5),
        ("model.name", "resnet_8"),
        ("victim.epochs", 3),
        ("data.image_size", 8),
        ("victim_workdir", "/nonexistent"),
        ("defense.clean_model_rows", ("ft_sam",)),
    ],
)
def test_a_setting_that_would_be_dropped_is_refused(key, value, tmp_path, capsys):
    """Else the command in the report would tell what was not done."""
    config = f"--config={main.shipped('nad.py')}:zoo/digits-blend"
    command = ["main", config, f"--config.{key}={value}", f"--workdir={tmp_path}/run"]
    assert main.main(command) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"cannot take config.{key}={value!r}" in said
    assert not (tmp_path / "run").exists()


def test_a_trigger_of_ones_own_config_is_refused():
    sections = main.shipped_config("nad.py", "blend")
    sections.zoo = "digits-blend"
    zoo.resolve(settings.parse(sections.to_dict()))
    sections.attack.trigger.alpha = 0.1
    with pytest.raises(errors.InputError, match="config.attack.trigger.*alpha=0.1"):
        zoo.resolve(settings.parse(sections.to_dict()))


def test_a_victim_of_the_zoo_can_be_given_every_control():
    sections = main.shipped_config("nad.py", "zoo/digits-blend+controls")
    every = zoo.resolve(settings.parse(sections.to_dict()))
    assert set(every.defense.rows) == set(settings.REPAIRS)
    assert every.defense.clean_model_rows == ()
    short = zoo.resolve(
        settings.parse(main.shipped_config("nad.py", "zoo/digits-blend").to_dict())
    )
    defense = dataclasses.replace(every.defense, rows=short.defense.rows)
    assert dataclasses.replace(every, defense=defense) == short


def test_what_is_the_recipes_or_the_defenders_may_be_said():
    sections = main.shipped_config("nad.py", "zoo/digits-blend")
    plain = zoo.resolve(settings.parse(sections.to_dict()))
    sections.attack.name = "blend"
    sections.victim.epochs = 14
    sections.defense.clean_model_rows = ()
    assert zoo.resolve(settings.parse(sections.to_dict())) == plain
    sections.seeds = (1, 2)
    sections.defense.clean_fraction = 0.1
    changed = zoo.resolve(settings.parse(sections.to_dict()))
    assert changed.seeds == (1, 2) and changed.defense.clean_fraction == 0.1


@pytest.mark.slow
def test_parts_of_a_trigger_survive_as_a_trigger(filled):
    victim = zoo.load("one", filled)
    triggers.check_trigger(victim.trigger, (8, 8, 3))


@pytest.mark.slow
def test_the_shipped_victims_are_whole():
    """Hash, arrays and trigger of every one."""
    for name in zoo.names(zoo.folder()):
        victim = zoo.load(name, zoo.folder())
        assert victim.manifest["name"] == name
        awake = victim.manifest.get("on_own_grid", [victim.manifest])
        assert all(rates["asr"] >= 0.7 for rates in awake)


def manifest(**changes):
    recipe = {**RECIPE, "data": {"name": "digits"}}
    return {
        **{"format": zoo.FORMAT, "sha256": "0", "acc": 0.9, "asr": 1, "seed": 0},
        **{"recipe": recipe, "num_classes": 10, **changes},
    }


def test_a_list_needs_no_more_than_a_manifest_must_have(tmp_path, capsys):
    whole_file.write_json(tmp_path / "one.json", manifest())
    assert zoo.main(["list", f"--zoo={tmp_path}"]) == 0
    assert "resnet_8 wanet all_to_one rate 0.1 seed 0  ACC" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"recipe": {}},
        {"recipe": []},
        {"recipe": {**RECIPE, "attack": {}}},
        {"recipe": {**RECIPE, "model": {"name": "resnet_8", "depth": 1}}},
        {"recipe": {**RECIPE, "victim": {**TRAINING, "learning_rate": 10**400}}},
        {"acc": None},
        {"asr": "high"},
        {"acc": 90},
        {"seed": "x"},
    ],
)
def test_a_manifest_that_is_none_is_one_line(tmp_path, capsys, changes):
    whole_file.write_json(tmp_path / "one.json", manifest(**changes))
    for command in ("list", "verify"):
        assert zoo.main([command, f"--zoo={tmp_path}"]) == 2
        said = capsys.readouterr().err
        assert "manifest of 'one' is damaged" in said and said.count("\n") == 1


def test_a_bug_does_not_say_that_a_victim_is_not_as_promised(monkeypatch, capsys):
    monkeypatch.setitem(zoo._COMMANDS, "verify", lambda arguments: 1 / 0)
    assert zoo.main(["verify"]) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err
