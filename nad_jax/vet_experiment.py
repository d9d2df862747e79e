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
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, pipeline, repairs, roundings, settings, vet_export
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import triggers
from nad_jax.data import sources
from nad_jax.defenses import base, nad, quantized_module
from nad_jax.interop import name_maps, reader
from nad_jax.models import layers as layers_lib
from nad_jax.report import schema
from nad_jax.training import environment, evaluation

# The row that is shipped.
_SHIPPED = "efrap"
_NO_TRIGGER = "none"


@dataclasses.dataclass(frozen=True)
class _Scene:
    """The model's architecture, images, and what measures."""

    train: sources.Dataset
    test: sources.Dataset
    model: Any
    layers: list[layers_lib.Layer]
    trigger: triggers.Trigger | None
    evaluate: Callable[..., tuple[dict[str, Any], np.ndarray]]


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
    vet_export.check_packages()
    assert config.checkpoint is not None  # VetSettings has seen to it
    with workdir.timed("read"):
        checkpoint = reader.read_checkpoint(config.checkpoint)
        converted = name_maps.convert(
            checkpoint.arrays, config.arch, source=config.checkpoint
        )
    workdir.check_input("checkpoint", checkpoint.sha256)
    with workdir.timed("data"):
        scene = _set_scene(config, workdir, converted.model, converted.variables)
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
        """Rates, and the classes of the clean test images."""
        with workdir.timed("evaluate"):
            return scene.evaluate(variables, result)

    key = jax.random.key(config.seed)
    clean_key, repair_key, calibration_key, rounding_key = jax.random.split(key, 4)
    wanted = config.defense.calibration_images
    shortage = roundings.tell_shortage(scene.train, wanted, workdir)
    calibration = roundings.calibration_images(scene.train, wanted, calibration_key)

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
    before = add("float", measure(given)[0])
    naive, seconds = rounded("nearest", "nearest", given)
    drift = _disagreement(scene, calibration, given, naive)
    add(
        "nearest",
        measure(naive.variables, naive)[0],
        seconds=seconds,
        result=naive,
        drift=drift,
    )
    repaired, seconds = _repair(
        config, scene, workdir, given, clean_key=clean_key, repair_key=repair_key
    )
    add("nad", measure(repaired)[0], seconds=seconds)
    control, seconds = rounded("nearest", "nad_nearest", repaired)
    add(
        "nad_nearest",
        measure(control.variables, control)[0],
        seconds=seconds,
        result=control,
    )
    shipped, seconds = rounded(_SHIPPED, _SHIPPED, repaired)
    rates, predictions = measure(shipped.variables, shipped)
    add(_SHIPPED, rates, seconds=seconds, result=shipped)
    with workdir.timed("export"):
        files = vet_export.write(
            workdir.path,
            card=_card(
                config,
                scene,
                converted,
                rows,
                source_sha256=checkpoint.sha256,
                calibration=calibration,
            ),
            shipped=shipped,
            layers=scene.layers,
            image_shape=scene.train.images.shape[1:],
            floats=name_maps.as_found(repaired, converted.names),
        )
    with workdir.timed("run the export"):
        counts, agreement = vet_export.run(
            files,
            scene.test,
            predictions,
            trigger=scene.trigger,
            target_label=config.target_label,
        )
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
        notes=[*converted.notes, *shortage, *_notes(scene, files)],
        command=command,
    )
    _say_verdict(workdir, claims, scene)
    return report


def exit_code(report: Mapping[str, Any]) -> int:
    """0 if every claim holds: accepted; 1 otherwise."""
    return 0 if all(claim["passed"] for claim in report["claims"]) else 1


def _set_scene(
    config: settings.VetSettings,
    workdir: workdir_lib.Workdir,
    model: Any,
    variables: Any,
) -> _Scene:
    train, test = pipeline.load_data(config.data, workdir)
    if model.num_classes != train.num_classes:
        raise errors.InputError(
            f"the checkpoint tells {model.num_classes} classes apart, {train.name} has "
            f"{train.num_classes}"
        )
    image_shape = train.images.shape[1:]
    pipeline.check_augmentation(config, image_shape)
    layers = layers_lib.find_layers(
        model,
        variables,
        jnp.zeros((1, *image_shape)),
        apply_kwargs=roundings.EVAL,
    )
    trigger = None
    if config.trigger.name != _NO_TRIGGER:
        pipeline.check_target(config.target_label, train, test, where="config")
        trigger = pipeline.build_trigger(
            config.trigger, image_shape, where="config", other_names=[_NO_TRIGGER]
        )
    target_labels = None if trigger is None else config.target_label
    evaluate = roundings.make_evaluate(
        model,
        test,
        trigger=trigger,
        target_labels=target_labels,
        make_evaluator=evaluation.make_predicting_evaluator,
    )
    return _Scene(train, test, model, layers, trigger, evaluate)


def _disagreement(
    scene: _Scene, images: jax.Array, variables: Any, result: quantized_module.Quantized
) -> float:
    """Share, in [0, 1], of images that two models call differently.

    Args:
      scene: Has the model.
      images: Float `[N, H, W, C]` in [0, 1].
      variables: Of the float model.
      result: The rounded one.
    """
    apply = jax.jit(lambda v, x: scene.model.apply(v, x, **roundings.EVAL)[0])
    rounded = jax.jit(lambda v, x: result.apply(v, x)[0])
    before = np.argmax(apply(variables, images), -1)
    after = np.argmax(rounded(result.variables, images), -1)
    return float(np.mean(before != after))


def _repair(
    config: settings.VetSettings,
    scene: _Scene,
    workdir: workdir_lib.Workdir,
    given: Any,
    *,
    clean_key: jax.Array,
    repair_key: jax.Array,
) -> tuple[Any, float]:
    """The float variables repaired by NAD, and the seconds that took.

    A stage of the workdir: not repeated once it is finished.

    Args:
      config: The repair's settings.
      scene: Model and training images.
      workdir: Keeps commits, and may ask to stop.
      given: Variables of the model as it came; the result has their structure and
        shapes.
      clean_key: Draws the clean images.
      repair_key: Randomness of the training.
    """
    rows = base.clean_indices(
        clean_key,
        scene.train.labels,
        fraction=config.clean_fraction,
        validation_fraction=config.validation_fraction,
    )
    data = base.clean_data(scene.train, *rows)
    tuning = settings.TuningSettings(config.training, patience=config.patience)
    victim = base.Net(scene.model, given)
    net, seconds = repairs.run_stage(
        workdir,
        "nad",
        functools.partial(nad.run, victim, data, tuning, config.nad, key=repair_key),
        victim,
        title=f"nad, {len(data.labels)} clean images",
        epochs=repairs.epochs_of_nad(config.training, config.nad),
    )
    return net.variables, seconds


def _card(
    config: settings.VetSettings,
    scene: _Scene,
    converted: name_maps.Converted,
    rows: Sequence[schema.Row],
    *,
    source_sha256: str,
    calibration: jax.Array,
) -> dict[str, Any]:
    """What is known of the shipped model.

    Args:
      config: What was done.
      scene: The data.
      converted: The model as it came.
      rows: What was measured so far.
      source_sha256: Of the checkpoint's file.
      calibration: Images that the grids were measured on, float `[N, H, W, C]`.
    """
    return {
        "arch": converted.arch,
        "width": converted.width,
        "num_classes": scene.train.num_classes,
        "image_shape": list(scene.train.images.shape[1:]),
        "repair": "nad",
        "rounding": _SHIPPED,
        "fold_batch_norm": config.defense.folds_batch_norm,
        "source_sha256": source_sha256,
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
            pipeline.at_most(loss, limits.max_accuracy_loss),
        ),
        pipeline.claim(
            f"Rounding the model as it came changes at most {limits.max_drift:.1%} of "
            f"its predictions on clean images ({drift:.2%})",
            pipeline.at_most(drift, limits.max_drift),
        ),
        pipeline.claim(
            f"The exported files predict what was evaluated on at least "
            f"{limits.min_agreement:.1%} of the images ({agreement:.2%})",
            pipeline.at_most(limits.min_agreement, agreement),
        ),
    ]
    if exported.asr is not None:
        claims.append(
            pipeline.claim(
                f"The known trigger takes at most {limits.max_asr:.1%} of the images "
                f"(before {before.asr:.2%}, shipped {exported.asr:.2%})",
                pipeline.at_most(exported.asr, limits.max_asr),
            )
        )
    return claims


def _notes(scene: _Scene, files: vet_export.Files) -> list[str]:
    notes = [
        f"Shipped: {files.artifact.name} (integers, scales, zero points), "
        f"{files.onnx.name}, {files.stablehlo.name}, {files.card.name}."
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
