# SPDX-License-Identifier: Apache-2.0
"""Victims from files: poisoned alike, and trained as the config says, or refused."""

import dataclasses
import importlib.util
import pathlib

import jax
import numpy as np
import pytest

from nad_jax import errors, main, models, pipeline, settings, victims
from nad_jax.attacks import poisoning
from nad_jax.data import sources, stored
from nad_jax.training import loop

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "nad.py"


@pytest.fixture
def npz(tmp_path) -> pathlib.Path:
    """A few digits of 8 x 8 pixels."""
    train = sources.load("digits", split="train", image_size=8).take(np.arange(120))
    test = sources.load("digits", split="test", image_size=8).take(np.arange(60))
    np.savez(
        tmp_path / "digits.npz",
        images_train=train.images,
        labels_train=train.labels,
        images_test=test.images,
        labels_test=test.labels,
    )
    return tmp_path / "digits.npz"


def _attack(variant: str) -> settings.PoisoningSettings:
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = settings.parse(module.get_config(f"smoke+{variant}").to_dict())
    return config.attack


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["badnets", "wanet"])
def test_poison_is_the_same_in_files_and_in_memory(variant, npz):
    """And what the functions of `poisoning` make of the whole set at once."""
    attack = _attack(variant)
    keys = jax.random.split(jax.random.key(4))
    poisoned = []
    for in_memory in (True, False):
        train = sources.load("npz", split="train", data_dir=npz, in_memory=in_memory)
        trigger = pipeline.build_trigger(attack.trigger, train.images.shape[1:])
        poisoned.append(
            victims._poisoned(attack, train, None, None, trigger, keys[0], keys[1])
        )
    whole, part = poisoned
    assert isinstance(part.images, stored.Images)
    np.testing.assert_array_equal(part.images[:], whole.images)
    np.testing.assert_array_equal(part.labels, whole.labels)

    train = sources.load("npz", split="train", data_dir=npz)
    rows = poisoning.poison_indices(
        keys[0],
        train.labels,
        poison_rate=attack.poison_rate,
        mode=attack.label_mode,
        target_label=attack.target_label,
    )
    images = np.array(train.images)
    if attack.noise_ratio:
        row_key, field_key = jax.random.split(keys[1])
        others = np.setdiff1d(np.arange(len(train)), rows)
        order = np.asarray(jax.random.permutation(row_key, len(others)))
        bent = others[order[: round(attack.noise_ratio * len(rows))]]
        images = poisoning.distract(
            images, bent, trigger, jitter=attack.noise_jitter, key=field_key
        )
    images, labels = poisoning.poison(
        images,
        train.labels,
        rows,
        trigger,
        mode=attack.label_mode,
        target_label=attack.target_label,
        num_classes=train.num_classes,
    )
    np.testing.assert_array_equal(whole.images, images)
    np.testing.assert_array_equal(whole.labels, labels)
    assert (images != train.images).any(axis=(1, 2, 3)).sum() >= 10


@pytest.mark.slow
@pytest.mark.parametrize("config", ["nad.py", "efrap.py"])
@pytest.mark.parametrize("loader", settings.LOADERS)
def test_the_loader_of_a_config_is_that_of_its_victims(
    config, loader, npz, tmp_path, monkeypatch, capsys
):
    """As far as the training loop, where `feeds_test` takes over."""
    reached = []

    def fit(state, images, labels, *, workers, **_):
        reached.append((type(images), len(labels), workers))
        raise errors.InputError("far enough")

    monkeypatch.setattr(loop, "fit", fit)
    workers = 3 if loader == "stream" else 0
    command = [
        "main",
        f"--config={CONFIG.parent / config}:smoke",
        f"--workdir={tmp_path / 'run'}",
        "--config.data.name=npz",
        f"--config.data.data_dir={npz}",
        f"--config.data.loader={loader}",
        f"--config.data.workers={workers}",
    ]
    assert main.main(command) == 2
    assert "far enough" in capsys.readouterr().err
    kind = stored.Images if loader == "stream" else np.ndarray
    assert reached == [(kind, 120, workers)]


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("nad.py:smoke", ["--config.data.loader=disk"], "device, stream, got 'disk'"),
        ("nad.py:smoke", ["--config.data.workers=2"], "loader stream, got 2"),
        (
            "nad.py:smoke",
            ["--config.data.loader=stream", "--config.data.workers=-1"],
            "workers must be >= 0, got -1",
        ),
        ("nad.py:smoke", ["--config.data.loader=stream"], "'digits' has no files"),
        ("efrap.py:smoke", ["--config.data.loader=stream"], "'digits' has no files"),
    ],
)
def test_what_cannot_be_streamed_is_refused(config, options, words, tmp_path, capsys):
    path = CONFIG.parent / config
    command = ["main", f"--config={path}", f"--workdir={tmp_path / 'run'}"]
    assert main.main([*command, *options]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said


WARP = settings.TriggerSettings("warp", {"grid_size": 2, "strength": 1.0})


def _ten_classes() -> sources.Dataset:
    images = np.zeros((40, 8, 8, 3), np.uint8)
    return sources.Dataset(images, np.arange(40, dtype=np.int32) % 10, 10, "small")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "changes", "words"),
    [
        (
            "badnets",
            {"trigger": settings.TriggerSettings("nope")},
            "must be of .*blend",
        ),
        ("badnets", {"noise_ratio": 0.5}, "noise_ratio must be 0 .* got 0.5 with grid"),
        ("badnets", {"poison_rate": 0.01}, "0.01 selects none of 40 images"),
        ("sig", {"poison_rate": 0.5}, "clean_label allows at most 0.1"),
        ("trojan", {"trigger": WARP}, "needs one picture"),
        (
            "trojan",
            {"trojan": settings.TrojanSettings(neurons=65)},
            "trojan.neurons must be at most 64, .* got 65",
        ),
    ],
)
def test_an_attack_that_cannot_be_is_refused(variant, changes, words):
    attack = _attack(variant)
    model = models.build("wrn_10_1", num_classes=10)
    victims.check(attack, _ten_classes(), model)
    with pytest.raises(errors.InputError, match=words):
        victims.check(dataclasses.replace(attack, **changes), _ten_classes(), model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ("nad.py:smoke", ["attack.trigger.name=nope"], "trigger.name must be of"),
        (
            "nad.py:smoke",
            ["defense.training.crop_padding=8"],
            "config.defense.training.crop_padding must be below 8, the shorter side",
        ),
        (
            "efrap.py:smoke",
            ["attack.recipe.hide.cutout=9"],
            "config.attack.recipe.hide.cutout must be below 8, the shorter",
        ),
        (
            "efrap.py:controls+smoke",
            ["repairs.training.cutout=8"],
            "config.repairs.training.cutout must be below 8",
        ),
        (
            "nad.py:smoke+controls",
            ["defense.clean_fraction=0.003"],
            "none of 4 clean images held out for fine_pruning, mode_connectivity",
        ),
        (
            "efrap.py:controls+smoke",
            ["repairs.clean_fraction=0.003", "repairs.rows=('fine_pruning',)"],
            "none of 4 clean images held out for fine_pruning",
        ),
        (
            "nad.py:smoke",
            ["defense.nad.betas.stage4=50"],
            "must name stages of stage1, stage2, stage3, got stage4",
        ),
        (
            "efrap.py:controls+smoke",
            ["repairs.nad.betas.stage12=50"],
            "must name stages of stage1, stage2, stage3, got stage12",
        ),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_before_all(
    config, options, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(loop, "fit", lambda *_, **__: pytest.fail("somebody trains"))
    command = ["main", f"--config={CONFIG.parent / config}"]
    command += [f"--config.{option}" for option in options]
    assert main.main([*command, f"--workdir={tmp_path / 'run'}"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and words in said
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("job", ["vet", "audit"])
def test_jobs_that_train_on_few_images_refuse_the_stream(job):
    cls = settings.JOBS[job]
    data = settings.DataSettings("npz", loader="stream")
    files = {"vet": {"checkpoint": "x"}, "audit": {}}[job]
    required = dict.fromkeys(("title", "arch", "training", "nad", "defense"), None)
    required |= dict.fromkeys(("float_model", "integer_file"), "x")
    given = {**required, **files, "data": data}
    given = {k: v for k, v in given.items() if k in cls.__dataclass_fields__}
    with pytest.raises(Exception, match=f"data.loader must be device in the job {job}"):
        cls(**given)
