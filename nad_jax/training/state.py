# SPDX-License-Identifier: Apache-2.0
"""The whole state of a training run in one pytree.

Everything that decides what happens next is in `TrainState`: a run that is given the
state of an epoch boundary continues exactly as if it had never stopped. Nothing random
is stored besides `key`; each use derives its own key from (key, purpose, counter), so
no order of splitting has to be remembered.
"""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

# One number per use of randomness; never reuse one, old runs would change.
SHUFFLE = 0
AUGMENT = 1
LOSS = 2
VIEWS = 3
STATISTICS = 4


class TrainState(flax.struct.PyTreeNode):
    """State of a run.

    Attributes:
        params: trained weights.
        batch_stats: running statistics of batch normalisation, `{}` without any.
        opt_state: state of the optax transformation.
        step: optimiser steps done, int32 `[]`.
        epoch: epochs finished, int32 `[]`.
        key: typed key the run was started with; it never changes.
    """

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array
    epoch: jax.Array
    key: jax.Array


def create(
    variables: Mapping[str, Any], tx: optax.GradientTransformation, key: jax.Array
) -> TrainState:
    """State at step 0 of a run that starts from `variables`.

    Args:
        variables: Flax variables, "params" and, if the model has any, "batch_stats".
        tx: optimiser.
        key: typed key; the source of all randomness of the run.
    """
    return TrainState(
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=tx.init(variables["params"]),
        step=jnp.zeros((), jnp.int32),
        epoch=jnp.zeros((), jnp.int32),
        key=key,
    )


def variables(state: TrainState) -> dict[str, Any]:
    """Flax variables of the state, ready for `model.apply`."""
    return {"params": state.params, "batch_stats": state.batch_stats}


def derive_key(
    key: jax.Array, purpose: int, counter: int | jax.Array | None = None
) -> jax.Array:
    """Key for one use (`SHUFFLE`, `AUGMENT`, ...) at one counter value."""
    purpose_key = jax.random.fold_in(key, purpose)
    if counter is None:
        return purpose_key
    return jax.random.fold_in(purpose_key, counter)
