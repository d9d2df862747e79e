# SPDX-License-Identifier: Apache-2.0
import itertools
import re
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies

from nad_jax import errors
from nad_jax.core import quantization, rounding, solvers

few = hypothesis.settings(
    max_examples=40, deadline=None, derandomize=True, database=None
)
seeds = strategies.integers(0, 2**31)
kinds = strategies.sampled_from(["relu", "offset", "low rank", "dead inputs"])
flip_weights = strategies.sampled_from([0.0, 1e-3, 0.1, 10.0])

add_rows = jax.jit(solvers.add_rows, static_argnames="with_gram")
output_error = jax.jit(solvers.output_error)
objective = jax.jit(solvers.objective)
_descend = jax.jit(
    solvers.coordinate_descent, static_argnames=("max_sweeps", "block_size")
)

# Compiling is what these tests spend their time on: one shape for most of them.
NUM_INPUTS, NUM_OUTPUTS = 10, 32
WIDE = (101, NUM_OUTPUTS)  # blocks of 64 and less, of small blocks, and padding


def descend(problem, start, **knobs) -> solvers.Solution:
    return jax.device_get(_descend(problem, start, **knobs))


def layer_inputs(random, kind, rows, num_inputs):
    """Rows like those of a real layer: never negative, correlated."""
    if kind == "offset":
        return 5 + 0.5 * random.normal(size=(rows, num_inputs))
    if kind == "low rank":
        low = random.normal(size=(rows, 3)) @ random.normal(size=(3, num_inputs))
        return np.maximum(low + 0.1 * random.normal(size=low.shape), 0)
    inputs = np.maximum(random.normal(size=(rows, num_inputs)), 0)
    if kind == "dead inputs":
        inputs[:, ::3] = 0
    return inputs


def random_problem(
    seed, kind="relu", flip_weight=0.0, shape=(NUM_INPUTS, NUM_OUTPUTS), drift=0.1
):
    """A problem in float32 NumPy arrays; some weights are pinned (and have a price)."""
    random = np.random.default_rng(seed)
    inputs = layer_inputs(random, kind, 4 * shape[0], shape[0])
    drift = drift * random.normal(size=(len(inputs), shape[1]))
    fraction = random.uniform(0.001, 0.999, shape)
    step = np.broadcast_to(random.uniform(0.01, 0.1, shape[1]), shape)
    pinned = random.random(shape) < 0.1
    step, fraction = np.where(pinned, 0, step), np.where(pinned, 0, fraction)
    nearest = np.round(fraction)
    error = np.where(pinned, 0.01, step * np.abs(fraction - nearest))
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


def exact_problem(seed, shape):
    """Like `random_problem`, with numbers whose sums float32 holds exactly."""
    random = np.random.default_rng(seed)
    inputs = random.integers(0, 2, (16, shape[0]))
    drift = random.integers(-1, 2, (16, shape[1]))
    fraction = random.integers(1, 8, shape) / 8
    step = np.broadcast_to(2.0 ** random.integers(-3, 0, shape[1]), shape)
    step = np.where(random.random(shape) < 0.1, 0, step)
    nearest = np.round(fraction)
    arrays = (
        inputs.T @ inputs / 16,
        inputs.T @ drift / 16,
        np.square(drift).mean(0),
        step,
        fraction,
        nearest,
        random.integers(0, 3, shape) / 64 * (step > 0),
    )
    return solvers.RoundingProblem(*(a.astype(np.float32) for a in arrays))


def in_float64(problem):
    return jax.tree.map(np.float64, problem)


def output_error_by_hand(problem, chosen):
    if problem.gram.dtype != np.float64:
        problem = in_float64(problem)
    change = problem.step * (chosen - problem.fraction)
    quadratic = (change * (problem.gram @ change)).sum(-2)
    linear = (change * problem.drift).sum(-2)
    return quadratic + 2 * linear + problem.drift_power


def objective_by_hand(problem, chosen):
    stays = (chosen == problem.nearest) * np.float64(problem.stay_cost)
    return output_error_by_hand(problem, chosen) + stays.sum(-2)


def gains_of_single_flips(problem, chosen):
    """Change of the objective `[K, C]` by each single flip, by trying them all."""
    before = objective_by_hand(problem, chosen)
    problem, gains = in_float64(problem), np.zeros(chosen.shape)
    for k in range(len(chosen)):
        flipped = chosen.copy()
        flipped[k] = 1 - flipped[k]
        gains[k] = objective_by_hand(problem, flipped) - before
    return gains


def assert_no_single_flip_improves(problem, chosen):
    stake = problem.step**2 * np.diag(problem.gram)[:, None] + problem.stay_cost
    gains = gains_of_single_flips(problem, chosen)
    assert np.all(gains[problem.step > 0] >= -1e-5 * stake[problem.step > 0])


def descend_by_hand(problem, start, max_sweeps=20):
    """The same visits in float64; every flip is judged by the whole objective."""
    problem = in_float64(problem)
    before = objective_by_hand(problem, start)
    chosen, trace = start.copy(), [before.sum()]
    for _ in range(max_sweeps):
        before_sweep = chosen.copy()
        for k in range(len(chosen)):
            flipped = chosen.copy()
            flipped[k] = 1 - flipped[k]
            after = objective_by_hand(problem, flipped)
            flips = (after < before) & (problem.step[k] > 0)
            chosen[k] = np.where(flips, flipped[k], chosen[k])
            before = np.where(flips, after, before)
        if np.array_equal(before_sweep, chosen):
            break
        trace.append(before.sum())
    return chosen, trace


def one_channel_many_starts(problem, random):
    """The first channel in every column, each with a start of its own."""
    same = [np.repeat(a[..., :1], NUM_OUTPUTS, -1) for a in problem[1:-1]]
    start = random.integers(0, 2, (NUM_INPUTS, NUM_OUTPUTS)).astype(np.float32)
    start[:, 0] = problem.nearest[:, 0]
    return solvers.RoundingProblem(problem.gram, *same), start


def all_roundings(num_inputs):
    return np.array(list(itertools.product([0.0, 1.0], repeat=num_inputs)))


# --- moments -------------------------------------------------------------------------


class Layer(NamedTuple):
    float_inputs: np.ndarray
    inputs: np.ndarray
    weights: np.ndarray


def random_layer(seed, rows=36, num_inputs=5, num_outputs=3) -> Layer:
    """A layer whose inputs have drifted, since earlier layers were quantized."""
    random = np.random.default_rng(seed)
    float_inputs = layer_inputs(random, "relu", rows, num_inputs)
    inputs = float_inputs + 0.1 * random.normal(size=float_inputs.shape)
    weights = 0.3 * random.normal(size=(num_inputs, num_outputs))
    return Layer(*(a.astype(np.float32) for a in (float_inputs, inputs, weights)))


def drift_of(layer):
    return (layer.inputs - layer.float_inputs) @ layer.weights


def assert_moments_close(left, right, rtol=1e-5):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6)


@pytest.mark.slow
def test_moments_are_sums_over_rows_however_they_are_chunked():
    layer = random_layer(0)
    inputs, drift = layer.inputs, drift_of(layer)
    wide, wide_drift = np.float64(inputs), np.float64(drift)
    expected = (
        wide.T @ wide,
        wide.T @ wide_drift,
        np.square(wide_drift).sum(0),
        len(wide),
    )
    zeros = solvers.zero_moments(5, 3)
    assert_moments_close(add_rows(zeros, inputs, drift), expected)
    chunked, parts = zeros, []
    for rows in np.split(np.arange(36), 3):
        chunked = add_rows(chunked, inputs[rows], drift[rows])
        parts.append(jax.device_get(add_rows(zeros, inputs[rows], drift[rows])))
    assert_moments_close(chunked, expected)
    assert_moments_close([sum(p) for p in zip(*parts, strict=True)], expected)


@pytest.mark.slow
def test_moments_and_objective_by_hand():
    @jax.jit
    def by_hand(inputs, drift, chosen):
        moments = solvers.add_rows(solvers.zero_moments(2, 1), inputs, drift)
        problem = solvers.rounding_problem(
            moments,
            step=jnp.full((1, 1), 0.5),
            fraction=jnp.array([[0.5], [0.25]]),
            nearest=jnp.zeros((2, 1)),
            stay_cost=jnp.full((1, 1), 0.125),
        )
        roundings = [solvers.objective(problem, value) for value in chosen]
        return moments, solvers.output_error(problem, chosen[0]), roundings

    chosen = np.float32([[[0], [0]], [[1], [0]]])
    moments, error, objectives = jax.device_get(
        by_hand(np.float32([[1, 2], [3, 0]]), np.float32([[1], [-1]]), chosen)
    )
    np.testing.assert_array_equal(moments.gram, [[10, 2], [2, 4]])
    np.testing.assert_array_equal(moments.drift, [[-2], [2]])
    np.testing.assert_array_equal(moments.drift_power, [2])
    assert moments.count == 2
    # Changes of the weights -1/4, -1/8; of the outputs x.d + r: 1/2, -7/4.
    np.testing.assert_array_equal(error, 53 / 32)
    np.testing.assert_array_equal(objectives[0], 53 / 32 + 2 / 8)
    # Flipping the first: changes 1/4, -1/8; outputs 1, -1/4. One weight stays.
    np.testing.assert_array_equal(objectives[1], 17 / 32 + 1 / 8)


@pytest.mark.slow
def test_a_shared_gram_matrix_is_left_alone():
    layer = random_layer(1)
    before = add_rows(solvers.zero_moments(5, 3), layer.inputs, drift_of(layer))
    shared = add_rows(before, layer.inputs, drift_of(layer), with_gram=False)
    both = add_rows(before, layer.inputs, drift_of(layer))
    np.testing.assert_array_equal(shared.gram, before.gram)
    for name in ("drift", "drift_power", "count"):
        np.testing.assert_array_equal(getattr(shared, name), getattr(both, name))


@pytest.mark.slow
def test_bfloat16_rows_are_summed_in_float32():
    rows = np.ones((1000, 5), jnp.bfloat16)
    drift = np.full((1000, 3), 0.125, jnp.bfloat16)
    moments = add_rows(solvers.zero_moments(5, 3), rows, drift)
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(moments.gram, 1000)  # bfloat16 stops at 256
    np.testing.assert_array_equal(moments.drift, 125)
    np.testing.assert_array_equal(moments.drift_power, 1000 / 64)


@pytest.mark.slow
def test_every_product_asks_for_full_float32_precision():
    """TPUs and GPUs multiply in bfloat16 or TF32 unless asked; no CPU shows it."""
    problem, start = random_problem(0), np.zeros((NUM_INPUTS, NUM_OUTPUTS), np.float32)
    wide = random_problem(0, shape=WIDE)
    layer = random_layer(0)
    moments = solvers.zero_moments(5, 3)
    traces = [
        (2, jax.make_jaxpr(solvers.add_rows)(moments, layer.inputs, drift_of(layer))),
        (1, jax.make_jaxpr(solvers.output_error)(problem, start)),
        (2, jax.make_jaxpr(solvers.coordinate_descent)(problem, start)),
        (3, jax.make_jaxpr(solvers.coordinate_descent)(wide, wide.nearest)),
    ]
    for products, trace in traces:
        text = str(trace)
        assert len(re.findall(r"dot_general\[", text)) == products
        asked = re.findall(r"precision=\(Precision.HIGHEST, Precision.HIGHEST\)", text)
        assert len(asked) == products


@jax.jit
def direct_and_from_moments(layer, chosen):
    """Rounded weights of a layer and its output error as the library sees it."""
    spec = quantization.QuantSpec(4)
    params = quantization.calibrate(layer.weights, spec)
    placement = rounding.place(layer.weights, params, spec)
    drift = layer.inputs @ layer.weights - layer.float_inputs @ layer.weights
    moments = add_rows(solvers.zero_moments(5, 3), layer.inputs, drift)
    problem = solvers.rounding_problem(
        moments,
        step=jnp.where(placement.free, params.scale, 0.0),
        fraction=placement.fraction,
        nearest=placement.nearest,
        stay_cost=jnp.zeros((1, 1)),
    )
    rounded = rounding.rounded_weights(placement, chosen, params)
    return rounded, solvers.output_error(problem, chosen)


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds)
def test_moments_know_the_output_error_of_any_rounding(seed):
    """E |Wq' xh - W' x|^2, directly in float64, against H = E xh xh' and E xh r'."""
    layer = random_layer(seed)
    chosen = np.random.default_rng(seed).integers(0, 2, (5, 3)).astype(np.float32)
    rounded, error = direct_and_from_moments(layer, chosen)
    float_inputs, inputs, weights = map(np.float64, layer)
    outputs = inputs @ np.float64(rounded)
    direct = np.square(outputs - float_inputs @ weights).mean(0)
    np.testing.assert_allclose(error, direct, rtol=1e-4)
    # The same in the form of the cross moment C = E x xh'.
    gram = inputs.T @ inputs / len(inputs)
    cross = float_inputs.T @ inputs / len(inputs)
    quantized = np.float64(rounded)
    total = np.trace(quantized.T @ gram @ quantized)
    total -= 2 * np.trace(weights.T @ cross @ quantized)
    total += np.square(float_inputs @ weights).sum(1).mean()
    np.testing.assert_allclose(np.sum(error), total, rtol=1e-4)


@pytest.mark.slow
def test_without_drift_the_error_is_the_trace_of_the_gram_form():
    layer = random_layer(2)
    layer = layer._replace(float_inputs=layer.inputs)
    rounded, error = direct_and_from_moments(layer, np.zeros((5, 3), np.float32))
    change, inputs = np.float64(rounded) - layer.weights, np.float64(layer.inputs)
    gram = inputs.T @ inputs / len(inputs)
    np.testing.assert_allclose(np.sum(error), np.trace(change.T @ gram @ change), 1e-4)


def test_no_rows_are_no_error():
    @jax.jit
    def error(chosen):
        problem = solvers.rounding_problem(
            solvers.zero_moments(5, 3),
            step=jnp.ones((5, 3)),
            fraction=jnp.full((5, 3), 0.5),
            nearest=jnp.zeros((5, 3)),
            stay_cost=jnp.zeros((1, 1)),
        )
        return solvers.output_error(problem, chosen)

    np.testing.assert_array_equal(error(np.ones((5, 3), np.float32)), 0.0)


def test_moments_of_another_layer_are_refused():
    weights = jnp.zeros((5, 4))
    with pytest.raises(errors.InputError, match=r"\(5, 3\), the weights have \(5, 4\)"):
        solvers.rounding_problem(
            solvers.zero_moments(5, 3),
            step=weights,
            fraction=weights,
            nearest=weights,
            stay_cost=weights,
        )


# --- objective -----------------------------------------------------------------------


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds, kind=kinds, flip_weight=flip_weights)
def test_the_objective_is_that_of_float64_numpy(seed, kind, flip_weight):
    problem = random_problem(seed, kind, flip_weight)
    chosen = np.random.default_rng(seed).integers(0, 2, problem.step.shape)
    chosen = chosen.astype(np.float32)
    for ours, by_hand in (
        (output_error, output_error_by_hand),
        (objective, objective_by_hand),
    ):
        expected = by_hand(problem, chosen)
        np.testing.assert_allclose(ours(problem, chosen), expected, rtol=1e-4)


def test_soft_roundings_have_an_error_and_its_gradient():
    """Against central differences of the float64 formula."""
    problem = random_problem(3)
    soft = np.random.default_rng(3).uniform(size=problem.step.shape).astype(np.float32)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(solvers.output_error(problem, s))))
    gradient = gradient(soft)
    for k in range(NUM_INPUTS):
        nudge = np.zeros(soft.shape)
        nudge[k] = 1e-3
        above = output_error_by_hand(problem, soft + nudge)
        below = output_error_by_hand(problem, soft - nudge)
        np.testing.assert_allclose(
            gradient[k], (above - below) / 2e-3, rtol=1e-3, atol=1e-7
        )


# --- coordinate descent --------------------------------------------------------------


@pytest.mark.slow
@few
@hypothesis.given(seed=seeds, kind=kinds, flip_weight=flip_weights)
def test_descent_never_rises_and_ends_where_no_single_flip_improves(
    seed, kind, flip_weight
):
    problem = random_problem(seed, kind, flip_weight)
    start = problem.nearest
    if seed % 2:
        start = np.random.default_rng(seed).integers(0, 2, start.shape)
        start = start.astype(np.float32)
    solution = descend(problem, start)
    assert np.all((solution.rounding == 0) | (solution.rounding == 1))
    assert solution.trace.shape == (21,)
    slack = 1e-6 * solution.trace[0]
    assert np.all(np.diff(solution.trace) <= slack)
    np.testing.assert_array_equal(solution.trace[solution.sweeps :], solution.trace[-1])
    # Channel by channel in float64, not only the traced sum.
    before = objective_by_hand(problem, start)
    after = objective_by_hand(problem, solution.rounding)
    assert np.all(after <= before * (1 + 1e-6))
    np.testing.assert_allclose(solution.trace[0], before.sum(), rtol=1e-4)
    np.testing.assert_allclose(solution.trace[-1], after.sum(), rtol=1e-4)
    assert solution.sweeps < 20, "20 sweeps are plenty for ten inputs"
    assert_no_single_flip_improves(problem, solution.rounding)
    pinned = problem.step == 0
    np.testing.assert_array_equal(solution.rounding[pinned], start[pinned])
    again = descend(problem, solution.rounding)
    assert again.sweeps == 0
    np.testing.assert_array_equal(again.rounding, solution.rounding)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_descent_makes_the_flips_of_a_naive_descent(seed):
    """Same visits, each judged by the whole objective; two blocks, one padded."""
    problem = exact_problem(seed, WIDE)
    start = problem.nearest
    solution = descend(problem, start, block_size=64)
    chosen, trace = descend_by_hand(problem, start)
    np.testing.assert_array_equal(solution.rounding, chosen)
    assert solution.sweeps == len(trace) - 1 > 1
    np.testing.assert_array_equal(solution.trace[: len(trace)], trace)
    np.testing.assert_array_equal(solution.trace[len(trace) :], trace[-1])


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [1, 40, 1000])
def test_the_block_size_does_not_change_the_flips(block_size):
    problem = exact_problem(0, WIDE)
    expected = descend(problem, problem.nearest, block_size=64)
    solution = descend(problem, problem.nearest, block_size=block_size)
    for left, right in zip(solution, expected, strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow
def test_descent_stops_after_max_sweeps():
    problem = exact_problem(0, (40, 8))

    solution = descend(problem, problem.nearest, max_sweeps=1)
    chosen, trace = descend_by_hand(problem, problem.nearest, max_sweeps=1)
    np.testing.assert_array_equal(solution.rounding, chosen)
    np.testing.assert_array_equal(solution.trace, trace)
    assert solution.sweeps == 1
    longer = descend_by_hand(problem, problem.nearest)[0]
    assert np.any(longer != chosen), "one sweep was enough: this tells nothing"


@pytest.mark.slow
def test_inputs_that_do_not_matter_do_not_matter():
    """Dead inputs and pinned weights at the end act like the padding of a block."""
    problem = exact_problem(4, WIDE)
    dead = np.arange(WIDE[0]) >= NUM_INPUTS
    gram = np.where(dead[:, None] | dead[None], 0, problem.gram)
    small = problem._replace(
        gram=gram,
        drift=np.where(dead[:, None], 0, problem.drift),
        step=np.where(dead[:, None], 0, problem.step),
        stay_cost=np.where(dead[:, None], 0, problem.stay_cost),
    )
    cut = solvers.RoundingProblem(
        gram[:NUM_INPUTS, :NUM_INPUTS],
        *(a[:NUM_INPUTS] if a.ndim == 2 else a for a in small[1:-1]),
    )
    whole = descend(small, small.nearest, block_size=64)
    alone = descend(cut, cut.nearest)
    np.testing.assert_array_equal(whole.rounding[:NUM_INPUTS], alone.rounding)
    np.testing.assert_array_equal(whole.trace, alone.trace)


@few
@hypothesis.given(seed=seeds, kind=kinds)
def test_with_no_price_the_output_error_is_at_most_that_of_nearest(seed, kind):
    problem = random_problem(seed, kind)
    solution = descend(problem, problem.nearest)
    nearest = output_error_by_hand(problem, problem.nearest)
    found = output_error_by_hand(problem, solution.rounding)
    assert np.all(found <= nearest * (1 + 1e-6))


@pytest.mark.parametrize("flip_weight", [0.0, 0.01, 1.0])
def test_many_starts_find_what_brute_force_finds(flip_weight):
    """2^10 roundings tried in float64. One start is a local optimum, no more."""
    candidates = all_roundings(NUM_INPUTS)[:, :, None]
    found = missed_by_one = 0
    for seed in range(12):
        problem = random_problem(seed, "relu", flip_weight)
        problem = problem._replace(step=np.maximum(problem.step, 0.01))
        problem, start = one_channel_many_starts(problem, np.random.default_rng(seed))
        one = problem._replace(
            **{
                name: value[..., :1]
                for name, value in problem._asdict().items()
                if name not in ("gram", "weight")
            }
        )
        optimum = objective_by_hand(one, candidates).min()
        solution = descend(problem, start)
        reached = objective_by_hand(problem, solution.rounding)
        assert np.all(reached >= optimum * (1 - 1e-9))
        found += reached.min() <= optimum * (1 + 1e-6)
        missed_by_one += reached[0] > optimum * (1 + 1e-6)
    assert found >= 11
    if flip_weight == 0.0:
        assert missed_by_one > 0, "these problems are too easy to tell anything"


@few
@hypothesis.given(seed=seeds, flip_weight=flip_weights)
def test_uncorrelated_inputs_are_solved_weight_by_weight(seed, flip_weight):
    """With a diagonal Gram matrix the optimum has a closed form."""
    problem = random_problem(seed, "relu", flip_weight)
    problem = problem._replace(gram=np.diag(np.diag(problem.gram)))
    wide = in_float64(problem)
    diagonal = np.diag(wide.gram)[:, None]
    costs = [
        diagonal * (wide.step * (up - wide.fraction)) ** 2
        + 2 * wide.step * (up - wide.fraction) * wide.drift
        + wide.stay_cost * (wide.nearest == up)
        for up in (0, 1)
    ]
    clear = np.abs(costs[1] - costs[0]) > 1e-4 * (np.abs(costs[1]) + wide.stay_cost)
    clear &= wide.step > 0
    solution = descend(problem, problem.nearest)
    best = (costs[1] < costs[0]).astype(np.float32)
    np.testing.assert_array_equal(solution.rounding[clear], best[clear])
    assert solution.sweeps <= 1
    # Without drift and price that is nearest rounding itself.
    plain = problem._replace(drift=0 * problem.drift, stay_cost=0 * problem.stay_cost)
    worst = descend(plain, 1 - plain.nearest)
    free = plain.step > 0
    np.testing.assert_array_equal(worst.rounding[free], plain.nearest[free])


def test_a_higher_price_flips_more_weights_on_average():
    rates = []
    for flip_weight in (0.0, 0.003, 0.01, 0.03, 0.1, 1e4):
        flips = []
        for seed in range(8):
            problem = random_problem(seed, "relu", flip_weight)
            chosen = descend(problem, problem.nearest).rounding
            flips.append((chosen != problem.nearest)[problem.step > 0])
        rates.append(np.mean(np.concatenate(flips)))
    assert np.all(np.diff(rates) > 0)
    assert rates[0] < 0.5 and rates[-1] == 1.0


def test_permuting_channels_commutes():
    problem = exact_problem(5, WIDE)
    order = np.random.default_rng(5).permutation(NUM_OUTPUTS)
    permuted = solvers.RoundingProblem(
        problem.gram, *(a[..., order] for a in problem[1:-1])
    )
    expected = descend(problem, problem.nearest, block_size=64)
    solution = descend(permuted, permuted.nearest, block_size=64)
    np.testing.assert_array_equal(solution.rounding, expected.rounding[:, order])
    np.testing.assert_array_equal(solution.trace, expected.trace)


@few
@hypothesis.given(seed=seeds, kind=kinds)
def test_scaling_weights_and_steps_leaves_the_gram_only_solution(seed, kind):
    """Every channel by its own power of two, which float32 does exactly."""
    problem = random_problem(seed, kind)
    exponents = np.random.default_rng(seed).integers(-8, 9, NUM_OUTPUTS)
    factors = np.ldexp(np.float32(1), exponents)
    scaled = problem._replace(
        drift=problem.drift * factors,
        drift_power=problem.drift_power * factors**2,
        step=problem.step * factors,
    )
    solution = descend(problem, problem.nearest)
    again = descend(scaled, problem.nearest)
    np.testing.assert_array_equal(again.rounding, solution.rounding)


def test_the_price_is_not_scale_free():
    """|w - nearest| grows with the weights, the output error with their square."""
    problem = random_problem(6, flip_weight=0.1)
    large = problem._replace(
        drift=problem.drift * 64,
        drift_power=problem.drift_power * 64**2,
        step=problem.step * 64,
        stay_cost=problem.stay_cost * 64,
    )
    flips, fewer = (
        np.mean(descend(p, p.nearest).rounding != p.nearest) for p in (problem, large)
    )
    assert fewer < flips - 0.1


def test_scaling_the_inputs_changes_nothing_without_a_price():
    problem = random_problem(7)
    louder = problem._replace(
        gram=problem.gram * 16,
        drift=problem.drift * 16,
        drift_power=problem.drift_power,
    )
    np.testing.assert_array_equal(
        descend(louder, problem.nearest).rounding,
        descend(problem, problem.nearest).rounding,
    )


def test_near_ties_between_price_and_gain_do_not_cycle():
    """Weights balanced to the last bit, where both states may look the worse one.

    The gain of such a flip is the difference of two numbers as large as the price, and
    a descent that starts where one ended would flip back what that one flipped.
    """
    shape = (NUM_INPUTS, NUM_OUTPUTS)
    for seed in range(60):
        random = np.random.default_rng(seed)
        fraction = random.uniform(0.01, 0.99, shape)
        step = random.uniform(0.01, 0.1, shape)
        nearest = np.round(fraction)
        price = 1e3 * step**2 * random.uniform(1, 2, shape)
        move = step * (1 - 2 * nearest)
        slope = (price - move**2) / (2 * move)
        drift = slope - step * (nearest - fraction)
        arrays = (np.eye(len(step)), drift, 0 * step[0], step, fraction, nearest, price)
        problem = solvers.RoundingProblem(*(a.astype(np.float32) for a in arrays))
        solution = descend(problem, problem.nearest)
        assert solution.sweeps < 20
        assert descend(problem, solution.rounding).sweeps == 0
        balance = np.abs(gains_of_single_flips(problem, problem.nearest))
        assert np.all(balance < 1e-5 * price), "the example is not what it says"


@pytest.mark.slow
def test_a_large_layer_still_ends_in_a_local_optimum():
    """Slopes are kept up to date over thousands of flips, and stay right."""
    shape = (300, 16)
    problem = random_problem(9, "low rank", 0.0, shape)
    start = np.random.default_rng(9).integers(0, 2, shape).astype(np.float32)
    solution = descend(problem, start, max_sweeps=60)
    assert solution.sweeps < 60
    assert np.all(np.diff(solution.trace) <= 1e-6 * np.abs(solution.trace[:-1]))
    assert_no_single_flip_improves(problem, solution.rounding)


@pytest.mark.slow
def test_vmap_solves_each_problem_on_its_own():
    problems = [random_problem(s, "relu", 0.01) for s in (10, 11)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *problems)
    together = jax.device_get(jax.vmap(_descend)(stacked, stacked.nearest))
    for i, problem in enumerate(problems):
        alone = descend(problem, problem.nearest)
        np.testing.assert_array_equal(together.rounding[i], alone.rounding)
        np.testing.assert_array_equal(together.sweeps[i], alone.sweeps)
        np.testing.assert_allclose(together.trace[i], alone.trace, rtol=1e-5)


def test_a_rounding_has_no_gradient():
    problem = random_problem(12)

    @jax.jit
    @jax.grad
    def gradient(drift):
        moved = problem._replace(drift=drift)
        solution = solvers.coordinate_descent(moved, problem.nearest)
        return jnp.sum(solution.trace) + jnp.sum(solution.rounding)

    np.testing.assert_array_equal(gradient(problem.drift), 0.0)


@pytest.mark.parametrize(
    "shape", [(0, 3), (3, 0), pytest.param((1, 1), marks=pytest.mark.slow)]
)
def test_layers_of_almost_nothing_are_solved(shape):
    problem = random_problem(0, "relu", 0.0, (max(shape[0], 1), max(shape[1], 1)))
    keep, channels = slice(shape[0]), slice(shape[1])
    problem = solvers.RoundingProblem(
        problem.gram[keep, keep],
        problem.drift[keep, channels],
        problem.drift_power[channels],
        *(a[keep, channels] for a in problem[3:-1]),
    )
    solution = descend(problem, problem.nearest)
    assert solution.rounding.shape == shape
    assert np.all(np.isfinite(solution.trace))
    error = objective_by_hand(problem, solution.rounding).sum()
    np.testing.assert_allclose(solution.trace[-1], error, rtol=1e-5)


@pytest.mark.slow
def test_float32_is_kept_where_x64_is_enabled():
    problem, layer = random_problem(13, flip_weight=0.01), random_layer(13)
    expected = descend(problem, problem.nearest)
    with jax.enable_x64(True):
        solution = descend(problem, problem.nearest)
        moments = add_rows(solvers.zero_moments(5, 3), layer.inputs, drift_of(layer))
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("float32")}
    for left, right in zip(solution, expected, strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(left, right)


# --- several starts, and the path over the flip weight --------------------------------


_descend_from_all = jax.jit(solvers.descend_from_all)
_path = jax.jit(solvers.flip_weight_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_every_channel_keeps_its_best_start(seed):
    problem = random_problem(seed, "low rank", 1e-3)
    random = np.random.default_rng(seed)
    starts = random.integers(0, 2, (4, NUM_INPUTS, NUM_OUTPUTS)).astype(np.float32)
    starts[0] = problem.nearest
    together = jax.device_get(_descend_from_all(problem, starts))
    alone = [descend(problem, start).rounding for start in starts]
    reached = np.stack([objective_by_hand(problem, rounding) for rounding in alone])
    got = objective_by_hand(problem, together.rounding)
    np.testing.assert_allclose(got, reached.min(axis=0), rtol=1e-5)
    assert np.any(reached.argmin(axis=0) > 0), "another start is the best somewhere"
    np.testing.assert_allclose(together.trace[-1], got.sum(), rtol=1e-4)
    assert np.all(np.diff(together.trace) <= 1e-6 * together.trace[0])


@pytest.mark.slow
def test_more_starts_find_the_best_of_all_roundings_more_often():
    every = all_roundings(NUM_INPUTS)
    found = {1: 0, 12: 0}
    for seed in range(4):
        problem = random_problem(seed, "low rank")
        random = np.random.default_rng(seed)
        starts = random.integers(0, 2, (12, NUM_INPUTS, NUM_OUTPUTS))
        starts = np.where(problem.step > 0, starts, problem.nearest).astype(np.float32)
        starts[0] = problem.nearest
        for c in range(4):
            one = [np.repeat(a[..., c : c + 1], len(every), -1) for a in problem[1:-1]]
            choices = np.where(problem.step[:, c] > 0, every, problem.nearest[:, c])
            errors = objective_by_hand(
                solvers.RoundingProblem(problem.gram, *one), choices.T
            )
            best = errors.min()
            for count in found:
                solution = jax.device_get(_descend_from_all(problem, starts[:count]))
                got = objective_by_hand(problem, solution.rounding)[c]
                found[count] += got <= best * (1 + 1e-5)
    assert found[12] > found[1]


@pytest.mark.slow
def test_the_path_is_no_worse_than_each_weight_solved_alone():
    weights = np.float32([0.0, 0.01, 0.1, 1.0, 10.0])
    unit = random_problem(2, "relu", 1.0)
    path = jax.device_get(_path(unit, weights))
    assert path.rounding.shape == (5, NUM_INPUTS, NUM_OUTPUTS)
    stays = []
    for i, weight in enumerate(weights):
        priced = unit._replace(stay_cost=weight * unit.stay_cost)
        alone = objective_by_hand(priced, descend(priced, unit.nearest).rounding).sum()
        here = objective_by_hand(priced, path.rounding[i])
        assert here.sum() <= alone * (1 + 1e-6)
        np.testing.assert_allclose(path.objective[i], here.sum(), rtol=1e-4)
        error = output_error_by_hand(priced, path.rounding[i]).sum()
        np.testing.assert_allclose(path.output_error[i], error, rtol=1e-4)
        stays.append(np.sum((path.rounding[i] == unit.nearest) * unit.stay_cost))
    # A higher price buys fewer weights at nearest and costs output error.
    assert np.all(np.diff(stays) <= 1e-6) and stays[-1] < stays[0]
    assert path.output_error[-1] > path.output_error[0]


@pytest.mark.slow
def test_weights_of_channels_count_in_sums_and_change_no_rounding():
    problem = exact_problem(3, WIDE)
    weight = np.float32(2.0) ** np.arange(NUM_OUTPUTS, dtype=np.float32)
    weighted = problem._replace(weight=weight)
    starts = np.stack([problem.nearest, 1 - problem.nearest])
    plain = solvers.descend_from_all(problem, starts)
    solution = solvers.descend_from_all(weighted, starts)
    np.testing.assert_array_equal(solution.rounding, plain.rounding)
    errors_of_channels = solvers.objective(weighted, solution.rounding)
    expected = np.sum(np.float64(errors_of_channels) * np.float64(weight))
    assert solution.trace[-1] == pytest.approx(expected, rel=1e-5)
    path = solvers.flip_weight_path(weighted, jnp.asarray([1.0]))
    one = solvers.coordinate_descent(weighted, problem.nearest)
    assert path.objective[0] == pytest.approx(float(one.trace[-1]), rel=1e-6)
