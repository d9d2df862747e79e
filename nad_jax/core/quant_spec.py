# SPDX-License-Identifier: Apache-2.0
"""The description of a quantization grid; needs no JAX, so that settings load fast."""

import dataclasses

import numpy as np

from nad_jax import errors

WEIGHT_RANGE_METHODS = ("absmax", "minmax", "mse", "percentile", "aciq")
RANGE_METHODS = (*WEIGHT_RANGE_METHODS, "histogram")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized.

    Attributes:
      bits: Width of a code, 2 to 8.
      symmetric: Signed grid around 0; otherwise unsigned with a zero point.
      channel_axis: Axis that has its own scale per index; None = one scale for the
        whole tensor. -1 is the output channel of Flax `Conv` and `Dense` kernels.
      range_method: "absmax" (largest magnitude), "minmax" (smallest and largest
        value; equal to absmax on a symmetric grid), "mse" (the shrunken min/max
        range with the least squared error of nearest rounding), "percentile" (see
        below), "aciq" (so many standard or mean absolute deviations, as fits a normal
        or a Laplace distribution) or "histogram" (the search of PyTorch's histogram
        observer, for activations only).
      narrow: A symmetric grid without its lowest code, so that it mirrors: 127 steps
        of int8 on each side reach the end of the range. Otherwise all codes are used
        and 127.5 steps reach it, so the largest weight is clipped. An affine grid has
        no use for it.
      percentile: Of "percentile" only: the share of values, in per cent, inside each
        end of the range (of their magnitudes on a symmetric grid); in (50, 100].
        Where so many values are 0 that this range is empty, it is that of "minmax".
    """

    bits: int = 4
    symmetric: bool = True
    channel_axis: int | None = -1
    range_method: str = "absmax"
    narrow: bool = True
    percentile: float | None = None

    def __post_init__(self):
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise errors.InputError(f"bits must be 2 to 8, got {self.bits!r}")
        if self.range_method not in RANGE_METHODS:
            raise errors.InputError(
                f"range_method must be one of {', '.join(RANGE_METHODS)}, "
                f"got {self.range_method!r}"
            )
        if (self.percentile is not None) != (self.range_method == "percentile"):
            raise errors.InputError(
                "percentile goes with range_method percentile and with no other, got "
                f"range_method {self.range_method} and percentile {self.percentile}"
            )
        if self.percentile is not None and not 50 < self.percentile <= 100:
            raise errors.InputError(
                f"percentile must be in (50, 100], got {self.percentile}"
            )

    @property
    def qmin(self) -> int:
        if not self.symmetric:
            return 0
        return -self.qmax if self.narrow else -self.qmax - 1

    @property
    def qmax(self) -> int:
        # A NumPy integer would not mix with float32 under strict dtype promotion.
        bits = int(self.bits)
        return 2 ** (bits - 1) - 1 if self.symmetric else 2**bits - 1

    @property
    def steps_per_side(self) -> float:
        """Steps from 0 to the end of a symmetric range: 127 or 127.5 at 8 bits."""
        return (self.qmax - self.qmin) / 2

    @property
    def dtype(self) -> np.dtype:
        """Storage type of the codes."""
        return np.dtype(np.int8 if self.symmetric else np.uint8)
