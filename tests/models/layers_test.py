# SPDX-License-Identifier: Apache-2.0
"""Layers of any module, against Flax itself; folding, against the unfolded module."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.models import layers as layers_lib


class Around(nn.Module):
    """A module whose only submodule is called "layer"."""

    layer: nn.Module

    def __call__(self, x):
        return self.layer(x)


def normal(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def conv(image_shape, features=4, *, slow=False, **options):
    return pytest.param(
        nn.Conv(features, use_bias=False, **options),
        image_shape,
        id=" ".join([str(image_shape), *(f"{k}={v}" for k, v in options.items())]),
        marks=[pytest.mark.slow] if slow else [],
    )


def dense(input_shape):
    return pytest.param(nn.Dense(4, use_bias=False), input_shape, id=f"{input_shape}")


LAYERS = [
    conv((2, 7, 6, 3), kernel_size=(3, 3), slow=True),
    conv((2, 7, 6, 3), kernel_size=(3, 3), strides=2, slow=True),
    conv((2, 8, 7, 3), kernel_size=(2, 4), strides=(3, 2)),
    conv((2, 7, 6, 3), kernel_size=(1, 1), strides=2, slow=True),
    conv((2, 9, 8, 3), kernel_size=(3, 2), kernel_dilation=(2, 3)),
    conv((2, 7, 6, 3), kernel_size=(3, 2), padding="VALID", strides=(2, 1)),
    conv((2, 7, 6, 3), kernel_size=(3, 4), padding="CIRCULAR", strides=2),
    conv(
        (2, 7, 6, 3),
        kernel_size=(2, 3),
        padding="CIRCULAR",
        kernel_dilation=2,
        slow=True,
    ),
    conv((2, 7, 6, 3), kernel_size=(3, 4), padding="REFLECT", kernel_dilation=(2, 1)),
    conv((2, 7, 3), kernel_size=(3,), padding="CAUSAL", kernel_dilation=2),
    conv((2, 7, 6, 3), kernel_size=(3, 3), padding=1, slow=True),
    conv((2, 7, 6, 3), kernel_size=(3, 3), padding=(2, 0), slow=True),
    conv((2, 7, 6, 3), kernel_size=(3, 3), padding=((0, 2), (3, 1)), strides=2),
    conv((2, 7, 6, 3), kernel_size=(3, 3), padding=((-1, 0), (1, -2))),
    conv((2, 7, 6, 4), 6, kernel_size=(3, 3), feature_group_count=2, slow=True),
    conv((2, 7, 6, 3), 6, kernel_size=(3, 3), feature_group_count=3, strides=2),
    conv((2, 7, 2), kernel_size=(4,), strides=3),
    conv((2, 5, 4, 3, 2), kernel_size=(2, 3, 2), strides=(1, 2, 1), slow=True),
    conv((2, 3, 6, 5, 2), kernel_size=(3, 3)),  # two batch axes
    conv((6, 5, 2), kernel_size=(3, 3), slow=True),  # none
    dense((5, 3)),
    dense((2, 5, 3)),
    dense((2, 5, 2, 3)),
]


def kernel_shape(layer, input_shape):
    """Written from Flax's documentation, not from `find_layers`."""
    if isinstance(layer, nn.Dense):
        return (input_shape[-1], layer.features)
    inputs = input_shape[-1] // layer.feature_group_count
    return (*layer.kernel_size, inputs, layer.features)


@pytest.mark.parametrize(("layer", "input_shape"), LAYERS)
def test_unfolded_product_and_run_are_the_flax_layer(layer, input_shape):
    module = Around(layer)
    inputs, kernel = normal(input_shape), normal(kernel_shape(layer, input_shape), 1)
    variables = {"params": {"layer": {"kernel": kernel}}}
    (found,) = layers_lib.find_layers(module, variables, inputs)
    geometry = found.geometry
    assert hash(geometry) == hash(geometry)
    assert geometry.kernel_shape == kernel.shape

    @jax.jit
    def three_ways(variables, inputs):
        kernel = variables["params"]["layer"]["kernel"]
        matrix = layers_lib.as_matrix(geometry, kernel)
        rows = layers_lib.unfold(geometry, inputs)
        product = jnp.swapaxes(rows @ matrix, 0, 1)
        ran = layers_lib.run(geometry, kernel, inputs)
        return module.apply(variables, inputs), ran, product, rows

    expected, ran, product, rows = three_ways(variables, inputs)
    assert ran.shape == expected.shape
    np.testing.assert_allclose(ran, expected, rtol=1e-4, atol=1e-5)
    assert rows.shape == (
        geometry.groups,
        expected.size // expected.shape[-1],
        geometry.num_inputs,
    )
    np.testing.assert_allclose(
        product.reshape(expected.shape), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_as_kernel_undoes_as_matrix(groups):
    geometry = layers_lib.Geometry((3, 2, 4 // groups, 8), groups=groups)
    kernel = normal(geometry.kernel_shape)
    matrix = layers_lib.as_matrix(geometry, kernel)
    assert matrix.shape == (groups, 24 // groups, 8 // groups)
    np.testing.assert_array_equal(layers_lib.as_kernel(geometry, matrix), kernel)


def test_a_layer_computes_in_its_own_dtype():
    layer = nn.Dense(4, use_bias=False, dtype=jnp.bfloat16)
    module, inputs = Around(layer), normal((5, 3))
    variables = {"params": {"layer": {"kernel": normal((3, 4), 1)}}}
    (found,) = layers_lib.find_layers(module, variables, inputs)
    ran = layers_lib.run(found.geometry, normal((3, 4), 1), inputs)
    assert ran.dtype == jnp.bfloat16
    expected = module.apply(variables, inputs)
    np.testing.assert_array_equal(ran.astype(jnp.float32), expected.astype(jnp.float32))


def test_half_precision_inputs_of_a_float32_layer_are_computed_in_float32():
    """So does Flax, where implicit promotion is allowed at all."""
    module, inputs = Around(nn.Dense(4, use_bias=False)), normal((5, 3))
    inputs, kernel = inputs.astype(jnp.float16), normal((3, 4), 1)
    variables = {"params": {"layer": {"kernel": kernel}}}
    with jax.numpy_dtype_promotion("standard"):
        (found,) = layers_lib.find_layers(module, variables, inputs)
        ran = layers_lib.run(found.geometry, kernel, inputs)
        expected = module.apply(variables, inputs)
    assert ran.dtype == expected.dtype == jnp.float32
    np.testing.assert_allclose(ran, expected, rtol=1e-6)


# ---- finding ----


class Body(nn.Module):
    """Setup style; called in another order than defined, `shared` twice."""

    def setup(self):
        self.last = nn.Dense(2)
        self.shared = nn.Dense(3)
        self.blocks = [nn.Conv(3, (3, 3)), nn.Conv(3, (1, 1), strides=2)]

    def __call__(self, x, *, halve=True):
        for block in self.blocks if halve else self.blocks[:1]:
            x = nn.relu(block(x))
        x = self.shared(nn.relu(self.shared(x)))
        return self.last(x.mean(axis=(1, 2)))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, **options):
        return Body(name="body")(x, **options)


IMAGES = jax.ShapeDtypeStruct((2, 6, 6, 3), jnp.float32)


def shapes_of(module, images=IMAGES, **options):
    """Variables without values: finding layers must do with shapes."""
    return jax.eval_shape(
        functools.partial(module.init, **options), jax.random.key(0), images
    )


def find(module, images=IMAGES, **kwargs):
    return layers_lib.find_layers(module, shapes_of(module, images), images, **kwargs)


def test_layers_come_in_the_order_of_the_forward_pass_with_their_calls():
    found = find(Net())
    assert [(layer.name, layer.calls) for layer in found] == [
        ("body/blocks_0", 1),
        ("body/blocks_1", 1),
        ("body/shared", 2),
        ("body/last", 1),
    ]
    assert found[1].geometry == layers_lib.Geometry(
        (1, 1, 3, 3), strides=(2, 2), dilation=(1, 1), padding="SAME"
    )
    assert found[2].geometry == layers_lib.Geometry((3, 3))
    assert all(layer.batch_norm is None for layer in found)


@pytest.mark.slow
def test_apply_kwargs_reach_the_module_and_an_unused_kernel_is_named():
    with pytest.warns(UserWarning, match="kernel body/blocks_1 is left in float"):
        found = find(Net(), apply_kwargs={"halve": False})
    assert [layer.name for layer in found] == [
        "body/blocks_0",
        "body/shared",
        "body/last",
    ]


def test_a_kernel_of_another_kind_of_layer_is_named():
    class Attends(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.DenseGeneral((2, 2), name="heads")(nn.Dense(3, name="in")(x))
            return nn.ConvTranspose(2, (2, 2), name="up")(x)

    with pytest.warns(UserWarning) as caught:
        found = find(Attends())
    assert [layer.name for layer in found] == ["in"]
    assert sorted(str(w.message).split()[1] for w in caught) == ["heads", "up"]


class Normed(nn.Module):
    """Which layer feeds a BatchNorm directly, in the names."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        y = norm(epsilon=0.25, name="norm1")(nn.Conv(4, (3, 3), name="direct")(x))
        y = norm(name="norm2")(nn.relu(nn.Conv(4, (3, 3), name="through_relu")(y)))
        y = norm(name="norm3")(nn.Conv(4, (1, 1), name="added")(y) + y)
        y = norm(name="norm4", axis=1)(nn.Conv(4, (1, 1), name="other_axis")(y))
        y = nn.Conv(4, (1, 1), name="shortcut")(y)
        y = norm(name="norm5")(y) + y
        y = norm(name="norm6")(nn.Dense(5, name="dense")(y.mean(axis=(1, 2))))
        z = nn.Dense(5, name="returned")(y)
        return norm(name="norm7")(z), z


@pytest.mark.slow
def test_a_batch_norm_belongs_to_the_layer_whose_output_it_alone_takes():
    found = {layer.name: layer for layer in find(Normed())}
    norms = {name: layer.batch_norm for name, layer in found.items()}
    assert norms == {
        "direct": ("norm1",),
        "through_relu": None,
        "added": None,
        "other_axis": None,
        "shortcut": None,
        "dense": ("norm6",),
        "returned": None,
    }
    assert found["direct"].batch_norm_epsilon == 0.25


class ByName(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.Conv(4, (3, 3), name="conv")(inputs=x)
        y = nn.BatchNorm(use_running_average=True, name="norm")(x=y)
        return nn.Dense(5, name="dense")(inputs=y)


def test_inputs_may_be_given_by_name():
    found = {layer.name: layer for layer in find(ByName())}
    assert list(found) == ["conv", "dense"]
    assert found["conv"].batch_norm == ("norm",)


@pytest.mark.slow
def test_layers_of_a_jitted_block_are_found_although_it_has_run_before():
    """Compiled code is not traced again, so it hides its layers from interceptors."""

    @nn.jit
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(x)

    class Outer(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(Block(name="block")(x))

    module, inputs = Outer(), normal((2, 3))
    variables = jax.tree.map(jnp.zeros_like, shapes_of(module, inputs))
    for _ in range(2):
        module.apply(variables, inputs)
        found = layers_lib.find_layers(module, variables, inputs)
        assert [layer.path for layer in found] == [("block", "Dense_0"), ("Dense_0",)]


def test_a_subclass_that_only_changes_defaults_is_a_layer():
    class Wide(nn.Dense):
        features: int = 5

    assert find(Around(Wide()))[0].geometry.kernel_shape == (3, 5)


class Standardized(nn.Conv):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x) * 2


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        return stack(name="steps")(x, None)[0]


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(3)(carry), None


class NoLayers(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.LayerNorm()(x)


class Asserts(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        if not self.is_initializing():
            raise AssertionError  # pytest gives an `assert` a message
        return x


class Normalized(nn.Module):
    wrapper: type

    @nn.compact
    def __call__(self, x):
        wrapped = self.wrapper(nn.Dense(3, name="inner"), name="wrapper")
        if self.wrapper is nn.SpectralNorm:
            return wrapped(x, update_stats=False)
        return wrapped(x)


def one_line_error(function, *words):
    with pytest.raises(errors.InputError) as caught:
        function()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (NoLayers(), ["NoLayers", "no nn.Conv or nn.Dense"]),
        (nn.Dense(3), ["make it part of a module"]),
        (Asserts(), ["Asserts", "(2, 6, 6, 3)", "AssertionError"]),
        (Stacked(), ["steps/Dense_0", "(2, 3, 3)", "nn.scan"]),
        (Around(Standardized(3, (3, 3))), ["layer", "__call__"]),
        (
            Around(nn.Conv(3, (3, 3), padding=1, input_dilation=2)),
            ["input_dilation"],
        ),
        (Around(nn.Conv(3, (1, 1), mask=jnp.ones((1, 1, 3, 3)))), ["mask"]),
        (Around(nn.Dense(3, dot_general=jax.lax.dot_general)), ["dot_general"]),
        (Around(nn.Conv(3, (3, 3), padding="SAME_LOWER")), ["SAME_LOWER", "CAUSAL"]),
        (Normalized(nn.WeightNorm), ["wrapper"]),
        (Normalized(nn.SpectralNorm), ["wrapper"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_module_that_cannot_be_quantized_is_refused_in_one_line(module, words):
    one_line_error(lambda: find(module), *words)


@pytest.mark.parametrize("shape", [(2, 6, 6, 4), (2, 6, 6), (3,)])
def test_images_that_do_not_fit_the_module_are_refused_in_one_line(shape):
    variables = shapes_of(Net())
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    one_line_error(
        lambda: layers_lib.find_layers(Net(), variables, images), "Net", str(shape)
    )


def test_missing_parameters_are_refused_in_one_line():
    variables = shapes_of(Net())
    del variables["params"]["body"]["last"]
    one_line_error(lambda: layers_lib.find_layers(Net(), variables, IMAGES), "Net")


# ---- folding ----


class AllNorms(nn.Module):
    """Every kind of BatchNorm behind every kind of layer, and one that stays."""

    @nn.compact
    def __call__(self, x):
        norm = functools.partial(nn.BatchNorm, use_running_average=True)
        x = norm(name="both")(nn.Conv(4, (3, 3), name="conv_bias")(x))
        x = nn.relu(x)
        x = nn.Conv(6, (3, 3), feature_group_count=2, use_bias=False, name="conv")(x)
        x = nn.relu(norm(use_bias=False, epsilon=0.5, name="no_bias")(x))
        x = norm(use_scale=False, name="no_scale")(nn.Dense(5, name="dense_bias")(x))
        x = nn.Dense(3, use_bias=False, name="dense")(nn.relu(x))
        x = norm(use_scale=False, use_bias=False, name="neither")(x)
        return norm(name="stays")(nn.relu(x))


PRODUCERS = {
    "conv_bias": "both",
    "conv": "no_bias",
    "dense_bias": "no_scale",
    "dense": "neither",
}


@pytest.fixture(scope="module")
def unfolded():
    """The module, images, and variables with no statistic at its initial value."""
    module, images = AllNorms(), normal((3, 5, 5, 2))
    generator = np.random.default_rng(7)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.3, 2, leaf.shape), jnp.float32),
        shapes_of(module, images),
    )
    params = variables["params"]
    for name in PRODUCERS:
        kernel = params[name]["kernel"]
        params[name]["kernel"] = normal(kernel.shape, 11) / kernel[..., 0].size
    return module, variables, images


@pytest.fixture(scope="module")
def folded(unfolded):
    module, variables, images = unfolded
    found = layers_lib.find_layers(module, variables, images)
    # Jitted only because eager operations would be compiled one by one.
    return jax.jit(lambda v: layers_lib.fold_batch_norm(v, found))(variables)


@pytest.mark.slow
def test_folding_keeps_the_function_and_the_structure(unfolded, folded):
    module, variables, images = unfolded
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    assert jax.tree.map(jnp.shape, folded) == jax.tree.map(jnp.shape, variables)
    apply = jax.jit(module.apply)
    expected = apply(variables, images)
    assert float(jnp.std(expected)) > 0.01
    np.testing.assert_allclose(apply(folded, images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "norm"), PRODUCERS.items())
def test_the_factor_of_a_folded_batch_norm_is_in_the_kernel(
    unfolded, folded, layer, norm
):
    _, variables, _ = unfolded
    epsilon = 0.5 if norm == "no_bias" else 1e-5
    variance = np.asarray(variables["batch_stats"][norm]["var"], np.float64)
    scale = np.asarray(variables["params"].get(norm, {}).get("scale", 1), np.float64)
    factor = scale / np.sqrt(variance + epsilon)
    assert np.all(np.abs(factor - 1) > 1e-3)
    for name, leaf in variables["params"][layer].items():
        expected = np.asarray(leaf, np.float64) * factor
        np.testing.assert_allclose(folded["params"][layer][name], expected, rtol=1e-5)
    stats = folded["batch_stats"][norm]
    np.testing.assert_allclose(stats["var"], 1 - epsilon, rtol=1e-6)
    np.testing.assert_array_equal(
        folded["params"].get(norm, {}).get("scale", jnp.ones(())), 1
    )


def test_a_batch_norm_behind_anything_else_stays_as_it_is(unfolded, folded):
    _, variables, _ = unfolded
    for collection in ("params", "batch_stats"):
        jax.tree.map(
            np.testing.assert_array_equal,
            folded[collection]["stays"],
            variables[collection]["stays"],
        )


def test_folding_does_not_touch_its_input(unfolded):
    module, variables, images = unfolded
    before = jax.tree.map(np.array, variables)
    found = layers_lib.find_layers(module, variables, images)
    layers_lib.fold_batch_norm(variables, found[-1:])
    jax.tree.map(np.testing.assert_array_equal, variables, before)


def test_folding_refuses_a_shared_layer_and_missing_statistics(unfolded):
    _, variables, _ = unfolded
    layer = layers_lib.Layer(
        ("dense",), layers_lib.Geometry((5, 3)), 2, ("neither",), 1e-5
    )
    one_line_error(
        lambda: layers_lib.fold_batch_norm(variables, [layer]), "dense", "2 times"
    )
    once = layers_lib.Layer(
        ("dense",), layers_lib.Geometry((5, 3)), 1, ("neither",), 1e-5
    )
    without = {"params": variables["params"]}
    one_line_error(lambda: layers_lib.fold_batch_norm(without, [once]), "neither")
