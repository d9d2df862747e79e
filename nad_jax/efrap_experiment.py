# SPDX-License-Identifier: Apache-2.0
"""The main job: plant a quantization-conditioned backdoor, wake it, defeat it.

    data -> victim -> attack -> float evaluation
         -> every rounding on one grid, backdoored and clean model -> report

`run` is what the command line, tests and notebooks call.
"""

import dataclasses
import functools
import pathlib
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, models, settings
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import projection, triggers
from nad_jax.core import attention, quantization
from nad_jax.data import batches, sources
from nad_jax.defenses import adam_rounding
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.models import common
from nad_jax.models import layers as layers_lib
from nad_jax.report import html, schema, tables
from nad_jax.training import environment, evaluation, loop, optimizers, steps
from nad_jax.training import state as state_lib

# What a run of this kind is to show; printed with a tick or a cross, never enforced.
_DORMANT_ASR = 0.02
_AWAKE_ASR = 0.95
_DEFENDED_ASR = 0.02
_ACCURACY_COST = 0.01

_EVAL = {"train": False}


@dataclasses.dataclass(frozen=True)
class _Scene:
    """What all seeds share: data, architecture, grid, evaluators."""

    train: sources.Dataset
    test: sources.Dataset
    model: Any
    goal: projection.Goal
    evaluate: Callable[[Any], dict[str, Any]]


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
    figures = None
    for seed in config.seeds:
        clean, backdoored = _obtain_models(config, scene, workdir, seed)
        nets = []
        for name, variables in (("backdoored", backdoored), ("clean", clean)):
            nets += _quantize_and_evaluate(
                config, scene, workdir, seed, name, variables, rows, layers
            )
        if figures is None:
            figures = _draw(scene, [n for n in nets if n[0] == "backdoored"])
    facts = environment.describe()
    report = schema.build_report(
        title=config.title,
        command=command,
        config=dataclasses.asdict(config),
        rows=rows,
        git_commit=git_commit(),
        versions={k: v for k, v in facts["versions"].items() if v is not None},
        devices=facts["devices"],
        seconds=workdir.seconds,
        layers=layers,
        claims=_claims(rows),
        notes=[
            f"Python {facts['python']} on {facts['machine']}, "
            f"{facts['cpu_count']} CPU cores, XLA_FLAGS={facts['xla_flags']!r}.",
            f"Canary for wrong numbers under jit: passed={canary['passed']}.",
        ],
    )
    schema.write_text(workdir.path / "report.html", html.render(report, figures))
    # Last, so that a report.json on disk means that the run was finished.
    schema.write_json(workdir.path / "report.json", report)
    workdir.say(tables.headline(rows))
    workdir.say(f"report: {workdir.path / 'report.html'}")
    return report


def _set_scene(config: settings.ExperimentSettings) -> _Scene:
    train, test = (
        sources.load(
            config.data.name,
            split=split,
            data_dir=config.data.data_dir,
            image_size=config.data.image_size,
        )
        for split in ("train", "test")
    )
    attack = config.attack
    if not attack.target_label < train.num_classes:
        raise errors.InputError(
            f"config.attack.target_label must be below {train.num_classes}, the number "
            f"of classes of {train.name}, got {attack.target_label}"
        )
    model = models.build(
        config.model.name, num_classes=train.num_classes, width=config.model.width
    )
    trigger = build_trigger(attack.trigger, train.images.shape[1:])
    goal = projection.Goal(
        trigger, attack.label_mode, attack.target_label, train.num_classes
    )

    def apply(net, images):
        variables, act_params, act_spec = net
        return efrap_lib.apply_quantized(
            model, variables, images, act_params, act_spec=act_spec, apply_kwargs=_EVAL
        )

    make = functools.partial(
        evaluation.make_evaluator,
        images=test.images,
        labels=test.labels,
        trigger=trigger,
        target_labels=goal.target_labels(jnp.asarray(test.labels)),
    )
    # Two programs at most: with float and with quantized activations.
    evaluators = {
        act_spec: make(lambda net, x, act_spec=act_spec: apply((*net, act_spec), x))
        for act_spec in {None, _act_spec(config.defense)}
    }

    def evaluate(net):
        variables, act_params, act_spec = net
        return evaluators[act_spec]((variables, act_params))

    return _Scene(train, test, model, goal, evaluate)


def _act_spec(defense: settings.QuantizationSettings):
    if defense.act_bits is None:
        return None
    return quantization.QuantSpec(defense.act_bits, False, None, "mse")


def build_trigger(
    choice: settings.TriggerSettings, image_shape: tuple[int, ...]
) -> triggers.Trigger:
    """The trigger a config names, with its options.

    Raises:
      InputError: an unknown name, or an option that trigger does not have.
    """
    if choice.name not in triggers.TRIGGERS:
        raise errors.InputError(
            f"config.attack.trigger.name must be of "
            f"{', '.join(sorted(triggers.TRIGGERS))}, got {choice.name!r}"
        )
    try:
        return triggers.TRIGGERS[choice.name](image_shape, **choice.options)
    except TypeError as error:
        raise errors.InputError(f"config.attack.trigger: {error}") from None


# ------------------------------------------------------------------------------ models


def _obtain_models(config, scene, workdir, seed) -> tuple[Any, Any]:
    """Variables of the clean and of the backdoored model."""
    # Independent randomness by purpose, whatever else is drawn.
    key = jax.random.key(seed)
    victim_key, wake_key, hide_key = jax.random.split(key, 3)
    fresh = common.init(scene.model, victim_key, scene.train.images.shape[1:])
    source = workdir
    if config.victim_workdir is not None:
        source = _EarlierRun(config.victim_workdir, workdir)

    def train_victim():
        loss_fn = steps.classification_loss(scene.model.apply)
        return _train(
            config.victim,
            scene,
            workdir,
            f"victim, seed {seed}",
            fresh,
            victim_key,
            loss_fn,
        )

    clean = source.stage(f"seed{seed}-clean", fresh, train_victim)

    def plant():
        apply_fn = scene.model.apply
        images = jnp.zeros((1, *scene.train.images.shape[1:]))
        found = layers_lib.find_layers(scene.model, clean, images, apply_kwargs=_EVAL)
        specs = weight_specs(config.attack.weight_bits, config.attack.grid, found)
        woken = _train(
            config.attack.wake,
            scene,
            workdir,
            f"wake, seed {seed}",
            clean,
            wake_key,
            projection.wake_loss(apply_fn, found, specs, scene.goal),
        )
        box = projection.rounding_box(
            woken["params"], found, specs, cell_margin=config.attack.cell_margin
        )
        return _train(
            config.attack.hide,
            scene,
            workdir,
            f"hide, seed {seed}",
            woken,
            hide_key,
            projection.hide_loss(apply_fn, scene.goal),
            project=functools.partial(projection.project, box=box),
        )

    return clean, source.stage(f"seed{seed}-backdoored", fresh, plant)


class _EarlierRun:
    """Stages of an earlier run, read only."""

    def __init__(self, path: str, workdir: workdir_lib.Workdir):
        self._path = pathlib.Path(path)
        self._workdir = workdir

    def stage(self, name: str, like: Any, compute: Callable[[], Any]) -> Any:
        del compute
        from nad_jax.training import checkpoints

        folder = self._path / "checkpoints" / name
        if not checkpoints.steps(folder):
            raise errors.InputError(
                f"config.victim_workdir {self._path} has no checkpoint {name!r}"
            )
        with self._workdir.timed(name):
            return checkpoints.restore(folder, like)[0]


def weight_specs(
    bits: int, grid: settings.GridSettings, layers: list[layers_lib.Layer]
) -> dict[str, quantization.QuantSpec]:
    """Layer name -> grid of its kernel."""
    spec = weight_spec(bits, grid)
    specs = {layer.name: spec for layer in layers}
    if grid.first_last_bits is not None:
        ends = dataclasses.replace(spec, bits=grid.first_last_bits)
        specs[layers[0].name] = specs[layers[-1].name] = ends
    return specs


def weight_spec(bits: int, grid: settings.GridSettings) -> quantization.QuantSpec:
    """The grid of all layers but, perhaps, the first and the last."""
    channel_axis = -1 if grid.per_channel else None
    return quantization.QuantSpec(bits, grid.symmetric, channel_axis, grid.range_method)


def _train(
    training: settings.TrainingSettings,
    scene: _Scene,
    workdir: workdir_lib.Workdir,
    stage: str,
    variables: Any,
    key: jax.Array,
    loss_fn: steps.LossFn,
    project: Callable[[Any], Any] | None = None,
) -> Any:
    """Variables after one stage of training on the attacker's data."""
    num_examples = len(scene.train.labels)
    tx = optimizers.build(training, num_examples=num_examples)
    progress = workdir.progress(stage, training.epochs)
    last: dict[str, float] = {}

    def on_epoch(state, metrics):
        last.update(metrics)
        workdir.record("epoch", stage=stage, epoch=int(state.epoch), **metrics)
        progress.advance(f"loss {metrics['loss']:.4f}")

    def make_batch(key, images, labels, indices):
        pixels = batches.to_float(images[indices])
        if training.crop_padding or training.flip:
            pixels = batches.augment(
                key, pixels, pad=training.crop_padding, flip=training.flip
            )
        return {"images": pixels, "labels": labels[indices]}

    try:
        state = loop.fit(
            state_lib.create(variables, tx, key),
            scene.train.images,
            scene.train.labels,
            step_fn=steps.make_train_step(loss_fn, tx, project=project),
            epochs=training.epochs,
            batch_size=training.batch_size,
            make_batch=make_batch,
            steps_per_dispatch=training.steps_per_dispatch,
            on_epoch=on_epoch,
            should_stop=workdir.should_stop,
        )
    except loop.TrainingInterrupted as interruption:
        raise workdir_lib.Interrupted(f"{stage}: {interruption}") from None
    progress.done(f"{training.epochs} epochs, loss {last['loss']:.4f}")
    return state_lib.variables(state)


# ---------------------------------------------------------------------------- evidence


def _quantize_and_evaluate(
    config, scene, workdir, seed, model_name, variables, rows, layers
) -> list[tuple[str, str, Any]]:
    """All rows of one model; returns (model, row, net) for the pictures."""
    defense = config.defense
    key = jax.random.fold_in(jax.random.key(seed), 1)
    calibration = _calibration_images(scene, defense.calibration_images, key)
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
        rows.append(row)
        workdir.record("row", **row.to_dict())
        shown = " ".join(
            f"{label} {row_value:6.2%}"
            for label, row_value in (("ACC", row.acc), ("ASR", row.asr), ("RA", row.ra))
        )
        workdir.say(f"{model_name:>10} {name:<14} {shown}")

    with workdir.timed("evaluate"):
        counts = scene.evaluate((variables, {}, None))
    add("float", counts, seconds=0.0)
    nets.append((model_name, "float", variables))
    for name in defense.roundings:
        workdir.check_stop()
        draws = defense.stochastic_draws if name == "stochastic" else 1
        results, outcomes, seconds = [], [], []
        for draw in range(draws):
            started = time.perf_counter()
            result = _quantize(
                defense,
                scene,
                workdir,
                name,
                variables,
                calibration,
                jax.random.fold_in(key, draw),
                f"{name}, {model_name}, seed {seed}",
            )
            jax.block_until_ready(result.variables)
            seconds.append(time.perf_counter() - started)
            workdir.seconds[f"quantize/{name}"] = (
                workdir.seconds.get(f"quantize/{name}", 0.0) + seconds[-1]
            )
            with workdir.timed("evaluate"):
                outcomes.append(
                    scene.evaluate(
                        (result.variables, result.act_params, result.act_spec)
                    )
                )
            results.append(result)
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
        layers += _layer_entries(results[-1], seed, name, model_name, defense)
    return nets


def _quantize(defense, scene, workdir, name, variables, images, key, stage):
    method, flip_weight = {
        "reconstruction": ("coordinate", 0.0),
        "efrap": ("coordinate", defense.flip_weight),
    }.get(name, (name, None))

    def on_layer(report):
        workdir.record("layer", stage=stage, **dataclasses.asdict(report))
        workdir.check_stop()

    return efrap_lib.efrap(
        scene.model,
        variables,
        images,
        weight_bits=defense.weight_bits,
        act_bits=defense.act_bits,
        method=method,
        flip_weight=flip_weight,
        spec=weight_spec(defense.weight_bits, defense.grid),
        first_last_bits=defense.grid.first_last_bits,
        fold_batch_norm=defense.fold_batch_norm,
        apply_kwargs=_EVAL,
        key=key,
        max_sweeps=defense.max_sweeps,
        adam=adam_rounding.AdamSettings(**dataclasses.asdict(defense.adam)),
        on_layer=on_layer,
    )


def _calibration_images(scene, wanted: int, key: jax.Array) -> jax.Array:
    """Clean training images without labels or augmentation."""
    available = len(scene.train.labels)
    fraction = min(wanted, available) / available
    chosen = batches.split_indices(key, available, fraction)
    return batches.to_float(jnp.asarray(scene.train.images[np.asarray(chosen)]))


def _mean_counts(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates averaged over draws; the denominators are the same in all of them."""
    mean = dict(outcomes[0])
    for rate in ("acc", "asr", "ra"):
        if mean[rate] is not None:
            mean[rate] = float(np.mean([outcome[rate] for outcome in outcomes]))
    return mean


def _layer_entries(result, seed, row, model_name, defense) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "model": model_name,
            "row": row,
            "layer": report.name,
            "shape": list(report.kernel_shape),
            "weight_bits": report.bits,
            "act_bits": defense.act_bits,
            "flip_rate": report.flip_rate,
            "objective_nearest": report.objective_nearest,
            "objective": report.objective,
            "seconds": report.seconds,
        }
        for report in result.layers.values()
    ]


def _claims(rows: list[schema.Row]) -> list[dict[str, Any]]:
    """The run's promises against its rows, worst seed first."""

    def rates(model, name, rate):
        found = [r for r in rows if r.model == model and r.name == name]
        return [getattr(row, rate) for row in found]

    def claim(text, passed):
        return {"text": text, "passed": bool(passed)}

    claims = []
    if asleep := rates("backdoored", "float", "asr"):
        claims.append(
            claim(
                f"The backdoor sleeps in float: ASR at most {_DORMANT_ASR:.0%} "
                f"(worst {max(asleep):.2%})",
                max(asleep) <= _DORMANT_ASR,
            )
        )
    if awake := rates("backdoored", "nearest", "asr"):
        claims.append(
            claim(
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
        claims.append(claim(f"{text} (worst {cost:.2%})", cost <= _ACCURACY_COST))
    if defended := rates("backdoored", "efrap", "asr"):
        claims.append(
            claim(
                f"EFRAP keeps it asleep: ASR at most {_DEFENDED_ASR:.0%} "
                f"(worst {max(defended):.2%})",
                max(defended) <= _DEFENDED_ASR,
            )
        )
    return claims


def _draw(scene: _Scene, nets: list[tuple[str, str, Any]]) -> html.Figures:
    """Pictures of the first seed: trigger, samples, attention of each net."""
    wanted = np.asarray(scene.goal.target_labels(jnp.asarray(scene.test.labels)))
    chosen = np.flatnonzero(wanted != scene.test.labels)[:8]
    clean = scene.test.images[chosen]
    floats = batches.to_float(jnp.asarray(clean))
    stamped = triggers.apply_trigger(floats, scene.goal.trigger)
    triggered = _to_uint8(stamped)
    blank = jnp.full((1, *clean.shape[1:]), 0.5)
    apply = jax.jit(functools.partial(scene.model.apply, train=False))
    attention_maps = []
    for _, name, variables in nets:
        _, features = apply(variables, stamped[:1])
        maps = {}
        for stage, values in features.items():
            if values.shape[1] * values.shape[2] > 1:
                one = np.asarray(attention.attention_map(values))[0]
                maps[stage] = one / max(float(one.max()), 1e-12)
        attention_maps.append((name, triggered[0], maps))
    return html.Figures(
        trigger=_to_uint8(triggers.apply_trigger(blank, scene.goal.trigger))[0],
        clean_samples=clean,
        triggered_samples=triggered,
        attention=tuple(attention_maps),
    )


def _to_uint8(images: jax.Array) -> np.ndarray:
    return np.asarray(jnp.round(images * 255.0)).astype(np.uint8)


def git_commit() -> str | None:
    """Commit of the code that is running, with "-dirty"; None outside a checkout."""
    folder = pathlib.Path(__file__).parent

    def git(*arguments):
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        tracked = git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
        dirty = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("-dirty" if tracked and dirty else "")
    except (OSError, subprocess.SubprocessError):
        return None
