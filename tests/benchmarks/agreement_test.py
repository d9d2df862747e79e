# SPDX-License-Identifier: Apache-2.0
"""Both sides of the benchmark compute the same thing."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import run
from nad_jax.core import losses
from nad_jax.interop import name_maps, reader

# PyTorch may live in an environment of its own.
TORCH_PYTHON = os.environ.get("NAD_JAX_TORCH_PYTHON", sys.executable)
BETAS = {"stage1": 500.0, "stage2": 1000.0, "stage3": 1000.0}


@pytest.fixture
def theirs(tmp_path):
    """Images, and what PyTorch's side computes for them."""
    probe = [TORCH_PYTHON, "-c", "import torch"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip(
            "PyTorch is not installed: install nad_jax[benchmark], or name an "
            "interpreter that has it in NAD_JAX_TORCH_PYTHON"
        )
    generator = np.random.default_rng(0)
    np.save(
        tmp_path / "images.npy", generator.integers(0, 256, (4, 32, 32, 3), np.uint8)
    )
    command = [TORCH_PYTHON, "-m", "benchmarks.theirs", "agreement"]
    done = subprocess.run(
        [*command, json.dumps({"work": str(tmp_path)})],
        cwd=run.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return tmp_path, json.loads(done.stdout)["loss"]


@pytest.mark.slow
def test_logits_loss_and_gradient_are_those_of_pytorch(theirs):
    """For the same weights and images, NAD's step is the same function."""
    folder, loss = theirs
    images = jnp.asarray(np.load(folder / "images.npy"), jnp.float32) / 255
    student, teacher = (
        name_maps.convert(reader.read_checkpoint(folder / name).arrays, "wrn_16_1")
        for name in ("student", "teacher")
    )

    @jax.jit
    def compute(variables, others):
        def loss_of(params):
            logits, features = student.model.apply(
                {**variables, "params": params}, images, train=False
            )
            _, targets = student.model.apply(others, images, train=False)
            return losses.nad_loss(features, targets, betas=BETAS).mean(), logits

        value, gradient = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
        return *value, gradient["conv1"]["kernel"]

    ours, logits, gradient = compute(student.variables, teacher.variables)
    np.testing.assert_allclose(
        logits, np.load(folder / "logits.npy"), rtol=1e-3, atol=1e-4
    )
    assert float(ours) == pytest.approx(loss, rel=1e-4)
    theirs_gradient = np.load(folder / "gradient.npy").transpose(2, 3, 1, 0)
    scale = np.abs(theirs_gradient).max()
    np.testing.assert_allclose(gradient, theirs_gradient, atol=1e-3 * scale, rtol=1e-3)
