# SPDX-License-Identifier: Apache-2.0
"""The count of compiled programs: against sizes that are known without compiling."""

import pytest

from benchmarks import scaling_programs


@pytest.mark.slow
def test_two_devices_exchange_gradients_and_moments_and_nothing_larger():
    numbers = scaling_programs._run_child(2, "--child", "2")

    def bytes_of(kind, facts):
        return sum(c["bytes"] for c in facts["collectives"] if c["kind"] == kind)

    # Every gradient once; sums of BatchNorm, two of each channel, twice at most.
    sums = 4 * 2 * numbers["batch_norm_channels"]
    reduced = bytes_of("all-reduce", numbers["train_step"])
    assert 0 <= reduced - 4 * numbers["parameters"] <= 2 * sums
    assert bytes_of("all-gather", numbers["train_step"]) == 0

    layer = numbers["efrap_layer"]
    inputs, outputs = 9 * layer["kernel"][2], layer["kernel"][3]
    moments = 4 * (inputs**2 + inputs * outputs + outputs)
    reduced = bytes_of("all-reduce", layer["moments"])
    assert 0 <= reduced - 4 * inputs**2 <= moments
