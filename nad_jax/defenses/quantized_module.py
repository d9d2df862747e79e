# SPDX-License-Identifier: Apache-2.0
"""A quantized module: integer codes, their grids, and how each layer came about."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from nad_jax import errors
from nad_jax.core import quantization
from nad_jax.defenses import sum_grids
from nad_jax.models import layers as layers_lib
from nad_jax.models import sums


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
      name: Path joined by "/".
      kernel_shape: Shape of the kernel.
      bits: Width of its codes.
      flip_rate: Share of weights not at nearest, in [0, 1].
      objective_nearest: Objective of nearest rounding on the same inputs, summed over
        channels; None for methods that look at no images.
      objective: The same for the rounding chosen.
      soft_output_error: Of the soft rounding before hardening ("adam" only).
      hard_output_error: After it.
      objective_descent: What coordinate descent would have reached here, on the same
        inputs at the same prices ("adam" with `beside_descent` only).
      trace: Objective after each sweep ("coordinate" only).
      converged: Whether no single flip would gain any more ("coordinate" only); False
        when `max_sweeps` ended the descent.
      path: For each weight of `flip_weight_path` the mapping `flip_weight`,
        `output_error` (summed over channels, without price) and `flip_rate` of a
        rounding by it on the same inputs ("coordinate" only).
      seconds: Wall time of this layer.
    """

    name: str
    kernel_shape: tuple[int, ...]
    bits: int
    flip_rate: float
    objective_nearest: float | None = None
    objective: float | None = None
    soft_output_error: float | None = None
    hard_output_error: float | None = None
    objective_descent: float | None = None
    trace: tuple[float, ...] = ()
    converged: bool | None = None
    path: tuple[Mapping[str, float], ...] = ()
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class FinishedLayer:
    """A layer that need not be solved again.

    Attributes:
      codes: In the kernel's shape, see `Quantized`.
      params: Scale and zero point of the kernel.
      report: What happened to it.
    """

    codes: Any
    params: quantization.QuantParams
    report: LayerReport


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized module: integer codes, their grids, and the floats they stand for.

    Attributes:
      module: The module that was quantized.
      variables: Same structure as the input; kernels are on their grids, so
        `module.apply(quantized.variables, images)` runs with float activations.
      codes: Layer name -> codes in the kernel's shape, int8 or uint8; int32 for
        "channel_split", whose codes are sums.
      quant_params: Layer name -> scale and zero point of the kernel.
      specs: Layer name -> the grid's description.
      layers: Layer name -> `LayerReport`, in the order of the forward pass.
      act_specs: Layer name -> description of the grid of its input; empty for float
        activations.
      act_params: Layer name -> scale and zero point of the layer's input; with
        `quantize_sums` also name of a sum's operand -> the same, as in `act_specs`.
      apply_kwargs: Keyword arguments of the module's call.
    """

    module: nn.Module
    variables: dict[str, Any]
    codes: dict[str, jax.Array]
    quant_params: dict[str, quantization.QuantParams]
    specs: dict[str, quantization.QuantSpec]
    layers: dict[str, LayerReport]
    act_specs: dict[str, quantization.QuantSpec] = dataclasses.field(
        default_factory=dict
    )
    act_params: dict[str, quantization.QuantParams] = dataclasses.field(
        default_factory=dict
    )
    apply_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def act_spec(self) -> quantization.QuantSpec | None:
        """The one description of all inputs' grids; None for float activations.

        Raises:
          InputError: the first and the last layer have a width of their own.
        """
        specs = set(self.act_specs.values())
        if len(specs) > 1:
            widths = sorted({spec.bits for spec in specs})
            raise errors.InputError(
                f"layer inputs have {' and '.join(map(str, widths))} bits, and one "
                "width is asked for; give act_bits and first_last_bits the same"
            )
        return next(iter(specs), None)

    @property
    def flip_rate(self) -> float:
        """Share of all quantized weights that are not at nearest."""
        sizes = [np.prod(layer.kernel_shape) for layer in self.layers.values()]
        rates = [layer.flip_rate for layer in self.layers.values()]
        return float(np.average(rates, weights=sizes))

    def apply(self, variables: Mapping[str, Any], images: jax.Array) -> Any:
        """`module.apply` with activations quantized where `act_bits` was given.

        Args:
          variables: `self.variables`, or any of the same structure.
          images: A batch.
        """
        return apply_quantized(
            self.module,
            variables,
            images,
            self.act_params,
            act_spec=self.act_specs or None,
            apply_kwargs=self.apply_kwargs,
        )


def apply_quantized(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    act_params: Mapping[str, quantization.QuantParams],
    *,
    act_spec: quantization.QuantSpec | Mapping[str, quantization.QuantSpec] | None,
    apply_kwargs: Mapping[str, Any],
) -> Any:
    """`module.apply` with every layer's input, and sums' operands, on their grids.

    Pure, so it may be jitted, sharded and differentiated (straight-through).

    Args:
      module: The module.
      variables: Its variables, usually with kernels on their grids.
      images: A batch.
      act_params: Layer name -> grid of the layer's input; name of a sum's operand
        (`models.sums`) -> its grid, for all sums or none.
      act_spec: Description of those grids, one for all layers or by layer name; None
        leaves activations alone.
      apply_kwargs: Keyword arguments of the module's call.
    """

    def quantize_inputs(next_fun, args, kwargs, context):
        if act_spec is None or not layers_lib.is_layer_call(context):
            return next_fun(*args, **kwargs)
        name = "/".join(context.module.path)
        spec = act_spec[name] if isinstance(act_spec, Mapping) else act_spec
        inputs = layers_lib.input_of(args, kwargs)
        return next_fun(quantization.fake_quant(inputs, act_params[name], spec))

    def forward(images):
        with nn.intercept_methods(quantize_inputs):
            return module.apply(variables, images, **apply_kwargs)

    if act_spec is not None and any(map(sums.is_operand, act_params)):
        return sum_grids.apply(forward, images, act_params, act_spec)
    return forward(images)
