# SPDX-License-Identifier: Apache-2.0
"""The main job: plant a quantization-conditioned backdoor, wake it, defeat it.

    data -> victim -> attack -> float evaluation
         -> every rounding on one grid, backdoored and clean model -> report

`run` is what the command line, tests and notebooks call.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import acceptance, models, pipeline, roundings, settings
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import conditioning, registry
from nad_jax.data import batches, sources
from nad_jax.models import common
from nad_jax.models import layers as layers_lib
from nad_jax.report import html, schema
from nad_jax.training import environment, steps

# What a run of this kind is to show; printed with a tick or a cross, never enforced.
_DORMANT_ASR = 0.02
_AWAKE_ASR = 0.95
_DEFENDED_ASR = 0.02
_ACCURACY_COST = 0.01

# Images on which an attacker looks for inputs that are always 0.
_ATTACKER_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class _Scene:
    """What all seeds share: data, architecture, grid, evaluators."""

    train: sources.Dataset
    test: sources.Dataset
    model: Any
    layers: list[layers_lib.Layer]
    attacked_grids: list[conditioning.ExpectedGrid]
    goal: conditioning.Goal
    evaluate: Callable[..., dict[str, Any]]


def run(
    config: settings.ExperimentSettings,
    workdir: workdir_lib.Workdir,
    *,
    command: str | None = None,
) -> dict[str, Any]:
    """Runs the experiment and writes the report; returns the report.

    Args:
      config: What to do.
      workdir: Where to put it.
      command: The command line, for the report.
    """
    canary = environment.check_canary()
    with workdir.timed("data"):
        scene = _set_scene(config)
    rows: list[schema.Row] = []
    layers: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    figures = None
    for seed in config.seeds:
        clean, backdoored = _obtain_models(config, scene, workdir, seed)
        nets = []
        for name, variables in (("backdoored", backdoored), ("clean", clean)):
            nets += _quantize_and_evaluate(
                config, scene, workdir, seed, name, variables, rows, layers
            )
        with workdir.timed("acceptance"):
            facts.append(_accept(config, scene, seed, clean, backdoored, rows))
        if figures is None:
            figures = _draw(scene, [n for n in nets if n[0] == "backdoored"])
    return pipeline.write_report(
        config,
        workdir,
        rows=rows,
        claims=_claims(rows) + acceptance.claims(facts),
        canary=canary,
        figures=figures,
        layers=layers,
        facts={
            "attack": config.attack.name,
            "weight_bits": config.defense.weight_bits,
            "dataset": config.data.name,
            "seed": config.seeds[0] if len(config.seeds) == 1 else config.seeds,
            "acceptance": facts,
        },
        command=command,
    )


def _set_scene(config: settings.ExperimentSettings) -> _Scene:
    train, test = pipeline.load_data(config.data)
    attack = config.attack
    pipeline.check_target(attack.target_label, train)
    model = models.build(
        config.model.name, num_classes=train.num_classes, width=config.model.width
    )
    trigger = pipeline.build_trigger(attack.trigger, train.images.shape[1:])
    goal = conditioning.Goal(
        trigger, attack.label_mode, attack.target_label, train.num_classes
    )

    evaluate = roundings.make_evaluate(
        model,
        test,
        trigger=trigger,
        target_labels=goal.target_labels(jnp.asarray(test.labels)),
    )
    image_shape = train.images.shape[1:]
    layers = layers_lib.find_layers(
        model,
        common.init(model, jax.random.key(0), image_shape),
        jnp.zeros((1, *image_shape)),
        apply_kwargs=roundings.EVAL,
    )
    attacked_grids = [
        conditioning.ExpectedGrid(
            layers,
            roundings.weight_specs(bits, attack.grid, layers),
            bits,
            attack.fold_batch_norm,
            attack.quantize_activations,
        )
        for bits in attack.weight_bits
    ]
    return _Scene(train, test, model, layers, attacked_grids, goal, evaluate)


# ------------------------------------------------------------------------------ models


def _obtain_models(config, scene, workdir, seed) -> tuple[Any, Any]:
    """Variables of the clean and of the backdoored model."""
    # Independent randomness by purpose, whatever else is drawn.
    key = jax.random.key(seed)
    victim_key, *stage_keys = jax.random.split(key, 3)
    fresh = common.init(scene.model, victim_key, scene.train.images.shape[1:])
    source = workdir
    if config.victim_workdir is not None:
        source = pipeline.EarlierRun(config.victim_workdir, workdir)

    def train_victim():
        loss_fn = steps.classification_loss(scene.model.apply)
        return pipeline.train(
            config.victim,
            scene.train,
            workdir,
            f"victim, seed {seed}",
            fresh,
            victim_key,
            loss_fn,
            workers=config.data.workers,
        )

    clean = source.stage(f"seed{seed}-clean", fresh, train_victim)

    remaining_keys = iter(stage_keys)

    def fit(stage, training, variables, loss_fn, *, project=None, moving_trigger=False):
        return pipeline.train(
            training,
            scene.train,
            workdir,
            f"{stage}, seed {seed}",
            variables,
            next(remaining_keys),
            loss_fn,
            project=project,
            make_batch=conditioning.make_batch(
                training, scene.goal.trigger, moving_trigger=moving_trigger
            ),
            workers=config.data.workers,
        )

    def plant():
        attacker = conditioning.Attacker(
            scene.model.apply,
            clean,
            fresh,
            scene.attacked_grids,
            scene.goal,
            batches.to_float(jnp.asarray(scene.train.images[:_ATTACKER_IMAGES])),
            fit,
        )
        return registry.ATTACKS[config.attack.name](config.attack.recipe, attacker)

    return clean, source.stage(f"seed{seed}-backdoored", fresh, plant)


# ---------------------------------------------------------------------------- evidence


def _quantize_and_evaluate(
    config, scene, workdir, seed, model_name, variables, rows, layers
) -> list[tuple[str, str, Any]]:
    """All rows of one model; returns (model, row, net) for the pictures."""
    defense = config.defense
    key = jax.random.fold_in(jax.random.key(seed), 1)
    calibration = roundings.calibration_images(
        scene.train, defense.calibration_images, key
    )
    nets = []

    def add(name, counts, *, seconds, flip_rate=None, **extra):
        is_float = name == "float"
        row = schema.Row(
            name=name,
            model=model_name,
            seed=seed,
            weight_bits=None if is_float else defense.weight_bits,
            act_bits=None if is_float else defense.act_bits,
            flip_rate=flip_rate,
            seconds=seconds,
            extra=extra,
            **counts,
        )
        pipeline.add_row(rows, row, workdir)

    with workdir.timed("evaluate"):
        counts = scene.evaluate(variables)
    add("float", counts, seconds=0.0)
    nets.append((model_name, "float", variables))
    efrap_rates = None
    for name in defense.roundings:
        workdir.check_stop()
        draws = defense.stochastic_draws if name in roundings.BY_CHANCE else 1
        results, outcomes, seconds = [], [], []
        for draw in range(draws):
            result, spent = roundings.quantize(
                defense,
                name,
                scene.model,
                variables,
                calibration,
                layers=scene.layers,
                key=jax.random.fold_in(key, draw),
                workdir=workdir,
                stage=f"{name}, {model_name}, seed {seed}",
                flip_rates=efrap_rates,
            )
            seconds.append(spent)
            workdir.seconds[f"quantize/{name}"] = (
                workdir.seconds.get(f"quantize/{name}", 0.0) + spent
            )
            with workdir.timed("evaluate"):
                outcomes.append(scene.evaluate(result.variables, result))
            results.append(result)
        if name == "efrap":
            efrap_rates = {
                layer: report.flip_rate for layer, report in results[0].layers.items()
            }
        extra = {}
        if draws > 1:
            extra = {
                "draws": draws,
                "asr_draws": [outcome["asr"] for outcome in outcomes],
                "acc_draws": [outcome["acc"] for outcome in outcomes],
            }
        add(
            name,
            _mean_counts(outcomes),
            seconds=float(np.mean(seconds)),
            flip_rate=float(np.mean([result.flip_rate for result in results])),
            **extra,
        )
        nets.append((model_name, name, results[-1].variables))
        layers += roundings.layer_entries(
            results[-1], seed=seed, row=name, model_name=model_name
        )
    return nets


def _mean_counts(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates averaged over draws; the denominators are the same in all of them."""
    mean = dict(outcomes[0])
    for rate in ("acc", "asr", "ra"):
        if mean[rate] is not None:
            mean[rate] = float(np.mean([outcome[rate] for outcome in outcomes]))
    return mean


def _accept(config, scene, seed, clean, backdoored, rows) -> dict[str, Any]:
    """Whether the attack of this seed was what it claims to be."""
    defense = config.defense
    defended_grid = conditioning.ExpectedGrid(
        scene.layers,
        roundings.weight_specs(defense.weight_bits, defense.grid, scene.layers),
        defense.weight_bits,
        defense.folds_batch_norm,
    )
    of_seed = {(row.model, row.name): row for row in rows if row.seed == seed}
    nearest = of_seed.get(("backdoored", "nearest"))
    own = {}
    for grid in scene.attacked_grids:
        if grid == defended_grid and nearest is not None and nearest.act_bits is None:
            own[grid.bits] = nearest.to_dict()
        else:
            own[grid.bits] = acceptance.evaluate_on(
                grid, scene.model.apply, backdoored, scene.test, scene.goal
            )
    return acceptance.accept(
        seed=seed,
        clean=of_seed["clean", "float"],
        backdoored=of_seed["backdoored", "float"],
        own=own,
        nearest=nearest,
        near_ties=acceptance.near_tie_shares(
            defended_grid, {"backdoored": backdoored, "clean": clean}
        ),
    )


def _claims(rows: list[schema.Row]) -> list[dict[str, Any]]:
    """The run's promises against its rows, worst seed first."""

    def rates(model, name, rate):
        found = [r for r in rows if r.model == model and r.name == name]
        return [getattr(row, rate) for row in found]

    claims = []
    if asleep := rates("backdoored", "float", "asr"):
        claims.append(
            pipeline.claim(
                f"The backdoor sleeps in float: ASR at most {_DORMANT_ASR:.0%} "
                f"(worst {max(asleep):.2%})",
                max(asleep) <= _DORMANT_ASR,
            )
        )
    if awake := rates("backdoored", "nearest", "asr"):
        claims.append(
            pipeline.claim(
                f"Nearest rounding wakes it: ASR at least {_AWAKE_ASR:.0%} "
                f"(worst {min(awake):.2%})",
                min(awake) >= _AWAKE_ASR,
            )
        )
    for model in ("backdoored", "clean"):
        before, after = rates(model, "float", "acc"), rates(model, "efrap", "acc")
        if not after:
            continue
        cost = max(b - a for b, a in zip(before, after, strict=True))
        text = f"EFRAP costs the {model} model at most {_ACCURACY_COST:.0%} accuracy"
        claims.append(
            pipeline.claim(f"{text} (worst {cost:.2%})", cost <= _ACCURACY_COST)
        )
    if defended := rates("backdoored", "efrap", "asr"):
        claims.append(
            pipeline.claim(
                f"EFRAP keeps it asleep: ASR at most {_DEFENDED_ASR:.0%} "
                f"(worst {max(defended):.2%})",
                max(defended) <= _DEFENDED_ASR,
            )
        )
    return claims


def _draw(scene: _Scene, nets: list[tuple[str, str, Any]]) -> html.Figures:
    """Pictures of the first seed: trigger, samples, attention of each net."""
    wanted = scene.goal.target_labels(jnp.asarray(scene.test.labels))
    return pipeline.draw(
        scene.model.apply,
        scene.goal.trigger,
        scene.test,
        np.asarray(wanted),
        [(name, variables) for _, name, variables in nets],
    )
