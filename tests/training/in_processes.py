# SPDX-License-Identifier: Apache-2.0
"""Run by `joining_test` as two processes, which SLURM's variables announce.

    python in_processes.py OUT

Each writes what was agreed upon to OUT.<process>.json, and process 0 the results of
`work` to OUT.npz. `work` is also run by the
test itself, in one process, as the reference.
"""

import json
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from nad_jax import errors, workdir
from nad_jax.attacks import triggers
from nad_jax.data import batches, stored
from nad_jax.defenses import efrap
from nad_jax.training import agreement, evaluation, joining, loop, sharding, steps
from nad_jax.training import state as state_lib


class SmallNet(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        x = nn.Conv(8, (3, 3), use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.8)(x))
        return nn.Dense(3)(x.mean(axis=(1, 2))), {}


class ArrayReader:
    """A `stored.Reader` of an array; remembers how many rows it is asked for."""

    identity = "an array"

    def __init__(self, images: np.ndarray):
        self._images = images
        self.shape = images.shape
        self.widths: list[int] = []

    def read(self, rows: np.ndarray) -> np.ndarray:
        self.widths.append(len(rows))
        return self._images[rows]


def train(mesh: Any) -> tuple[Any, dict[str, Any]]:
    """A net trained on a mesh from arrays, and what became of it from files."""
    generator = np.random.default_rng(1)
    images = generator.integers(0, 256, (37, 6, 6, 1), dtype=np.uint8)
    labels = (images.mean(axis=(1, 2, 3)) > 128).astype(np.int32)
    net = SmallNet()
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 6, 6, 1)))
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            generator.normal(size=leaf.shape, scale=0.3).astype(np.float32)
            if path[-1].key == "kernel"
            else np.full(leaf.shape, path[-1].key in ("scale", "var"), np.float32)
        ),
        shapes,
    )
    tx = optax.sgd(0.1)

    def make_batch(key, images, labels):
        views = batches.draw_views(key, images.shape[0])
        pixels = batches.show_views(views, batches.to_float(images), pad=1)
        return {"images": pixels, "labels": labels}

    step_fn = steps.make_train_step(steps.classification_loss(net.apply), tx)
    reader = ArrayReader(images)
    losses, results = [], []
    for source in (images, stored.Images(reader)):
        state = loop.fit(
            state_lib.create(variables, tx, jax.random.key(2)),
            source,
            labels,
            step_fn=step_fn,
            epochs=2,
            batch_size=8,
            make_batch=make_batch,
            on_epoch=lambda state, metrics: losses.append(metrics["loss"]),
            mesh=mesh,
        )
        results.append(sharding.unreplicate(state_lib.variables(state)))
    trained, streamed = results
    same = jax.tree.map(np.array_equal, trained, streamed)
    return (net, images, labels, trained), {
        "losses": np.asarray(losses),
        "stream is the same": np.asarray(jax.tree.leaves(same)),
        "rows read": np.asarray(reader.widths) * jax.process_count(),
    }


def work(mesh: Any) -> dict[str, Any]:
    """Arrays by name: a net trained, evaluated and quantized on a mesh."""
    (net, images, labels, trained), facts = train(mesh)
    trigger = triggers.TRIGGERS["square"]((6, 6, 1), size=2, margin=0)
    rates = evaluation.evaluate(
        lambda variables, images: net.apply(variables, images),
        trained,
        images,
        labels,
        trigger=trigger,
        target_labels=1,
        batch_size=10,
        mesh=mesh,
    )
    quantized = efrap.efrap(
        net, trained, batches.to_float(jnp.asarray(images[:16])), mesh=mesh
    )
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    return {
        **facts,
        "rates": np.asarray([rates[name] for name in sorted(rates)], np.float64),
        **{f"params{jax.tree_util.keystr(path)}": np.asarray(x) for path, x in leaves},
        **{f"codes/{name}": np.asarray(x) for name, x in quantized.codes.items()},
    }


def _raising(error: Exception) -> Any:
    def compute():
        raise error

    return compute


def _message(function, *arguments) -> str:
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def agreements(folder: str) -> dict[str, Any]:
    """What the functions of `agreement` do in this process, and who uses them.

    Args:
        folder: that nobody has made yet.
    """
    me = jax.process_index()
    like = {"a": jnp.zeros((2, 3)), "key": jax.random.key(0), "n": np.zeros(0, np.int8)}
    tree = {"a": jnp.full((2, 3), -0.0), "key": jax.random.key(7), "n": like["n"]}
    got, extra = agreement.tree_from_first(lambda: (tree, {"step": 3}), like)
    # Raised in process 1 alone, after the fourth question.
    flag = agreement.AgreedFlag(lambda: 15 if me == 1 and len(answers) > 3 else 0)
    answers: list[bool] = []
    for _ in range(25):
        answers.append(flag())
    uneven = sharding.mesh_for_batch(9)
    return {
        "first": agreement.from_first(lambda: {"from": me, "text": "x" * 5000}),
        "tree": [bool(np.signbit(got["a"]).all()), extra, got["n"].dtype.name],
        "key": bool(
            jnp.all(jax.random.bits(got["key"]) == jax.random.bits(tree["key"]))
        ),
        "same": agreement.in_all(lambda: "digest"),
        "agreed error": _message(
            agreement.from_first, _raising(errors.InputError("no such file"))
        ),
        "other error": _message(agreement.from_first, _raising(OSError("disk full"))),
        "differs": _message(agreement.in_all, lambda: f"digest {me}"),
        "fails in one": _message(
            agreement.in_all,
            _raising(errors.InputError("no data")) if me else lambda: 1,
        ),
        "flag": [answers.index(True), flag.number],
        "read": agreement.read_in_all(lambda: (me, "digest")),
        "other config": _message(workdir.Workdir, folder, {"seed": me}),
        "same config": _message(workdir.Workdir, folder, {"seed": 0}),
        "shared": sharding.mesh_for_batch(12).size,
        "uneven": None if uneven is None else uneven.size,
    }


def main(out: str) -> None:
    assert joining.join("auto", wait_seconds=60) == 2
    agreed = agreements(f"{out}.run")
    results = work(sharding.data_mesh())
    with open(f"{out}.{jax.process_index()}.json", "w", encoding="utf-8") as file:
        json.dump(agreed, file)
    if agreement.is_first():
        np.savez(f"{out}.npz", **results)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    main(sys.argv[1])
