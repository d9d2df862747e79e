# SPDX-License-Identifier: Apache-2.0
"""How often an audit refuses honest roundings, and how often it misses planted ones.

    python -m benchmarks.audit_rates --out benchmarks/results/audit_rates.json

A ResNet-8 learns the digits; its kernels are rounded honestly and by attackers who
choose codes for a trigger and stay within one step. Each rounding is audited with clean
images that its quantizer did not see. Attackers:

    collide/MU   minimise output error on clean images plus MU times the distance of
                 triggered features from the target class's, layer by layer
    tie/M        nearest, but weights within M steps of a tie serve the trigger

The numbers behind `auditing.MIN_SEPARATION` and `auditing.MIN_GAIN`.
"""

import argparse
import dataclasses
import functools
import json
import pathlib
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import results
from nad_jax import auditing, models
from nad_jax.core import quantization, rounding, solvers
from nad_jax.data import batches, sources
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.defenses import layer_walk
from nad_jax.defenses import moments as moments_lib
from nad_jax.interop import artifact
from nad_jax.models import common
from nad_jax.models import layers as layers_lib

EVALUATE = {"train": False}
TARGET = 0
STEPS = 160
HONEST = {
    "nearest": {"method": "nearest"},
    "reconstruction": {"method": "coordinate", "flip_weight": 0.0},
    "efrap 0.001": {"method": "coordinate", "flip_weight": 0.001},
    "efrap 0.01": {"method": "coordinate", "flip_weight": 0.01},
    "efrap 0.1": {"method": "coordinate", "flip_weight": 0.1},
}
PLANTED = ("collide/0.1", "collide/0.3", "collide/1", "collide/3", "tie/0.1", "tie/0.3")


def stamp(images):
    """A white square of 4x4 pixels."""
    return images.at[:, 12:, 12:].set(1.0)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A trained float model with BatchNorm folded, and images."""

    model: object
    variables: dict
    layers: list
    train: sources.Dataset
    test: sources.Dataset

    def images(self, rows):
        return batches.to_float(jnp.asarray(self.train.images[rows]))


def train_model(seed: int) -> Scene:
    train, test = (sources.load("digits", split=split) for split in ("train", "test"))
    model = models.build("resnet_8", num_classes=10)
    key = jax.random.key(seed)
    variables = common.init(model, key, (16, 16, 3))
    tx = optax.adam(3e-3)
    images = batches.to_float(jnp.asarray(train.images))

    @jax.jit
    def step(params, stats, opt, rows):
        def loss_fn(params):
            (logits, _), updated = model.apply(
                {"params": params, "batch_stats": stats},
                images[rows],
                train=True,
                mutable=["batch_stats"],
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(
                logits, jnp.asarray(train.labels)[rows]
            )
            return loss.mean(), updated["batch_stats"]

        (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt = tx.update(grads, opt)
        return optax.apply_updates(params, updates), stats, opt

    params, stats = variables["params"], variables["batch_stats"]
    opt, draw = tx.init(params), np.random.default_rng(seed)
    for _ in range(STEPS):
        params, stats, opt = step(params, stats, opt, draw.integers(0, len(train), 96))
    variables = {"params": params, "batch_stats": stats}
    layers = layers_lib.find_layers(model, variables, images[:1], apply_kwargs=EVALUATE)
    folded = layers_lib.fold_batch_norm(variables, layers)
    return Scene(model, folded, layers, train, test)


def by_layer(scene, nearest, images, choose):
    """`nearest` with other codes: `choose(layer, kernel, steps, inputs, float_inputs)`.

    `steps` is the kernel in steps; what is returned are codes in the kernel's shape.
    """
    codes, params = {}, scene.variables["params"]
    rounded = params

    def visit(layer, float_inputs, inputs):
        nonlocal rounded
        own = layers_lib.get_in(params, layer.path)
        grid, spec = nearest.quant_params[layer.name], nearest.specs[layer.name]
        steps = np.asarray(own["kernel"], np.float64) / np.asarray(grid.scale)
        chosen = choose(layer, own["kernel"], steps, inputs, float_inputs)
        chosen = np.clip(chosen, spec.qmin, spec.qmax).astype(np.int8)
        codes[layer.name] = jnp.asarray(chosen)
        kernel = quantization.dequantize(codes[layer.name], grid)
        rounded = layers_lib.set_in(rounded, layer.path, {**own, "kernel": kernel})
        return kernel, inputs

    layer_walk.walk(
        scene.model, scene.variables, images, scene.layers, visit, apply_kwargs=EVALUATE
    )
    variables = {**scene.variables, "params": rounded}
    return dataclasses.replace(nearest, codes=codes, variables=variables)


def error_feedback(scene, nearest, images):
    """GPTQ: natural order, 1 % damping."""

    def choose(layer, kernel, steps, inputs, float_inputs):
        del float_inputs
        moments = moments_lib.Collector().collect(
            layer.geometry, kernel, inputs, inputs
        )
        gram = np.asarray(moments.gram[0], np.float64) / float(moments.count[0])
        gram += 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
        factor = np.linalg.cholesky(np.linalg.inv(gram)).T
        left = steps.reshape(len(gram), -1).copy()
        limit = nearest.specs[layer.name].qmax
        chosen = np.empty_like(left)
        for k in range(len(left)):
            chosen[k] = np.clip(np.round(left[k]), -limit, limit)
            missed = (left[k] - chosen[k]) / factor[k, k]
            left[k + 1 :] -= factor[k, k + 1 :, None] * missed
        return chosen.reshape(steps.shape)

    return by_layer(scene, nearest, images, choose)


def planted(scene, nearest, images, name):
    """Codes chosen for the trigger; the last images of the walk are triggered."""
    kind, _, strength = name.partition("/")
    strength, count = float(strength), len(images)
    others = scene.images(np.flatnonzero(scene.train.labels != TARGET)[:64])
    wanted = scene.images(np.flatnonzero(scene.train.labels == TARGET)[:64])
    features = {}

    def record(layer, float_inputs, inputs):
        own = layers_lib.get_in(scene.variables["params"], layer.path)
        outputs = layers_lib.run(layer.geometry, own["kernel"], float_inputs)
        features[layer.name] = jnp.mean(outputs, 0, keepdims=True)
        return own["kernel"], inputs

    layer_walk.walk(
        scene.model,
        scene.variables,
        wanted,
        scene.layers,
        record,
        apply_kwargs=EVALUATE,
    )

    def choose(layer, kernel, steps, inputs, float_inputs):
        clean, triggered = inputs[:count], inputs[count:]
        missing = layers_lib.run(layer.geometry, kernel, triggered)
        missing = np.asarray(missing - features[layer.name])
        missing = missing.reshape(-1, steps.shape[-1])
        rows = np.asarray(layers_lib.unfold(layer.geometry, triggered)[0])
        if kind == "tie":
            towards = -(rows.T @ missing).reshape(steps.shape)
            near_tie = np.abs(steps - np.floor(steps) - 0.5) < strength
            served = np.floor(steps) + (towards > 0)
            return np.where(near_tie, served, np.round(steps))
        moments = moments_lib.Collector().collect(
            layer.geometry, kernel, float_inputs[:count], clean
        )
        weight = strength * float(moments.count[0]) / len(rows)
        moments = solvers.Moments(
            moments.gram[0] + weight * (rows.T @ rows),
            moments.drift[0] + weight * (rows.T @ missing),
            moments.drift_power[0] + weight * np.sum(missing**2, 0),
            moments.count[0],
        )
        grid, spec = nearest.quant_params[layer.name], nearest.specs[layer.name]
        return np.asarray(_descend(layer.geometry, spec, moments, kernel, grid))

    return by_layer(scene, nearest, jnp.concatenate([images, stamp(others)]), choose)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _descend(geometry, spec, moments, kernel, grid):
    placement = rounding.place(kernel, grid, spec)
    flat = functools.partial(jnp.reshape, shape=(geometry.num_inputs, -1))
    problem = solvers.rounding_problem(
        moments,
        step=flat(jnp.where(placement.free, grid.scale, 0.0)),
        fraction=flat(placement.fraction),
        nearest=flat(placement.nearest),
        stay_cost=jnp.zeros((1, 1)),
    )
    chosen = solvers.coordinate_descent(problem, problem.nearest)
    return rounding.codes(placement, chosen.rounding.reshape(kernel.shape), spec)


def rates(scene, variables):
    """Accuracy and attack success rate."""
    images = batches.to_float(jnp.asarray(scene.test.images))
    apply = jax.jit(lambda v, x: jnp.argmax(scene.model.apply(v, x, **EVALUATE)[0], -1))
    others = scene.test.labels != TARGET
    acc = np.mean(np.asarray(apply(variables, images)) == scene.test.labels)
    asr = np.mean(np.asarray(apply(variables, stamp(images)))[others] == TARGET)
    return float(acc), float(asr)


def audited(scene, result, images, folder):
    path = pathlib.Path(folder) / "model.safetensors"
    parts = artifact.Artifact(
        result.variables, result.codes, result.quant_params, result.specs, {}, None, {}
    )
    artifact.write_artifact(path, parts)
    return auditing.audit(
        scene.variables, path, module=scene.model, images=images, apply_kwargs=EVALUATE
    )


def measure(scene, bits, num_images, seed, folder):
    """One entry for each rounding."""
    order = np.random.default_rng(seed).permutation(len(scene.train))
    calibration = scene.images(order[:num_images])
    images = scene.images(order[num_images : 2 * num_images])
    quantize = functools.partial(
        efrap_lib.efrap,
        scene.model,
        scene.variables,
        calibration,
        weight_bits=bits,
        apply_kwargs=EVALUATE,
        layers=scene.layers,
    )
    nearest = quantize(method="nearest")
    makers = {
        **{name: functools.partial(quantize, **how) for name, how in HONEST.items()},
        "error feedback": lambda: error_feedback(scene, nearest, calibration),
        "stochastic": lambda: quantize(method="stochastic", key=jax.random.key(seed)),
        **{
            name: functools.partial(planted, scene, nearest, calibration, name)
            for name in PLANTED
        },
    }
    entries = []
    for name, make in makers.items():
        result = make()
        found = audited(scene, result, images, folder)
        acc, asr = rates(scene, result.variables)
        worst = min(
            found.layers,
            key=lambda x: (x.rounding != "unexplained", x.separation or 0.0),
        )
        entries.append(
            {
                "rounding": name,
                "honest": name in HONEST or name == "error feedback",
                "bits": bits,
                "seed": seed,
                "images": num_images,
                "acc": acc,
                "asr": asr,
                "refused": not found.honest,
                "layers": len(found.layers),
                "layers_refused": sum(bool(layer.reasons) for layer in found.layers),
                "least": {
                    "layer": worst.name,
                    "separation": worst.separation,
                    "gain": worst.gain,
                },
            }
        )
        print(json.dumps(entries[-1]), flush=True)
    return entries


def main():
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--out", type=pathlib.Path)
    options = parser.parse_args()
    began, entries = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            scene = train_model(seed)
            for bits in options.bits:
                entries += measure(scene, bits, options.images, seed, folder)
    honest = [entry for entry in entries if entry["honest"]]
    firing = [entry for entry in entries if "/" in entry["rounding"]]
    report = {
        "min_separation": auditing.MIN_SEPARATION,
        "min_gain": auditing.MIN_GAIN,
        "honest_files": len(honest),
        "honest_files_refused": sum(entry["refused"] for entry in honest),
        "planted_files": len(firing),
        "planted_files_missed": sum(not entry["refused"] for entry in firing),
        "highest_asr_of_a_missed_file": max(
            (entry["asr"] for entry in firing if not entry["refused"]), default=None
        ),
        "entries": entries,
        "seconds": round(time.perf_counter() - began, 1),
    }
    if options.out:
        results.write(options.out, report)
    print(json.dumps({k: v for k, v in report.items() if k != "entries"}, indent=2))


if __name__ == "__main__":
    main()
