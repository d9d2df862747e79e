# SPDX-License-Identifier: Apache-2.0
"""The range of values that PyTorch's histogram observer would choose.

On a histogram of all values, both ends move inwards by quantiles, each time the end
that skips more bins, as long as the expected squared error of rounding on the remaining
range goes down. Runs on the host: a greedy search with hundreds of dependent steps.
"""

import numpy as np

_BINS = 2048
_QUANTILE_STEP = 1e-5


def histogram_range(values: np.ndarray, *, codes: int) -> tuple[float, float]:
    """Range `(low, high)` for a grid of `codes` points.

    Args:
      values: float, any shape.
      codes: Grid points, 256 for 8 bits. PyTorch counts 256 even where it reduces the
        range to 7 bits afterwards.

    Returns:
      Ends of the range in value units; the whole range if all values are equal.
    """
    values = np.asarray(values, np.float64).ravel()
    least, most = float(values.min()), float(values.max())
    if least == most:
        return least, most
    counts, _ = np.histogram(values, _BINS, (least, most))
    width = (most - least) / _BINS
    below = np.cumsum(counts) / counts.sum()
    first, last = 0, _BINS - 1
    skipped_low, kept_high = 0.0, 1.0
    least_error = np.inf
    while skipped_low < kept_high:
        next_low, next_high = skipped_low + _QUANTILE_STEP, kept_high - _QUANTILE_STEP
        left = min(max(int(np.searchsorted(below, next_low)), first), last)
        right = int(np.searchsorted(below, next_high, side="right")) - 1
        right = max(min(right, last), first)
        if left - first > last - right:
            moved, skipped_low = (left, last), next_low
        else:
            moved, kept_high = (first, right), next_high
        if moved == (first, last):
            continue
        error = _rounding_error(counts, moved, codes)
        if error > least_error:
            break
        least_error = error
        first, last = moved
    return least + width * first, least + width * (last + 1)


def _rounding_error(counts: np.ndarray, kept: tuple[int, int], codes: int) -> float:
    """Summed squared error, in squared bins, of moving values to cell centres.

    Values are spread evenly over their bin; the `codes` cells divide the kept bins, and
    values outside go to the cell at that end.
    """
    first, last = kept
    cell = (last - first + 1) / codes
    begin = np.arange(_BINS, dtype=np.float64) - first
    end = begin + 1.0
    begin_cell, end_cell = (
        np.clip(np.floor(edge / cell), 0, codes - 1) for edge in (begin, end)
    )

    def cubes(low, high):
        """Integral of x^2."""
        return (high**3 - low**3) / 3.0

    half = cell / 2.0
    error = cubes(begin - (begin_cell + 0.5) * cell, half)
    error += (end_cell - begin_cell - 1) * cubes(-half, half)
    error += cubes(-half, end - (end_cell + 0.5) * cell)
    return float(np.sum(counts * error))
