# SPDX-License-Identifier: Apache-2.0
"""State dicts of image classifiers as variables of this package's models.

PyTorch's names and layouts:

    wrn_D_K               NAD's code and checkpoints: block2.layer.0.convShortcut, fc
    resnet_18, _34        kuangliu's CIFAR collection: layer2.0.shortcut.0/1, linear
    resnet_8 ... _32      NAD's CIFAR nets: layer2.0.downsample.0/1, fc
    preact_resnet_18      BackdoorBench: layer2.0.shortcut.0, linear, no last BatchNorm
    imagenet_resnet_18,   torchvision's resnet18, 34, 50: 7x7 stem, downsample, fc
      _34, _50
    vit_b_16              torchvision's vit_b_16, for images of any one size

The two spellings of the shortcut and of the classifier are accepted for every
post-activation net, and torchvision's older spelling of a transformer's MLP. What a
leaf is called and what shape it has is asked of the Flax module itself, so the map
cannot drift from the models; every leaf is in one array of the file and every array
filled by its leaves (one; for a transformer's `in_proj_weight` and `_bias` the stacked
query, key and value), or the file is refused. Refused with a reason: bottleneck blocks
behind a 3x3 stem, deeper or wider bottleneck nets, other vision transformers (timm's
names, other patch sizes or depths), a last BatchNorm the model does not have.

Names with slashes are paths of Flax variables of any model here, `flax_match`.

Three things that change the logits leave no trace in the weights and are the caller's
to know; `Converted.notes` repeats those that apply:

- how pixels were normalised (the models here see [0, 1]);
- strides, and whether a max-pool follows the stem. Here a 3x3 stem has stride 1 and no
  pool, a 7x7 stem stride 2 and a 3x3 max-pool, a bottleneck its stride in the 3x3
  convolution; a transformer's head has 64 channels;
- epsilon: 1e-5 of BatchNorm, PyTorch's default; 1e-6 of LayerNorm, torchvision's.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nad_jax import errors
from nad_jax.interop import arch_match, flax_match, stored_array
from nad_jax.interop.bounded_file import Refusal, shown

ARCHS = arch_match.ARCHS
# Axes by rank, of arrays that have Flax's layout already.
_FLAX = {rank: tuple(range(rank)) for rank in range(1, 5)}


@dataclasses.dataclass(frozen=True)
class Converted:
    """A foreign model as one of ours.

    Attributes:
      arch: its name for `models.build`.
      num_classes: rows of the classifier.
      width: factor on the published channel counts, read from the stem; a transformer
        has heads of 64 channels at every width.
      model: the Flax module, float32; `models.build(arch, num_classes=..., width=...)`
        builds it with other options.
      variables: `{"params": ..., "batch_stats": ...}`, float32 on the default device.
      names: name of each array -> the paths of its leaves in `variables`: one, or
        several that are stacked along the array's first axis.
      notes: one line for each thing a reader of the result should know.
    """

    arch: str
    num_classes: int
    width: float
    model: Any
    variables: dict[str, Any]
    names: dict[str, tuple[arch_match.Path, ...]]
    notes: tuple[str, ...]


def convert(
    arrays: Mapping[str, np.ndarray],
    arch: str | None = None,
    *,
    source: str | None = None,
) -> Converted:
    """The model whose state dict, or whose variables by name, are `arrays`.

    Evaluation gives the same logits as PyTorch's up to rounding, for images prepared
    as the original expects them.

    Args:
      arrays: name -> array in PyTorch's layout, or path -> array in Flax's, as
        `reader.read_checkpoint` returns them; float16, bfloat16 and float64 become
        float32. BatchNorm's "num_batches_tracked" may be there or not and is ignored.
      arch: one of `ARCHS` or another `wrn_D_K` (for variables of Flax any model);
        None finds it by names and shapes.
      source: what error messages begin with, such as the path of the file.

    Raises:
      InputError: one line: an architecture that cannot be converted; arrays missing,
        left over or of another shape, the first of each kind with shapes and with the
        architecture that comes closest; values that are no weights (integers, NaN or
        infinity in float32, a negative running variance).
    """
    try:
        match = flax_match if flax_match.are_flax(arrays) else arch_match
        fit = match.choose(arrays, arch)
        tree, dtypes = _filled(arrays, fit.leaves)
    except Refusal as refusal:
        label = "state dict" if source is None else shown(source, 200)
        raise errors.InputError(f"{label}: {refusal}") from None
    return Converted(
        arch=fit.arch,
        num_classes=fit.model.num_classes,
        width=fit.model.width,
        model=fit.model,
        variables=jax.device_put(tree),
        names={name: leaf.paths for name, leaf in fit.leaves.items()},
        notes=tuple(_notes(arrays, fit, dtypes, guessed=arch is None)),
    )


def as_found(
    variables: Mapping[str, Any], names: Mapping[str, tuple[arch_match.Path, ...]]
) -> dict[str, np.ndarray]:
    """The way back: variables of a converted model as the file had them.

    Args:
      variables: of the tree structure of `Converted.variables`, for example after a
        defence.
      names: `Converted.names`.

    Returns:
      Name -> float32 array in the file's layout, without what `convert` ignores.
    """
    arrays = {}
    for name, paths in names.items():
        axes = _FLAX if flax_match.are_flax([name]) else arch_match.TO_TORCH
        parts = [_reordered(variables, path, axes) for path in paths]
        # Concatenation alone keeps the order that the parts have in memory.
        arrays[name] = np.array(np.concatenate(parts), order="C")
    return arrays


def _reordered(
    variables: Any, path: arch_match.Path, axes: Mapping[int, tuple[int, ...]]
) -> np.ndarray:
    for key in path:
        variables = variables[key]
    array = np.asarray(variables)
    return array.transpose(axes[array.ndim])


# Values --------------------------------------------------------------------------


def _filled(
    arrays: Mapping[str, np.ndarray], leaves: Mapping[str, arch_match.Leaf]
) -> tuple[dict[str, Any], dict[str, int]]:
    """The tree of variables, and how many arrays had each dtype but float32."""
    axes = _FLAX if flax_match.are_flax(arrays) else arch_match.TO_FLAX
    tree: dict[str, Any] = {}
    dtypes: dict[str, int] = {}
    for name, leaf in leaves.items():
        array = arrays[name]
        if array.dtype.newbyteorder("=") != np.float32:
            dtypes[array.dtype.name] = dtypes.get(array.dtype.name, 0) + 1
        # What PyTorch stacks along the outputs has them last here.
        parts = np.split(_value(name, array, axes), len(leaf.paths), axis=-1)
        for path, part in zip(leaf.paths, parts, strict=True):
            branch = tree
            for key in path[:-1]:
                branch = branch.setdefault(key, {})
            branch[path[-1]] = part
    return tree, dtypes


def _value(
    name: str, array: np.ndarray, axes: Mapping[int, tuple[int, ...]]
) -> np.ndarray:
    """A checked float32 copy in Flax's layout; a copy, as JAX may keep the memory."""
    if not stored_array.is_floating(array.dtype):
        raise Refusal(
            f"{shown(name)} is {array.dtype.name}; weights are float32, float16, "
            "bfloat16 or float64"
        )
    with np.errstate(over="ignore"):
        value = np.array(array.transpose(axes[array.ndim]), dtype=np.float32, order="C")
    if bad := stored_array.count_nonfinite(value):
        raise Refusal(
            f"{shown(name)} holds {bad} values of {value.size} that are not finite in "
            "float32"
        )
    if name.endswith((".running_var", "/var")) and value.min() < 0:
        raise Refusal(
            f"{shown(name)} holds {value.min():g}; a running variance is >= 0"
        )
    return value


def _notes(
    arrays: Mapping[str, np.ndarray],
    fit: arch_match.Fit,
    dtypes: Mapping[str, int],
    *,
    guessed: bool,
) -> Iterator[str]:
    if guessed:
        yield f"{fit.arch} was recognised by names and shapes"
    if fit.model.width != 1.0:
        yield f"{fit.model.width:g} of the published channels, read from {fit.stem}"
    for dtype, count in dtypes.items():
        yield f"{count} arrays were {dtype} and are float32 now"
    ignored = len(arrays) - len(fit.leaves)
    if ignored:
        of_flax = flax_match.are_flax(arrays)
        kind = "arrays of a trigger" if of_flax else "counters num_batches_tracked"
        yield f"{ignored} {kind} were ignored"
    if assumption := _assumption(arrays, fit):
        yield (
            f"{assumption} are assumed, as the weights do not say; a net with others "
            "gives other logits: compare the accuracy"
        )
    yield (
        "the file does not say how pixels were normalised; this model takes what the "
        "original took, [0, 1] only if that was so"
    )


def _assumption(arrays: Mapping[str, np.ndarray], fit: arch_match.Fit) -> str | None:
    """What the map takes for granted although nets of the same names differ in it."""
    if fit.arch == "vit_tiny":
        return f"{fit.model.heads} attention heads"
    if fit.arch.startswith("vit_"):
        return f"attention heads of {fit.model.head_dim} channels"
    if fit.arch.startswith("imagenet_"):
        return "torchvision's strides and its max-pool after the stem"
    if arch_match.says_downsample(arrays) and len(fit.model.stage_sizes) == 4:
        # torchvision's class with another stem; some such nets keep its max-pool.
        return "stride 1 and no max-pool after the stem"
    return None
