# SPDX-License-Identifier: Apache-2.0
"""The flip weight is chosen on held-out clean images, and on nothing else."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.attacks import triggers
from nad_jax.defenses import efrap, flip_weight_choice


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(24, use_bias=False, name="hidden")(x))
        return nn.Dense(5, use_bias=False, name="head")(x)


IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(400, 12)), jnp.float32)
_random = np.random.default_rng(1)
VARIABLES = {
    "params": {
        name: {"kernel": jnp.asarray(_random.normal(size=shape), jnp.float32)}
        for name, shape in (("hidden", (12, 24)), ("head", (24, 5)))
    }
}
CANDIDATES = (0.0, 0.001, 0.1, 30.0)


def choose(images=IMAGES, **arguments):
    arguments = {"candidates": CANDIDATES, "tolerance": 0.03, **arguments}
    return flip_weight_choice.choose_flip_weight(Net(), VARIABLES, images, **arguments)


@pytest.fixture(scope="module")
def choice():
    return choose()


@pytest.mark.slow
def test_the_rule_on_disagreements_measured_apart(choice):
    """Last candidate before the first that costs more than the tolerance."""
    seen, unseen = IMAGES[:200], IMAGES[200:]
    wanted = np.argmax(np.asarray(Net().apply(VARIABLES, unseen)), -1)
    expected = {}
    for weight in CANDIDATES:
        result = efrap.efrap(Net(), VARIABLES, seen, flip_weight=weight)
        got = np.argmax(np.asarray(Net().apply(result.variables, unseen)), -1)
        expected[weight] = np.mean(got != wanted)
    good = [expected[w] <= expected[0.0] + 0.03 for w in CANDIDATES]
    assert good[0] and not all(good), "the case must exercise the rule"
    last = CANDIDATES[good.index(False) - 1]
    assert choice.flip_weight == last
    for weight, share in choice.disagreement.items():
        assert share == pytest.approx(expected[weight], abs=1e-9)
    assert len(choice.disagreement) == good.index(False) + 1, "and there it stops"


@pytest.mark.slow
def test_no_trigger_is_ever_stamped(monkeypatch, choice):
    def refuse(*_):
        raise AssertionError("a trigger was asked for")

    monkeypatch.setattr(triggers, "apply_trigger", refuse)
    assert choose() == choice


@pytest.mark.slow
def test_more_tolerance_never_chooses_less(choice):
    assert choose(tolerance=1.0).flip_weight == CANDIDATES[-1]
    assert choose(tolerance=0.0).flip_weight <= choice.flip_weight


@pytest.mark.parametrize("candidates", [(), (0.1,), (0.0, 0.1, 0.01)])
def test_candidates_must_ascend_from_zero(candidates):
    with pytest.raises(errors.InputError, match="ascend from 0"):
        choose(candidates=candidates)


@pytest.mark.parametrize("name", ["tolerance", "held_out"])
@pytest.mark.parametrize("value", [float("nan"), -0.1, float("inf"), np.float32(-1)])
def test_shares_out_of_range_are_refused(name, value):
    """NaN compares false, so that every candidate would pass."""
    with pytest.raises(errors.InputError, match=f"^{name} must .* got {value}$"):
        choose(**{name: value})


@pytest.mark.parametrize("held_out", [0, 1])
def test_both_sides_get_a_share(held_out):
    with pytest.raises(errors.InputError, match=rf"\(0, 1\), got {held_out}$"):
        choose(held_out=held_out)


def test_too_few_images_are_refused():
    with pytest.raises(errors.InputError, match="both sides, got 0.5 of 1"):
        choose(IMAGES[:1])


@pytest.mark.parametrize(
    "arguments",
    [
        {"method": "adam"},
        {"flip_weight": 0.1},
        {"layers": []},
        {"finished": {}},
        {"on_layer": print},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_every_candidate_has_of_its_own_is_refused(arguments):
    """The first candidate would fill `finished`, and the others would be copies."""
    (name,) = arguments
    with pytest.raises(errors.InputError, match=f"^{name} cannot be chosen here"):
        choose(**arguments)
