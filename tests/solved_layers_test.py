# SPDX-License-Identifier: Apache-2.0
"""The layers of a solve are committed before a stop, and come back."""

import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import solved_layers, workdir
from nad_jax.core import quantization
from nad_jax.defenses import quantized_module
from nad_jax.models import layers as layers_lib

_LAYERS = [
    layers_lib.Layer((name,), layers_lib.Geometry((2, 3)), calls=1)
    for name in ("one", "two", "three")
]


def _finished(name: str, code: int) -> quantized_module.FinishedLayer:
    params = quantization.QuantParams(jnp.ones(3), jnp.zeros(3, jnp.int32))
    report = quantized_module.LayerReport(name, (2, 3), bits=8, flip_rate=0.0)
    return quantized_module.FinishedLayer(
        jnp.full((2, 3), code, jnp.int8), params, report
    )


@pytest.mark.slow
def test_who_is_told_to_stop_has_committed(tmp_path):
    """Even if the answer changes from one question to the next: each is asked once."""
    answers = []

    def should_stop():
        answers.append(len(answers) % 2 == 1)
        return answers[-1]

    def solve(run, solved, codes):
        solved.keep_in(run.commits("layers"), run)
        for code, layer in enumerate(_LAYERS):
            if layer.name not in solved:
                codes.append(code)
                solved[layer.name] = _finished(layer.name, code)
        return solved.codes

    attempts = []
    for _ in range(3):
        run = workdir.Workdir(tmp_path, {}, should_stop=should_stop)
        solved = solved_layers.SolvedLayers(_LAYERS)
        attempts.append([])
        try:
            run.stage("work", solved.codes, lambda: solve(run, solved, attempts[-1]))  # noqa: B023
            break
        except workdir.Interrupted as interruption:
            assert f"{len(solved)} layers are kept" in str(interruption)
        finally:
            run.close()
    assert sum(attempts, []) == [0, 1, 2]
    assert solved.codes.reshape(3, 6).tolist() == [[0] * 6, [1] * 6, [2] * 6]
    np.testing.assert_array_equal(solved["three"].codes, np.full((2, 3), 2))
