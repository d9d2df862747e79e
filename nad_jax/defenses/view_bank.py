# SPDX-License-Identifier: Apache-2.0
"""The attention of a frozen teacher, computed once for a few views of each image.

A view is one crop and mirroring. The teacher never changes, so its attention at a view
need not be computed again each time a student sees it:

    build       N images x V views -> attention maps       V teacher passes, once
    make_batch  each image of a batch at one of its V views, and the maps of that view

The student then sees V variations of each image where it would see a new one in every
epoch. What that does to a repair is measured in `benchmarks/README.md`.

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
from nad_jax.training import augmentation
from nad_jax.training import state as state_lib

_BATCH_SIZE = 500


class ViewBank(NamedTuple):
    """Views and what the teacher attends to in them.

    Attributes:
      views: See `batches.draw_views`, float32 `[N, V, 5]`.
      maps: Stage name -> `attention.attention_map` of each view, `[N, V, H, W]`.
    """

    views: np.ndarray
    maps: dict[str, np.ndarray]


def build(
    teacher: base.Net,
    images: np.ndarray,
    training: settings.TrainingSettings,
    *,
    views: int,
    stages: Collection[str],
    p: float,
    reduction: str,
    key: jax.Array,
) -> ViewBank:
    """The bank of one teacher; 4 bytes per image, view and position of a map.

    Args:
      teacher: In evaluation mode.
      images: uint8 `[N, H, W, C]`.
      training: How the student's images are varied.
      views: V, at least 1.
      stages: Names of the stages whose maps are kept.
      p: Power of the attention map.
      reduction: "sum" or "mean" over channels.
      key: Of the student's training; decides the views.
    """
    count = len(images)
    key = state_lib.derive_key(key, state_lib.VIEWS)
    drawn = batches.draw_views(key, count * views)
    drawn = np.asarray(drawn).reshape(count, views, -1)

    @jax.jit
    def maps_of(variables: Any, images: jax.Array, drawn: jax.Array) -> dict[str, Any]:
        pixels = augmentation.show_views(training, drawn, batches.to_float(images))
        _, features = teacher.model.apply(variables, pixels, train=False)
        return {
            stage: attention.attention_map(features[stage], p=p, reduction=reduction)
            for stage in stages
        }

    indices, mask = batches.evaluation_batches(count, min(_BATCH_SIZE, count))
    of_views = []
    for view in range(views):
        found = [
            jax.device_get(maps_of(teacher.variables, images[rows], drawn[rows, view]))
            for rows in np.asarray(indices)
        ]
        of_views.append(
            jax.tree.map(lambda *parts: np.concatenate(parts)[mask.reshape(-1)], *found)
        )
    maps = jax.tree.map(lambda *maps: np.stack(maps, axis=1), *of_views)
    return ViewBank(drawn, maps)


def make_batch(training: settings.TrainingSettings) -> Callable[..., dict[str, Any]]:
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
