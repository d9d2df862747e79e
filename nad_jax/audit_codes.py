# SPDX-License-Identifier: Apache-2.0
"""What clean images say about the codes of each layer that are not nearest.

Two passes walk side by side, of the float model and of the file, and the second moments
of each layer's inputs tell what its codes cost (`core.code_evidence`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import audit_grids
from nad_jax.audit_files import FloatModel, IntegerFile
from nad_jax.core import code_evidence, quantization, solvers
from nad_jax.defenses import layer_walk
from nad_jax.defenses import moments as moments_lib
from nad_jax.models import layers as layers_lib


@dataclasses.dataclass(frozen=True)
class Evidence:
    """Evidence from clean images about one layer.

    Attributes:
      gain: Share of nearest rounding's output error that the file's rounding removes;
        negative if it adds.
      separation: In [0, 1], how well one price divides flipped codes from the others.
      price: That price.
      beyond_pays: Whether codes that are neither neighbour lower the output error.
      activation_loss: What the grid of the layer's input loses, see `audit_grids`; None
        for float activations.
    """

    gain: float
    separation: float
    price: float
    beyond_pays: bool
    activation_loss: float | None


def weigh(
    floats: FloatModel,
    integers: IntegerFile,
    images: jax.Array,
    layers: Sequence[layers_lib.Layer],
    offsets: Mapping[str, code_evidence.Offsets],
    *,
    check_stop: Callable[[], None],
) -> dict[str, Evidence]:
    """Layer name -> evidence.

    Args:
      floats: The model, in the file's form.
      integers: The file.
      images: Clean images, float `[N, H, W, C]` in [0, 1].
      layers: In the order of the forward pass.
      offsets: Layer name -> where its codes stand, arrays of the kernel's shape.
      check_stop: Called before each layer; whatever it raises ends the walk.
    """
    collector = moments_lib.Collector()
    found: dict[str, Evidence] = {}

    def quantized(layer, inputs):
        if integers.act_spec is None:
            return inputs
        params = integers.act_params[layer.name]
        return quantization.fake_quant(
            inputs, jax.tree.map(jnp.asarray, params), integers.act_spec
        )

    def visit(layer, float_inputs, inputs):
        check_stop()
        inputs = quantized(layer, inputs)
        own = layers_lib.get_in(floats.variables["params"], layer.path)
        loss = None
        if integers.act_spec is not None:
            loss = audit_grids.activation_loss(
                float_inputs, integers.act_params[layer.name], integers.act_spec
            )
        if offsets[layer.name].is_nearest.all():
            found[layer.name] = Evidence(0.0, 1.0, 0.0, True, loss)
        else:
            units = moments_lib.natural_units(layer, own["kernel"], inputs)
            moments = units.undo(
                layer.geometry,
                collector.collect(
                    layer.geometry, own["kernel"], float_inputs, inputs, units
                ),
            )
            scale = np.asarray(integers.quant_params[layer.name].scale, np.float64)
            evidence = _weigh(layer.geometry, moments, offsets[layer.name], scale)
            found[layer.name] = Evidence(*evidence, loss)
        kernel = quantization.dequantize(
            jnp.asarray(integers.codes[layer.name]),
            jax.tree.map(jnp.asarray, integers.quant_params[layer.name]),
        )
        return kernel, inputs

    layer_walk.walk(
        floats.module,
        floats.variables,
        images,
        list(layers),
        visit,
        revisit=quantized,
        apply_kwargs=floats.apply_kwargs,
    )
    return found


def _weigh(
    geometry: layers_lib.Geometry,
    moments: solvers.Moments,
    offsets: code_evidence.Offsets,
    scale: np.ndarray,
) -> tuple[float, float, float, bool]:
    """Gain, separation, price, and whether codes beyond their neighbours pay.

    Args:
      geometry: The layer, with a kernel `[*window, Cin / groups, Cout]`.
      moments: Of its inputs, `[groups, K, K]` and `[groups, K, Cout / groups]`.
      offsets: Arrays of the kernel's shape.
      scale: Broadcastable to the kernel.
    """
    rows = max(float(moments.count[0]), 1.0)
    as_matrix = functools.partial(_as_matrix, geometry)
    scale = as_matrix(np.broadcast_to(scale, offsets.chosen.shape))
    parts = {
        field.name: as_matrix(getattr(offsets, field.name))
        for field in dataclasses.fields(offsets)
    }
    is_nearest = ~(parts["is_other"] | parts["is_beyond"])
    error = np.abs(parts["nearest"]) * scale
    near = after = without_beyond = 0.0
    undo, slack = np.empty(scale.shape), np.empty(scale.shape)
    for group in range(geometry.groups):
        gram, drift, power = (
            np.asarray(x[group], np.float64) / rows
            for x in (moments.gram, moments.drift, moments.drift_power)
        )
        change, nearest, other = (
            parts[name][group] * scale[group]
            for name in ("chosen", "nearest", "alternative")
        )
        back = np.where(parts["is_beyond"][group], nearest, change)
        near += code_evidence.output_error(nearest, gram, drift, power).sum()
        after += code_evidence.output_error(change, gram, drift, power).sum()
        without_beyond += code_evidence.output_error(back, gram, drift, power).sum()
        undo[group] = code_evidence.cost_of_undoing(change, other, gram, drift)
        slack[group] = 0.1 * scale[group] ** 2 * np.diagonal(gram)[:, None]
    judged = (parts["alternative"] != parts["chosen"]) & ~parts["is_beyond"]
    reasons = code_evidence.find_reasons(
        undo[judged], error[judged], is_nearest[judged], slack=slack[judged]
    )
    gain = float(1.0 - after / near) if near > 0 else 0.0
    separation = reasons.flipped + reasons.stayed - 1.0
    return gain, separation, reasons.price, bool(without_beyond > after)


def _as_matrix(geometry: layers_lib.Geometry, array: np.ndarray) -> np.ndarray:
    """`layers.as_matrix` on the host: `[groups, K, Cout / groups]`."""
    groups, channels = geometry.groups, geometry.kernel_shape[-1]
    matrix = array.reshape(geometry.num_inputs, groups, channels // groups)
    return np.swapaxes(matrix, 0, 1)
