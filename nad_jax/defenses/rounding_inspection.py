# SPDX-License-Identifier: Apache-2.0
"""How suspicious the rounding of a float model is, asked without a trigger.

A model whose backdoor wakes when it is rounded was trained against one grid, and that
leaves traces which clean training does not:

* *Ties.* Weights pushed to the edges of their rounding cells crowd around the ties of
  that grid. Whether there are too many is judged by the model itself: the same weights
  on grids of slightly other steps, which nobody trained against, tell what to expect.
* *Drift.* Nearest rounding changes what the model says about clean images more than a
  rounding by chance does, although it moves weights less.
* *Outliers.* A few huge weights make a scale so coarse that all else rounds to 0.

Each is a number with a limit; `score` is the largest of their ratios, and above 1 the
model deserves a closer look. It proves nothing either way: an attacker who keeps all
rounding errors small shows no ties.
"""

import dataclasses
import functools
import statistics
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nad_jax.core import grids, quantization
from nad_jax.defenses import common_sizes
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.models import layers as layers_lib
from nad_jax.training import evaluation

# Distance from a tie, in steps, at which a weight counts as near it.
TIE_DISTANCE = 0.05
# Steps of the grids that tell what to expect, as multiples of the real one's.
_OTHER_STEPS = (0.83, 0.87, 0.91, 0.95, 1.05, 1.09, 1.13, 1.17)
# Above these a model is suspicious; ties must also be more than counting so few weights
# explains. That of ties is set on seeds 3 and 4 of `benchmarks.inspection_rates`, which
# tells how often the limits are right on others.
TIE_LIMIT, DRIFT_LIMIT, OUTLIER_LIMIT = 1.03, 1.5, 60.0
_TIE_DEVIATIONS = 4.0
# A number that JSON can hold stands for all that is larger, infinity included.
_MOST_OUTLIER_RATIO = 1e6
# One alone scatters too much to compare anything with.
_CHANCE_DRAWS = 5
# Share of images below which a drift is not told from none.
_LEAST_DRIFT = 0.02


@dataclasses.dataclass(frozen=True)
class LayerInspection:
    """Attributes:
    name: Path joined by "/".
    weights: How many weights there are, zeros left out.
    near_ties: How many of them are near a tie.
    expected_near_ties: How many would be on grids nobody trained against.
    outlier_ratio: Largest over median magnitude, of the scale group (output channel,
      or layer) where that is largest; at most 1e6, which it is if most of a group is
      zero and the rest is not.
    """

    name: str
    weights: int
    near_ties: int
    expected_near_ties: float
    outlier_ratio: float


@dataclasses.dataclass(frozen=True)
class Inspection:
    """Attributes:
    layers: One entry for each layer, in the order of the forward pass.
    tie_ratio: Weights near ties over those expected, whole model; 1 is unsuspicious.
    outlier_ratio: The largest of any layer.
    drift: Share of clean images that nearest rounding calls otherwise.
    drift_by_chance: The same for stochastic rounding, mean over five draws.
    """

    layers: tuple[LayerInspection, ...]
    tie_ratio: float
    outlier_ratio: float
    drift: float
    drift_by_chance: float

    @property
    def drift_ratio(self) -> float:
        """Drift of nearest over that by chance."""
        return self.drift / max(self.drift_by_chance, _LEAST_DRIFT)

    @property
    def tie_limit(self) -> float:
        """`TIE_LIMIT`, or four standard deviations of the count if that is more."""
        expected = sum(layer.expected_near_ties for layer in self.layers)
        return max(TIE_LIMIT, 1.0 + _TIE_DEVIATIONS / max(expected, 1.0) ** 0.5)

    @property
    def score(self) -> float:
        """Largest ratio of a finding to its limit; above 1 is suspicious."""
        return max(
            self.tie_ratio / self.tie_limit,
            self.outlier_ratio / OUTLIER_LIMIT,
            self.drift_ratio / DRIFT_LIMIT,
        )


def inspect(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    weight_bits: int = 4,
    act_bits: int | None = None,
    grid: str | grids.Grid = "plain",
    apply_kwargs: Mapping[str, Any] | None = None,
) -> Inspection:
    """Looks for traces of training against one grid; nothing is changed.

    Args:
      module: As for `efrap`; its output, or the first array of it, is logits.
      variables: Its float variables.
      images: Clean and unlabelled, `[N, ...]`.
      weight_bits: Width of the grid looked at; an attack on another grid leaves its
        traces there, so several may have to be tried.
      act_bits: Width of layer inputs, for the drift.
      grid: The rest of the grid.
      apply_kwargs: Keyword arguments of the module's call.

    Raises:
      InputError: as `efrap`.
    """
    kwargs = dict(apply_kwargs or {})
    rounded, *by_chance = (
        efrap_lib.efrap(
            module,
            variables,
            images,
            weight_bits=weight_bits,
            act_bits=act_bits,
            method=method,
            grid=grid,
            apply_kwargs=kwargs,
            key=jax.random.key(draw),
        )
        for draw, method in enumerate(["nearest"] + _CHANCE_DRAWS * ["stochastic"])
    )
    folds = (grids.named(grid) if isinstance(grid, str) else grid).fold_batch_norm
    layers = layers_lib.find_layers(module, variables, images, apply_kwargs=kwargs)
    own = layers_lib.fold_batch_norm(variables, layers) if folds else variables
    found = tuple(
        _inspect_layer(
            layer,
            layers_lib.get_in(own["params"], layer.path)["kernel"],
            rounded.quant_params[layer.name],
            rounded.specs[layer.name],
        )
        for layer in layers
    )
    expected = sum(layer.expected_near_ties for layer in found)
    return Inspection(
        found,
        sum(layer.near_ties for layer in found) / max(expected, 1.0),
        max(layer.outlier_ratio for layer in found),
        _drift(module, variables, images, rounded, kwargs),
        statistics.fmean(
            _drift(module, variables, images, result, kwargs) for result in by_chance
        ),
    )


def _inspect_layer(layer, kernel, params, spec) -> LayerInspection:
    padded = common_sizes.pad_kernel(kernel)
    matrix = np.abs(np.asarray(kernel, np.float64)).reshape(-1, kernel.shape[-1])
    if spec.channel_axis is None:
        matrix = matrix.reshape(-1, 1)
    median = np.median(matrix, axis=0)
    largest = matrix.max(axis=0)
    alive = largest > 0
    ratios = np.divide(
        largest, median, out=np.full_like(largest, np.inf), where=median > 0
    )
    scale = np.asarray(params.scale).reshape(1, -1)
    scale = np.pad(
        np.broadcast_to(scale, (1, kernel.shape[-1])),
        ((0, 0), (0, padded.shape[1] - kernel.shape[-1])),
        constant_values=1.0,
    )
    counts = np.asarray(_count_ties(padded, scale))
    return LayerInspection(
        layer.name,
        int(np.count_nonzero(matrix)),
        int(counts[0]),
        float(np.mean(counts[1:])),
        min(float(np.max(ratios[alive], initial=1.0)), _MOST_OUTLIER_RATIO),
    )


@functools.partial(jax.jit)
def _count_ties(kernel, scale) -> jax.Array:
    """Nonzero weights near ties, for the step itself and for each of the others."""

    def count(factor):
        steps = quantization.divide(kernel, scale * factor)
        distance = jnp.abs(jnp.abs(steps - jnp.round(steps)) - 0.5)
        return jnp.sum(((distance < TIE_DISTANCE) & (kernel != 0.0)).astype(jnp.int32))

    return jax.lax.map(count, jnp.asarray((1.0, *_OTHER_STEPS), jnp.float32))


def _drift(module, variables, images, rounded, kwargs) -> float:
    def classes(outputs):
        return np.argmax(np.asarray(jax.tree.leaves(outputs)[0]), axis=-1)

    changed = 0
    for start in range(0, len(images), evaluation.DEFAULT_BATCH_SIZE):
        some = images[start : start + evaluation.DEFAULT_BATCH_SIZE]
        before = classes(module.apply(variables, some, **kwargs))
        after = classes(rounded.apply(rounded.variables, some))
        changed += int(np.sum(before != after))
    return changed / len(images)
