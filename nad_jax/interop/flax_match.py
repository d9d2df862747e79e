# SPDX-License-Identifier: Apache-2.0
"""Holds the names and shapes of Flax variables against this package's models.

Names are paths in the tree of variables, joined by slashes, and arrays have the layout
that the model gives them: "params/layer1_0/conv1/kernel" `[h, w, in, out]`. So are the
files of `flax.serialization` and, below "float/" and beside their trigger, those of the
zoo. Every model can be found, the small transformer included. As in `arch_match`, sizes
from the file are bounded before a module sees them.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np

from nad_jax import models
from nad_jax.interop import arch_match
from nad_jax.interop.arch_match import Fit, Leaf
from nad_jax.interop.bounded_file import Refusal

# What a file of the zoo has before every name, and before those of its trigger.
_ZOO = "float/"
_TRIGGER = "float/trigger/"

_STEMS = ("params/conv1/kernel", "params/patch_embed/kernel")
_POSITIONS = "params/position_embedding"
_CONVOLUTION = "height, width, inputs, channels"
_WRN_DEPTHS = (10, 16, 28, 40)


def are_flax(names: Iterable[str]) -> bool:
    """Whether the names of arrays are paths; PyTorch's have no slashes."""
    return any("/" in name for name in names)


def choose(arrays: Mapping[str, np.ndarray], arch: str | None) -> Fit:
    """The fit of `arch`, or of the only architecture that fits; else a `Refusal`."""
    prefix = _ZOO if all(name.startswith(_ZOO) for name in arrays) else ""
    bare = {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if not name.startswith(_TRIGGER)
    }
    if arch is None:
        archs = _candidates(bare)
    else:
        accepted = ", ".join(models.model_names())
        arch_match.check_arch(arch, models.model_names() + ("wrn_",), accepted)
        archs = [arch]
    # No two of the candidates have both names and shapes in common.
    fit = min((_fit(bare, arch) for arch in archs), key=lambda fit: fit.count)
    if fit.count:
        problem = "it does not fit" if arch else "it fits no architecture; closest is"
        raise Refusal(f"{problem} {fit.arch}: {fit.difference(bare)}")
    leaves = {prefix + name: leaf for name, leaf in fit.leaves.items()}
    return dataclasses.replace(fit, stem=prefix + fit.stem, leaves=leaves)


def _stem(arrays: Iterable[str]) -> str:
    """Name of the kernel from which the width is read, the first if there is none."""
    return next((stem for stem in _STEMS if stem in arrays), _STEMS[0])


def _candidates(arrays: Mapping[str, np.ndarray]) -> list[str]:
    """The architectures whose blocks come closest to those of the names."""
    if "params/position_embedding" in arrays:
        return ["vit_b_16" if "params/class_token" in arrays else "vit_tiny"]
    blocks = arch_match.blocks_per_group(arrays, r"params/block(\d+)_layer(\d+)/")
    if blocks:
        depth = min(_WRN_DEPTHS, key=lambda depth: abs((depth - 4) // 6 - max(blocks)))
        return [f"wrn_{depth}_{_widen_factor(arrays)}"]
    blocks = arch_match.blocks_per_group(arrays, r"params/layer(\d+)_(\d+)/")
    distances = {
        arch: arch_match.block_distance(models.build(arch, num_classes=1), blocks)
        for arch in models.model_names()
        if "resnet_" in arch
    }
    nearest = min(distances.values())
    return [arch for arch, distance in distances.items() if distance == nearest]


def _widen_factor(arrays: Mapping[str, np.ndarray]) -> int:
    first, stem = "params/block1_layer0/conv1/kernel", _stem(arrays)
    *_, widened = arch_match.sizes(arrays, first, _CONVOLUTION)
    *_, channels = arch_match.sizes(arrays, stem, _CONVOLUTION)
    return max(1, widened // channels)


def _fit(arrays: Mapping[str, np.ndarray], arch: str) -> Fit:
    """Compares names and shapes; `Refusal` if stem or classifier are not usable."""
    default = models.build(arch, num_classes=1)
    _, classes = arch_match.sizes(arrays, "params/fc/kernel", "inputs, classes")
    axes = "pixels, channels" if arch == "vit_tiny" else _CONVOLUTION
    *_, inputs, channels = arch_match.sizes(arrays, _stem(arrays), axes)
    height = width = 8  # A convolutional net takes any size.
    if arch == "vit_tiny":
        inputs = max(1, inputs // default.patch**2)
        _, rows, columns, _ = arch_match.sizes(
            arrays, _POSITIONS, "1, rows, columns, channels"
        )
        if rows * columns > arch_match.MAX_SIZE:
            raise Refusal(
                f"{_POSITIONS!r} has {rows} x {columns} positions; at most "
                f"{arch_match.MAX_SIZE} are accepted"
            )
        height, width = rows * default.patch, columns * default.patch
    elif arch == "vit_b_16":
        height = width = arch_match.image_side(arrays, _POSITIONS, default)
    model = models.build(
        arch,
        num_classes=classes,
        width=arch_match.width_of(default, channels),
    )
    leaves = {
        "/".join(path): Leaf((path,), shape)
        for path, shape in arch_match.traced(model, (height, width, inputs))
    }
    return arch_match.compare(arrays, arch, model, leaves, stem=_stem(arrays))
