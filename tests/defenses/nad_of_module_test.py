# SPDX-License-Identifier: Apache-2.0
"""NAD in one call, on a module that knows nothing of this library."""

import flax.linen as nn
import jax
import numpy as np
import pytest

import nad_jax
from nad_jax import settings
from nad_jax.defenses import base
from nad_jax.defenses import nad as nad_lib


class _Foreign(nn.Module):
    """No features, no BatchNorm."""

    @nn.compact
    def __call__(self, images, train):
        early = nn.relu(nn.Conv(4, (3, 3), name="early")(images))
        return nn.Dense(3, name="head")(early.mean(axis=(1, 2)))


MODEL = nad_jax.Captured(_Foreign(), {"first": "early"})
OPTIONS = {"epochs": 2, "batch_size": 16, "teacher_epochs": 1, "crop_padding": 0}


@pytest.fixture(scope="module")
def variables(clean_data):
    images = clean_data.images[:1] / np.float32(255)
    return _Foreign().init(jax.random.key(3), images, train=False)


def _same(left, right):
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.slow
def test_it_is_the_repair_of_the_program(variables, clean_data):
    images, labels = clean_data.images, clean_data.labels.astype(np.int64)
    called = nad_jax.nad(
        MODEL,
        variables,
        images,
        labels,
        betas={"first": 10.0},
        sharpness_radius=0.1,
        logit_weight=0.5,
        key=jax.random.key(1),
        **OPTIONS,
    )
    tuning = settings.TuningSettings(
        settings.TrainingSettings(
            epochs=2,
            batch_size=16,
            optimizer="sgd",
            learning_rate=0.1,
            schedule="steps",
            milestones=(2,),
            weight_decay=1e-4,
        ),
        sharpness_radius=0.1,
    )
    expected = nad_lib.run(
        base.Net(MODEL, variables),
        clean_data,
        tuning,
        settings.NadSettings({"first": 10.0}, teacher_epochs=1),
        key=jax.random.key(1),
        victim_logits=settings.LogitSettings(weight=0.5),
    )
    assert _same(called.variables, expected.variables)
    assert [entry["epoch"] for entry in called.history] == [1, 2]
    assert called.history[-1]["distillation_loss"] > 0
    assert not _same(called.variables["params"], variables["params"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": np.zeros((48, 6, 6, 1), np.float32)}, "images must be uint8"),
        ({"images": np.zeros((0, 6, 6, 1), np.uint8)}, "with N at least 1"),
        ({"labels": np.zeros(47, np.int32)}, "labels must be integers .48., got int32"),
        ({"labels": np.zeros(48, np.float32)}, "got float32 .48."),
        ({"betas": {"second": 1.0}}, "must name stages of first, got second"),
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"logit_weight": -1.0}, "weight must be > 0"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(
    variables, clean_data, change, message
):
    given = {
        "images": clean_data.images,
        "labels": clean_data.labels,
        "betas": {"first": 1.0},
        **OPTIONS,
        **change,
    }
    with pytest.raises(nad_jax.InputError, match=message) as caught:
        nad_jax.nad(MODEL, variables, **given)
    assert "\n" not in str(caught.value)
