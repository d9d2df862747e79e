# SPDX-License-Identifier: Apache-2.0
"""The attention of a frozen teacher, computed once for a few views of each image.

A view is one crop, mirroring and hole. The teacher never changes, so its attention at a
view need not be computed again each time a student sees it:

    maps_fn     the teacher's pass, compiled
    build       N images x V views -> attention maps       V teacher passes, once
    make_batch  each image of a batch at one of its V views, and the maps of that view

The student then sees V variations of each image where it would see a new one in every
epoch, and its batches are no longer those of the other defences. What that does to a
repair stands in `results/nad/blend_views_*.json`.

N = images, V = views of each, B = batch, H = height, W = width.
"""

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import numpy as np

from nad_jax import settings
from nad_jax.core import attention
from nad_jax.data import batches
from nad_jax.defenses import base
from nad_jax.training import augmentation, evaluation, loop
from nad_jax.training import state as state_lib

# (variables, images uint8 [B, H, W, C], views [B, 5]) -> stage name -> maps [B, H, W]
MapsOf = Callable[[Any, Any, Any], dict[str, Any]]


class ViewBank(NamedTuple):
    """Views and what the teacher attends to in them.

    Attributes:
      views: See `batches.draw_views`, float32 `[N, V, 5]`.
      maps: Stage name -> `attention.attention_map` of each view, `[N, V, H, W]`.
    """

    views: np.ndarray
    maps: dict[str, np.ndarray]


def maps_fn(
    model: Any,
    training: settings.TrainingSettings,
    *,
    stages: Collection[str],
    p: float,
    reduction: str,
) -> MapsOf:
    """Compiled function from a teacher's variables, images and views to its maps.

    Args:
      model: The teacher's architecture.
      training: How the student's images are varied.
      stages: Names of the stages whose maps are kept.
      p: Power of the attention map.
      reduction: "sum" or "mean" over channels.
    """

    def maps_of(variables: Any, images: jax.Array, views: jax.Array) -> dict[str, Any]:
        pixels = augmentation.show_views(training, views, batches.to_float(images))
        _, features = model.apply(variables, pixels, train=False)
        return {
            stage: attention.attention_map(features[stage], p=p, reduction=reduction)
            for stage in stages
        }

    return jax.jit(maps_of)


def build(
    maps_of: MapsOf,
    variables: Any,
    images: np.ndarray,
    *,
    views: int,
    key: jax.Array,
    should_stop: base.ShouldStop | None = None,
) -> ViewBank:
    """The bank of one teacher; 4 bytes per image, view and position of a map.

    Args:
      maps_of: From `maps_fn`.
      variables: Of the teacher.
      images: uint8 `[N, H, W, C]`.
      views: V, at least 1.
      key: Of the student's training; decides the views.
      should_stop: Asked between batches.

    Raises:
      TrainingInterrupted: `should_stop` returned True.
    """
    count = len(images)
    drawn = batches.draw_views(
        state_lib.derive_key(key, state_lib.VIEWS), count * views
    )
    drawn = np.asarray(drawn).reshape(count, views, -1)
    indices, mask = batches.evaluation_batches(
        count, min(evaluation.DEFAULT_BATCH_SIZE, count)
    )
    of_views = []
    for view in range(views):
        found = []
        for rows in np.asarray(indices):
            if should_stop is not None and should_stop():
                raise loop.TrainingInterrupted(
                    f"stopped at view {view + 1} of {views} of the teacher's maps, "
                    "which are made anew"
                )
            maps = maps_of(variables, images[rows], drawn[rows, view])
            found.append(jax.device_get(maps))
        of_views.append(
            jax.tree.map(lambda *parts: np.concatenate(parts)[mask.reshape(-1)], *found)
        )
    maps = jax.tree.map(lambda *maps: np.stack(maps, axis=1), *of_views)
    return ViewBank(drawn, maps)


def make_batch(training: settings.TrainingSettings) -> loop.MakeBatch:
    """`make_batch` of `loop.fit` whose companions are a `ViewBank`.

    The batch has "images", "labels" and, by stage, "teacher_maps" `[B, H, W]`; which of
    its views an image is shown at is drawn anew in every step.
    """

    def batch_of(key, images, labels, views, maps):
        chosen = jax.random.randint(key, labels.shape, 0, views.shape[1])

        def of_view(values):
            return jax.vmap(lambda own, view: own[view])(values, chosen)

        pixels = augmentation.show_views(
            training, of_view(views), batches.to_float(images)
        )
        return {
            "images": pixels,
            "labels": labels,
            "teacher_maps": jax.tree.map(of_view, maps),
        }

    return batch_of
