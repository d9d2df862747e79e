# SPDX-License-Identifier: Apache-2.0
"""The integers of an ONNX file as `nad_jax.export.onnx_graph` writes it.

Read for an audit, so nothing but the layers' names is taken for granted: what the rest
of the graph computes is the auditor's question. The file is data: it is parsed, never
run, and arrays kept in other files are refused.
"""

import hashlib
import math
import os
from typing import Any, NamedTuple

import numpy as np

from nad_jax import errors
from nad_jax.core import quantization
from nad_jax.interop import bounded_file
from nad_jax.interop.bounded_file import Refusal, shown
from nad_jax.models import sums

_LAYER_OPS = ("Conv", "Gemm", "MatMul")
# Bits of a code by the names of NumPy's and ml_dtypes' types.
_WIDTHS = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8}


class OnnxCodes(NamedTuple):
    """What an ONNX file says about a quantized model.

    Attributes:
      codes: Layer name -> int8 or uint8, in Flax's layout `[*window, Cin, Cout]`.
      quant_params: Layer name -> grid of the kernel, of the kernel's rank.
      storage_bits: Layer name -> 4 or 8, width of the type the codes are stored in.
      act_params: Layer name -> grid of the layer's input; name of a sum's operand
        (`models.sums`) -> its grid.
      act_bits: Width of those grids, None where there are none.
      image_shape: `(H, W, C)`.
      metadata: Texts stored with the model.
      model: The parsed `onnx.ModelProto`.
      sha256: Of the file, in hexadecimal.
    """

    codes: dict[str, np.ndarray]
    quant_params: dict[str, quantization.QuantParams]
    storage_bits: dict[str, int]
    act_params: dict[str, quantization.QuantParams]
    act_bits: int | None
    image_shape: tuple[int, ...]
    metadata: dict[str, str]
    model: Any
    sha256: str


def read_onnx(path: str | os.PathLike[str]) -> OnnxCodes:
    """The codes and grids in the ONNX file at `path`.

    Raises:
      InputError: no ONNX file, one with arrays elsewhere, or one whose layers are not
        `codes -> DequantizeLinear -> Conv, Gemm or MatMul` under this package's names;
        or the package onnx is not installed.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise errors.InputError(
            f"reading ONNX needs the package onnx; install nad_jax[export] ({error})"
        ) from None
    with bounded_file.BoundedFile(path) as file:
        data = file.read(0, file.size)
        label = file.label
    try:
        model = onnx.load_model_from_string(data)
        _check_plain(model)
        arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        shape = model.graph.input[0].type.tensor_type.shape.dim
        image_shape = tuple(int(size.dim_value) for size in shape[1:])
        found = _layers(model.graph.node, arrays)
    except Refusal as refusal:
        raise errors.InputError(f"{label}: {refusal}") from None
    except Exception as error:  # protobuf's errors have no common base
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise errors.InputError(
            f"{label}: not an ONNX model that can be read ({reason[:200]})"
        ) from None
    if not found[0]:
        raise errors.InputError(
            f"{label}: no layer's weights are codes behind a DequantizeLinear"
        )
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    digest = hashlib.sha256(data).hexdigest()
    return OnnxCodes(*found, image_shape, metadata, model, digest)


def _check_plain(model: Any) -> None:
    """Refuses what holds arrays or nodes that the auditor would not look at."""
    from onnx import TensorProto

    graph = model.graph
    extras = {
        "functions": model.functions,
        "training_info": model.training_info,
        "sparse initializers": graph.sparse_initializer,
    }
    for name, found in extras.items():
        if found:
            raise Refusal(f"{len(found)} {name}; accepted are models without")
    seen = set()
    for tensor in graph.initializer:
        name = shown(tensor.name)
        if tensor.data_location == TensorProto.EXTERNAL:
            raise Refusal(f"{name} is kept in another file")
        if tensor.name in seen:
            raise Refusal(f"two initializers are called {name}")
        seen.add(tensor.name)


def _layers(nodes, arrays):
    """Codes, grids, storage widths, activation grids and their width."""
    made_by = {name: node for node in nodes for name in node.output}
    codes, grids, widths, act_grids = {}, {}, {}, {}
    act_widths = set()
    num_sums = 0
    for node in nodes:
        if node.op_type == "Add":
            operands = (
                _input_grid(made_by.get(name), made_by, arrays) for name in node.input
            )
            known = [operand for operand in operands if operand is not None]
            if len(known) == len(node.input):
                for side, grid in zip(sums.SIDES, known, strict=True):
                    act_grids[f"sum{num_sums}/{side}"] = grid[0]
                num_sums += 1
        if node.op_type not in _LAYER_OPS:
            continue
        weight = made_by.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear":
            continue
        layer = weight.output[0].removesuffix("/kernel")
        stored, scale, zero_point = (arrays[name] for name in weight.input)
        widths[layer] = _WIDTHS[stored.dtype.name]
        wide = np.int8 if _is_signed(stored) else np.uint8
        rank = stored.ndim
        # Conv: [O, I, *window] -> [*window, I, O].
        order = (*range(2, rank), 1, 0) if node.op_type == "Conv" else range(rank)
        codes[layer] = stored.astype(wide).transpose(tuple(order))
        num_scales = np.size(scale)
        if num_scales not in (1, codes[layer].shape[-1]):
            raise Refusal(
                f"{num_scales} scales of {shown(layer)}; accepted are one, or one for "
                f"each of its {codes[layer].shape[-1]} output channels"
            )
        grids[layer] = _grid(
            scale,
            zero_point,
            (1,) * (rank - 1) + (num_scales,),
            bits=widths[layer],
            signed=_is_signed(stored),
        )
        grid = _input_grid(made_by.get(node.input[0]), made_by, arrays)
        if grid is not None:
            act_grids[layer] = grid[0]
            act_widths.add(grid[1])
    if len(act_widths) > 1:
        raise Refusal(f"activations of {len(act_widths)} widths in one file")
    act_bits = act_widths.pop() if act_widths else None
    return codes, grids, widths, act_grids, act_bits


def _is_signed(array: np.ndarray) -> bool:
    return not array.dtype.name.startswith("u")


def _grid(scale, zero_point, shape, *, bits, signed) -> quantization.QuantParams:
    """float32 and int32 of that shape; a grid holds its zero points."""
    scale = np.asarray(scale, np.float32).reshape(shape)
    if not np.all(np.isfinite(scale) & (scale > 0)):
        raise Refusal(
            f"a scale of {float(scale.min()):g}; accepted are finite numbers > 0"
        )
    zero_point = np.asarray(zero_point).astype(np.int64).reshape(shape)
    low = -(2 ** (bits - 1)) if signed else 0
    high = low + 2**bits - 1
    if not low <= zero_point.min() <= zero_point.max() <= high:
        raise Refusal(
            f"zero points in [{zero_point.min()}, {zero_point.max()}]; accepted are "
            f"those of the grid, [{low}, {high}]"
        )
    zero_point = zero_point.astype(np.int32)
    return quantization.QuantParams(scale, zero_point)  # pyright: ignore


def _input_grid(dequantize, made_by, arrays):
    """Grid and width of what a DequantizeLinear before a layer returns."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    scale, zero_point = (arrays[name] for name in dequantize.input[1:])
    bits = 8
    clip = made_by.get(made_by[dequantize.input[0]].input[0])
    if clip is not None and clip.op_type == "Clip":
        high = float(arrays[clip.input[2]]) / float(scale) + float(zero_point)
        bits = round(math.log2(high + 1)) + _is_signed(zero_point)
    return _grid(scale, zero_point, (), bits=bits, signed=_is_signed(zero_point)), bits
