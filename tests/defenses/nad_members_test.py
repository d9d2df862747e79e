# SPDX-License-Identifier: Apache-2.0
"""A sweep is its members, each as if it were alone."""

import dataclasses

import jax
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.defenses import base, nad, nad_members
from nad_jax.training import members

STAGES = ("stage1", "stage2")


@pytest.fixture(scope="module")
def students(victim, other_variables):
    """Two seeds, two betas, two teachers: no two members are alike."""
    return [
        nad_members.Member(victim.variables, teacher, dict.fromkeys(STAGES, beta), key)
        for teacher, beta, key in (
            (other_variables, 0.0, jax.random.key(1)),
            (other_variables, 100.0, jax.random.key(1)),
            (other_variables, 100.0, jax.random.key(2)),
            (victim.variables, 100.0, jax.random.key(1)),
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize(("devices", "written_out"), [(2, True), (1, False)])
def test_members_end_where_they_end_alone(
    victim, students, clean_data, tuning, devices, written_out
):
    mesh = members.member_mesh(len(students)) if devices > 1 else None
    sweep = nad_members.run(
        victim.model, students, clean_data, tuning, mesh=mesh, written_out=written_out
    )
    for student, got in zip(students, sweep, strict=True):
        alone = nad.run(
            victim,
            clean_data,
            tuning,
            settings.NadSettings(betas=student.betas),
            key=student.key,
            teacher=base.Net(victim.model, student.teacher),
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
            got.variables,
            alone.variables,
        )
        assert [epoch["epoch"] for epoch in got.history] == [1, 2]
        for epoch, expected in zip(got.history, alone.history, strict=True):
            assert epoch["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    kernels = [np.asarray(one.variables["params"]["early"]["kernel"]) for one in sweep]
    for i, kernel in enumerate(kernels):
        assert not any(np.allclose(kernel, other) for other in kernels[:i])


def test_a_mesh_shares_members_evenly():
    assert members.member_mesh(12).size == 4
    assert members.member_mesh(3) is None


@pytest.mark.slow
def test_mistakes_are_named(victim, students, clean_data, tuning):
    def run(students, tuning=tuning, **options):
        nad_members.run(victim.model, students, clean_data, tuning, **options)

    with pytest.raises(errors.InputError, match="at least one member, got 0"):
        run([])
    with pytest.raises(errors.InputError, match="patience must be None, got 3"):
        run(students, settings.TuningSettings(tuning.training, patience=3))
    with pytest.raises(errors.InputError, match="the same stages"):
        run([*students, dataclasses.replace(students[0], betas={"stage1": 1.0})])
    with pytest.raises(errors.InputError, match="3 members cannot be shared by 4"):
        run(students[:3], mesh=members.member_mesh(4))


def _silent(variables):
    """The same net with a last stage that answers to nothing."""
    params = {**variables["params"], "late": {"kernel": np.zeros((3, 3, 4, 5), "f4")}}
    return {**variables, "params": params}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"betas": {"stage9": 1.0}}, {}),
        ({"betas": {"stage9": 0.0}}, {}),
        ({"betas": {}}, {}),
        ({"betas": {"stage1": -1.0}}, {}),
        ({"betas": {"stage1": float("inf")}}, {}),
        ({}, {"p": 0.0}),
        ({}, {"reduction": "max"}),
        ({"teacher": "silent"}, {}),
        ({"variables": "silent"}, {}),
    ],
)
def test_what_nad_refuses_is_refused_in_the_same_words(
    victim, students, clean_data, tuning, changes, options
):
    silent = _silent(victim.variables)
    student = dataclasses.replace(
        students[1],
        **{k: silent if v == "silent" else v for k, v in changes.items()},
    )
    with pytest.raises(errors.InputError) as alone:
        nad.run(
            base.Net(victim.model, student.variables),
            clean_data,
            tuning,
            settings.NadSettings(student.betas, **options),
            key=student.key,
            teacher=base.Net(victim.model, student.teacher),
        )
    with pytest.raises(errors.InputError) as sweep:
        nad_members.run(victim.model, [student], clean_data, tuning, **options)
    words = str(sweep.value).replace("start of student 0", "victim")
    assert words.replace("teacher of student 0", "teacher") == str(alone.value)


@pytest.mark.slow
def test_a_stage_that_counts_for_nobody_is_not_computed(
    victim, students, clean_data, tuning
):
    silent = _silent(victim.variables)
    betas = {"stage1": 10.0, "stage2": 0.0}
    student = dataclasses.replace(students[1], teacher=silent, betas=betas)
    nad_members.run(victim.model, [student], clean_data, tuning)
