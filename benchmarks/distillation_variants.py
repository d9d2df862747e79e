# SPDX-License-Identifier: Apache-2.0
"""Other ways to distil than the library's, measured beside it on victims of the zoo.

    python -m benchmarks.distillation_variants --out=FILE [--variants=nad,relations]
        [--victims=digits-blend,digits-sig] [--seeds=0,1,2] [--steps=plain,sam_kd]
        [--relation_weight=3]

    nad                what the library does
    two_teachers       the mean of the distances to two teachers of other batches
    average_teacher    the teacher follows the student, an exponential average of it
    refreshed_teacher  the student takes its teacher's place at half time
    perturbed          attention where the student's loss is higher, one step uphill
    relations          not attention: which channels of a stage and of the next one are
                       active at the same places
    victim_relations   the same with the victim itself as the teacher, a control
    fine_tuning        nothing is distilled
    fine_tuning_2x     the same at twice the learning rate, a control, too

Each is trained with the plain step and with the one of `nad_sam_kd` (uphill gradient,
the victim's logits), from the victim, on the clean images, batches and epochs of
`configs/nad.py:zoo/NAME`. A seed decides which clean images there are and their order.
Written to be compared, not to be used: what did not help is nowhere else.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from benchmarks import results
from benchmarks.ours import start
from nad_jax import errors, settings, zoo
from nad_jax import main as program
from nad_jax.core import losses
from nad_jax.data import sources
from nad_jax.defenses import base, nad
from nad_jax.training import steps

# Share of the teacher that each step of "average_teacher" keeps.
_DECAY = 0.98
# Length of the step uphill of "perturbed", in pixel values of each channel.
_PERTURBATION = 8 / 255
# Its distance of unit matrices counts about what the digits' betas give a unit map of
# the last stage, 50 / (4 * 4).
_RELATION_WEIGHT = 3.0


@dataclasses.dataclass(frozen=True)
class _Case:
    """A victim, the defender's images of one seed, and how a student is trained.

    Attributes:
      net: The victim.
      data: Clean images.
      tuning: Of the student.
      nad: The attention term.
      logits: How much the victim's logits count; None = not at all.
      key: Of the batches.
      relation_weight: Of "relations", of the squared distance of unit matrices.
      teachers: Those made so far from these images, by number.
    """

    net: base.Net
    data: base.CleanData
    tuning: settings.TuningSettings
    nad: settings.NadSettings
    logits: settings.LogitSettings | None
    key: jax.Array
    relation_weight: float
    teachers: dict[int, Any]

    def teacher(self, number: int = 0) -> Any:
        """The victim, fine-tuned; 0 is the library's, others saw other batches."""
        if number not in self.teachers:
            self.teachers[number] = nad.make_teacher(
                self.net,
                self.data,
                self.tuning,
                epochs=self.nad.teacher_epochs,
                key=jax.random.fold_in(self.key, number) if number else self.key,
            ).variables
        return self.teachers[number]

    def apply(self, variables: Any, images: jax.Array) -> Any:
        return self.net.model.apply(variables, images, train=False)

    def attention(self, features: Any, teacher: Any) -> jax.Array:
        stages = [stage for stage, beta in self.nad.betas.items() if beta]
        return jnp.mean(
            losses.nad_loss(
                {stage: features[stage] for stage in stages},
                {stage: teacher[stage] for stage in stages},
                betas={stage: self.nad.betas[stage] for stage in stages},
                p=self.nad.p,
                reduction=self.nad.reduction,
            )
        )

    def train(self, net: base.Net, distil: Callable[..., Any], frozen: Any) -> Any:
        """Variables of a student taught by `distil(features, frozen, batch, state)`.

        `state` is (params, batch_stats) of the step. `net` is the victim, or what holds
        it and more.
        """

        def make_loss(frozen):
            teachers, victim = frozen

            def loss_fn(params, batch_stats, batch, key):
                del key
                (logits, features), new_stats = steps.apply_training(
                    net.model.apply, params, batch_stats, batch["images"]
                )
                loss = jnp.mean(steps.cross_entropy(logits, batch["labels"]))
                loss += distil(features, teachers, batch, (params, batch_stats))
                if self.logits is not None:
                    wanted, _ = self.apply(victim, batch["images"])
                    loss += self.logits.weight * jnp.mean(
                        losses.logit_distance(
                            logits, wanted, temperature=self.logits.temperature
                        )
                    )
                return loss, (new_stats, {})

            return loss_fn

        return base.tune(
            net,
            self.data,
            self.tuning,
            make_loss=make_loss,
            frozen=(frozen, self.net.variables),
            key=self.key,
        ).variables


def _nad(case: _Case) -> Any:
    return nad.run(
        case.net,
        case.data,
        case.tuning,
        case.nad,
        key=case.key,
        teacher=base.Net(case.net.model, case.teacher()),
        victim_logits=case.logits,
    ).variables


def _two_teachers(case: _Case) -> Any:
    teachers = (case.teacher(0), case.teacher(1))

    def distil(features, teachers, batch, state):
        del state
        return sum(
            case.attention(features, case.apply(teacher, batch["images"])[1]) / 2
            for teacher in teachers
        )

    return case.train(case.net, distil, teachers)


class _WithTeacher:
    """A model that carries its teacher, and the number of the step, in its statistics.

    So the teacher can change from step to step.
    """

    def __init__(self, model: nn.Module, keep: Callable[[jax.Array], jax.Array]):
        """`keep`: from the number of the step to the share of the teacher kept."""
        self._model = model
        self._keep = keep

    def apply(self, variables: Any, images: jax.Array, **options) -> Any:
        params, stats = variables["params"], variables["batch_stats"]
        (output, updated) = self._model.apply(
            {"params": params, "batch_stats": stats["own"]}, images, **options
        )
        share = self._keep(stats["step"])
        student = {"params": params, "batch_stats": stats["own"]}
        carried = {
            "own": updated["batch_stats"],
            "teacher": optax.incremental_update(student, stats["teacher"], 1 - share),
            "step": stats["step"] + 1,
        }
        return output, {"batch_stats": jax.lax.stop_gradient(carried)}


def _moving_teacher(case: _Case, keep: Callable[[jax.Array], jax.Array]) -> Any:
    net = base.Net(
        _WithTeacher(case.net.model, keep),
        {
            "params": case.net.variables["params"],
            "batch_stats": {
                "own": case.net.variables["batch_stats"],
                "teacher": case.teacher(),
                "step": jnp.int32(0),
            },
        },
    )

    def distil(features, teachers, batch, state):
        del teachers
        teacher = jax.lax.stop_gradient(state[1]["teacher"])
        return case.attention(features, case.apply(teacher, batch["images"])[1])

    variables = case.train(net, distil, ())
    own = variables["batch_stats"]["own"]
    return {"params": variables["params"], "batch_stats": own}


def _average_teacher(case: _Case) -> Any:
    return _moving_teacher(case, lambda step: jnp.float32(_DECAY))


def _refreshed_teacher(case: _Case) -> Any:
    training = case.tuning.training
    half = training.epochs // 2 * (len(case.data.labels) // training.batch_size)
    return _moving_teacher(case, lambda step: jnp.float32(step != half))


def _perturbed(case: _Case) -> Any:
    def distil(features, teacher, batch, state):
        del features
        params, batch_stats = state
        variables = {"params": params, "batch_stats": batch_stats}

        def loss(images):
            logits, _ = case.apply(variables, images)
            return jnp.sum(steps.cross_entropy(logits, batch["labels"]))

        uphill = jnp.sign(jax.grad(loss)(batch["images"]))
        images = jnp.clip(batch["images"] + _PERTURBATION * uphill, 0.0, 1.0)
        images = jax.lax.stop_gradient(images)
        (_, there), _ = steps.apply_training(
            case.net.model.apply, params, batch_stats, images
        )
        return case.attention(there, case.apply(teacher, images)[1])

    return case.train(case.net, distil, case.teacher())


def _relations(case: _Case) -> Any:
    return _related(case, case.teacher())


def _victim_relations(case: _Case) -> Any:
    return _related(case, case.net.variables)


def _related(case: _Case, teacher: Any) -> Any:
    def distil(features, teacher, batch, state):
        del state
        _, taught = case.apply(teacher, batch["images"])
        mine, wanted = (_relation_matrices(f) for f in (features, taught))
        return sum(
            case.relation_weight * jnp.mean(jnp.sum(jnp.square(a - b), axis=(1, 2)))
            for a, b in zip(mine, wanted, strict=True)
        )

    return case.train(case.net, distil, teacher)


def _fine_tuning(case: _Case, *, faster: float = 1.0) -> Any:
    training = case.tuning.training
    training = dataclasses.replace(
        training, learning_rate=faster * training.learning_rate
    )
    tuning = dataclasses.replace(case.tuning, training=training)
    return dataclasses.replace(case, tuning=tuning).train(
        case.net, lambda *_: jnp.float32(0), ()
    )


def _relation_matrices(features: Any) -> list[jax.Array]:
    """Unit matrices `[B, C, D]` of each stage with a map and the next one."""
    maps = [features[stage] for stage in sorted(features) if features[stage].ndim == 4]
    matrices = []
    for wide, narrow in zip(maps, maps[1:], strict=False):
        batch, height, width, _ = narrow.shape
        pooled = jnp.mean(
            jnp.reshape(
                wide, (batch, height, -1, width, wide.shape[2] // width, wide.shape[3])
            ),
            axis=(2, 4),
        )
        matrix = jnp.einsum("bhwc,bhwd->bcd", pooled, narrow)
        norm = jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(1, 2), keepdims=True) + 1e-12)
        matrices.append(matrix / norm)
    return matrices


VARIANTS: dict[str, Callable[[_Case], Any]] = {
    "nad": _nad,
    "two_teachers": _two_teachers,
    "average_teacher": _average_teacher,
    "refreshed_teacher": _refreshed_teacher,
    "perturbed": _perturbed,
    "relations": _relations,
    "victim_relations": _victim_relations,
    "fine_tuning": _fine_tuning,
    "fine_tuning_2x": functools.partial(_fine_tuning, faster=2.0),
}
STEPS = ("plain", "sam_kd")


def measure(
    name: str,
    *,
    variants: list[str],
    step_names: list[str],
    seeds: list[int],
    relation_weight: float = _RELATION_WEIGHT,
    data_dir: str | None = None,
) -> list[dict[str, Any]]:
    """One entry for each variant, step and seed on one victim, and its own."""
    shipped = program.shipped_config("nad.py", f"zoo/{name}").to_dict()
    config = settings.parse(shipped)
    assert isinstance(config, settings.NadExperimentSettings)
    config = zoo.resolve(config)
    train = sources.load(
        config.data.name,
        split="train",
        data_dir=data_dir,
        image_size=config.data.image_size,
    )
    victim = zoo.load(name, zoo.folder())

    def entry(variables, **names):
        net = base.Net(victim.net.model, variables)
        found = zoo.measure(dataclasses.replace(victim, net=net), data_dir)
        rates = {rate: found[rate] for rate in ("acc", "asr", "ra")}
        result = {"victim": name, **names, **rates}
        print(json.dumps(result), flush=True)
        return result

    defense = config.defense
    entries = [entry(victim.net.variables, variant="victim", step=None, seed=None)]
    for seed in seeds:
        clean_key, repair_key = jax.random.split(jax.random.key(seed))
        rows = base.clean_indices(
            clean_key,
            train.labels,
            fraction=defense.clean_fraction,
            validation_fraction=defense.validation_fraction,
        )
        data = base.clean_data(train, *rows)
        teachers: dict[int, Any] = {}
        for step in step_names:
            is_plain = step == "plain"
            case = _Case(
                victim.net,
                data,
                settings.TuningSettings(
                    defense.training,
                    sharpness_radius=0.0 if is_plain else defense.sharpness_radius,
                ),
                defense.nad,
                None if is_plain else defense.victim_logits,
                repair_key,
                relation_weight,
                teachers,
            )
            for variant in variants:
                repaired = VARIANTS[variant](case)
                entries.append(entry(repaired, variant=variant, step=step, seed=seed))
    return entries


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    victims = zoo.names(zoo.folder(), "nad")
    known = [name for name in victims if name.startswith("digits-")]
    parser.add_argument("--victims", default=",".join(known))
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--steps", default=",".join(STEPS))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--relation_weight", type=float, default=_RELATION_WEIGHT)
    parser.add_argument("--data_dir", help="of victims of CIFAR-10")
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    names = {
        kind: getattr(arguments, kind).split(",")
        for kind in ("victims", "variants", "steps", "seeds")
    }
    for kind, accepted in (("variants", VARIANTS), ("steps", STEPS)):
        for name in names[kind]:
            if name not in accepted:
                raise SystemExit(
                    f"distillation_variants: {kind} are of {', '.join(accepted)}, "
                    f"got {name}"
                )
    facts = start.facts()
    entries = []
    try:
        for victim in names["victims"]:
            entries += measure(
                victim,
                variants=names["variants"],
                step_names=names["steps"],
                seeds=[int(seed) for seed in names["seeds"]],
                relation_weight=arguments.relation_weight,
                data_dir=arguments.data_dir,
            )
    except errors.InputError as error:
        raise SystemExit(f"distillation_variants: {error}") from None
    told = " ".join(f"--{kind}={','.join(names[kind])}" for kind in names)
    repaired = [one for one in entries if one["step"] is not None]
    report = {
        "command": f"python -m benchmarks.distillation_variants {told} "
        f"--relation_weight={arguments.relation_weight} --out=FILE",
        **facts,
        "table": results.over_seeds(repaired, by=("step", "variant")),
        "by_victim": results.over_seeds(repaired, by=("step", "variant", "victim")),
        "entries": entries,
    }
    results.write(arguments.out, report)


if __name__ == "__main__":
    main()
