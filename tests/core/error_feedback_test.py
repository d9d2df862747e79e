# SPDX-License-Identifier: Apache-2.0
"""One pass of feedback against the textbook loop in float64 and all roundings."""

import itertools

import jax
import numpy as np
import pytest

from nad_jax.core import error_feedback, solvers

feedback = jax.jit(
    error_feedback.error_feedback, static_argnames=("damping", "block_size")
)


def random_problem(seed, shape, flip_weight=0.0, rank=None):
    random = np.random.default_rng(seed)
    inputs = np.maximum(random.normal(size=(6 * shape[0], shape[0])), 0)
    if rank:
        mixed = random.normal(size=(len(inputs), rank)) @ random.normal(
            size=(rank, shape[0])
        )
        inputs = np.maximum(mixed + 0.1 * inputs, 0)
    drift = 0.1 * random.normal(size=(len(inputs), shape[1]))
    step = np.broadcast_to(random.uniform(0.05, 0.2, shape[1]), shape)
    fraction = random.uniform(0.01, 0.99, shape)
    pinned = random.random(shape) < 0.1
    step, fraction = np.where(pinned, 0, step), np.where(pinned, 0, fraction)
    nearest = np.round(fraction)
    error = step * np.abs(fraction - nearest)
    arrays = (
        inputs.T @ inputs / len(inputs),
        inputs.T @ drift / len(inputs),
        np.square(drift).mean(0),
        step,
        fraction,
        nearest,
        flip_weight * error,
    )
    return solvers.RoundingProblem(*(a.astype(np.float32) for a in arrays))


def by_hand(problem, damping=0.01):
    """The pass as GPTQ writes it: settle a weight, move all that are left.

    Float64, with an explicit inverse of what is left instead of a Cholesky factor.
    """
    gram = np.float64(problem.gram)
    order = np.argsort(np.diagonal(gram), kind="stable")[::-1]
    gram = gram + damping * np.diagonal(gram).mean() * np.eye(len(gram))
    best = -np.linalg.solve(gram, np.float64(problem.drift))
    # In the space of changes of weights; `left` holds what is wanted of each.
    wanted, chosen = best.copy(), np.zeros(best.shape)
    left = list(order)
    while left:
        k = left.pop(0)
        rest = np.array(left, int)
        step, fraction = problem.step[k], problem.fraction[k]
        curvature = gram[k, k]
        if len(rest):
            link = np.linalg.solve(gram[np.ix_(rest, rest)], gram[rest, k])
            # What the others, left free, cannot make up for.
            curvature = curvature - gram[k, rest] @ link
        cost = [
            curvature * (step * (v - fraction) - wanted[k]) ** 2
            + problem.stay_cost[k] * (problem.nearest[k] == v)
            for v in (0, 1)
        ]
        value = np.where(step > 0, cost[1] < cost[0], problem.nearest[k])
        chosen[k] = value
        missed = step * (value - fraction) - wanted[k]
        if len(rest):
            wanted[rest] -= link[:, None] * missed
    return chosen


def objective(problem, chosen):
    """In float64, per channel."""
    change = np.float64(problem.step) * (chosen - np.float64(problem.fraction))
    gram, drift = np.float64(problem.gram), np.float64(problem.drift)
    error = np.sum(change * (gram @ change + 2 * drift), 0) + problem.drift_power
    return error + np.sum((chosen == problem.nearest) * problem.stay_cost, 0)


@pytest.mark.slow
@pytest.mark.parametrize("flip_weight", [0.0, 0.03])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_one_pass_is_the_textbook_loop(seed, flip_weight):
    problem = random_problem(seed, (40, 12), flip_weight)
    got, expected = np.asarray(feedback(problem)), by_hand(problem)
    assert np.mean(got != expected) < 0.01, "but for float32 ties"
    assert np.any(expected != problem.nearest)


@pytest.mark.slow
def test_blocks_change_nothing():
    problem = random_problem(3, (40, 12), 0.01)
    whole = np.asarray(feedback(problem, block_size=64))
    np.testing.assert_array_equal(feedback(problem, block_size=7), whole)


@pytest.mark.slow
@pytest.mark.parametrize("flip_weight", [0.0, 0.03])
def test_it_closes_most_of_the_gap_to_the_best_of_all_roundings(flip_weight):
    every = np.array(list(itertools.product([0.0, 1.0], repeat=10)))
    closed = []
    for seed in range(8):
        problem = random_problem(seed, (10, 12), flip_weight, rank=4)
        got = objective(problem, np.asarray(feedback(problem)))
        nearest = objective(problem, problem.nearest)
        best = np.full(12, np.inf)
        for c in range(12):
            one = solvers.RoundingProblem(
                problem.gram, *(np.asarray(x)[..., c : c + 1] for x in problem[1:-1])
            )
            choices = np.where(one.step[:, 0] > 0, every, one.nearest[:, 0])
            errors = objective(
                solvers.RoundingProblem(
                    one.gram,
                    *(np.repeat(x, len(every), -1) for x in one[1:]),
                ),
                choices.T,
            )
            best[c] = errors.min()
        assert np.all(got >= best - 1e-6)
        closed.append((nearest - got).sum() / (nearest - best).sum())
    assert np.mean(closed) > 0.6


@pytest.mark.slow
def test_weights_without_a_choice_keep_nearest_and_an_endless_price_flips_the_rest():
    problem = random_problem(4, (40, 12), 1e6)
    got = np.asarray(feedback(problem))
    free = problem.step > 0
    priced = free & (problem.stay_cost > 0)
    np.testing.assert_array_equal(got[~free], problem.nearest[~free])
    np.testing.assert_array_equal(got[priced], 1 - problem.nearest[priced])


@pytest.mark.slow
def test_dead_inputs_and_too_few_images_leave_no_nan():
    problem = random_problem(5, (40, 12))
    gram = np.array(problem.gram)
    gram[::2] = gram[:, ::2] = 0
    assert np.isin(feedback(problem._replace(gram=gram)), [0, 1]).all()
    row = np.random.default_rng(0).normal(size=(1, 40)).astype(np.float32)
    chosen = np.asarray(feedback(problem._replace(gram=row.T @ row)))
    assert np.isin(chosen, [0, 1]).all()
    assert np.isin(feedback(problem._replace(gram=0 * gram)), [0, 1]).all()


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_the_scale_of_the_inputs_changes_no_choice(scale):
    problem = random_problem(5, (24, 6), flip_weight=0.01)
    scaled = problem._replace(
        gram=scale**2 * problem.gram,
        drift=scale**2 * problem.drift,
        stay_cost=scale**2 * problem.stay_cost,
    )
    scaled = jax.tree.map(np.float32, scaled)
    np.testing.assert_array_equal(feedback(scaled), feedback(problem))
