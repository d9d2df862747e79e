# SPDX-License-Identifier: Apache-2.0
"""What tells the variants apart, by hand; their training is the library's loop."""

import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import distillation_variants


def test_relations_are_of_channels_active_at_the_same_places():
    wide = np.zeros((1, 4, 4, 2), np.float32)
    wide[0, :2, :2, 0] = 1.0  # one channel in a corner
    wide[0, 2:, 2:, 1] = 1.0  # the other in the opposite one
    narrow = np.zeros((1, 2, 2, 3), np.float32)
    narrow[0, 0, 0, 0] = 3.0
    narrow[0, 1, 1, 2] = 4.0
    features = {"stage1": wide, "stage2": narrow, "head": np.ones((1, 5), np.float32)}
    (matrix,) = distillation_variants._relation_matrices(features)
    expected = [[[3 / 5, 0.0, 0.0], [0.0, 0.0, 4 / 5]]]
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))
        return x, {}


@pytest.mark.slow
@pytest.mark.parametrize(
    "keep", [lambda step: 0.75, lambda step: jnp.float32(step != 1)]
)
def test_a_teacher_moves_towards_the_student_of_each_step(keep):
    variables = _Net().init(jax.random.key(0), jnp.ones((4, 3)), train=False)
    teacher = jax.tree.map(lambda leaf: leaf + 1.0, dict(variables))
    carried = {
        "own": variables["batch_stats"],
        "teacher": teacher,
        "step": jnp.int32(0),
    }
    net = distillation_variants._WithTeacher(
        _Net(), lambda step: jnp.float32(keep(step))
    )
    gap = 1.0  # of each parameter of the teacher to the student, which stands still
    for step in range(3):
        _, updated = net.apply(
            {"params": variables["params"], "batch_stats": carried},
            jnp.ones((4, 3)),
            train=True,
            mutable=["batch_stats"],
        )
        carried = updated["batch_stats"]
        gap *= keep(step)
        assert carried["step"] == step + 1
        for own, taught in zip(
            jax.tree.leaves(variables["params"]),
            jax.tree.leaves(carried["teacher"]["params"]),
            strict=True,
        ):
            np.testing.assert_allclose(taught - own, gap, atol=1e-6)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--variants=nad,magic", "variants are of nad, two_teachers, .*, got magic"),
        ("--steps=large", "steps are of plain, sam_kd, got large"),
    ],
)
def test_unknown_names_are_refused_in_one_line(monkeypatch, tmp_path, option, words):
    monkeypatch.setattr(
        sys, "argv", ["distillation_variants", option, f"--out={tmp_path / 'x'}"]
    )
    with pytest.raises(SystemExit, match=words):
        distillation_variants.main()
