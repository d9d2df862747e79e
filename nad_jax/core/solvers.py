# SPDX-License-Identifier: Apache-2.0
"""Roundings that preserve a layer's output, found from second moments alone.

A linear layer maps K inputs to C output channels. Let x be an input of the *quantized*
network, W the float weights, and r = W x - y how far the layer's output has already
drifted from the float network's y because earlier layers were quantized. Rounding
changes W by D. Averaged over images and positions, channel c is off by

    J_c(D) = E (d_c . x + r_c)^2 = d_c' H d_c + 2 d_c . g_c + E r_c^2
    H = E x x'   (gram, [K, K], shared by all channels)
    g = E x r'   (drift, [K, C])

so the images are needed only for H, g and E r^2. With d = step * (rounding - fraction)
and a price for every weight that stays at nearest (EFRAP's flip term at the vertices),
choosing the rounding is a quadratic problem over {0, 1}^K, one per channel.

`coordinate_descent` descends it by single flips; it is monotone and, given sweeps
enough, ends in a point that no single flip improves. That is a local optimum, not a
proof of the global one.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from nad_jax import errors

# Float32 products everywhere: accelerators multiply in bfloat16 or TF32 unless told
# otherwise, and the slopes of a descent would drift away from its objective.
_matmul = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)

# Rows of a small block of coordinate descent.
_SMALL_BLOCK = 32


class Moments(NamedTuple):
    """Sums over rows (image positions); they add up over chunks, devices and hosts.

    Attributes:
      gram: float32 `[K, K]`, sum of x x'.
      drift: float32 `[K, C]`, sum of x r'.
      drift_power: float32 `[C]`, sum of r^2.
      count: float32 scalar, number of rows.
    """

    gram: jax.Array
    drift: jax.Array
    drift_power: jax.Array
    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]


def zero_moments(num_inputs: int, num_outputs: int) -> Moments:
    """The moments of no rows at all."""
    return Moments(
        jnp.zeros((num_inputs, num_inputs), jnp.float32),
        jnp.zeros((num_inputs, num_outputs), jnp.float32),
        jnp.zeros((num_outputs,), jnp.float32),
        jnp.zeros((), jnp.float32),
    )


def add_rows(
    moments: Moments, inputs: jax.Array, drift: jax.Array, *, with_gram: bool = True
) -> Moments:
    """`moments` with more rows counted in.

    Args:
      moments: What was counted before.
      inputs: `[n, K]` layer inputs of the quantized network, float of any width.
      drift: `[n, C]`, output of the float weights on `inputs` minus the float
        network's output.
      with_gram: False leaves the Gram matrix as it is: layers fed by the same tensor
        share one.
    """
    inputs, drift = inputs.astype(jnp.float32), drift.astype(jnp.float32)
    gram = moments.gram
    if with_gram:
        gram = gram + _matmul(inputs.T, inputs)
    return Moments(
        gram,
        moments.drift + _matmul(inputs.T, drift),
        moments.drift_power + jnp.sum(jnp.square(drift), axis=0),
        moments.count + jnp.float32(inputs.shape[0]),
    )


class RoundingProblem(NamedTuple):
    """One layer's choice between two grid points per weight.

    Attributes:
      gram: `[K, K]`, E x x'.
      drift: `[K, C]`, E x r'.
      drift_power: `[C]`, E r^2.
      step: `[K, C]` > 0, distance of the two grid points; 0 where pinned.
      fraction: `[K, C]` in [0, 1), where the float weight stands between them.
      nearest: `[K, C]` in {0, 1}.
      stay_cost: `[K, C]` >= 0, price of leaving a weight at nearest
        (flip_weight * |rounding error|).
      weight: `[C]` > 0, what a channel's objective counts in sums over channels;
        None = 1. Channels are solved one by one, so it changes no rounding: it is
        there for channels that are posed in units of their own.
    """

    gram: jax.Array
    drift: jax.Array
    drift_power: jax.Array
    step: jax.Array
    fraction: jax.Array
    nearest: jax.Array
    stay_cost: jax.Array
    weight: jax.Array | None = None


def rounding_problem(
    moments: Moments,
    *,
    step: jax.Array,
    fraction: jax.Array,
    nearest: jax.Array,
    stay_cost: jax.Array,
    weight: jax.Array | None = None,
) -> RoundingProblem:
    """The problem of a layer whose weights have been flattened to `[K, C]`.

    Raises:
      InputError: the weight's shape does not fit the moments.
    """
    if moments.drift.shape != fraction.shape:
        raise errors.InputError(
            f"moments belong to weights of shape {moments.drift.shape}, the weights "
            f"have {fraction.shape}"
        )
    rows = jnp.maximum(moments.count, 1.0)
    return RoundingProblem(
        moments.gram / rows,
        moments.drift / rows,
        moments.drift_power / rows,
        jnp.broadcast_to(step, fraction.shape),
        fraction,
        nearest,
        jnp.broadcast_to(stay_cost, fraction.shape),
        weight,
    )


def output_error(problem: RoundingProblem, rounding: jax.Array) -> jax.Array:
    """J_c, mean squared output error of each channel `[C]`, without the flip price."""
    change = problem.step * (rounding - problem.fraction)
    slope = _matmul(problem.gram, change) + 2.0 * problem.drift
    return jnp.sum(change * slope, axis=0) + problem.drift_power


def objective(problem: RoundingProblem, rounding: jax.Array) -> jax.Array:
    """What `coordinate_descent` minimises, per channel `[C]`, rounding in {0, 1}."""
    stays = jnp.where(rounding == problem.nearest, problem.stay_cost, 0.0)
    return output_error(problem, rounding) + jnp.sum(stays, axis=0)


def over_channels(problem: RoundingProblem, values: jax.Array) -> jax.Array:
    """Sum of values of each channel `[..., C]` with the channels' weights, `[...]`."""
    if problem.weight is not None:
        values = values * jnp.broadcast_to(problem.weight, values.shape)
    return jnp.sum(values, axis=-1)


class Solution(NamedTuple):
    """Attributes:
    rounding: `[K, C]` in {0, 1}.
    trace: `[max_sweeps + 1]`, objective, `over_channels`, before the first sweep
      and after each; constant once converged.
    sweeps: int32, sweeps that changed something.
    """

    rounding: jax.Array
    trace: jax.Array
    sweeps: jax.Array


def coordinate_descent(
    problem: RoundingProblem,
    start: jax.Array,
    *,
    max_sweeps: int = 20,
    block_size: int = 256,
) -> Solution:
    """Flips one weight at a time, in all channels at once, while that lowers J.

    For weight k of a channel, with slope = H d + g kept up to date,

        change in J = 2 * move * slope_k + move^2 * H_kk + change in price.

    Weights are visited in small blocks: inside one a weight adds to its slope what the
    block itself has moved. The rows of a large block catch up with one matrix product
    per small block, all rows with one per large block.

    Args:
      problem: From `rounding_problem`.
      start: `[K, C]` in {0, 1}; nearest is the natural one.
      max_sweeps: Passes over all weights at most; it stops when one changes nothing.
      block_size: Rows of a large block, about; changes speed, not the sequence of
        flips.

    Returns:
      A `Solution`; its trace never rises (up to float32 rounding of the trace itself).
      With `sweeps` below `max_sweeps`, no single flip would gain more than a millionth
      of what its weight has at stake (`step^2 * H_kk + stay_cost`), up to float32
      rounding of the slopes.

    Gradients: none (`stop_gradient`).
    """
    rounding, trace, sweeps = _descend(
        problem, start, max_sweeps=max_sweeps, block_size=block_size
    )
    return Solution(rounding, over_channels(problem, trace), sweeps)


def descend_from_all(
    problem: RoundingProblem,
    starts: jax.Array,
    *,
    max_sweeps: int = 20,
    block_size: int = 256,
) -> Solution:
    """`coordinate_descent` from several starts; every channel keeps its best end.

    Channels do not depend on each other, so the starts are solved side by side as if
    they were more channels, and the large products stay large.

    Args:
      problem: From `rounding_problem`.
      starts: `[S, K, C]` in {0, 1}; of equally good ends the earlier start's is taken.
      max_sweeps: As for `coordinate_descent`.
      block_size: The same.

    Returns:
      A `Solution` whose trace is that of the chosen descents, which never rises.
    """
    num_starts, num_inputs, num_outputs = starts.shape

    def tile(x):
        return jnp.tile(x, (1,) * (x.ndim - 1) + (num_starts,))

    side_by_side = jax.tree.map(tile, problem)._replace(gram=problem.gram)
    columns = jnp.swapaxes(starts, 0, 1).reshape(num_inputs, -1)
    rounding, trace, sweeps = _descend(
        side_by_side, columns, max_sweeps=max_sweeps, block_size=block_size
    )
    trace = trace.reshape(-1, num_starts, num_outputs)
    best = jnp.argmin(trace[-1], axis=0)[None, None, :]

    def pick(x):
        return jnp.take_along_axis(x, best, axis=1)[:, 0]

    rounding = pick(rounding.reshape(num_inputs, num_starts, num_outputs))
    return Solution(rounding, over_channels(problem, pick(trace)), sweeps)


class Path(NamedTuple):
    """Roundings of one layer for several flip weights.

    Attributes:
      rounding: `[P, K, C]` in {0, 1}.
      objective: `[P]`, `over_channels`, at each flip weight.
      output_error: `[P]`, the same without the flip price.
    """

    rounding: jax.Array
    objective: jax.Array
    output_error: jax.Array


def flip_weight_path(
    problem: RoundingProblem,
    flip_weights: jax.Array,
    *,
    max_sweeps: int = 20,
    block_size: int = 256,
) -> Path:
    """Solves one layer for many flip weights; its moments are measured only once.

    Each weight is solved from nearest and from the solution before it, so that no
    point of the path is worse than `coordinate_descent` alone would make it.

    Args:
      problem: From `rounding_problem`, with `stay_cost` for a flip weight of 1.
      flip_weights: `[P]` >= 0, in the order in which they are to be visited.
      max_sweeps: As for `coordinate_descent`, at each weight.
      block_size: The same.
    """

    def solve(before, flip_weight):
        priced = problem._replace(stay_cost=flip_weight * problem.stay_cost)
        solution = descend_from_all(
            priced,
            jnp.stack([problem.nearest, before]),
            max_sweeps=max_sweeps,
            block_size=block_size,
        )
        error = over_channels(problem, output_error(priced, solution.rounding))
        return solution.rounding, (solution.rounding, solution.trace[-1], error)

    _, points = jax.lax.scan(solve, problem.nearest, flip_weights)
    return Path(*points)


def _descend(
    problem: RoundingProblem, start: jax.Array, *, max_sweeps: int, block_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rounding, trace per channel `[max_sweeps + 1, C]`, sweeps."""
    problem, start = jax.lax.stop_gradient((problem, start))
    num_inputs, num_outputs = problem.fraction.shape
    sizes = _block_sizes(num_inputs, block_size)
    num_blocks = max(-(-num_inputs // sizes[0]), 1)
    padding = num_blocks * sizes[0] - num_inputs

    # Padded weights have step 0, so no flip of theirs ever pays.
    def pad(x, axes):
        return jnp.pad(x, [(0, padding if a in axes else 0) for a in range(x.ndim)])

    gram = pad(problem.gram, (0, 1))
    step, fraction, nearest, stay_cost = (
        pad(x, (0,))
        for x in (problem.step, problem.fraction, problem.nearest, problem.stay_cost)
    )
    diagonal = jnp.diagonal(gram)[:, None]
    weights = _Weights(
        step,
        price_up=jnp.where(nearest == 1.0, stay_cost, -stay_cost),
        # A flip must beat the rounding noise of its own gain, or float32 could cycle:
        # near a tie, the part of the gain that balances the price is as large as the
        # price.
        least_gain=1e-6 * (step * step * diagonal + stay_cost),
    )
    drift = pad(problem.drift, (0,))

    def reached(rounding, slope):
        """`objective`, without another product: the slope is H d + g already."""
        error = jnp.sum(step * (rounding - fraction) * (slope + drift), axis=0)
        stays = jnp.where(rounding == nearest, stay_cost, 0.0)
        return error + problem.drift_power + jnp.sum(stays, axis=0)

    def sweep(carry):
        rounding, slope, trace, sweeps, _ = carry
        swept, slope = _visit_blocks(gram, weights, rounding, slope, sizes)
        changed = jnp.any(swept != rounding)
        sweeps = sweeps + changed.astype(jnp.int32)
        steps = jnp.arange(max_sweeps + 1, dtype=jnp.int32)
        later = (steps >= sweeps) & changed
        trace = jnp.where(later[:, None], reached(swept, slope)[None, :], trace)
        return swept, slope, trace, sweeps, changed

    def unfinished(carry):
        return carry[4] & (carry[3] < max_sweeps)

    start = pad(start.astype(jnp.float32), (0,))
    change = step * (start - fraction)
    slope = _matmul(gram, change) + drift
    trace = jnp.broadcast_to(reached(start, slope), (max_sweeps + 1, num_outputs))
    rounding, _, trace, sweeps, _ = jax.lax.while_loop(
        unfinished, sweep, (start, slope, trace, jnp.int32(0), jnp.bool_(True))
    )
    return rounding[:num_inputs], trace, sweeps


class _Weights(NamedTuple):
    """What a visit asks of a weight, `[K, C]` or the rows of a block.

    Attributes:
      step: As in the problem.
      price_up: Price of rounding 1 minus price of rounding 0.
      least_gain: What a flip must gain.
    """

    step: jax.Array
    price_up: jax.Array
    least_gain: jax.Array

    def rows(self, first: jax.Array, size: int) -> "_Weights":
        return _Weights(*(_rows(x, first, size) for x in self))


def _block_sizes(num_inputs: int, block_size: int) -> tuple[int, ...]:
    """Rows of a block and, if it has any, of the small blocks that it is made of."""
    num_inputs = max(num_inputs, 1)
    # As equal as they can be, or much of the last block would be padding.
    rows = _parts(num_inputs, max(block_size, 1))
    small = _parts(rows, _SMALL_BLOCK)
    return (rows,) if small == rows else (rows + -rows % small, small)


def _parts(total: int, most: int) -> int:
    """Size of the fewest equal parts of at most `most` that hold the total."""
    return -(-total // -(-total // most))


def _rows(x: jax.Array, first: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis=0)


def _visit_blocks(
    gram: jax.Array,
    weights: _Weights,
    rounding: jax.Array,
    slope: jax.Array,
    sizes: tuple[int, ...],
) -> tuple[jax.Array, jax.Array]:
    """Visits weights block by block, `sizes[0]` rows each, those by smaller ones.

    Args:
      gram: `[n, n]`, of these weights.
      weights: `[n, C]`.
      rounding: `[n, C]`.
      slope: `[n, C]`, H d + g.
      sizes: Rows of blocks, each a multiple of the next; n is one of the first.

    Returns:
      Rounding and slope after the visits.
    """
    size, *smaller = sizes

    def visit_block(block, carry):
        rounding, slope = carry
        first = block * size
        columns = jax.lax.dynamic_slice_in_dim(gram, first, size, axis=1)
        own = (
            _rows(columns, first, size),
            weights.rows(first, size),
            _rows(rounding, first, size),
            _rows(slope, first, size),
        )
        if smaller:
            visited, _ = _visit_blocks(*own, tuple(smaller))
        else:
            visited = _visit_rows(*own)
        moved = own[1].step * (visited - own[2])
        rounding = jax.lax.dynamic_update_slice_in_dim(rounding, visited, first, axis=0)
        return rounding, slope + _matmul(columns, moved)

    return jax.lax.fori_loop(0, len(slope) // size, visit_block, (rounding, slope))


def _visit_rows(
    gram: jax.Array, weights: _Weights, rounding: jax.Array, slope: jax.Array
) -> jax.Array:
    """Rounding after one visit of each row; a visit adds up what others have moved."""

    def visit(k, carry):
        rounding, moved = carry

        def row(x):
            return jax.lax.dynamic_index_in_dim(x, k, keepdims=False)

        direction = 1.0 - 2.0 * row(rounding)
        move = row(weights.step) * direction
        gram_row = row(gram)
        own_slope = row(slope) + jnp.sum(gram_row[:, None] * moved, axis=0)
        gain = 2.0 * move * own_slope + move * move * gram_row[k]
        pays = gain + direction * row(weights.price_up) < -row(weights.least_gain)
        flips = pays & (row(weights.step) > 0.0)

        def put(x, value):
            return jax.lax.dynamic_update_index_in_dim(x, value, k, axis=0)

        rounding = put(rounding, row(rounding) + jnp.where(flips, direction, 0.0))
        return rounding, put(moved, jnp.where(flips, move, 0.0))

    start = (rounding, jnp.zeros_like(slope))
    return jax.lax.fori_loop(0, len(slope), visit, start)[0]
