# SPDX-License-Identifier: Apache-2.0
"""Scales that leave a network's function as it is leave its rounding, too."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import nad_jax
from nad_jax import errors
from nad_jax.defenses import moments
from nad_jax.models import layers


class Net(nn.Module):
    """ReLU layers without biases; scales can be moved from one to the next."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), use_bias=False, name="first")(x))
        x = nn.Conv(8, (3, 3), feature_group_count=2, use_bias=False, name="second")(x)
        x = jnp.mean(nn.relu(x), axis=(1, 2))
        return nn.Dense(4, use_bias=False, name="last")(x)


@pytest.fixture(scope="module")
def images():
    return jax.random.uniform(jax.random.key(1), (48, 6, 6, 3))


@pytest.fixture(scope="module")
def variables(images):
    return Net().init(jax.random.key(0), images)


def _scaled(variables, channels):
    """Channel c of "first" times `channels[c]`, taken back in "second"."""
    kernels = {name: own["kernel"] for name, own in variables["params"].items()}
    channels = np.asarray(channels, np.float32)
    first = jnp.asarray(np.asarray(kernels["first"]) * channels)
    # Group 0 of "second" sees the first three channels, and makes the first four.
    seen = np.repeat(channels.reshape(2, 3), 4, axis=0).T
    second = jnp.asarray(np.asarray(kernels["second"]) / seen)
    kernels |= {"first": first, "second": second}
    return {"params": {name: {"kernel": kernel} for name, kernel in kernels.items()}}


def _round(variables, images, **options):
    return nad_jax.efrap(
        Net(),
        variables,
        images,
        weight_bits=4,
        starts=("nearest", "flipped"),
        **options,
    )


SCALES = [
    [2.0**67] * 6,
    [2.0**-67] * 6,
    [2.0**50, 2.0**-50, 1.0, 2.0**50, 2.0**-50, 1.0],
]


@pytest.mark.slow
@pytest.mark.parametrize("scales", SCALES[:2], ids=["large", "small"])
def test_a_scale_moved_to_the_next_layer_moves_no_rounding(variables, images, scales):
    """Squares of 2^67 are no float32; "step" prices do not see the scale at all."""
    moved = _scaled(variables, scales)
    before, after = Net().apply(variables, images), Net().apply(moved, images)
    assert (before == after).all()
    wanted = _round(variables, images, flip_unit="step")
    found = _round(moved, images, flip_unit="step")
    for name, report in found.layers.items():
        assert (found.codes[name] == wanted.codes[name]).all(), name
        assert report.converged and report.flip_rate > 0.01
    assert found.layers["last"].objective == wanted.layers["last"].objective
    square = scales[0] ** 2
    expected = wanted.layers["first"].objective * square
    assert found.layers["first"].objective == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_each_output_channel_is_solved_in_a_unit_of_its_own(variables, images):
    """Channels of the first layer, some 2^50 times others, have their own grids."""
    wanted = _round(variables, images, flip_weight=0.0)
    found = _round(_scaled(variables, SCALES[2]), images, flip_weight=0.0)
    assert (found.codes["first"] == wanted.codes["first"]).all()
    assert found.layers["first"].flip_rate > 0.01


@pytest.mark.slow
def test_a_huge_input_that_nobody_weighs_does_not_hide_the_others(images):
    """The next layer's weights for it are 0: nothing of the function depends on it."""
    module = nn.Sequential([nn.Dense(4, use_bias=False)])
    rows = images.reshape(48, -1)
    kernel = jax.random.normal(jax.random.key(2), (rows.shape[1], 4)).at[0].set(0.0)
    variables = {"params": {"layers_0": {"kernel": kernel}}}
    found = [
        nad_jax.efrap(
            module, variables, rows.at[:, 0].multiply(scale), weight_bits=4
        ).codes["layers_0"]
        for scale in (1.0, 2.0**75)
    ]
    assert (found[0] == found[1]).all()
    nearest = nad_jax.efrap(
        module, variables, rows, weight_bits=4, method="nearest"
    ).codes["layers_0"]
    assert (found[1] != nearest).any()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "act_bits"),
    [
        ("coordinate", None),
        ("feedback", None),
        ("adam", None),
        ("nearest", 8),
        ("stochastic", 4),
    ],
)
def test_what_is_not_finite_is_refused_by_the_layers_name(
    variables, images, method, act_bits
):
    """Every comparison with NaN is false: it would be nearest rounding, converged."""
    broken = jax.tree.map(lambda x: x, variables)
    kernel = broken["params"]["first"]["kernel"]
    # The products of the second layer overflow.
    broken["params"]["first"]["kernel"] = kernel * 2.0**127
    broken["params"]["second"]["kernel"] *= 2.0**127
    with pytest.raises(errors.InputError, match="must be finite in float32") as raised:
        nad_jax.efrap(
            Net(), broken, images, weight_bits=4, act_bits=act_bits, method=method
        )
    assert "\n" not in str(raised.value)


def test_units_are_powers_of_two_above_what_they_measure():
    geometry = layers.Geometry(kernel_shape=(1, 1, 2, 4), strides=(1, 1), groups=2)
    kernel = np.array([[[[1.0, 3.0, 0.0, -2.0], [0.5, 0.0, 0.0, 8.0]]]])
    largest = np.array([0.0, 5.0, 1e-30, 1e30])
    units = moments.Units.natural(geometry, kernel, largest)
    # A dead input has the smallest unit; 1e-30 and 1e30 are beyond the 60 octaves.
    tiny, huge = 2.0**-60, 2.0**60
    assert units.inputs.tolist() == [tiny, 8.0, tiny, huge]
    # The power of two above |W| times the inputs' units, (tiny, 8) and (tiny, huge).
    assert units.outputs.tolist() == [8.0, 2.0**-58, 1.0, huge]
    product = units.of_weights(geometry)[0, 0] * units.outputs
    assert product.tolist() == [[tiny] * 4, [8.0, 8.0, huge, huge]]


@pytest.mark.slow
def test_undone_units_leave_the_moments_of_plain_ones():
    geometry = layers.Geometry((3, 2, 4), (1,), (1,), "SAME", groups=2)
    kernel = jax.random.normal(jax.random.key(0), geometry.kernel_shape)
    float_inputs, inputs = (
        jax.random.normal(jax.random.key(seed), (5, 7, 4))
        * jnp.asarray([[[1.0, 9.0, 0.0, 3.0]]])
        for seed in (1, 2)
    )
    plain = moments.Collector().collect(geometry, kernel, float_inputs, inputs)
    largest = np.asarray(moments.largest_inputs(inputs))
    units = moments.Units.natural(geometry, kernel, largest)
    assert len(set(units.inputs)) > 2
    scaled = moments.Collector().collect(geometry, kernel, float_inputs, inputs, units)
    for one, other in zip(units.undo(geometry, scaled), plain, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_the_largest_input_is_a_magnitude_of_either_sign():
    inputs = jnp.asarray([[[3.0, -5.0, 0.0, 1.0]], [[-4.0, 2.0, 0.0, jnp.nan]]])
    np.testing.assert_array_equal(moments.largest_inputs(inputs), [4, 5, 0, np.nan])
