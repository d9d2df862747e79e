# SPDX-License-Identifier: Apache-2.0
"""The other job: train a model on poisoned data, then repair it with clean images.

    data -> poison -> victim -> evaluation
         -> one clean subset -> every repair, backdoored and clean model -> report

All repairs get the same clean images, batches and budget. Test images and the trigger
measure, here, in this file; no repair is ever given them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from nad_jax import models, pipeline, settings
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import clean_label, poisoning, triggers
from nad_jax.core import metrics
from nad_jax.data import sources
from nad_jax.defenses import base, fine_pruning, fine_tuning, mode_connectivity, nad
from nad_jax.models import common
from nad_jax.report import schema
from nad_jax.training import environment, evaluation, loop, steps

# What a run of this kind is to show; printed with a tick or a cross, never enforced.
_AWAKE_ASR = 0.95
_REPAIRED_ASR = 0.05
_ACCURACY_COST = 0.02


@dataclasses.dataclass(frozen=True)
class _Scene:
    """What all seeds share: data, architecture, trigger, evaluator."""

    train: sources.Dataset
    test: sources.Dataset
    model: Any
    trigger: triggers.Trigger
    target_labels: np.ndarray
    evaluate: Callable[[Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Patient:
    """A model on the table, and what the defender has to repair it."""

    name: str
    seed: int
    net: base.Net
    data: base.CleanData
    key: jax.Array


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
    canary = environment.check_canary()
    with workdir.timed("data"):
        scene = _set_scene(config)
    rows: list[schema.Row] = []
    figures = None
    for seed in config.seeds:
        # Independent randomness by purpose, whatever else is drawn.
        keys = jax.random.split(jax.random.key(seed), 4)
        victim_key, poison_key, clean_key, repair_key = keys
        victims = _obtain_models(config, scene, workdir, seed, victim_key, poison_key)
        indices = _clean_indices(config, scene, workdir, seed, clean_key)
        for name, variables in victims.items():
            patient = _Patient(
                name,
                seed,
                base.Net(scene.model, variables),
                base.clean_data(scene.train, *indices),
                repair_key,
            )
            nets = _repair_and_evaluate(config, scene, workdir, patient, rows)
            if figures is None:
                figures = pipeline.draw(
                    scene.model.apply,
                    scene.trigger,
                    scene.test,
                    scene.target_labels,
                    nets,
                )
    data = (len(indices[0]), len(indices[1]))
    return pipeline.write_report(
        config,
        workdir,
        rows=rows,
        claims=_claims(rows),
        canary=canary,
        figures=figures,
        notes=[
            f"Every repair trains on the same {data[0]:,} clean images; {data[1]:,} "
            "more are held out for its decisions. It sees no test image, no trigger.",
            "Triggers are stamped on stored images, before crop and flip.",
        ],
        command=command,
    )


def _set_scene(config: settings.NadExperimentSettings) -> _Scene:
    train, test = pipeline.load_data(config.data)
    attack = config.attack
    pipeline.check_target(attack.target_label, train)
    model = models.build(
        config.model.name, num_classes=train.num_classes, width=config.model.width
    )
    trigger = pipeline.build_trigger(attack.trigger, train.images.shape[1:])
    target_labels = np.asarray(
        poisoning.target_labels(
            test.labels,
            mode=attack.label_mode,
            target_label=attack.target_label,
            num_classes=test.num_classes,
        )
    )
    evaluate = evaluation.make_evaluator(
        lambda variables, images: model.apply(variables, images, train=False),
        test.images,
        test.labels,
        trigger=trigger,
        target_labels=target_labels,
    )
    return _Scene(train, test, model, trigger, target_labels, evaluate)


# ------------------------------------------------------------------------------ models


def _obtain_models(
    config, scene, workdir, seed, victim_key, poison_key
) -> dict[str, Any]:
    """Variables of the backdoored and of the clean model, which share their start."""
    fresh = common.init(scene.model, victim_key, scene.train.images.shape[1:])
    source = workdir
    if config.victim_workdir is not None:
        source = pipeline.EarlierRun(config.victim_workdir, workdir)

    def train_on(dataset, name):
        return pipeline.train(
            config.victim,
            dataset,
            workdir,
            f"{name}, seed {seed}",
            fresh,
            victim_key,
            steps.classification_loss(scene.model.apply),
        )

    clean = source.stage(
        f"seed{seed}-clean", fresh, lambda: train_on(scene.train, "clean model")
    )
    backdoored = source.stage(
        f"seed{seed}-backdoored",
        fresh,
        lambda: train_on(_poisoned(config, scene, clean, poison_key), "victim"),
    )
    return {"backdoored": backdoored, "clean": clean}


def _poisoned(config, scene, clean_variables, key) -> sources.Dataset:
    """The training set as the attacker hands it out."""
    attack, train = config.attack, scene.train
    rows = poisoning.poison_indices(
        key,
        train.labels,
        poison_rate=attack.poison_rate,
        mode=attack.label_mode,
        target_label=attack.target_label,
    )
    images = np.array(train.images)
    if attack.perturbation:
        images[rows] = clean_label.perturb(
            lambda x: scene.model.apply(clean_variables, x, train=False)[0],
            images[rows],
            train.labels[rows],
            radius=attack.perturbation,
            num_steps=attack.perturbation_steps,
        )
    images, labels = poisoning.poison(
        images,
        train.labels,
        rows,
        scene.trigger,
        mode=attack.label_mode,
        target_label=attack.target_label,
        num_classes=train.num_classes,
    )
    return dataclasses.replace(train, images=images, labels=labels)


def _clean_indices(config, scene, workdir, seed, key) -> tuple[np.ndarray, np.ndarray]:
    """The defender's rows of the training set; kept in the workdir for the record."""
    rows, validation_rows = base.clean_indices(
        key,
        scene.train.labels,
        fraction=config.defense.clean_fraction,
        validation_fraction=config.defense.validation_fraction,
    )
    record = {"train": rows.tolist(), "validation": validation_rows.tolist()}
    schema.write_json(workdir.path / f"clean_indices-seed{seed}.json", record)
    return rows, validation_rows


# ----------------------------------------------------------------------------- repairs


def _repair_and_evaluate(
    config, scene, workdir, patient: _Patient, rows
) -> list[tuple[str, Any]]:
    """All rows of one model; returns (row, variables) for the pictures."""
    with workdir.timed("evaluate"):
        before = scene.evaluate(patient.net.variables)
    nets: list[tuple[str, Any]] = []

    def add(name, counts, seconds, **extra):
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

    add("float", before, 0.0)
    nets.append(("float", patient.net.variables))

    stages = _Stages(config, workdir, patient)
    defense = config.defense
    is_clean = patient.name == "clean"
    wanted = defense.clean_model_rows if is_clean else defense.rows
    for name in wanted:
        net, seconds = stages.repair(name)
        with workdir.timed("evaluate"):
            counts = scene.evaluate(net.variables)
        add(name, counts, seconds)
        nets.append((name, net.variables))
    if any(name.startswith("nad") for name in wanted):
        nets.append(("teacher", stages.teacher()[0].variables))
    return nets


class _Stages:
    """The repairs of one model: each a stage of the workdir, none computed twice."""

    def __init__(self, config, workdir: workdir_lib.Workdir, patient: _Patient):
        self._defense = config.defense
        self._workdir = workdir
        self._patient = patient
        self._done: dict[str, tuple[base.Net, float]] = {}

    def repair(self, name: str) -> tuple[base.Net, float]:
        """The net of a row of `settings.REPAIRS`, and the seconds it took.

        Seconds count everything the row needs, also what it shares with others.
        """
        defense = self._defense
        tuning = settings.TuningSettings(defense.training, patience=defense.patience)
        if name in ("ft_sam", "nad_sam"):
            tuning = dataclasses.replace(
                tuning, sharpness_radius=defense.sharpness_radius
            )
        if name in ("fine_tuning", "ft_sam"):
            return self._stage(name, fine_tuning.run, tuning)
        if name == "fine_pruning":
            return self._stage(name, fine_pruning.run, tuning, defense.fine_pruning)
        if name == "mode_connectivity":
            tuned, earlier = self.repair("fine_tuning")
            net, seconds = self._stage(
                name,
                mode_connectivity.run,
                tuning,
                defense.mode_connectivity,
                tuned=tuned,
            )
        else:
            teacher, earlier = self.teacher()
            net, seconds = self._stage(
                name, nad.run, tuning, defense.nad, teacher=teacher
            )
        return net, earlier + seconds

    def teacher(self) -> tuple[base.Net, float]:
        """The teacher of all rows that distil."""
        tuning = settings.TuningSettings(
            self._defense.training, patience=self._defense.patience
        )
        epochs = self._defense.nad.teacher_epochs
        return self._stage("teacher", nad.make_teacher, tuning, epochs=epochs)

    def _stage(
        self, name: str, run: Callable[..., base.Defended], *arguments, **options
    ) -> tuple[base.Net, float]:
        """What `run` makes of the patient, computed or restored, and its seconds."""
        if name in self._done:
            return self._done[name]
        patient, workdir = self._patient, self._workdir
        full_name = f"seed{patient.seed}-{patient.name}-{name}"

        def compute():
            progress = workdir.progress(
                f"{name}, {patient.name} model, seed {patient.seed}",
                self._defense.training.epochs,
            )
            last: dict[str, float] = {}

            def on_epoch(variables, metrics):
                del variables
                last.update(metrics)
                workdir.record("epoch", stage=full_name, **metrics)
                progress.advance(f"loss {metrics['loss']:.4f}")

            try:
                defended = run(
                    patient.net,
                    patient.data,
                    *arguments,
                    **options,
                    key=patient.key,
                    on_epoch=on_epoch,
                    should_stop=workdir.should_stop,
                )
            except loop.TrainingInterrupted as interruption:
                raise workdir_lib.Interrupted(f"{full_name}: {interruption}") from None
            progress.done(f"loss {last['loss']:.4f}")
            return defended.variables

        variables = workdir.stage(full_name, patient.net.variables, compute)
        net = base.Net(patient.net.model, variables)
        self._done[name] = net, workdir.seconds[full_name]
        return self._done[name]


def _claims(rows: list[schema.Row]) -> list[dict[str, Any]]:
    """The run's promises against its rows, worst seed first."""

    def rates(model, name, rate):
        found = [r for r in rows if r.model == model and r.name == name]
        return [getattr(row, rate) for row in found]

    claims = []
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
                    cost <= _ACCURACY_COST,
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
