# SPDX-License-Identifier: Apache-2.0
"""Are the grids of an integer file those that its float model has?

Of weights: absolute maximum, min-max, least squares; of activations: what a grid loses
on clean images beside the min-max grid.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from nad_jax.audit_files import FloatModel, IntegerFile
from nad_jax.core import quant_spec, quantization
from nad_jax.defenses import common_sizes
from nad_jax.models import sums

# Relative; a grid recomputed from weights that were folded in another order differs in
# its last bits.
_SCALE_TOLERANCE = 1e-4
# Mean squared error of quantized clean inputs, against that of their min-max grid.
_MAX_ACTIVATION_LOSS = 4.0


@dataclasses.dataclass(frozen=True)
class Grid:
    """What the scales of a layer turned out to be.

    Attributes:
      spec: The grid, or the closest one that was tried.
      words: The same for the reader; "unknown" if none was close.
      reason: A finding, or None.
    """

    spec: quantization.QuantSpec
    words: str
    reason: str | None


def explain(kernel: np.ndarray, integers: IntegerFile, name: str) -> Grid:
    """Which grid the scales of one layer are.

    Args:
      kernel: Float weights `[*window, Cin / groups, Cout]`, in the file's form.
      integers: The file.
      name: The layer.
    """
    params = integers.quant_params[name]
    scale = np.asarray(params.scale, np.float64).ravel()
    zero_point = np.asarray(params.zero_point, np.int64).ravel()
    best: tuple[int, float, quantization.QuantSpec] | None = None
    for spec in _candidates(integers, name, scale.size):
        expected = _calibrated(kernel, spec)
        own = np.asarray(expected.scale, np.float64).ravel()
        ratios = scale / own
        far = np.abs(ratios - 1) > _SCALE_TOLERANCE
        # Half a step of zero point may fall to either side.
        far |= np.abs(zero_point - np.asarray(expected.zero_point).ravel()) > 1
        if not far.any():
            return Grid(spec, _words(spec), None)
        worst = float(ratios[np.argmax(np.abs(np.log(ratios)))])
        if best is None or far.sum() < best[0]:
            best = (int(far.sum()), worst, spec)
    assert best is not None
    count, worst, spec = best
    reason = (
        f"{count} of {scale.size} scales are of no grid these weights have; the "
        f"closest is {_words(spec)}, the farthest scale {worst:.3g} times that"
    )
    return Grid(spec, "unknown", reason)


def _candidates(
    integers: IntegerFile, name: str, num_scales: int
) -> Iterator[quantization.QuantSpec]:
    """Grids to try; what the file declares comes first."""
    declared = integers.specs.get(name)
    codes = integers.codes[name]
    symmetric = codes.dtype == np.int8
    axis = None if num_scales == 1 and codes.shape[-1] != 1 else -1
    if declared is not None:
        yield declared
        widths: Sequence[int] = (declared.bits,)
    else:
        widths = range(integers.storage_bits[name], 1, -1)
    for bits in widths:
        for narrow in (True, False) if symmetric else (True,):
            for method in quant_spec.WEIGHT_RANGE_METHODS:
                if method != "percentile":  # of which there are too many to try
                    yield quantization.QuantSpec(bits, symmetric, axis, method, narrow)


def _words(spec: quantization.QuantSpec) -> str:
    return (
        f"{spec.range_method} {'symmetric' if spec.symmetric else 'affine'} "
        f"{'' if spec.narrow or not spec.symmetric else 'over all codes '}"
        f"{spec.bits} bits per {'tensor' if spec.channel_axis is None else 'channel'}"
    )


def _calibrated(kernel: np.ndarray, spec) -> quantization.QuantParams:
    padded = common_sizes.pad_kernel(kernel)
    params = common_sizes.kernel_params(kernel, spec, padded)
    return jax.tree.map(lambda x: common_sizes.trim(x, kernel.shape), params)


def find_in_sums(
    floats: FloatModel, integers: IntegerFile, images: jax.Array
) -> list[str]:
    """Findings about the grids of sums' operands.

    Args:
      floats: The model, in the file's form.
      integers: The file.
      images: Clean images, float `[N, H, W, C]` in [0, 1].
    """
    reasons: list[str] = []

    def look(name, value, layer):
        del layer
        if name not in integers.act_params:
            reasons.append(f"operand {name} has no grid, others have")
            return value
        spec = integers.act_spec
        assert spec is not None
        loss = activation_loss(value, integers.act_params[name], spec)
        reasons.extend(find_in_loss(f"the grid of {name}", loss))
        return value

    if any(map(sums.is_operand, integers.act_params)):
        sums.run(
            lambda x: floats.module.apply(floats.variables, x, **floats.apply_kwargs),
            images,
            look,
        )
    return reasons


def find_in_loss(what: str, loss: float) -> list[str]:
    """A finding, or none, about a grid of activations with that `activation_loss`."""
    if loss <= _MAX_ACTIVATION_LOSS:
        return []
    return [f"{what} loses {loss:.3g} times what a min-max grid loses on clean images"]


def activation_loss(
    inputs: Any, params: quantization.QuantParams, spec: quantization.QuantSpec
) -> float:
    """Squared error of a grid on float inputs, against the min-max grid's.

    Args:
      inputs: Float, any shape.
      params: The file's grid for them, one number each.
      spec: Its description.
    """
    values = np.asarray(inputs, np.float64).ravel()

    def error(scale, zero_point):
        codes = np.clip(np.round(values / scale) + zero_point, spec.qmin, spec.qmax)
        return np.mean((scale * (codes - zero_point) - values) ** 2)

    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    step = max(high - low, 1e-30) / (spec.qmax - spec.qmin)
    plain = error(step, np.clip(np.round(spec.qmin - low / step), spec.qmin, spec.qmax))
    own = error(float(params.scale), float(params.zero_point))
    # Stored pixels may lie on the min-max grid; no other grid could compete.
    return float(own / max(plain, step**2 / 12))
