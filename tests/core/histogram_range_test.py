# SPDX-License-Identifier: Apache-2.0
"""The histogram search keeps what is worth its codes and gives up the rest."""

import numpy as np
import pytest

from nad_jax.core import histogram_range


def test_evenly_spread_values_keep_their_range():
    values = np.linspace(-1.0, 3.0, 200_001)
    low, high = histogram_range.histogram_range(values, codes=256)
    assert low == pytest.approx(-1.0, abs=0.02) and high == pytest.approx(3.0, abs=0.02)


def test_a_lone_outlier_is_given_up_and_the_bulk_is_kept():
    values = np.append(np.random.default_rng(0).normal(size=100_000), 100.0)
    low, high = histogram_range.histogram_range(values, codes=16)
    assert -6.0 < low < -1.5 and 1.5 < high < 6.0


def test_equal_values_have_an_empty_range():
    assert histogram_range.histogram_range(np.full(7, 2.5), codes=256) == (2.5, 2.5)


@pytest.mark.parametrize("kept", [(0, 2047), (100, 1500), (700, 703)])
@pytest.mark.parametrize("codes", [4, 16, 256])
def test_the_error_is_that_of_values_moved_to_cell_centres(kept, codes):
    """Against a sum over a fine grid inside every bin."""
    counts = np.random.default_rng(1).integers(0, 9, 2048)
    first, last = kept
    cell = (last - first + 1) / codes
    inside = (np.arange(400) + 0.5) / 400
    values = np.arange(2048)[:, None] - first + inside
    cells = np.clip(np.floor(values / cell), 0, codes - 1)
    squares = np.square(values - (cells + 0.5) * cell).mean(axis=1)
    got = histogram_range._rounding_error(counts, kept, codes)
    assert got == pytest.approx(float(np.sum(counts * squares)), rel=2e-3)


def test_the_search_ends_where_its_next_move_would_lose():
    """The range it returns beats the whole range and its own neighbours outside."""
    values = np.random.default_rng(2).laplace(size=50_000)
    low, high = histogram_range.histogram_range(values, codes=16)
    counts, edges = np.histogram(values, 2048)
    ends = np.searchsorted(edges, [low + 1e-9, high - 1e-9]) - 1
    error = histogram_range._rounding_error(counts, (ends[0], ends[1]), 16)
    for wider in ((0, 2047), (ends[0] // 2, (2047 + ends[1]) // 2)):
        assert error < histogram_range._rounding_error(counts, wider, 16)
