# SPDX-License-Identifier: Apache-2.0
"""ACC, ASR and RA of a model over a whole data set.

Every image counts exactly once: the last batch is padded and masked, never dropped,
and integers are added up before anything is divided.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nad_jax import errors
from nad_jax.attacks import triggers
from nad_jax.core import metrics
from nad_jax.data import batches
from nad_jax.training import sharding

# (variables, images float [B, H, W, C] in [0, 1]) -> logits or (logits, features)
ApplyFn = Callable[[Any, jax.Array], Any]
Rates = dict[str, float | int | None]
Evaluator = Callable[[Any], Rates]

DEFAULT_BATCH_SIZE = 500
# More do not fit the caches of its cores.
_CPU_BATCH_SIZE = 125


def evaluate(
    apply_fn: ApplyFn,
    variables: Mapping[str, Any],
    images: Any,
    labels: Any,
    *,
    trigger: triggers.Trigger | None = None,
    target_labels: Any = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Rates:
    """Rates of one set of variables; see `make_evaluator`, which serves many."""
    evaluator = make_evaluator(
        apply_fn,
        images,
        labels,
        trigger=trigger,
        target_labels=target_labels,
        batch_size=batch_size,
        mesh=mesh,
    )
    return evaluator(variables)


def make_evaluator(
    apply_fn: ApplyFn,
    images: Any,
    labels: Any,
    *,
    trigger: triggers.Trigger | None = None,
    target_labels: Any = None,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
) -> Evaluator:
    """Function from variables to rates over one data set, compiled once.

    All batches, clean and triggered, run in one program, which is reused for other
    variables of the same shapes.

    Args:
        apply_fn: model in evaluation mode, `(variables, images) -> logits` or
            `(logits, ...)`, with images float in [0, 1] `[B, H, W, C]`.
        images: uint8 `[N, H, W, C]`.
        labels: true labels, int `[N]`.
        trigger: None measures clean accuracy only.
        target_labels: what the attack wants of each image: an int for all of them, or
            int `[N]`.
        batch_size: images per program, lowered to N if that is less; None = 125 on
            CPU without a mesh, 500 elsewhere.
        mesh: from `sharding.data_mesh`, to split each batch over devices; every process
            of a mesh that spans several must call the evaluator, and gets the rates of
            the whole data set.

    Returns:
        A function `variables -> {"acc", "asr", "ra", "acc_count", "asr_count"}`:
        fractions, or None where nothing was counted, and their denominators.

    Raises:
        InputError: arrays that do not fit together, or a trigger without targets. Of
            that function, when it is first called: a label that no logit is of.
    """
    measure = _make_measure(
        apply_fn,
        images,
        labels,
        trigger=trigger,
        target_labels=target_labels,
        batch_size=batch_size,
        mesh=mesh,
        with_predictions=False,
    )
    return lambda variables: measure(variables)[0]


def make_predicting_evaluator(
    apply_fn: ApplyFn, images: Any, labels: Any, **options: Any
) -> Callable[[Any], tuple[Rates, np.ndarray]]:
    """As `make_evaluator`, but its function also returns what was counted.

    Args:
        apply_fn: as there.
        images: uint8 `[N, H, W, C]`.
        labels: int `[N]`.
        **options: as there.

    Returns:
        A function `variables -> (rates, predictions)`: `metrics.predict` of each clean
        image, int32 `[N]`.
    """
    return _make_measure(apply_fn, images, labels, **options, with_predictions=True)


def _make_measure(
    apply_fn,
    images,
    labels,
    *,
    with_predictions,
    trigger=None,
    target_labels=None,
    batch_size=None,
    mesh=None,
) -> Callable[[Any], tuple[Rates, Any]]:
    """`make_evaluator` and `make_predicting_evaluator` in one; None = no predictions.

    They are not collected from all devices where nobody asked for them.
    """
    num_examples = images.shape[0]
    if num_examples == 0:
        raise errors.InputError("there are no images to evaluate on, got 0")
    highest = {}
    labels, highest["labels"] = _as_labels("labels", labels, num_examples)
    if trigger is not None and target_labels is None:
        raise errors.InputError("a trigger needs target_labels, got None")
    targets, highest["target_labels"] = _as_labels(
        "target_labels", 0 if target_labels is None else target_labels, num_examples
    )
    if batch_size is None:
        is_one_cpu = mesh is None and jax.default_backend() == "cpu"
        batch_size = _CPU_BATCH_SIZE if is_one_cpu else DEFAULT_BATCH_SIZE
    batch_size = min(batch_size, num_examples)
    if mesh is not None:
        batch_size += -batch_size % mesh.size
    indices, mask = batches.evaluation_batches(num_examples, batch_size)
    dataset = (images, labels, targets, trigger)
    schedule = list(zip(jnp.asarray(indices), jnp.asarray(mask), strict=True))
    if mesh is None:
        dataset = (jnp.asarray(images), *dataset[1:])
    else:
        dataset, schedule = sharding.replicate((dataset, schedule), mesh)

    @functools.partial(
        jax.jit, out_shardings=None if mesh is None else sharding.replicated(mesh)
    )
    def count(variables: Any, dataset: Any, batch: Any) -> Any:
        images, labels, targets, trigger = dataset
        indices, mask = batch
        clean = batches.to_float(images[indices])
        if mesh is not None:
            clean = sharding.constrain_batch(clean, mesh)
        triggered_logits = None
        if trigger is not None:
            triggered = triggers.apply_trigger(clean, trigger)
            triggered_logits = _logits(apply_fn(variables, triggered))
        clean_logits = _logits(apply_fn(variables, clean))
        for name, label in highest.items():
            if label >= clean_logits.shape[-1]:
                raise errors.InputError(
                    f"{name} must be below {clean_logits.shape[-1]}, the number of "
                    f"logits, got {label}"
                )
        counts = metrics.count_batch(
            clean_logits,
            triggered_logits,
            labels[indices],
            mask,
            target_labels=targets[indices],
        )
        return counts, metrics.predict(clean_logits) if with_predictions else None

    def measure(variables: Any) -> tuple[Rates, Any]:
        if mesh is not None:
            variables = sharding.replicate(variables, mesh)
        found = [count(variables, dataset, batch) for batch in schedule]
        # Fetched once, after everything was started.
        counts, predictions = zip(*jax.device_get(found), strict=True)
        rates = metrics.summarize(functools.reduce(metrics.merge, counts))
        if not with_predictions:
            return rates, None
        return rates, np.concatenate(predictions)[np.asarray(mask).reshape(-1)]

    return measure


def _as_labels(name: str, value: Any, num_examples: int) -> tuple[jax.Array, int]:
    """int32 `[N]` from an int or `[N]`, and the highest label."""
    value = np.asarray(value)
    if value.shape not in ((), (num_examples,)):
        raise errors.InputError(
            f"{name} must be an int or [{num_examples}], one per image, "
            f"got shape {value.shape}"
        )
    if value.min() < 0:
        raise errors.InputError(f"{name} must be >= 0, got {value.min()}")
    labels = np.broadcast_to(value, num_examples).astype(np.int32)
    return jnp.asarray(labels), int(value.max())


def _logits(output: Any) -> jax.Array:
    return output[0] if isinstance(output, tuple) else output
