# SPDX-License-Identifier: Apache-2.0
"""The inspection as a command: a float model in, suspicions and an exit code out."""

import json

import jax
import numpy as np
import pytest

from nad_jax import main, models
from nad_jax.interop import arch_match, bounded_file, name_maps, safetensors_file
from nad_jax.models import common


@pytest.fixture(scope="module")
def arrays():
    """A fresh WRN under PyTorch's names."""
    model = models.build("wrn_10_1", num_classes=10, width=0.5)
    variables = common.init(model, jax.random.key(0), (8, 8, 3))
    torch_names = arch_match._module_names({}, "wrn_10_1")
    leaves = arch_match._expected(model, (8, 8, 3), torch_names)
    names = {name: leaf.paths for name, leaf in leaves.items()}
    return name_maps.as_found(variables, names)


def _run(folder, arrays, *more):
    path = folder / "model"
    safetensors_file.write_safetensors(path, arrays)
    return main.main(
        [
            "main",
            "--config=configs/inspect.py",
            f"--config.float_model={path}",
            "--config.data.name=digits",
            "--config.data.image_size=8",
            "--config.images=32",
            "--config.weight_bits=(4,)",
            f"--workdir={folder / 'run'}",
            *more,
        ]
    )


def _to_the_edges(arrays):
    """Half of the weights at the edges of the cells of W4, absmax, per channel."""
    moved = {}
    for name, array in arrays.items():
        if array.ndim < 2:
            moved[name] = array
            continue
        axes = tuple(range(1, array.ndim))
        scale = np.abs(array).max(axis=axes, keepdims=True) / 7
        steps = array / scale
        edges = np.floor(steps) + 0.499
        inside = (np.arange(array.size).reshape(array.shape) % 2) & (abs(steps) < 6)
        moved[name] = (np.where(inside, edges, steps) * scale).astype(np.float32)
    return moved


@pytest.mark.slow
def test_ties_are_found_on_the_grid_they_were_made_for(arrays, tmp_path, capsys):
    assert _run(tmp_path, _to_the_edges(arrays)) == 1
    assert "verdict: suspicious" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "inspection.json").read_text())
    ties = {entry["preset"]: entry["tie_ratio"] for entry in report["inspections"]}
    assert list(ties) == ["plain", "efrap_reference", "pytorch_qnnpack"]
    assert ties["plain"] > 2 and ties["pytorch_qnnpack"] < 1.5


@pytest.mark.slow
def test_a_channel_of_zeros_and_one_weight_is_reported(arrays, tmp_path, capsys):
    """As suspicious as can be: its median is zero."""
    name = next(name for name, array in arrays.items() if array.ndim == 4)
    kernel = np.array(arrays[name])
    kernel[0] = 0.0
    kernel[0, 0, 0, 0] = 1.0
    changed = {**arrays, name: kernel}
    assert _run(tmp_path, changed, "--config.presets=('plain',)") == 1
    assert "verdict: suspicious" in capsys.readouterr().out
    (entry,) = json.loads((tmp_path / "run" / "inspection.json").read_text())[
        "inspections"
    ]
    assert entry["outlier_ratio"] == 1e6 and entry["score"] > 1000


@pytest.mark.slow
def test_a_fresh_model_has_no_ties(arrays, tmp_path, capsys):
    # A net that knows nothing drifts by chance, so the verdict is left open.
    assert _run(tmp_path, arrays, "--config.presets=('plain',)") in (0, 1)
    capsys.readouterr()
    report = json.loads((tmp_path / "run" / "inspection.json").read_text())
    (entry,) = report["inspections"]
    assert entry["tie_ratio"] < entry["tie_limit"]
    assert report["suspicious"] == (entry["score"] > 1)
    assert report["float_model_sha256"] == bounded_file.sha256(tmp_path / "model")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.float_model=nowhere", "nowhere"),
        ("--config.presets=('plain','mine')", "config.presets must be one or more of"),
        ("--config.weight_bits=(9,)", "weight_bits must be 2 to 8"),
    ],
)
def test_what_cannot_be_judged_is_one_line(tmp_path, capsys, override, message):
    code = main.main(
        [
            "main",
            "--config=configs/inspect.py",
            "--config.float_model=some",
            "--config.data.name=digits",
            f"--workdir={tmp_path / 'run'}",
            override,
        ]
    )
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1
