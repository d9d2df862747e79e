# SPDX-License-Identifier: Apache-2.0
"""What both programs do alike: data in, stages of training, rows, pictures, report.

Nothing here knows which attack or which defence is running.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, settings, whole_file
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import triggers
from nad_jax.core import attention
from nad_jax.data import batches, sources, stored
from nad_jax.report import html, pictures, schema, tables
from nad_jax.settings import checks
from nad_jax.training import (
    agreement,
    augmentation,
    environment,
    loop,
    optimizers,
    records,
    sharding,
    steps,
)
from nad_jax.training import state as state_lib

# ------------------------------------------------------------------------------- data

# Split -> what it is called among the inputs of a workdir; images that stay in their
# files have another hash than the same ones in memory, so it is another input.
_SETS = {"train": "training set", "test": "test set"}
_IN_FILES = " in files"
# Of `at_most`: far above the rounding of float64, far below one image of a billion.
_ROUNDING = 1e-9


def load_data(
    data: settings.DataSettings, workdir: workdir_lib.Workdir | None = None
) -> tuple[sources.Dataset, sources.Dataset]:
    """Training and test images of a config.

    Every process reads them for itself, and all must have read the same; of images that
    stay in their files, files of the same names, sizes and labels must be there.

    Args:
      data: Section of the config.
      workdir: Of the run, which goes on with the same images only; None = no run.

    Raises:
      InputError: they cannot be read, or are not those of earlier runs in `workdir`.
    """

    def load() -> tuple[list[sources.Dataset], dict[str, str]]:
        loaded, digests = [], {}
        for split, name in _SETS.items():
            dataset = sources.load(
                data.name,
                split=split,
                data_dir=data.data_dir,
                image_size=data.image_size,
                in_memory=split == "test" or data.loader == "device",
            )
            loaded.append(dataset)
            if isinstance(dataset.images, stored.Images):
                name += _IN_FILES
            digests[name] = _data_digest(dataset)
        return loaded, digests

    (train, test), digests = agreement.read_in_all(load)
    if workdir is not None:
        for name, digest in digests.items():
            workdir.check_input(name, digest)
    return train, test


def _data_digest(dataset: sources.Dataset) -> str:
    """The same for the same images and labels, wherever they lie."""
    images = dataset.images
    digest = hashlib.sha256(f"{images.shape} {dataset.num_classes}".encode())
    if isinstance(images, stored.Images):
        digest.update(images.reader.identity.encode())
    else:
        digest.update(np.ascontiguousarray(images).reshape(-1).data)
    digest.update(np.ascontiguousarray(dataset.labels).data)
    return digest.hexdigest()


def check_target(
    target_label: int,
    train: sources.Dataset,
    test: sources.Dataset,
    *,
    where: str = "config.attack",
) -> None:
    """Raises InputError unless an attack on that class can be made and measured.

    Args:
      target_label: At least 0.
      train: What is attacked.
      test: What success is measured on.
      where: Section of the config that holds `target_label`, for the message.
    """
    if train.num_classes < 2:
        raise errors.InputError(
            f"{train.name} has {train.num_classes} class; an attack needs at least 2"
        )
    if not target_label < train.num_classes:
        raise errors.InputError(
            f"{where}.target_label must be below {train.num_classes}, the "
            f"number of classes of {train.name}, got {target_label}"
        )
    if np.all(test.labels == target_label):
        raise errors.InputError(
            f"every test image of {test.name} is of the class {target_label}, "
            f"{where}.target_label; an attack is measured on those of other classes"
        )


def check_augmentation(
    config: Any, image_shape: tuple[int, ...], where: str = "config"
) -> None:
    """Raises InputError for a crop or a hole that may leave nothing of an image.

    Args:
      config: Settings; every `TrainingSettings` in it is looked at.
      image_shape: `(H, W, C)`.
      where: Dotted name of `config`, for messages.
    """
    side = min(image_shape[:2])
    for field in dataclasses.fields(config):
        value, name = getattr(config, field.name), f"{where}.{field.name}"
        is_pixels = field.name in ("crop_padding", "cutout")
        if is_pixels and isinstance(config, settings.TrainingSettings):
            if value >= side:
                raise errors.InputError(
                    f"{name} must be below {side}, the shorter side of the images, "
                    f"got {value}"
                )
        elif dataclasses.is_dataclass(value):
            check_augmentation(value, image_shape, name)


def build_trigger(
    choice: settings.TriggerSettings,
    image_shape: tuple[int, ...],
    *,
    where: str = "config.attack",
    other_names: Sequence[str] = (),
) -> triggers.Trigger:
    """The trigger a config names, with its options.

    A trigger that is drawn at random takes the option `seed`, by default 0.

    Args:
      choice: Section of the config.
      image_shape: `(H, W, C)`.
      where: Section of the config that holds `trigger`, for messages.
      other_names: What the caller accepts beside the names of triggers, for messages.

    Raises:
      InputError: an unknown name, an option that trigger does not have, or a value of
        it out of range.
    """
    if choice.name not in triggers.TRIGGERS:
        raise errors.InputError(
            f"{where}.trigger.name must be of "
            f"{', '.join([*other_names, *sorted(triggers.TRIGGERS)])}, "
            f"got {choice.name!r}"
        )
    make = triggers.TRIGGERS[choice.name]
    options = dict(choice.options)
    if "key" in inspect.signature(make).parameters:
        seed = options.pop("seed", 0)
        if not checks.is_seed(seed):
            raise errors.InputError(
                f"{where}.trigger.seed must be {checks.SEEDS}, got {seed!r}"
            )
        options["key"] = jax.random.key(seed)
    try:
        return make(image_shape, **options)
    except TypeError as error:
        raise errors.InputError(f"{where}.trigger: {error}") from None


# --------------------------------------------------------------------------- training


def train(
    training: settings.TrainingSettings,
    dataset: sources.Dataset,
    workdir: workdir_lib.Workdir,
    stage: str,
    variables: Any,
    key: jax.Array,
    loss_fn: steps.LossFn,
    project: Callable[[Any], Any] | None = None,
    make_batch: loop.MakeBatch | None = None,
    workers: int = 0,
) -> Any:
    """Variables after one training on all of `dataset`, in the open stage of `workdir`.

    `make_batch` stands in for the augmentation that `training` asks for; `workers` read
    images that stay in their files. A killed training goes on from its last commit when
    the command is repeated.
    """
    tx = optimizers.build(training, num_examples=len(dataset))
    progress = workdir.progress(stage, training.epochs)
    memory = loop.Memory()

    def on_epoch(state, metrics):
        memory.notes["loss"] = metrics["loss"]
        workdir.record("epoch", stage=stage, epoch=int(state.epoch), **metrics)
        progress.advance(f"loss {metrics['loss']:.4f}")

    try:
        state = loop.fit(
            state_lib.create(variables, tx, key),
            dataset.images,
            dataset.labels,
            step_fn=steps.make_train_step(loss_fn, tx, project=project),
            epochs=training.epochs,
            batch_size=training.batch_size,
            make_batch=make_batch or augmentation.make_batch(training),
            steps_per_dispatch=training.steps_per_dispatch,
            on_epoch=on_epoch,
            should_stop=workdir.should_stop,
            commits=workdir.commits(stage),
            memory=memory,
            mesh=sharding.mesh_for_batch(min(training.batch_size, len(dataset))),
            workers=workers,
        )
    except loop.TrainingInterrupted as interruption:
        raise workdir_lib.Interrupted(f"{stage}: {interruption}") from None
    progress.done(f"{training.epochs} epochs, loss {memory.notes['loss']:.4f}")
    return sharding.unreplicate(state_lib.variables(state))


class EarlierRun:
    """Stages of an earlier run, read only; stands in for its `Workdir`.

    What is taken from it is pinned to the workdir of the run at work.
    """

    def __init__(self, config: Any, workdir: workdir_lib.Workdir):
        """`config.victim_workdir` names it; its models must be those of `config`.

        Raises:
          InputError: it is no run, or its models were made otherwise, of other data or
            not for all seeds; the data are compared if `load_data` has told both
            workdirs of theirs.
        """
        self._path = pathlib.Path(config.victim_workdir)
        self._workdir = workdir
        agreement.from_first(lambda: self._check(config))

    def _check(self, config: Any) -> None:
        path = self._path / "config.json"
        try:
            earlier = settings.parse(json.loads(path.read_text("utf-8")))
        except (OSError, ValueError) as error:
            raise errors.InputError(
                f"config.victim_workdir {self._path} is not the folder of a run "
                f"({type(error).__name__}: {error})"
            ) from None
        if earlier.job != config.job:
            raise errors.InputError(
                f"config.victim_workdir {self._path} must be of a run of the job "
                f"{config.job}, got {earlier.job}"
            )
        for section in ("data", "model", "victim", "attack"):
            was, now = (_of_models(getattr(run, section)) for run in (earlier, config))
            if was != now:
                section_name = f"config.{section}"
                differences = workdir_lib.config_differences(was, now, section_name)
                raise errors.InputError(
                    f"config.victim_workdir {self._path} has other models "
                    f"({'; '.join(differences)})"
                )
        if not set(config.seeds) <= set(earlier.seeds):
            raise errors.InputError(
                f"config.seeds must be of {', '.join(map(str, earlier.seeds))}, those "
                f"of config.victim_workdir {self._path}, got {config.seeds}"
            )
        self._check_data()

    def _check_data(self) -> None:
        """Raises InputError if both runs know what they have read, and it differs."""
        was = workdir_lib.read_inputs(self._path)
        now = workdir_lib.read_inputs(self._workdir.path)
        for name in (n + suffix for n in _SETS.values() for suffix in ("", _IN_FILES)):
            if name in was and now.get(name, was[name]) != was[name]:
                change = workdir_lib.hash_change(was[name], now[name])
                raise errors.InputError(
                    f"config.victim_workdir {self._path} had another {name} ({change})"
                )

    def stage(self, name: str, like: Any, compute: Callable[[], Any]) -> Any:
        del compute
        from nad_jax.training import checkpoints

        folder = self._path / "checkpoints" / name

        def restore():
            if not checkpoints.steps(folder):
                raise errors.InputError(
                    f"config.victim_workdir {self._path} has no checkpoint {name!r}"
                )
            return checkpoints.restore(folder, like)

        with self._workdir.timed(name):
            result, metadata = agreement.tree_from_first(restore, like)
        self._workdir.check_input(f"{name} of victim_workdir", _tree_digest(result))
        self._workdir.note_origins(str(folder), metadata.get("made_by", [None]))
        return result


def _of_models(section: Any) -> dict[str, Any]:
    """What of a section decides how models come out."""
    mapping = dataclasses.asdict(section)
    # Data may have moved, and be read otherwise, with the same result.
    for key in ("data_dir", "loader", "workers"):
        mapping.pop(key, None)
    if isinstance(section, settings.AttackSettings):
        # The grid's own choice is the same in so many words.
        mapping["fold_batch_norm"] = section.folds_batch_norm
    return mapping


def _tree_digest(tree: Any) -> str:
    """The same for the same arrays under the same names."""
    digest = hashlib.sha256()
    for name, leaf in records.name_leaves(tree).items():
        digest.update(f"{name} {leaf.dtype} {leaf.shape} ".encode())
        digest.update(records.to_bytes(leaf))
    return digest.hexdigest()


# ----------------------------------------------------------------------------- report


def add_row(
    rows: list[schema.Row], row: schema.Row, workdir: workdir_lib.Workdir
) -> None:
    """Keeps a row, and shows it."""
    rows.append(row)
    workdir.record("row", **row.to_dict())
    shown = " ".join(
        f"{label} {rate:6.2%}"
        for label, rate in (("ACC", row.acc), ("ASR", row.asr), ("RA", row.ra))
        if rate is not None
    )
    workdir.say(f"{row.model:>10} {row.name:<17} {shown}")


def draw(
    apply: Callable[..., Any],
    trigger: triggers.Trigger,
    test: sources.Dataset,
    target_labels: np.ndarray,
    nets: Sequence[tuple[str, Any]],
) -> html.Figures:
    """Pictures: the trigger, samples, and where each net looks without and with it.

    Args:
      apply: `model.apply`.
      trigger: The attacker's.
      test: Where samples are taken from.
      target_labels: What the attacker wants of each test image, int `[N]`.
      nets: Name and variables of each net.
    """
    chosen = np.flatnonzero(target_labels != test.labels)[:8]
    clean = test.images[chosen]
    stamped = triggers.apply_trigger(batches.to_float(jnp.asarray(clean)), trigger)
    triggered = _to_uint8(stamped)
    blank = jnp.full((1, *clean.shape[1:]), 0.5)
    if trigger.field is not None:
        blank = _checkers(blank)  # a bend shows on lines only
    forward = jax.jit(functools.partial(apply, train=False))
    pair = jnp.concatenate([batches.to_float(jnp.asarray(clean[:1])), stamped[:1]])
    attention_maps = []
    for name, variables in nets:
        _, features = forward(variables, pair)
        maps = {
            stage: np.asarray(attention.attention_map(values))
            for stage, values in features.items()
            if values.shape[1] * values.shape[2] > 1
        }
        for i, image in enumerate((clean[0], triggered[0])):
            shown = {s: m[i] / max(float(m[i].max()), 1e-12) for s, m in maps.items()}
            name_shown = tables.row_label(name)
            attention_maps.append((name_shown, pictures.visible(image), shown))
    return html.Figures(
        trigger=pictures.visible(_to_uint8(triggers.apply_trigger(blank, trigger)))[0],
        clean_samples=pictures.visible(clean),
        triggered_samples=pictures.visible(triggered),
        attention=tuple(attention_maps),
    )


def _checkers(plain: jax.Array) -> jax.Array:
    """Squares of 4 pixels, a little darker and brighter than `plain`."""
    row, column = np.indices(plain.shape[1:3]) // 4
    return plain + jnp.asarray(0.25 * (-1.0) ** (row + column))[None, :, :, None]


def _to_uint8(images: jax.Array) -> np.ndarray:
    return np.asarray(jnp.round(images * 255.0)).astype(np.uint8)


def write_report(
    config: Any,
    workdir: workdir_lib.Workdir,
    *,
    rows: Sequence[schema.Row],
    claims: Sequence[Mapping[str, Any]],
    canary: Mapping[str, Any],
    figures: html.Figures | None,
    layers: Sequence[Mapping[str, Any]] = (),
    notes: Sequence[str] = (),
    curves: Sequence[Mapping[str, Any]] = (),
    command: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes report.html and report.json, says the headline, returns the report.

    Args:
      config: Settings dataclass of the run, with `title`.
      workdir: Where to.
      rows: At least one.
      claims: What the run was to show.
      canary: Outcome of `environment.check_canary`.
      figures: Pictures, if any.
      layers: Measurements by layer.
      notes: Sentences for the foot of the page, before those about the machine.
      curves: Rates by epoch.
      command: The command line.
      facts: What the run is found by: keys of the report beside those it always has.
    """
    surroundings = environment.describe()
    origins = workdir.origins()
    if len(origins) > 1:
        facts = {**(facts or {}), "made_by": origins}
        notes = [*notes, f"Computed by {len(origins)} setups: made_by in report.json."]
    report = schema.build_report(
        title=config.title,
        command=command,
        config=dataclasses.asdict(config),
        rows=rows,
        git_commit=git_commit(),
        versions=_versions(surroundings),
        devices=surroundings["devices"],
        facts=facts,
        seconds=workdir.seconds,
        layers=layers,
        claims=claims,
        curves=curves,
        notes=[
            *notes,
            f"Python {surroundings['python']} on {surroundings['machine']}, "
            f"{surroundings['cpu_count']} CPU cores, "
            f"XLA_FLAGS={surroundings['xla_flags']!r}.",
            f"Canary for wrong numbers under jit: passed={canary['passed']}.",
        ],
    )

    def write():
        page = html.render(report, figures)
        whole_file.write_text(workdir.path / "report.html", page)
        # Last, so that a report.json on disk means that the run was finished.
        whole_file.write_json(workdir.path / "report.json", report)

    agreement.from_first(write)
    workdir.say(tables.headline(rows))
    workdir.say(f"report: {workdir.path / 'report.html'}")
    return report


def origin() -> dict[str, Any]:
    """What the numbers of this process depend on, for its `Workdir`."""
    surroundings = environment.describe()
    return {
        "git_commit": git_commit(),
        "versions": _versions(surroundings),
        "devices": len(surroundings["devices"]),
    }


def _versions(surroundings: Mapping[str, Any]) -> dict[str, str]:
    return {k: v for k, v in surroundings["versions"].items() if v is not None}


def at_most(value: float, limit: float) -> bool:
    """Whether a share keeps a limit, also when it is the limit.

    Differences of shares are off by their rounding: 0.856 - 0.846 > 0.01. A share of
    images is a multiple of one over their number, so that no other verdict changes.
    """
    return bool(value <= limit + _ROUNDING)


def claim(text: str, passed: bool) -> dict[str, Any]:
    """An entry of a report's claims."""
    return {"text": text, "passed": bool(passed)}


def write_findings(
    name: str,
    content: Mapping[str, Any],
    *,
    config: Any,
    workdir: workdir_lib.Workdir,
    command: str | None,
) -> dict[str, Any]:
    """Writes what a job without rows has found as `name`.json; returns all of it."""
    report = {
        "command": command,
        "config": dataclasses.asdict(config),
        **content,
        "versions": environment.describe()["versions"],
        "seconds": workdir.seconds,
    }
    report = schema.plain(report, name)
    whole_file.write_json(workdir.path / f"{name}.json", report)
    return report


@functools.cache
def git_commit() -> str | None:
    """Commit of the code that is running, with "-dirty"; None if unknown.

    Outside a checkout it is what the variable NAD_JAX_COMMIT says, which belongs to who
    has brought the code there. Files of results are no code. Asked for when a run
    starts, since the checkout may move on before it ends.
    """
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
        code = (":/", ":(top,exclude)results")
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", *code)
        return git("rev-parse", "HEAD") + ("-dirty" if tracked and dirty else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("NAD_JAX_COMMIT") or None
