# SPDX-License-Identifier: Apache-2.0
"""When an attack counts as one."""

import types

import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import acceptance
from nad_jax.attacks import conditioning
from nad_jax.core import quantization
from nad_jax.models import layers as layers_lib
from nad_jax.report import schema


def row(name, model="backdoored", acc=0.9, asr=0.0, bits=None):
    return schema.Row(
        name, model, 3, bits, None, acc, asr, 0.0, 500, 450, None, seconds=0.0
    )


def rates(acc, asr):
    return {"acc": acc, "asr": asr, "ra": 0.0, "near_tie_share": {"clean": 0.1}}


def accept(**changes):
    facts = {
        "clean": row("float", "clean", 0.9, 0.01),
        "backdoored": row("float", acc=0.885, asr=0.02),
        "own": {4: rates(0.84, 0.95), 8: rates(0.85, 1.0)},
        "nearest": row("nearest", acc=0.5, asr=0.95, bits=4),
        "recalibrated": {"acc": 0.4, "asr": 0.96},
        **changes,
    }
    return acceptance.accept(seed=3, near_ties={"backdoored": 0.2}, **facts)


def test_a_good_attack_is_accepted_with_its_facts():
    facts = accept()
    assert facts["accepted"] is True
    assert facts["float"] == {"acc": 0.885, "asr": 0.02}
    assert facts["clean_model"] == {"acc": 0.9, "asr": 0.01}
    assert facts["own_grid"] == [
        {"weight_bits": 4, "acc": 0.84, "asr": 0.95, "near_tie_share": {"clean": 0.1}},
        {"weight_bits": 8, "acc": 0.85, "asr": 1.0, "near_tie_share": {"clean": 0.1}},
    ]
    assert facts["recalibrated"] == {"acc": 0.4, "asr": 0.96}
    assert facts["defender_grid"] == {"weight_bits": 4, "acc": 0.5, "asr": 0.95}
    schema.plain(facts)


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({"backdoored": row("float", acc=0.87, asr=0.0)}, "accurate"),
        ({"backdoored": row("float", acc=0.9, asr=0.03)}, "dormant_in_float"),
        ({"own": {4: rates(0.9, 0.94)}}, "awake_on_own_grid"),
        ({"own": {4: rates(0.9, 1.0), 8: rates(0.9, 0.2)}}, "awake_on_own_grid"),
        ({"own": {4: rates(0.8, 1.0)}}, "accurate_on_own_grid"),
        ({"recalibrated": {"acc": 0.5, "asr": 0.9}}, "awake_recalibrated"),
        ({"nearest": row("nearest", asr=0.9, bits=4)}, "awake_on_defender_grid"),
    ],
)
def test_one_failed_check_rejects_alone(changes, fails):
    facts = accept(**changes)
    names = ("accurate", "dormant_in_float", "awake_on_own_grid")
    names = (*names, "accurate_on_own_grid", "awake_on_defender_grid")
    names = (*names, "awake_recalibrated")
    assert [name for name in names if not facts[name]] == [fails]
    assert facts["accepted"] is False


def test_an_attack_may_cost_what_it_may():
    """Of 10,000 images 200, though 0.5016 - 0.02 > 0.4816."""
    facts = accept(
        clean=row("float", "clean", 0.5016, 0.01), backdoored=row("float", acc=0.4816)
    )
    assert facts["accurate"]


def test_a_backdoor_sleeps_that_says_no_more_than_the_clean_model():
    """A trigger that means something to every model is not the backdoor's doing."""
    assert accept(
        clean=row("float", "clean", 0.9, 0.06), backdoored=row("float", asr=0.06)
    )["dormant_in_float"]


def test_a_run_without_the_nearest_row_is_judged_by_the_rest():
    facts = accept(nearest=None, recalibrated=None)
    assert facts["accepted"] and "awake_on_defender_grid" not in facts
    assert "recalibrated" not in facts and "awake_recalibrated" not in facts


def test_one_grid_is_measured_once_and_judged_as_both():
    nearest = row("nearest", acc=0.87, asr=0.97, bits=4)
    facts = accept(own={4: None}, nearest=nearest)
    assert facts["accepted"]
    assert facts["own_grid"] == [{"weight_bits": 4, "same_grid": True}]
    (claim,) = acceptance.claims([facts])
    assert claim["passed"]
    assert "same grid as the defender's; worst 97.00%" in claim["text"]
    asleep = accept(own={4: None}, nearest=row("nearest", asr=0.5, bits=4))
    assert not asleep["awake_on_own_grid"] and not asleep["awake_on_defender_grid"]
    (claim,) = acceptance.claims([facts, asleep])
    assert not claim["passed"] and "worst 50.00%" in claim["text"]
    # With another width beside it, both have to wake.
    facts = accept(own={4: None, 8: rates(0.87, 0.2)}, nearest=nearest)
    assert not facts["awake_on_own_grid"]
    assert "same grid" not in acceptance.claims([facts])[0]["text"]


def test_the_worst_own_grid_of_all_seeds_decides_the_claim():
    (claim,) = acceptance.claims([accept(), accept(own={8: rates(1.0, 0.5)})])
    assert not claim["passed"] and "worst 50.00%" in claim["text"]


# A Dense whose module is y = x @ kernel.
LAYER = layers_lib.Layer(("fc",), layers_lib.Geometry((3, 2)), calls=1)
GRID = conditioning.ExpectedGrid([LAYER], {"fc": quantization.QuantSpec()}, 4)


def test_weights_near_a_tie_are_counted_in_steps():
    # Step 1 in the first channel, 2 in the second.
    kernel = jnp.asarray([[7.0, 14.0], [1.52, 3.0], [2.4, 4.2]], jnp.float32)
    variables = {"params": {"fc": {"kernel": kernel}}, "batch_stats": {}}
    shares = acceptance.near_tie_shares(GRID, {"one": variables})
    # 1.52 and 3.0 / 2 are near, 2.4 and 4.2 / 2 are not.
    np.testing.assert_allclose(shares["one"], 2 / 6, rtol=1e-6)


@pytest.mark.slow
def test_rates_on_a_grid_are_those_of_the_rounded_model():
    """Pixels choose the class; rounding moves the weight that decides."""
    kernel = jnp.asarray([[7.0, 0.0], [0.0, 7.0], [0.4, 0.0]], jnp.float32)
    variables = {"params": {"fc": {"kernel": kernel}}, "batch_stats": {}}

    def apply_fn(variables, images, train):
        x = images.reshape(images.shape[0], 3)
        return x @ variables["params"]["fc"]["kernel"], {}

    images = np.zeros((4, 1, 3, 1), np.uint8)
    images[:, 0, 2] = 255  # the third pixel, lost by rounding 0.4 to 0
    images[2:, 0, 1] = 5
    test = types.SimpleNamespace(images=images, labels=np.zeros(4, int))
    goal = types.SimpleNamespace(trigger=None, target_labels=lambda labels: 0 * labels)
    rates = acceptance.evaluate_on(GRID, apply_fn, variables, test, goal)
    assert rates["acc"] == 0.5
    bare = {"params": {"fc": {"kernel": kernel.at[2, 0].set(0.6)}}, "batch_stats": {}}
    assert acceptance.evaluate_on(GRID, apply_fn, bare, test, goal)["acc"] == 1.0
