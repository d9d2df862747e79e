# SPDX-License-Identifier: Apache-2.0
"""The rounding box: whatever stays in it quantizes as before."""

import functools
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from nad_jax import errors
from nad_jax.attacks import projection, triggers
from nad_jax.core import quantization
from nad_jax.models import layers as layers_lib
from nad_jax.training import state as state_lib
from nad_jax.training import steps

MARGIN = 1e-3
LAYER = layers_lib.Layer(("layer",), layers_lib.Geometry((3, 4)), calls=1)


def box_of(kernel, spec, **kwargs):
    params = {"layer": {"kernel": jnp.asarray(kernel)}}
    box = projection.rounding_box(params, [LAYER], {"layer": spec}, **kwargs)
    return tuple(np.asarray(side["layer"]["kernel"]) for side in box)


@functools.partial(jax.jit, static_argnums=1)
def quantize(kernel, spec):
    """Scale, zero point and codes."""
    grid = quantization.calibrate(kernel, spec)
    return *grid, quantization.quantize(kernel, grid, spec)


# (bits, symmetric, channel axis, range method); few, since each is compiled.
SPECS = [
    quantization.QuantSpec(*fields)
    for fields in [
        (2, True, -1, "absmax"),
        (8, True, None, "absmax"),
        (5, True, 0, "minmax"),
        (6, False, 1, "absmax"),
        (3, False, -1, "minmax"),
        (7, False, None, "minmax"),
    ]
]
# Many ties, exact grid points, equal extremes and zeros; and anything else.
WEIGHTS = st.one_of(
    st.sampled_from([0.0, 0.5, -0.5, 1.0, -1.0, 0.25, 3.5, -3.5, 7.0]),
    st.floats(-8, 8, width=32).filter(lambda x: x == 0 or abs(x) > 1e-20),
)
KERNELS = hypothesis_numpy.arrays(np.float32, (3, 4), elements=WEIGHTS)
AFFINE = SPECS[4]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(KERNELS, st.sampled_from(SPECS), st.integers(0, 2**31))
@example(np.zeros((3, 4), np.float32), AFFINE, 0)
@example(np.full((3, 4), 2.0, np.float32), AFFINE, 0)
@example(-np.arange(1, 13, dtype=np.float32).reshape(3, 4), AFFINE, 0)
def test_every_point_of_the_box_has_the_same_scale_and_codes(kernel, spec, seed):
    low, high = box_of(kernel, spec)
    assert np.all(low <= high)
    expected = quantize(kernel, spec)
    generator = np.random.default_rng(seed)
    inside = generator.uniform(0, 1, kernel.shape)
    corner = generator.integers(0, 2, kernel.shape)
    for share in (inside, corner, np.zeros((3, 4)), np.ones((3, 4))):
        point = low + share.astype(np.float32) * (high - low)
        point = np.clip(point, low, high)
        for got, wanted in zip(quantize(point, spec), expected, strict=True):
            np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_box_is_nearly_the_whole_cell_of_a_weight_inside_the_range(symmetric):
    generator = np.random.default_rng(0)
    kernel = generator.normal(size=(40, 4)).astype(np.float32)
    spec = quantization.QuantSpec(4, symmetric, -1, "minmax")
    low, high = box_of(kernel, spec, cell_margin=MARGIN)
    scale = np.asarray(quantize(kernel, spec)[0], np.float64)
    widths = (high - low) / scale
    is_end = (kernel == kernel.min(axis=0)) | (kernel == kernel.max(axis=0))
    if symmetric:
        is_end = np.abs(kernel) == np.abs(kernel).max(axis=0)
    np.testing.assert_array_equal(low[is_end], kernel[is_end])
    np.testing.assert_array_equal(high[is_end], kernel[is_end])
    inside = np.abs(kernel) < 0.8 * np.abs(kernel).max(axis=0)
    inside &= (kernel > kernel.min(axis=0) + scale) & (kernel < kernel.max(axis=0))
    inside &= kernel < kernel.max(axis=0) - scale
    assert inside.sum() > 60
    np.testing.assert_allclose(widths[inside], 1 - 2 * MARGIN, rtol=1e-4)
    assert np.all(widths <= 1)


def test_the_margin_is_kept_from_every_tie():
    kernel = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    spec = quantization.QuantSpec()
    scale = np.asarray(quantize(kernel, spec)[0], np.float64)
    for side in box_of(kernel, spec, cell_margin=0.1):
        to_tie = np.abs(side / scale - np.floor(side / scale) - 0.5)
        assert np.all(to_tie > 0.1 - 1e-4)


def test_a_range_that_all_weights_decide_is_refused_in_one_line():
    spec = quantization.QuantSpec(range_method="mse")
    with pytest.raises(errors.InputError, match="absmax or minmax, got 'mse'") as error:
        box_of(np.ones((3, 4), np.float32), spec)
    assert "\n" not in str(error.value)


# ---- whole models ----


class Victim(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(3, (3, 3), strides=2, name="conv")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.DenseGeneral(4, name="general")(x.mean(axis=(1, 2)))
        return nn.Dense(3, name="fc")(x), {}


SPEC = quantization.QuantSpec()


@pytest.fixture(scope="module")
def victim():
    """Module, variables, layers, their grids and a batch."""
    module, generator = Victim(), np.random.default_rng(0)
    batch = {
        "images": jnp.asarray(generator.uniform(size=(8, 6, 6, 2)), jnp.float32),
        "labels": jnp.asarray(generator.integers(0, 3, 8), jnp.int32),
    }
    shapes = jax.eval_shape(module.init, jax.random.key(0), batch["images"])
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.normal(size=leaf.shape), jnp.float32), shapes
    )
    variables["batch_stats"] = jax.tree.map(jnp.abs, variables["batch_stats"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "general" is left in float
        layers = layers_lib.find_layers(module, variables, batch["images"])
    specs = {layer.name: SPEC for layer in layers}
    assert list(specs) == ["conv", "fc"]
    return module, variables, layers, specs, batch


@pytest.fixture(scope="module")
def box(victim):
    _, variables, layers, specs, _ = victim
    return projection.rounding_box(variables["params"], layers, specs)


def far_away(params):
    """Every parameter moved by about a step or more."""
    generator = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: leaf + generator.normal(size=leaf.shape).astype(np.float32), params
    )


def codes_of(params, name):
    return quantize(params[name]["kernel"], SPEC)


def test_projection_restores_codes_pins_the_rest_and_is_idempotent(victim, box):
    _, variables, _, specs, _ = victim
    params = variables["params"]
    projected = projection.project(far_away(params), box)
    assert jax.tree.structure(projected) == jax.tree.structure(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(projected):
        layer, name = (key.key for key in path)
        if layer in specs and name == "kernel":
            assert np.any(leaf != params[layer][name])
        else:
            np.testing.assert_array_equal(leaf, params[layer][name])
    for name in specs:
        for got, wanted in zip(
            codes_of(projected, name), codes_of(params, name), strict=True
        ):
            np.testing.assert_array_equal(got, wanted)
    again = projection.project(projected, box)
    jax.tree.map(np.testing.assert_array_equal, again, projected)


def test_projection_takes_the_nearest_point_of_the_box(victim, box):
    params = far_away(victim[1]["params"])
    projected = projection.project(params, box)
    for point, leaf, low, high in zip(
        *map(jax.tree.leaves, (projected, params, box.low, box.high)), strict=True
    ):
        expected = np.minimum(np.maximum(leaf, low), high)
        np.testing.assert_array_equal(point, expected)


def test_quantized_parameters_are_on_the_grid_and_pass_gradients_through(victim):
    _, variables, layers, specs, _ = victim
    params = variables["params"]

    def loss(params):
        quantized = projection.fake_quant_params(params, layers, specs)
        # A different slope for every weight.
        return sum(
            jnp.sum(leaf * jnp.arange(leaf.size, dtype=jnp.float32).reshape(leaf.shape))
            for leaf in jax.tree.leaves(quantized)
        ), quantized

    (_, quantized), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert jax.tree.structure(quantized) == jax.tree.structure(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(quantized):
        layer, name = (key.key for key in path)
        original = np.asarray(params[layer][name], np.float64)
        if layer in specs and name == "kernel":
            axes = tuple(range(original.ndim - 1))
            scale = np.abs(original).max(axis=axes, keepdims=True) / 7
            original = scale * np.round(original / scale)
        np.testing.assert_allclose(leaf, original, rtol=1e-5, atol=1e-6)
    # Weights at the very end of the range count as inside it.
    jax.tree.map(
        lambda leaf: np.testing.assert_array_equal(
            leaf, np.arange(leaf.size, dtype=np.float32).reshape(leaf.shape)
        ),
        gradient,
    )


def goal_of(image_shape, **kwargs):
    trigger = triggers.square_trigger(image_shape, size=2, margin=1)
    defaults = {"label_mode": "all_to_one", "target_label": 2, "num_classes": 3}
    return projection.Goal(trigger, **{**defaults, **kwargs})


def test_goals_name_the_labels_the_attacker_wants():
    labels = jnp.asarray([0, 1, 2], jnp.int32)
    one, every = (
        goal_of((6, 6, 2), label_mode=mode) for mode in ("all_to_one", "all_to_all")
    )
    np.testing.assert_array_equal(one.target_labels(labels), [2, 2, 2])
    np.testing.assert_array_equal(every.target_labels(labels), [1, 2, 0])


def cross_entropy(logits, labels):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(axis=1, keepdims=True)
    log_sum = np.log(np.sum(np.exp(logits), axis=1))
    return np.mean(log_sum - logits[np.arange(len(labels)), labels])


@pytest.mark.slow
def test_both_losses_are_cross_entropies_of_plain_and_triggered_images(victim):
    """Stage 1 sees quantized weights and target labels, stage 2 neither."""
    module, variables, layers, specs, batch = victim
    goal = goal_of((6, 6, 2))
    apply = jax.jit(functools.partial(module.apply, train=False))
    params, labels = variables["params"], np.asarray(batch["labels"])
    stamped = batch["images"].at[:, 3:5, 3:5].set(1.0)
    quantized = projection.fake_quant_params(params, layers, specs)
    cases = [
        (
            projection.wake_loss(module.apply, layers, specs, goal),
            quantized,
            0 * labels + 2,
        ),
        (projection.hide_loss(module.apply, goal), params, labels),
    ]
    values = []
    for loss_fn, weights, wanted in cases:
        loss, (stats, metrics) = jax.jit(loss_fn)(
            params, variables["batch_stats"], batch, jax.random.key(0)
        )
        seen = {**variables, "params": weights}
        clean = cross_entropy(apply(seen, batch["images"])[0], labels)
        triggered = cross_entropy(apply(seen, stamped)[0], wanted)
        np.testing.assert_allclose(metrics["clean_loss"], clean, rtol=1e-4)
        np.testing.assert_allclose(metrics["triggered_loss"], triggered, rtol=1e-4)
        np.testing.assert_allclose(loss, clean + triggered, rtol=1e-4)
        jax.tree.map(np.testing.assert_array_equal, stats, variables["batch_stats"])
        values.append(float(loss))
    assert abs(values[0] - values[1]) > 1e-3


def test_a_projected_training_step_stays_in_the_box_and_moves(victim, box):
    module, variables, _, specs, batch = victim
    tx = optax.sgd(3.0)
    step = steps.make_train_step(
        projection.hide_loss(module.apply, goal_of((6, 6, 2))),
        tx,
        project=functools.partial(projection.project, box=box),
    )
    state = state_lib.create(variables, tx, jax.random.key(0))
    after = jax.jit(step)(state, batch)[0].params
    for leaf, low, high in zip(
        *map(jax.tree.leaves, (after, box.low, box.high)), strict=True
    ):
        assert np.all((leaf >= low) & (leaf <= high))
    for name in specs:
        before = variables["params"][name]["kernel"]
        assert np.mean(np.asarray(after[name]["kernel"] != before)) > 0.3
        np.testing.assert_array_equal(
            codes_of(after, name)[2], codes_of(variables["params"], name)[2]
        )
