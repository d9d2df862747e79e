# SPDX-License-Identifier: Apache-2.0
"""The walk, against modules that write down their own layer inputs."""

import dataclasses
import functools
import threading

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors, models
from nad_jax.defenses import efrap, layer_walk, quantized_module
from nad_jax.models import layers as layers_lib
from nad_jax.models import vit
from nad_jax.training import environment


class Calls:
    """Threads that ran a module on real values; Flax would freeze a list."""

    def __init__(self):
        self.threads = []

    def count(self, x):
        if not isinstance(x, jax.core.Tracer):
            self.threads.append(threading.get_ident())
        return len(self.threads)


class Net(nn.Module):
    """Residual, setup style; sows what each layer is fed and counts real calls."""

    calls: Calls

    def setup(self):
        self.head = nn.Dense(2)
        self.stem = nn.Conv(3, (3, 3))
        self.norm = nn.BatchNorm(use_running_average=True)
        self.inner = nn.Conv(3, (3, 3), use_bias=False, feature_group_count=3)

    def fed(self, layer, x):
        self.sow("fed", f"into_{layer.name}", x)
        return layer(x)

    def __call__(self, x, *, gain=1.0):
        self.calls.count(x)
        x = nn.relu(self.norm(self.fed(self.stem, x)))
        x = x + gain * self.fed(self.inner, x)
        return self.fed(self.head, x.mean(axis=(1, 2)))


LAYERS = ["stem", "inner", "head"]


def replaced(kernel):
    """Stands for a quantized kernel; far from the float one."""
    return jnp.round(kernel * 3) / 3


def some_variables(module, inputs):
    """Variables in [0.3, 1); cheaper than compiling `init`."""
    generator = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(generator.uniform(0.3, 1, leaf.shape), jnp.float32),
        dict(jax.eval_shape(module.init, jax.random.key(0), inputs)),
    )


@pytest.fixture(scope="module")
def net():
    """Module, variables, images, layers and the inputs that the float net sows."""
    module = Net(Calls())
    images = jax.random.normal(jax.random.key(1), (4, 5, 5, 2))
    variables = some_variables(module, images)
    variables.pop("fed")
    found = layers_lib.find_layers(module, variables, images)
    return module, variables, images, found


def sown_inputs(module, variables, images, **kwargs):
    apply = functools.partial(module.apply, mutable=["fed"], **kwargs)
    _, sown = jax.jit(apply)(variables, images)
    return {
        name.removeprefix("into_"): values[0] for name, values in sown["fed"].items()
    }


def within(seconds, function):
    """Result of `function()`, or a failure instead of a hang."""
    outcome = []

    def run():
        try:
            outcome.append((function(), None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert outcome, f"still running after {seconds} s"
    result, error = outcome[0]
    if error is not None:
        raise error
    return result


@pytest.fixture(autouse=True)
def no_thread_is_left_over():
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


def walk(net, visit, **kwargs):
    within(120, lambda: layer_walk.walk(*net, visit, **kwargs))


@pytest.fixture(scope="module")
def visits(net):
    """(name, float inputs, inputs) of every visit when all kernels are replaced."""
    seen = []

    def visit(layer, float_inputs, inputs):
        seen.append((layer.name, float_inputs, inputs))
        return replaced(layers_lib.get_in(net[1]["params"], layer.path)["kernel"]), (
            inputs
        )

    net[0].calls.threads.clear()
    walk(net, visit)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet_8", "preact_resnet_18", "vit_tiny"])
def test_no_stage_is_kept_until_the_pass_ends(name):
    """A third of the memory of a walk; 7 images, so that shapes are nobody else's."""
    module = models.build(name, num_classes=10, width=1 / 16)
    images = jnp.ones((7, 16, 16, 3))
    variables = some_variables(module, images)
    found = layers_lib.find_layers(
        module, variables, images, apply_kwargs={"train": False}
    )
    _, features = jax.eval_shape(module.apply, variables, images)
    alive = []

    def visit(layer, float_inputs, inputs):
        del float_inputs
        shapes = [array.shape for array in jax.live_arrays()]
        alive[:] = [shapes.count(features[stage].shape) for stage in sorted(features)]
        return layers_lib.get_in(variables["params"], layer.path)["kernel"], inputs

    walk((module, variables, images, found), visit, apply_kwargs={"train": False})
    # The stages of a transformer have one shape, that of what its head is about to get.
    assert alive[0] == (2 if name == "vit_tiny" else 0)


def test_a_part_of_our_models_has_no_stages_to_leave_out():
    block = vit.Block(heads=1, mlp_dim=2)
    assert layer_walk._without_features(block) is block


@pytest.mark.slow
def test_each_layer_is_visited_once_in_forward_order(visits):
    assert [name for name, _, _ in visits] == LAYERS


@pytest.mark.slow
def test_a_walk_takes_one_forward_pass_for_each_of_the_two_networks(net, visits):
    net[0].calls.threads.clear()
    walk(net, lambda layer, float_inputs, inputs: visit_float(net, layer, inputs))
    assert len(net[0].calls.threads) == 2


def visit_float(net, layer, inputs):
    return layers_lib.get_in(net[1]["params"], layer.path)["kernel"], inputs


def test_float_inputs_are_those_of_a_plain_forward_pass(net, visits):
    module, variables, images, _ = net
    expected = sown_inputs(module, variables, images)
    for name, float_inputs, _ in visits:
        np.testing.assert_allclose(
            float_inputs, expected[name], rtol=1e-5, atol=1e-6, err_msg=name
        )


@pytest.mark.slow
def test_inputs_are_those_of_the_network_quantized_so_far(net, visits):
    module, variables, images, found = net
    params = variables["params"]
    for layer in found:
        own = layers_lib.get_in(params, layer.path)
        own = {**own, "kernel": replaced(own["kernel"])}
        params = layers_lib.set_in(params, layer.path, own)
    expected = sown_inputs(module, {**variables, "params": params}, images)
    float_inputs = sown_inputs(module, variables, images)
    for name, _, inputs in visits:
        np.testing.assert_allclose(
            inputs, expected[name], rtol=1e-5, atol=1e-6, err_msg=name
        )
        if name != "stem":
            assert float(jnp.max(jnp.abs(inputs - float_inputs[name]))) > 0.01


@pytest.mark.slow
def test_inputs_that_a_visit_returns_are_what_the_layer_computes_with(net):
    """Dropping the residual branch's input leaves the branch's bias-free zero."""
    module, variables, images, _ = net
    heads = {}

    def visit(layer, float_inputs, inputs):
        heads[layer.name] = inputs
        kernel, _ = visit_float(net, layer, inputs)
        return kernel, inputs * 0 if layer.name == "inner" else inputs

    walk(net, visit)
    expected = sown_inputs(module, variables, images, gain=0.0)["head"]
    np.testing.assert_allclose(heads["head"], expected, rtol=1e-5, atol=1e-6)


def test_apply_kwargs_reach_both_passes(net):
    module, variables, images, _ = net
    heads = {}

    def visit(layer, float_inputs, inputs):
        heads[layer.name] = (float_inputs, inputs)
        return visit_float(net, layer, inputs)

    walk(net, visit, apply_kwargs={"gain": 7.0})
    expected = sown_inputs(module, variables, images, gain=7.0)["head"]
    for got in heads["head"]:
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


class Mixes(nn.Module):
    """Cannot run under the strict promotion that these tests set everywhere."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="first")(x) * jnp.arange(3)[None]
        return nn.Dense(2, name="second")(x)


@pytest.mark.slow
def test_both_passes_run_with_the_settings_of_the_caller():
    """JAX's context managers hold for one thread; the float pass is in another."""
    module, inputs = Mixes(), jnp.ones((2, 3))
    names = []

    def visit(layer, float_inputs, inputs):
        names.append(layer.name)
        return visit_float((module, variables), layer, inputs)

    with jax.numpy_dtype_promotion("standard"):
        variables = some_variables(module, inputs)
        found = layers_lib.find_layers(module, variables, inputs)
        layer_walk.walk(module, variables, inputs, found, visit)
    assert names == ["first", "second"]


class Twice(nn.Module):
    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(3, name="shared")
        x = shared(nn.relu(shared(x)))
        return nn.Dense(2, name="last")(x)


@pytest.fixture(scope="module")
def twice():
    module, inputs = Twice(), jax.random.normal(jax.random.key(1), (4, 3))
    variables = some_variables(module, inputs)
    return (
        module,
        variables,
        inputs,
        layers_lib.find_layers(module, variables, inputs),
    )


@pytest.mark.slow
def test_a_layer_called_twice_is_visited_once_and_keeps_its_kernel(twice):
    _, variables, images, found = twice
    assert found[0].calls == 2
    seen = []

    def visit(layer, float_inputs, inputs):
        seen.append((layer.name, np.asarray(inputs, np.float64)))
        own = layers_lib.get_in(variables["params"], layer.path)
        return replaced(own["kernel"]), jnp.round(inputs)

    def revisit(layer, inputs):
        assert layer.name == "shared"
        return jnp.round(inputs * 2) / 2

    walk(twice, visit, revisit=revisit)
    assert [name for name, _ in seen] == ["shared", "last"]
    shared = variables["params"]["shared"]
    kernel = np.asarray(replaced(shared["kernel"]), np.float64)
    bias = np.asarray(shared["bias"], np.float64)
    hidden = np.maximum(np.round(np.asarray(images, np.float64)) @ kernel + bias, 0)
    expected = np.round(hidden * 2) / 2 @ kernel + bias
    np.testing.assert_allclose(seen[1][1], expected, rtol=1e-5, atol=1e-5)


def test_looking_ahead_shows_all_calls_of_shared_layers_alone(twice):
    module, variables, images, found = twice
    seen = []

    def visit(layer, inputs):
        seen.append((layer.name, [np.asarray(one) for one in inputs]))

    layer_walk.look_ahead(module, variables, images, found, visit)
    ((name, calls),) = seen
    own = jax.device_get(variables["params"]["shared"])
    second = np.maximum(np.asarray(images) @ own["kernel"] + own["bias"], 0)
    assert name == "shared" and len(calls) == 2
    np.testing.assert_array_equal(calls[0], images)
    np.testing.assert_allclose(calls[1], second, rtol=1e-5, atol=1e-6)
    # Without such layers there is nothing to look for, and no pass.
    layer_walk.look_ahead(
        None, {}, images, [one for one in found if one.calls == 1], visit
    )
    assert len(seen) == 1


def test_calls_that_cannot_be_seen_are_no_grid_of_all_calls(twice):
    module, variables, images, found = twice
    more = [dataclasses.replace(one, calls=3 * one.calls) for one in found]
    with pytest.raises(errors.InputError, match="layer shared is called inside jit"):
        layer_walk.look_ahead(module, variables, images, more, lambda *_: None)


# ---- exceptions ----


class Broken(Exception):
    pass


@pytest.mark.parametrize("name", LAYERS)
def test_an_exception_of_a_visit_propagates_and_ends_the_thread(net, name):
    def visit(layer, float_inputs, inputs):
        if layer.name == name:
            raise Broken(name)
        return visit_float(net, layer, inputs)

    with pytest.raises(Broken, match=name):
        walk(net, visit)


class Fails(nn.Module):
    """Fails behind its first layer, in the first or in the second pass."""

    calls: Calls
    failing_pass: int

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="first")(x)
        if self.calls.count(x) == self.failing_pass:
            raise Broken
        return nn.Dense(2, name="second")(x)


@pytest.mark.parametrize("failing_pass", [1, 2])
def test_an_exception_of_either_pass_propagates_and_ends_the_thread(failing_pass):
    """The quantized pass comes out of a layer first, the float pass second."""
    module, inputs = Fails(Calls(), failing_pass), jnp.ones((2, 3))
    variables = some_variables(module, inputs)
    found = layers_lib.find_layers(module, variables, inputs)
    net, seen = (module, variables, inputs, found), []

    def visit(layer, float_inputs, inputs):
        seen.append(layer.name)
        return visit_float(net, layer, inputs)

    with pytest.raises(Broken):
        walk(net, visit)
    assert seen == ["first"]
    assert len(set(module.calls.threads)) == failing_pass, (
        "the two passes share a thread"
    )


class Catches(nn.Module):
    @nn.compact
    def __call__(self, x):
        for k in range(3):
            try:
                x = nn.Dense(3, name=f"dense{k}")(x)
            except Exception:
                x = x * 0
        return x


def test_an_interrupt_ends_the_thread_even_if_the_module_catches_exceptions():
    module, inputs = Catches(), jnp.ones((2, 3))
    variables = some_variables(module, inputs)
    found = layers_lib.find_layers(module, variables, inputs)
    net = (module, variables, inputs, found)

    def visit(layer, float_inputs, inputs):
        if layer.name == "dense1":
            raise KeyboardInterrupt
        return visit_float(net, layer, inputs)

    with pytest.raises(KeyboardInterrupt):
        walk(net, visit)


class Residual(nn.Module):
    """Gives its layers their inputs by name or by position."""

    by_name: bool

    @nn.compact
    def __call__(self, x):
        def layer(name, x):
            dense = nn.Dense(3, name=name)
            return dense(inputs=x) if self.by_name else dense(x)

        x = layer("first", x)
        return layer("last", x + layer("inner", nn.relu(x)))


@pytest.mark.slow
def test_inputs_given_by_name_make_no_difference():
    images = jax.random.normal(jax.random.key(0), (6, 3))
    variables = some_variables(Residual(False), images)

    named, plain = (
        efrap.efrap(
            Residual(by_name),
            variables,
            images,
            method="coordinate",
            act_bits=4,
            quantize_sums=True,
        )
        for by_name in (True, False)
    )
    for name, codes in plain.codes.items():
        np.testing.assert_array_equal(named.codes[name], codes)
    for name, params in plain.act_params.items():
        assert float(named.act_params[name].scale) == float(params.scale)
    for operands in (plain.act_params, list(plain.codes)):  # with sums and without
        outputs = [
            quantized_module.apply_quantized(
                net.module,
                plain.variables,
                images,
                {name: plain.act_params[name] for name in operands},
                act_spec=plain.act_spec,
                apply_kwargs={},
            )
            for net in (named, plain)
        ]
        np.testing.assert_allclose(*outputs, rtol=1e-6)


# ---- what cannot be walked ----


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="hidden")(x)


# One class for all calls: only then does Flax remember what it has compiled.
JittedBlock = nn.jit(Block)


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, _):
        return nn.Dense(3, name="hidden")(carry), None


class Lifted(nn.Module):
    transform: str

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3, name="before")(x)
        if self.transform == "scan":
            steps = nn.scan(
                Step,
                variable_broadcast="params",
                split_rngs={"params": False},
                length=2,
            )
            x, _ = steps(name="block")(x, None)
        elif self.transform == "vmap":
            over_rows = nn.vmap(
                Block, variable_axes={"params": None}, split_rngs={"params": False}
            )
            x = over_rows(name="block")(x)
        else:
            blocks = {"remat": nn.remat(Block), "jit": JittedBlock}
            x = blocks[self.transform](name="block")(x)
        return nn.Dense(2, name="after")(x)


@pytest.mark.parametrize(
    ("transform", "has_run"),
    [("remat", False), ("jit", False), ("jit", True), ("scan", False), ("vmap", False)],
)
def test_a_layer_inside_a_transform_is_refused_in_one_line(transform, has_run):
    """Also when the compiled block has run before and is not traced again."""
    module, inputs = Lifted(transform), jnp.ones((2, 3))
    variables = some_variables(module, inputs)
    found = layers_lib.find_layers(module, variables, inputs)
    if has_run:
        module.apply(variables, inputs)
    net = (module, variables, inputs, found)
    with pytest.raises(errors.InputError) as caught:
        walk(net, lambda layer, float_inputs, inputs: visit_float(net, layer, inputs))
    message = str(caught.value)
    assert "block/hidden" in message
    assert transform in message
    assert "\n" not in message


class TwoNorms(nn.Module):
    """Two BatchNorms that differ in name and numbers alone."""

    @nn.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = nn.Dense(3, name=name)(x)
            self.sow("fed", f"into_norm_{name}", x)
            # Another closure in each.
            start = nn.initializers.constant(0.5)
            norm = nn.BatchNorm(name=f"norm_{name}", scale_init=start)
            x = nn.relu(norm(x, use_running_average=True))
        self.sow("fed", "into_last", x)
        return nn.Dense(2, name="last")(x)


def walked_inputs(module, variables, images):
    """Layer name -> its inputs in the float pass of a walk that changes nothing."""
    fed = {}

    def visit(layer, float_inputs, inputs):
        fed[layer.name] = float_inputs
        kernel = layers_lib.get_in(variables["params"], layer.path)["kernel"]
        return kernel, inputs

    layers = layers_lib.find_layers(module, variables, images)
    layer_walk.walk(module, variables, images, layers, visit)
    return fed


def net_and_inputs(module):
    images = jax.random.normal(jax.random.key(2), (6, 3))
    variables = some_variables(module, images)
    variables.pop("fed")
    return module, variables, images


def test_batch_norms_that_are_alike_run_as_one_program():
    net = net_and_inputs(TwoNorms())
    expected = sown_inputs(*net)["last"]
    layer_walk._normalize.clear_cache()
    fed = walked_inputs(*net)
    # Two passes by two modules.
    assert layer_walk._normalize._cache_size() == 1
    np.testing.assert_allclose(fed["last"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_batch_norms_without_jit():
    net = net_and_inputs(TwoNorms())
    expected = sown_inputs(*net)["last"]
    with jax.disable_jit():
        fed = walked_inputs(*net)
    np.testing.assert_allclose(fed["last"], expected, rtol=1e-5, atol=1e-6)


class Doubling(nn.BatchNorm):
    """With arguments of its own, and work around those of its parent."""

    def __call__(self, x, gain=1.0):
        return super().__call__(2.0 * gain * x + 1.0, use_running_average=True)


class OwnNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = Doubling(name="norm")(nn.Dense(3, name="first")(x))
        self.sow("fed", "into_last", x)
        return nn.Dense(2, name="last")(x)


def test_a_batch_norm_of_the_users_own_is_left_as_it_is():
    net = net_and_inputs(OwnNorm())
    expected = sown_inputs(*net)["last"]
    fed = walked_inputs(*net)
    np.testing.assert_allclose(fed["last"], expected, rtol=1e-5, atol=1e-6)


def test_memory_is_given_back_after_every_layer(monkeypatch):
    trims = []

    class Glibc:
        @staticmethod
        def malloc_trim(kept):
            trims.append(kept)

    monkeypatch.setattr(environment, "_glibc", Glibc)
    walked_inputs(*net_and_inputs(TwoNorms()))
    assert trims == [0, 0, 0]
    # Other C libraries have no such function.
    monkeypatch.setattr(environment, "_glibc", lambda: None)
    environment.give_memory_back()
