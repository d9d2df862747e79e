# SPDX-License-Identifier: Apache-2.0
"""Rounding in one pass: each weight makes up for the errors of those before it.

With H = R' R (R upper triangular), the output error of a channel is

    J = sum over k of (R_kk * t_k)^2,   t_k = d_k + sum over j > k of R_kj / R_kk * d_j

up to a constant, where d is the change of the weights measured from the best continuous
one, -H^-1 g. Going from the last weight to the first, t_k is made small by the choice
of weight k alone, since everything after it is settled: GPTQ, LDLQ and Babai's nearest
plane are this pass. A price on staying at nearest only shifts the threshold of each
choice, so EFRAP's objective needs no second pass either.

It costs about as much as one sweep of coordinate descent. Its result is no optimum of
any kind, but a good start: it sees how errors cancel, which single flips do not.
"""

import functools

import jax
import jax.numpy as jnp

from nad_jax.core import solvers

_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def error_feedback(
    problem: solvers.RoundingProblem,
    *,
    damping: float = 0.01,
    block_size: int = 64,
) -> jax.Array:
    """Rounding `[K, C]` in {0, 1} of one pass with feedback and price.

    Args:
      problem: From `solvers.rounding_problem`. Pinned weights (step 0) keep nearest.
      damping: Added to the diagonal of H, as a share of its mean over live inputs;
        makes H invertible.
      block_size: Weights settled between two large products; changes speed only.

    Gradients: none (`stop_gradient`).

    References:
      Frantar et al., "GPTQ", ICLR 2023; Chee et al., "QuIP", NeurIPS 2023 (LDLQ).
    """
    problem = _normalized(jax.lax.stop_gradient(problem))
    num_inputs = problem.fraction.shape[0]
    # The input that matters most goes first, while all others can still make up for it.
    order = jnp.argsort(jnp.diagonal(problem.gram))
    gram = problem.gram[order][:, order]
    step, fraction, nearest, stay_cost, drift = (
        x[order]
        for x in (
            problem.step,
            problem.fraction,
            problem.nearest,
            problem.stay_cost,
            problem.drift,
        )
    )
    damping = max(damping, float(jnp.finfo(jnp.float32).eps))
    gram = gram + jnp.float32(damping) * jnp.eye(num_inputs, dtype=jnp.float32)
    factor = jnp.linalg.cholesky(gram, upper=True)
    # Only damped inputs of dead layers could leave a NaN; they have no error to feed.
    best = -jax.scipy.linalg.cho_solve((factor, False), drift)
    root = jnp.diagonal(factor)
    weight = jnp.square(root)
    feedback = factor / root[:, None]

    block_size = max(min(block_size, num_inputs), 1)
    padding = -num_inputs % block_size
    num_blocks = (num_inputs + padding) // block_size

    def pad(x):
        return jnp.pad(x, ((padding, 0), *[(0, 0)] * (x.ndim - 1)))

    # Padding stands in front, so it is visited last and feeds nobody.
    step, fraction, nearest, stay_cost, best = (
        pad(x) for x in (step, fraction, nearest, stay_cost, best)
    )
    weight = pad(weight)
    feedback = jnp.pad(feedback, ((padding, 0), (padding, 0)))

    def settle(i, carry, rows):
        """Weight k of a block, from its last to its first."""
        chosen, errors, owed, block_feedback = carry
        k = block_size - 1 - i
        step, fraction, nearest, stay_cost, best, weight = (x[k] for x in rows)
        # Errors of the change to the weight, from the best one, for both choices.
        low, high = (step * (v - fraction) - best + owed[k] for v in (0.0, 1.0))
        price_up = jnp.where(nearest == 1.0, stay_cost, -stay_cost)
        up = weight * (jnp.square(high) - jnp.square(low)) + price_up < 0.0
        up = jnp.where(step > 0.0, up, nearest == 1.0)
        value = up.astype(jnp.float32)
        error = step * (value - fraction) - best
        owed = owed + block_feedback[:, k][:, None] * error[None, :]
        return (
            chosen.at[k].set(value),
            errors.at[k].set(error),
            owed,
            block_feedback,
        )

    def settle_block(i, carry):
        chosen, owed = carry
        first = (num_blocks - 1 - i) * block_size

        def rows(x):
            return jax.lax.dynamic_slice_in_dim(x, first, block_size, axis=0)

        columns = jax.lax.dynamic_slice_in_dim(feedback, first, block_size, axis=1)
        constants = tuple(
            rows(x) for x in (step, fraction, nearest, stay_cost, best, weight)
        )
        own = rows(owed)
        start = (jnp.zeros_like(own), jnp.zeros_like(own), own, rows(columns))
        block, errors, _, _ = jax.lax.fori_loop(
            0, block_size, lambda j, c: settle(j, c, constants), start
        )
        chosen = jax.lax.dynamic_update_slice_in_dim(chosen, block, first, axis=0)
        return chosen, owed + _matmul(columns, errors)

    zeros = jnp.zeros_like(fraction)
    chosen, _ = jax.lax.fori_loop(0, num_blocks, settle_block, (zeros, zeros))
    return jnp.zeros_like(problem.fraction).at[order].set(chosen[padding:])


def _normalized(problem: solvers.RoundingProblem) -> solvers.RoundingProblem:
    """The same choice with inputs of mean power 1, those that are always 0 left out."""
    diagonal = jnp.diagonal(problem.gram)
    live = jnp.sum((diagonal > 0.0).astype(jnp.float32))
    power = jnp.sum(diagonal) / jnp.maximum(live, 1.0)
    power = jnp.where(power > 0.0, power, 1.0)
    return problem._replace(
        gram=problem.gram / power,
        drift=problem.drift / power,
        stay_cost=problem.stay_cost / power,
    )
