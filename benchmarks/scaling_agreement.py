# SPDX-License-Identifier: Apache-2.0
"""Do one device, eight devices and two processes come to the same result?

    python -m benchmarks.scaling_agreement --out=results/scaling/agreement.json

The same training, evaluation and EFRAP run as a child with 1 device, again with 1, with
8 virtual devices, and as 2 processes with 2 devices each. All are compared with the
first: bit by bit, in the metrics, in parameters (largest difference relative to the
largest parameter of its array, and relative L2 distance over all), and in the 4-bit
codes. EFRAP starts from the parameters of each run (`codes_equal`), and once more from
one and the same net that no run has trained (`codes_equal_same_net`).

Sums in another order differ in their last bits. `--optimizer=sgd` shows what becomes of
that by itself; Adam divides each gradient by its size, and the last bits of a gradient
near 0 become steps of full size.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
from typing import Any

from benchmarks import results

# Name, processes, devices of each.
_RUNS = (
    ("1 device", 1, 1),
    ("1 device, again", 1, 1),
    ("8 devices", 1, 8),
    ("2 processes x 2 devices", 2, 2),
)
# Optimizer -> learning rate.
_RATES = {"adam": 1e-3, "sgd": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--optimizer", choices=list(_RATES), default="adam")
    parser.add_argument("--child", help="internal: where to put the arrays")
    parser.add_argument("--process", type=int, help="internal")
    parser.add_argument("--processes", type=int, default=1, help="internal")
    parser.add_argument("--port", type=int, help="internal")
    arguments = parser.parse_args()
    if arguments.child:
        _child(arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        outputs = [
            _run(f"{folder}/{number}", processes, devices, arguments)
            for number, (_, processes, devices) in enumerate(_RUNS)
        ]
    rows = [
        {"run": name, **_compare(output, outputs[0])}
        for (name, _, _), output in zip(_RUNS, outputs, strict=True)
    ]
    result = {
        "command": "python -m benchmarks.scaling_agreement "
        f"--optimizer={arguments.optimizer}",
        "model": "resnet_8, width 0.5, 8x8 digits, batch 64",
        "epochs": arguments.epochs,
        "reference": _RUNS[0][0],
        "rows": rows,
    }
    print(_table(result))
    if arguments.out:
        results.write(arguments.out, result)


def _run(
    path: str, processes: int, devices: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    import numpy as np

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    children = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "benchmarks.scaling_agreement"),
                *(f"--child={path}.npz", f"--epochs={arguments.epochs}"),
                *(f"--optimizer={arguments.optimizer}", f"--port={port}"),
                *(f"--process={process}", f"--processes={processes}"),
            ],
            env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        )
        for process in range(processes)
    ]
    codes = [child.wait() for child in children]
    if any(codes):
        raise SystemExit(f"a child failed: exit codes {codes}")
    return dict(np.load(f"{path}.npz"))


def _child(arguments: argparse.Namespace) -> None:
    import jax
    import numpy as np

    from nad_jax import models, settings
    from nad_jax.attacks import triggers
    from nad_jax.data import batches, sources
    from nad_jax.defenses import efrap
    from nad_jax.models import common
    from nad_jax.training import (
        agreement,
        augmentation,
        evaluation,
        joining,
        loop,
        optimizers,
        sharding,
        steps,
    )
    from nad_jax.training import state as state_lib

    if arguments.processes > 1:
        joining.join(
            coordinator_address=f"localhost:{arguments.port}",
            num_processes=arguments.processes,
            process_id=arguments.process,
        )
    mesh = sharding.data_mesh() if jax.device_count() > 1 else None
    train, test = (
        sources.load("digits", split=split, image_size=8) for split in ("train", "test")
    )
    model = models.build("resnet_8", num_classes=10, width=0.5)
    fresh = common.init(model, jax.random.key(0), train.images.shape[1:])
    training = settings.TrainingSettings(
        epochs=arguments.epochs,
        batch_size=64,
        optimizer=arguments.optimizer,
        learning_rate=_RATES[arguments.optimizer],
        crop_padding=1,
        flip=False,
    )
    tx = optimizers.build(training, num_examples=len(train))
    metrics: list[dict[str, float]] = []
    state = loop.fit(
        state_lib.create(fresh, tx, jax.random.key(1)),
        train.images,
        train.labels,
        step_fn=steps.make_train_step(steps.classification_loss(model.apply), tx),
        epochs=training.epochs,
        batch_size=training.batch_size,
        make_batch=augmentation.make_batch(training),
        on_epoch=lambda state, means: metrics.append(means),
        mesh=mesh,
    )
    trained = sharding.unreplicate(state_lib.variables(state))
    rates = evaluation.evaluate(
        lambda variables, images: model.apply(variables, images, train=False),
        trained,
        test.images,
        test.labels,
        trigger=triggers.TRIGGERS["square"](train.images.shape[1:], size=2, margin=0),
        target_labels=0,
        mesh=mesh,
    )
    images = batches.to_float(jax.numpy.asarray(train.images[:256]))
    arrays = {
        "losses": np.asarray([means["loss"] for means in metrics]),
        "rates": np.asarray([rates[name] for name in ("acc", "asr", "ra")], np.float64),
    }
    for path, leaf in jax.tree_util.tree_leaves_with_path(trained):
        arrays[f"params{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    for kind, variables in (("codes", trained), ("same_net", fresh)):
        quantized = efrap.efrap(
            model, variables, images, apply_kwargs={"train": False}, mesh=mesh
        )
        for name, codes in quantized.codes.items():
            arrays[f"{kind}/{name}"] = np.asarray(codes)
    if agreement.is_first():
        np.savez(arguments.child, **arrays)


def _compare(got: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    import numpy as np

    def distance(name):
        largest = np.max(np.abs(expected[name]))
        return float(np.max(np.abs(got[name] - expected[name])) / max(largest, 1e-30))

    def squares(difference):
        names = [name for name in expected if name.startswith("params")]
        return sum(float(np.sum(np.square(difference(n), dtype=float))) for n in names)

    def equal(kind):
        names = [name for name in expected if name.startswith(kind)]
        same = sum(int(np.sum(got[name] == expected[name])) for name in names)
        return same / sum(expected[name].size for name in names)

    return {
        "bitwise_equal": all(np.array_equal(got[n], expected[n]) for n in expected),
        "rates_equal": bool(np.array_equal(got["rates"], expected["rates"])),
        "acc_asr_ra": [float(rate) for rate in got["rates"]],
        "loss_difference": distance("losses"),
        "parameter_difference": max(
            distance(name) for name in expected if name.startswith("params")
        ),
        "parameter_l2_difference": (
            squares(lambda n: got[n] - expected[n]) / squares(lambda n: expected[n])
        )
        ** 0.5,
        "codes_equal": equal("codes"),
        "codes_equal_same_net": equal("same_net"),
    }


def _table(result: dict[str, Any]) -> str:
    lines = [
        "| run | bitwise | rates equal | loss | parameters, max | parameters, L2 "
        "| codes equal | of the same net |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['run']} | {row['bitwise_equal']} | {row['rates_equal']} "
        f"| {row['loss_difference']:.1e} | {row['parameter_difference']:.1e} "
        f"| {row['parameter_l2_difference']:.1e} | {row['codes_equal']:.4%} "
        f"| {row['codes_equal_same_net']:.4%} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
