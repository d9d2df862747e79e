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

from nad_jax import acceptance, models, pipeline, repairs, roundings, settings, zoo
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import conditioning, registry, triggers
from nad_jax.data import sources
from nad_jax.defenses import base
from nad_jax.models import common
from nad_jax.models import layers as layers_lib
from nad_jax.report import html, schema
from nad_jax.training import environment, steps

# What a run of this kind is to show; printed with a tick or a cross, never enforced.
_DEFENDED_ASR = 0.02
_ACCURACY_COST = 0.01

# Images on which an attacker looks for inputs that are always 0.
_ATTACKER_IMAGES = 256


@dataclasses.dataclass(frozen=True)
class Scene:
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
    config = zoo.resolve(config)
    canary = environment.check_canary()
    teacher = None
    if config.repairs is not None:
        teacher = repairs.given_teacher(config.repairs, workdir)
    inmate = zoo.take(config.zoo, workdir)
    with workdir.timed("data"):
        scene = set_scene(config, workdir, None if inmate is None else inmate.trigger)
    if inmate is None and (check := registry.CHECKS.get(config.attack.name)):
        check(config.attack.recipe, scene.attacked_grids)
    if config.repairs is not None:
        repairs.check(config.repairs, scene.model, scene.train, teacher)
    wanted = config.defense.calibration_images
    notes = roundings.tell_shortage(scene.train, wanted, workdir)
    rows: list[schema.Row] = []
    layers: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    figures = None
    for seed in config.seeds:
        if inmate is None:
            clean, backdoored = _obtain_models(config, scene, workdir, seed)
        else:
            clean, backdoored = inmate.clean, inmate.net.variables
        nets = []
        for name, variables in (("backdoored", backdoored), ("clean", clean)):
            nets += _quantize_and_evaluate(
                config, scene, workdir, seed, name, variables, rows, layers
            )
        with workdir.timed("acceptance"):
            facts.append(_accept(config, scene, workdir, seed, clean, backdoored, rows))
        if figures is None:
            figures = _draw(scene, [n for n in nets if n[0] == "backdoored"])
    return pipeline.write_report(
        config,
        workdir,
        rows=rows,
        claims=[
            *([] if inmate is None else [inmate.claim(rows[0].to_dict())]),
            *_claims(rows),
            *acceptance.claims(facts),
        ],
        canary=canary,
        figures=figures,
        layers=layers,
        notes=notes,
        facts={
            "attack": config.attack.name,
            "weight_bits": config.defense.weight_bits,
            "dataset": config.data.name,
            "seed": config.seeds[0] if len(config.seeds) == 1 else config.seeds,
            "acceptance": facts,
        },
        command=command,
    )


def set_scene(
    config: settings.ExperimentSettings,
    workdir: workdir_lib.Workdir | None = None,
    trigger: triggers.Trigger | None = None,
) -> Scene:
    """Everything that does not depend on the seed.

    Args:
      config: Of the run.
      workdir: As in `load_data`.
      trigger: Of a victim that has its own; None = as the config describes it.
    """
    train, test = pipeline.load_data(config.data, workdir)
    pipeline.check_augmentation(config, train.images.shape[1:])
    attack = config.attack
    pipeline.check_target(attack.target_label, train, test)
    model = models.build(
        config.model.name, num_classes=train.num_classes, width=config.model.width
    )
    if trigger is None:
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
    layers = roundings.find_layers(model, train.images.shape[1:])
    attacked_grids = roundings.attacked_grids(attack, layers)
    return Scene(train, test, model, layers, attacked_grids, goal, evaluate)


# ------------------------------------------------------------------------------ models


def _keys(seed: int) -> dict[str, jax.Array]:
    """Independent randomness by purpose, whatever else is drawn."""
    # New ones at the end: the key of a purpose depends on its place alone.
    purposes = (
        "victim",
        "first_training",
        "second_training",
        "attacker_images",
        "calibration",
        "draws",
        "clean_images",
        "repairs",
    )
    keys = jax.random.split(jax.random.key(seed), len(purposes))
    return dict(zip(purposes, keys, strict=True))


def _obtain_models(config, scene, workdir, seed) -> tuple[Any, Any]:
    """Variables of the clean and of the backdoored model."""
    keys = _keys(seed)
    victim_key = keys["victim"]
    fresh = common.init(scene.model, victim_key, scene.train.images.shape[1:])
    source = workdir
    if config.victim_workdir is not None:
        source = pipeline.EarlierRun(config, workdir)

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

    # An attack trains at most twice.
    remaining_keys = iter((keys["first_training"], keys["second_training"]))

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
            roundings.calibration_images(
                scene.train, _ATTACKER_IMAGES, keys["attacker_images"]
            ),
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
    keys = _keys(seed)
    calibration = roundings.calibration_images(
        scene.train, defense.calibration_images, keys["calibration"]
    )
    nets = []

    def add(name, counts, net, *, seconds, flip_rate=None, **extra):
        rounded = flip_rate is not None
        row = schema.Row(
            name=name,
            model=model_name,
            seed=seed,
            weight_bits=defense.weight_bits if rounded else None,
            act_bits=defense.act_bits if rounded else None,
            flip_rate=flip_rate,
            seconds=seconds,
            extra=extra,
            **counts,
        )
        pipeline.add_row(rows, row, workdir)
        nets.append((model_name, name, net))

    def add_float(name, net, *, seconds, **extra):
        with workdir.timed("evaluate"):
            counts = scene.evaluate(net)
        add(name, counts, net, seconds=seconds, **extra)

    def add_rounded(
        name, rounding, net, *, earlier=0.0, strength=None, defense=defense, **extra
    ):
        """A row by one or several draws; returns the last one's result."""
        draws = defense.stochastic_draws if rounding in roundings.BY_CHANCE else 1
        results, outcomes, seconds = [], [], []
        for draw in range(draws):
            result, spent = roundings.quantize(
                defense,
                rounding,
                scene.model,
                net,
                calibration,
                layers=scene.layers,
                key=jax.random.fold_in(keys["draws"], draw),
                workdir=workdir,
                stage=f"{name}, {model_name}, seed {seed}",
                strength=strength,
            )
            seconds.append(spent)
            workdir.seconds[f"quantize/{name}"] = (
                workdir.seconds.get(f"quantize/{name}", 0.0) + spent
            )
            with workdir.timed("evaluate"):
                outcomes.append(scene.evaluate(result.variables, result))
            results.append(result)
        if draws > 1:
            extra |= {
                "draws": draws,
                "asr_draws": [outcome["asr"] for outcome in outcomes],
                "acc_draws": [outcome["acc"] for outcome in outcomes],
            }
        add(
            name,
            _mean_counts(outcomes),
            results[-1].variables,
            seconds=earlier + float(np.mean(seconds)),
            flip_rate=float(np.mean([result.flip_rate for result in results])),
            **extra,
        )
        layers.extend(
            roundings.layer_entries(
                results[-1], seed=seed, row=name, model_name=model_name
            )
        )
        return results[-1]

    def add_chosen(name):
        choice, seconds = roundings.choose_flip_weight(
            defense,
            scene.model,
            variables,
            calibration,
            workdir=workdir,
            stage=f"flip weight, {model_name}, seed {seed}",
        )
        tried = ", ".join(f"{weight:g}" for weight in choice.disagreement)
        workdir.say(f"flip weight {choice.flip_weight:g}, tried were {tried}")
        add_rounded(
            name,
            "efrap",
            variables,
            earlier=seconds,
            defense=dataclasses.replace(defense, flip_weight=choice.flip_weight),
            flip_weight=choice.flip_weight,
            disagreement={f"{w:g}": share for w, share in choice.disagreement.items()},
        )

    add_float("float", variables, seconds=0.0)
    efrap_rates = None
    for name in defense.roundings:
        if name == "efrap_chosen":
            workdir.check_stop()
            add_chosen(name)
            continue
        for row_name, strength in defense.controls.rows(name):
            workdir.check_stop()
            if strength is None:
                strength = efrap_rates
            result = add_rounded(row_name, name, variables, strength=strength)
            if name == "efrap":
                efrap_rates = {
                    layer: report.flip_rate for layer, report in result.layers.items()
                }
    if config.repairs is not None:
        is_clean = model_name == "clean"
        wanted = config.repairs.clean_model_rows if is_clean else config.repairs.rows
        stages = _repair_stages(config, scene, workdir, seed, model_name, variables)
        for name in wanted:
            repaired, seconds = stages.repair(name)
            decided = stages.chosen[name]
            add_float(name, repaired.variables, seconds=seconds, **decided)
            add_rounded(
                f"{name}_nearest",
                "nearest",
                repaired.variables,
                earlier=seconds,
                **decided,
            )
    return nets


def _repair_stages(
    config, scene, workdir, seed, model_name, variables
) -> repairs.Stages:
    """The float defences of one model; both models get the same clean images."""
    keys = _keys(seed)
    indices = base.clean_indices(
        keys["clean_images"],
        scene.train.labels,
        fraction=config.repairs.clean_fraction,
        validation_fraction=config.repairs.validation_fraction,
    )
    patient = repairs.Patient(
        model_name,
        seed,
        base.Net(scene.model, variables),
        base.clean_data(scene.train, *indices),
        keys["repairs"],
    )
    return repairs.Stages(config.repairs, workdir, patient)


def _mean_counts(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates averaged over draws; the denominators are the same in all of them."""
    mean = dict(outcomes[0])
    for rate in ("acc", "asr", "ra"):
        if mean[rate] is not None:
            mean[rate] = float(np.mean([outcome[rate] for outcome in outcomes]))
    return mean


def _accept(config, scene, workdir, seed, clean, backdoored, rows) -> dict[str, Any]:
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
    victims = {"backdoored": backdoored, "clean": clean}
    own: dict[int, dict[str, Any] | None] = {}
    for grid in scene.attacked_grids:
        if grid == defended_grid and nearest is not None and nearest.act_bits is None:
            own[grid.bits] = None
            continue
        rates = acceptance.evaluate_on(
            grid, scene.model.apply, backdoored, scene.test, scene.goal
        )
        shares = acceptance.near_tie_shares(grid, victims)
        own[grid.bits] = {**rates, "near_tie_share": shares}
    recalibrated = None
    if nearest is not None and nearest.act_bits is not None:
        recalibrated = _recalibrate(config, scene, workdir, seed, backdoored)
    return acceptance.accept(
        seed=seed,
        clean=of_seed["clean", "float"],
        backdoored=of_seed["backdoored", "float"],
        own=own,
        nearest=nearest,
        recalibrated=recalibrated,
        near_ties=acceptance.near_tie_shares(defended_grid, victims),
    )


def _recalibrate(config, scene, workdir, seed, backdoored) -> dict[str, Any]:
    """Rates of nearest rounding where other images set the ranges of layer inputs."""
    keys = _keys(seed)
    others = roundings.calibration_images(
        scene.train,
        config.defense.calibration_images,
        jax.random.fold_in(keys["calibration"], 1),
    )
    result, _ = roundings.quantize(
        config.defense,
        "nearest",
        scene.model,
        backdoored,
        others,
        layers=scene.layers,
        key=keys["draws"],
        workdir=workdir,
        stage=f"nearest recalibrated, backdoored, seed {seed}",
    )
    return scene.evaluate(result.variables, result)


def _claims(rows: list[schema.Row]) -> list[dict[str, Any]]:
    """The run's promises against its rows, worst seed first."""

    def rates(model, name, rate):
        found = [r for r in rows if r.model == model and r.name == name]
        return [getattr(row, rate) for row in found]

    claims = []
    if asleep := rates("backdoored", "float", "asr"):
        of_clean = max(rates("clean", "float", "asr"), default=0.0)
        limit = max(acceptance.DORMANT_ASR, of_clean)
        claims.append(
            pipeline.claim(
                f"The backdoor sleeps in float: ASR at most {limit:.2%} "
                f"(worst {max(asleep):.2%}; of the clean model {of_clean:.2%})",
                max(asleep) <= limit,
            )
        )
    if awake := rates("backdoored", "nearest", "asr"):
        claims.append(
            pipeline.claim(
                f"Nearest rounding wakes it: ASR at least {acceptance.AWAKE_ASR:.0%} "
                f"(worst {min(awake):.2%})",
                min(awake) >= acceptance.AWAKE_ASR,
            )
        )
    for model in ("backdoored", "clean"):
        before, after = rates(model, "float", "acc"), rates(model, "efrap", "acc")
        if not after:
            continue
        cost = max(b - a for b, a in zip(before, after, strict=True))
        text = f"EFRAP costs the {model} model at most {_ACCURACY_COST:.0%} accuracy"
        claims.append(
            pipeline.claim(
                f"{text} (worst {cost:.2%})", pipeline.at_most(cost, _ACCURACY_COST)
            )
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


def _draw(scene: Scene, nets: list[tuple[str, str, Any]]) -> html.Figures:
    """Pictures of the first seed: trigger, samples, attention of each net."""
    wanted = scene.goal.target_labels(jnp.asarray(scene.test.labels))
    return pipeline.draw(
        scene.model.apply,
        scene.goal.trigger,
        scene.test,
        np.asarray(wanted),
        [(name, variables) for _, name, variables in nets],
    )
