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
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from nad_jax import audit_codes, audit_files, audit_grids, audit_rest
from nad_jax.core import code_evidence
from nad_jax.models import layers as layers_lib

# See benchmarks/audit_rates.py for what honest and planted files reach.
MIN_SEPARATION = 0.5
MIN_GAIN = 0.05
# Error feedback moves few codes beyond a neighbour, as a share of those not nearest.
_MAX_BEYOND = 0.25


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
      integer_file_sha256: Of the bytes that were audited, in hexadecimal.
      float_model_sha256: The same of the float model; None if it came as variables.
    """

    format: str
    folded: bool
    images: int
    layers: tuple[LayerAudit, ...]
    reasons: tuple[str, ...]
    integer_file_sha256: str
    float_model_sha256: str | None

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


def audit(
    float_model: str | os.PathLike[str] | Mapping[str, Any],
    integer_file: str | os.PathLike[str],
    *,
    module: nn.Module | None = None,
    arch: str | None = None,
    images: Any = None,
    apply_kwargs: Mapping[str, Any] | None = None,
    check_stop: Callable[[], None] = lambda: None,
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
        Without them only nearest rounding of weights can be called honest, with layer
        inputs in float.
      apply_kwargs: Keyword arguments of the module's call; default `{"train": False}`
        for a checkpoint, none for variables.
      check_stop: Called before each layer; whatever it raises ends the audit.

    Raises:
      InputError: a file that cannot be read, or two that do not belong together.
    """
    floats = audit_files.read_floats(
        float_model, module=module, arch=arch, apply_kwargs=apply_kwargs
    )
    integers = audit_files.read_integers(integer_file)
    if images is not None:
        images = jnp.asarray(images)
    shape = audit_files.image_shape(integers, images)
    layers = audit_files.find_layers(floats, integers, shape)
    variables, folded = audit_files.in_same_form(floats.variables, layers, integers)
    floats = dataclasses.replace(floats, variables=variables)
    grids: dict[str, audit_grids.Grid] = {}
    offsets: dict[str, code_evidence.Offsets] = {}
    for layer in layers:
        check_stop()
        name = layer.name
        kernel = np.asarray(
            layers_lib.get_in(variables["params"], layer.path)["kernel"]
        )
        grids[name] = audit_grids.explain(kernel, integers, name)
        offsets[name] = code_evidence.offsets(
            kernel,
            integers.codes[name],
            np.asarray(integers.quant_params[name].scale),
            np.asarray(integers.quant_params[name].zero_point),
            qmin=grids[name].spec.qmin,
            qmax=grids[name].spec.qmax,
        )
    evidence: dict[str, audit_codes.Evidence] = {}
    reasons: list[str] = []
    needed = integers.act_spec is not None or any(
        not found.is_nearest.all() for found in offsets.values()
    )
    if images is not None and needed:
        evidence = audit_codes.weigh(
            floats, integers, images, layers, offsets, check_stop=check_stop
        )
        reasons += audit_grids.find_in_sums(floats, integers, images)
    elif integers.act_spec is not None:
        reasons.append("grids of layer inputs were not measured, give clean images")
    reasons += audit_rest.find(floats, integers, layers, grids, shape)
    return Audit(
        integers.format,
        folded,
        0 if images is None else len(images),
        tuple(
            _judge(name, grids[name], offsets[name], evidence.get(name))
            for name in grids
        ),
        tuple(reasons),
        integers.sha256,
        floats.sha256,
    )


def _judge(
    name: str,
    grid: audit_grids.Grid,
    offsets: code_evidence.Offsets,
    evidence: audit_codes.Evidence | None,
) -> LayerAudit:
    """The verdict on one layer.

    Args:
      name: The layer.
      grid: What its scales turned out to be.
      offsets: Where its codes stand, arrays of the kernel's shape.
      evidence: From clean images; None without any.
    """
    reasons = [] if grid.reason is None else [grid.reason]
    beyond = int(offsets.is_beyond.sum())
    others = int(offsets.is_other.sum())
    size = offsets.chosen.size
    if evidence is not None and evidence.activation_loss is not None:
        reasons += audit_grids.find_in_loss(
            "the grid of its inputs", evidence.activation_loss
        )
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
