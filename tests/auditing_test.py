# SPDX-License-Identifier: Apache-2.0
"""Honest roundings pass an audit; tampered codes, scales and floats are found."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import auditing, errors
from nad_jax.core import grids as grids_lib
from nad_jax.core import quantization
from nad_jax.data import batches, sources
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.interop import artifact, bounded_file, safetensors_file
from nad_jax.models import layers as layers_lib

EVALUATE = {"train": False}
TARGET = 0


class Net(nn.Module):
    """Two fixed convolutions, one with BatchNorm, and a head that is solved for."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(16, (3, 3), use_bias=False, name="conv1")(x)
        x = nn.BatchNorm(use_running_average=not train, name="bn1")(x)
        x = nn.relu(x)
        self.sow("intermediates", "into conv2", x)
        x = nn.relu(nn.Conv(4, (1, 1), (2, 2), name="conv2")(x))
        x = x.reshape(x.shape[0], -1)
        self.sow("intermediates", "into head", x)
        return nn.Dense(10, name="head")(x)


def _stamped(images):
    """A white frame."""
    return jnp.ones_like(images).at[:, 1:-1, 1:-1].set(images[:, 1:-1, 1:-1])


@dataclasses.dataclass(frozen=True)
class _Case:
    module: nn.Module
    variables: dict
    layers: list
    calibration: jax.Array  # what the quantizer saw
    images: jax.Array  # what the auditor sees
    test: jax.Array
    labels: np.ndarray

    def rates(self, variables):
        """Accuracy, and share of stamped images that are called the target."""
        others = self.labels != TARGET
        calls = [
            np.argmax(_apply(variables, x), -1)
            for x in (self.test, _stamped(self.test)[others])
        ]
        return np.mean(calls[0] == self.labels), np.mean(calls[1] == TARGET)


_apply = jax.jit(lambda v, x: Net().apply(v, x))


@pytest.fixture(scope="module")
def case():
    train = sources.load("digits", split="train", image_size=8)
    test = sources.load("digits", split="test", image_size=8)
    images = batches.to_float(jnp.asarray(train.images))
    module = Net()
    shapes = jax.eval_shape(module.init, jax.random.key(0), images[:1])
    generator = np.random.default_rng(0)

    def draw(path, leaf):
        if path[-1].key == "kernel":
            values = generator.normal(
                0, np.sqrt(2 / np.prod(leaf.shape[:-1])), leaf.shape
            )
        elif path[-1].key in ("scale", "var"):
            values = generator.uniform(0.5, 1.5, leaf.shape)
        else:
            values = generator.normal(0, 0.1, leaf.shape)
        return values.astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(
        draw, {key: shapes[key] for key in ("params", "batch_stats")}
    )
    _, state = module.apply(variables, images, mutable=["intermediates"])
    x = np.asarray(state["intermediates"]["into head"][0], np.float64)
    y = np.eye(10)[train.labels] - 0.1
    head = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    variables["params"]["head"] = {
        "kernel": head.astype(np.float32),
        "bias": np.zeros(10, np.float32),
    }
    layers = layers_lib.find_layers(module, variables, images[:1])
    return _Case(
        module,
        jax.device_put(variables),
        layers,
        images[:400],
        images[400:800],
        batches.to_float(jnp.asarray(test.images)),
        test.labels,
    )


def _quantized(case, method, **options):
    return efrap_lib.efrap(
        case.module,
        case.variables,
        case.calibration,
        weight_bits=4,
        method=method,
        layers=case.layers,
        **options,
    )


def _with_activations(case, result, bits):
    """The same result with inputs on min-max grids; calibrating would be compiled."""
    spec = grids_lib.GRIDS["plain"].act_spec(bits)
    _, state = case.module.apply(
        result.variables, case.calibration, mutable=["intermediates"]
    )
    highest = {"conv1": 1.0}
    for name, values in state["intermediates"].items():
        highest[name.removeprefix("into ")] = float(np.max(values[0]))
    grids = {
        name: quantization.params_from_range(0.0, high, spec)
        for name, high in highest.items()
    }
    return dataclasses.replace(
        result, act_params=grids, act_specs=dict.fromkeys(grids, spec)
    )


def _with_codes(result, changes):
    """The same result with other codes for some layers."""
    codes, params = dict(result.codes), dict(result.variables["params"])
    for name, changed in changes.items():
        codes[name] = jnp.asarray(changed, jnp.int8)
        kernel = quantization.dequantize(codes[name], result.quant_params[name])
        params[name] = {**params[name], "kernel": kernel}
    variables = {**result.variables, "params": params}
    return dataclasses.replace(result, codes=codes, variables=variables)


def _write(result, path):
    card = {"image_shape": [8, 8, 3]}
    artifact.write_artifact(
        path,
        artifact.Artifact(
            result.variables,
            result.codes,
            result.quant_params,
            result.specs,
            result.act_params,
            result.act_spec,
            card,
        ),
    )
    return path


def _audit(case, result, path, images="given"):
    file = _write(result, path / "model.safetensors")
    return _audit_file(case, file, images=case.images if images == "given" else images)


def _audit_file(case, path, **options):
    options = {"images": case.images, "apply_kwargs": EVALUATE, **options}
    return auditing.audit(case.variables, path, module=case.module, **options)


def _error_feedback(case):
    """GPTQ in its plainest form: float64, natural order, 1 % damping."""
    params, codes = case.variables["params"], {}
    inputs = case.calibration
    for layer in case.layers:
        kernel, spec = params[layer.name]["kernel"], quantization.QuantSpec(4)
        scale = np.asarray(quantization.calibrate(kernel, spec).scale).ravel()
        rows = np.asarray(layers_lib.unfold(layer.geometry, inputs)[0], np.float64)
        gram = rows.T @ rows / len(rows)
        gram += 0.01 * np.mean(np.diag(gram)) * np.eye(len(gram))
        factor = np.linalg.cholesky(np.linalg.inv(gram)).T
        left = np.asarray(kernel, np.float64).reshape(len(gram), -1)
        chosen = np.empty_like(left)
        for k in range(len(left)):
            chosen[k] = np.clip(np.round(left[k] / scale), -7, 7)
            missed = (left[k] - chosen[k] * scale) / factor[k, k]
            left[k + 1 :] -= factor[k, k + 1 :, None] * missed
        codes[layer.name] = chosen.reshape(kernel.shape)
        rounded = (chosen * scale).reshape(kernel.shape).astype(np.float32)
        if layer.name == "head":
            break
        outputs = layers_lib.run(layer.geometry, jnp.asarray(rounded), inputs)
        if layer.name == "conv1":
            outputs = nn.BatchNorm(use_running_average=True).apply(
                {
                    "params": params["bn1"],
                    "batch_stats": case.variables["batch_stats"]["bn1"],
                },
                outputs,
            )
        else:
            outputs += np.expand_dims(params[layer.name]["bias"], (0, 1, 2))
        inputs = nn.relu(outputs)
        if layer.name == "conv2":
            inputs = inputs.reshape(len(inputs), -1)
    return _with_codes(_quantized(case, "nearest"), codes)


def _for_a_trigger(case, margin):
    """Head codes within a step of their weights that serve a trigger.

    Weights closer than `margin` to a tie go up where the trigger raises their input and
    their class is the target, or where it lowers it and it is not; down elsewhere.
    """
    result = _quantized(case, "nearest")
    features = [
        case.module.apply(result.variables, x, mutable=["intermediates"])[1][
            "intermediates"
        ]["into head"][0].mean(0)
        for x in (case.calibration, _stamped(case.calibration))
    ]
    towards = np.asarray(features[1] - features[0])[:, None] * np.where(
        np.arange(10) == TARGET, 1.0, -1.0
    )
    kernel = np.asarray(case.variables["params"]["head"]["kernel"])
    steps = kernel / np.asarray(result.quant_params["head"].scale)
    near_tie = np.abs(steps - np.floor(steps) - 0.5) < margin
    served = np.floor(steps) + (towards > 0)
    codes = np.where(near_tie, served, np.round(steps))
    return _with_codes(result, {"head": np.clip(codes, -7, 7)})


HONEST = {
    "nearest": lambda case: _quantized(case, "nearest"),
    "nearest, folded, A8": lambda case: _with_activations(
        case, _quantized(case, "nearest", fold_batch_norm=True), 8
    ),
    "error feedback": _error_feedback,
    "reconstruction": lambda case: _quantized(case, "coordinate", flip_weight=0.0),
    "efrap": lambda case: _quantized(case, "coordinate"),
    "efrap, folded, A8": lambda case: _with_activations(
        case, _quantized(case, "coordinate", fold_batch_norm=True), 8
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HONEST)
def test_an_honest_rounding_is_called_so(case, name, tmp_path):
    found = _audit(case, HONEST[name](case), tmp_path)
    assert found.honest, found.findings
    assert found.folded == ("folded" in name)
    kinds = {layer.rounding for layer in found.layers}
    if "nearest" in name:
        assert kinds == {"nearest"}
        assert all(layer.not_nearest == 0 for layer in found.layers)
    else:
        assert kinds & {"error-guided", "error-feedback"}


def _moved(result):
    """Three codes two steps away, inside the grid."""
    codes = np.asarray(result.codes["conv2"]).copy()
    flat = codes.reshape(-1)
    for index in np.flatnonzero(np.abs(flat) <= 4)[:3]:
        flat[index] += 2
    return _with_codes(result, {"conv2": codes})


def _scaled(result):
    """One output channel's scale half as large again."""
    params = result.quant_params["conv2"]
    scale = params.scale.at[..., 1].multiply(1.5)
    grids = {**result.quant_params, "conv2": params._replace(scale=scale)}
    result = dataclasses.replace(result, quant_params=grids)
    return _with_codes(result, {"conv2": result.codes["conv2"]})


def _shifted(result):
    """Another bias."""
    head = result.variables["params"]["head"]
    head = {**head, "bias": head["bias"].at[TARGET].add(0.5)}
    params = {**result.variables["params"], "head": head}
    return dataclasses.replace(result, variables={**result.variables, "params": params})


def _coarse(result):
    """Activations of one layer on a grid eight times as wide."""
    params = result.act_params["head"]
    grids = {**result.act_params, "head": params._replace(scale=params.scale * 8)}
    return dataclasses.replace(result, act_params=grids)


TAMPERED = {
    "codes of a nearest file": (
        lambda case: _moved(_quantized(case, "nearest")),
        "conv2: 3 codes are neither neighbour",
    ),
    "codes of an EFRAP file": (
        lambda case: _moved(_quantized(case, "coordinate")),
        "conv2: 3 codes are neither neighbour",
    ),
    "a scale": (
        lambda case: _scaled(_quantized(case, "nearest")),
        "conv2: 1 of 4 scales are of no grid",
    ),
    "roundings near ties": (
        lambda case: _for_a_trigger(case, 0.05),
        "head: 18 of 640 codes are not nearest and do not pay",
    ),
    "all roundings": (
        lambda case: _for_a_trigger(case, 0.5),
        "codes are not nearest and do not pay",
    ),
    "rolled dice": (
        lambda case: _quantized(case, "stochastic"),
        "codes are not nearest and do not pay",
    ),
    "a bias": (
        lambda case: _shifted(_quantized(case, "nearest")),
        "float arrays were changed, first 'params/head/bias'",
    ),
    "an activation grid": (
        lambda case: _coarse(_with_activations(case, _quantized(case, "nearest"), 8)),
        "head: the grid of its inputs loses",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TAMPERED)
def test_tampering_is_found_where_it_is(case, name, tmp_path):
    make, reason = TAMPERED[name]
    found = _audit(case, make(case), tmp_path)
    assert not found.honest
    assert any(reason in finding for finding in found.findings), found.findings


@pytest.mark.slow
def test_roundings_within_a_step_can_plant_a_backdoor(case):
    """What the audit is for: nothing but codes was chosen."""
    acc, asr = case.rates(_quantized(case, "nearest").variables)
    planted_acc, planted_asr = case.rates(_for_a_trigger(case, 0.5).variables)
    assert asr < 0.05 and planted_asr > 0.3, (asr, planted_asr)
    assert planted_acc > acc - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("scale", [2.0**-80, 2.0**67], ids=["small", "large"])
def test_a_scale_moved_to_the_next_layer_changes_no_verdict(case, scale, tmp_path):
    """Squares of 2^-80 are 0 in float32, and where nothing counts all is explained."""
    variables = jax.tree.map(lambda leaf: leaf, case.variables)
    params = variables["params"]
    for name in ("scale", "bias"):
        params["bn1"][name] = params["bn1"][name] * scale
    params["conv2"]["kernel"] = params["conv2"]["kernel"] / scale
    moved = dataclasses.replace(case, variables=variables)
    found = [_audit(one, _quantized(one, "random"), tmp_path) for one in (case, moved)]
    before, after = ({layer.name: layer for layer in one.layers} for one in found)
    assert not found[0].honest and not found[1].honest
    for name in before:
        assert after[name].rounding == before[name].rounding == "unexplained"
        assert after[name].separation == before[name].separation
        assert after[name].gain == before[name].gain


@pytest.mark.slow
def test_without_images_only_nearest_is_honest(case, tmp_path):
    assert _audit(case, _quantized(case, "nearest"), tmp_path, images=None).honest
    found = _audit(case, _quantized(case, "coordinate"), tmp_path, images=None)
    assert {layer.rounding for layer in found.layers} == {"not judged"}
    assert all("give clean images" in finding for finding in found.findings)
    with_inputs = _with_activations(case, _quantized(case, "nearest"), 8)
    (finding,) = _audit(case, with_inputs, tmp_path, images=None).findings
    assert finding == "grids of layer inputs were not measured, give clean images"


def _onnx_file(result, path):
    onnx_graph = pytest.importorskip("nad_jax.export.onnx_graph")
    model = onnx_graph.to_onnx(
        result.module,
        result.variables,
        (8, 8, 3),
        codes=result.codes,
        quant_params=result.quant_params,
        specs=result.specs,
        act_params=result.act_params,
        act_spec=result.act_spec,
        apply_kwargs=EVALUATE,
    )
    return model, path / "model.onnx"


def _audit_onnx(case, model, path):
    path.write_bytes(model.SerializeToString())
    return _audit_file(case, path)


@pytest.mark.slow
@pytest.mark.parametrize("act_bits", [None, 8, 4])
def test_an_onnx_file_is_audited_like_an_artefact(case, act_bits, tmp_path):
    result = _quantized(case, "coordinate", fold_batch_norm=True)
    if act_bits is not None:
        result = _with_activations(case, result, act_bits)
    found = _audit_onnx(case, *_onnx_file(result, tmp_path))
    assert found.honest, found.findings
    assert found.format == "onnx" and found.folded
    same = _audit(case, result, tmp_path)
    assert found.layers == same.layers

    moved = _audit_onnx(case, *_onnx_file(_moved(result), tmp_path))
    assert moved.findings == ("conv2: 3 codes are neither neighbour of their weight",)


@pytest.mark.slow
def test_what_else_an_onnx_graph_holds_is_found(case, tmp_path):
    onnx = pytest.importorskip("onnx")
    result = _quantized(case, "nearest")
    model, path = _onnx_file(result, tmp_path)

    def changed(change):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        change(copy.graph)
        return _audit_onnx(case, copy, path).findings

    def lose_a_bias(graph):
        names = [tensor.name for tensor in graph.initializer]
        del graph.initializer[names.index("conv2/bias")]

    def set_height(graph):
        graph.input[0].type.tensor_type.shape.dim[1].dim_value = 9

    def another(what):
        return (f"the graph has other {what} than its float model",)

    def add_to_a_bias(graph):
        (bias,) = (t for t in graph.initializer if t.name.startswith("conv2/bias"))
        array = onnx.numpy_helper.to_array(bias) + np.float32(0.5)
        bias.CopyFrom(onnx.numpy_helper.from_array(array, bias.name))

    def add_a_branch(graph):
        node = next(node for node in graph.node if node.op_type == "Relu")
        extra = onnx.helper.make_node("Abs", [node.input[0]], ["branch"], name="branch")
        graph.node.append(extra)

    assert changed(lambda graph: None) == ()
    assert changed(add_to_a_bias) == ("1 constants were changed, first 'conv2/bias'",)
    assert "1 of them unknown" in changed(add_a_branch)[0]
    assert changed(lose_a_bias) == ("1 constants were changed, first 'conv2/bias'",)
    assert changed(set_height) == another("inputs")
    assert changed(lambda graph: graph.output.add(name="more")) == another("outputs")
    model.opset_import[0].version = 20
    assert changed(lambda graph: None) == another("operator sets")


@pytest.mark.slow
def test_files_that_do_not_belong_together_are_refused(case, tmp_path):
    path = _write(_quantized(case, "nearest"), tmp_path / "model.safetensors")
    params = case.variables["params"]
    other = {**params, "head": {**params["head"], "kernel": jnp.zeros((64, 7))}}

    def refused(match, variables=case.variables, file=path, **options):
        with pytest.raises(errors.InputError, match=match) as error:
            auditing.audit(
                variables,
                file,
                **{"module": case.module, "apply_kwargs": EVALUATE, **options},
            )
        assert "\n" not in str(error.value)

    refused("module=", module=None)
    (tmp_path / "noise").write_bytes(b"\x08\x0a not a model")
    refused("ONNX", file=tmp_path / "noise")
    refused("cannot open", file=tmp_path / "nowhere")
    arrays, metadata = safetensors_file.read_safetensors(path)
    with pytest.raises(errors.InputError):
        auditing.audit({**case.variables, "params": other}, path, module=case.module)
    safetensors_file.write_safetensors(tmp_path / "x", dict(arrays), {})
    refused("no artefact", file=tmp_path / "x")

    def spoiled(arrays=arrays, metadata=metadata, **card):
        card = {**json.loads(metadata["card"]), **card}
        metadata = {"card": json.dumps(card)}
        safetensors_file.write_safetensors(tmp_path / "y", arrays, metadata)
        return tmp_path / "y"

    # Nothing is made of these numbers, whatever they say.
    for shape in ([8, 8], [8, 8, -3], [8, True, 3], [8, 8.0, 3], [8, 8, 2**15], "x"):
        refused(
            "says its images are .*; accepted are three integers from 1 to 16384",
            file=spoiled(image_shape=shape),
        )
    refused("does not say how large", file=spoiled(image_shape=None))
    grids = json.loads(metadata["card"])["grids"]
    grids["weights"]["head"]["channel_axis"] = 0
    refused("channel_axis of 'head' is 0; accepted", file=spoiled(grids=grids))
    whole = {"scale/head": np.ones((64, 10), "f4")}
    whole["zero_point/head"] = np.zeros((64, 10), "i4")
    refused(
        r"scales of 'head' have shape \[64, 10\]; accepted",
        file=spoiled(arrays={**arrays, **whole}),
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["nearest", "stochastic"])
def test_an_audit_can_be_stopped_before_each_layer(case, tmp_path, method):
    """Where codes are not nearest the images are looked at, layer by layer again."""
    path = _write(_quantized(case, method), tmp_path / "model.safetensors")
    calls = []

    def audit(last):
        def check_stop():
            calls.append(1)
            if len(calls) == last:
                raise KeyboardInterrupt

        return _audit_file(case, path, check_stop=check_stop)

    total = {"nearest": 3, "stochastic": 6}[method]
    assert len(audit(None).layers) == 3 and len(calls) == total
    for last in range(1, total + 1):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            audit(last)


@pytest.mark.slow
def test_what_was_audited_is_known_by_its_hash(case, tmp_path):
    found = _audit(case, _quantized(case, "nearest"), tmp_path, images=None)
    expected = bounded_file.sha256(tmp_path / "model.safetensors")
    assert found.integer_file_sha256 == expected
    assert found.float_model_sha256 is None
