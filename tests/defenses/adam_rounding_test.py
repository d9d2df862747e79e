# SPDX-License-Identifier: Apache-2.0
"""EFRAP's relaxed objective, against a float64 writing of it.

Activation preservation, error-guided flipping and a penalty on soft roundings, as in Li
et al., CVPR 2024 (arXiv 2405.12725), weighted as in the public code:

L   = L_A + flip_weight * L_F + penalty_weight * L_P
L_A = mean over batch and positions of sum over channels of (Y^ - Y)^2
L_F = sum of |W - nearest(W)| * BCE(h, 1 - nearest)
L_P = sum of 1 - (2 h - 1)^2,    W^ = s * clip(floor(W / s) + h),    h = sigmoid(V)
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nad_jax
from nad_jax import errors
from nad_jax import settings as settings_lib
from nad_jax.core import quantization, rounding, solvers
from nad_jax.defenses import adam_rounding
from nad_jax.models import layers as layers_lib

SPEC = quantization.QuantSpec()
FLIP_WEIGHT, PENALTY_WEIGHT = 0.05, 0.02
GEOMETRIES = {
    "dense": layers_lib.Geometry((4, 3)),
    "conv": layers_lib.Geometry(
        (2, 2, 3), strides=(1,), dilation=(1,), padding="VALID"
    ),
}
SETTINGS = adam_rounding.AdamSettings(
    "minibatch", steps=1, batch_size=6, penalty_weight=PENALTY_WEIGHT
)


def tail(outputs):
    """A BatchNorm in evaluation mode, then a ReLU."""
    slope = jnp.asarray([0.5, -2.0, 1.0]).reshape((1,) * (outputs.ndim - 1) + (3,))
    return jnp.maximum(slope * outputs + 0.1, 0.0)


def numpy_tail(outputs):
    return np.maximum(np.asarray([0.5, -2.0, 1.0]) * outputs + 0.1, 0)


def linear(matrix, bias, inputs):
    """The layer, by hand: `[N, T, 4]` or a window of 2 over `[N, T + 1, 2]`."""
    inputs = np.asarray(inputs, np.float64)
    if inputs.shape[-1] == 2:
        inputs = np.concatenate([inputs[:, :-1], inputs[:, 1:]], axis=-1)
    return inputs @ matrix + bias


class Oracle:
    """The task's loss as a function of V, in float64."""

    def __init__(self, task, *, with_tail):
        self.kernel = np.asarray(task.kernel, np.float64).reshape(4, 3)
        self.scale = np.asarray(task.params.scale, np.float64).reshape(1, 3)
        self.bias = np.asarray(task.bias, np.float64)
        self.task, self.with_tail = task, with_tail
        steps = self.kernel / self.scale
        # The weight that sets the scale stands on the grid but for a float32 division.
        on_grid = np.abs(steps - np.round(steps)) < 1e-4
        self.free = ~on_grid
        self.below = np.where(on_grid, np.round(steps), np.floor(steps))
        self.up = np.where(on_grid, 0, np.round(steps) - self.below)
        self.error = np.abs(steps - np.round(steps)) * self.scale * self.free
        if task.problem is not None:
            prices = np.asarray(task.problem.stay_cost, np.float64).reshape(4, 3)
            self.flip_weight = prices.sum() / self.error.sum()

    def outputs(self, kernel, inputs):
        outputs = linear(kernel, self.bias, inputs)
        return numpy_tail(outputs) if self.with_tail else outputs

    def output_error(self, share, batch=slice(None)):
        """`share` is the rounding, soft or hard."""
        kernel = self.scale * (self.below + np.where(self.free, share, 0))
        got = self.outputs(kernel, self.task.inputs[batch])
        wanted = self.outputs(self.kernel, self.task.float_inputs[batch])
        return np.mean(np.sum((got - wanted) ** 2, axis=-1))

    def loss(self, logits, batch=slice(None)):
        share = 1 / (1 + np.exp(-logits))
        target = 1 - self.up
        entropy = -target * np.log(share + 1e-8)
        entropy -= (1 - target) * np.log(1 - share + 1e-8)
        flip = np.sum(self.error * entropy)
        penalty = np.sum(self.free * (1 - (2 * share - 1) ** 2))
        return (
            self.output_error(share, batch)
            + self.flip_weight * flip
            + PENALTY_WEIGHT * penalty
        )

    def gradient(self, logits, batch=slice(None)):
        """Central differences."""
        gradient = np.zeros_like(logits)
        for index in np.ndindex(*logits.shape):
            step = np.zeros_like(logits)
            step[index] = 1e-5
            rise = self.loss(logits + step, batch) - self.loss(logits - step, batch)
            gradient[index] = rise / 2e-5
        return gradient


def make_task(name, *, flip_weight=FLIP_WEIGHT, images=6, seed=0):
    generator = np.random.default_rng(seed)
    geometry = GEOMETRIES[name]

    def array(shape, scale=1.0):
        return jnp.asarray(generator.normal(size=shape) * scale, jnp.float32)

    kernel, bias = array(geometry.kernel_shape), array((3,))
    inputs = array((images, 3, 4) if name == "dense" else (images, 4, 2))
    float_inputs = inputs + array(inputs.shape, 0.05)
    params = quantization.calibrate(kernel, SPEC)
    placement = rounding.place(kernel, params, SPEC)
    layer = layers_lib.Layer(("layer",), geometry, calls=1)
    task = adam_rounding.LayerTask(
        layer,
        kernel,
        bias,
        params,
        placement,
        float_inputs,
        inputs,
        None,
        tail,
        images,
        jax.random.key(seed),
    )
    return dataclasses.replace(task, problem=make_problem(task, flip_weight))


def make_problem(task, flip_weight):
    """Second moments by numpy, and the task's choice of weights."""
    oracle = Oracle(task, with_tail=False)
    identity = np.eye(4)
    rows = linear(identity, 0, task.inputs).reshape(-1, 4)
    drift = (rows - linear(identity, 0, task.float_inputs).reshape(-1, 4)) @ (
        oracle.kernel
    )
    steps = oracle.kernel / oracle.scale
    arrays = (
        rows.T @ rows / len(rows),
        rows.T @ drift / len(rows),
        np.mean(drift**2, axis=0),
        oracle.scale * oracle.free,
        np.where(oracle.free, steps - oracle.below, 0),
        oracle.up,
        flip_weight * oracle.error,
    )
    return solvers.RoundingProblem(*(jnp.asarray(a, jnp.float32)[None] for a in arrays))


def run(task, settings, optimizer):
    """Logits before and after, `[4, 3]` float64."""
    form = {
        "minibatch": adam_rounding._run_minibatches,
        "gram": adam_rounding._run_gram,
    }[settings.form]
    before = rounding.rounding_logits(task.placement)
    # The buffers of its argument are donated.
    after = form(task, settings, optimizer, jnp.array(before))
    return tuple(np.asarray(v, np.float64).reshape(4, 3) for v in (before, after))


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("minibatch", "dense"),
        pytest.param("minibatch", "conv", marks=pytest.mark.slow),
        ("gram", "dense"),
        pytest.param("gram", "conv", marks=pytest.mark.slow),
    ],
)
def test_one_gradient_step_follows_the_objective(form, name):
    """Plain descent at rate 1: the step is the gradient itself."""
    task = make_task(name)
    settings = dataclasses.replace(SETTINGS, form=form)
    before, after = run(task, settings, optax.sgd(1.0))
    oracle = Oracle(task, with_tail=form == "minibatch")
    expected = oracle.gradient(before)
    assert np.all(np.abs(expected[oracle.free]) > 1e-6)
    np.testing.assert_allclose(before - after, expected, rtol=2e-3, atol=2e-5)
    share = rounding.soft_rounding(rounding.rounding_logits(task.placement))
    np.testing.assert_allclose(
        oracle.kernel,
        oracle.scale * (oracle.below + np.asarray(share).reshape(4, 3)),
        atol=1e-4,
        err_msg="soft rounding must start at the weight",
    )


@pytest.mark.slow
def test_the_first_step_of_adam_has_the_sign_of_the_gradient():
    task = make_task("dense")
    before, after = run(task, SETTINGS, optax.adam(0.01))
    oracle = Oracle(task, with_tail=True)
    step = -0.01 * np.sign(oracle.gradient(before))
    np.testing.assert_allclose((after - before)[oracle.free], step[oracle.free], 1e-2)


@pytest.mark.slow
def test_each_step_takes_one_of_the_fixed_batches_and_drops_the_rest():
    """Seven images are two batches of three; which comes first is up to the key."""
    settings = dataclasses.replace(SETTINGS, batch_size=3)
    drawn = set()
    for seed in range(4):
        task = dataclasses.replace(
            make_task("dense", images=7), key=jax.random.key(seed)
        )
        before, after = run(task, settings, optax.sgd(1.0))
        oracle = Oracle(task, with_tail=True)
        batches = [slice(0, 3), slice(3, 6)]
        missed = [
            np.max(np.abs(before - after - oracle.gradient(before, batch)))
            for batch in batches
        ]
        assert min(missed) < 2e-3 < 10 * max(missed)
        drawn.add(int(np.argmin(missed)))
    assert drawn == {0, 1}
    _, again = run(task, settings, optax.sgd(1.0))
    np.testing.assert_array_equal(again, after)


@pytest.mark.slow
def test_a_batch_larger_than_the_images_is_all_of_them():
    task = make_task("dense")
    settings = dataclasses.replace(SETTINGS, batch_size=1000)
    np.testing.assert_array_equal(
        run(task, settings, optax.sgd(1.0))[1], run(task, SETTINGS, optax.sgd(1.0))[1]
    )


@pytest.fixture(scope="module")
def many_steps():
    """Gram form, settings and logits before and after 200 steps."""
    task = make_task("dense", flip_weight=0.5)
    settings = dataclasses.replace(SETTINGS, form="gram", steps=200, learning_rate=0.03)
    return task, settings, *run(task, settings, optax.adam(0.03))


@pytest.mark.slow
def test_many_steps_lower_the_soft_objective(many_steps):
    task, _, before, after = many_steps
    oracle = Oracle(task, with_tail=False)
    losses = [oracle.loss(logits) for logits in (before, after)]
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.slow
def test_what_is_reported_is_measured_on_outputs(many_steps):
    task, settings, _, after = many_steps
    hard, details = adam_rounding.solve(task, settings)
    oracle = Oracle(task, with_tail=False)
    hard = np.asarray(hard).reshape(4, 3)
    np.testing.assert_array_equal(hard, oracle.free & (after >= 0))

    def objective(share):
        stays = oracle.free & (share == oracle.up)
        # The public code's logarithm of 0 + 1e-8.
        price = oracle.flip_weight * -np.log(1e-8) * np.sum(oracle.error * stays)
        return oracle.output_error(share) + price

    soft_error = oracle.output_error(1 / (1 + np.exp(-after)))
    assert details["soft_output_error"] == pytest.approx(soft_error, rel=1e-3)
    assert details["objective"] == pytest.approx(objective(hard), rel=1e-3)
    assert details["objective_nearest"] == pytest.approx(objective(oracle.up), rel=1e-3)
    flipped = np.mean((hard != oracle.up)[oracle.free])
    assert 0 < flipped < 1


@pytest.mark.slow
@pytest.mark.parametrize("form", settings_lib.ADAM_FORMS)
def test_the_penalty_waits_for_the_warm_up_and_its_exponent_falls(form):
    task = make_task("dense", flip_weight=0.1)

    def logits(**changes):
        settings = dataclasses.replace(
            SETTINGS, form=form, penalty_weight=5.0, learning_rate=0.1, **changes
        )
        return run(task, settings, optax.adam(0.1))[1]

    warming = {"steps": 4, "warm_up": 0.8}
    moved = logits(**warming, exponents=(9.0, 3.0))
    np.testing.assert_allclose(logits(**warming), moved, atol=1e-5)
    # The first of four steps has the first exponent, the last is still on its way.
    falls = logits(steps=4, exponents=(9.0, 3.0))
    for fixed in (3.0, 9.0):
        moved = falls - logits(steps=4, exponents=(fixed, fixed))
        assert np.max(np.abs(moved)) > 1e-3
    one = logits(steps=1, exponents=(9.0, 3.0))
    np.testing.assert_allclose(one, logits(steps=1, exponents=(9.0, 9.0)), atol=1e-5)


@pytest.mark.slow
def test_a_stretched_sigmoid_starts_at_the_weight_and_reaches_both_ends():
    task = make_task("dense", flip_weight=0.0)
    free = np.asarray(task.placement.free)
    logits = rounding.rounding_logits(task.placement, stretch=0.1)
    soft = np.asarray(rounding.soft_rounding(logits, stretch=0.1))
    fraction = np.asarray(task.placement.fraction)
    np.testing.assert_allclose(soft[free], fraction[free], atol=1e-5)
    ends = rounding.soft_rounding(jnp.asarray([-4.0, 4.0]), stretch=0.1)
    np.testing.assert_array_equal(ends, [0.0, 1.0])


@pytest.mark.slow
@pytest.mark.parametrize("form", settings_lib.ADAM_FORMS)
def test_a_higher_flip_weight_flips_more(form):
    settings = dataclasses.replace(SETTINGS, form=form, steps=200, learning_rate=0.1)
    flipped = []
    for flip_weight in (0.0, 0.3, 100.0):
        task = make_task("dense", flip_weight=flip_weight)
        hard, _ = adam_rounding.solve(task, settings)
        oracle = Oracle(task, with_tail=False)
        differs = np.asarray(hard).reshape(4, 3) != oracle.up
        flipped.append(np.sum(differs & oracle.free))
    assert flipped[0] < flipped[1] < flipped[2] == np.sum(oracle.free)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"form": "exact"}, ["'exact'", "minibatch, gram"]),
        ({"steps": 0}, ["steps", "0"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"learning_rate": 0.0}, ["learning_rate", "0.0"]),
        ({"learning_rate": float("nan")}, ["learning_rate", "nan"]),
        ({"penalty_weight": -1.0}, ["penalty_weight", "-1.0"]),
        ({"stretch": -0.1}, ["stretch", "-0.1"]),
        ({"exponents": (20.0, 1.0)}, ["exponents", "(20.0, 1.0)"]),
        ({"warm_up": 1.0}, ["warm_up", "1.0"]),
    ],
)
def test_bad_settings_are_one_line(kwargs, words):
    with pytest.raises(errors.InputError) as caught:
        adam_rounding.AdamSettings(**kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


class Mixed(nn.Module):
    """A layer and its activation, both in a type narrower than float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        conv = nn.Conv(4, (3, 3), param_dtype=self.dtype, name="conv")
        return nn.relu(conv(x))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_what_follows_a_layer_computes_in_the_modules_type(dtype):
    """Soft kernels are float32, whatever the module computes in."""
    images = jax.random.uniform(jax.random.key(0), (6, 4, 4, 3), dtype)
    module = Mixed(dtype)
    variables = module.init(jax.random.key(1), images)
    settings = adam_rounding.AdamSettings(
        "minibatch", steps=60, batch_size=2, learning_rate=0.05
    )
    # Such a module meets float32 kernels: it leaves promotion to JAX.
    with jax.numpy_dtype_promotion("standard"):
        found = nad_jax.efrap(
            module, variables, images, weight_bits=4, method="adam", adam=settings
        )
    assert found.variables["params"]["conv"]["kernel"].dtype == jnp.float32
    assert found.layers["conv"].flip_rate > 0.0


@pytest.mark.slow
def test_every_image_has_a_part_where_batches_do_not_divide_them():
    """Five images in batches of four: two batches, which share three."""
    images = jax.random.normal(jax.random.key(0), (5, 4, 4, 3))
    module = Mixed(jnp.float32)
    variables = module.init(jax.random.key(1), images)
    settings = adam_rounding.AdamSettings(
        "minibatch", steps=200, batch_size=4, learning_rate=0.05
    )
    codes = [
        nad_jax.efrap(
            module,
            variables,
            images.at[4].multiply(scale),
            weight_bits=2,
            method="adam",
            adam=settings,
        ).codes["conv"]
        for scale in (1.0, 30.0)
    ]
    assert (codes[0] != codes[1]).any()


class TimeMajor(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(3, name="dense")(jnp.swapaxes(x, 0, 1)))


@pytest.mark.slow
def test_batches_along_another_axis_are_refused_by_the_layers_name():
    steps = jax.random.normal(jax.random.key(0), (8, 3, 5))
    variables = TimeMajor().init(jax.random.key(1), steps)
    settings = adam_rounding.AdamSettings("minibatch", steps=2, batch_size=4)
    with pytest.raises(errors.InputError, match="layer dense: .* must have shape"):
        nad_jax.efrap(
            TimeMajor(), variables, steps, method="adam", adam=settings, weight_bits=4
        )
