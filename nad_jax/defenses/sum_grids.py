# SPDX-License-Identifier: Apache-2.0
"""Grids for the operands of residual sums, so that a runtime can stay in integers.

A convolution whose output goes into a sum, and a shortcut, have no grid of their own:
ONNX Runtime would compute both in float. With these grids every convolution lies
between two grids, and the sum between three. Where an operand is also some layer's
input it has that layer's grid, and is quantized once.

The layer walk, which chooses codes, sees sums in float: their quantization is part of
the evaluation and of the exported file, not of the choice.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from nad_jax.core import quantization
from nad_jax.models import sums

Grid = tuple[quantization.QuantParams, quantization.QuantSpec]


def calibrate(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    inputs: Mapping[str, Grid],
    measure: Callable[[jax.Array], Grid],
    *,
    apply_kwargs: Mapping[str, Any],
) -> dict[str, Grid]:
    """Name of each sum's operand -> its grid and the description of it.

    Args:
      module: The module.
      variables: Its float variables.
      images: Calibration images.
      inputs: The same by layer, of the layers' inputs.
      measure: The same for a tensor's values.
      apply_kwargs: Keyword arguments of the module's call.
    """
    grids: dict[str, Grid] = {}

    def record(name, value, layer):
        grids[name] = measure(value) if layer is None else inputs[layer]
        return value

    sums.run(lambda x: module.apply(variables, x, **apply_kwargs), images, record)
    return grids


def apply(
    function: Callable[[jax.Array], Any],
    images: jax.Array,
    act_params: Mapping[str, quantization.QuantParams],
    act_spec: quantization.QuantSpec | Mapping[str, quantization.QuantSpec],
) -> Any:
    """`function(images)` with the operands of its sums on their grids."""

    def move(name, value, layer):
        del layer
        spec = act_spec[name] if isinstance(act_spec, Mapping) else act_spec
        return quantization.fake_quant(value, act_params[name], spec)

    return sums.run(function, images, move)
