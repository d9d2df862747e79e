# SPDX-License-Identifier: Apache-2.0
"""Learning rates at the steps where they matter."""

import jax
import numpy as np
import pytest

from nad_jax import settings
from nad_jax.training import optimizers


def _rates(at, **values):
    training = settings.TrainingSettings(epochs=10, learning_rate=0.1, **values)
    schedule = optimizers.schedule(training, steps_per_epoch=4)
    # As in the training step: some schedules of optax mix dtypes.
    with jax.numpy_dtype_promotion("standard"):
        return [float(schedule(step)) for step in at]


def test_steps_fall_after_each_milestone():
    rates = _rates([0, 7, 8, 19, 20, 39], schedule="steps", milestones=(2, 5))
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schedule", "first", "last"),
    [("constant", 0.1, 0.1), ("cosine", 0.1, 0.0), ("one_cycle", 0.004, 0.0)],
)
def test_the_other_schedules_begin_and_end(schedule, first, last):
    rates = _rates([0, 40], schedule=schedule)
    np.testing.assert_allclose(rates, [first, last], atol=1e-5)
