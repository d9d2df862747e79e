# SPDX-License-Identifier: Apache-2.0
"""The description of a quantization grid; needs no JAX, so that settings load fast."""

import dataclasses

import numpy as np

from nad_jax import errors

RANGE_METHODS = ("absmax", "minmax", "mse")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How a tensor is quantized.

    Attributes:
      bits: Width of a code, 2 to 8.
      symmetric: Signed grid around 0; otherwise unsigned with a zero point.
      channel_axis: Axis that has its own scale per index; None = one scale for the
        whole tensor. -1 is the output channel of Flax `Conv` and `Dense` kernels.
      range_method: "absmax" (largest magnitude), "minmax" (smallest and largest
        value; equal to absmax on a symmetric grid) or "mse" (the shrunken min/max
        range with the least squared error of nearest rounding).
    """

    bits: int = 4
    symmetric: bool = True
    channel_axis: int | None = -1
    range_method: str = "absmax"

    def __post_init__(self):
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise errors.InputError(f"bits must be 2 to 8, got {self.bits!r}")
        if self.range_method not in RANGE_METHODS:
            raise errors.InputError(
                f"range_method must be one of {', '.join(RANGE_METHODS)}, "
                f"got {self.range_method!r}"
            )

    @property
    def qmin(self) -> int:
        return -self.qmax if self.symmetric else 0

    @property
    def qmax(self) -> int:
        # A NumPy integer would not mix with float32 under strict dtype promotion.
        bits = int(self.bits)
        return 2 ** (bits - 1) - 1 if self.symmetric else 2**bits - 1

    @property
    def dtype(self) -> np.dtype:
        """Storage type of the codes."""
        return np.dtype(np.int8 if self.symmetric else np.uint8)
