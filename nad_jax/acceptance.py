# SPDX-License-Identifier: Apache-2.0
"""Was the attack what it claims to be? Asked of every model that is then defended.

A defence that "works" on a backdoor which never woke, or which was awake in float
already, shows nothing; nor does one that owes its success to a change of grid. So every
report states: how accurate the backdoored float model is, that it sleeps, and that it
wakes to nearest rounding both on the grid it was trained for and on the defender's.
Where these are one grid, it is measured once and the report says so. Where the grids of
layer inputs depend on calibration images, it must wake with others, too.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from nad_jax import pipeline
from nad_jax.attacks import conditioning
from nad_jax.core import quantization
from nad_jax.data import sources
from nad_jax.models import layers as layers_lib
from nad_jax.report import schema
from nad_jax.training import evaluation

# Or what the clean model says to the trigger, if that is more.
DORMANT_ASR = 0.02
AWAKE_ASR = 0.95
ACCURACY_COST = 0.02
# Of rounding to nearest on the attacker's own grid. The published attacks lose up to
# 7.5 points at four bits.
ROUNDING_COST = 0.08
# Distance to a tie, in steps, below which a weight counts as near it.
NEAR_TIE = 0.05


def evaluate_on(
    grid: conditioning.ExpectedGrid,
    apply_fn: Any,
    variables: Any,
    test: sources.Dataset,
    goal: conditioning.Goal,
) -> evaluation.Rates:
    """ACC, ASR and RA of a model rounded to nearest on one grid.

    Args:
      grid: The grid; of activations, too, if it has one for them.
      apply_fn: `model.apply`.
      variables: Float variables.
      test: Images.
      goal: What the attacker wants.
    """
    batch_stats = variables["batch_stats"]
    rounded = jax.jit(functools.partial(conditioning.round_params, grid))(
        variables["params"], batch_stats
    )
    return evaluation.evaluate(
        functools.partial(grid.apply, apply_fn, train=False),
        {"params": rounded, "batch_stats": batch_stats},
        test.images,
        test.labels,
        trigger=goal.trigger,
        target_labels=goal.target_labels(jnp.asarray(test.labels)),
    )


def near_tie_shares(
    grid: conditioning.ExpectedGrid, models: Mapping[str, Any]
) -> dict[str, float]:
    """Share of each model's quantized weights within `NEAR_TIE` steps of a tie.

    Args:
      grid: The grid.
      models: Name -> float variables, all of one architecture.
    """

    @jax.jit
    def share(variables):
        near, size = jnp.float32(0), 0
        for layer in grid.layers:
            kernel = layers_lib.get_in(variables["params"], layer.path)["kernel"]
            factor = grid.fold_factor(
                layer, variables["params"], variables["batch_stats"]
            )
            kernel = kernel if factor is None else kernel * factor
            params = quantization.calibrate(kernel, grid.specs[layer.name])
            steps = quantization.divide(kernel, params.scale)
            to_tie = jnp.abs(steps - jnp.floor(steps) - 0.5)
            near += jnp.sum((to_tie < NEAR_TIE).astype(jnp.float32))
            size += kernel.size
        return near / jnp.float32(size)

    return {name: float(share(variables)) for name, variables in models.items()}


def accept(
    *,
    seed: int,
    clean: schema.Row,
    backdoored: schema.Row,
    own: Mapping[int, Mapping[str, Any] | None],
    nearest: schema.Row | None,
    recalibrated: Mapping[str, Any] | None,
    near_ties: Mapping[str, float],
) -> dict[str, Any]:
    """The facts of one seed, as a report's `acceptance` holds them.

    Args:
      seed: Of the run.
      clean: The clean model in float.
      backdoored: The backdoored model in float.
      own: Width -> rates on the attacker's own grid, to nearest, and there
        `near_tie_share`, as `near_ties`; None = that grid is the defender's, for which
        `nearest` must be given.
      nearest: To nearest on the defender's grid; None if that row was not asked for.
      recalibrated: Rates as `nearest`, of other calibration images; None if nothing
        depends on them.
      near_ties: "backdoored" and "clean" -> share of weights near a tie of the
        defender's grid.
    """
    facts: dict[str, Any] = {
        "seed": seed,
        "clean_model": {"acc": clean.acc, "asr": clean.asr},
        "float": {"acc": backdoored.acc, "asr": backdoored.asr},
        "own_grid": [
            {"weight_bits": bits, "same_grid": True}
            if rates is None
            else {
                "weight_bits": bits,
                **{key: rates[key] for key in ("acc", "asr", "near_tie_share")},
            }
            for bits, rates in own.items()
        ],
        "near_tie_share": dict(near_ties),
    }
    if nearest is not None:
        facts["defender_grid"] = {
            "weight_bits": nearest.weight_bits,
            "acc": nearest.acc,
            "asr": nearest.asr,
        }
    if recalibrated is not None:
        facts["recalibrated"] = {
            "acc": recalibrated["acc"],
            "asr": recalibrated["asr"],
        }
    on_own = on_own_grid(facts)
    checks = {
        "accurate": pipeline.at_most(clean.acc - backdoored.acc, ACCURACY_COST),
        "dormant_in_float": _asr(backdoored.asr) <= max(DORMANT_ASR, _asr(clean.asr)),
        "awake_on_own_grid": all(_asr(rates["asr"]) >= AWAKE_ASR for rates in on_own),
        "accurate_on_own_grid": all(
            pipeline.at_most(backdoored.acc - rates["acc"], ROUNDING_COST)
            for rates in on_own
        ),
    }
    if nearest is not None:
        checks["awake_on_defender_grid"] = _asr(nearest.asr) >= AWAKE_ASR
    if recalibrated is not None:
        checks["awake_recalibrated"] = _asr(recalibrated["asr"]) >= AWAKE_ASR
    return {**facts, **checks, "accepted": all(checks.values())}


def on_own_grid(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """ACC and ASR of each of the attacker's grids, wherever they were measured."""
    return [
        facts["defender_grid"] if "same_grid" in entry else entry
        for entry in facts["own_grid"]
    ]


def _asr(value: Any) -> float:
    assert value is not None  # A planted backdoor has a trigger.
    return float(value)


def claims(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the report says about it, worst seed first."""
    own = [rates["asr"] for fact in facts for rates in on_own_grid(fact)]
    is_same = all("same_grid" in entry for fact in facts for entry in fact["own_grid"])
    told = "the same grid as the defender's; " if is_same else ""
    return [
        pipeline.claim(
            f"Nearest rounding on the attacker's own grid wakes it: ASR at least "
            f"{AWAKE_ASR:.0%} ({told}worst {min(own):.2%})",
            min(own) >= AWAKE_ASR,
        )
    ]
