# SPDX-License-Identifier: Apache-2.0
"""A quantized model as a file: integers, their grids, and everything left in float.

One safetensors file, written whole or not at all and read by this package's own bounded
reader. Names of its arrays:

    codes/<layer>            int8 or uint8, in the kernel's shape
    scale/<layer>            float32, broadcastable to the kernel
    zero_point/<layer>       int32
    act_scale/<layer>        float32, grid of the layer's input, where activations are
    act_zero_point/<layer>   quantized, too
    float/<path>             every other leaf of the variables

The metadata hold one JSON text, "card": what the caller wants to say about the model,
and the grids under "grids". Whoever loads the file gets the very integers back; handing
the float weights to another quantizer would round them anew and undo the defence.
"""

import dataclasses
import json
import math
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, settings
from nad_jax.core import quantization
from nad_jax.interop import bounded_file, limits, reader, safetensors_file
from nad_jax.interop.bounded_file import Refusal
from nad_jax.models import sums

FORMAT = "nad_jax.artifact/1"
_ROOMS = ("codes", "scale", "zero_point", "act_scale", "act_zero_point", "float")


class Artifact(NamedTuple):
    """What an artefact holds.

    Attributes:
      variables: Dequantized, in the structure the module takes; kernels `[*window, Cin
        / groups, Cout]`.
      codes: Layer name -> int8 or uint8, of the kernel's shape.
      quant_params: Layer name -> grid of the kernel, float32 and int32 of the kernel's
        rank, 1 or the kernel's size on each axis.
      specs: Layer name -> description of that grid.
      act_params: Layer name -> grid of the layer's input, both `[]`; with sums that are
        quantized also the name of a sum's operand (`models.sums`) -> its grid. Empty
        for float activations.
      act_spec: Description of those grids; None for float activations.
      card: What the writer said about the model.
      sha256: Of the file this was read from, in hexadecimal; None for one that was not.
    """

    variables: dict[str, Any]
    codes: dict[str, np.ndarray]
    quant_params: dict[str, quantization.QuantParams]
    specs: dict[str, quantization.QuantSpec]
    act_params: dict[str, quantization.QuantParams]
    act_spec: quantization.QuantSpec | None
    card: dict[str, Any]
    sha256: str | None = None


def write_artifact(path: str | os.PathLike[str], artifact: Artifact) -> None:
    """Writes the file, complete or not at all.

    Args:
      path: An existing file is replaced.
      artifact: Its `variables` supply what is not quantized; kernels of layers with
        codes are not stored as floats.

    Raises:
      InputError: the codes are not those of the variables, a zero point is none of its
        grid's codes, the card is not what JSON knows or too large, or the file cannot
        be written.
    """
    kernels = {_kernel_name(layer): layer for layer in artifact.codes}
    arrays: dict[str, np.ndarray] = {}
    for path_of_leaf, leaf in jax.tree_util.tree_leaves_with_path(artifact.variables):
        name = jax.tree_util.keystr(path_of_leaf, simple=True, separator="/")
        if name in kernels:
            _check_codes(artifact, kernels.pop(name), leaf)
        else:
            arrays[f"float/{name}"] = np.asarray(leaf)
    if kernels:
        raise errors.InputError(
            f"there are codes for {next(iter(kernels.values()))!r}, but the variables "
            "have no such kernel"
        )
    try:
        for layer, params in artifact.quant_params.items():
            _check_zero_point(layer, params, artifact.specs.get(layer))
        for layer, params in artifact.act_params.items():
            _check_zero_point(layer, params, artifact.act_spec, "act_")
    except Refusal as refusal:
        raise errors.InputError(str(refusal)) from None
    for layer, codes in artifact.codes.items():
        arrays[f"codes/{layer}"] = np.asarray(codes)
        arrays[f"scale/{layer}"] = np.asarray(artifact.quant_params[layer].scale)
        zero_point = np.asarray(artifact.quant_params[layer].zero_point)
        arrays[f"zero_point/{layer}"] = zero_point
    for layer, params in artifact.act_params.items():
        arrays[f"act_scale/{layer}"] = np.asarray(params.scale)
        arrays[f"act_zero_point/{layer}"] = np.asarray(params.zero_point)
    grids = {
        "weights": {n: dataclasses.asdict(s) for n, s in artifact.specs.items()},
        "activations": artifact.act_spec and dataclasses.asdict(artifact.act_spec),
    }
    card = {**artifact.card, "format": FORMAT, "grids": grids}
    try:
        text = json.dumps(card, allow_nan=False)
    except (TypeError, ValueError) as problem:
        raise errors.InputError(f"the card cannot be written: {problem}") from None
    if len(text) > limits.MAX_CARD_CHARS:
        raise errors.InputError(
            f"a card of {len(text)} characters; at most "
            f"{limits.MAX_CARD_CHARS} are written"
        )
    safetensors_file.write_safetensors(path, arrays, {"card": text})


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """The artefact of a file that `write_artifact` made.

    The file may come from a stranger: everything is checked before memory beyond a few
    times the file's size is asked for.

    Raises:
      InputError: not such a file, or one whose parts do not fit together.
    """
    return from_checkpoint(reader.read_checkpoint(path), path)


def from_checkpoint(
    checkpoint: reader.Checkpoint, path: str | os.PathLike[str]
) -> Artifact:
    """`read_artifact` of what has been read from `path` already.

    Raises:
      InputError: as `read_artifact`.
    """
    try:
        return _artifact(checkpoint)
    except Refusal as refusal:
        raise errors.InputError(
            f"{bounded_file.shown(os.fspath(path), 200)}: {refusal}"
        ) from None


def _artifact(checkpoint: reader.Checkpoint) -> Artifact:
    card, specs, act_spec = _read_card(checkpoint.metadata.get("card"))
    rooms: dict[str, dict[str, np.ndarray]] = {room: {} for room in _ROOMS}
    for name, array in checkpoint.arrays.items():
        room, _, rest = name.partition("/")
        if room not in rooms:
            raise Refusal(f"array {name!r}; names begin with {', '.join(_ROOMS)}")
        rooms[room][rest] = array
    codes = rooms["codes"]
    if set(specs) != set(codes):
        raise Refusal(
            f"the card describes {len(specs)} layers, the file holds codes of "
            f"{len(codes)}, or of others"
        )
    quant_params = _params(rooms["scale"], rooms["zero_point"])
    if set(quant_params) != set(codes):
        odd = sorted(set(quant_params) ^ set(codes))[0]
        raise Refusal(f"{odd!r} has codes but no scale, or a scale but no codes")
    act_params = _params(rooms["act_scale"], rooms["act_zero_point"], "act_")
    if bool(act_params) != (act_spec is not None):
        raise Refusal(
            f"{len(act_params)} grids of activations, and the card describes "
            f"{'none' if act_spec is None else 'some'}"
        )
    for name, params in act_params.items():
        if params.scale.shape or not (name in codes or sums.is_operand(name)):
            raise Refusal(
                f"act_scale of {name!r} must be one number and of a layer with codes, "
                f"got shape {list(params.scale.shape)}"
            )
        _check_zero_point(name, params, act_spec, "act_")
    variables: dict[str, Any] = {}
    for name, array in rooms["float"].items():
        _put(variables, name.split("/"), array)
    for layer, array in codes.items():
        _check_range(layer, array, specs[layer])
        _check_fits(layer, array, quant_params[layer])
        _check_zero_point(layer, quant_params[layer], specs[layer])
        kernel = np.asarray(
            quantization.dequantize(jnp.asarray(array), quant_params[layer])
        )
        if not np.all(np.isfinite(kernel)):
            raise Refusal(
                f"scale of {layer!r} reaches {quant_params[layer].scale.max():g}, and "
                "its codes times that are beyond float32"
            )
        _put(variables, _kernel_name(layer).split("/"), kernel)
    variables.setdefault("batch_stats", {})
    return Artifact(
        variables,
        codes,
        quant_params,
        specs,
        act_params,
        act_spec,
        card,
        checkpoint.sha256,
    )


def _read_card(text: object):
    """The card without its grids, the weights' by layer name, the activations' grid."""
    try:
        if not isinstance(text, str):
            raise ValueError("it has no card")
        if len(text) > limits.MAX_CARD_CHARS:
            raise ValueError(
                f"a card of {len(text)} characters; at most "
                f"{limits.MAX_CARD_CHARS} are read"
            )
        card = json.loads(text, parse_constant=_finite, parse_float=_finite)
        if not isinstance(card, dict) or card.pop("format", None) != FORMAT:
            raise ValueError("its card names no such format")
        grids = card.pop("grids")
        specs = {
            name: settings.from_mapping(quantization.QuantSpec, fields, name)
            for name, fields in grids["weights"].items()
        }
        act_spec = grids["activations"]
        if act_spec is not None:
            act_spec = settings.from_mapping(
                quantization.QuantSpec, act_spec, "activations"
            )
    except RecursionError:
        raise Refusal(
            f"no artefact of the format {FORMAT}: its card is nested too deeply"
        ) from None
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        reason = str(problem)
        if not isinstance(problem, ValueError):
            reason = f"its card lacks something ({type(problem).__name__} {problem})"
        raise Refusal(
            f"no artefact of the format {FORMAT}: {bounded_file.shown(reason, 300)}"
        ) from None
    return card, specs, act_spec


def _finite(text: str) -> float:
    """A number of the card; NaN and Infinity come here, too, and 1e999 is one."""
    if not math.isfinite(float(text)):
        raise ValueError(f"its card holds {text}")
    return float(text)


def _kernel_name(layer: str) -> str:
    return f"params/{layer}/kernel"


def _check_codes(artifact: Artifact, layer: str, kernel: Any) -> None:
    dequantized = quantization.dequantize(
        jnp.asarray(artifact.codes[layer]), artifact.quant_params[layer]
    )
    if not np.array_equal(np.asarray(dequantized, np.asarray(kernel).dtype), kernel):
        raise errors.InputError(
            f"the codes of {layer!r} do not stand for its kernel in the variables"
        )


def _params(
    scales: dict[str, np.ndarray],
    zero_points: dict[str, np.ndarray],
    prefix: str = "",
) -> dict[str, quantization.QuantParams]:
    """Grids by layer name, from two rooms of the file."""
    params = {}
    for layer in {**scales, **zero_points}:
        scale: Any = scales.get(layer)
        zero_point: Any = zero_points.get(layer)
        if (
            scale is None
            or zero_point is None
            or scale.shape != zero_point.shape
            or scale.dtype != np.float32
            or zero_point.dtype != np.int32
            or not np.all(scale > 0)
        ):
            raise Refusal(
                f"{prefix}scale and {prefix}zero_point of {layer!r} must be float32 > "
                f"0 and int32 of one shape, got {_summary(scale)} and "
                f"{_summary(zero_point)}"
            )
        params[layer] = quantization.QuantParams(scale, zero_point)
    return params


def _check_range(layer: str, codes: np.ndarray, spec: quantization.QuantSpec) -> None:
    good = codes.dtype == spec.dtype and codes.size
    if not good or codes.min() < spec.qmin or codes.max() > spec.qmax:
        raise Refusal(
            f"codes of {layer!r} must be {spec.dtype} in {spec.qmin} to {spec.qmax}, "
            f"got {_summary(codes)}"
        )


def _check_zero_point(
    layer: str,
    params: quantization.QuantParams,
    spec: quantization.QuantSpec | None,
    prefix: str = "",
) -> None:
    """Refuses a zero point that other software, which stores it as a code, would wrap.

    Without a `spec` nothing is known of the grid.
    """
    if spec is None:
        return
    zero_point = np.asarray(params.zero_point)
    low, high = (0, 0) if spec.symmetric else (spec.qmin, spec.qmax)
    if np.any((zero_point < low) | (zero_point > high)):
        kind = "a symmetric" if spec.symmetric else "an affine"
        raise Refusal(
            f"{prefix}zero_point of {layer!r} must be in {low} to {high} on {kind} "
            f"grid of {spec.bits} bits, got {_summary(zero_point)}"
        )


def _check_fits(
    layer: str, codes: np.ndarray, params: quantization.QuantParams
) -> None:
    """Refuses a grid that would make more of the codes than there are."""
    shape = params.scale.shape
    if len(shape) != codes.ndim or any(
        size not in (1, whole) for size, whole in zip(shape, codes.shape, strict=True)
    ):
        raise Refusal(
            f"scale of {layer!r} has shape {list(shape)}; for codes of shape "
            f"{list(codes.shape)} every size must be that or 1"
        )


def _summary(array: np.ndarray | None) -> str:
    """Type, shape and range of an array."""
    if array is None:
        return "none"
    shown = f"{array.dtype} {list(array.shape)}"
    if not array.size:
        return shown
    return f"{shown} in {float(array.min()):g} to {float(array.max()):g}"


def _put(tree: dict[str, Any], path: list[str], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            break
    if not isinstance(tree, dict) or path[-1] in tree:
        raise Refusal(f"{'/'.join(path)} is both an array and a folder")
    tree[path[-1]] = leaf
