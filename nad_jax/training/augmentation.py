# SPDX-License-Identifier: Apache-2.0
"""What a stage of training does to stored images before the model sees them."""

from nad_jax import settings
from nad_jax.data import batches
from nad_jax.training import loop


def make_batch(training: settings.TrainingSettings) -> loop.MakeBatch:
    """The `make_batch` of a stage: pixels to [0, 1], then crop, mirror and cutout."""
    augmented = training.crop_padding or training.flip or training.cutout

    def batch_of(key, images, labels, indices):
        pixels = batches.to_float(images[indices])
        if augmented:
            pixels = batches.augment(
                key,
                pixels,
                pad=training.crop_padding,
                flip=training.flip,
                cutout=training.cutout,
            )
        return {"images": pixels, "labels": labels[indices]}

    return batch_of
