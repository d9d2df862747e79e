# SPDX-License-Identifier: Apache-2.0
"""Vetting from a foreign file to a verdict, in miniature."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from nad_jax import main, models, settings, vet_experiment
from nad_jax.data import sources
from nad_jax.interop import (
    arch_match,
    artifact,
    bounded_file,
    name_maps,
    onnx_codes,
    safetensors_file,
)
from nad_jax.models import common
from nad_jax.report import schema

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "vet.py"


def _config():
    spec = importlib.util.spec_from_file_location("config", CONFIG)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config().to_dict()


def _write_stranger(path, num_classes):
    """A WRN with random weights, under PyTorch's names."""
    model = models.build("wrn_10_1", num_classes=num_classes)
    variables = common.init(model, jax.random.key(0), (8, 8, 3))
    torch_names = arch_match._module_names({}, "wrn_10_1")
    leaves = arch_match._expected(model, (8, 8, 3), torch_names)
    names = {name: leaf.paths for name, leaf in leaves.items()}
    safetensors_file.write_safetensors(path, name_maps.as_found(variables, names))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return _write_stranger(tmp_path_factory.mktemp("given") / "stranger.bin", 10)


def _write_folder(path):
    """A PNG for every image, in a folder for each class."""
    for split in ("train", "test"):
        digits = sources.load("digits", split=split, image_size=8)
        data = digits.take(np.arange(200))
        for row, (image, label) in enumerate(
            zip(data.images, data.labels, strict=True)
        ):
            folder = path / split / f"digit {label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / f"{row:04}.png")
    return path


def _vet(checkpoint, workdir, *more, variant=""):
    return main.main(
        [
            "main",
            f"--config=configs/vet.py{variant}",
            f"--config.checkpoint={checkpoint}",
            "--config.data.name=digits",
            "--config.data.image_size=8",
            "--config.clean_fraction=0.4",
            "--config.training.epochs=1",
            "--config.nad.teacher_epochs=1",
            "--config.defense.calibration_images=32",
            f"--workdir={workdir}",
            *more,
        ]
    )


@pytest.mark.slow
def test_a_useless_model_is_repaired_exported_and_judged(
    checkpoint, few_digits, tmp_path, capsys
):
    """Untrained weights cannot lose accuracy; the images come from one .npz file."""
    workdir = tmp_path / "vet"
    options = (
        *(f"--config.data.{key}={value}" for key, value in few_digits.items()),
        "--config.verdict.max_drift=1.0",
    )
    assert _vet(checkpoint, workdir, *options) == 0
    assert "verdict: accepted (no trigger known" in capsys.readouterr().out
    report = json.loads((workdir / "report.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    names = ["float", "nearest", "nad", "nad_nearest", "efrap", "exported"]
    assert list(rows) == names
    assert rows["exported"]["extra"]["agreement"] >= 0.995
    assert all(row["asr"] is None for row in report["rows"])
    card = json.loads((workdir / "card.json").read_text())
    assert card["source_sha256"] == bounded_file.sha256(checkpoint)
    assert set(card["files"]) == {
        "model.safetensors",
        "model.onnx",
        "model.stablehlo",
        "float.safetensors",
    }
    for name, digest in card["files"].items():
        assert bounded_file.sha256(workdir / name) == digest
    stored = artifact.read_artifact(workdir / "model.safetensors")
    assert stored.card["arch"] == "wrn_10_1"
    assert all(codes.dtype == np.int8 for codes in stored.codes.values())

    # Whoever doubts the file can compare it with the repaired floats.
    for name in ("model.safetensors", "model.onnx"):
        audit = main.main(
            [
                "main",
                "--config=configs/audit.py",
                f"--config.float_model={workdir / 'float.safetensors'}",
                f"--config.integer_file={workdir / name}",
                *options[:2],
                "--config.images=128",
                f"--workdir={tmp_path / name}",
            ]
        )
        assert audit == 0, capsys.readouterr().out

    # The same workdir: nothing is trained again; another verdict needs another one.
    again = _vet(checkpoint, workdir, *options)
    assert again == 0 and "nad: restored" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trigger_that_is_known_is_measured_and_can_reject(
    checkpoint, tmp_path, capsys
):
    """On four-bit weights and float activations, which leave as INT4; a limit that
    nobody meets rejects. The images come from a folder for each class.
    """
    code = _vet(
        checkpoint,
        tmp_path / "vet",
        "--config.data.name=folder",
        f"--config.data.data_dir={_write_folder(tmp_path / 'digits')}",
        "--config.trigger.name=grid",
        "--config.target_label=3",
        "--config.defense.weight_bits=4",
        "--config.verdict.max_asr=0.0",
        "--config.verdict.min_agreement=1.0",
        "--config.verdict.max_accuracy_loss=0.0",
        "--config.verdict.max_drift=0.0",
        variant=":weights_only",
    )
    out = capsys.readouterr().out
    assert code == 1 and "verdict: rejected" in out and "not met:" in out
    exported = onnx_codes.read_onnx(tmp_path / "vet" / "model.onnx")
    stored = artifact.read_artifact(tmp_path / "vet" / "model.safetensors")
    assert set(exported.storage_bits.values()) == {4} and exported.act_bits is None
    for name, codes in stored.codes.items():
        np.testing.assert_array_equal(exported.codes[name], codes)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.data.name=digits"], "config.checkpoint is missing"),
        (["--config.checkpoint=nowhere", "--config.data.name=digits"], "nowhere"),
        (["--config.checkpoint=nowhere", "--config.verdict.max_asr=2.0"], "in [0, 1]"),
    ],
)
def test_what_cannot_be_judged_is_exit_code_2_and_one_line(
    arguments, message, tmp_path, capsys
):
    code = main.main(
        ["main", "--config=configs/vet.py", f"--workdir={tmp_path}/w", *arguments]
    )
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "broken, changes",
    [
        (None, {}),
        ("accuracy", {"acc": 0.68}),
        ("predictions on clean", {"drift": 0.11}),
        ("exported files", {"agreement": 0.99}),
        ("known trigger", {"asr": 0.07}),
    ],
)
def test_each_limit_rejects_alone(broken, changes):
    """At the limit itself a model still passes, though 0.7 - 0.69 > 0.01."""
    values = {"acc": 0.69, "asr": 0.06, "drift": 0.1, "agreement": 0.995, **changes}

    def row(acc, asr):
        return schema.Row("x", "given", 0, 8, 8, acc, asr, None, 100, 100, 0.0, 0.0)

    claims = vet_experiment._verdict(
        settings.VerdictSettings(),
        row(0.7, 1.0),
        row(values["acc"], values["asr"]),
        values["drift"],
        values["agreement"],
    )
    failed = [claim["text"] for claim in claims if not claim["passed"]]
    assert len(failed) == (broken is not None)
    assert all(broken in text for text in failed)
    assert vet_experiment.exit_code({"claims": claims}) == len(failed)


def test_without_a_trigger_nothing_is_claimed_about_one():
    row = schema.Row("x", "given", 0, 8, 8, 0.7, None, None, 100, None, 0.0, 0.0)
    claims = vet_experiment._verdict(settings.VerdictSettings(), row, row, 0.0, 1.0)
    assert len(claims) == 3 and not any("trigger" in c["text"] for c in claims)


def test_the_config_names_every_setting():
    """So no default of a vetting lives in two places."""
    mapping = _config()
    mapping["checkpoint"] = "x"
    for section, cls in (
        (mapping, settings.VetSettings),
        (mapping["defense"], settings.EfrapSettings),
        (mapping["nad"], settings.NadSettings),
        (mapping["training"], settings.TrainingSettings),
        (mapping["verdict"], settings.VerdictSettings),
    ):
        assert set(section) == set(cls.__dataclass_fields__)
    assert isinstance(settings.parse(mapping), settings.VetSettings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.trigger.name=x", "config.trigger.name must be of none, "),
        ("--config.target_label=10", "config.target_label must be below 10"),
    ],
)
def test_a_trigger_that_cannot_be_is_named_as_in_the_config(
    checkpoint, tmp_path, capsys, override, message
):
    assert _vet(checkpoint, tmp_path, "--config.trigger.name=grid", override) == 2
    err = capsys.readouterr().err
    assert message in err and "attack" not in err


@pytest.mark.slow
def test_unknown_classes_are_a_reason_not_to_judge(tmp_path, capsys):
    path = _write_stranger(tmp_path / "seven", 7)
    assert _vet(path, tmp_path / "w") == 2
    assert "7 classes" in capsys.readouterr().err
