# SPDX-License-Identifier: Apache-2.0
"""Choosing EFRAP's flip weight from clean images alone.

The rule: some of the clean, unlabelled images are held out. Candidates are tried in
ascending order, beginning with 0, pure reconstruction. A candidate is too much if its
network calls more held-out images otherwise than the float network does than that of
pure reconstruction, by more than `tolerance`; the choice is the last before the first
that is. So as many weights leave nearest as clean images can afford, and no trigger,
target or label is asked for.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.defenses import quantized_module
from nad_jax.models import layers as layers_lib

CANDIDATES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
# Arguments of `efrap` that are not the caller's here: the first three are set for every
# candidate, and layers that one candidate finished are not those of the next.
_OWN = ("method", "flip_weight", "layers", "finished", "on_layer")


class Choice(NamedTuple):
    """Attributes:
    flip_weight: The weight chosen.
    disagreement: Candidate -> share of held-out images called otherwise than by the
      float network, of those that were tried.
    """

    flip_weight: float
    disagreement: dict[float, float]


def choose_flip_weight(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    candidates: Sequence[float] = CANDIDATES,
    tolerance: float = 0.01,
    held_out: float = 0.5,
    apply_kwargs: Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Choice:
    """The flip weight for `efrap(method="coordinate")`.

    Args:
      module: As for `efrap`; its output, or the first array of it, is logits.
      variables: As for `efrap`.
      images: Clean and unlabelled, `[N, ...]`; the last ones are held out.
      candidates: Ascending, the first is 0.
      tolerance: Share of held-out images that flipping may cost, at least 0; from 1 on
        every candidate is good.
      held_out: Share of the images that is held out, in (0, 1).
      apply_kwargs: As for `efrap`.
      **arguments: Further ones of `efrap`: widths, grid, prices, starts. Not `method`,
        `flip_weight`, `layers`, `finished` and `on_layer`.

    Raises:
      InputError: candidates that do not ascend from 0, a tolerance or a share out of
        range, too few images, or one of the arguments named above.
    """
    for name in _OWN:
        if name in arguments:
            raise errors.InputError(
                f"{name} cannot be chosen here: every candidate is a run of its own, "
                "by coordinate descent, of all layers"
            )
    if not candidates or candidates[0] != 0 or list(candidates) != sorted(candidates):
        raise errors.InputError(
            f"candidates must ascend from 0, got {tuple(candidates)}"
        )
    if not 0 <= tolerance < math.inf:
        raise errors.InputError(f"tolerance must be >= 0 and finite, got {tolerance}")
    if not 0 < held_out < 1:
        raise errors.InputError(f"held_out must be in (0, 1), got {held_out}")
    images = jnp.asarray(images)
    num_held_out = int(round(held_out * len(images)))
    if not 0 < num_held_out < len(images):
        raise errors.InputError(
            f"held_out must leave images on both sides, got {held_out} of {len(images)}"
        )
    seen, unseen = images[:-num_held_out], images[-num_held_out:]
    kwargs = dict(apply_kwargs or {})
    layers = layers_lib.find_layers(module, variables, seen, apply_kwargs=kwargs)

    def classes(net, act_params, act_specs):
        outputs = quantized_module.apply_quantized(
            module,
            net,
            unseen,
            act_params,
            act_spec=act_specs or None,
            apply_kwargs=kwargs,
        )
        return np.argmax(np.asarray(jax.tree.leaves(outputs)[0]), axis=-1)

    wanted = classes(variables, {}, {})
    disagreement: dict[float, float] = {}
    chosen = 0.0
    for candidate in candidates:
        result = efrap_lib.efrap(
            module,
            variables,
            seen,
            method="coordinate",
            flip_weight=candidate,
            layers=layers,
            apply_kwargs=kwargs,
            **arguments,
        )
        got = classes(result.variables, result.act_params, result.act_specs)
        disagreement[candidate] = float(np.mean(got != wanted))
        if disagreement[candidate] > disagreement[0.0] + tolerance:
            break
        chosen = candidate
    return Choice(chosen, disagreement)
