# SPDX-License-Identifier: Apache-2.0
"""Single steps, through the loop that every run of the program uses.

`fit` tells after each epoch; an epoch of a few steps is the unit, so what is timed
includes the order of the images, their augmentation, and the fetch of the metrics.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import protocol
from benchmarks.ours import start
from nad_jax import models, settings
from nad_jax.defenses import base, nad, view_bank
from nad_jax.models import common
from nad_jax.training import (
    augmentation,
    loop,
    optimizers,
    sharding,
    state,
    steps,
)
from nad_jax.training import (
    evaluation as evaluation_lib,
)

_FOREVER = 10**6
BETAS = {"stage1": 500.0, "stage2": 1000.0, "stage3": 1000.0}


class _Enough(Exception):
    """The driver wants no more."""


def nad_step(channel: protocol.Channel, options: dict) -> None:
    """Student forward and backward, teacher forward, update.

    The options "devices", "augmented", "carried", "attention" and "fixed" take parts
    out, for `benchmarks.step_parts`. With "views" the teacher's maps of so many views
    of each image are kept; each step then pays its share of the passes that made them.
    """
    facts = start.facts(options.get("devices"))
    net, images, labels = scene(options)
    none = images[:0], labels[:0]
    # What the reference does to its images, its 2x2 hole included.
    varied = {"crop_padding": 4, "flip": True, "cutout": 2}
    varied = varied if options.get("augmented", True) else {}
    training = _training(options, weight_decay=1e-4, **varied)
    carried = options.get("carried", True)
    teacher_views = options.get("views", 0)
    kept: dict[str, Any] = {}
    share = 0.0
    if teacher_views:
        kept, share = _keep_maps(net, images, training, teacher_views)
        facts["share_of_bank_seconds"] = share

    def loss_of(frozen: dict[str, Any]) -> steps.LossFn:
        teacher = frozen.get("teacher", net.variables)
        if options.get("attention") == "plain":
            return _plain_attention(net.model, teacher)
        on = options.get("attention") != "none"
        return nad.distillation_loss(
            _FIXED[options.get("fixed")](net.model.apply),
            net.model.apply,
            teacher,
            betas=BETAS if on else dict.fromkeys(BETAS, 0.0),
        )

    def work(on_epoch: Callable[[], None]) -> None:
        base.tune(
            net,
            base.CleanData(images, labels, *none),
            settings.TuningSettings(training),
            make_loss=loss_of,
            frozen={"teacher": net.variables} if carried and not kept else {},
            **kept,
            key=jax.random.key(0),
            on_epoch=lambda variables, metrics: on_epoch(),
        )

    _keep_time(channel, facts, work, options["steps"], more=share)


def _keep_maps(
    net: base.Net, images: np.ndarray, training: settings.TrainingSettings, views: int
) -> tuple[dict[str, Any], float]:
    """What `base.tune` needs of a bank, and a step's share of making one.

    The share is that of the reference's run, 20 epochs of 39 steps on 2,500 images; a
    shorter one pays more. The bank is made twice, because the first time compiles.
    """
    maps_of = view_bank.maps_fn(net.model, training, stages=BETAS, p=2, reduction="sum")

    def build(images: np.ndarray) -> view_bank.ViewBank:
        return view_bank.build(
            maps_of, net.variables, images, views=views, key=jax.random.key(0)
        )

    all_images, _ = _pictures(2500)
    build(all_images)
    started = time.perf_counter()
    build(all_images)
    share = (time.perf_counter() - started) / (20 * 39)
    kept = {"make_batch": view_bank.make_batch(training), "companions": build(images)}
    return kept, share


def _plain_attention(model: Any, teacher: Any) -> steps.LossFn:
    """Our loss with the attention maps of the textbook."""
    from benchmarks.ours import plain

    def loss_fn(params, batch_stats, batch, key):
        del key
        (logits, features), batch_stats = steps.apply_training(
            model.apply, params, batch_stats, batch["images"]
        )
        _, targets = model.apply(teacher, batch["images"], train=False)
        losses = steps.cross_entropy(logits, batch["labels"])
        loss = jnp.mean(losses) + plain.nad_loss(features, targets, BETAS)
        return loss, (batch_stats, {})

    return loss_fn


def _with_fixed_batch_norm(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A student that normalises by what its victim kept.

    A step without it has no sum over the batch but those of the weights' gradients: no
    BatchNorm, however its passes are fused, can be faster.
    """

    def apply(variables, images, *, train, mutable):
        del train, mutable
        output = apply_fn(variables, images, train=False)
        return output, {"batch_stats": variables["batch_stats"]}

    return apply


def _with_fixed_stem(apply_fn: Callable[..., Any]) -> Callable[..., Any]:
    """A student whose first convolution has no gradient to be computed."""

    def apply(variables, images, **options):
        params = dict(variables["params"])
        params["conv1"] = jax.lax.stop_gradient(params["conv1"])
        return apply_fn({**variables, "params": params}, images, **options)

    return apply


_FIXED: dict[str | None, Callable[..., Any]] = {
    None: lambda apply_fn: apply_fn,
    "batch_norm": _with_fixed_batch_norm,
    "stem": _with_fixed_stem,
}


def victim_step(channel: protocol.Channel, options: dict) -> None:
    """Forward, backward, update; no augmentation, as the reference trains victims."""
    facts = start.facts()
    net, images, labels = scene(options)
    training = _training(options, weight_decay=1e-4)
    tx = optimizers.build(training, num_examples=len(labels))

    def work(on_epoch: Callable[[], None]) -> None:
        loop.fit(
            state.create(net.variables, tx, jax.random.key(0)),
            images,
            labels,
            step_fn=steps.make_train_step(
                steps.classification_loss(net.model.apply), tx
            ),
            epochs=_FOREVER,
            batch_size=training.batch_size,
            make_batch=augmentation.make_batch(training),
            steps_per_dispatch=training.steps_per_dispatch,
            on_epoch=lambda state, metrics: on_epoch(),
            mesh=sharding.mesh_for_batch(training.batch_size),
        )

    _keep_time(channel, facts, work, options["steps"])


def evaluation(channel: protocol.Channel, options: dict) -> None:
    """Clean accuracy over all images."""
    facts = start.facts()
    model = models.build(options["arch"], num_classes=10)
    variables = common.init(model, jax.random.key(0), (32, 32, 3))
    images, labels = _pictures(options["images"])
    evaluator = evaluation_lib.make_evaluator(
        lambda variables, x: model.apply(variables, x, train=False)[0],
        images,
        labels,
        mesh=sharding.forward_mesh(),
    )
    evaluator(variables)
    channel.ready(**facts)
    while channel.next():
        started = time.perf_counter()
        evaluator(variables)
        channel.done(time.perf_counter() - started)


def _keep_time(
    channel: protocol.Channel,
    facts: dict[str, Any],
    work: Callable[[Callable[[], None]], None],
    steps_per_epoch: int,
    *,
    more: float = 0.0,
) -> None:
    """Runs `work`, whose every epoch waits for the driver's word.

    `more` seconds are added to each step, for what was done before.
    """
    started: tuple[float, float] | None = None

    def on_epoch() -> None:
        nonlocal started
        now = time.perf_counter(), time.process_time()
        if started is None:
            channel.ready(**facts)
        else:
            wall, processor = (
                (after - before) / steps_per_epoch
                for before, after in zip(started, now, strict=True)
            )
            channel.done(wall + more, cpu_seconds=processor)
        if not channel.next():
            raise _Enough
        started = time.perf_counter(), time.process_time()

    try:
        work(on_epoch)
    except _Enough:
        pass


def scene(options: dict) -> tuple[base.Net, np.ndarray, np.ndarray]:
    model = models.build(options["arch"], num_classes=10)
    variables = common.init(model, jax.random.key(0), (32, 32, 3))
    return base.Net(model, variables), *_pictures(options["batch"] * options["steps"])


def _pictures(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, 32, 32, 3), np.uint8)
    return images, generator.integers(0, 10, count).astype(np.int32)


def _training(options: dict, **more: Any) -> settings.TrainingSettings:
    return settings.TrainingSettings(
        epochs=_FOREVER,
        batch_size=options["batch"],
        optimizer="sgd",
        # Small, so that labels drawn at random do not make the weights diverge.
        learning_rate=1e-4,
        schedule="constant",
        momentum=0.9,
        steps_per_dispatch=options.get("steps_per_dispatch", 1),
        **more,
    )
