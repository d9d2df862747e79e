# SPDX-License-Identifier: Apache-2.0
"""A checkpoint from outside: judged, repaired, rounded, exported, and judged again.

    file -> variables -> float, nearest              what was handed over
         -> NAD -> float, nearest, EFRAP             what can be made of it
         -> model.safetensors, model.onnx            what is shipped
         -> float.safetensors                        the repaired floats, for an audit
         -> the ONNX file in ONNX Runtime            what users will run

The defender needs clean images only. Where a trigger is known it measures and nothing
else: no choice depends on it.
"""

import dataclasses
import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, pipeline, roundings, settings, whole_file
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import triggers
from nad_jax.core import metrics
from nad_jax.data import batches, sources
from nad_jax.defenses import base, nad
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.export import stablehlo
from nad_jax.interop import artifact, name_maps, reader, safetensors_file
from nad_jax.models import layers as layers_lib
from nad_jax.report import schema
from nad_jax.training import environment, evaluation, loop

# The row that is shipped.
_SHIPPED = "efrap"
_NO_TRIGGER = "none"
# Images that the StableHLO program is compared on.
_FEW = 500


@dataclasses.dataclass(frozen=True)
class _Scene:
    """The model's architecture, images, and what measures."""

    train: sources.Dataset
    test: sources.Dataset
    model: Any
    layers: list[layers_lib.Layer]
    trigger: triggers.Trigger | None
    evaluate: Callable[..., dict[str, Any]]


def run(
    config: settings.VetSettings,
    workdir: workdir_lib.Workdir,
    *,
    command: str | None = None,
) -> dict[str, Any]:
    """Vets the checkpoint and writes the report, whose claims are the verdict.

    Args:
      config: What to do.
      workdir: Where to put it.
      command: The command line, for the report.

    Raises:
      InputError: the checkpoint or the images cannot be read or do not fit together,
        so that there is nothing to judge.
    """
    canary = environment.check_canary()
    exporter = _import_exporter()
    assert config.checkpoint is not None  # VetSettings has seen to it
    with workdir.timed("read"):
        converted = name_maps.convert(
            reader.read_checkpoint(config.checkpoint).arrays,
            config.arch,
            source=config.checkpoint,
        )
    workdir.check_input("checkpoint", artifact.sha256(config.checkpoint))
    with workdir.timed("data"):
        scene = _set_scene(config, converted.model, converted.variables)
    workdir.say(
        f"{config.checkpoint}: {converted.arch}, {len(scene.layers)} layers, "
        f"{scene.train.num_classes} classes"
    )
    rows: list[schema.Row] = []
    layers: list[dict[str, Any]] = []

    def add(name, counts, *, seconds=0.0, result=None, **extra):
        row = schema.Row(
            name=name,
            model="given",
            seed=config.seed,
            weight_bits=None if result is None else config.defense.weight_bits,
            act_bits=None if result is None else config.defense.act_bits,
            flip_rate=None if result is None else result.flip_rate,
            seconds=seconds,
            extra=extra,
            **counts,
        )
        pipeline.add_row(rows, row, workdir)
        return row

    def measure(variables, result=None):
        with workdir.timed("evaluate"):
            return scene.evaluate(variables, result)

    key = jax.random.key(config.seed)
    clean_key, repair_key, calibration_key, rounding_key = jax.random.split(key, 4)
    calibration = roundings.calibration_images(
        scene.train, config.defense.calibration_images, calibration_key
    )

    def rounded(name, row_name, variables):
        workdir.check_stop()
        result, seconds = roundings.quantize(
            config.defense,
            name,
            scene.model,
            variables,
            calibration,
            layers=scene.layers,
            key=rounding_key,
            workdir=workdir,
            stage=row_name,
        )
        workdir.seconds[f"quantize/{row_name}"] = seconds
        layers.extend(
            roundings.layer_entries(
                result, seed=config.seed, row=row_name, model_name="given"
            )
        )
        return result, seconds

    given = converted.variables
    before = add("float", measure(given))
    naive, seconds = rounded("nearest", "nearest", given)
    drift = _disagreement(scene, calibration, given, naive)
    add(
        "nearest",
        measure(naive.variables, naive),
        seconds=seconds,
        result=naive,
        drift=drift,
    )
    repaired, seconds = _repair(config, scene, workdir, given, clean_key, repair_key)
    add("nad", measure(repaired), seconds=seconds)
    control, seconds = rounded("nearest", "nad_nearest", repaired)
    add(
        "nad_nearest",
        measure(control.variables, control),
        seconds=seconds,
        result=control,
    )
    shipped, seconds = rounded(_SHIPPED, _SHIPPED, repaired)
    predictions = _predictions(scene, shipped)
    add(
        _SHIPPED,
        measure(shipped.variables, shipped),
        seconds=seconds,
        result=shipped,
    )
    with workdir.timed("export"):
        files = _export(
            config,
            scene,
            workdir,
            converted,
            repaired,
            shipped,
            calibration,
            rows,
            exporter,
        )
    with workdir.timed("run the export"):
        counts, agreement = _run_export(config, scene, files, predictions, exporter)
    exported = add("exported", counts, result=shipped, agreement=agreement)
    claims = _verdict(config.verdict, before, exported, drift, agreement)
    report = pipeline.write_report(
        config,
        workdir,
        rows=rows,
        layers=layers,
        claims=claims,
        canary=canary,
        figures=None,
        notes=[*converted.notes, *_notes(config, scene, files)],
        command=command,
    )
    _say_verdict(workdir, claims, scene)
    return report


def exit_code(report: Mapping[str, Any]) -> int:
    """0 if every claim holds: accepted; 1 otherwise."""
    return 0 if all(claim["passed"] for claim in report["claims"]) else 1


def _import_exporter() -> Any:
    """The room that needs ONNX, asked for before the work, not after."""
    # jax.export needs flatbuffers, and says so only at the end.
    for package in ("onnx", "onnxruntime", "flatbuffers"):
        if importlib.util.find_spec(package) is None:
            raise errors.InputError(
                f"vetting exports what it ships and needs {package}, which is not "
                "there; install nad_jax[export]"
            )
    from nad_jax.export import onnx_graph, onnx_runtime

    return onnx_graph, onnx_runtime


def _set_scene(config: settings.VetSettings, model: Any, variables: Any) -> _Scene:
    train, test = pipeline.load_data(config.data)
    if model.num_classes != train.num_classes:
        raise errors.InputError(
            f"the checkpoint tells {model.num_classes} classes apart, {train.name} has "
            f"{train.num_classes}"
        )
    image_shape = train.images.shape[1:]
    layers = layers_lib.find_layers(
        model,
        variables,
        jnp.zeros((1, *image_shape)),
        apply_kwargs=roundings.EVAL,
    )
    trigger = None
    if config.trigger.name != _NO_TRIGGER:
        pipeline.check_target(config.target_label, train, where="config")
        trigger = pipeline.build_trigger(
            config.trigger, image_shape, where="config", other_names=[_NO_TRIGGER]
        )
    target_labels = None if trigger is None else config.target_label
    evaluate = roundings.make_evaluate(
        model, test, trigger=trigger, target_labels=target_labels
    )
    return _Scene(train, test, model, layers, trigger, evaluate)


def _predictions(scene: _Scene, result: efrap_lib.Quantized) -> np.ndarray:
    """Classes of the clean test images, by the evaluation here; int `[N]`."""
    logits = jax.jit(lambda x: result.apply(result.variables, x)[0])
    indices, mask = batches.evaluation_batches(
        len(scene.test), evaluation.DEFAULT_BATCH_SIZE
    )
    chosen = [
        np.argmax(
            logits(batches.to_float(jnp.asarray(scene.test.images[np.asarray(rows)]))),
            -1,
        )
        for rows in indices
    ]
    return np.concatenate(chosen)[np.asarray(mask).reshape(-1)]


def _disagreement(scene, images, variables, result: efrap_lib.Quantized) -> float:
    """Share of images that the float and the rounded model call differently."""
    apply = jax.jit(lambda v, x: scene.model.apply(v, x, **roundings.EVAL)[0])
    rounded = jax.jit(lambda v, x: result.apply(v, x)[0])
    before = np.argmax(apply(variables, images), -1)
    after = np.argmax(rounded(result.variables, images), -1)
    return float(np.mean(before != after))


def _repair(config, scene, workdir, given, clean_key, repair_key) -> tuple[Any, float]:
    """The repaired float variables, and the seconds that took."""
    rows = base.clean_indices(
        clean_key,
        scene.train.labels,
        fraction=config.clean_fraction,
        validation_fraction=config.validation_fraction,
    )
    data = base.clean_data(scene.train, *rows)
    tuning = settings.TuningSettings(config.training, patience=config.patience)
    victim = base.Net(scene.model, given)

    def compute():
        progress = workdir.progress("nad", config.training.epochs)

        def on_epoch(variables, metrics):
            del variables
            workdir.record("epoch", stage="nad", **metrics)
            progress.advance(f"loss {metrics['loss']:.4f}")

        defended = nad.run(
            victim,
            data,
            tuning,
            config.nad,
            key=repair_key,
            on_epoch=on_epoch,
            should_stop=workdir.should_stop,
            commits=workdir.commits,
        )
        progress.done(f"{len(data.labels)} clean images")
        return defended.variables

    try:
        repaired = workdir.stage("nad", given, compute)
    except loop.TrainingInterrupted as interruption:
        raise workdir_lib.Interrupted(f"nad: {interruption}") from None
    return repaired, workdir.seconds["nad"]


# ------------------------------------------------------------------------------ export


def _export(
    config, scene, workdir, converted, repaired, shipped, calibration, rows, exporter
):
    """Writes the shipped files, the repaired floats and the card; returns their paths.

    The floats have the layout of the checkpoint that came, so that whoever doubts the
    integers can compare them (`configs/audit.py`).
    """
    onnx_graph, _ = exporter
    files = {
        "artifact": workdir.path / "model.safetensors",
        "onnx": workdir.path / "model.onnx",
        "stablehlo": workdir.path / "model.stablehlo",
        "float": workdir.path / "float.safetensors",
        "card": workdir.path / "card.json",
    }
    card = {
        "arch": converted.arch,
        "width": converted.width,
        "num_classes": scene.train.num_classes,
        "image_shape": list(scene.train.images.shape[1:]),
        "repair": "nad",
        "rounding": _SHIPPED,
        "fold_batch_norm": config.defense.folds_batch_norm,
        "source_sha256": artifact.sha256(config.checkpoint),
        "calibration_sha256": hashlib.sha256(
            np.asarray(calibration).tobytes()
        ).hexdigest(),
        "git_commit": pipeline.git_commit(),
        "versions": environment.describe()["versions"],
        "runtime": (
            "If activations are float, set session.disable_quant_qdq=1, or ONNX "
            "Runtime computes products in int8. Never hand the float weights to "
            "another quantizer: it rounds them anew."
        ),
        "rows": [row.to_dict() for row in rows],
    }
    parts = artifact.Artifact(
        shipped.variables,
        shipped.codes,
        shipped.quant_params,
        shipped.specs,
        shipped.act_params,
        shipped.act_spec,
        schema.plain(card, "card"),
    )
    artifact.write_artifact(files["artifact"], parts)
    # What is exported is what the file says, not what memory holds.
    stored = artifact.read_artifact(files["artifact"])
    shipped = dataclasses.replace(
        shipped,
        variables=stored.variables,
        codes=stored.codes,
        quant_params=stored.quant_params,
        specs=stored.specs,
        act_params=stored.act_params,
        act_specs={name: stored.act_spec for name in stored.act_params},
    )
    image_shape = scene.train.images.shape[1:]
    model = onnx_graph.to_onnx(
        shipped.module,
        shipped.variables,
        image_shape,
        layers=scene.layers,
        codes=shipped.codes,
        quant_params=shipped.quant_params,
        specs=shipped.specs,
        act_params=shipped.act_params,
        act_spec=shipped.act_spec,
        apply_kwargs=shipped.apply_kwargs,
        metadata={"source_sha256": card["source_sha256"]},
    )
    files["onnx"].write_bytes(model.SerializeToString())
    program = stablehlo.to_stablehlo(
        shipped.apply,
        shipped.variables,
        image_shape,
        codes=shipped.codes,
        quant_params=shipped.quant_params,
    )
    files["stablehlo"].write_bytes(program)
    safetensors_file.write_safetensors(
        files["float"], name_maps.to_torch(repaired, converted.names)
    )
    # The card comes last and holds the hashes: files without one are unfinished.
    card["files"] = {
        path.name: artifact.sha256(path)
        for kind, path in files.items()
        if kind != "card"
    }
    whole_file.write_json(files["card"], schema.plain(card, "card"))
    return files


def _run_export(config, scene: _Scene, files, predictions, exporter):
    """Rates of the ONNX file, and agreement of the exports with `predictions`.

    The lower one, of the ONNX file on all images and of the StableHLO program on a few.
    """
    _, onnx_runtime = exporter
    session = onnx_runtime.Session(files["onnx"])
    images = batches.to_float(jnp.asarray(scene.test.images))
    clean = session.logits(np.asarray(images))
    triggered = None
    if scene.trigger is not None:
        stamped = triggers.apply_trigger(images, scene.trigger)
        triggered = session.logits(np.asarray(stamped))
    count = len(scene.test)
    counts = metrics.count_batch(
        jnp.asarray(clean),
        None if triggered is None else jnp.asarray(triggered),
        jnp.asarray(scene.test.labels),
        jnp.ones(count, bool),
        target_labels=jnp.full(count, config.target_label, jnp.int32),
    )
    reloaded = stablehlo.load(files["stablehlo"].read_bytes())
    few = len(predictions[:_FEW])
    program = np.argmax(reloaded(images[:few]), -1)
    agreement = min(
        float(np.mean(np.argmax(clean, -1) == predictions)),
        float(np.mean(program == predictions[:few])),
    )
    return metrics.summarize(jax.device_get(counts)), agreement


# ----------------------------------------------------------------------------- verdict


def _verdict(
    limits: settings.VerdictSettings, before, exported, drift, agreement
) -> list[dict[str, Any]]:
    """What must hold, each with its figure."""
    loss = before.acc - exported.acc
    claims = [
        pipeline.claim(
            f"The shipped file loses at most {limits.max_accuracy_loss:.1%} accuracy "
            f"(from {before.acc:.2%} to {exported.acc:.2%})",
            loss <= limits.max_accuracy_loss,
        ),
        pipeline.claim(
            f"Rounding the model as it came changes at most {limits.max_drift:.1%} of "
            f"its predictions on clean images ({drift:.2%})",
            drift <= limits.max_drift,
        ),
        pipeline.claim(
            f"The exported files predict what was evaluated on at least "
            f"{limits.min_agreement:.1%} of the images ({agreement:.2%})",
            agreement >= limits.min_agreement,
        ),
    ]
    if exported.asr is not None:
        claims.append(
            pipeline.claim(
                f"The known trigger takes at most {limits.max_asr:.1%} of the images "
                f"(before {before.asr:.2%}, shipped {exported.asr:.2%})",
                exported.asr <= limits.max_asr,
            )
        )
    return claims


def _notes(config, scene: _Scene, files) -> list[str]:
    notes = [
        f"Shipped: {files['artifact'].name} (integers, scales, zero points), "
        f"{files['onnx'].name}, {files['stablehlo'].name}, {files['card'].name}."
    ]
    if scene.trigger is None:
        notes.append(
            "No trigger is known: the backdoor, if there is one, was not measured. "
            "Accuracy, drift and agreement are what the verdict rests on."
        )
    return notes


def _say_verdict(workdir, claims, scene: _Scene) -> None:
    failed = [claim["text"] for claim in claims if not claim["passed"]]
    for text in failed:
        workdir.say(f"not met: {text}")
    unknown = "" if scene.trigger is not None else " (no trigger known: ASR not judged)"
    workdir.say(f"verdict: {'rejected' if failed else 'accepted'}{unknown}")
