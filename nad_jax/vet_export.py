# SPDX-License-Identifier: Apache-2.0
"""The files that a vetting ships, and whether they predict what was evaluated.

model.safetensors    the artefact: integers, scales, zero points (`interop.artifact`)
model.onnx           the same integers, for ONNX Runtime
model.stablehlo      the same integers, for XLA on CPU, CUDA and TPU
float.safetensors    the repaired floats in the layout of the checkpoint that came, so
                     that whoever doubts the integers can compare (`configs/audit.py`)
card.json            what is known of the model, and the hashes of the files above
"""

import dataclasses
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, whole_file
from nad_jax.attacks import triggers
from nad_jax.core import metrics
from nad_jax.data import batches, sources
from nad_jax.defenses import quantized_module
from nad_jax.export import stablehlo
from nad_jax.interop import artifact, bounded_file, safetensors_file
from nad_jax.models import layers as layers_lib
from nad_jax.report import schema
from nad_jax.training import evaluation

# Images that the StableHLO program is compared on.
_FEW = 500
# What says that the files beside it belong together.
_SEALS = ("report.json", "report.html", "card.json")


@dataclasses.dataclass(frozen=True)
class Files:
    """Where the files of one vetting are."""

    artifact: pathlib.Path
    onnx: pathlib.Path
    stablehlo: pathlib.Path
    floats: pathlib.Path
    card: pathlib.Path


def check_packages() -> None:
    """Raises InputError, before the work and not after, if export is not installed."""
    # jax.export needs flatbuffers, and says so only at the end.
    for package in ("onnx", "onnxruntime", "flatbuffers"):
        if importlib.util.find_spec(package) is None:
            raise errors.InputError(
                f"vetting exports what it ships and needs {package}, which is not "
                "there; install nad_jax[export]"
            )


def write(
    folder: pathlib.Path,
    *,
    card: Mapping[str, Any],
    shipped: quantized_module.Quantized,
    layers: Sequence[layers_lib.Layer],
    image_shape: tuple[int, ...],
    floats: Mapping[str, np.ndarray],
) -> Files:
    """Writes all files, the card last; a folder without a card is unfinished.

    Card and report of an earlier vetting go first: they belong to other files.

    Args:
      folder: The workdir.
      card: What is known of the model, with "source_sha256".
      shipped: The rounded model.
      layers: From `find_layers`.
      image_shape: `(H, W, C)`.
      floats: Name in the checkpoint that came -> repaired array in its layout.

    Raises:
      InputError: a file cannot be written, or the model cannot be exported.
    """
    from nad_jax.export import onnx_graph

    files = Files(
        artifact=folder / "model.safetensors",
        onnx=folder / "model.onnx",
        stablehlo=folder / "model.stablehlo",
        floats=folder / "float.safetensors",
        card=folder / "card.json",
    )
    for name in _SEALS:
        whole_file.remove(folder / name)
    parts = artifact.Artifact(
        shipped.variables,
        jax.device_get(shipped.codes),
        shipped.quant_params,
        shipped.specs,
        shipped.act_params,
        shipped.act_spec,
        schema.plain(card, "card"),
    )
    artifact.write_artifact(files.artifact, parts)
    # What is exported is what the file says, not what memory holds.
    stored = artifact.read_artifact(files.artifact)
    shipped = dataclasses.replace(
        shipped,
        variables=stored.variables,
        codes=stored.codes,
        quant_params=stored.quant_params,
        specs=stored.specs,
        act_params=stored.act_params,
        act_specs={name: stored.act_spec for name in stored.act_params},
    )
    model = onnx_graph.to_onnx(
        shipped.module,
        shipped.variables,
        image_shape,
        layers=layers,
        codes=shipped.codes,
        quant_params=shipped.quant_params,
        specs=shipped.specs,
        act_params=shipped.act_params,
        act_spec=shipped.act_spec,
        apply_kwargs=shipped.apply_kwargs,
        metadata={"source_sha256": card["source_sha256"]},
    )
    whole_file.write_bytes(files.onnx, model.SerializeToString())
    program = stablehlo.to_stablehlo(
        shipped.apply,
        shipped.variables,
        image_shape,
        codes=shipped.codes,
        quant_params=shipped.quant_params,
    )
    whole_file.write_bytes(files.stablehlo, program)
    safetensors_file.write_safetensors(files.floats, floats)
    models = (files.artifact, files.onnx, files.stablehlo, files.floats)
    hashes = {path.name: bounded_file.sha256(path) for path in models}
    whole_file.write_json(files.card, schema.plain({**card, "files": hashes}, "card"))
    return files


def run(
    files: Files,
    test: sources.Dataset,
    predictions: np.ndarray,
    *,
    trigger: triggers.Trigger | None,
    target_label: int,
) -> tuple[dict[str, Any], float]:
    """Rates of the ONNX file, and agreement of the exports with `predictions`.

    The lower one, of the ONNX file on all images and of the StableHLO program on a few.

    Args:
      files: From `write`.
      test: N images.
      predictions: What was evaluated predicts, int `[N]`.
      trigger: To measure; None = none is known.
      target_label: What the trigger is for.

    Returns:
      As `metrics.summarize`; a share in [0, 1].
    """
    from nad_jax.export import onnx_runtime

    session = onnx_runtime.Session(files.onnx)
    counted, predicted = [], []
    for start in range(0, len(test), evaluation.DEFAULT_BATCH_SIZE):
        rows = slice(start, start + evaluation.DEFAULT_BATCH_SIZE)
        images = batches.to_float(jnp.asarray(test.images[rows]))
        clean = jnp.asarray(session.logits(np.asarray(images)))
        triggered = None
        if trigger is not None:
            stamped = triggers.apply_trigger(images, trigger)
            triggered = jnp.asarray(session.logits(np.asarray(stamped)))
        counts = metrics.count_batch(
            clean,
            triggered,
            jnp.asarray(test.labels[rows]),
            jnp.ones(len(images), bool),
            target_labels=jnp.full(len(images), target_label, jnp.int32),
        )
        counted.append(jax.device_get(counts))
        predicted.append(np.asarray(metrics.predict(clean)))
    program = stablehlo.load(files.stablehlo.read_bytes())
    few = predictions[:_FEW]
    logits = program(batches.to_float(jnp.asarray(test.images[: len(few)])))
    agreement = min(
        float(np.mean(np.concatenate(predicted) == predictions)),
        float(np.mean(np.asarray(metrics.predict(logits)) == few)),
    )
    return metrics.summarize(jax.tree.map(lambda *x: sum(x), *counted)), agreement
