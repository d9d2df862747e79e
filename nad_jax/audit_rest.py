# SPDX-License-Identifier: Apache-2.0
"""Is everything in an integer file but codes and grids what the float model has?

Of an artefact the other arrays are compared. An ONNX file is written anew from the
float model and the file's codes, and compared part by part.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from nad_jax import errors
from nad_jax.audit_files import FloatModel, IntegerFile
from nad_jax.audit_grids import Grid
from nad_jax.models import layers as layers_lib

# Relative, for constants that were folded in another order.
_FLOAT_TOLERANCE = 1e-4
_WIDEST = 8


def find(
    floats: FloatModel,
    integers: IntegerFile,
    layers: Sequence[layers_lib.Layer],
    grids: Mapping[str, Grid],
    shape: tuple[int, ...],
) -> list[str]:
    """Findings about what is neither codes nor their grids.

    Args:
      floats: The model, in the file's form.
      integers: The file.
      layers: Of the model.
      grids: Layer name -> what its scales turned out to be.
      shape: `(H, W, C)`.
    """
    if integers.format == "artifact":
        return _compare_floats(floats.variables, layers, integers.content)
    return _compare_graphs(floats, integers, layers, grids, shape)


def _compare_floats(
    variables: Mapping[str, Any],
    layers: Sequence[layers_lib.Layer],
    stored: Mapping[str, Any],
) -> list[str]:
    kernels = {f"params/{layer.name}/kernel" for layer in layers}
    ours, theirs = (
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(dict(tree))
        }
        for tree in (variables, stored)
    )
    odd = sorted((set(ours) ^ set(theirs)) - kernels)
    if odd:
        return [f"{len(odd)} arrays are in one of both only, first {odd[0]!r}"]
    changed = [
        name
        for name, array in ours.items()
        if name not in kernels and not _same_numbers(array, theirs[name])
    ]
    if changed:
        return [f"{len(changed)} float arrays were changed, first {changed[0]!r}"]
    return []


def _same_numbers(ours: np.ndarray, theirs: np.ndarray) -> bool:
    if ours.shape != theirs.shape:
        return False
    atol = _FLOAT_TOLERANCE * float(np.max(np.abs(ours), initial=0.0)) + 1e-7
    return np.allclose(ours, theirs, rtol=_FLOAT_TOLERANCE, atol=atol)


def _compare_graphs(
    floats: FloatModel,
    integers: IntegerFile,
    layers: Sequence[layers_lib.Layer],
    grids: Mapping[str, Grid],
    shape: tuple[int, ...],
) -> list[str]:
    from nad_jax.export import onnx_graph

    specs = {}
    for name, grid in grids.items():
        is_narrow = integers.storage_bits[name] == 4
        specs[name] = dataclasses.replace(
            grid.spec,
            bits=min(grid.spec.bits, 4) if is_narrow else _WIDEST,
            symmetric=integers.codes[name].dtype == np.int8,
        )
    try:
        expected = onnx_graph.to_onnx(
            floats.module,
            floats.variables,
            tuple(shape),
            layers=layers,
            codes=integers.codes,
            quant_params=integers.quant_params,
            specs=specs,
            act_params=integers.act_params,
            act_spec=integers.act_spec,
            apply_kwargs=floats.apply_kwargs,
        )
    except errors.InputError as error:
        return [f"codes or grids that no exporter here writes: {error}"]
    given = integers.content
    nodes = [_serialized(model.graph.node) for model in (given, expected)]
    reasons = []
    if nodes[0] != nodes[1]:
        reasons.append(
            f"the graph computes something else: {len(nodes[0])} nodes, "
            f"{len(nodes[1])} expected, "
            f"{len(set(nodes[0]) - set(nodes[1]))} of them unknown"
        )
    for what, theirs, ours in (
        ("operator sets", given.opset_import, expected.opset_import),
        ("inputs", given.graph.input, expected.graph.input),
        ("outputs", given.graph.output, expected.graph.output),
    ):
        if _serialized(theirs) != _serialized(ours):
            reasons.append(f"the graph has other {what} than its float model")
    reasons += _compare_constants(given.graph, expected.graph)
    return reasons


def _serialized(parts: Any) -> list[bytes]:
    return [part.SerializeToString(deterministic=True) for part in parts]


def _compare_constants(given: Any, expected: Any) -> list[str]:
    from onnx import numpy_helper

    ours, theirs = (
        {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        for graph in (expected, given)
    )
    changed = [
        name
        for name in {**theirs, **ours}
        if name not in ours
        or name not in theirs
        or ours[name].dtype != theirs[name].dtype
        or not _same_numbers(
            ours[name].astype(np.float64), theirs[name].astype(np.float64)
        )
    ]
    if not changed:
        return []
    return [f"{len(changed)} constants were changed, first {changed[0]!r}"]
