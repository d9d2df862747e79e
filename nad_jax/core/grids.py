# SPDX-License-Identifier: Apache-2.0
"""Whole grids by name: what a runtime does to weights and to layer inputs by default.

A `Grid` is everything about quantization but the widths and the rounding. `GRIDS` holds
those that users deploy, so that a defence can be tried on the very grid that a model
will meet. Needs no JAX, so that settings load fast.
"""

import dataclasses

from nad_jax import errors
from nad_jax.core import quant_spec


@dataclasses.dataclass(frozen=True)
class Grid:
    """Attributes:
    symmetric: Weights: signed around 0; otherwise unsigned with a zero point.
    per_channel: One weight scale per output channel; otherwise one per layer.
    range_method: Of the weights, see `QuantSpec`.
    percentile: Goes with range_method "percentile".
    narrow_from_bits: Width from which symmetric weights do without their lowest code;
      2 = always, 9 = never.
    first_last_bits: Width of weights and inputs of the first and the last layer;
      None = as the others.
    fold_batch_norm: The runtime folds BatchNorm into the layers before quantizing.
    act_range_method: Of layer inputs, whose grid is affine and per tensor.
    act_percentile: Goes with act_range_method "percentile".
    act_ema: Weight of the past where the ranges of calibration batches are averaged;
      None = one range for all images together.
    act_reduce_range: Layer inputs do without their highest bit, as kernels need whose
      16-bit sums would overflow.
    """

    symmetric: bool = True
    per_channel: bool = True
    range_method: str = "absmax"
    percentile: float | None = None
    narrow_from_bits: int = 2
    first_last_bits: int | None = None
    fold_batch_norm: bool = False
    act_range_method: str = "mse"
    act_percentile: float | None = None
    act_ema: float | None = 0.9
    act_reduce_range: bool = False

    def __post_init__(self):
        # Both refuse what cannot be; widths are checked where they are known.
        self.weight_spec(8)
        self.act_spec(8)
        if self.range_method not in quant_spec.WEIGHT_RANGE_METHODS:
            raise errors.InputError(
                f"range_method {self.range_method} measures activations; for weights "
                f"take one of {', '.join(quant_spec.WEIGHT_RANGE_METHODS)}"
            )
        if self.first_last_bits is not None:
            check_bits("first_last_bits", self.first_last_bits)
        if self.act_ema is not None and not 0 <= self.act_ema < 1:
            raise errors.InputError(f"act_ema must be in [0, 1), got {self.act_ema}")

    def weight_spec(self, bits: int) -> quant_spec.QuantSpec:
        """The grid of a kernel."""
        check_bits("weight_bits", bits)
        return quant_spec.QuantSpec(
            int(bits),
            self.symmetric,
            -1 if self.per_channel else None,
            self.range_method,
            bits >= self.narrow_from_bits,
            self.percentile,
        )

    def act_spec(self, bits: int) -> quant_spec.QuantSpec:
        """The grid of a layer's input."""
        check_bits("act_bits", bits)
        if self.act_reduce_range and bits == 2:
            raise errors.InputError(
                "act_bits must be 3 to 8 on a grid with act_reduce_range, got 2"
            )
        return quant_spec.QuantSpec(
            int(bits) - self.act_reduce_range,
            symmetric=False,
            channel_axis=None,
            range_method=self.act_range_method,
            percentile=self.act_percentile,
        )


def check_bits(name: str, value: object) -> None:
    """Raises `InputError` unless `value` is a width from 2 to 8."""
    if isinstance(value, bool) or value not in range(2, 9):
        raise errors.InputError(f"{name} must be 2 to 8, got {value!r}")


# PyTorch's default observers: weights over all 256 codes, activations by a histogram.
_PYTORCH = Grid(
    narrow_from_bits=9,
    fold_batch_norm=True,
    act_range_method="histogram",
    act_ema=None,
)

GRIDS: dict[str, Grid] = {
    # What this package does unless told otherwise.
    "plain": Grid(),
    # EFRAP's public code (the "academic" back end of MQBench): affine weights of least
    # squared error, 8 bits at both ends, BatchNorm left alone.
    "efrap_reference": Grid(symmetric=False, range_method="mse", first_last_bits=8),
    # get_default_qconfig("fbgemm"), today's "x86" as well.
    "pytorch_fbgemm": dataclasses.replace(_PYTORCH, act_reduce_range=True),
    # get_default_qconfig("qnnpack").
    "pytorch_qnnpack": dataclasses.replace(_PYTORCH, per_channel=False),
    # quantize_static without options: int8 mirrors, int4 uses all 16 codes; its signed
    # activations are the unsigned ones here, shifted by half the codes.
    "onnxruntime": Grid(
        per_channel=False,
        narrow_from_bits=8,
        fold_batch_norm=True,
        act_range_method="minmax",
        act_ema=None,
    ),
    # The converter's full integer mode.
    "litert": Grid(
        fold_batch_norm=True,
        act_range_method="minmax",
        act_ema=None,
    ),
}


def named(name: str) -> Grid:
    """The grid of that name.

    Raises:
      InputError: there is none.
    """
    if name not in GRIDS:
        raise errors.InputError(f"grid must be one of {', '.join(GRIDS)}, got {name!r}")
    return GRIDS[name]
