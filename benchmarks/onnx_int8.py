# SPDX-License-Identifier: Apache-2.0
"""Speed and size of int8 ONNX files against float ones, on one CPU thread.

    python -m benchmarks.onnx_int8 --out benchmarks/results/onnx_int8.json

Random weights: what is measured does not depend on them. Rounds alternate, float,
int8, int8 with quantized sums (`--config.defense.quantize_sums=True`), float, ..., so
that a neighbour on the machine slows all alike; a speed-up is the median of the ratios
within a round.
"""

import argparse
import json
import pathlib
import platform
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime

from benchmarks import results
from nad_jax import models
from nad_jax.core import grids as grids_lib
from nad_jax.core import quantization
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.export import onnx_graph, onnx_runtime
from nad_jax.models import common, sums
from nad_jax.models import layers as layers_lib

EVALUATE = {"train": False}
SHAPE = (32, 32, 3)


def files(name: str, width: float) -> dict[str, bytes]:
    """The three files of a model."""
    model = models.build(name, num_classes=10, width=width)
    variables = common.init(model, jax.random.key(0), SHAPE)
    zeros = jnp.zeros((1, *SHAPE))
    layers = layers_lib.find_layers(model, variables, zeros, apply_kwargs=EVALUATE)
    rounded = efrap_lib.efrap(
        model,
        variables,
        zeros,
        weight_bits=8,
        method="nearest",
        fold_batch_norm=True,
        layers=layers,
        apply_kwargs=EVALUATE,
    )
    spec = grids_lib.GRIDS["plain"].act_spec(8)
    # Inputs of layers are not negative in these nets; operands of sums may be.
    positive = quantization.params_from_range(0.0, 4.0, spec)
    signed = quantization.params_from_range(-4.0, 4.0, spec)
    inputs = {layer.name: positive for layer in layers}
    apply = sums.mark_inputs(lambda x: model.apply(variables, x, **EVALUATE))
    jaxpr = jax.make_jaxpr(apply)(zeros).jaxpr
    names = [n for pair in sums.find(jaxpr, jaxpr.invars).values() for n in pair]
    # Post-activation blocks reuse the quantized input as their shortcut.
    shortcut = positive if "preact" not in name and "wrn" not in name else signed
    operands = {n: shortcut if n.endswith("left") else signed for n in names}

    def export(act_params):
        return onnx_graph.to_onnx(
            model,
            rounded.variables,
            SHAPE,
            layers=layers,
            codes=rounded.codes,
            quant_params=rounded.quant_params,
            specs=rounded.specs,
            act_params=act_params,
            act_spec=spec,
            apply_kwargs=EVALUATE,
        ).SerializeToString()

    given = onnx_graph.to_onnx(model, variables, SHAPE, apply_kwargs=EVALUATE)
    return {
        "float": given.SerializeToString(),
        "int8": export(inputs),
        "int8, sums": export({**inputs, **operands}),
    }


def measure(name: str, width: float, batch: int, rounds: int) -> dict:
    """Milliseconds, speed-ups and sizes of one model."""
    contents = files(name, width)
    images = np.random.default_rng(0).uniform(size=(batch, *SHAPE)).astype(np.float32)
    sessions = {
        kind: onnx_runtime.Session(data, threads=1) for kind, data in contents.items()
    }
    seconds = {kind: [] for kind in sessions}
    for session in sessions.values():
        session.logits(images)
    for _ in range(rounds):
        for kind, session in sessions.items():
            began = time.perf_counter()
            session.logits(images)
            seconds[kind].append(time.perf_counter() - began)
    floats = seconds["float"]
    return {
        "model": name,
        "width": width,
        "batch": batch,
        "milliseconds": {
            kind: round(1000 * statistics.median(values), 2)
            for kind, values in seconds.items()
        },
        "speed_up": {
            kind: round(
                statistics.median(
                    a / b for a, b in zip(floats, seconds[kind], strict=True)
                ),
                2,
            )
            for kind in ("int8", "int8, sums")
        },
        "size_of_float": {
            kind: round(len(data) / len(contents["float"]), 3)
            for kind, data in contents.items()
        },
    }


def main():
    parser = argparse.ArgumentParser(description="Time int8 ONNX files.")
    parser.add_argument("--models", nargs="+", default=["resnet_14", "resnet_18"])
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    entries = []
    for name in options.models:
        entries.append(measure(name, options.width, options.batch, options.rounds))
        print(json.dumps(entries[-1]), flush=True)
    report = {
        "entries": entries,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.machine(),
        "threads": 1,
    }
    if options.out:
        results.write(options.out, report)


if __name__ == "__main__":
    main()
