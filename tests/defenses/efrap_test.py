# SPDX-License-Identifier: Apache-2.0
"""Quantizing a module of one's own; errors are measured by forward passes."""

import dataclasses
import functools
import warnings

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.core import grids, quantization
from nad_jax.defenses import activation_grids, adam_rounding, efrap
from nad_jax.defenses import moments as moments_lib

GRAM = adam_rounding.AdamSettings(
    "gram", steps=30, learning_rate=0.05, beside_descent=True
)
MINIBATCH = adam_rounding.AdamSettings("minibatch", steps=3, batch_size=20)


class Net(nn.Module):
    """Setup style, residual, strided, grouped; sows the output of each layer."""

    def setup(self):
        self.head = nn.Dense(3)
        self.stem = nn.Conv(6, (3, 2), strides=2, padding=((1, 0), (0, 1)))
        self.norm = nn.BatchNorm()
        self.inner = nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False)

    def keep(self, layer, x):
        y = layer(x)
        self.sow("outputs", f"of_{layer.name}", y)
        return y

    def __call__(self, x, *, train):
        x = nn.relu(self.norm(self.keep(self.stem, x), use_running_average=not train))
        x = nn.relu(x + self.keep(self.inner, x))
        return self.keep(self.head, x.mean(axis=(1, 2)))


class Small(nn.Module):
    """Compact; three layers of one shape, which is compiled once."""

    @nn.compact
    def __call__(self, x, *, train):
        for name in ("first", "second", "third"):
            y = nn.Dense(5, name=name)(x)
            self.sow("outputs", f"of_{name}", y)
            x = nn.relu(y)
        return y


APPLY_KWARGS = {"train": False}


def some_variables(module, images, **kwargs):
    """Kernels are normal, everything else uniform in [0.3, 1)."""
    generator = np.random.default_rng(0)

    def fill(path, leaf):
        if path[-1].key == "kernel":
            value = generator.normal(size=leaf.shape) / np.sqrt(leaf.shape[-2])
        else:
            value = generator.uniform(0.3, 1, leaf.shape)
        return jnp.asarray(value, leaf.dtype)

    shapes = dict(
        jax.eval_shape(
            functools.partial(module.init, **kwargs), jax.random.key(0), images
        )
    )
    shapes.pop("outputs", None)
    return jax.tree_util.tree_map_with_path(fill, shapes)


def uniform(shape):
    return jnp.asarray(np.random.default_rng(1).uniform(0, 1, shape), jnp.float32)


class Case:
    """A module, and every quantization of it asked for so far."""

    def __init__(self, module, layers, images):
        self.module, self.layers, self.images = module, layers, images
        self.variables = some_variables(module, images, train=False)
        self.kept = jax.tree.map(np.array, (self.variables, self.images))
        apply = functools.partial(self.module.apply, train=False, mutable=["outputs"])
        self._outputs = jax.jit(lambda variables: apply(variables, self.images)[1])
        self._results = {}

    def quantize(self, method, **kwargs):
        name = (method, tuple(sorted(kwargs.items())))
        if name not in self._results:
            self._results[name] = self.fresh(method, **kwargs)
        return self._results[name]

    def fresh(self, method, **kwargs):
        kwargs = {"apply_kwargs": APPLY_KWARGS, **kwargs}
        return efrap.efrap(
            self.module, self.variables, self.images, method=method, **kwargs
        )

    def outputs(self, variables):
        """Layer name -> its output, float64."""
        sown = self._outputs(variables)["outputs"]
        return {
            name: np.asarray(sown[f"of_{name}"][0], np.float64) for name in self.layers
        }

    def output_errors(self, variables):
        """Layer name -> mean over positions of the squared error over channels."""
        got, wanted = self.outputs(variables), self.outputs(self.variables)
        return {
            name: np.mean(np.sum((got[name] - wanted[name]) ** 2, axis=-1))
            for name in self.layers
        }

    def kernel(self, name):
        return np.asarray(self.variables["params"][name]["kernel"])


@pytest.fixture(scope="module")
def convolutional():
    return Case(Net(), ["stem", "inner", "head"], uniform((24, 7, 6, 2)))


@pytest.fixture(scope="module")
def dense():
    return Case(Small(), ["first", "second", "third"], uniform((40, 5)))


@pytest.fixture(params=[pytest.param("convolutional", marks=pytest.mark.slow), "dense"])
def case(request):
    return request.getfixturevalue(request.param)


METHODS = [
    ("nearest", {}),
    ("flipped", {}),
    ("stochastic", {}),
    ("coordinate", {}),
    ("coordinate", {"flip_weight": 0.0}),
    ("adam", {"adam": GRAM}),
    ("adam", {"adam": MINIBATCH}),
]


def named(method):
    return method[0] + "".join(
        f"-{getattr(value, 'form', value)}" for value in method[1].values()
    )


def each_method(quick):
    """(fixture, method) of both modules; slow but for those named in `quick`."""
    return pytest.mark.parametrize(
        ("name", "method"),
        [
            pytest.param(
                name,
                method,
                id=f"{name}-{named(method)}",
                marks=() if method[0] in quick[name] else pytest.mark.slow,
            )
            for name in ("convolutional", "dense")
            for method in METHODS
        ],
    )


EACH = each_method(
    {
        "convolutional": ["nearest"],
        "dense": ["nearest", "flipped", "stochastic", "coordinate"],
    }
)


@pytest.fixture
def quantized(request, name, method):
    """One method on one module, and nearest on the same."""
    case = request.getfixturevalue(name)
    return case, case.quantize(method[0], **method[1]), case.quantize("nearest")


# ---- what every method returns ----


@pytest.mark.slow
@EACH
def test_only_kernels_change_and_they_are_codes_times_scale_to_the_bit(quantized):
    case, result, _ = quantized
    assert jax.tree.structure(result.variables) == jax.tree.structure(case.variables)
    assert list(result.codes) == list(result.quant_params) == case.layers
    for path, leaf in jax.tree_util.tree_leaves_with_path(result.variables):
        keys = [key.key for key in path]
        before = functools.reduce(lambda tree, key: tree[key], keys, case.variables)
        assert (leaf.shape, leaf.dtype) == (before.shape, before.dtype)
        if keys[-1] != "kernel":
            np.testing.assert_array_equal(leaf, before)
            continue
        codes, params = result.codes[keys[1]], result.quant_params[keys[1]]
        assert codes.dtype == jnp.int8 and codes.shape == leaf.shape
        assert np.abs(codes).max() <= 7
        on_grid = np.asarray(params.scale) * np.asarray(codes).astype(np.float32)
        np.testing.assert_array_equal(leaf, on_grid)
        assert np.any(leaf != before)


@pytest.mark.slow
@EACH
def test_each_weight_takes_one_of_its_two_neighbours_and_the_rate_counts_them(
    quantized,
):
    case, result, nearest = quantized
    flipped = total = 0
    for name, report in result.layers.items():
        steps = case.kernel(name) / np.asarray(result.quant_params[name].scale)
        codes = np.asarray(result.codes[name], np.float64)
        assert np.all(np.abs(codes - steps) < 1 + 1e-4)
        differs = codes != np.asarray(nearest.codes[name])
        assert report.flip_rate == pytest.approx(differs.mean(), abs=1e-6)
        flipped, total = flipped + differs.sum(), total + differs.size
    assert result.flip_rate == pytest.approx(flipped / total, abs=1e-6)


@EACH
def test_reports_follow_the_forward_pass(quantized, method):
    case, result, _ = quantized
    looks = method[0] in ("coordinate", "adam")
    for name, report in zip(case.layers, result.layers.values(), strict=True):
        assert report.name == name
        assert report.kernel_shape == case.kernel(name).shape
        assert report.bits == 4 and report.seconds >= 0
        assert (report.objective is not None) == looks
        assert (report.objective_nearest is not None) == looks
        assert (report.soft_output_error is not None) == (method[0] == "adam")
        assert (report.objective_descent is not None) == (method[1] == {"adam": GRAM})
        if method[0] == "coordinate":
            start = report.trace[0]
            assert start == pytest.approx(report.objective_nearest, rel=1e-6)
            assert report.trace[-1] == report.objective
            assert np.all(np.diff(report.trace) < 0)


@pytest.mark.slow
def test_adam_tells_what_coordinate_descent_reaches_on_its_inputs():
    """At equal prices: where nothing is soft, its flip loss charges -ln 1e-8."""
    images = jax.random.normal(jax.random.key(3), (40, 5))
    variables = some_variables(Small(), images, train=False)

    def first_layer(flip_weight, **options):
        return efrap.efrap(
            Small(),
            variables,
            images,
            apply_kwargs=APPLY_KWARGS,
            flip_weight=flip_weight,
            **options,
        ).layers["first"]

    adam = first_layer(0.001, method="adam", adam=GRAM)
    descent = first_layer(0.001 * -np.log(1e-8))
    assert adam.objective_nearest == pytest.approx(descent.objective_nearest, rel=1e-5)
    # The first layer sees the same images whatever the method.
    assert adam.objective_descent == pytest.approx(descent.objective, rel=1e-5)
    assert adam.objective != pytest.approx(descent.objective, rel=1e-5)


@pytest.mark.slow
def test_a_path_over_flip_weights_is_what_each_of_them_alone_comes_to():
    images = jax.random.normal(jax.random.key(3), (40, 5))
    variables = some_variables(Small(), images, train=False)
    weights = (0.0, 0.05, 5.0)

    def first_layer(**options):
        return efrap.efrap(
            Small(), variables, images, apply_kwargs=APPLY_KWARGS, **options
        ).layers["first"]

    report = first_layer(flip_weight_path=weights)
    assert report.objective == first_layer().objective
    assert [point["flip_weight"] for point in report.path] == list(weights)
    errors_, flips = (
        [point[name] for point in report.path] for name in ("output_error", "flip_rate")
    )
    # Without a price the objective is the output error; a path may end lower.
    alone = [first_layer(flip_weight=weight) for weight in (0.0, 5.0)]
    assert errors_[0] == pytest.approx(alone[0].objective, rel=1e-5)
    assert flips[0] == pytest.approx(alone[0].flip_rate, abs=1e-6)
    assert flips[2] == pytest.approx(alone[1].flip_rate, abs=0.1)
    assert errors_ == sorted(errors_) and flips == sorted(flips)
    assert flips[0] < flips[2]


@pytest.mark.slow
@EACH
def test_quantizing_again_gives_the_same_codes_and_changes_no_input(quantized, method):
    case, result, _ = quantized
    again = case.fresh(method[0], **method[1])
    jax.tree.map(np.testing.assert_array_equal, again.codes, result.codes)
    inputs = (case.variables, case.images)
    jax.tree.map(np.testing.assert_array_equal, inputs, case.kept)


# ---- roundings that look at no images ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bits"),
    [("convolutional", 4), ("dense", 2), ("dense", 4), ("dense", 5)],
)
def test_nearest_is_numpy_rounding_on_the_absmax_grid(request, name, bits):
    case = request.getfixturevalue(name)
    result = case.quantize("nearest", weight_bits=bits)
    for name in case.layers:
        kernel, qmax = case.kernel(name), 2 ** (bits - 1) - 1
        axes = tuple(range(kernel.ndim - 1))
        scale = np.abs(kernel).max(axis=axes, keepdims=True) / np.float32(qmax)
        np.testing.assert_allclose(result.quant_params[name].scale, scale, rtol=1e-6)
        np.testing.assert_array_equal(result.quant_params[name].zero_point, 0)
        np.testing.assert_array_equal(result.codes[name], np.round(kernel / scale))
        assert result.layers[name].flip_rate == 0


@pytest.mark.slow
def test_another_grid_is_used_as_given_but_for_its_bits(dense):
    """Affine, one scale for the whole tensor."""
    spec = quantization.QuantSpec(8, False, None, "minmax")
    result = dense.quantize("nearest", spec=spec, weight_bits=3)
    for name in dense.layers:
        assert result.specs[name] == dataclasses.replace(spec, bits=3)
        kernel = dense.kernel(name).astype(np.float64)
        scale = (max(kernel.max(), 0) - min(kernel.min(), 0)) / 7
        zero_point = np.round(-min(kernel.min(), 0) / scale)
        codes = np.clip(np.round(kernel / scale) + zero_point, 0, 7)
        assert result.codes[name].dtype == jnp.uint8
        np.testing.assert_array_equal(result.codes[name], codes)
        np.testing.assert_allclose(
            result.variables["params"][name]["kernel"],
            scale * (codes - zero_point),
            rtol=1e-5,
            atol=1e-6,
        )


def test_flipped_leaves_only_weights_that_have_no_choice_at_nearest(case):
    flipped, nearest = case.quantize("flipped"), case.quantize("nearest")
    for name in case.layers:
        codes = np.asarray(nearest.codes[name])
        stays = np.asarray(flipped.codes[name]) == codes
        steps = case.kernel(name) / np.asarray(nearest.quant_params[name].scale)
        on_grid = np.abs(steps - np.round(steps)) < 1e-4
        np.testing.assert_array_equal(stays, on_grid)
        assert stays.mean() < 0.5


@pytest.mark.slow
def test_stochastic_depends_on_the_key_alone(dense):
    key = jax.random.key(5)
    first, again = (dense.fresh("stochastic", key=key) for _ in range(2))
    other = dense.quantize("stochastic")
    for name in dense.layers:
        np.testing.assert_array_equal(first.codes[name], again.codes[name])
        assert np.any(first.codes[name] != other.codes[name])
    assert 0.05 < first.flip_rate < 0.5
    default = dense.fresh("stochastic", key=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, default.codes, other.codes)


# ---- coordinate ----


@pytest.mark.slow
def test_the_objective_without_flip_price_is_the_error_of_a_forward_pass(case):
    result = case.quantize("coordinate", flip_weight=0.0)
    errors_of = case.output_errors(result.variables)
    nearest = case.quantize("nearest").variables["params"]
    for name, report in result.layers.items():
        assert report.objective == pytest.approx(errors_of[name], rel=1e-3)
        # The same prefix, and nearest at this layer.
        params = result.variables["params"]
        own = {**params[name], "kernel": nearest[name]["kernel"]}
        swapped = {**result.variables, "params": {**params, name: own}}
        measured = case.output_errors(swapped)[name]
        assert report.objective_nearest == pytest.approx(measured, rel=1e-3)
        assert report.objective < report.objective_nearest


@pytest.mark.slow
def test_reconstruction_has_a_lower_output_error_than_nearest(convolutional):
    nearest, reconstructed = (
        convolutional.output_errors(convolutional.quantize(m, **kwargs).variables)
        for m, kwargs in [("nearest", {}), ("coordinate", {"flip_weight": 0.0})]
    )
    for name in convolutional.layers:
        assert reconstructed[name] < 0.8 * nearest[name]


FLIP_WEIGHTS = [0.0, 0.02, 0.2, 2.0, 1e4]


@pytest.mark.slow
def test_a_higher_flip_weight_flips_more_until_nothing_is_left(case):
    rates = [case.quantize("coordinate", flip_weight=w).flip_rate for w in FLIP_WEIGHTS]
    assert np.all(np.diff(rates) > 0), rates
    assert rates[-1] == pytest.approx(case.quantize("flipped").flip_rate)


@pytest.mark.parametrize("flip_weight", FLIP_WEIGHTS[1:4])
def test_efrap_moves_weights_further_than_nearest_and_outputs_little(case, flip_weight):
    """What outputs may lose is bounded by what leaving nearest has earned."""
    result = case.quantize("coordinate", flip_weight=flip_weight)
    nearest = case.quantize("nearest").variables["params"]
    errors_of = case.output_errors(result.variables)
    for name in case.layers:
        kernel = case.kernel(name)
        own = result.variables["params"][name]
        moved = kernel - np.asarray(own["kernel"])
        nearest_moved = kernel - np.asarray(nearest[name]["kernel"])
        assert np.sum(moved**2) > np.sum(nearest_moved**2)
        at_nearest = {**own, "kernel": nearest[name]["kernel"]}
        params = {**result.variables["params"], name: at_nearest}
        bound = case.output_errors({**result.variables, "params": params})[name]
        bound += flip_weight * np.sum(np.abs(nearest_moved))
        assert errors_of[name] <= bound * (1 + 1e-3)


@pytest.mark.slow
def test_few_sweeps_stop_early(dense):
    one = dense.quantize("coordinate", max_sweeps=1)
    full = dense.quantize("coordinate")
    assert max(len(report.trace) for report in one.layers.values()) == 2
    assert max(len(report.trace) for report in full.layers.values()) > 2
    assert one.layers["first"].objective >= full.layers["first"].objective
    assert not one.layers["first"].converged
    assert all(report.converged for report in full.layers.values())
    nearest = dense.quantize("nearest").layers["first"]
    assert nearest.converged is None


# ---- activations ----


def test_float_activations_are_the_module_itself(dense):
    result = dense.quantize("nearest")
    np.testing.assert_array_equal(
        result.apply(result.variables, dense.images),
        dense.module.apply(result.variables, dense.images, train=False),
    )


@pytest.fixture(scope="module")
def with_activations(dense):
    """Bits -> everything quantized, weights at 8 bits."""
    return {
        bits: dense.quantize("nearest", act_bits=bits, weight_bits=8) for bits in (2, 5)
    }


@pytest.mark.slow
def test_fewer_activation_bits_mean_a_larger_error(dense, with_activations):
    wanted = dense.outputs(dense.variables)["third"]
    missed = []
    for result in with_activations.values():
        got = np.asarray(result.apply(result.variables, dense.images), np.float64)
        missed.append(np.mean((got - wanted) ** 2))
    assert missed[0] > 16 * missed[1] > 0


@pytest.mark.slow
def test_apply_is_the_same_under_jit(dense, with_activations):
    result = with_activations[5]
    np.testing.assert_allclose(
        jax.jit(result.apply)(result.variables, dense.images),
        result.apply(result.variables, dense.images),
        rtol=1e-4,
        atol=1e-5,
    )


@pytest.mark.slow
def test_a_module_jitted_before_does_not_lose_its_activation_grids(dense):
    """A compiled module that is called again sees no interceptor."""
    result = dense.quantize("nearest", act_bits=2, weight_bits=8)
    plain = jax.jit(functools.partial(dense.module.apply, train=False))
    before = plain(result.variables, dense.images)
    got = jax.jit(result.apply)(result.variables, dense.images)
    assert float(jnp.max(jnp.abs(got - before))) > 1e-3
    np.testing.assert_array_equal(plain(result.variables, dense.images), before)


class OneDense(nn.Module):
    features: int
    dtype: type | None = None

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.features, dtype=self.dtype, name="dense")(x)


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [2, 5])
def test_a_layer_sees_inputs_on_the_grid_of_its_activations(act_bits):
    """An identity kernel shows what the layer was fed."""
    images = 4 * uniform((40, 5)) - 1
    variables = {"params": {"dense": {"kernel": jnp.eye(5), "bias": jnp.zeros(5)}}}
    result = efrap.efrap(
        OneDense(5), variables, images, method="nearest", act_bits=act_bits
    )
    grid = result.act_params["dense"]
    fed = np.asarray(result.apply(result.variables, images), np.float64)
    codes = fed / float(grid.scale.squeeze()) + float(grid.zero_point.squeeze())
    np.testing.assert_allclose(codes, np.round(codes), atol=1e-3)
    assert -1e-3 < codes.min() and codes.max() < 2**act_bits - 1 + 1e-3
    assert len(np.unique(np.round(codes))) > 2 ** (act_bits - 1)


@pytest.mark.slow
def test_activation_ranges_come_from_every_channel():
    """32 * 24 * 24 * 3 values are thinned by a stride that 3 must not divide."""
    images = np.zeros((32, 24, 24, 3), np.float32)
    images[..., 1] = np.random.default_rng(0).uniform(0, 10, images.shape[:3])
    variables = some_variables(OneDense(2), jnp.asarray(images))
    result = efrap.efrap(
        OneDense(2), variables, jnp.asarray(images), method="nearest", act_bits=8
    )
    top = 255 * float(result.act_params["dense"].scale.squeeze())
    assert 9 < top < 10.5


@pytest.mark.slow
def test_reconstruction_sees_activations_as_the_quantized_module_feeds_them(dense):
    """Its objective is the error of `apply`, activations quantized."""
    result = dense.quantize("coordinate", flip_weight=0.0, act_bits=5)
    got = np.asarray(result.apply(result.variables, dense.images), np.float64)
    wanted = dense.outputs(dense.variables)["third"]
    error = np.mean(np.sum((got - wanted) ** 2, axis=-1))
    assert result.layers["third"].objective == pytest.approx(error, rel=1e-2)


# ---- controls, starts, prices ----


@pytest.mark.slow
def test_floor_and_ceil_take_the_neighbour_they_say(dense):
    floor, ceil = dense.quantize("floor"), dense.quantize("ceil")
    for name in dense.layers:
        steps = dense.kernel(name) / np.asarray(floor.quant_params[name].scale)
        free = np.abs(steps - np.round(steps)) > 1e-4
        np.testing.assert_array_equal(floor.codes[name][free], np.floor(steps)[free])
        np.testing.assert_array_equal(ceil.codes[name][free], np.ceil(steps)[free])
        np.testing.assert_array_equal(floor.codes[name][~free], np.round(steps)[~free])


@pytest.mark.slow
def test_flips_come_at_the_rate_of_each_layer(dense):
    shares = {"first": 0.2, "second": 0.0, "third": 0.8}
    result = dense.fresh("top_error", strength=shares)
    rates = {name: report.flip_rate for name, report in result.layers.items()}
    assert rates == pytest.approx(shares, abs=1e-6)
    by_chance = dense.fresh("random", strength=shares)
    assert by_chance.layers["second"].flip_rate == 0
    assert by_chance.layers["third"].flip_rate > 0.4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["noise", "counter_shift"])
def test_weights_moved_before_nearest_are_codes_on_the_same_grid(dense, method):
    result, nearest = dense.quantize(method), dense.quantize("nearest")
    for name in dense.layers:
        codes = np.asarray(result.codes[name])
        scale = np.asarray(result.quant_params[name].scale)
        np.testing.assert_array_equal(scale, nearest.quant_params[name].scale)
        kernel = result.variables["params"][name]["kernel"]
        np.testing.assert_allclose(kernel, scale * codes.astype(float), rtol=1e-6)
        moved = np.mean(codes != np.asarray(nearest.codes[name]))
        assert result.layers[name].flip_rate == pytest.approx(moved, abs=1e-6)
    assert 0.1 < result.flip_rate < 0.9


@pytest.mark.slow
def test_splitting_channels_leaves_the_first_layer_and_refines_the_others(dense):
    result = dense.quantize("channel_split", strength=0.2)
    nearest = dense.quantize("nearest")

    def scales(quantized, name):
        return np.asarray(quantized.quant_params[name].scale)

    first, *others = dense.layers
    np.testing.assert_array_equal(scales(result, first), scales(nearest, first))
    np.testing.assert_array_equal(result.codes[first], nearest.codes[first])
    for name in others:
        assert np.all(scales(result, name) <= scales(nearest, name))
        assert np.any(scales(result, name) < scales(nearest, name))


@pytest.mark.slow
def test_feedback_lowers_the_output_error_in_one_pass(dense):
    result = dense.quantize("feedback")
    report = result.layers["first"]
    assert report.objective < 0.8 * report.objective_nearest
    assert report.trace == () and report.converged is None
    measured = dense.output_errors(result.variables)["first"]
    assert report.objective == pytest.approx(measured, rel=1e-2)


@pytest.mark.slow
def test_more_starts_never_end_higher(dense):
    one = dense.quantize("coordinate")
    more = dense.quantize("coordinate", starts=("nearest", "feedback", "flipped"))
    # Later layers see other inputs.
    first, best = one.layers["first"], more.layers["first"]
    assert best.objective <= first.objective * (1 + 1e-6)
    assert best.objective_nearest == pytest.approx(first.objective_nearest, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["element", "neuron"])
def test_a_price_in_steps_does_not_see_the_scale_of_a_layer(form):
    """Weights by 8 and inputs by 1/2: the same codes. Not so in weight units."""
    images = uniform((40, 6))
    variables = some_variables(OneDense(8), images)
    scaled = jax.tree.map(lambda x: 8 * x, variables)

    def codes(unit, scale, flip_weight):
        result = efrap.efrap(
            OneDense(8),
            scaled if scale else variables,
            images / 2 if scale else images,
            flip_unit=unit,
            flip_form=form,
            flip_weight=flip_weight,
        )
        return result.codes["dense"], result.flip_rate

    before, rate = codes("step", False, 0.5)
    np.testing.assert_array_equal(before, codes("step", True, 0.5)[0])
    assert rate != codes("step", False, 0.0)[1]
    assert np.any(codes("weight", False, 0.02)[0] != codes("weight", True, 0.02)[0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest", "coordinate", "adam", "channel_split"])
def test_kernels_stored_in_bfloat16_come_back_on_their_grid(method):
    images = uniform((40, 6))
    module = nn.Sequential([nn.Dense(8, dtype=jnp.float32, param_dtype=jnp.bfloat16)])
    variables = some_variables(module, images)
    adam = {"adam": MINIBATCH} if method == "adam" else {}
    result = efrap.efrap(
        module, variables, images, weight_bits=8, method=method, **adam
    )
    ((name, params),) = result.quant_params.items()
    steps = np.asarray(result.codes[name], np.float64) - np.asarray(params.zero_point)
    expected = steps * np.asarray(params.scale, np.float64)
    kernel = np.asarray(result.variables["params"][name]["kernel"], np.float64)
    assert variables["params"][name]["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)


# ---- bits of the ends, folding ----


def test_first_and_last_layer_have_bits_of_their_own(dense):
    result = dense.quantize("nearest", first_last_bits=8)
    for name, bits in zip(dense.layers, (8, 4, 8), strict=True):
        assert result.specs[name].bits == result.layers[name].bits == bits
        assert np.abs(result.codes[name]).max() == 2 ** (bits - 1) - 1


@pytest.mark.slow
def test_inputs_of_the_first_and_the_last_layer_have_their_bits_too(dense):
    result = dense.quantize("nearest", act_bits=4, grid="efrap_reference")
    widths = [result.act_specs[name].bits for name in dense.layers]
    assert widths == [result.specs[name].bits for name in dense.layers] == [8, 4, 8]
    with pytest.raises(errors.InputError, match="4 and 8 bits"):
        _ = result.act_spec
    assert dense.quantize("nearest", act_bits=4).act_spec.bits == 4


@pytest.mark.slow
def test_a_grid_by_name_gives_that_grid(dense):
    """ONNX Runtime's: one scale per layer, all 16 codes of int4."""
    result = dense.quantize("nearest", grid="onnxruntime")
    for name in dense.layers:
        kernel = dense.kernel(name)
        scale = np.abs(kernel).max() / 7.5
        np.testing.assert_allclose(result.quant_params[name].scale, scale, rtol=1e-6)
        codes = np.clip(np.round(kernel / scale), -8, 7)
        inside = np.abs(codes) < 7
        np.testing.assert_array_equal(result.codes[name][inside], codes[inside])


@pytest.mark.slow
def test_percentile_grids_see_no_padding(dense):
    spec = quantization.QuantSpec(range_method="percentile", percentile=75.0)
    result = dense.quantize("nearest", spec=spec)
    for name in dense.layers:
        magnitude = np.quantile(np.abs(dense.kernel(name)), 0.75, axis=0)
        got = result.quant_params[name].scale[0]
        np.testing.assert_allclose(got, magnitude / 7, rtol=1e-5)


@pytest.mark.slow
def test_folding_quantizes_the_folded_kernel_on_its_own_grid(convolutional):
    result = convolutional.quantize("nearest", fold_batch_norm=True, weight_bits=8)
    params, stats = (
        convolutional.variables["params"],
        convolutional.variables["batch_stats"]["norm"],
    )
    factor = np.asarray(params["norm"]["scale"]) / np.sqrt(
        np.asarray(stats["var"]) + 1e-5
    )
    kernel = convolutional.kernel("stem") * factor
    scale = np.abs(kernel).max(axis=(0, 1, 2), keepdims=True) / 127
    got = result.quant_params["stem"].scale
    np.testing.assert_allclose(got, scale, rtol=1e-5)
    plain = convolutional.quantize("nearest", weight_bits=8)
    assert np.all(np.abs(np.asarray(got / plain.quant_params["stem"].scale) - 1) > 1e-3)
    assert jax.tree.structure(result.variables) == jax.tree.structure(
        convolutional.variables
    )
    wanted = convolutional.outputs(convolutional.variables)["head"]
    missed = convolutional.outputs(result.variables)["head"] - wanted
    assert np.sqrt(np.mean(missed**2)) < 0.02 * np.std(wanted)
    jax.tree.map(
        np.testing.assert_array_equal, convolutional.variables, convolutional.kept[0]
    )


class UsedElsewhere(nn.Module):
    where: str

    @nn.compact
    def __call__(self, x):
        norm = nn.BatchNorm(use_running_average=True, name="norm")
        y = nn.Dense(3, name="dense")(x)
        z = norm(y)
        if self.where == "added":
            z = z + y
        if self.where == "same norm":
            z = z + norm(nn.Dense(3, name="other")(x))
        return {"a_logits": z, "b_raw": y if self.where == "second output" else z}


def fold(where):
    images = uniform((5, 3))
    variables = some_variables(UsedElsewhere(where), images)
    return [
        efrap.efrap(
            UsedElsewhere(where),
            variables,
            images,
            method="nearest",
            fold_batch_norm=folds,
        )
        .quant_params["dense"]
        .scale
        for folds in (False, True)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["nowhere", "added", "second output"])
def test_a_layer_whose_output_is_used_elsewhere_keeps_its_batch_norm(where):
    plain, folded = fold(where)
    assert bool(jnp.all(plain == folded)) == (where != "nowhere")


@pytest.mark.slow
def test_folding_that_would_change_the_module_is_refused():
    """Two layers cannot both take the factor of one BatchNorm."""
    one_line_error(lambda: fold("same norm"), "BatchNorm cannot be folded")


# ---- unusual modules ----


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(5, name="shared")
        return nn.Dense(5, name="last")(nn.relu(shared(nn.relu(shared(x)))))


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [None, 5])
def test_a_layer_called_twice_warns_and_later_layers_see_both_calls(act_bits):
    images = uniform((40, 5))
    variables = some_variables(Twice(), images)
    with pytest.warns(UserWarning, match="layer shared is called 2 times"):
        result = efrap.efrap(
            Twice(), variables, images, flip_weight=0.0, act_bits=act_bits
        )
    assert list(result.layers) == ["shared", "last"]
    got = np.asarray(result.apply(result.variables, images), np.float64)
    wanted = np.asarray(Twice().apply(variables, images), np.float64)
    error = np.mean(np.sum((got - wanted) ** 2, axis=-1))
    assert result.layers["last"].objective == pytest.approx(error, rel=1e-3)


class Growing(nn.Module):
    """One Dense, called on ever larger values whose positions are merged."""

    calls: int = 2

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(5, name="shared")
        for _ in range(self.calls):
            x = shared(x.reshape(-1, x.shape[-1])).reshape(x.shape) * 4.0
        return nn.Dense(5, name="last")(x)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["plain", "onnxruntime"])
def test_the_input_grid_of_a_layer_called_twice_holds_both_calls(grid):
    images = uniform((40, 5))
    variables = some_variables(Growing(), images)
    shared = variables["params"]["shared"]
    kernel, bias = np.asarray(shared["kernel"]), np.asarray(shared["bias"])
    second = 4.0 * (np.asarray(images) @ kernel + bias)
    assert np.abs(second).max() > 3 * np.abs(images).max(), "the case must need it"
    with pytest.warns(UserWarning, match="is called 2 times"):
        result = efrap.efrap(
            Growing(), variables, images, method="nearest", act_bits=8, grid=grid
        )
    params, spec = result.act_params["shared"], result.act_specs["shared"]
    both = np.concatenate([np.asarray(images), second])
    on_grid = quantization.fake_quant(jnp.asarray(both), params, spec)
    # Nothing is clipped by more than the search of the range allows.
    assert np.abs(on_grid - both).max() < 3 * float(params.scale.squeeze())
    got = result.apply(variables, images)
    wanted = Growing().apply(variables, images)
    assert np.abs(got - wanted).max() < 0.05 * np.abs(wanted).max()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest", "coordinate", "adam"])
def test_calls_of_merged_positions_are_measured_by_image(method):
    """As by hand, whatever rounds the weights; three calls, on 3 x 2 positions."""
    images = uniform((40, 3, 2, 5))
    module = Growing(calls=3)
    variables = some_variables(module, images)
    shared = variables["params"]["shared"]
    calls = [images]
    for _ in range(2):
        product = np.asarray(calls[-1]) @ np.asarray(shared["kernel"])
        calls.append(jnp.asarray(4.0 * (product + np.asarray(shared["bias"]))))
    by_image = jnp.concatenate([one.reshape(40, -1) for one in calls], axis=1)
    expected = activation_grids.measure(
        by_image, grids.named("onnxruntime"), 8, num_images=40
    )
    adam = {"adam": MINIBATCH} if method == "adam" else {}
    with pytest.warns(UserWarning, match="is called 3 times"):
        result = efrap.efrap(
            module,
            variables,
            images,
            method=method,
            act_bits=8,
            grid="onnxruntime",
            **adam,
        )
    found = result.act_params["shared"]
    np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)
    np.testing.assert_array_equal(found.zero_point, expected.zero_point)


class Unused(nn.Module):
    use: bool = True

    @nn.compact
    def __call__(self, x, *, use=False):
        y = nn.Dense(3, name="used")(x)
        if use:
            y = nn.Dense(3, name="unused")(y)
        return nn.DenseGeneral(2, name="general")(y)


def test_kernels_that_nobody_quantizes_warn_and_stay():
    images = jnp.ones((4, 3))
    variables = some_variables(Unused(), images, use=True)
    with pytest.warns(UserWarning) as caught:
        result = efrap.efrap(Unused(), variables, images, method="nearest")
    assert sorted(str(w.message).split()[1] for w in caught) == ["general", "unused"]
    assert list(result.codes) == ["used"]
    for name in ("unused", "general"):
        np.testing.assert_array_equal(
            result.variables["params"][name]["kernel"],
            variables["params"][name]["kernel"],
        )


class Windows(nn.Module):
    """Merges positions into the batch axis before its first layer."""

    @nn.compact
    def __call__(self, x):
        y = x.reshape(-1, x.shape[-1])
        y = nn.BatchNorm(use_running_average=True)(nn.Dense(4, name="merged")(y))
        return nn.Dense(2, name="head")(nn.relu(y).reshape(x.shape[0], -1))


@pytest.mark.slow
def test_adam_batches_hold_whole_images_behind_a_reshape():
    images = uniform((7, 2, 3, 4))
    variables = some_variables(Windows(), images)
    result = efrap.efrap(
        Windows(),
        variables,
        images,
        method="adam",
        adam=adam_rounding.AdamSettings("minibatch", steps=2, batch_size=3),
    )
    assert list(result.layers) == ["merged", "head"]


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(4, name=name)(x) for name in ("query", "key", "value"))
        weights = nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k))
        return nn.Dense(4, name="out")(weights @ v)


@pytest.mark.slow
def test_query_key_and_value_share_one_gram_matrix(monkeypatch):
    flags = []
    add_chunk = moments_lib._add_chunk

    def counting(geometry, with_gram, *arguments):
        flags.append(with_gram)
        return add_chunk(geometry, with_gram, *arguments)

    monkeypatch.setattr(moments_lib, "_add_chunk", counting)
    images = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5, 4)), jnp.float32)
    variables = some_variables(Attention(), images)
    result = efrap.efrap(Attention(), variables, images, flip_weight=0.0)
    assert list(result.layers) == ["query", "key", "value", "out"]
    assert flags == [True, False, False, True]
    # A Gram matrix of other inputs would not give the true error.
    rows = np.asarray(images, np.float64).reshape(-1, 4)
    for name in ("query", "key", "value"):
        moved = np.asarray(result.variables["params"][name]["kernel"], np.float64)
        moved = moved - np.asarray(variables["params"][name]["kernel"], np.float64)
        error = np.mean(np.sum((rows @ moved) ** 2, axis=-1))
        assert result.layers[name].objective == pytest.approx(error, rel=1e-3)


def test_a_frozen_dict_comes_back_frozen():
    images = jnp.ones((4, 3))
    variables = flax.core.freeze(some_variables(OneDense(2), images))
    result = efrap.efrap(OneDense(2), variables, images, method="nearest")
    assert jax.tree.structure(result.variables) == jax.tree.structure(variables)


@pytest.mark.slow
def test_a_bfloat16_layer_is_reconstructed():
    images = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)
    module = OneDense(5, jnp.bfloat16)
    variables = some_variables(module, images)
    result = efrap.efrap(module, variables, images, flip_weight=0.0)
    assert result.layers["dense"].objective < result.layers["dense"].objective_nearest


# One class for all calls: only then does Flax remember what it has compiled.
JittedDense = nn.jit(OneDense)


class Lifted(nn.Module):
    transform: str

    @nn.compact
    def __call__(self, x):
        if self.transform == "scan":
            body = nn.scan(
                Step,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=2,
            )
            return nn.Dense(2, name="last")(body(name="block")(x, None)[0])
        blocks = {"remat": nn.remat(OneDense), "jit": JittedDense}
        return nn.Dense(2, name="last")(blocks[self.transform](3, name="block")(x))


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(3, name="dense")(carry), None


@pytest.mark.slow
@pytest.mark.parametrize("transform", ["remat", "jit", "scan"])
def test_a_module_with_lifted_layers_is_refused_in_one_line(transform):
    """A jitted block that has run hides its layer: float weights, silently."""
    module, images = Lifted(transform), jnp.ones((4, 3))
    variables = some_variables(module, images)
    if transform == "jit":
        module.apply(variables, images)
    one_line_error(
        lambda: efrap.efrap(module, variables, images), "block/dense", transform
    )
    if transform != "scan":
        blind = efrap.efrap(module, variables, images, method="nearest")
        assert list(blind.layers) == ["block/dense", "last"]


# ---- progress ----


def test_on_layer_gets_each_report_when_it_is_done(case):
    seen = []
    result = case.fresh("coordinate", on_layer=seen.append)
    assert seen == list(result.layers.values())


@pytest.mark.parametrize("method", ["nearest", "coordinate"])
def test_an_exception_of_on_layer_ends_the_run(case, method):
    class Stop(Exception):
        pass

    seen = []

    def stop(report):
        seen.append(report.name)
        if len(seen) == 2:
            raise Stop

    with pytest.raises(Stop):
        case.fresh(method, on_layer=stop)
    assert seen == case.layers[:2]


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"act_bits": 4}])
@pytest.mark.parametrize("method", ["coordinate", "adam"])
def test_a_call_cut_short_after_any_layer_goes_on_to_the_same_bits(
    case, method, options
):
    """From what the first call has put into `finished`; nothing is solved twice."""
    if method == "adam":
        options = {**options, "adam": MINIBATCH}
    whole = {}
    expected = case.fresh(method, finished=whole, **options)
    assert list(whole) == case.layers
    for done in range(len(case.layers) + 1):
        solved = []
        result = case.fresh(
            method,
            finished={name: whole[name] for name in case.layers[:done]},
            on_layer=lambda report, solved=solved: solved.append(report.name),
            **options,
        )
        assert solved == case.layers[done:]
        jax.tree.map(
            np.testing.assert_array_equal,
            (result.variables, result.codes, result.quant_params, result.act_params),
            (
                expected.variables,
                expected.codes,
                expected.quant_params,
                expected.act_params,
            ),
        )
        for name, report in result.layers.items():
            assert dataclasses.replace(report, seconds=0.0) == dataclasses.replace(
                expected.layers[name], seconds=0.0
            )


def test_finished_codes_of_another_kernel_are_refused(case):
    whole = {}
    case.fresh("nearest", finished=whole)
    first = case.layers[0]
    cut = dataclasses.replace(whole[first], codes=whole[first].codes[:-1])
    one_line_error(
        lambda: case.fresh("nearest", finished={first: cut}),
        f"layer {first} have shape",
    )


# ---- bad input ----


def one_line_error(function, *words):
    with pytest.raises(errors.InputError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"weight_bits": 1}, ["weight_bits", "2 to 8", "1"]),
        ({"weight_bits": 9}, ["weight_bits", "9"]),
        ({"weight_bits": 4.5}, ["weight_bits", "4.5"]),
        ({"weight_bits": True}, ["weight_bits", "True"]),
        ({"weight_bits": "4"}, ["weight_bits", "'4'"]),
        ({"weight_bits": None}, ["weight_bits", "None"]),
        ({"act_bits": 16}, ["act_bits", "16"]),
        ({"first_last_bits": 0}, ["first_last_bits", "0"]),
        ({"grid": "tflite"}, ["grid", "tflite", "litert"]),
        ({"strength": 0.5}, ["coordinate", "strength"]),
        ({"method": "random", "strength": 1.5}, ["strength", "1.5"]),
        ({"method": "random", "strength": {}}, ["strength", "layer"]),
        ({"starts": ()}, ["starts", "nearest"]),
        ({"starts": ("zero",)}, ["starts", "zero"]),
        ({"flip_form": "layer"}, ["flip_form", "neuron"]),
        ({"flip_unit": "metre"}, ["flip_unit", "step"]),
        ({"method": "newest"}, ["newest", "nearest, floor, ceil, flipped, stochastic"]),
        ({"method": None}, ["None", "coordinate"]),
        ({"flip_weight": -0.1}, ["flip_weight", "-0.1"]),
        ({"flip_weight": NAN}, ["flip_weight", "nan"]),
        ({"flip_weight": INF}, ["flip_weight", "inf"]),
        ({"max_sweeps": 0}, ["max_sweeps", "0"]),
        ({"method": "nearest", "flip_weight": 0.5}, ["nearest", "flip_weight", "0.5"]),
        ({"method": "noise", "flip_form": "neuron"}, ["noise", "flip_form"]),
        ({"method": "floor", "flip_unit": "step"}, ["floor", "flip_unit"]),
        ({"method": "feedback", "max_sweeps": 3}, ["feedback", "max_sweeps", "3"]),
        ({"method": "adam", "starts": ("flipped",)}, ["adam", "starts", "flipped"]),
        ({"adam": MINIBATCH}, ["coordinate", "adam"]),
        ({"flip_weight_path": (0.0, NAN)}, ["flip_weight_path", "nan"]),
        ({"method": "feedback", "flip_weight_path": (0.0,)}, ["feedback", "path"]),
        ({"spec": quantization.QuantSpec(channel_axis=0)}, ["channel_axis", "0"]),
    ],
)
def test_a_bad_argument_is_one_line(convolutional, kwargs, words):
    kwargs = {"method": "coordinate", **kwargs}
    one_line_error(lambda: convolutional.fresh(**kwargs), *words)


def images_with(value):
    images = np.ones((4, 7, 6, 2), np.float32)
    images[1, 2, 3, 1] = value
    return images


@pytest.mark.parametrize("method", ["nearest", "coordinate"])
@pytest.mark.parametrize(
    ("images", "words"),
    [
        (images_with(NAN), ["NaN or Inf"]),
        (images_with(INF), ["NaN or Inf"]),
        (np.ones((0, 7, 6, 2), np.float32), ["empty", "(0, 7, 6, 2)"]),
        (np.ones((4, 0, 6, 2), np.float32), ["empty", "(4, 0, 6, 2)"]),
        (np.ones((7,), np.float32), ["(7,)"]),
        (np.float32(1), ["()"]),
        (np.ones((4, 7, 6, 2), np.uint8), ["float", "uint8"]),
        (np.ones((4, 7, 6, 2), bool), ["float", "bool"]),
        (np.ones((4, 7, 6, 3), np.float32), ["Net", "(4, 7, 6, 3)"]),
        (np.ones((7, 6, 2), np.float32), ["Net", "(7, 6, 2)"]),
        (np.ones((4, 84), np.float32), ["Net", "(4, 84)"]),
    ],
    ids=lambda value: str(np.shape(value)) if isinstance(value, np.ndarray) else "",
)
def test_bad_calibration_images_are_one_line(convolutional, method, images, words):
    def quantize():
        efrap.efrap(
            convolutional.module,
            convolutional.variables,
            images,
            method=method,
            apply_kwargs=APPLY_KWARGS,
        )

    one_line_error(quantize, *words)


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize(
    "path",
    [
        ("params", "inner", "kernel"),
        ("params", "head", "bias"),
        ("batch_stats", "norm", "var"),
    ],
)
def test_a_weight_that_is_not_finite_is_named(convolutional, path, value):
    variables = jax.tree.map(np.array, convolutional.variables)
    leaf = variables[path[0]][path[1]][path[2]]
    leaf.flat[-1] = value

    def quantize():
        efrap.efrap(
            convolutional.module,
            variables,
            convolutional.images,
            method="nearest",
            apply_kwargs=APPLY_KWARGS,
        )

    one_line_error(quantize, "/".join(path), "NaN or Inf")


class NoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(x)


def test_a_module_without_layers_is_one_line():
    images = jnp.ones((4, 3))
    variables = some_variables(NoLayers(), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one_line_error(
            lambda: efrap.efrap(NoLayers(), variables, images),
            "NoLayers",
            "nn.Conv or nn.Dense",
        )


def test_a_module_that_wants_training_statistics_is_one_line(convolutional):
    """`train=True` would update the BatchNorm while quantizing."""

    def quantize():
        efrap.efrap(
            convolutional.module,
            convolutional.variables,
            convolutional.images,
            apply_kwargs={"train": True},
        )

    one_line_error(quantize, "Net", "batch_stats")
