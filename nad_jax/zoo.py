# SPDX-License-Identifier: Apache-2.0
"""Victims as files, with what was measured of them: a zoo to try defences on.

    python -m nad_jax.zoo list
    python -m nad_jax.zoo verify [NAME ...] [--measure] [--data_dir=DIR]
    python -m nad_jax.zoo add WORKDIR --name=digits-blend [--seed=0] [--zoo=DIR]
    python -m nad_jax.main --config=configs/nad.py:zoo/digits-blend
    python -m nad_jax.main --config=configs/efrap.py:zoo/digits-pq

A victim is two files: `NAME.safetensors`, its weights and its trigger as arrays, and
`NAME.json`, the manifest: recipe, seed, hash, ACC and ASR. One of `configs/efrap.py`,
whose backdoor sleeps in float, has a third, `NAME.clean.safetensors`, the clean model
it is compared with, and tells its rates where it wakes. The weights are written as an
artefact without codes (`nad_jax.interop.artifact`) and never unpickled.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import (
    acceptance,
    errors,
    models,
    pipeline,
    roundings,
    settings,
    victims,
    whole_file,
)
from nad_jax import main as program
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import conditioning, poisoning, triggers
from nad_jax.data import sources
from nad_jax.defenses import base
from nad_jax.interop import artifact, bounded_file, name_maps, reader
from nad_jax.models import common
from nad_jax.report import schema
from nad_jax.training import agreement, evaluation

FORMAT = "nad_jax.zoo/1"
# Another machine may round a few images to another class.
MEASURE_TOLERANCE = 0.005
# Of the published channels. Sizes that a stranger chose are multiplied before anything
# compares them with the arrays: far above any model here, far below an overflow.
_MAX_WIDENING = 1024

_PACKAGE = pathlib.Path(__file__).parent
# In a checkout zoo/ stands beside the package, in an installation inside it.
_FOLDERS = (_PACKAGE / "zoo_data", _PACKAGE.parent / "zoo")
_RECIPE = ("data", "model", "victim", "attack")
# Job of a config -> how the attack of its victims is described.
_ATTACKS = {"nad": settings.PoisoningSettings, "efrap": settings.AttackSettings}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclasses.dataclass(frozen=True)
class Victim:
    """A victim of the zoo.

    Attributes:
      net: Model and variables.
      trigger: What wakes it.
      manifest: What is known of it.
      clean: Variables of the clean model; None of a victim of `configs/nad.py`.
    """

    net: base.Net
    trigger: triggers.Trigger
    manifest: Mapping[str, Any]
    clean: Any = None

    def claim(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """A report's line on whether measured ACC and ASR are the promised ones."""
        promised = self.manifest
        return pipeline.claim(
            f"The victim is what its manifest says: ACC {promised['acc']:.2%}, "
            f"ASR {promised['asr']:.2%} (here {measured['acc']:.2%}, "
            f"{measured['asr']:.2%})",
            is_as_promised(promised, measured),
        )


def folder() -> pathlib.Path:
    """Where the zoo is.

    Raises:
      InputError: nowhere.
    """
    for path in _FOLDERS:
        if path.is_dir():
            return path
    raise errors.InputError(
        "the zoo is not here: it is the folder zoo/ of the source repository, and "
        "wheels built from it hold it; use a checkout or such a wheel"
    )


def names(zoo: pathlib.Path, job: str | None = None) -> list[str]:
    """Names of the victims in a folder.

    Args:
      zoo: The folder.
      job: Of "nad" or "efrap" alone; None = of all.

    Raises:
      InputError: with `job`, a damaged manifest.
    """
    found = sorted(path.stem for path in zoo.glob("*.json"))
    if job is None:
        return found
    return [name for name in found if _job(read_manifest(name, zoo)) == job]


def read_manifest(name: str, zoo: pathlib.Path) -> dict[str, Any]:
    """The manifest of a victim.

    Raises:
      InputError: there is none of that name, or it cannot be read.
    """
    if not _NAME.fullmatch(name) or not (zoo / f"{name}.json").is_file():
        known = ", ".join(names(zoo)) or "nobody"
        raise errors.InputError(f"no victim {name!r} in the zoo; there are {known}")
    try:
        manifest = json.loads((zoo / f"{name}.json").read_text("utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"format is {manifest['format']!r}, not {FORMAT!r}")
        sleeps = _job(manifest) == "efrap"
        asleep = ("clean_sha256", "on_own_grid") if sleeps else ()
        for key in ("sha256", "num_classes", *asleep):
            manifest[key]
        entries = [manifest, *manifest.get("on_own_grid", ())]
        good = [0 <= entry[rate] <= 1 for entry in entries for rate in ("acc", "asr")]
        integers = [manifest["seed"], *(entry["weight_bits"] for entry in entries[1:])]
        if not all(good) or not all(type(number) is int for number in integers):
            raise ValueError(
                "acc and asr must be in [0, 1], seed and weight_bits integers"
            )
        attack = _parse(manifest)["attack"]
        widths = [entry["weight_bits"] for entry in entries[1:]]
        if sleeps and widths != list(attack.weight_bits):
            raise ValueError(
                f"on_own_grid must be of {list(attack.weight_bits)} bits, got {widths}"
            )
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as problem:
        reason = bounded_file.shown(f"{type(problem).__name__} {problem}", 300)
        raise errors.InputError(f"manifest of {name!r} is damaged: {reason}") from None
    return manifest


def load(name: str, zoo: pathlib.Path) -> Victim:
    """The victim, once its file is known to be the one the manifest speaks of.

    Raises:
      InputError: an unknown name, a damaged manifest, or another hash.
    """
    manifest = read_manifest(name, zoo)
    net, trigger = _read(_weights(zoo, name), manifest, manifest["sha256"])
    if _job(manifest) == "nad":
        return Victim(net, trigger, manifest)
    clean, _ = _read(_weights(zoo, name, "clean"), manifest, manifest["clean_sha256"])
    return Victim(net, trigger, manifest, clean.variables)


def take(name: str | None, workdir: workdir_lib.Workdir) -> Victim | None:
    """The victim for all processes of a run, its bytes pinned to the workdir.

    Args:
      name: Of the victim; None gives None.
      workdir: Of the run.
    """
    if name is None:
        return None
    chosen = name

    def read() -> tuple[Victim, list[str]]:
        victim = load(chosen, folder())
        hashes = [victim.manifest["sha256"]]
        if victim.clean is not None:
            hashes.append(victim.manifest["clean_sha256"])
        return victim, hashes

    victim, hashes = agreement.read_in_all(read)
    for what, sha256 in zip(("victim", "clean model"), hashes, strict=False):
        workdir.check_input(f"{what} of the zoo", sha256)
    return victim


def read_net(path: str) -> tuple[base.Net, str]:
    """A model from a file, and the file's hash: one of the zoo, or of PyTorch.

    Raises:
      InputError: the file cannot be read, or is of no known architecture.
    """
    checkpoint = reader.read_checkpoint(path)
    if "card" in checkpoint.metadata:
        net, _ = _contents(artifact.from_checkpoint(checkpoint, path), path)
    else:
        converted = name_maps.convert(checkpoint.arrays, source=path)
        net = base.Net(converted.model, converted.variables)
    return net, checkpoint.sha256


def resolve(config: Any) -> Any:
    """The config of a run on a victim of the zoo, with the victim's own recipe.

    Where its data lie, and how they are read, is the config's affair.

    Args:
      config: `NadExperimentSettings` or `ExperimentSettings`.

    Returns:
      The same kind.

    Raises:
      InputError: there is no such victim, or it is another job's; or a setting other
        than the title would be dropped that is neither the recipe's nor a shipped
        config's.
    """
    if config.zoo is None:
        return config
    manifest = read_manifest(config.zoo, folder())
    if _job(manifest) != config.job:
        raise errors.InputError(
            f"the victim {config.zoo} of the zoo is one of configs/{_job(manifest)}.py,"
            f" got configs/{config.job}.py"
        )
    recipe = _parse(manifest)
    defense = config.defense
    if config.job == "nad":
        # There is no clean model beside it.
        defense = dataclasses.replace(defense, clean_model_rows=())
    treatment = {"nad": "and its repair", "efrap": "rounded"}[config.job]
    resolved = dataclasses.replace(
        config,
        title=f"{config.zoo} from the zoo, {treatment}",
        data=dataclasses.replace(
            recipe["data"],
            data_dir=config.data.data_dir,
            loader=config.data.loader,
            workers=config.data.workers,
        ),
        model=recipe["model"],
        victim=recipe["victim"],
        attack=recipe["attack"],
        defense=defense,
        victim_workdir=None,
    )
    shipped = [
        settings.parse(program.shipped_config(f"{config.job}.py", variant).to_dict())
        for variant in (f"zoo/{config.zoo}", f"zoo/{config.zoo}+controls")
    ]
    named_alike = dataclasses.replace(config, title=resolved.title)
    given, *kept = map(dataclasses.asdict, (named_alike, *shipped, resolved))
    if dropped := _values_beside(given, kept):
        raise errors.InputError(
            f"the victim {config.zoo} of the zoo brings its own data, model and "
            f"training; it cannot take {', '.join(dropped)}"
        )
    return resolved


def _values_beside(
    given: Any, others: Sequence[Any], where: str = "config"
) -> list[str]:
    """Every key of a nested mapping whose value is in none of the others."""
    if not isinstance(given, dict):
        return [] if given in others else [f"{where}={given!r}"]
    return [
        line
        for key, value in given.items()
        for line in _values_beside(
            value,
            [other.get(key) if isinstance(other, dict) else None for other in others],
            f"{where}.{key}",
        )
    ]


def add(
    workdir: pathlib.Path, name: str, *, seed: int, zoo: pathlib.Path
) -> dict[str, Any]:
    """Puts the victim of a finished run into a zoo; returns its manifest.

    Raises:
      InputError: a name that is no file name, or a workdir that is not that of a
        finished run of `configs/nad.py` or `configs/efrap.py` with that seed.
    """
    # NAME.clean.safetensors is the clean model of NAME.
    if not _NAME.fullmatch(name) or name.endswith(".clean"):
        raise errors.InputError(
            f"a name is letters, digits, '_', '.' and '-', not ending in .clean, got "
            f"{name!r}"
        )
    report = schema.read_report(workdir / "report.json")
    job = report["config"].get("job")
    rows = [
        row
        for row in report["rows"]
        if (row["model"], row["name"], row["seed"]) == ("backdoored", "float", seed)
    ]
    if not rows or job not in _ATTACKS:
        known = " or ".join(f"configs/{name}.py" for name in _ATTACKS)
        raise errors.InputError(
            f"{workdir} holds no victim of {known} with seed {seed}"
        )
    config = settings.parse(report["config"])
    if config.zoo is not None:
        raise errors.InputError(f"the victim of {workdir} is {config.zoo} of the zoo")
    # Where the run had its models from, if it has not trained them.
    config = dataclasses.replace(
        config, seeds=(seed,), victim_workdir=config.victim_workdir or str(workdir)
    )
    train, _ = pipeline.load_data(config.data)
    model = models.build(
        config.model.name, num_classes=train.num_classes, width=config.model.width
    )
    obtain = {"nad": _poisoned, "efrap": _conditioned}[config.job]
    with (
        tempfile.TemporaryDirectory() as path,
        contextlib.closing(workdir_lib.Workdir(path, {})) as scratch,
    ):
        subjects = obtain(config, train, model, scratch, seed)
    recipe = {key: report["config"][key] for key in _RECIPE}
    recipe["data"] = {**recipe["data"], "data_dir": None}
    card = {
        "format": FORMAT,
        "job": job,
        "name": name,
        "seed": seed,
        "num_classes": train.num_classes,
        "recipe": recipe,
        "git_commit": report["git_commit"],
        "versions": report["versions"],
        # Where several setups had a part, the first has not trained the victim.
        **({"made_by": report["made_by"]} if "made_by" in report else {}),
        **{k: rows[0][k] for k in ("acc", "asr", "acc_count", "asr_count")},
        **_where_it_wakes(report, seed),
    }
    shown = {k: v for k, v in subjects.trigger._asdict().items() if v is not None}
    zoo.mkdir(parents=True, exist_ok=True)
    manifest = dict(card)
    for kind, variables in subjects.models.items():
        path = _weights(zoo, name, kind)
        tree = {**variables, "trigger": shown}
        artifact.write_artifact(
            path, artifact.Artifact(tree, {}, {}, {}, {}, None, {"zoo": card})
        )
        prefix = "" if kind == "backdoored" else f"{kind}_"
        manifest[f"{prefix}sha256"] = bounded_file.sha256(path)
        manifest[f"{prefix}bytes"] = path.stat().st_size
    whole_file.write_json(zoo / f"{name}.json", manifest)
    return manifest


def _poisoned(config, train, model, scratch, seed) -> victims.Victims:
    """The victim of a finished run of `configs/nad.py`."""
    defense = dataclasses.replace(config.defense, clean_model_rows=())
    return victims.obtain(
        dataclasses.replace(config, defense=defense),
        train,
        model,
        scratch,
        seed=seed,
        victim_key=jax.random.key(seed),
        poison_key=jax.random.key(seed),
    )


def _conditioned(config, train, model, scratch, seed) -> victims.Victims:
    """The victim of a finished run of `configs/efrap.py`, and its clean model."""
    image_shape = train.images.shape[1:]
    like = common.init(model, jax.random.key(0), image_shape)
    earlier = pipeline.EarlierRun(config, scratch)
    kept = {
        kind: earlier.stage(f"seed{seed}-{kind}", like, lambda: None)
        for kind in ("backdoored", "clean")
    }
    trigger = pipeline.build_trigger(config.attack.trigger, image_shape)
    return victims.Victims(kept, trigger)


def _where_it_wakes(report: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What a report of `configs/efrap.py` says of nearest rounding on the own grid."""
    if report["config"]["job"] != "efrap":
        return {}
    told_of = {facts["seed"]: facts for facts in report.get("acceptance", ())}
    if seed not in told_of:
        raise errors.InputError(f"the report has no acceptance of seed {seed}")
    facts = told_of[seed]
    rates = acceptance.on_own_grid(facts)
    told = [
        {key: entry[key] for key in ("weight_bits", "acc", "asr")} for entry in rates
    ]
    return {"on_own_grid": told, "accepted": facts["accepted"]}


def measure(victim: Victim, data_dir: str | None = None) -> dict[str, Any]:
    """ACC and ASR of a victim over the test images of its data set.

    Returns:
      The rates; of a victim of `configs/efrap.py` with those of nearest rounding under
      "on_own_grid", as the manifest has them.
    """
    recipe = _parse(victim.manifest)
    data = recipe["data"]
    test = sources.load(
        data.name, split="test", data_dir=data_dir, image_size=data.image_size
    )
    attack = recipe["attack"]
    targets = poisoning.target_labels(
        test.labels,
        mode=attack.label_mode,
        target_label=attack.target_label,
        num_classes=test.num_classes,
    )
    rates: dict[str, Any] = evaluation.evaluate(
        victim.net.logits,
        victim.net.variables,
        test.images,
        test.labels,
        trigger=victim.trigger,
        target_labels=targets,
    )
    if victim.clean is None:
        return rates
    goal = conditioning.Goal(
        victim.trigger, attack.label_mode, attack.target_label, test.num_classes
    )
    apply_fn, variables = victim.net.model.apply, victim.net.variables
    layers = roundings.find_layers(victim.net.model, test.images.shape[1:])
    grids = roundings.attacked_grids(attack, layers)
    awake = (
        (grid.bits, acceptance.evaluate_on(grid, apply_fn, variables, test, goal))
        for grid in grids
    )
    own = [{"weight_bits": bits, **_rates(found)} for bits, found in awake]
    return {**rates, "on_own_grid": own}


def _rates(found: Mapping[str, Any]) -> dict[str, Any]:
    return {rate: found[rate] for rate in ("acc", "asr")}


def is_as_promised(manifest: Mapping[str, Any], measured: Mapping[str, Any]) -> bool:
    """Whether what was measured is what the manifest says, but for a few images.

    Args:
      manifest: Of a victim.
      measured: ACC and ASR, with or without those on the own grid.
    """
    pairs = [(manifest, measured)]
    if "on_own_grid" in measured:
        pairs += zip(manifest["on_own_grid"], measured["on_own_grid"], strict=True)
    return all(
        abs(promised[rate] - found[rate]) <= MEASURE_TOLERANCE
        for promised, found in pairs
        for rate in ("acc", "asr")
    )


def _job(manifest: Mapping[str, Any]) -> str:
    """Whose victim it is.

    Raises:
      ValueError: nobody's.
    """
    # Victims are older than the word.
    job = manifest.get("job", "nad")
    if job not in _ATTACKS:
        raise ValueError(f"job must be of {', '.join(_ATTACKS)}, got {job!r}")
    return job


def _weights(zoo: pathlib.Path, name: str, kind: str = "backdoored") -> pathlib.Path:
    """The file of a model."""
    return zoo / f"{name}{'' if kind == 'backdoored' else f'.{kind}'}.safetensors"


def _read(
    path: pathlib.Path, manifest: Mapping[str, Any], sha256: str
) -> tuple[base.Net, triggers.Trigger]:
    """Contents of a file that a manifest speaks of.

    Raises:
      InputError: it is missing, has another hash, is no file of the zoo, or was put
        into it with another recipe.
    """
    if not path.is_file():
        raise errors.InputError(f"{path} is missing; the zoo holds its manifest only")
    stored = artifact.read_artifact(path)
    if stored.sha256 != sha256:
        raise errors.InputError(
            f"{path} has the SHA-256 {str(stored.sha256)[:16]}..., its manifest says "
            f"{str(sha256)[:16]}...; it is damaged or was exchanged"
        )
    contents = _contents(stored, path)
    card = stored.card["zoo"]
    for key in ("recipe", "num_classes"):
        if card[key] != manifest[key]:
            raise errors.InputError(f"{path} has another {key} than its manifest")
    return contents


def _contents(
    stored: artifact.Artifact, path: str | pathlib.Path
) -> tuple[base.Net, triggers.Trigger]:
    """Net and trigger of a file of the zoo, which may come from a stranger.

    Raises:
      InputError: the card describes no model, or the arrays are not those of the model
        that it describes and of a trigger.
    """
    label = bounded_file.shown(str(path), 200)
    try:
        card = stored.card["zoo"]
        chosen = _parse(card)["model"]
        model = _described(chosen, card["num_classes"])
    except (KeyError, TypeError, ValueError, RecursionError) as problem:
        reason = str(problem)
        if not isinstance(problem, errors.InputError):
            reason = f"{type(problem).__name__} {reason}"
        reason = bounded_file.shown(reason, 300)
        raise errors.InputError(f"{label} is no file of the zoo: {reason}") from None
    tree = dict(stored.variables)
    try:
        trigger, image_shape = _trigger(tree.pop("trigger", None))
        expected = common.expected_shapes(model, image_shape)
    except errors.InputError as problem:
        raise errors.InputError(f"{label}: {problem}") from None
    if _kinds(tree) != _kinds(expected):
        raise errors.InputError(
            f"{label} does not hold the arrays of a {chosen.name} of width "
            f"{chosen.width:g} for {model.num_classes} classes, float32"
        )
    return base.Net(model, jax.tree.map(jnp.asarray, tree)), trigger


def _described(chosen: settings.ModelSettings, num_classes: object) -> Any:
    """The model that a card describes, of sizes that can be multiplied."""
    published = models.build(chosen.name, num_classes=1)
    if max(chosen.width, getattr(published, "widen_factor", 1)) > _MAX_WIDENING:
        raise errors.InputError(
            f"{chosen.name} of width {chosen.width:g} is wider than anything read, "
            f"factors up to {_MAX_WIDENING}"
        )
    if type(num_classes) is not int or not 1 <= num_classes <= sources.MAX_CLASSES:
        raise errors.InputError(
            f"num_classes must be 1 to {sources.MAX_CLASSES}, got {num_classes!r}"
        )
    return models.build(chosen.name, num_classes=num_classes, width=chosen.width)


def _trigger(parts: Any) -> tuple[triggers.Trigger, tuple[int, int, int]]:
    """A trigger from the arrays of a file, and the shape of images it is for."""
    known = triggers.Trigger._fields
    if not isinstance(parts, dict) or not {"pattern", "mask"} <= set(parts) <= set(
        known
    ):
        raise errors.InputError(
            f"a trigger must have the parts pattern and mask, may have "
            f"{' and '.join(known[2:])}, and has no others"
        )
    for name, part in parts.items():
        if isinstance(part, dict) or part.dtype != np.float32:
            raise errors.InputError(f"trigger {name} must be a float32 array")
    shape = parts["pattern"].shape
    if len(shape) not in (3, 4) or 0 in shape:
        raise errors.InputError(
            f"trigger pattern must be [H, W, C] or [R, H, W, C], got {list(shape)}"
        )
    height, width, channels = shape[-3:]
    image_shape = (height, width, channels)
    return triggers.check_trigger(triggers.Trigger(**parts), image_shape), image_shape


def _kinds(tree: Any) -> Any:
    """Shape and dtype of every array."""
    return jax.tree.map(lambda leaf: (leaf.shape, np.dtype(leaf.dtype)), tree)


def _parse(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the recipe of a manifest or of a file's card, as settings."""
    recipe = manifest["recipe"]
    hints = {
        "data": settings.DataSettings,
        "model": settings.ModelSettings,
        "victim": settings.TrainingSettings,
        "attack": _ATTACKS[_job(manifest)],
    }
    return {
        key: settings.from_mapping(cls, recipe[key], f"recipe.{key}")
        for key, cls in hints.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of one command line."""
    parser = argparse.ArgumentParser(prog="python -m nad_jax.zoo", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="one line for each victim")
    check = commands.add_parser("verify", help="hashes, and with --measure ACC and ASR")
    check.add_argument("names", nargs="*", metavar="NAME")
    check.add_argument("--measure", action="store_true")
    check.add_argument("--data_dir")
    put = commands.add_parser("add", help="the victim of a finished run")
    put.add_argument("workdir", type=pathlib.Path)
    put.add_argument("--name", required=True)
    put.add_argument("--seed", type=int, default=0)
    for command in (*commands.choices.values(),):
        command.add_argument("--zoo", type=pathlib.Path, help="another folder")
    arguments = parser.parse_args(argv)
    try:
        return _COMMANDS[arguments.command](arguments)
    except errors.InputError as error:
        print(f"nad_jax.zoo: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Python's own exit code would be 1: not as the manifest says.
        traceback.print_exc()
        return 2


def _list(arguments: Any) -> int:
    zoo = arguments.zoo or folder()
    for name in names(zoo):
        print(_line(name, read_manifest(name, zoo)))
    return 0


def _verify(arguments: Any) -> int:
    zoo = arguments.zoo or folder()
    passed = True
    for name in arguments.names or names(zoo):
        victim = load(name, zoo)
        if arguments.measure:
            rates = measure(victim, arguments.data_dir)
            good = is_as_promised(victim.manifest, rates)
            passed = passed and good
            print(
                f"{name}: hash good, {_shown(rates)}, "
                f"{'as' if good else 'NOT as'} in the manifest"
            )
        else:
            print(f"{name}: hash good")
    return 0 if passed else 1


def _add(arguments: Any) -> int:
    zoo = arguments.zoo or folder()
    manifest = add(arguments.workdir, arguments.name, seed=arguments.seed, zoo=zoo)
    print(_line(arguments.name, manifest))
    return 0


_COMMANDS = {"list": _list, "verify": _verify, "add": _add}


def _line(name: str, manifest: Mapping[str, Any]) -> str:
    recipe = _parse(manifest)
    attack = recipe["attack"]
    # What has no share of poisoned images wakes by rounding.
    share = getattr(attack, "poison_rate", None)
    return (
        f"{name:<24} {recipe['data'].name} {recipe['model'].name} "
        f"{attack.name} {attack.label_mode} "
        f"{'' if share is None else f'rate {share:g} '}"
        f"seed {manifest['seed']}  {_shown(manifest)}"
    )


def _shown(rates: Mapping[str, Any]) -> str:
    """ACC and ASR in words, with those on the own grid if there are any."""
    parts = [("", rates)]
    for entry in rates.get("on_own_grid", ()):
        parts.append((f"; rounded to {entry['weight_bits']} bits ", entry))
    return "".join(
        f"{where}ACC {found['acc']:.2%}, ASR {found['asr']:.2%}"
        for where, found in parts
    )


if __name__ == "__main__":
    sys.exit(main())
