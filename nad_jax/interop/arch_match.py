# SPDX-License-Identifier: Apache-2.0
"""Holds the names and shapes of a PyTorch state dict against this package's models.

What a model expects is asked of the Flax module, traced for shapes only, and renamed;
so this file knows spellings but not how many blocks or channels a network has. Sizes
that come from the file are bounded before the module sees them.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nad_jax import errors, models
from nad_jax.interop.bounded_file import Refusal, shown
from nad_jax.models import common

# Collection and names down to a leaf: ("params", "layer2_0", "conv1", "kernel").
Path = tuple[str, ...]

_FAMILIES = ("wrn_", "resnet_", "preact_resnet_", "imagenet_resnet_", "vit_b_")
ARCHS = tuple(name for name in models.model_names() if name.startswith(_FAMILIES))
_ACCEPTED = f"{', '.join(ARCHS)}, and wrn_D_K with D in 10, 16, 28, 40"

# Axes of an array, by rank, in Flax's order and back in PyTorch's: convolutions have
# [out, in, h, w] there and [h, w, in, out] here, Dense [out, in] and [in, out]; class
# tokens and position embeddings are the same.
TO_FLAX = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (2, 3, 1, 0)}
TO_TORCH = {1: (0,), 2: (1, 0), 3: (0, 1, 2), 4: (3, 2, 0, 1)}

_BLOCK = re.compile(r"(block|layer)(\d+)_(?:layer)?(\d+)")
_BOTTLENECK = re.compile(r"layer\d+\.\d+\.(conv3|bn3)\.")
_TRANSFORMER = re.compile(
    r"encoder\.layers\.encoder_layer_\d+\.|conv_proj\.|class_token$"
)
_OTHER_TRANSFORMER = re.compile(
    r"encoder\.layers\.(?!encoder_layer_)|blocks\.\d+\.attn\.|cls_token"
)
_TRANSFORMER_BLOCK = re.compile(r"block(\d+)")
# PyTorch stacks these along the outputs, in this order.
_FUSED = ("query", "key", "value")
_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
    "class_token": "class_token",
    "position_embedding": "encoder.pos_embedding",
}
_COUNTER = ".num_batches_tracked"

# Channels, classes, positions of tokens. Sizes come from the file and are multiplied
# before anything compares them with the arrays; far above any classifier, far below an
# overflow.
MAX_SIZE = 2**16
_NAMED = 3  # Arrays a message names of each kind.


@dataclasses.dataclass(frozen=True)
class Leaf:
    """Where an array goes, and the shape it has in PyTorch's order.

    Several paths share the array in equal parts along its first axis.
    """

    paths: tuple[Path, ...]
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Fit:
    """An architecture held against the arrays of a file."""

    arch: str
    model: Any
    stem: str  # Name of the array from which the width is read.
    leaves: dict[str, Leaf]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    misshaped: tuple[str, ...]

    @property
    def count(self) -> int:
        """Number of arrays that differ."""
        return len(self.missing) + len(self.extra) + len(self.misshaped)

    def difference(self, arrays: Mapping[str, np.ndarray]) -> str:
        """What differs, the first few by name and shape, in PyTorch's axes."""
        kinds = {
            "missing": [f"{shown(n)} {_wanted(self, n)}" for n in self.missing],
            "left over": [f"{shown(n)} {_shape(arrays[n])}" for n in self.extra],
            "of another shape": [
                f"{shown(n)} is {_shape(arrays[n])}, expected {_wanted(self, n)}"
                for n in self.misshaped
            ],
        }
        return "; ".join(
            f"{len(items)} {kind} ({_few(items)})"
            for kind, items in kinds.items()
            if items
        )

    def described(self, arrays: Mapping[str, np.ndarray]) -> str:
        """The architecture and what differs, if anything does."""
        return f"{self.arch}: {self.difference(arrays)}" if self.count else self.arch


def _shape(array: np.ndarray) -> str:
    return str(list(array.shape))


def _wanted(fit: Fit, name: str) -> str:
    return str(list(fit.leaves[name].shape))


def _few(items: list[str]) -> str:
    return ", ".join(items[:_NAMED]) + (", ..." if len(items) > _NAMED else "")


def choose(arrays: Mapping[str, np.ndarray], arch: str | None) -> Fit:
    """The fit of `arch`, or of the only architecture that fits; else a `Refusal`."""
    if arch is not None:
        check_arch(arch, _FAMILIES, _ACCEPTED)
    if reason := foreign_kind(arrays):
        raise Refusal(reason)
    if arch is None:
        return _only_fit(arrays)
    try:
        fit = _fit(arrays, arch)
        problem, count = f"it does not fit {arch}: {fit.difference(arrays)}", fit.count
        if not count:
            return fit
    except Refusal as refusal:
        problem, count = f"it does not fit {arch}: {refusal}", len(arrays) + 1
    closer = [near for near in nearest_fits(arrays) if near.count < count]
    if not closer:
        raise Refusal(f"{problem}; no other architecture here is closer")
    verdict = "it fits" if not closer[0].count else "closest is"
    raise Refusal(f"{problem}; {verdict} {closer[0].described(arrays)}")


def _only_fit(arrays: Mapping[str, np.ndarray]) -> Fit:
    nearest = nearest_fits(arrays)
    if not nearest:
        for arch in _candidates(arrays):
            _fit(arrays, arch)  # Says what is wrong with the stem or the classifier.
        raise Refusal(
            f"no architecture here has such names: {_listed(arrays)}; accepted are "
            f"{_ACCEPTED}"
        )
    if nearest[0].count:
        raise Refusal(
            "it fits no architecture here; closest is "
            f"{nearest[0].described(arrays)}; accepted are {_ACCEPTED}"
        )
    # Names and shapes never fit two of today's models; of a later pair, none must be
    # picked by its place in the table.
    if len(nearest) > 1 and not nearest[1].count:
        raise Refusal(
            f"it fits {nearest[0].arch} and {nearest[1].arch}; say which with arch="
        )
    return nearest[0]


def _listed(arrays: Mapping[str, np.ndarray]) -> str:
    return _few([f"{shown(name)} {_shape(arrays[name])}" for name in arrays])


def check_arch(arch: str, prefixes: tuple[str, ...], accepted: str) -> None:
    """`Refusal` unless `arch` is one that can be built and begins as some of them."""
    try:
        model = models.build(arch, num_classes=1)
    except errors.InputError:
        known = False
    else:
        # Shapes are computed before they are compared, so they must not overflow.
        known = getattr(model, "widen_factor", 1) <= MAX_SIZE
        known = known and arch.startswith(prefixes)
    if not known:
        raise Refusal(f"arch {shown(arch)} cannot be imported; accepted are {accepted}")


def foreign_kind(arrays: Mapping[str, np.ndarray]) -> str | None:
    """Why the arrays are of a known kind that no model here represents, if so."""
    if not arrays:
        return "no arrays; expected a PyTorch state dict"
    for name, array in arrays.items():
        first = f"it has {shown(name)} {_shape(array)}"
        if _BOTTLENECK.match(name) and not _has_imagenet_stem(arrays):
            return (
                f"{first}: a bottleneck ResNet without torchvision's 7x7 stem; "
                f"accepted are {_ACCEPTED}"
            )
        if _OTHER_TRANSFORMER.match(name):
            return (
                f"{first}: a vision transformer in another layout than torchvision's; "
                f"accepted are {_ACCEPTED}"
            )
        if name == "conv1.weight" and array.shape[2:] not in ((3, 3), (7, 7)):
            return (
                f"{first}; only stems [channels, inputs, 3, 3] and [channels, inputs, "
                f"7, 7] are accepted, those of {_ACCEPTED}"
            )
    return None


def _has_imagenet_stem(arrays: Mapping[str, np.ndarray]) -> bool:
    stem = arrays.get("conv1.weight")
    return stem is not None and stem.shape[2:] == (7, 7)


def nearest_fits(arrays: Mapping[str, np.ndarray]) -> list[Fit]:
    """One fit for each family whose block names the file uses, the closest first."""
    fits = []
    for arch in _candidates(arrays):
        try:
            fits.append(_fit(arrays, arch))
        except Refusal:
            continue
    return sorted(fits, key=lambda fit: fit.count)


def _candidates(arrays: Mapping[str, np.ndarray]) -> Iterator[str]:
    layers = blocks_per_group(arrays, r"block(\d+)\.layer\.(\d+)\.")
    if layers:
        depths = [int(arch.split("_")[1]) for arch in ARCHS if arch.startswith("wrn_")]
        depth = min(depths, key=lambda depth: abs((depth - 4) // 6 - max(layers)))
        yield f"wrn_{depth}_{_widen_factor(arrays)}"
    layers = blocks_per_group(arrays, r"layer(\d+)\.(\d+)\.")
    families = ("resnet_", "preact_resnet_")
    if _has_imagenet_stem(arrays):
        families = ("imagenet_resnet_",)
    for family in families if layers else ():
        nets = {
            arch: models.build(arch, num_classes=1)
            for arch in ARCHS
            if arch.startswith(family)
        }
        bottleneck = any(_BOTTLENECK.match(name) for name in arrays)
        yield min(
            nets,
            key=lambda arch: (
                getattr(nets[arch], "bottleneck", False) != bottleneck,
                block_distance(nets[arch], layers),
            ),
        )
    if any(_TRANSFORMER.match(name) for name in arrays):
        yield "vit_b_16"


def blocks_per_group(arrays: Mapping[str, np.ndarray], pattern: str) -> tuple[int, ...]:
    """(2, 2, 2) for three groups of two blocks; `pattern` finds both numbers."""
    blocks: dict[str, set[str]] = {}
    for name in arrays:
        if match := re.match(pattern, name):
            blocks.setdefault(match[1], set()).add(match[2])
    return tuple(len(blocks[group]) for group in sorted(blocks))


def block_distance(net: Any, blocks: tuple[int, ...]) -> tuple[int, int]:
    """How far a net's blocks are from those of a file; the first number weighs more."""
    sizes = net.stage_sizes
    return (
        abs(len(sizes) - len(blocks)),
        sum(abs(a - b) for a, b in zip(sizes, blocks, strict=False)),
    )


def _widen_factor(arrays: Mapping[str, np.ndarray]) -> int:
    first = arrays.get("block1.layer.0.conv1.weight")
    stem = arrays.get("conv1.weight")
    if first is None or stem is None or not first.ndim or not stem.ndim:
        return 1
    return min(max(1, first.shape[0] // max(1, stem.shape[0])), MAX_SIZE)


# What the architecture expects ---------------------------------------------------


def _fit(arrays: Mapping[str, np.ndarray], arch: str) -> Fit:
    """Compares names and shapes; `Refusal` if stem or classifier are not usable."""
    names = _module_names(arrays, arch)
    default = models.build(arch, num_classes=1)
    channels, inputs, *_ = sizes(arrays, *_stem(arch))
    classes, _ = sizes(arrays, f"{names['fc']}.weight", "classes, inputs")
    width = width_of(default, channels)
    # A convolutional net takes any size.
    side = (
        image_side(arrays, _LEAVES["position_embedding"], default)
        if arch.startswith("vit_")
        else 8
    )
    model = models.build(arch, num_classes=classes, width=width)
    leaves = _expected(model, (side, side, inputs), names)
    counters = {
        name.removesuffix(".running_var") + _COUNTER
        for name in leaves
        if name.endswith(".running_var")
    }
    return compare(
        {
            name: array
            for name, array in arrays.items()
            if name not in counters or array.size != 1
        },
        arch,
        model,
        leaves,
        stem=_stem(arch)[0],
    )


def width_of(default: Any, channels: int) -> float:
    """The factor `width` of a model whose stem has so many channels.

    Raises:
      Refusal: too many, or no whole number of attention heads.
    """
    widest = channels * getattr(default, "widen_factor", 1)
    if widest > MAX_SIZE:
        raise Refusal(f"{widest} channels; at most {MAX_SIZE} are accepted")
    if not hasattr(default, "dim"):
        # The published stems; powers of two, so the channels come out exactly.
        return channels / (64 if len(getattr(default, "stage_sizes", ())) == 4 else 16)
    if hasattr(default, "head_dim"):
        if channels % default.head_dim:
            raise Refusal(
                f"{channels} channels a token; accepted are multiples of "
                f"{default.head_dim}, the channels of an attention head"
            )
    elif channels % default.heads:
        raise Refusal(
            f"{channels} channels a token; accepted are multiples of the "
            f"{default.heads} attention heads"
        )
    return channels / default.dim


def compare(
    arrays: Mapping[str, np.ndarray],
    arch: str,
    model: Any,
    leaves: dict[str, Leaf],
    *,
    stem: str,
) -> Fit:
    """Names and shapes of the arrays held against those that the model needs."""
    return Fit(
        arch=arch,
        model=model,
        stem=stem,
        leaves=leaves,
        missing=tuple(name for name in leaves if name not in arrays),
        extra=tuple(name for name in arrays if name not in leaves),
        misshaped=tuple(
            name
            for name, leaf in leaves.items()
            if name in arrays and arrays[name].shape != leaf.shape
        ),
    )


def _stem(arch: str) -> tuple[str, str]:
    """PyTorch's name of the first convolution's kernel, and its axes."""
    if arch.startswith("vit_"):
        return "conv_proj.weight", "channels, inputs, 16, 16"
    size = 7 if arch.startswith("imagenet_") else 3
    return "conv1.weight", f"channels, inputs, {size}, {size}"


def image_side(arrays: Mapping[str, np.ndarray], name: str, net: Any) -> int:
    """Pixels on a side of the images that a net with a class token was made for."""
    _, positions, _ = sizes(arrays, name, "1, 1 + patches, channels")
    side = math.isqrt(positions - 1)
    if not side or positions != 1 + side**2:
        raise Refusal(
            f"{name!r} has {positions} positions; expected a class token and the "
            "patches of a square image"
        )
    return side * net.patch


def _module_names(arrays: Mapping[str, np.ndarray], arch: str) -> dict[str, str]:
    """PyTorch's names of the modules that ours call otherwise, blocks left aside."""
    if arch.startswith("vit_"):
        # torchvision before 0.13 called the two layers of the MLP linear_1 and _2.
        old = any(".mlp.linear_1." in name for name in arrays)
        return {
            "patch_embed": "conv_proj",
            **{"norm1": "ln_1", "norm2": "ln_2", "norm": "encoder.ln"},
            **dict.fromkeys(_FUSED, "self_attention.in_proj"),
            "out": "self_attention.out_proj",
            "mlp_in": "mlp.linear_1" if old else "mlp.0",
            "mlp_out": "mlp.linear_2" if old else "mlp.3",
            "fc": "heads.head",
        }
    if arch.startswith("wrn_"):
        return {"shortcut": "convShortcut", "fc": "fc"}
    if arch.startswith("preact_resnet_"):
        return {"shortcut": "shortcut.0", "fc": "linear"}
    shortcut = "downsample" if says_downsample(arrays) else "shortcut"
    # Mixed spellings then show up as missing and left-over names.
    head = "fc" if "fc.weight" in arrays else "linear"
    return {"shortcut": f"{shortcut}.0", "shortcut_bn": f"{shortcut}.1", "fc": head}


def says_downsample(arrays: Iterable[str]) -> bool:
    """Whether the names spell shortcuts as torchvision does."""
    return any(".downsample." in name for name in arrays)


def sizes(arrays: Mapping[str, np.ndarray], name: str, axes: str) -> tuple[int, ...]:
    """Sizes of an array that has the axes named, bounded."""
    if name not in arrays:
        raise Refusal(
            f"{name!r} [{axes}] is missing; there are {len(arrays)} arrays: "
            f"{_listed(arrays)}"
        )
    shape = arrays[name].shape
    if len(shape) != axes.count(",") + 1 or not all(
        1 <= size <= MAX_SIZE for size in shape
    ):
        raise Refusal(
            f"{name!r} is {list(shape)}, expected [{axes}], each 1 to {MAX_SIZE}"
        )
    return shape


def _expected(
    model: Any, image_shape: tuple[int, int, int], names: dict[str, str]
) -> dict[str, Leaf]:
    """Every leaf of the model by PyTorch's name; weights first, then statistics."""
    leaves: dict[str, Leaf] = {}
    for path, shape in traced(model, image_shape):
        modules = [names.get(part, _block_name(part)) for part in path[1:-1]]
        name = ".".join([*modules, _LEAVES[path[-1]]])
        # Parameters of the attention itself, not of a module of that name.
        name = name.replace(".in_proj.", ".in_proj_")
        paths = [*leaves[name].paths, path] if name in leaves else [path]
        if len(paths) > 1:
            paths.sort(key=lambda path: _FUSED.index(path[-2]))
        shape = tuple(shape[axis] for axis in TO_TORCH[len(shape)])
        leaves[name] = Leaf(tuple(paths), (len(paths) * shape[0], *shape[1:]))
    return leaves


# A refusal looks at the same few models twice: as the one asked for, as the nearest.
@functools.lru_cache(maxsize=8)
def traced(
    model: Any, image_shape: tuple[int, int, int]
) -> tuple[tuple[Path, tuple[int, ...]], ...]:
    """Path and shape of every leaf, without arithmetic; parameters come first."""
    variables = common.expected_shapes(model, image_shape)
    return tuple(
        (tuple(entry.key for entry in entries), leaf.shape)
        for collection in ("params", "batch_stats")
        for entries, leaf in jax.tree_util.tree_flatten_with_path(
            {collection: variables[collection]}
        )[0]
    )


def _block_name(name: str) -> str:
    """block2_layer0 -> block2.layer.0, layer2_0 -> layer2.0, others unchanged.

    Blocks of transformers: block2 -> encoder.layers.encoder_layer_1.
    """
    if match := _TRANSFORMER_BLOCK.fullmatch(name):
        return f"encoder.layers.encoder_layer_{int(match[1]) - 1}"
    match = _BLOCK.fullmatch(name)
    if match is None:
        return name
    kind, group, number = match.groups()
    return f"{kind}{group}.{'layer.' if kind == 'block' else ''}{number}"
