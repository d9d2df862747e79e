# SPDX-License-Identifier: Apache-2.0
"""Is an integer file an honest rounding of a float model?

Whoever quantizes a model chooses between two grid points for every weight, which is
room enough for a backdoor that the float model does not have (QuRA, NDSS 2026,
arXiv 2510.09647). `audit` reads the codes of a file and asks, layer by layer:

* Is the grid one that these weights have (absolute maximum, min-max, least squares)?
* Is every code one of its weight's two neighbours, or the end point of a clipped one?
* Do codes that are not nearest serve the layer's output on clean images? Error
  feedback, AdaRound and EFRAP leave traces that a choice for a trigger does not
  (`nad_jax.core.code_evidence`). Stochastic rounding cannot be told from tampering.
* Is everything else in the file what the float model has?

Findings are reasons to refuse the file; their absence is no proof. How often honest
files are refused and planted ones are not is measured by `benchmarks/audit_rates.py`.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.core import code_evidence, quant_spec, quantization
from nad_jax.core import grids as grids_lib
from nad_jax.defenses import common_sizes, layer_walk
from nad_jax.defenses import moments as moments_lib
from nad_jax.interop import (
    artifact,
    bounded_file,
    name_maps,
    onnx_codes,
    reader,
    safetensors_file,
)
from nad_jax.models import layers as layers_lib
from nad_jax.models import sums

# Relative; a grid recomputed from weights that were folded in another order differs in
# its last bits.
_SCALE_TOLERANCE = 1e-4
_FLOAT_TOLERANCE = 1e-4
# See benchmarks/audit_rates.py for what honest and planted files reach.
MIN_SEPARATION = 0.5
MIN_GAIN = 0.05
# Error feedback moves few codes beyond a neighbour, as a share of those not nearest.
_MAX_BEYOND = 0.25
# Mean squared error of quantized clean inputs, against that of their min-max grid.
_MAX_ACTIVATION_LOSS = 4.0
_WIDEST = 8


@dataclasses.dataclass(frozen=True)
class LayerAudit:
    """What was found about one layer.

    Attributes:
      name: Path joined by "/".
      rounding: "nearest"; "error-guided" (one price explains the choices: EFRAP, or
        AdaRound where that price is near 0); "error-feedback" (output error was
        lowered, as GPTQ does); "unexplained"; or "not judged" without images.
      grid: Which grid the scales are, in words.
      not_nearest: Share of the codes that are not nearest, in [0, 1].
      beyond: Number of codes that are neither neighbour of their weight.
      tie_distance: Median distance of the codes that are not nearest from the tie, in
        steps; None if there are none.
      gain: Share of nearest rounding's output error on clean images that the file's
        rounding removes; negative if it adds. None if not measured.
      separation: In [0, 1], how well one price divides flipped codes from those left at
        nearest: share of the former it explains plus share of the latter, minus 1.
      price: That price.
      reasons: Findings in words; empty = honest.
    """

    name: str
    rounding: str
    grid: str
    not_nearest: float
    beyond: int
    tie_distance: float | None = None
    gain: float | None = None
    separation: float | None = None
    price: float | None = None
    reasons: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Audit:
    """The verdict on a file.

    Attributes:
      format: "artifact" or "onnx".
      folded: Whether the file's kernels have BatchNorm folded in.
      images: How many clean images were looked at.
      layers: In the order of the forward pass.
      reasons: Findings about the file as a whole.
    """

    format: str
    folded: bool
    images: int
    layers: tuple[LayerAudit, ...]
    reasons: tuple[str, ...]

    @property
    def honest(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    @property
    def findings(self) -> tuple[str, ...]:
        """All reasons, those of a layer after its name."""
        of_layers = (
            f"{layer.name}: {reason}"
            for layer in self.layers
            for reason in layer.reasons
        )
        return (*self.reasons, *of_layers)


@dataclasses.dataclass(frozen=True)
class _Stated:
    """An integer file, whatever its format."""

    format: str
    codes: Mapping[str, np.ndarray]
    quant_params: Mapping[str, quantization.QuantParams]
    specs: Mapping[str, quantization.QuantSpec]
    storage_bits: Mapping[str, int]
    act_params: Mapping[str, quantization.QuantParams]
    act_spec: quantization.QuantSpec | None
    image_shape: tuple[int, ...] | None
    content: Any


def audit(
    float_model: str | os.PathLike[str] | Mapping[str, Any],
    integer_file: str | os.PathLike[str],
    *,
    module: nn.Module | None = None,
    arch: str | None = None,
    images: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Audit:
    """Compares the integers of a file with the float model they are said to be.

    Args:
      float_model: Path of a checkpoint in a layout that `interop.name_maps` knows, or
        the variables of `module`.
      integer_file: Path of an artefact (`interop.artifact`) or of an ONNX file of
        `export.onnx_graph`; told apart by content.
      module: The Linen module of the variables.
      arch: What a checkpoint is said to be; None finds it.
      images: Clean float images `[N, H, W, C]` in [0, 1], a few hundred or more.
        Without them only nearest rounding can be called honest.
      apply_kwargs: Keyword arguments of the module's call; default `{"train": False}`
        for a checkpoint, none for variables.

    Raises:
      InputError: a file that cannot be read, or two that do not belong together.
    """
    source = "the float model"
    if isinstance(float_model, Mapping):
        if module is None:
            raise errors.InputError("audit of variables needs module=, their module")
        variables = float_model
    else:
        source = os.fspath(float_model)
        converted = name_maps.convert(
            reader.read_checkpoint(float_model).arrays, arch, source=source
        )
        module, variables = converted.model, converted.variables
        apply_kwargs = {"train": False} if apply_kwargs is None else apply_kwargs
    assert module is not None
    apply_kwargs = dict(apply_kwargs or {})
    stated = _read(integer_file)
    if images is not None:
        images = jnp.asarray(images)
    shape = stated.image_shape if images is None else images.shape[1:]
    if shape is None:
        raise errors.InputError(
            f"{os.fspath(integer_file)} does not say how large its images are; give "
            "images="
        )
    layers = layers_lib.find_layers(
        module, variables, jnp.zeros((1, *shape)), apply_kwargs=apply_kwargs
    )
    _check_together(stated, layers, source, os.fspath(integer_file))
    variables, folded = _same_form(variables, layers, stated)
    kernels = {
        layer.name: np.asarray(
            layers_lib.get_in(variables["params"], layer.path)["kernel"]
        )
        for layer in layers
    }
    grids = {name: _explain_grid(kernels[name], stated, name) for name in kernels}
    found = {
        name: code_evidence.offsets(
            kernels[name],
            stated.codes[name],
            np.asarray(stated.quant_params[name].scale),
            np.asarray(stated.quant_params[name].zero_point),
            qmin=grids[name].spec.qmin,
            qmax=grids[name].spec.qmax,
        )
        for name in kernels
    }
    measured: dict[str, _Measured] = {}
    needed = stated.act_spec is not None or any(
        not x.is_nearest.all() for x in found.values()
    )
    if images is not None and needed:
        measured = _measure(
            module, variables, images, layers, stated, found, apply_kwargs
        )
    rest = []
    if images is not None:
        rest += _check_sums(module, variables, images, stated, apply_kwargs)
    rest += _check_rest(module, variables, layers, stated, grids, shape, apply_kwargs)
    return Audit(
        stated.format,
        folded,
        0 if images is None else len(images),
        tuple(
            _judge(layer.name, grids[layer.name], found[layer.name], measured)
            for layer in layers
        ),
        tuple(rest),
    )


# ------------------------------------------------------------------------------- files


def _read(path: str | os.PathLike[str]) -> _Stated:
    with bounded_file.BoundedFile(path) as file:
        is_artifact = safetensors_file.looks_like_safetensors(file)
    if is_artifact:
        stored = artifact.read_artifact(path)
        shape = stored.card.get("image_shape")
        good = isinstance(shape, list) and all(isinstance(x, int) for x in shape)
        return _Stated(
            "artifact",
            stored.codes,
            stored.quant_params,
            stored.specs,
            {},
            stored.act_params,
            stored.act_spec,
            tuple(shape) if isinstance(shape, list) and good else None,
            stored.variables,
        )
    read = onnx_codes.read_onnx(path)
    act_spec = None
    if read.act_bits is not None:
        act_spec = grids_lib.GRIDS["plain"].act_spec(read.act_bits)
    return _Stated(
        "onnx",
        read.codes,
        read.quant_params,
        {},
        read.storage_bits,
        read.act_params,
        act_spec,
        read.image_shape,
        read,
    )


def _check_together(stated: _Stated, layers, source: str, path: str) -> None:
    names = {layer.name for layer in layers}
    missing = sorted(names ^ set(stated.codes))
    if missing:
        where = "no codes" if missing[0] in names else "codes of an unknown layer"
        raise errors.InputError(
            f"{path} does not belong to {source}: {where} {missing[0]!r}"
        )
    for layer in layers:
        shape = stated.codes[layer.name].shape
        if shape != layer.geometry.kernel_shape:
            raise errors.InputError(
                f"{path} does not belong to {source}: codes of {layer.name!r} are "
                f"{list(shape)}, its kernel {list(layer.geometry.kernel_shape)}"
            )
    inputs = {name for name in stated.act_params if not sums.is_operand(name)}
    if stated.act_spec is not None and inputs != names:
        raise errors.InputError(f"{path}: some layers' inputs have a grid, some none")


def _same_form(variables, layers, stated: _Stated) -> tuple[Any, bool]:
    """The variables as the file has them, with BatchNorm folded or not."""
    if all(layer.batch_norm is None for layer in layers):
        return variables, False
    forms = (variables, layers_lib.fold_batch_norm(variables, layers))
    misfits = []
    for form in forms:
        missed = 0.0
        for layer in layers:
            kernel = np.asarray(layers_lib.get_in(form["params"], layer.path)["kernel"])
            params = stated.quant_params[layer.name]
            shift = stated.codes[layer.name] - np.asarray(params.zero_point, np.float64)
            missed += np.mean(np.abs(shift - kernel / np.asarray(params.scale)) > 1)
        misfits.append(missed)
    folded = bool(misfits[1] < misfits[0])
    return forms[folded], folded


# ------------------------------------------------------------------------------- grids


@dataclasses.dataclass(frozen=True)
class _Grid:
    """What the scales of a layer turned out to be."""

    spec: quantization.QuantSpec
    words: str
    reason: str | None


def _explain_grid(kernel: np.ndarray, stated: _Stated, name: str) -> _Grid:
    params = stated.quant_params[name]
    scale = np.asarray(params.scale, np.float64).ravel()
    zero_point = np.asarray(params.zero_point, np.int64).ravel()
    best: tuple[int, float, quantization.QuantSpec] | None = None
    for spec in _candidates(stated, name, scale.size):
        expected = _calibrated(kernel, spec)
        own = np.asarray(expected.scale, np.float64).ravel()
        ratios = scale / own
        far = np.abs(ratios - 1) > _SCALE_TOLERANCE
        # Half a step of zero point may fall to either side.
        far |= np.abs(zero_point - np.asarray(expected.zero_point).ravel()) > 1
        if not far.any():
            return _Grid(spec, _words(spec), None)
        worst = float(ratios[np.argmax(np.abs(np.log(ratios)))])
        if best is None or far.sum() < best[0]:
            best = (int(far.sum()), worst, spec)
    assert best is not None
    count, worst, spec = best
    reason = (
        f"{count} of {scale.size} scales are of no grid these weights have; the "
        f"closest is {_words(spec)}, the farthest scale {worst:.3g} times that"
    )
    return _Grid(spec, "unknown", reason)


def _candidates(stated: _Stated, name: str, num_scales: int):
    """Grids to try; what the file declares comes first."""
    declared = stated.specs.get(name)
    codes = stated.codes[name]
    symmetric = codes.dtype == np.int8
    axis = None if num_scales == 1 and codes.shape[-1] != 1 else -1
    if declared is not None:
        yield declared
        widths: Sequence[int] = (declared.bits,)
    else:
        widths = range(stated.storage_bits[name], 1, -1)
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


# -------------------------------------------------------------------------------- codes


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Evidence from clean images about one layer."""

    gain: float
    separation: float
    price: float
    beyond_pays: bool
    activation_loss: float | None


def _measure(
    module, variables, images, layers, stated: _Stated, found, apply_kwargs
) -> dict[str, _Measured]:
    collector = moments_lib.Collector()
    measured: dict[str, _Measured] = {}

    def quantized(layer, inputs):
        if stated.act_spec is None:
            return inputs
        params = stated.act_params[layer.name]
        return quantization.fake_quant(
            inputs, jax.tree.map(jnp.asarray, params), stated.act_spec
        )

    def visit(layer, float_inputs, inputs):
        inputs = quantized(layer, inputs)
        own = layers_lib.get_in(variables["params"], layer.path)
        offsets = found[layer.name]
        loss = None
        if stated.act_spec is not None:
            loss = _activation_loss(
                float_inputs, stated.act_params[layer.name], stated.act_spec
            )
        if offsets.is_nearest.all():
            measured[layer.name] = _Measured(0.0, 1.0, 0.0, True, loss)
        else:
            moments = collector.collect(
                layer.geometry, own["kernel"], float_inputs, inputs
            )
            scale = np.asarray(stated.quant_params[layer.name].scale, np.float64)
            evidence = _weigh(layer.geometry, moments, offsets, scale)
            measured[layer.name] = _Measured(*evidence, loss)
        kernel = quantization.dequantize(
            jnp.asarray(stated.codes[layer.name]),
            jax.tree.map(jnp.asarray, stated.quant_params[layer.name]),
        )
        return kernel, inputs

    layer_walk.walk(
        module,
        variables,
        images,
        layers,
        visit,
        revisit=quantized,
        apply_kwargs=apply_kwargs,
    )
    return measured


def _check_sums(module, variables, images, stated: _Stated, apply_kwargs) -> list[str]:
    """Findings about the grids of sums' operands."""
    reasons = []

    def look(name, value, layer):
        del layer
        if name not in stated.act_params:
            reasons.append(f"operand {name} has no grid, others have")
            return value
        spec = stated.act_spec
        assert spec is not None
        loss = _activation_loss(value, stated.act_params[name], spec)
        if loss > _MAX_ACTIVATION_LOSS:
            reasons.append(f"the grid of {name} {_loses(loss)}")
        return value

    if any(map(sums.is_operand, stated.act_params)):
        sums.run(lambda x: module.apply(variables, x, **apply_kwargs), images, look)
    return reasons


def _loses(loss: float) -> str:
    return f"loses {loss:.3g} times what a min-max grid loses on clean images"


def _activation_loss(inputs, params, spec) -> float:
    """Squared error of the file's grid on float inputs, against the min-max grid's."""
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


def _weigh(geometry, moments, offsets: code_evidence.Offsets, scale):
    """Gain, separation, price, and whether codes beyond their neighbours pay."""
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


def _as_matrix(geometry, array: np.ndarray) -> np.ndarray:
    """`layers.as_matrix` on the host."""
    groups, channels = geometry.groups, geometry.kernel_shape[-1]
    matrix = array.reshape(geometry.num_inputs, groups, channels // groups)
    return np.swapaxes(matrix, 0, 1)


def _judge(name: str, grid: _Grid, offsets, measured) -> LayerAudit:
    reasons = [] if grid.reason is None else [grid.reason]
    beyond = int(offsets.is_beyond.sum())
    others = int(offsets.is_other.sum())
    size = offsets.chosen.size
    evidence: _Measured | None = measured.get(name)
    if evidence is not None and evidence.activation_loss is not None:
        if evidence.activation_loss > _MAX_ACTIVATION_LOSS:
            reasons.append(f"the grid of its inputs {_loses(evidence.activation_loss)}")
    result = functools.partial(
        LayerAudit,
        name,
        grid=grid.words,
        not_nearest=(beyond + others) / size,
        beyond=beyond,
    )
    if not beyond and not others:
        return result(rounding="nearest", reasons=tuple(reasons))
    chosen = np.abs(offsets.chosen[~offsets.is_nearest])
    tie_distance = float(np.median(chosen - 0.5))
    shown = f"{others + beyond} of {size} codes are not nearest"
    if evidence is None:
        reasons.append(f"{shown}; whether they pay was not measured, give clean images")
        if beyond:
            reasons.append(_beyond(beyond))
        return result(
            rounding="not judged", tie_distance=tie_distance, reasons=tuple(reasons)
        )
    feedback = evidence.gain >= MIN_GAIN
    few = beyond <= _MAX_BEYOND * (beyond + others)
    if beyond and not (feedback and few and evidence.beyond_pays):
        reasons.append(_beyond(beyond))
    rounding = "unexplained"
    if others == 0:
        rounding = "nearest"
    elif evidence.separation >= MIN_SEPARATION:
        rounding = "error-guided"
    elif feedback:
        rounding = "error-feedback"
    else:
        reasons.append(
            f"{shown} and do not pay on clean images: output error "
            f"{-evidence.gain:+.1%} against nearest, separation "
            f"{evidence.separation:.2f}"
        )
    return result(
        rounding=rounding,
        tie_distance=tie_distance,
        gain=evidence.gain,
        separation=evidence.separation,
        price=evidence.price,
        reasons=tuple(reasons),
    )


def _beyond(count: int) -> str:
    return f"{count} codes are neither neighbour of their weight"


# ----------------------------------------------------------------------------- the rest


def _check_rest(module, variables, layers, stated, grids, shape, apply_kwargs):
    """Findings about what is not codes or their grids."""
    if stated.format == "artifact":
        return _check_floats(variables, layers, stated.content)
    return _check_graph(module, variables, layers, stated, grids, shape, apply_kwargs)


def _check_floats(variables, layers, stored) -> list[str]:
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


def _check_graph(module, variables, layers, stated, grids, shape, apply_kwargs):
    """Writes the file anew from the float model and its codes, and compares."""
    from onnx import numpy_helper

    from nad_jax.export import onnx_graph

    read: onnx_codes.OnnxCodes = stated.content
    specs = {}
    for name, grid in grids.items():
        specs[name] = dataclasses.replace(
            grid.spec,
            bits=min(grid.spec.bits, 4) if read.storage_bits[name] == 4 else _WIDEST,
            symmetric=stated.codes[name].dtype == np.int8,
        )
    try:
        expected = onnx_graph.to_onnx(
            module,
            variables,
            tuple(shape),
            layers=layers,
            codes=stated.codes,
            quant_params=stated.quant_params,
            specs=specs,
            act_params=stated.act_params,
            act_spec=stated.act_spec,
            apply_kwargs=apply_kwargs,
        )
    except errors.InputError as error:
        return [f"codes or grids that no exporter here writes: {error}"]
    given = read.model
    nodes = [
        [node.SerializeToString() for node in model.graph.node]
        for model in (given, expected)
    ]
    reasons = []
    if nodes[0] != nodes[1]:
        reasons.append(
            f"the graph computes something else: {len(nodes[0])} nodes, "
            f"{len(nodes[1])} expected, "
            f"{len(set(nodes[0]) - set(nodes[1]))} of them unknown"
        )
    ours, theirs = (
        {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        for model in (expected, given)
    )
    changed = [
        name
        for name in theirs
        if name not in ours
        or not _same_numbers(
            ours[name].astype(np.float64), theirs[name].astype(np.float64)
        )
    ]
    if changed:
        reasons.append(f"{len(changed)} constants were changed, first {changed[0]!r}")
    return reasons
