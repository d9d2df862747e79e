# SPDX-License-Identifier: Apache-2.0
"""Shared layers behave like PyTorch's; fresh variables have the stated distribution."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from nad_jax import errors, models
from nad_jax.models import common


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("height_width", [(8, 8), (7, 5)])
def test_stride_2_samples_the_even_pixels_as_pytorch_does(size, height_width, oracle):
    """The kernel's centre sits on pixels 0, 2, 4, ...: "SAME" would use 1, 3, 5, ..."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(1, *height_width, 2)).astype(np.float32)
    layer = common.conv(3, size, 2, dtype=jnp.float32, name="conv")
    centre_only = np.zeros((size, size, 2, 3), np.float32)
    centre_only[size // 2, size // 2] = kernel = generator.normal(size=(2, 3))
    actual = layer.apply({"params": {"kernel": jnp.asarray(centre_only)}}, images)
    np.testing.assert_allclose(actual, images[:, ::2, ::2] @ kernel, rtol=1e-5)

    full = generator.normal(size=(size, size, 2, 3)).astype(np.float32)
    actual = layer.apply({"params": {"kernel": jnp.asarray(full)}}, images)
    expected = oracle.conv(images.astype(np.float64), full, stride=2)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def _norm(train, axis_name=None):
    return common.batch_norm(train=train, axis_name=axis_name, name="bn")


def _norm_variables(*, scale, bias, mean, var):
    return {
        "params": {"scale": jnp.array(scale), "bias": jnp.array(bias)},
        "batch_stats": {"mean": jnp.array(mean), "var": jnp.array(var)},
    }


@pytest.mark.slow
def test_batch_norm_moves_its_statistics_a_tenth_of_the_way():
    """New running value = 0.9 old + 0.1 batch, with the biased variance."""
    x = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 3, 3, 2)).astype(np.float32)
    variables = _norm_variables(
        scale=[1.0, 2.0], bias=[0.0, 1.0], mean=[1.0, -1.0], var=[4.0, 9.0]
    )
    y, updates = _norm(train=True).apply(variables, x, mutable=["batch_stats"])
    mean = x.mean(axis=(0, 1, 2), dtype=np.float64)
    var = x.var(axis=(0, 1, 2), dtype=np.float64)
    stats = updates["batch_stats"]
    np.testing.assert_allclose(stats["mean"], [0.9, -0.9] + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], [3.6, 8.1] + 0.1 * var, rtol=1e-5)
    expected = (x - mean) / np.sqrt(var + 1e-5) * [1.0, 2.0] + [0.0, 1.0]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)

    y, updates = _norm(train=False).apply(variables, x, mutable=["batch_stats"])
    expected = (x - [1, -1]) / np.sqrt(np.array([4, 9]) + 1e-5) * [1, 2] + [0, 1]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    stats = updates["batch_stats"]
    np.testing.assert_array_equal(stats["mean"], [1.0, -1.0])
    np.testing.assert_array_equal(stats["var"], [4.0, 9.0])


def test_norms_compute_in_float32_and_return_the_dtype_they_were_given():
    """1000 +- 1 has no spread left if the mean is taken in bfloat16 (spacing 4)."""
    x = jnp.asarray([[996.0, 1000.0, 1004.0, 1000.0]], jnp.bfloat16).T
    batch = _norm_variables(scale=[1.0], bias=[0.0], mean=[0.0], var=[1.0])
    layer = {"params": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}

    @jax.jit
    def run(x):
        over_batch, _ = _norm(train=True).apply(batch, x, mutable=["batch_stats"])
        return over_batch, common.LayerNorm().apply(layer, x.T)

    for y in run(x):
        assert y.dtype == jnp.bfloat16
        expected = np.array([-1.0, 0.0, 1.0, 0.0]) * np.sqrt(2)
        np.testing.assert_allclose(np.float32(y).ravel(), expected, rtol=0.01)


@pytest.mark.slow
def test_batch_norm_over_a_named_axis_sees_the_whole_batch():
    """Four mapped shards with an axis name update as the undivided batch does."""
    x = np.random.default_rng(0).normal(size=(8, 2, 2, 3)).astype(np.float32)
    variables = _norm_variables(
        scale=[1.0] * 3, bias=[0.0] * 3, mean=[0.0] * 3, var=[1.0] * 3
    )

    def update(axis_name):
        layer = _norm(train=True, axis_name=axis_name)
        return lambda x: layer.apply(variables, x, mutable=["batch_stats"])

    @jax.jit
    def run(x, shards):
        synced = jax.vmap(update("devices"), axis_name="devices")(shards)
        return update(None)(x), synced, jax.vmap(update(None))(shards)

    whole, synced, alone = run(x, x.reshape(4, 2, 2, 2, 3))
    np.testing.assert_allclose(synced[0].reshape(x.shape), whole[0], atol=1e-5)
    stats, synced_stats, alone_stats = (
        updates["batch_stats"] for _, updates in (whole, synced, alone)
    )
    for name, value in stats.items():
        for shard in synced_stats[name]:
            np.testing.assert_allclose(shard, value, rtol=1e-5)
        assert np.abs(alone_stats[name] - value[None]).max() > 1e-3


@contextlib.contextmanager
def _counting_compilations():
    counts = {"on": True, "compilations": 0}

    def listener(event, duration, **_):
        counts["compilations"] += counts["on"] and "backend_compile" in event

    # Listeners cannot be removed one by one, so this one is switched off instead.
    jax.monitoring.register_event_duration_secs_listener(listener)
    yield counts
    counts["on"] = False


@pytest.mark.slow
def test_init_compiles_nothing():
    """Its speed: shapes come from a trace, values from NumPy."""
    model = models.build("wrn_10_1", num_classes=7, width=0.3)
    key = jax.random.key(0)
    with _counting_compilations() as counts:
        variables = common.init(model, key, (8, 8, 3))
        assert counts["compilations"] == 0
        # The counter counts: a function never seen before compiles.
        jax.jit(lambda x: x * 3 + 1)(variables["params"]["fc"]["kernel"])
        assert counts["compilations"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_14", "vit_tiny"])
def test_init_has_the_structure_shapes_and_dtypes_of_flax_init(name):
    model = models.build(name, num_classes=10, width=0.5)
    key = jax.random.key(0)
    theirs = jax.eval_shape(model.init, key, jnp.zeros((1, 16, 16, 3)))
    ours = common.init(model, key, (16, 16, 3))
    assert set(ours) == {"params", "batch_stats"}
    assert jax.tree.map(lambda x: (x.shape, x.dtype), {**ours}) == jax.tree.map(
        lambda x: (x.shape, x.dtype), {"batch_stats": {}, **theirs}
    )


@pytest.mark.slow
def test_init_statistics_are_those_stated():
    """Kernels: zero mean and He / LeCun deviation; everything else constant."""
    variables = common.init(
        models.build("resnet_18", num_classes=100), jax.random.key(3), (32, 32, 3)
    )
    params = variables["params"]
    for kernel, variance in (
        (params["layer2_1"]["conv1"]["kernel"], 2 / (3 * 3 * 128)),
        (params["layer3_0"]["shortcut"]["kernel"], 2 / 256),
        (params["conv1"]["kernel"], 2 / (3 * 3 * 64)),
        (params["fc"]["kernel"], 1 / 512),
    ):
        standardised = np.asarray(kernel, np.float64).ravel() / np.sqrt(variance)
        count = standardised.size
        assert abs(standardised.mean()) < 4 / np.sqrt(count)
        assert abs(standardised.std() - 1) < 4 / np.sqrt(2 * count)
        # Not truncated: P(|z| > 2) = 4.55 %.
        assert abs((np.abs(standardised) > 2).mean() - 0.0455) < 4 * np.sqrt(
            0.0455 / count
        )
    constants = {"bias": 0.0, "scale": 1.0, "mean": 0.0, "var": 1.0}
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        if path[-1].key != "kernel":
            np.testing.assert_array_equal(leaf, constants[path[-1].key])


def test_position_embeddings_start_small():
    model = models.build("vit_tiny", num_classes=10, depth=1)
    params = common.init(model, jax.random.key(0), (32, 32, 3))["params"]
    np.testing.assert_allclose(np.std(params["position_embedding"]), 0.02, rtol=0.05)


def test_flax_init_draws_kernels_from_the_same_distribution():
    """`model.init` and `common.init` differ in numbers, not in deviation."""
    shape = (3, 3, 16, 64)
    drawn = jax.jit(lambda key: common.kernel_init(key, shape))(jax.random.key(0))
    np.testing.assert_allclose(np.std(drawn), common.kernel_std(shape), rtol=0.05)


@pytest.mark.slow
def test_init_depends_on_key_and_path_and_on_nothing_else():
    """ResNet-20 contains ResNet-14's leaves; those get the same values."""
    small = models.build("resnet_14", num_classes=10)
    large = models.build("resnet_20", num_classes=10)
    first = common.init(small, jax.random.key(0), (32, 32, 3))["params"]
    again = common.init(large, jax.random.key(0), (16, 16, 3))["params"]
    other = common.init(small, jax.random.key(1), (32, 32, 3))["params"]

    def kernel(params, name):
        return np.asarray(params[name]["conv1"]["kernel"]).ravel()

    np.testing.assert_array_equal(kernel(first, "layer3_1"), kernel(again, "layer3_1"))
    for different in (kernel(other, "layer3_1"), kernel(again, "layer3_2")):
        correlation = np.corrcoef(kernel(first, "layer3_1"), different)[0, 1]
        assert abs(correlation) < 4 / np.sqrt(different.size)


def test_init_refuses_a_leaf_it_has_no_rule_for():
    with pytest.raises(errors.InputError, match="'params/embedding'; known leaf"):
        common.init(_Lookup(), jax.random.key(0), (8, 8, 3))


class _Lookup(nn.Module):
    @nn.compact
    def __call__(self, images):
        table = self.param("embedding", nn.initializers.ones, (3,))
        return images * table[None, None, None]
