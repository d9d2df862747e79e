# SPDX-License-Identifier: Apache-2.0
"""A Linen module and its (quantized) weights as one ONNX graph.

    images [N, H, W, C] -> Transpose -> Conv -> Relu -> Conv -> ... -> Gemm -> logits

With codes, every kernel is stored as the integers that were given, behind a
DequantizeLinear; nothing is rounded again. With a grid for each layer's input as well,
a QuantizeLinear and DequantizeLinear stand before the layer, where `fake_quant` stands
in JAX. A runtime fuses

    DequantizeLinear -> Conv -> Relu -> QuantizeLinear

into integer arithmetic. It can do so where a layer's output reaches only the input of
another layer, at most through a ReLU: where a residual sum comes between, only if the
sum's operands have grids of their own (`models.sums`).

The module is traced once with its layers replaced by markers, so that only what lies
between them has to be translated (`onnx_walk`); what a layer computes is known from its
`Geometry`. BatchNorm needs no rule of its own: in evaluation mode it is a constant
factor and summand, and after `fold_batch_norm` only a summand, which becomes the bias
of the layer before it.
"""

import dataclasses
import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.extend import core as jax_core

from nad_jax import errors
from nad_jax.core import quantization
from nad_jax.export import onnx_builder, onnx_rules, onnx_walk
from nad_jax.models import layers as layers_lib
from nad_jax.models import sums

try:
    import onnx
    from onnx import helper
except ImportError as error:
    raise errors.InputError(
        f"ONNX export needs the package onnx; install nad_jax[export] ({error})"
    ) from None

OPSET = 21  # the first with INT4
IR_VERSION = 10  # what opset 21 came with; newer ones shut out older runtimes

# ONNX Runtime rounds the bias of a layer it fuses to int32 multiples of input scale
# times kernel scale. Half of what fits leaves room for the sum of products.
_LARGEST_BIAS_CODE = 2**30

_layer_p = jax_core.Primitive("layer")


@_layer_p.def_abstract_eval
def _layer_output(images, *, path, shape, dtype):
    del images, path
    return jax.core.ShapedArray(shape, dtype)


def to_onnx(
    module: nn.Module,
    variables: Mapping[str, Any],
    image_shape: tuple[int, ...],
    *,
    layers: Sequence[layers_lib.Layer] | None = None,
    codes: Mapping[str, Any] | None = None,
    quant_params: Mapping[str, quantization.QuantParams] | None = None,
    specs: Mapping[str, quantization.QuantSpec] | None = None,
    act_params: Mapping[str, quantization.QuantParams] | None = None,
    act_spec: quantization.QuantSpec | None = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    pack_int4: bool = True,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    """The graph of `module.apply(variables, images, **apply_kwargs)`.

    Input "images", float32 `[N, H, W, C]` in [0, 1] with any N; output "logits", the
    module's output or the first element of the tuple it returns.

    Args:
      module: Any Linen module whose operations between layers are in `onnx_rules`.
      variables: Its variables; the kernels of layers with codes are not read.
      image_shape: `(H, W, C)`.
      layers: From `find_layers`, if at hand.
      codes: Layer name -> int8 or uint8 codes in the kernel's shape; a layer without
        codes stays float. None = all float.
      quant_params: Layer name -> scale and zero point of the kernel, per output
        channel (size 1 on all other axes) or one for the tensor.
      specs: Layer name -> description of that grid.
      act_params: Layer name -> scale and zero point of the layer's input, one for the
        tensor; the same for operands of sums, by their names in `models.sums`. None or
        empty = float activations.
      act_spec: Description of those grids. Below 8 bits a Clip stands before the
        QuantizeLinear, and no runtime fuses the layer before it.
      apply_kwargs: Keyword arguments of the module's call, e.g. `{"train": False}`.
      pack_int4: Store codes of 4 bits or fewer as INT4. False stores them as INT8:
        twice the size, but ONNX Runtime has integer kernels for 8-bit weights only.
      metadata: Texts stored with the model, by key.

    Returns:
      A checked model of opset 21, equal to JAX up to the order of float32 sums as
      long as a runtime fuses nothing. One that fuses rounds biases to multiples of
      input scale times kernel scale, which moves some activations by a step.

    Raises:
      InputError: the module does not accept the images, uses an operation without
        counterpart or another type than float32; codes without grid, or of the wrong
        shape; a zero point that is none of its grid's codes, or not 0 on a symmetric
        one.
    """
    apply_kwargs = dict(apply_kwargs or {})
    codes = dict(codes or {})
    grids = _checked_grids(codes, quant_params or {}, specs or {})
    act_params = dict(act_params or {})
    if act_params and (act_spec is None or act_spec.channel_axis is not None):
        raise errors.InputError(
            "act_params need an act_spec with one scale for the tensor "
            f"(channel_axis=None), got {act_spec}"
        )
    if layers is None:
        layers = _find_layers(module, variables, image_shape, apply_kwargs, bool(codes))
    by_path = {layer.path: layer for layer in layers}
    inputs = {name for name in act_params if not sums.is_operand(name)}
    unknown = sorted({*codes, *inputs} - {layer.name for layer in layers})
    if unknown:
        raise errors.InputError(
            f"codes for {', '.join(unknown)}, which the module does not call; its "
            f"layers are {', '.join(layer.name for layer in layers)}"
        )
    closed, batch = _trace(module, variables, image_shape, by_path, apply_kwargs)
    writer = _Writer(by_path, variables, codes, grids, act_params, act_spec, pack_int4)
    leaves = [onnx_builder.constant(x) for x in jax.tree.leaves(variables)]
    rank = len(image_shape) + 1
    images = onnx_builder.Value(
        (batch, *image_shape), name=onnx_builder.IMAGES, order=tuple(range(rank))
    )
    builder = writer.builder
    (logits,) = onnx_walk.run(
        builder,
        closed.jaxpr,
        [*leaves, images],
        closed.consts,
        {
            _layer_p.name: writer.layer,
            "add": functools.partial(writer.add, _operands(closed.jaxpr)),
        },
        needed=[0],
    )
    shape = closed.jaxpr.outvars[0].aval.shape
    output = builder.tensor(builder.full(logits, shape))
    _drop_unused(builder, output)
    _bias_into_layers(writer, output)
    _rename(builder, output, onnx_builder.LOGITS)
    return _model(builder, image_shape, shape, metadata or {})


def _find_layers(module, variables, image_shape, apply_kwargs, quantized):
    images = jnp.zeros((2, *image_shape), jnp.float32)
    with warnings.catch_warnings():
        if not quantized:
            # Kernels it would warn about stay float, as everything does.
            warnings.simplefilter("ignore", UserWarning)
        return layers_lib.find_layers(
            module, variables, images, apply_kwargs=apply_kwargs
        )


def _checked_grids(codes, quant_params, specs):
    """Layer name -> (scale, zero point, spec); vectors, of size 1 if per tensor."""
    grids = {}
    for name, array in codes.items():
        if name not in quant_params or name not in specs:
            raise errors.InputError(f"layer {name} has codes but no scale or spec")
        array, spec = np.asarray(array), specs[name]
        scale = np.asarray(quant_params[name].scale, np.float32)
        zero_point = np.asarray(quant_params[name].zero_point, np.int32)
        if array.dtype not in (np.int8, np.uint8):
            raise errors.InputError(
                f"layer {name}: codes must be int8 or uint8, got {array.dtype}"
            )
        allowed = {1} if spec.channel_axis is None else {1, array.shape[-1]}
        per_channel = scale.size == 1 or scale.shape[-1:] == array.shape[-1:]
        same = scale.shape == zero_point.shape
        if scale.size not in allowed or not per_channel or not same:
            raise errors.InputError(
                f"layer {name}: a scale must be one number or one per output channel, "
                f"got shape {scale.shape} for codes of shape {array.shape}"
            )
        if array.size and not spec.qmin <= array.min() <= array.max() <= spec.qmax:
            raise errors.InputError(
                f"layer {name}: codes must lie in [{spec.qmin}, {spec.qmax}], got "
                f"[{array.min()}, {array.max()}]"
            )
        _check_zero_point(f"layer {name}", zero_point, spec)
        grids[name] = (scale.ravel(), zero_point.ravel(), spec)
    return grids


def _check_zero_point(name: str, zero_point: np.ndarray, spec) -> None:
    """Refuses one that the type of the codes, in which it is stored, would wrap."""
    low, high = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)
    if zero_point.size and not low <= zero_point.min() <= zero_point.max() <= high:
        raise errors.InputError(
            f"{name}: zero points must lie in [{low}, {high}], got "
            f"[{zero_point.min()}, {zero_point.max()}]"
        )


def _trace(module, variables, image_shape, by_path, apply_kwargs):
    """The jaxpr of the logits, layers as markers, and the symbolic batch size."""

    def mark(next_fun, args, kwargs, context):
        outputs = next_fun(*args, **kwargs)
        if not layers_lib.is_layer_call(context):
            return outputs
        path = context.module.path
        if path not in by_path:
            raise errors.InputError(
                f"layer {'/'.join(path)} is called but missing among the given layers"
            )
        # The layer's own operations lead nowhere now, and are dropped.
        inputs = sums.mark_input(layers_lib.input_of(args, kwargs), "/".join(path))
        return _layer_p.bind(
            inputs, path=path, shape=outputs.shape, dtype=outputs.dtype
        )

    def forward(variables, images):
        with nn.intercept_methods(mark):
            outputs = module.apply(variables, images, **apply_kwargs)
        return outputs[0] if isinstance(outputs, (tuple, list)) else outputs

    (batch,) = jax.export.symbolic_shape(onnx_builder.BATCH)
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), variables
    )
    try:
        closed = jax.make_jaxpr(forward)(shapes, images)
    except errors.InputError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise errors.InputError(
            f"{type(module).__name__} cannot be traced for a batch of any size of "
            f"images {tuple(image_shape)} ({type(error).__name__}: {reason})"
        ) from error
    if len(closed.jaxpr.outvars) != 1:
        raise errors.InputError(
            f"{type(module).__name__} must return logits, or a tuple that begins with "
            f"them, got {len(closed.jaxpr.outvars)} arrays"
        )
    return closed, batch


def _operands(jaxpr) -> dict[int, tuple[str, str]]:
    """Identity of each sum's equation -> names of its operands."""
    found = sums.find(jaxpr, jaxpr.invars[-1:])
    return {id(jaxpr.eqns[index]): names for index, names in found.items()}


class _Writer:
    """Emits layers; remembers of each what its bias needs."""

    def __init__(
        self, by_path, variables, codes, grids, act_params, act_spec, pack_int4
    ):
        self.builder = onnx_builder.Builder()
        # Output tensor of a layer that may be fused -> step of its accumulator, per
        # output channel.
        self.bias_steps: dict[str, np.ndarray] = {}
        self._by_path = by_path
        self._params = variables["params"]
        self._codes = codes
        self._grids = grids
        self._act_params = act_params
        self._act_spec = act_spec
        self._pack_int4 = pack_int4

    def layer(self, builder, equation, values) -> list[onnx_builder.Value]:
        """The handler of a layer's marker."""
        layer = self._by_path[equation.params["path"]]
        own = layers_lib.get_in(self._params, layer.path)
        geometry = layer.geometry
        shape = equation.params["shape"]
        if equation.params["dtype"] != jnp.float32:
            raise errors.InputError(
                f"layer {layer.name} computes in {equation.params['dtype']}; only "
                "float32 can be exported"
            )
        inputs_shape = equation.invars[0].aval.shape
        value = builder.full(values[0], inputs_shape)
        rank, attributes = len(inputs_shape), {}
        order = tuple(range(rank))
        if geometry.window:
            if rank != len(geometry.window) + 2:
                raise errors.InputError(
                    f"layer {layer.name} has inputs of rank {rank}; a convolution "
                    f"with {len(geometry.window)} window axes takes "
                    f"{len(geometry.window) + 2}"
                )
            order = onnx_builder.channels_first(rank)
        inputs = builder.tensor(value, order)
        if geometry.window:
            mode, pairs = layers_lib.position_padding(geometry, inputs_shape[1:-1])
            pads = [int(pair[side]) for side in (0, 1) for pair in pairs]
            attributes = {
                "kernel_shape": list(geometry.window),
                "strides": list(geometry.strides),
                "dilations": list(geometry.dilation),
                "group": geometry.groups,
                "pads": pads,
            }
            if mode != "constant" or min(pads) < 0:
                # Conv itself pads with zeros only.
                half = len(pads) // 2
                whole = [0, 0, *pads[:half], 0, 0, *pads[half:]]
                inputs = builder.emit(
                    "Pad", [inputs, builder.integers(whole)], mode=mode
                )
                attributes["pads"] = [0] * len(pads)
        inputs = self._quantized_input(layer.name, inputs)
        op = "Conv" if geometry.window else "Gemm" if rank == 2 else "MatMul"
        weight, channel_scale = self._weight(layer, own, op)
        name = builder.emit(op, [inputs, weight], layer.name, **attributes)
        if channel_scale is not None and layer.name in self._act_params:
            act_scale = np.float32(self._act_params[layer.name].scale)
            self.bias_steps[name] = channel_scale * act_scale.reshape(())
        summand = None
        if own.get("bias") is not None:
            bias = np.asarray(own["bias"], np.float32)
            summand = bias.reshape((1,) * (rank - 1) + bias.shape)
        return [onnx_builder.Value(shape, name=name, order=order, summand=summand)]

    def add(self, operands, builder, equation, values):
        """The handler of additions: operands of sums that have a grid move to it."""
        names = operands.get(id(equation), ())
        if not any(name in self._act_params for name in names):
            return None
        moved = []
        for name, value in zip(names, values, strict=True):
            value = builder.plain(value)
            tensor = self._quantized_input(name, builder.tensor(value, value.order))
            moved.append(dataclasses.replace(value, name=tensor, plain=None))
        return [onnx_rules.RULES["add"](builder, equation, moved)]

    def _quantized_input(self, layer: str, inputs: str) -> str:
        if layer not in self._act_params:
            return inputs
        builder, spec = self.builder, self._act_spec
        params = self._act_params[layer]
        scale = np.asarray(params.scale, np.float32)
        zero_point = np.asarray(params.zero_point, np.int32)
        if scale.size != 1 or zero_point.size != 1:
            raise errors.InputError(
                f"layer {layer}: the scale of activations must be one number, got "
                f"shape {scale.shape}"
            )
        _check_zero_point(f"activations of {layer}", zero_point, spec)
        dtype = np.int8 if spec.symmetric else np.uint8
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
        limits = np.iinfo(dtype)
        if (spec.qmin, spec.qmax) != (limits.min, limits.max):
            # QuantizeLinear saturates at the ends of its type alone.
            ends = [
                np.float32(code - int(zero_point)) * scale
                for code in (spec.qmin, spec.qmax)
            ]
            inputs = builder.once("Clip", [inputs, *map(builder.array, ends)])
        grid = [
            builder.array(scale, "input_scale"),
            builder.array(zero_point.astype(dtype), "input_zero_point"),
        ]
        inputs = builder.once("QuantizeLinear", [inputs, *grid])
        return builder.once("DequantizeLinear", [inputs, *grid])

    def _weight(self, layer, own, op) -> tuple[str, np.ndarray | None]:
        """The kernel's tensor; its scale per channel where a runtime may fuse."""
        builder = self.builder
        # Conv: [*window, I, O] -> [O, I, *window].
        rank = len(layer.geometry.kernel_shape)
        order = (rank - 1, rank - 2, *range(rank - 2)) if op == "Conv" else (0, 1)
        if layer.name not in self._codes:
            kernel = np.asarray(own["kernel"], np.float32)
            return builder.array(kernel.transpose(order), f"{layer.name}/kernel"), None
        codes = np.asarray(self._codes[layer.name])
        if codes.shape != layer.geometry.kernel_shape:
            raise errors.InputError(
                f"layer {layer.name}: codes of shape {codes.shape} for a kernel of "
                f"shape {layer.geometry.kernel_shape}"
            )
        scale, zero_point, spec = self._grids[layer.name]
        narrow = spec.bits <= 4 and self._pack_int4
        dtype: Any = codes.dtype
        if narrow:
            dtype = ml_dtypes.int4 if codes.dtype == np.int8 else ml_dtypes.uint4
        inputs = [
            builder.array(codes.transpose(order).astype(dtype), f"{layer.name}/codes"),
            builder.array(_scalar_if_one(scale), f"{layer.name}/scale"),
            builder.array(
                _scalar_if_one(zero_point).astype(dtype), f"{layer.name}/zero_point"
            ),
        ]
        axis = {} if scale.size == 1 else {"axis": 0 if op == "Conv" else 1}
        name = builder.once("DequantizeLinear", inputs, f"{layer.name}/kernel", **axis)
        if narrow or op == "MatMul":
            return name, None
        return name, np.broadcast_to(scale, codes.shape[-1:])


def _scalar_if_one(x: np.ndarray) -> np.ndarray:
    return x.reshape(()) if x.size == 1 else x


def _drop_unused(builder: onnx_builder.Builder, output: str) -> None:
    wanted, kept = {output}, []
    for node in reversed(builder.nodes):
        if wanted.isdisjoint(node.output):
            continue
        kept.append(node)
        wanted.update(node.input)
    builder.nodes[:] = kept[::-1]


def _bias_into_layers(writer: _Writer, output: str) -> None:
    """Turns the Add behind a Conv or Gemm into its bias."""
    builder = writer.builder
    uses: dict[str, int] = {output: 1}
    for node in builder.nodes:
        for name in node.input:
            uses[name] = uses.get(name, 0) + 1
    layers = {
        node.output[0]: node for node in builder.nodes if node.op_type in _TAKE_BIAS
    }
    merged: set[int] = set()
    for node in builder.nodes:
        layer = layers.get(node.input[0]) if node.op_type == "Add" else None
        summand = builder.arrays.get(node.input[1]) if layer is not None else None
        if layer is None or summand is None or uses[node.input[0]] != 1:
            continue
        weight_channels = _output_channels(builder, layer)
        axis = 1 if layer.op_type == "Conv" else summand.ndim - 1
        along = summand.shape[axis] if summand.ndim else 1
        if summand.size != along or along not in (1, weight_channels):
            continue  # not one number per channel
        bias = np.broadcast_to(summand.ravel(), (weight_channels,)).astype(np.float32)
        step = writer.bias_steps.get(layer.output[0])
        if step is not None:
            codes = bias.astype(np.float64) / step.astype(np.float64)
            if np.max(np.abs(codes), initial=0) > _LARGEST_BIAS_CODE:
                continue  # an Add is left alone
        layer.input.append(builder.array(bias, f"{layer.name}/bias"))
        layer.output[0] = node.output[0]
        merged.add(id(node))
    builder.nodes[:] = [node for node in builder.nodes if id(node) not in merged]


_TAKE_BIAS = ("Conv", "Gemm")


def _output_channels(builder, layer) -> int:
    """From the kernel, or from the codes behind its DequantizeLinear."""
    array = builder.arrays.get(layer.input[1])
    if array is None:
        source = next(n for n in builder.nodes if n.output[0] == layer.input[1])
        array = builder.arrays[source.input[0]]
    return array.shape[0 if layer.op_type == "Conv" else 1]


def _rename(builder: onnx_builder.Builder, old: str, new: str) -> None:
    if not any(old in node.output for node in builder.nodes):
        builder.nodes.append(helper.make_node("Identity", [old], [new]))
        return
    for node in builder.nodes:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name == old:
                    names[index] = new


def _model(builder, image_shape, logits_shape, metadata) -> onnx.ModelProto:
    value_info = functools.partial(
        helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT
    )
    sizes = [
        size if isinstance(size, int) else onnx_builder.BATCH for size in logits_shape
    ]
    graph = helper.make_graph(
        builder.nodes,
        "model",
        [value_info(onnx_builder.IMAGES, shape=[onnx_builder.BATCH, *image_shape])],
        [value_info(onnx_builder.LOGITS, shape=sizes)],
        initializer=onnx_builder.initializers(builder),
    )
    model = helper.make_model(
        graph,
        producer_name="nad_jax",
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
    )
    helper.set_model_props(model, {key: str(text) for key, text in metadata.items()})
    onnx.checker.check_model(model)
    return model
