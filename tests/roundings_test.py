# SPDX-License-Identifier: Apache-2.0
"""The defender's images: a few of many, in no order."""

import jax
import numpy as np

from nad_jax import roundings
from nad_jax.data import sources

COUNT = 40


def test_calibration_images_come_in_random_order_and_once_each():
    """A folder's images are stored class by class, and methods take them in batches."""
    images = np.broadcast_to(
        np.arange(COUNT, dtype=np.uint8)[:, None, None, None], (COUNT, 2, 2, 1)
    )
    data = sources.Dataset(images, np.zeros(COUNT, np.int32), 1, "counted")

    def rows(wanted, seed=0):
        drawn = roundings.calibration_images(data, wanted, jax.random.key(seed))
        assert drawn.dtype == np.float32 and drawn.shape[1:] == (2, 2, 1)
        return np.rint(np.asarray(drawn)[:, 0, 0, 0] * 255).astype(int).tolist()

    some = rows(20)
    assert len(set(some)) == 20 and some != sorted(some)
    assert some == rows(20) and some != rows(20, seed=1)
    assert rows(10) == some[:10]
    assert sorted(rows(10 * COUNT)) == list(range(COUNT))
