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
import hashlib
import json
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.core import quantization
from nad_jax.interop import reader, safetensors_file

FORMAT = "nad_jax.artifact/1"


class Artifact(NamedTuple):
    """What an artefact holds.

    Attributes:
      variables: Dequantized, in the structure the module takes.
      codes: Layer name -> integers.
      quant_params: Layer name -> grid of the kernel.
      specs: Layer name -> description of that grid.
      act_params: Layer name -> grid of the layer's input; empty for float activations.
      act_spec: Description of those grids, or None.
      card: What the writer said about the model.
    """

    variables: dict[str, Any]
    codes: dict[str, np.ndarray]
    quant_params: dict[str, quantization.QuantParams]
    specs: dict[str, quantization.QuantSpec]
    act_params: dict[str, quantization.QuantParams]
    act_spec: quantization.QuantSpec | None
    card: dict[str, Any]


def write_artifact(path: str | os.PathLike[str], artifact: Artifact) -> None:
    """Writes the file, complete or not at all.

    Args:
      path: An existing file is replaced.
      artifact: Its `variables` supply what is not quantized; kernels of layers with
        codes are not stored as floats.

    Raises:
      InputError: the codes are not those of the variables, or the file cannot be
        written.
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
    card = json.dumps({**artifact.card, "format": FORMAT, "grids": grids})
    safetensors_file.write_safetensors(path, arrays, {"card": card})


def read_artifact(path: str | os.PathLike[str]) -> Artifact:
    """The artefact of a file that `write_artifact` made.

    Raises:
      InputError: not such a file, or one whose parts do not fit together.
    """
    shown = os.fspath(path)
    checkpoint = reader.read_checkpoint(path)
    try:
        card = json.loads(str(checkpoint.metadata["card"]))
        if card.pop("format") != FORMAT:
            raise KeyError("format")
        grids = card.pop("grids")
        specs = {n: quantization.QuantSpec(**s) for n, s in grids["weights"].items()}
        act_grid = grids["activations"]
        act_spec = None if act_grid is None else quantization.QuantSpec(**act_grid)
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise errors.InputError(
            f"{shown} is no artefact of the format {FORMAT}: "
            f"{type(problem).__name__} {problem}"
        ) from None
    rooms: dict[str, dict[str, np.ndarray]] = {}
    for name, array in checkpoint.arrays.items():
        room, _, rest = name.partition("/")
        rooms.setdefault(room, {})[rest] = array
    codes = rooms.get("codes", {})
    quant_params = _params(rooms, "", codes, path)
    act_params = _params(rooms, "act_", rooms.get("act_scale", {}), path)
    if set(specs) != set(codes):
        raise errors.InputError(
            f"{shown}: the card describes {len(specs)} layers, the file holds "
            f"codes of {len(codes)}, or of others"
        )
    variables: dict[str, Any] = {}
    for name, array in rooms.get("float", {}).items():
        _put(variables, name.split("/"), array)
    for layer, array in codes.items():
        spec = specs[layer]
        outside = array.dtype != spec.dtype or array.size == 0
        if outside or array.min() < spec.qmin or array.max() > spec.qmax:
            raise errors.InputError(
                f"{shown}: codes of {layer!r} must be {spec.dtype} in {spec.qmin} to "
                f"{spec.qmax}, got {array.dtype}, or others"
            )
        kernel = np.asarray(
            quantization.dequantize(jnp.asarray(array), quant_params[layer])
        )
        if kernel.shape != array.shape:
            raise errors.InputError(
                f"{shown}: scales of {layer!r} have shape "
                f"{quant_params[layer].scale.shape}, its codes {array.shape}"
            )
        _put(variables, _kernel_name(layer).split("/"), kernel)
    variables.setdefault("batch_stats", {})
    return Artifact(variables, codes, quant_params, specs, act_params, act_spec, card)


def sha256(path: str | os.PathLike[str]) -> str:
    """Hash of a file's bytes, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def _params(rooms, prefix, layers, path) -> dict[str, quantization.QuantParams]:
    params = {}
    for layer in layers:
        parts = [
            rooms.get(f"{prefix}{kind}", {}).get(layer)
            for kind in ("scale", "zero_point")
        ]
        good = (
            all(part is not None for part in parts)
            and parts[0].shape == parts[1].shape
            and parts[0].dtype == np.float32
            and parts[1].dtype == np.int32
            and np.all(parts[0] > 0)
        )
        if not good:
            raise errors.InputError(
                f"{os.fspath(path)}: {prefix}scale and {prefix}zero_point of {layer!r} "
                "must be float32 > 0 and int32 of one shape"
            )
        params[layer] = quantization.QuantParams(*parts)
    return params


def _put(tree: dict[str, Any], path: list[str], leaf: np.ndarray) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            break
    if not isinstance(tree, dict) or path[-1] in tree:
        raise errors.InputError(f"{'/'.join(path)} is both an array and a folder")
    tree[path[-1]] = leaf
