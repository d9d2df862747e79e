# SPDX-License-Identifier: Apache-2.0
"""Fine-pruning cuts what sleeps, as long as held-out accuracy allows."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.defenses import base, fine_pruning

KEY = jax.random.key(5)
# Two classes told apart by channel 2; channel 0 sleeps, channel 1 is a weak nuisance.
INPUTS = np.asarray([[0.0, 0.1, 3.0], [0.1, 0.2, -3.0]], np.float32)
KERNEL = np.asarray([[9.0, 0.0], [0.0, 1.0], [1.0, -1.0]], np.float32)
LABELS = np.asarray([0, 1], np.int32)


def _choose(tolerance, inputs=INPUTS, validation=INPUTS, labels=LABELS):
    kept = fine_pruning.choose_channels(
        inputs,
        validation,
        labels,
        KERNEL,
        np.zeros(2, np.float32),
        max_accuracy_drop=tolerance,
    )
    return kept.tolist()


def test_quiet_channels_go_first_and_the_one_that_matters_stays():
    assert _choose(0.0) == [False, False, True]


def test_the_order_comes_from_clean_images():
    """Channel 2 sleeps on these images, and it is the first that may not go."""
    assert _choose(0.0, inputs=INPUTS[:, ::-1]) == [True, True, True]


def test_everything_tolerated_leaves_one_channel():
    assert sum(_choose(1.0, inputs=INPUTS[:, ::-1])) == 1


def test_held_out_images_are_needed():
    with pytest.raises(errors.InputError, match="held-out images"):
        _choose(0.0, validation=INPUTS[:0], labels=LABELS[:0])


@pytest.mark.slow
def test_what_was_cut_stays_cut(victim, clean_data, tuning):
    pruning = settings.FinePruningSettings(max_accuracy_drop=1.0)
    result = fine_pruning.run(victim, clean_data, tuning, pruning, key=KEY)
    before = np.asarray(victim.variables["params"]["head"]["kernel"])
    after = np.asarray(result.variables["params"]["head"]["kernel"])
    alive = np.any(after != 0, axis=1)
    assert alive.sum() == 1 and np.all(before != 0)
    assert result.chosen == {"channels_cut": len(alive) - 1, "channels": len(alive)}
    assert not np.array_equal(after[alive], before[alive]), "nothing was fine-tuned"


class _Convolutional(nn.Module):
    @nn.compact
    def __call__(self, images, train=False):
        maps = nn.Conv(3, (3, 3), use_bias=False, name="conv")(images)
        return maps.mean(axis=(1, 2)), {"stage1": maps}


def test_a_net_without_a_dense_head_is_refused(clean_data, tuning):
    kernel = np.ones((3, 3, 1, 3), np.float32)
    net = base.Net(_Convolutional(), {"params": {"conv": {"kernel": kernel}}})
    with pytest.raises(errors.InputError, match="conv is a convolution"):
        fine_pruning.run(
            net, clean_data, tuning, settings.FinePruningSettings(), key=KEY
        )
