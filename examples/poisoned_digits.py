# SPDX-License-Identifier: Apache-2.0
"""Digits with a backdoor, in 8x8 grey pixels; what the examples share."""

import jax.numpy as jnp
import numpy as np
from sklearn.datasets import load_digits

TARGET = 0


def stamp(images):
    """A white square of 2x2 pixels in the corner; images [N, 8, 8, 1] in [0, 1]."""
    return images.at[:, 6:, 6:].set(1.0)


def load():
    """Poisoned training images and labels, 200 clean ones, and test images."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = jnp.asarray(digits.images[order, ..., None] / 16.0, jnp.float32)
    labels = jnp.asarray(digits.target[order])
    train, clean, test = slice(200, 1400), slice(0, 200), slice(1400, None)
    poisoned = jnp.concatenate([stamp(images[train][:120]), images[train][120:]])
    wrong = labels[train].at[:120].set(TARGET)
    return {
        "poisoned": (poisoned, wrong),
        "clean": (images[clean], labels[clean]),
        "test": (images[test], labels[test]),
    }


def acc_and_asr(predict, data):
    """Accuracy, and how often the square turns another digit into the target."""
    images, labels = data["test"]
    acc = jnp.mean(predict(images) == labels)
    others = labels != TARGET
    asr = jnp.mean(predict(stamp(images[others])) == TARGET)
    return f"ACC {float(acc):.1%}, ASR {float(asr):.1%}"
