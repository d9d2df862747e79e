# SPDX-License-Identifier: Apache-2.0
"""The other job: train a model on poisoned data, then repair it with clean images.

    data -> poison -> victim -> evaluation
         -> one clean subset -> every repair, backdoored and clean model -> report

All repairs get the same clean images, batches and budget. Test images and the trigger
measure, here, in this file; no repair is ever given them.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nad_jax import models, pipeline, repairs, settings, victims, whole_file, zoo
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import poisoning, triggers
from nad_jax.core import metrics
from nad_jax.data import sources
from nad_jax.defenses import base
from nad_jax.report import schema
from nad_jax.training import agreement, environment, evaluation, sharding

# What a run of this kind is to show; printed with a tick or a cross, never enforced.
_AWAKE_ASR = 0.95
_REPAIRED_ASR = 0.05
_ACCURACY_COST = 0.02


@dataclasses.dataclass(frozen=True)
class _Scene:
    """What all seeds share: data, architecture, and what the attacker wants."""

    train: sources.Dataset
    test: sources.Dataset
    model: Any
    target_labels: np.ndarray

    def evaluator(self, trigger: triggers.Trigger) -> Callable[[Any], dict[str, Any]]:
        """Rates of variables over the test images, with and without the trigger."""
        return evaluation.make_evaluator(
            lambda variables, images: self.model.apply(variables, images, train=False),
            self.test.images,
            self.test.labels,
            trigger=trigger,
            target_labels=self.target_labels,
            mesh=sharding.forward_mesh(),
        )


def run(
    config: settings.NadExperimentSettings,
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
    teacher = repairs.given_teacher(config.defense, workdir)
    with workdir.timed("data"):
        scene = _set_scene(config, workdir)
    repairs.check(config.defense, scene.model, scene.train, teacher)
    inmate = zoo.take(config.zoo, workdir)
    rows: list[schema.Row] = []
    figures = None
    for seed in config.seeds:
        # Independent randomness by purpose, whatever else is drawn.
        keys = jax.random.split(jax.random.key(seed), 4)
        victim_key, poison_key, clean_key, repair_key = keys
        if inmate is None:
            subjects = victims.obtain(
                config,
                scene.train,
                scene.model,
                workdir,
                seed=seed,
                victim_key=victim_key,
                poison_key=poison_key,
            )
        else:
            subjects = victims.Victims(
                {"backdoored": inmate.net.variables}, inmate.trigger
            )
        evaluate = scene.evaluator(subjects.trigger)
        indices = _clean_indices(config, scene, workdir, seed, clean_key)
        for name, variables in subjects.models.items():
            patient = repairs.Patient(
                name,
                seed,
                base.Net(scene.model, variables),
                base.clean_data(scene.train, *indices),
                repair_key,
            )
            nets = _repair_and_evaluate(config, evaluate, workdir, patient, rows)
            if figures is None:
                figures = pipeline.draw(
                    scene.model.apply,
                    subjects.trigger,
                    scene.test,
                    scene.target_labels,
                    nets,
                )
    data = (len(indices[0]), len(indices[1]))
    curves = agreement.from_first(
        lambda: _curves(rows, workdir) if config.curves else []
    )
    return pipeline.write_report(
        config,
        workdir,
        rows=rows,
        claims=_claims(rows, inmate),
        curves=curves,
        canary=canary,
        figures=figures,
        notes=[
            f"Every repair trains on the same {data[0]:,} clean images; {data[1]:,} "
            "more are held out for its decisions. It sees no test image, no trigger.",
            "Triggers are stamped on stored images, before crop and flip.",
        ],
        command=command,
        facts={
            "attack": config.attack.name,
            "dataset": config.data.name,
            "clean_fraction": config.defense.clean_fraction,
            "poison_rate": config.attack.poison_rate,
            "seed": config.seeds[0] if len(config.seeds) == 1 else config.seeds,
        },
    )


def _set_scene(
    config: settings.NadExperimentSettings, workdir: workdir_lib.Workdir
) -> _Scene:
    train, test = pipeline.load_data(config.data, workdir)
    pipeline.check_augmentation(config, train.images.shape[1:])
    attack = config.attack
    pipeline.check_target(attack.target_label, train, test)
    model = models.build(
        config.model.name, num_classes=train.num_classes, width=config.model.width
    )
    if config.zoo is None:
        victims.check(attack, train, model)
    target_labels = np.asarray(
        poisoning.target_labels(
            test.labels,
            mode=attack.label_mode,
            target_label=attack.target_label,
            num_classes=test.num_classes,
        )
    )
    return _Scene(train, test, model, target_labels)


def _clean_indices(config, scene, workdir, seed, key) -> tuple[np.ndarray, np.ndarray]:
    """The defender's rows of the training set; kept in the workdir for the record."""
    rows, validation_rows = base.clean_indices(
        key,
        scene.train.labels,
        fraction=config.defense.clean_fraction,
        validation_fraction=config.defense.validation_fraction,
    )
    record = {"train": rows.tolist(), "validation": validation_rows.tolist()}
    if agreement.is_first():
        whole_file.write_json(workdir.path / f"clean_indices-seed{seed}.json", record)
    return rows, validation_rows


# ----------------------------------------------------------------------------- repairs


def _repair_and_evaluate(
    config,
    evaluate: Callable[[Any], dict[str, Any]],
    workdir,
    patient: repairs.Patient,
    rows: list[schema.Row],
) -> list[tuple[str, Any]]:
    """All rows of one model; returns (row, variables) for the pictures."""
    with workdir.timed("evaluate"):
        before = evaluate(patient.net.variables)
    nets: list[tuple[str, Any]] = []

    def add(name, counts, seconds, variables, **extra):
        if len(patient.data.validation_labels):
            # All that the defender sees of it; some had trained the victim, too.
            with workdir.timed("evaluate"):
                extra["held_out_acc"] = stages.held_out_accuracy(variables)
        extra["der"] = metrics.defense_effectiveness_rating(
            acc_before=before["acc"],
            asr_before=before["asr"] or 0.0,
            acc_after=counts["acc"],
            asr_after=counts["asr"] or 0.0,
        )
        row = schema.Row(
            name=name,
            model=patient.name,
            seed=patient.seed,
            weight_bits=None,
            act_bits=None,
            flip_rate=None,
            seconds=seconds,
            extra=extra,
            **counts,
        )
        pipeline.add_row(rows, row, workdir)

    defense = config.defense
    stages = repairs.Stages(
        defense, workdir, patient, evaluate if config.curves else None
    )
    add("float", before, 0.0, patient.net.variables)
    nets.append(("float", patient.net.variables))

    is_clean = patient.name == "clean"
    wanted = defense.clean_model_rows if is_clean else defense.rows
    for name in wanted:
        net, seconds = stages.repair(name)
        with workdir.timed("evaluate"):
            counts = evaluate(net.variables)
        add(name, counts, seconds, net.variables, **stages.chosen[name])
        nets.append((name, net.variables))
    # A given teacher may be of another architecture.
    if any(name.startswith("nad") for name in wanted) and defense.teacher is None:
        nets.append(("teacher", stages.teacher()[0].variables))
    return nets


def _curves(
    rows: list[schema.Row], workdir: workdir_lib.Workdir
) -> list[dict[str, Any]]:
    """Rates by epoch from the records of this workdir, also of stages restored."""
    by_stage: dict[str, dict[int, dict[str, Any]]] = {}
    for line in (workdir.path / "metrics.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        if record["kind"] == "epoch" and "asr" in record:
            # A stage that was begun again overwrites what it recorded before.
            by_stage.setdefault(record["stage"], {})[record["epoch"]] = record
    curves = []
    for row in rows:
        if row.name == "float":
            before = row
            continue
        epochs = by_stage.get(f"seed{row.seed}-{row.model}-{row.name}", {})
        if epochs:
            own = [before.to_dict(), *(epochs[epoch] for epoch in sorted(epochs))]
            curve = {rate: [entry[rate] for entry in own] for rate in ("acc", "asr")}
            curves.append(
                {"seed": row.seed, "model": row.model, "row": row.name, **curve}
            )
    return curves


def _claims(rows: list[schema.Row], inmate: zoo.Victim | None) -> list[dict[str, Any]]:
    """The run's promises against its rows, worst seed first."""

    def rates(model, name, rate):
        found = [r for r in rows if r.model == model and r.name == name]
        return [getattr(row, rate) for row in found]

    claims = []
    if inmate is not None:
        claims.append(inmate.claim(rows[0].to_dict()))
    if awake := rates("backdoored", "float", "asr"):
        claims.append(
            pipeline.claim(
                f"The backdoor is awake: ASR at least {_AWAKE_ASR:.0%} "
                f"(worst {min(awake):.2%})",
                min(awake) >= _AWAKE_ASR,
            )
        )
    if repaired := rates("backdoored", "nad", "asr"):
        claims.append(
            pipeline.claim(
                f"NAD erases it: ASR at most {_REPAIRED_ASR:.0%} "
                f"(worst {max(repaired):.2%})",
                max(repaired) <= _REPAIRED_ASR,
            )
        )
    for model in schema.MODELS:
        before, after = rates(model, "float", "acc"), rates(model, "nad", "acc")
        if after:
            cost = max(b - a for b, a in zip(before, after, strict=True))
            claims.append(
                pipeline.claim(
                    f"NAD costs the {model} model at most {_ACCURACY_COST:.0%} "
                    f"accuracy (worst {cost:.2%})",
                    pipeline.at_most(cost, _ACCURACY_COST),
                )
            )
    tuned, distilled = (
        rates("backdoored", name, "asr") for name in ("fine_tuning", "nad")
    )
    if tuned and distilled:
        gain = np.mean(tuned) - np.mean(distilled)
        claims.append(
            pipeline.claim(
                "The attention term lowers ASR below that of fine-tuning "
                f"(by {100 * gain:.2f} points, mean over seeds)",
                bool(gain > 0),
            )
        )
    return claims
