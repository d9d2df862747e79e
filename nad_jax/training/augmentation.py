# SPDX-License-Identifier: Apache-2.0
"""What a stage of training does to stored images before the model sees them."""

import jax

from nad_jax import settings
from nad_jax.data import batches
from nad_jax.training import loop


def make_batch(training: settings.TrainingSettings) -> loop.MakeBatch:
    """The `make_batch` of a stage: pixels to [0, 1], then crop, mirror and cutout."""

    def batch_of(key, images, labels):
        pixels = augment(training, key, batches.to_float(images))
        return {"images": pixels, "labels": labels}

    return batch_of


def augment(
    training: settings.TrainingSettings, key: jax.Array, pixels: jax.Array
) -> jax.Array:
    """Images `[B, H, W, C]` with the crop, mirror and cutout of a stage."""
    views = batches.draw_views(key, pixels.shape[0])
    return show_views(training, views, pixels)


def show_views(
    training: settings.TrainingSettings, views: jax.Array, pixels: jax.Array
) -> jax.Array:
    """The same for views that were drawn before (`batches.draw_views`)."""
    if not (training.crop_padding or training.flip or training.cutout):
        return pixels
    return batches.show_views(
        views,
        pixels,
        pad=training.crop_padding,
        flip=training.flip,
        cutout=training.cutout,
    )
