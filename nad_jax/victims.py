# SPDX-License-Identifier: Apache-2.0
"""The models of the repair job: a clean one, and one trained on poisoned data.

fresh -> clean model -> (trigger made to measure, images made hard)
      -> poisoned data -> victim
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from nad_jax import errors, pipeline, settings
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import clean_label, poisoning, triggers, trojan
from nad_jax.data import sources
from nad_jax.models import common
from nad_jax.training import steps


class Victims(NamedTuple):
    """Models of one seed.

    Attributes:
      models: "backdoored" and, where rows are wanted of it, "clean": variables each;
        they share their start.
      trigger: What wakes the backdoored one.
    """

    models: dict[str, Any]
    trigger: triggers.Trigger


def check(
    attack: settings.PoisoningSettings, train: sources.Dataset, model: Any
) -> None:
    """Raises InputError for what `obtain` would find out after its first training.

    Args:
      attack: Section of the config.
      train: Clean training images.
      model: The architecture.
    """
    trigger = pipeline.build_trigger(attack.trigger, train.images.shape[1:])
    # How many there are to choose from does not depend on the key.
    _poisoned_rows(attack, train.labels, jax.random.key(0))
    if attack.noise_ratio and trigger.field is None:
        raise errors.InputError(
            "config.attack.noise_ratio must be 0 for a trigger that does not bend, got "
            f"{attack.noise_ratio} with {attack.trigger.name}"
        )
    if attack.trojan is not None:
        # How many neurons a classifier has does not depend on the key either.
        fresh = common.init(model, jax.random.key(0), train.images.shape[1:])
        trojan.check(attack.trojan, model, fresh, trigger)


def obtain(
    config: settings.NadExperimentSettings,
    train: sources.Dataset,
    model: Any,
    workdir: workdir_lib.Workdir,
    *,
    seed: int,
    victim_key: jax.Array,
    poison_key: jax.Array,
) -> Victims:
    """Trains the models of a seed, or takes them from where they are.

    Args:
      config: Of the run; `victim_workdir` names an earlier one to take them from. The
        clean model is trained only if it has rows, or the attacker needs it.
      train: Clean training images.
      model: The architecture.
      workdir: Where stages are kept.
      seed: Part of the names of stages.
      victim_key: Start of the models, order of images.
      poison_key: Which images are poisoned.
    """
    fresh = common.init(model, victim_key, train.images.shape[1:])
    source = workdir
    if config.victim_workdir is not None:
        source = pipeline.EarlierRun(config, workdir)

    def train_on(dataset, name):
        return pipeline.train(
            config.victim,
            dataset,
            workdir,
            f"{name}, seed {seed}",
            fresh,
            victim_key,
            steps.classification_loss(model.apply),
            workers=config.data.workers,
        )

    attack = config.attack
    needs_clean = attack.trojan is not None or attack.perturbation > 0
    clean = None
    if config.defense.clean_model_rows or needs_clean:
        clean = source.stage(
            f"seed{seed}-clean", fresh, lambda: train_on(train, "clean model")
        )
    trigger = pipeline.build_trigger(attack.trigger, train.images.shape[1:])
    poison_key, trigger_key, noise_key = jax.random.split(poison_key, 3)
    if attack.trojan is not None:
        trojan_settings, drawn = attack.trojan, trigger
        pattern = source.stage(
            f"seed{seed}-trigger",
            {"pattern": drawn.pattern},
            lambda: {
                "pattern": trojan.optimise(
                    model,
                    clean,
                    drawn,
                    train.images,
                    trojan_settings,
                    key=trigger_key,
                ).pattern
            },
        )
        trigger = drawn._replace(**pattern)

    def train_victim():
        poisoned = _poisoned(
            attack, train, model, clean, trigger, poison_key, noise_key
        )
        return train_on(poisoned, "victim")

    backdoored = source.stage(f"seed{seed}-backdoored", fresh, train_victim)
    subjects = {"backdoored": backdoored}
    if config.defense.clean_model_rows:
        subjects["clean"] = clean
    return Victims(subjects, trigger)


def _poisoned_rows(
    attack: settings.PoisoningSettings, labels: np.ndarray, key: jax.Array
) -> np.ndarray:
    """Which training images are poisoned, int64 `[M]`, ascending."""
    return poisoning.poison_indices(
        key,
        labels,
        poison_rate=attack.poison_rate,
        mode=attack.label_mode,
        target_label=attack.target_label,
    )


def _poisoned(
    attack: settings.PoisoningSettings,
    train: sources.Dataset,
    model: Any,
    clean_variables: Any,
    trigger: triggers.Trigger,
    poison_key: jax.Array,
    noise_key: jax.Array,
) -> sources.Dataset:
    """The training data as the attacker hands them out.

    Only the images that change are held, so the others may stay in their files.
    """
    rows = _poisoned_rows(attack, train.labels, poison_key)
    bent_rows = np.zeros(0, rows.dtype)
    row_key, field_key = jax.random.split(noise_key)
    if attack.noise_ratio:
        others = np.setdiff1d(np.arange(len(train)), rows)
        count = min(round(attack.noise_ratio * len(rows)), len(others))
        order = np.asarray(jax.random.permutation(row_key, len(others)))
        bent_rows = others[order[:count]]
    changed = np.concatenate([rows, bent_rows])
    part = train.take(changed)
    poisoned = np.arange(len(rows))
    images = np.array(part.images)
    if attack.perturbation:
        images[poisoned] = clean_label.perturb(
            lambda x: model.apply(clean_variables, x, train=False)[0],
            images[poisoned],
            part.labels[poisoned],
            radius=attack.perturbation,
            num_steps=attack.perturbation_steps,
        )
    if attack.noise_ratio:
        images = poisoning.distract(
            images,
            np.arange(len(rows), len(changed)),
            trigger,
            jitter=attack.noise_jitter,
            key=field_key,
        )
    images, labels = poisoning.poison(
        images,
        part.labels,
        poisoned,
        trigger,
        mode=attack.label_mode,
        target_label=attack.target_label,
        num_classes=train.num_classes,
    )
    return train.replaced(changed, images, labels)
