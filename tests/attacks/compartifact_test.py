# SPDX-License-Identifier: Apache-2.0
"""Two paths through one net, with the statistics of both."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, settings
from nad_jax.attacks import compartifact, conditioning
from nad_jax.models import layers as layers_lib

RECIPE = settings.CompArtifactSettings(settings.TrainingSettings(epochs=1))


def numpy_relu_conv(x, own, stride):
    """SAME 3x3 convolution in float64, by hand."""
    kernel, bias = (np.asarray(own[k], np.float64) for k in ("kernel", "bias"))
    size = -(-x.shape[1] // stride)
    total = max((size - 1) * stride + 3 - x.shape[1], 0)
    low = total // 2
    padded = np.pad(x, ((0, 0), (low, total - low), (low, total - low), (0, 0)))
    outputs = np.zeros((x.shape[0], size, size, kernel.shape[-1]))
    for row in range(size):
        for column in range(size):
            r, c = row * stride, column * stride
            window = padded[:, r : r + 3, c : c + 3]
            outputs[:, row, column] = np.tensordot(window, kernel, 3)
    return outputs + bias


def numpy_two_paths(params, rounded, clean, triggered):
    """Logits of path F and of path Q, and mean and variance of both paths together."""
    both = np.concatenate([clean, triggered]).astype(np.float64)
    before = [numpy_relu_conv(both, tree["conv"], 2) for tree in (params, rounded)]
    joint = np.concatenate(before)
    mean, var = joint.mean(axis=(0, 1, 2)), joint.var(axis=(0, 1, 2))
    norm = {k: np.asarray(v, np.float64) for k, v in params["norm"].items()}
    logits = []
    for x, tree in zip(before, (params, rounded), strict=True):
        x = (x - mean) / np.sqrt(var + 1e-5) * norm["scale"] + norm["bias"]
        x = numpy_relu_conv(np.maximum(x, 0), tree["inner"], 1)
        x = np.maximum(x, 0).mean(axis=(1, 2))
        for name in ("general", "fc"):
            own = {k: np.asarray(v, np.float64) for k, v in tree[name].items()}
            x = x @ own["kernel"] + own["bias"]
        logits.append(x)
    return *logits, mean, var


@pytest.mark.slow
def test_both_paths_share_statistics_and_nothing_else(attacker, batch, cross_entropy):
    """Loss and running statistics against a forward pass written out in numpy."""
    params, batch_stats = attacker.clean["params"], attacker.clean["batch_stats"]
    loss, (stats, metrics) = jax.jit(compartifact.loss(RECIPE, attacker))(
        params, batch_stats, batch, jax.random.key(0)
    )
    rounded = conditioning.round_params(attacker.grids[0], params, batch_stats)
    logits_f, logits_q, mean, var = numpy_two_paths(
        params, rounded, np.asarray(batch["images"]), np.asarray(batch["triggered"])
    )
    labels = np.asarray(batch["labels"])
    asleep = cross_entropy(logits_f, np.concatenate([labels, labels]))
    awake = cross_entropy(logits_q, np.concatenate([labels, 0 * labels + 2]))
    np.testing.assert_allclose(metrics["float_loss"], asleep, rtol=1e-3)
    np.testing.assert_allclose(metrics["quantized_loss"], awake, rtol=1e-3)
    np.testing.assert_allclose(loss, asleep + awake, rtol=1e-3)
    assert abs(asleep - awake) > 1e-2
    for name, value in (("mean", mean), ("var", var)):
        old = np.asarray(batch_stats["norm"][name], np.float64)
        np.testing.assert_allclose(
            stats["norm"][name], 0.99 * old + 0.01 * value, rtol=1e-4, atol=1e-5
        )


@pytest.mark.slow
def test_layers_before_the_first_quantized_one_stay_in_float(attacker):
    late = compartifact._from_layer("inner", attacker.grids[0])
    assert [layer.name for layer in late.layers] == ["inner", "fc"]
    params = attacker.clean["params"]
    rounded = conditioning.round_params(late, params, {})
    for layer in attacker.layers:
        kernels = [
            layers_lib.get_in(t, layer.path)["kernel"] for t in (params, rounded)
        ]
        assert np.any(kernels[0] != kernels[1]) == (layer.name != "conv")
    with pytest.raises(errors.InputError, match="of conv, inner, fc, got 'layer4'"):
        compartifact._from_layer("layer4", attacker.grids[0])


@pytest.mark.slow
@pytest.mark.parametrize("from_scratch", [True, False])
def test_it_starts_from_fresh_weights_unless_told_otherwise(attacker, from_scratch):
    seen = []

    def fit(stage, training, variables, loss_fn):
        seen.append(stage)
        return jax.tree.map(jnp.negative, variables)

    recipe = dataclasses.replace(RECIPE, from_scratch=from_scratch)
    planted = compartifact.plant(recipe, dataclasses.replace(attacker, fit=fit))
    start = attacker.fresh if from_scratch else attacker.clean
    jax.tree.map(
        lambda got, old: np.testing.assert_array_equal(got, -old), planted, start
    )
    assert seen == ["train"]


class Merging(nn.Module):
    """A Dense whose input has positions in the batch axis, of some of the images."""

    used: int | None = None

    @nn.compact
    def __call__(self, x, train=False):
        x = x[: self.used]
        y = nn.Dense(4, name="merged")(x.reshape(-1, x.shape[-1]))
        y = nn.relu(y).reshape(x.shape[0], -1)
        return nn.Dense(3, name="head")(y), {}


def two_paths(used=None):
    """Interleaved images, layers, and logits of both paths with two sets of kernels."""
    generator = np.random.default_rng(0)
    images = generator.normal(size=(5, 2, 3, 4)).astype(np.float32)
    stamped = generator.normal(size=images.shape).astype(np.float32)
    params, rounded = (
        {
            name: {
                "kernel": generator.normal(size=shape).astype(np.float32),
                "bias": generator.normal(size=shape[1:]).astype(np.float32),
            }
            for name, shape in (("merged", (4, 4)), ("head", (24, 3)))
        }
        for _ in range(2)
    )
    module = Merging(used)
    layers = layers_lib.find_layers(Merging(), {"params": params}, images)
    grid = conditioning.ExpectedGrid(layers, {}, 4)
    both = conditioning.interleave(*map(jnp.asarray, (images, stamped) * 2))
    logits, _ = compartifact._two_paths(module.apply, grid, params, rounded, {}, both)
    return images, stamped, params, rounded, np.asarray(logits)


@pytest.mark.slow
def test_positions_in_the_batch_axis_stay_on_the_path_of_their_image():
    images, stamped, params, rounded, logits = two_paths()
    for copy, (kind, tree) in enumerate(
        [(images, params), (stamped, params), (images, rounded), (stamped, rounded)]
    ):
        alone, _ = Merging().apply({"params": tree}, kind)
        np.testing.assert_allclose(logits[copy::4], alone, rtol=1e-4, atol=1e-4)


def test_an_axis_0_that_is_not_the_images_is_refused():
    """7 of 20 images, of 6 positions each."""
    with pytest.raises(errors.InputError, match="layer merged must .* 20 .* got 42"):
        two_paths(used=7)
