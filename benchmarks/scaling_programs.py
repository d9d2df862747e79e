# SPDX-License-Identifier: Apache-2.0
"""What one device does and says in a step, counted from compiled programs.

    python -m benchmarks.scaling_programs --out=results/scaling/programs.json

The real program of the training loop is compiled, not run, for 1, 8, 64 and 512 virtual
CPU devices, with the same number of images per device (weak scaling), each in a child
process. From the compiled program: FLOPs and bytes by XLA's own analysis, and every
collective with its bytes. The program of one layer of EFRAP is counted the same way.
Then one small run on eight devices counts compilations after its second step.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
from typing import Any

from benchmarks import results

_DEVICES = (1, 8, 64, 512)
_IMAGES_PER_DEVICE = 32
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "u8": 1, "s8": 1, "f64": 8}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--child", type=int, help="internal: devices of this process")
    parser.add_argument("--recompilations", action="store_true", help="internal")
    arguments = parser.parse_args()
    if arguments.recompilations:
        print(json.dumps(_count_recompilations()))
    elif arguments.child:
        print(json.dumps(_count(arguments.child)))
    else:
        result = {
            "command": "python -m benchmarks.scaling_programs",
            "model": "resnet_14, 16x16 digits, one SGD step",
            "images_per_device": _IMAGES_PER_DEVICE,
            "programs": [_run_child(n, "--child", str(n)) for n in _DEVICES],
            "compilations": _run_child(8, "--recompilations"),
        }
        print(_table(result))
        if arguments.out:
            results.write(arguments.out, result)


def _run_child(devices: int, *arguments: str) -> Any:
    flags = f"--xla_force_host_platform_device_count={devices}"
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling_programs", *arguments],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    return json.loads(output.splitlines()[-1])


def _count(devices: int) -> dict[str, Any]:
    """Numbers of one device, out of `devices`."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from nad_jax import models
    from nad_jax.core import quantization, solvers
    from nad_jax.defenses import layer_rounding, moments
    from nad_jax.models import common, layers
    from nad_jax.training import feeds, loop, sharding, steps
    from nad_jax.training import state as state_lib

    assert jax.device_count() == devices
    mesh = sharding.data_mesh() if devices > 1 else None
    model = models.build("resnet_14", num_classes=10, width=1.0)
    tx = optax.sgd(0.1, momentum=0.9)
    batch_size = devices * _IMAGES_PER_DEVICE

    def make_batch(key, images, labels):
        del key
        return {"images": images.astype(jnp.float32) / 255.0, "labels": labels}

    run_steps = loop._compile_steps(
        steps.make_train_step(steps.classification_loss(model.apply), tx),
        make_batch,
        mesh,
    )
    state = jax.eval_shape(
        lambda key: state_lib.create(
            model.init(key, jnp.zeros((1, 16, 16, 1)), train=False), tx, key
        ),
        jax.random.key(0),
    )
    shapes: Any = {
        "images": jax.ShapeDtypeStruct((batch_size, 16, 16, 1), np.uint8),
        "labels": jax.ShapeDtypeStruct((batch_size,), np.int32),
        "order": jax.ShapeDtypeStruct((1, batch_size), np.int32),
    }
    data = feeds.Resident(**shapes, companions=())
    if mesh is not None:
        place = sharding.replicated(mesh)
        state, data = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            (state, data),
        )
    step = run_steps.lower(state, data, count=1).compile()

    variables = common.init(model, jax.random.key(0), (16, 16, 1))
    found = layers.find_layers(
        model, variables, jnp.zeros((1, 16, 16, 1)), apply_kwargs={"train": False}
    )
    layer = max(found, key=lambda layer: layer.geometry.num_inputs)
    numbers = {
        "devices": devices,
        "batch_size": batch_size,
        "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
        "batch_norm_channels": sum(x.size for x in jax.tree.leaves(state.batch_stats))
        // 2,
        "train_step": _facts(step),
    }
    if mesh is not None:
        kernel = layers.get_in(variables["params"], layer.path)["kernel"]
        side = {64: 4, 32: 8, 16: 16}[kernel.shape[2]]
        shape = (batch_size, side, side, kernel.shape[2])
        inputs = jax.ShapeDtypeStruct(
            shape,
            np.float32,
            sharding=sharding.shard_batch(np.zeros(devices), mesh).sharding,
        )
        # Coordinate descent scales its inputs, channel by channel.
        scales = jax.ShapeDtypeStruct((1, 1, 1, kernel.shape[2]), np.float32)
        collect = moments._collect_split.lower(
            layer.geometry, True, mesh, kernel, scales, inputs, inputs
        )
        sums = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
            jax.eval_shape(
                lambda: jax.tree.map(
                    lambda x: x[None],
                    solvers.zero_moments(layer.geometry.num_inputs, kernel.shape[-1]),
                )
            ),
        )
        spec = quantization.QuantSpec(4)
        posed, _ = layer_rounding._posing(layer.geometry, None)
        descend = layer_rounding._descend.lower(
            layer.geometry,
            spec,
            layer_rounding.Method("coordinate"),
            mesh,
            sums,
            kernel,
            quantization.calibrate(kernel, spec),
            posed,
            0.01,
        )
        numbers["efrap_layer"] = {
            "name": layer.name,
            "kernel": list(kernel.shape),
            "images": batch_size,
            "moments": _facts(collect.compile()),
            "descent": _facts(descend.compile()),
        }
    return numbers


def _facts(compiled: Any) -> dict[str, Any]:
    cost = compiled.cost_analysis()
    collectives = _collectives(compiled.as_text())
    return {
        "flops": cost.get("flops", 0.0),
        "bytes_accessed": cost.get("bytes accessed", 0.0),
        "collective_bytes": sum(one["bytes"] for one in collectives),
        "collectives": collectives,
    }


def _collectives(text: str) -> list[dict[str, Any]]:
    """Every kind of collective of a program: where, how often, how many bytes.

    An instruction inside of a loop counts once.
    """
    kinds: dict[tuple[str, str], dict[str, Any]] = {}
    names = "|".join(_COLLECTIVES)
    pattern = rf"= (.*?) ({names})(?:-start)?\("
    for line in text.splitlines():
        if found := re.search(pattern, line):
            shapes, kind = found.groups()
            size = sum(
                _BYTES[dtype] * _product(dimensions)
                for dtype, dimensions in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
            )
            name = re.search(r'op_name="([^"]*)"', line)
            what = _purpose(name[1] if name else "")
            entry = kinds.setdefault(
                (kind, what), {"kind": kind, "in": what, "count": 0, "bytes": 0}
            )
            entry["count"] += 1
            entry["bytes"] += size
    return sorted(kinds.values(), key=lambda entry: -entry["bytes"])


def _purpose(name: str) -> str:
    return "backward pass" if "transpose(" in name else "forward pass"


def _product(dimensions: str) -> int:
    size = 1
    for dimension in filter(None, dimensions.split(",")):
        size *= int(dimension)
    return size


def _count_recompilations() -> dict[str, int]:
    """Compilations before and after the second step of a run on all devices."""
    import jax
    import numpy as np
    import optax

    from nad_jax import models, settings
    from nad_jax.models import common
    from nad_jax.training import augmentation, loop, sharding, steps
    from nad_jax.training import state as state_lib

    compiled = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    model = models.build("resnet_8", num_classes=10, width=0.5)
    tx = optax.sgd(0.1)
    step_fn = steps.make_train_step(steps.classification_loss(model.apply), tx)
    generator = np.random.default_rng(0)
    training = settings.TrainingSettings(
        epochs=4, batch_size=16, learning_rate=0.1, crop_padding=1, flip=True
    )
    by_epoch = []
    loop.fit(
        state_lib.create(
            common.init(model, jax.random.key(0), (8, 8, 1)), tx, jax.random.key(1)
        ),
        generator.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8),
        generator.integers(0, 10, 40).astype(np.int32),
        step_fn=step_fn,
        epochs=training.epochs,
        batch_size=training.batch_size,
        make_batch=augmentation.make_batch(training),
        on_epoch=lambda state, metrics: by_epoch.append(len(compiled)),
        mesh=sharding.data_mesh(),
    )
    return {
        "steps": 2 * training.epochs,
        "devices": jax.device_count(),
        "until_step_2": by_epoch[0],
        "after_step_2": by_epoch[-1] - by_epoch[0],
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| devices | batch | MFLOP | MB touched | MB in collectives | collectives |",
        "|---|---|---|---|---|---|",
    ]
    for program in result["programs"]:
        step = program["train_step"]
        kinds = ", ".join(
            f"{one['count']} {one['kind']} ({one['in']}, {one['bytes'] / 1e3:.1f} kB)"
            for one in step["collectives"]
        )
        lines.append(
            f"| {program['devices']} | {program['batch_size']} "
            f"| {step['flops'] / 1e6:.1f} | {step['bytes_accessed'] / 1e6:.1f} "
            f"| {step['collective_bytes'] / 1e6:.3f} | {kinds or 'none'} |"
        )
    return "\n".join([*lines, json.dumps(result["compilations"])])


if __name__ == "__main__":
    main()
