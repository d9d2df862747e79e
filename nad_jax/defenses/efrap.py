# SPDX-License-Identifier: Apache-2.0
"""Quantizing a Flax module with a rounding that is learned, not nearest (EFRAP).

`efrap` quantizes every Conv and Dense of any Linen module on one grid and rounds by the
method asked for, so that defence and controls differ in nothing but the rounding:

    nearest       what every runtime does; wakes a quantization-conditioned backdoor
    flipped       the other grid point everywhere
    stochastic    up with probability equal to the fraction
    coordinate    EFRAP's discrete objective by coordinate descent on second moments
    adam          EFRAP's relaxed objective, as its public code optimises it

Per layer and output channel, `coordinate` minimises

    E |W^ x^ - W x|^2  +  flip_weight * sum over weights left at nearest of |w - w^|

over the two neighbouring codes of every weight; x^ is the layer's input in the network
quantized so far and x that of the float network. The first term is EFRAP's activation
preservation before BatchNorm and ReLU, the second its error-guided flipping; the third
(binarisation) vanishes, since the variables are binary from the start.
`flip_weight=0` is pure reconstruction: the control that shows what flipping adds.
"""

import dataclasses
import functools
import math
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.core import quantization, rounding, solvers
from nad_jax.defenses import (
    activation_tails,
    adam_rounding,
    common_sizes,
    layer_walk,
)
from nad_jax.defenses import moments as moments_lib
from nad_jax.models import layers as layers_lib

METHODS = ("nearest", "flipped", "stochastic", "coordinate", "adam")
# The methods that look at the calibration images, with their default flip weight.
_FLIP_WEIGHTS = {"coordinate": 0.01, "adam": 1.0}

# Values of one calibration batch that an activation range is measured on.
_ACTIVATION_SAMPLE = 2**14
_ACTIVATION_BATCH = 32


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What happened to one layer.

    Attributes:
      name: Path joined by "/".
      kernel_shape: Shape of the kernel.
      bits: Width of its codes.
      flip_rate: Share of weights not at nearest, in [0, 1].
      objective_nearest: Objective of nearest rounding on the same inputs, summed over
        channels; None for methods that look at no images.
      objective: The same for the rounding chosen.
      soft_objective: Objective of the soft rounding before hardening ("adam" only).
      trace: Objective after each sweep ("coordinate" only).
      converged: Whether no single flip would gain any more ("coordinate" only); False
        when `max_sweeps` ended the descent.
      seconds: Wall time of this layer.
    """

    name: str
    kernel_shape: tuple[int, ...]
    bits: int
    flip_rate: float
    objective_nearest: float | None = None
    objective: float | None = None
    soft_objective: float | None = None
    trace: tuple[float, ...] = ()
    converged: bool | None = None
    seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class FinishedLayer:
    """A layer that need not be solved again.

    Attributes:
      codes: int8 or uint8, in the kernel's shape.
      params: Scale and zero point of the kernel.
      report: What happened to it.
    """

    codes: Any
    params: quantization.QuantParams
    report: LayerReport


@dataclasses.dataclass(frozen=True)
class Quantized:
    """A quantized module: integer codes, their grids, and the floats they stand for.

    Attributes:
      module: The module that was quantized.
      variables: Same structure as the input; kernels are on their grids, so
        `module.apply(quantized.variables, images)` runs with float activations.
      codes: Layer name -> int8 or uint8 codes in the kernel's shape.
      quant_params: Layer name -> scale and zero point of the kernel.
      specs: Layer name -> the grid's description.
      layers: Layer name -> `LayerReport`, in the order of the forward pass.
      act_spec: Grid of layer inputs, None = float activations.
      act_params: Layer name -> scale and zero point of the layer's input.
      apply_kwargs: Keyword arguments of the module's call.
    """

    module: nn.Module
    variables: dict[str, Any]
    codes: dict[str, jax.Array]
    quant_params: dict[str, quantization.QuantParams]
    specs: dict[str, quantization.QuantSpec]
    layers: dict[str, LayerReport]
    act_spec: quantization.QuantSpec | None = None
    act_params: dict[str, quantization.QuantParams] = dataclasses.field(
        default_factory=dict
    )
    apply_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def flip_rate(self) -> float:
        """Share of all quantized weights that are not at nearest."""
        sizes = [np.prod(layer.kernel_shape) for layer in self.layers.values()]
        rates = [layer.flip_rate for layer in self.layers.values()]
        return float(np.average(rates, weights=sizes))

    def apply(self, variables: Mapping[str, Any], images: jax.Array) -> Any:
        """`module.apply` with activations quantized where `act_bits` was given.

        Args:
          variables: `self.variables`, or any of the same structure.
          images: A batch.
        """
        return apply_quantized(
            self.module,
            variables,
            images,
            self.act_params,
            act_spec=self.act_spec,
            apply_kwargs=self.apply_kwargs,
        )


def apply_quantized(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    act_params: Mapping[str, quantization.QuantParams],
    *,
    act_spec: quantization.QuantSpec | None,
    apply_kwargs: Mapping[str, Any],
) -> Any:
    """`module.apply` with every layer's input moved to its grid.

    Pure, so it may be jitted, sharded and differentiated (straight-through).

    Args:
      module: The module.
      variables: Its variables, usually with kernels on their grids.
      images: A batch.
      act_params: Layer name -> grid of the layer's input.
      act_spec: Description of those grids; None leaves activations alone.
      apply_kwargs: Keyword arguments of the module's call.
    """

    def quantize_inputs(next_fun, args, kwargs, context):
        if act_spec is None or not layers_lib.is_layer_call(context):
            return next_fun(*args, **kwargs)
        params = act_params["/".join(context.module.path)]
        inputs = quantization.fake_quant(args[0], params, act_spec)
        return next_fun(inputs, *args[1:], **kwargs)

    with nn.intercept_methods(quantize_inputs):
        return module.apply(variables, images, **apply_kwargs)


def efrap(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    weight_bits: int = 4,
    act_bits: int | None = None,
    method: str = "coordinate",
    flip_weight: float | None = None,
    spec: quantization.QuantSpec | None = None,
    first_last_bits: int | None = None,
    fold_batch_norm: bool = False,
    apply_kwargs: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
    max_sweeps: int = 20,
    adam: adam_rounding.AdamSettings | None = None,
    layers: list[layers_lib.Layer] | None = None,
    on_layer: Callable[[LayerReport], None] | None = None,
    finished: MutableMapping[str, FinishedLayer] | None = None,
) -> Quantized:
    """Quantizes the weights (and activations) of a module, rounding by `method`.

    Args:
      module: Any Linen module; its Conv and Dense layers are quantized.
      variables: Its variables, in evaluation form (running BatchNorm statistics).
      images: Calibration inputs `[N, ...]` as the module takes them, unlabelled.
      weight_bits: 2 to 8.
      act_bits: 2 to 8 quantizes every layer's input, affine and per tensor, with the
        range of least squared error averaged over batches; None keeps them float.
      method: One of `METHODS`.
      flip_weight: Price, per unit of rounding error, of a weight left at nearest
        ("coordinate", default 0.01) or weight of the flip loss ("adam", default 1, as
        in EFRAP's public code). 0 = pure reconstruction.
      spec: The weight grid; default symmetric, absmax, per output channel. Its `bits`
        are replaced by `weight_bits`; its `channel_axis` is None or -1.
      first_last_bits: Width for the first and the last layer, if another.
      fold_batch_norm: Folds BatchNorms into the layers they follow before quantizing:
        the grid that a runtime which folds them will see.
      apply_kwargs: Keyword arguments of the module's call, e.g. `{"train": False}`.
      key: Randomness of "stochastic" and "adam"; default `jax.random.key(0)`.
      max_sweeps: Passes of coordinate descent per layer.
      adam: Settings of "adam".
      layers: From `models.layers.find_layers` of this module, if at hand; several
        roundings of one module need not look for them each time.
      on_layer: Called with the report of each layer that is solved here.
      finished: Layer name -> what an earlier call with the same arguments, cut short,
        has made of the layer: taken as it is, so that the result is bitwise that of one
        whole call. Each layer solved here is put in, after `on_layer`.

    Returns:
      A `Quantized`. The input variables are not changed.

    Raises:
      InputError: an argument out of range, images or weights that are empty, not
        finite or of the wrong shape, or a module without Conv and Dense.

    Warns (`UserWarning`) about layers called twice (solved at their first call) and
    kernels left in float.

    References:
      Li et al., "Nearest is Not Dearest: Towards Practical Defense against
      Quantization-conditioned Backdoor Attacks", CVPR 2024.
    """
    spec = dataclasses.replace(
        spec or quantization.QuantSpec(), bits=_bits("weight_bits", weight_bits)
    )
    if spec.channel_axis not in (None, -1):
        raise errors.InputError(
            "spec.channel_axis must be None (per tensor) or -1 (per output channel), "
            f"got {spec.channel_axis}"
        )
    if method not in METHODS:
        raise errors.InputError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}"
        )
    if flip_weight is None:
        flip_weight = _FLIP_WEIGHTS.get(method, 0.0)
    if not 0.0 <= flip_weight < math.inf:
        raise errors.InputError(
            f"flip_weight must be >= 0 and finite, got {flip_weight}"
        )
    if max_sweeps < 1:
        raise errors.InputError(f"max_sweeps must be at least 1, got {max_sweeps}")
    images = _checked_images(images)
    apply_kwargs = dict(apply_kwargs or {})
    key = jax.random.key(0) if key is None else key

    if layers is None:
        layers = layers_lib.find_layers(
            module, variables, images, apply_kwargs=apply_kwargs
        )
    _check_kernels(variables, layers)
    structure = jax.tree.structure(variables)
    if fold_batch_norm:
        variables = _folded(module, variables, images, layers, apply_kwargs)
    specs = specs_by_layer(spec, layers, first_last_bits=first_last_bits)
    act_spec = None if act_bits is None else activation_spec(act_bits)

    rounder = _make_rounder(
        method,
        module,
        variables,
        images,
        layers,
        specs,
        flip_weight,
        key,
        max_sweeps,
        adam or adam_rounding.AdamSettings(),
        apply_kwargs,
    )
    new_params = dict(variables["params"])
    finished = {} if finished is None else finished
    given = {layer.name for layer in layers if layer.name in finished}
    act_params: dict[str, quantization.QuantParams] = {}

    def quantize_inputs(layer, inputs):
        if act_spec is None:
            return inputs
        return quantization.fake_quant(inputs, act_params[layer.name], act_spec)

    @moments_lib.Remembered
    def measure_and_quantize(float_inputs, inputs, spec):
        params = _activation_params(float_inputs, spec)
        return params, quantization.fake_quant(inputs, params, spec)

    def quantize_layer(layer, float_inputs, inputs):
        """Rounds one layer; returns the kernel and inputs to go on with."""
        nonlocal new_params
        started = time.perf_counter()
        if act_spec is not None:
            act_params[layer.name], inputs = measure_and_quantize(
                float_inputs, inputs, act_spec
            )
        own = layers_lib.get_in(new_params, layer.path)
        if layer.name in given:
            kernel = _on_grid(finished[layer.name], layer, own["kernel"].dtype)
        else:
            result, details = rounder(layer, float_inputs, inputs)
            kernel = result.kernel
            report = LayerReport(
                layer.name,
                layer.geometry.kernel_shape,
                specs[layer.name].bits,
                float(result.flip_rate),
                seconds=time.perf_counter() - started,
                **details,
            )
            if on_layer is not None:
                on_layer(report)
            finished[layer.name] = FinishedLayer(result.codes, result.params, report)
        new_params = layers_lib.set_in(
            new_params, layer.path, {**own, "kernel": kernel}
        )
        return kernel, inputs

    is_solved = len(given) == len(layers)
    if (method in _FLIP_WEIGHTS and not is_solved) or act_spec is not None:
        layer_walk.walk(
            module,
            variables,
            images,
            layers,
            quantize_layer,
            revisit=quantize_inputs,
            apply_kwargs=apply_kwargs,
        )
    else:
        for layer in layers:
            quantize_layer(layer, None, None)
    new_variables = {**variables, "params": new_params}
    return Quantized(
        module,
        # Of the caller's own containers, be they FrozenDicts.
        jax.tree.unflatten(structure, jax.tree.leaves(new_variables)),
        {layer.name: jnp.asarray(finished[layer.name].codes) for layer in layers},
        {layer.name: finished[layer.name].params for layer in layers},
        specs,
        {layer.name: finished[layer.name].report for layer in layers},
        act_spec,
        act_params,
        apply_kwargs,
    )


def _on_grid(known: FinishedLayer, layer: layers_lib.Layer, dtype: Any) -> jax.Array:
    """The kernel of a finished layer."""
    if known.codes.shape != layer.geometry.kernel_shape:
        raise errors.InputError(
            f"finished codes of layer {layer.name} have shape {known.codes.shape}, its "
            f"kernel {layer.geometry.kernel_shape}"
        )
    return quantization.dequantize(jnp.asarray(known.codes), known.params).astype(dtype)


def specs_by_layer(
    spec: quantization.QuantSpec,
    layers: list[layers_lib.Layer],
    *,
    first_last_bits: int | None = None,
) -> dict[str, quantization.QuantSpec]:
    """Layer name -> grid of its kernel; the two ends may have a width of their own."""
    specs = {layer.name: spec for layer in layers}
    if first_last_bits is not None:
        ends = dataclasses.replace(spec, bits=_bits("first_last_bits", first_last_bits))
        specs[layers[0].name] = specs[layers[-1].name] = ends
    return specs


def activation_spec(act_bits: int) -> quantization.QuantSpec:
    """The grid of layer inputs: affine, per tensor, range of least squared error."""
    return quantization.QuantSpec(_bits("act_bits", act_bits), False, None, "mse")


def _bits(name: str, value: Any) -> int:
    if isinstance(value, bool) or value not in range(2, 9):
        raise errors.InputError(f"{name} must be 2 to 8, got {value!r}")
    return int(value)


def _checked_images(images: Any) -> jax.Array:
    images = jnp.asarray(images)
    if images.ndim < 2 or images.size == 0:
        raise errors.InputError(
            f"calibration images must be a non-empty batch, got shape {images.shape}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise errors.InputError(
            "calibration images must be float, as the module takes them, got "
            f"{images.dtype}"
        )
    if not np.all(np.isfinite(np.asarray(images, np.float32))):
        raise errors.InputError("calibration images contain NaN or Inf")
    return images


def _check_kernels(variables, layers: list[layers_lib.Layer]) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
        # On the host: compiling a test for every shape would take seconds.
        if not np.all(np.isfinite(np.asarray(leaf, np.float32))):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise errors.InputError(f"variable {name} contains NaN or Inf")
    for layer in layers:
        if layer.calls > 1:
            warnings.warn(
                f"layer {layer.name} is called {layer.calls} times in one pass; its "
                "rounding is solved at the first call",
                stacklevel=3,
            )


def _folded(module, variables, images, layers, apply_kwargs):
    """Folded variables, after checking that the module still computes the same."""
    folded = layers_lib.fold_batch_norm(variables, layers)
    before, after = (
        jax.tree.leaves(module.apply(v, images[:2], **apply_kwargs))
        for v in (variables, folded)
    )
    if not all(map(_nearly_equal, before, after)):
        raise errors.InputError(
            "BatchNorm cannot be folded: a layer's output is used elsewhere than in "
            "its BatchNorm, or the BatchNorm does not use running statistics"
        )
    return folded


def _nearly_equal(before, after) -> bool:
    before, after = np.asarray(before, np.float32), np.asarray(after, np.float32)
    atol = 1e-3 * np.max(np.abs(before), initial=0.0)
    return np.allclose(before, after, rtol=1e-3, atol=atol)


def _activation_params(inputs, spec):
    """Range of a layer's float inputs, from an even sample of each batch."""
    batches = max(inputs.shape[0] // _ACTIVATION_BATCH, 1)
    per_batch = inputs.shape[0] // batches
    values = inputs[: batches * per_batch].reshape(batches, -1)
    stride = max(values.shape[1] // _ACTIVATION_SAMPLE, 1)
    # A stride prime to an image's size walks through all channels and positions
    # instead of visiting a few of them.
    while math.gcd(stride, math.prod(inputs.shape[1:])) > 1:
        stride += 1
    return _calibrate_activations(values[:, ::stride], spec)


_calibrate_activations = jax.jit(quantization.calibrate_activations, static_argnums=1)


class _Rounded(NamedTuple):
    """A kernel on its grid: float values, codes, the grid, share of weights flipped."""

    kernel: jax.Array
    codes: jax.Array
    params: quantization.QuantParams
    flip_rate: jax.Array | float


# (layer, float_inputs, inputs) -> result and details for the layer's report
_Rounder = Callable[..., tuple[_Rounded, dict[str, Any]]]


def _make_rounder(
    method,
    module,
    variables,
    images,
    layers,
    specs,
    flip_weight,
    key,
    max_sweeps,
    adam,
    apply_kwargs,
) -> _Rounder:
    """What rounds one layer when the walk reaches it."""
    own = {
        layer.name: layers_lib.get_in(variables["params"], layer.path)
        for layer in layers
    }
    if method not in _FLIP_WEIGHTS:
        thresholds = {layer.name: None for layer in layers}
        if method == "stochastic":
            thresholds = _draw_thresholds(key, layers)

        def round_blindly(layer, float_inputs, inputs):
            del float_inputs, inputs
            name = layer.name
            padded = common_sizes.pad_kernel(own[name]["kernel"])
            result = _round_blindly(method, specs[name], padded, thresholds[name])
            return _trimmed(result, layer.geometry), {}

        return round_blindly

    keys = {
        layer.name: jax.random.fold_in(key, index) for index, layer in enumerate(layers)
    }
    collector = moments_lib.Collector()
    tails = {}
    if method == "adam":
        tails = activation_tails.find_tails(
            module,
            variables,
            images[: adam.batch_size],
            layers,
            apply_kwargs=apply_kwargs,
        )

    def round_layer(layer, float_inputs, inputs):
        spec, geometry = specs[layer.name], layer.geometry
        kernel = own[layer.name]["kernel"]
        moments = collector.collect(geometry, kernel, float_inputs, inputs)
        if method == "coordinate":
            shape = geometry
            if geometry.groups == 1:
                kernel = common_sizes.pad_kernel(kernel)
                moments = common_sizes.pad_moments(moments)
                shape = layers_lib.Geometry(kernel.shape)
            result, solution = _descend(
                shape, spec, max_sweeps, moments, kernel, flip_weight
            )
            if geometry.groups == 1:
                result = _trimmed(result, geometry)
            trace = [float(value) for value in np.sum(solution.trace, axis=0)]
            sweeps = int(np.max(solution.sweeps))
            return result, {
                "objective_nearest": trace[0],
                "objective": trace[-1],
                "trace": tuple(trace[: sweeps + 1]),
                "converged": sweeps < max_sweeps,
            }
        params, placement, problem = _pose(geometry, spec, moments, kernel, flip_weight)
        task = adam_rounding.LayerTask(
            layer,
            kernel,
            own[layer.name].get("bias"),
            params,
            placement,
            float_inputs,
            inputs,
            problem,
            tails[layer.name],
            flip_weight,
            images.shape[0],
            keys[layer.name],
        )
        chosen, details = adam_rounding.solve(task, adam)
        return _finish(kernel, chosen, params, placement, spec), details

    return round_layer


def _draw_thresholds(
    key: jax.Array, layers: list[layers_lib.Layer]
) -> dict[str, np.ndarray]:
    """Uniform numbers for every weight of the padded kernels, drawn in one go."""
    shapes = [
        [
            common_sizes.padded_size(layer.geometry.num_inputs),
            common_sizes.padded_size(layer.geometry.kernel_shape[-1]),
        ]
        for layer in layers
    ]
    ends = np.cumsum([rows * columns for rows, columns in shapes])
    draws = np.asarray(jax.random.uniform(key, (ends[-1],), jnp.float32))
    return {
        layer.name: part.reshape(shape)
        for layer, part, shape in zip(
            layers, np.split(draws, ends[:-1]), shapes, strict=True
        )
    }


def _trimmed(result: _Rounded, geometry: layers_lib.Geometry) -> _Rounded:
    """The layer's own part of a result for its padded kernel."""
    padded = result.kernel.size / math.prod(geometry.kernel_shape)
    kernel, codes, params = jax.tree.map(
        lambda x: common_sizes.trim(x, geometry.kernel_shape), result[:3]
    )
    return _Rounded(kernel, codes, params, float(result.flip_rate) * padded)


@functools.partial(jax.jit, static_argnums=4)
def _finish(kernel, chosen, params, placement, spec) -> _Rounded:
    return _Rounded(
        rounding.rounded_weights(placement, chosen, params).astype(kernel.dtype),
        rounding.codes(placement, chosen, spec),
        params,
        rounding.flip_rate(placement, chosen),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _round_blindly(method, spec, kernel, thresholds) -> _Rounded:
    """A rounding that needs no images; `thresholds` are those of "stochastic"."""
    params = quantization.calibrate(kernel, spec)
    placement = rounding.place(kernel, params, spec)
    if method == "nearest":
        chosen = rounding.nearest_rounding(placement)
    elif method == "flipped":
        chosen = rounding.flipped_rounding(placement)
    else:
        chosen = rounding.threshold_rounding(thresholds, placement)
    return _finish(kernel, chosen, params, placement, spec)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _pose(geometry, spec, moments, kernel, flip_weight):
    """Grid, placement and `RoundingProblem` of a layer, stacked over its groups."""
    params = quantization.calibrate(kernel, spec)
    placement = rounding.place(kernel, params, spec)
    error = jnp.abs(rounding.rounding_error(kernel, placement, params))
    weights = {
        "step": jnp.where(placement.free, params.scale, 0.0),
        "fraction": placement.fraction,
        "nearest": placement.nearest,
        "stay_cost": flip_weight * error,
    }
    weights = {
        name: layers_lib.as_matrix(geometry, value) for name, value in weights.items()
    }
    problem = jax.vmap(lambda m, w: solvers.rounding_problem(m, **w))(moments, weights)
    return params, placement, problem


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _descend(geometry, spec, max_sweeps, moments, kernel, flip_weight):
    """Coordinate descent from nearest."""
    params, placement, problem = _pose(geometry, spec, moments, kernel, flip_weight)
    descend = functools.partial(
        solvers.coordinate_descent, max_sweeps=max_sweeps, block_size=64
    )
    solution = moments_lib.per_group(descend, problem, problem.nearest)
    chosen = layers_lib.as_kernel(geometry, solution.rounding)
    result = _finish(kernel, chosen, params, placement, spec)
    return result, solution._replace(rounding=None)
