# SPDX-License-Identifier: Apache-2.0
"""The audit as a command: two files in, a verdict and an exit code out."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import audit_experiment, main, models, settings, workdir
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.interop import (
    arch_match,
    artifact,
    bounded_file,
    name_maps,
    safetensors_file,
)
from nad_jax.models import common

EVALUATE = {"train": False}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A float WRN under PyTorch's names and its nearest rounding."""
    folder = tmp_path_factory.mktemp("files")
    model = models.build("wrn_10_1", num_classes=10, width=0.5)
    variables = common.init(model, jax.random.key(0), (8, 8, 3))
    torch_names = arch_match._module_names({}, "wrn_10_1")
    leaves = arch_match._expected(model, (8, 8, 3), torch_names)
    names = {name: leaf.paths for name, leaf in leaves.items()}
    safetensors_file.write_safetensors(
        folder / "float", name_maps.as_found(variables, names)
    )
    result = efrap_lib.efrap(
        model,
        variables,
        jnp.zeros((2, 8, 8, 3)),
        weight_bits=8,
        method="nearest",
        apply_kwargs=EVALUATE,
    )
    artifact.write_artifact(
        folder / "integers",
        artifact.Artifact(
            result.variables,
            result.codes,
            result.quant_params,
            result.specs,
            {},
            None,
            {"image_shape": [8, 8, 3]},
        ),
    )
    return folder


def _run(files, workdir, *more, integer_file="integers"):
    return main.main(
        [
            "main",
            "--config=configs/audit.py",
            f"--config.float_model={files / 'float'}",
            f"--config.integer_file={files / integer_file}",
            "--config.data.name=digits",
            "--config.data.image_size=8",
            "--config.images=32",
            f"--workdir={workdir}",
            *more,
        ]
    )


@pytest.mark.slow
def test_exit_codes_say_honest_findings_or_could_not_be_judged(files, tmp_path, capsys):
    assert _run(files, tmp_path / "a") == 0
    assert "verdict: honest" in capsys.readouterr().out
    report = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert report["honest"] and report["findings"] == []
    for key, name in (("float_model", "float"), ("integer_file", "integers")):
        assert report[f"{key}_sha256"] == bounded_file.sha256(files / name)
    assert {layer["rounding"] for layer in report["audit"]["layers"]} == {"nearest"}

    arrays, metadata = safetensors_file.read_safetensors(files / "integers")
    name = "codes/fc"
    codes = np.array(arrays[name])
    codes[0, 0] += 3 if codes[0, 0] < 0 else -3
    safetensors_file.write_safetensors(
        files / "tampered", {**arrays, name: codes}, metadata
    )
    assert _run(files, tmp_path / "b", integer_file="tampered") == 1
    out = capsys.readouterr().out
    assert "found: fc: 1 codes are neither neighbour" in out
    assert "verdict: findings" in out

    assert _run(files, tmp_path / "c", integer_file="nowhere") == 2
    err = capsys.readouterr().err
    assert "nowhere" in err and err.count("\n") == 1


@pytest.mark.slow
def test_a_stop_request_ends_it(files, tmp_path):
    config = settings.AuditSettings(
        arch=None,
        float_model=str(files / "float"),
        integer_file=str(files / "integers"),
        data=settings.DataSettings("digits", image_size=8),
        images=32,
    )
    stopped = workdir.Workdir(tmp_path, {}, should_stop=lambda: True)
    with contextlib.closing(stopped), pytest.raises(workdir.Interrupted):
        audit_experiment.run(config, stopped)
    assert not (tmp_path / "audit.json").exists()


def test_a_missing_file_is_named_before_anything_is_read(tmp_path, capsys):
    code = main.main(["main", "--config=configs/audit.py", f"--workdir={tmp_path}"])
    assert code == 2 and "config.float_model is missing" in capsys.readouterr().err
