# SPDX-License-Identifier: Apache-2.0
"""Quantizing a Flax module with a rounding that is learned, not nearest (EFRAP).

`efrap` quantizes every Conv and Dense of any Linen module on one grid and rounds by the
method asked for, so that defence and controls differ in nothing but the rounding:

    nearest        what every runtime does; wakes a quantization-conditioned backdoor
    floor, ceil    the grid point below, above
    flipped        the other grid point everywhere
    stochastic     up with probability equal to the fraction
    random         so many weights flipped by chance
    top_error      so many weights flipped, those of largest rounding error
    noise          nearest, after Gaussian noise
    counter_shift  nearest, after the shift of nearest rounding was subtracted (QVec)
    channel_split  nearest, after outlier input channels were split in two (OCS); codes
                   are sums over the copies, for judging and not for export
    feedback       one pass in which weights make up for each other's errors (GPTQ)
    coordinate     EFRAP's discrete objective by coordinate descent on second moments
    adam           EFRAP's relaxed objective, as its public code optimises it

Per layer and output channel, `coordinate` minimises

    E |W^ x^ - W x|^2  +  flip_weight * sum over weights left at nearest of |w - w^|

over the two neighbouring codes of every weight; x^ is the layer's input in the network
quantized so far and x that of the float network. The first term is EFRAP's activation
preservation before BatchNorm and ReLU, the second its error-guided flipping; the third
(binarisation) vanishes, since the variables are binary from the start.
`flip_weight=0` is pure reconstruction: the control that shows what flipping adds; with
"adam" it is AdaRound's objective (without its stretched sigmoid and its schedule).
"""

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nad_jax import errors
from nad_jax.core import grids, quantization, shapes
from nad_jax.defenses import (
    activation_grids,
    activation_tails,
    adam_rounding,
    layer_rounding,
    layer_walk,
    quantized_module,
    sum_grids,
)
from nad_jax.defenses import moments as moments_lib
from nad_jax.models import layers as layers_lib
from nad_jax.training import sharding

METHODS = layer_rounding.METHODS


def efrap(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    weight_bits: int = 4,
    act_bits: int | None = None,
    method: str = "coordinate",
    flip_weight: float | None = None,
    grid: str | grids.Grid = "plain",
    spec: quantization.QuantSpec | None = None,
    first_last_bits: int | None = None,
    fold_batch_norm: bool | None = None,
    quantize_sums: bool = False,
    apply_kwargs: Mapping[str, Any] | None = None,
    key: jax.Array | None = None,
    strength: float | Mapping[str, float] | None = None,
    flip_form: str | None = None,
    flip_unit: str | None = None,
    max_sweeps: int | None = None,
    starts: Sequence[str] | None = None,
    flip_weight_path: Sequence[float] | None = None,
    adam: adam_rounding.AdamSettings | None = None,
    layers: list[layers_lib.Layer] | None = None,
    on_layer: Callable[[quantized_module.LayerReport], None] | None = None,
    finished: MutableMapping[str, quantized_module.FinishedLayer] | None = None,
    mesh: Mesh | None = None,
) -> quantized_module.Quantized:
    """Quantizes the weights (and activations) of a module, rounding by `method`.

    Args:
      module: Any Linen module; its Conv and Dense layers are quantized.
      variables: Its variables, in evaluation form (running BatchNorm statistics).
      images: Calibration inputs `[N, ...]` as the module takes them, unlabelled.
      weight_bits: 2 to 8.
      act_bits: 2 to 8 quantizes every layer's input, affine and per tensor; None keeps
        them float.
      method: One of `METHODS`.
      flip_weight: Price, per unit of rounding error, of a weight left at nearest
        ("coordinate", default 0.01; "feedback", default 0) or weight of the flip loss
        ("adam", default 1, as in EFRAP's public code, which at a hard rounding is a
        price of 18.4). 0 = pure reconstruction.
      grid: Everything else about the grid, by name (`nad_jax.core.grids.GRIDS`: what
        runtimes do by default) or spelt out. "plain" is symmetric, absmax, per output
        channel; inputs with the range of least squared error, averaged over batches.
      spec: A weight grid instead of that of `grid`. Its `bits` are replaced by
        `weight_bits`; its `channel_axis` is None or -1.
      first_last_bits: Width of weights and inputs of the first and the last layer;
        None = as `grid` has it.
      fold_batch_norm: Folds BatchNorms into the layers they follow before quantizing:
        the grid that a runtime which folds them will see. None = as `grid` has it.
      quantize_sums: Quantizes the operands of residual sums as well, in `apply` and in
        what is exported: a runtime then computes whole residual blocks in integers.
        Needs `act_bits`.
      apply_kwargs: Keyword arguments of the module's call, e.g. `{"train": False}`.
      key: Randomness of "stochastic", "random", "noise" and "adam"; default
        `jax.random.key(0)`.
      strength: Of "random" and "top_error": the share of weights to flip, in [0, 1]
        (default 0.5), for all layers or by layer name; of "noise": standard deviation
        in half steps (default 1); of "counter_shift": multiple of the shift that is
        subtracted (default 1); of "channel_split": the share of input channels to add,
        in [0, 1] (default 0.02). Other methods take none.
      flip_form: What the price counts: "element" (default), the error of the weight,
        or "neuron", the norm of its output channel's errors (the paper's wording).
      flip_unit: "weight" units (default), as published, or "step": free of the scale
        of the layer, see `layer_rounding.Method`.
      max_sweeps: Passes of coordinate descent per layer (default 20).
      starts: Where coordinate descent starts, of "nearest" (default), "feedback" and
        "flipped"; each channel keeps the best end.
      flip_weight_path: Further flip weights to solve each layer with, on the same
        inputs, for its report alone (`LayerReport.path`). Moments are not measured
        again, so a point costs some sweeps. Ascending is best: each starts from nearest
        and from where the one before has ended.
      adam: Settings of "adam".
      layers: From `models.layers.find_layers` of this module, if at hand; several
        roundings of one module need not look for them each time.
      on_layer: Called with the report of each layer that is solved here.
      finished: Layer name -> what an earlier call with the same arguments, cut short,
        has made of the layer: taken as it is, so that the result is bitwise that of one
        whole call. Each layer solved here is put in, after `on_layer`.
      mesh: From `training.sharding`, to split the images over devices and, in
        "coordinate" and "feedback", the output channels of a layer, where they divide.
        "adam" draws its minibatches from all images; there, it changes nothing.

    Returns:
      A `quantized_module.Quantized`. The input variables are not changed.

    Raises:
      InputError: an argument out of range, or one that the method does not read;
        images or weights that are empty, not finite or of the wrong shape, or a module
        without Conv and Dense.

    Warns (`UserWarning`) about layers called twice (their rounding is solved at the
    first call; the grid of their inputs is that of all calls) and kernels left in
    float.

    References:
      Li et al., "Nearest is Not Dearest: Towards Practical Defense against
      Quantization-conditioned Backdoor Attacks", CVPR 2024.
    """
    grid = grids.named(grid) if isinstance(grid, str) else grid
    grids.check_bits("weight_bits", weight_bits)
    if spec is None:
        spec = grid.weight_spec(weight_bits)
    spec = dataclasses.replace(spec, bits=int(weight_bits))
    if first_last_bits is None:
        first_last_bits = grid.first_last_bits
    if fold_batch_norm is None:
        fold_batch_norm = grid.fold_batch_norm
    if spec.channel_axis not in (None, -1):
        raise errors.InputError(
            "spec.channel_axis must be None (per tensor) or -1 (per output channel), "
            f"got {spec.channel_axis}"
        )
    how = _method(
        method,
        flip_weight=flip_weight,
        flip_form=flip_form,
        flip_unit=flip_unit,
        max_sweeps=max_sweeps,
        starts=None if starts is None else tuple(starts),
        flip_weight_path=flip_weight_path,
        adam=adam,
        strength=strength,
    )
    if flip_weight is None:
        flip_weight = layer_rounding.LOOKING.get(method, 0.0)
    for name, values in (
        ("flip_weight", (flip_weight,)),
        ("flip_weight_path", flip_weight_path or ()),
    ):
        for value in values:
            if not 0.0 <= value < math.inf:
                raise errors.InputError(f"{name} must be >= 0 and finite, got {value}")
    if quantize_sums and act_bits is None:
        raise errors.InputError("quantize_sums needs act_bits, got None")
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
    act_specs, widths = {}, {}
    if act_bits is not None:
        widths = _act_widths(act_bits, layers, first_last_bits)
        act_specs = act_specs_by_layer(
            grid, act_bits, layers, first_last_bits=first_last_bits
        )

    own = {
        layer.name: layers_lib.get_in(variables["params"], layer.path)
        for layer in layers
    }
    kernels = {name: parameters["kernel"] for name, parameters in own.items()}
    strengths = _strengths(method, strength, layers)
    if method in layer_rounding.BLIND:
        rounder = layer_rounding.make_blind_rounder(
            how, kernels, layers, specs, strengths, key
        )
    elif method == "adam":
        mesh = None
        adam = adam or adam_rounding.AdamSettings()
        rounder = layer_rounding.make_adam_rounder(
            how,
            own,
            specs,
            flip_weight,
            activation_tails.find_tails(
                module,
                variables,
                images[: adam.batch_size],
                layers,
                apply_kwargs=apply_kwargs,
            ),
            images.shape[0],
            {layer.name: jax.random.fold_in(key, i) for i, layer in enumerate(layers)},
            adam,
        )
    else:
        rounder = layer_rounding.make_descending_rounder(
            how, kernels, specs, flip_weight, mesh, flip_weight_path or ()
        )
    new_params = dict(variables["params"])
    finished = {} if finished is None else finished
    given = {layer.name for layer in layers if layer.name in finished}
    act_params: dict[str, quantization.QuantParams] = {}

    def quantize_inputs(layer, inputs):
        if not act_specs:
            return inputs
        name = layer.name
        return quantization.fake_quant(inputs, act_params[name], act_specs[name])

    @moments_lib.Remembered
    def measure_and_quantize(float_inputs, inputs, width, spec):
        params = activation_grids.measure(
            float_inputs, grid, width, num_images=images.shape[0]
        )
        return params, quantization.fake_quant(inputs, params, spec)

    def measure_all_calls(layer, inputs):
        """The grid of a layer that is called several times; one serves all calls."""
        num_images = images.shape[0]
        inputs = activation_grids.join_calls(inputs, num_images=num_images)
        moments_lib.checked_largest(layer, inputs)
        act_params[layer.name] = activation_grids.measure(
            inputs, grid, widths[layer.name], num_images=num_images
        )

    def quantize_layer(layer, float_inputs, inputs):
        """Rounds one layer; returns the kernel and inputs to go on with."""
        nonlocal new_params
        started = time.perf_counter()
        if layer.name in act_params:
            inputs = quantize_inputs(layer, inputs)
        elif act_specs:
            # Methods that solve nothing look at no other number of these.
            moments_lib.checked_largest(layer, float_inputs)
            act_params[layer.name], inputs = measure_and_quantize(
                float_inputs, inputs, widths[layer.name], act_specs[layer.name]
            )
        own = layers_lib.get_in(new_params, layer.path)
        if layer.name in given:
            kernel = _on_grid(finished[layer.name], layer, own["kernel"])
        else:
            result, details = rounder(layer, float_inputs, inputs)
            if mesh is not None:
                result = sharding.unreplicate(result)
            kernel = result.kernel
            report = quantized_module.LayerReport(
                layer.name,
                layer.geometry.kernel_shape,
                specs[layer.name].bits,
                float(result.flip_rate),
                seconds=time.perf_counter() - started,
                **details,
            )
            if on_layer is not None:
                on_layer(report)
            finished[layer.name] = quantized_module.FinishedLayer(
                result.codes, result.params, report
            )
        new_params = layers_lib.set_in(
            new_params, layer.path, {**own, "kernel": kernel}
        )
        if mesh is not None:
            kernel = sharding.replicate(kernel, mesh)
        return kernel, inputs

    is_solved = len(given) == len(layers)
    if (method in layer_rounding.LOOKING and not is_solved) or act_specs:
        walked = (
            module,
            variables if mesh is None else sharding.replicate(variables, mesh),
            images if mesh is None else sharding.shard_batch(images, mesh),
            layers,
        )
        if act_specs:
            layer_walk.look_ahead(*walked, measure_all_calls, apply_kwargs=apply_kwargs)
        layer_walk.walk(
            *walked,
            quantize_layer,
            revisit=quantize_inputs,
            apply_kwargs=apply_kwargs,
        )
    else:
        for layer in layers:
            quantize_layer(layer, None, None)
    if quantize_sums:
        assert act_bits is not None  # seen to above
        width: int = act_bits
        of_sums = sum_grids.calibrate(
            module,
            variables,
            images,
            {name: (act_params[name], act_specs[name]) for name in act_params},
            lambda value: (
                activation_grids.measure(
                    value, grid, width, num_images=images.shape[0]
                ),
                grid.act_spec(width),
            ),
            apply_kwargs=apply_kwargs,
        )
        for name, (params, operand_spec) in of_sums.items():
            act_params[name], act_specs[name] = params, operand_spec
    new_variables = {**variables, "params": new_params}
    return quantized_module.Quantized(
        module,
        # Of the caller's own containers, be they FrozenDicts.
        jax.tree.unflatten(structure, jax.tree.leaves(new_variables)),
        {layer.name: jnp.asarray(finished[layer.name].codes) for layer in layers},
        {layer.name: finished[layer.name].params for layer in layers},
        specs,
        {layer.name: finished[layer.name].report for layer in layers},
        act_specs,
        act_params if mesh is None else sharding.unreplicate(act_params),
        apply_kwargs,
    )


def _method(name: str, **options: Any) -> layer_rounding.Method:
    """The method with the options that were given, all of which it reads."""
    given = {option: v for option, v in options.items() if v is not None}
    known = {field.name for field in dataclasses.fields(layer_rounding.Method)}
    method = layer_rounding.Method(
        name, **{option: v for option, v in given.items() if option in known}
    )
    read = layer_rounding.options_read(name, given.get("adam"))
    for option in sorted(given.keys() - read):
        raise errors.InputError(
            f"method {name!r} takes no {option}, got {given[option]!r}"
        )
    return method


def _on_grid(
    known: quantized_module.FinishedLayer, layer: layers_lib.Layer, kernel: jax.Array
) -> jax.Array:
    """The kernel of a finished layer, whose float one is `kernel`."""
    if known.codes.shape != layer.geometry.kernel_shape:
        raise errors.InputError(
            f"finished codes of layer {layer.name} have shape {known.codes.shape}, its "
            f"kernel {layer.geometry.kernel_shape}"
        )
    values = quantization.dequantize(jnp.asarray(known.codes), known.params)
    return values.astype(shapes.accumulation_dtype(kernel))


def specs_by_layer(
    spec: quantization.QuantSpec,
    layers: list[layers_lib.Layer],
    *,
    first_last_bits: int | None = None,
) -> dict[str, quantization.QuantSpec]:
    """Layer name -> grid of its kernel; the two ends may have a width of their own."""
    specs = {layer.name: spec for layer in layers}
    if first_last_bits is not None:
        grids.check_bits("first_last_bits", first_last_bits)
        ends = dataclasses.replace(spec, bits=int(first_last_bits))
        specs[layers[0].name] = specs[layers[-1].name] = ends
    return specs


def act_specs_by_layer(
    grid: grids.Grid,
    act_bits: int,
    layers: list[layers_lib.Layer],
    *,
    first_last_bits: int | None = None,
) -> dict[str, quantization.QuantSpec]:
    """Layer name -> grid of its input; the two ends may have a width of their own."""
    return {
        name: grid.act_spec(bits)
        for name, bits in _act_widths(act_bits, layers, first_last_bits).items()
    }


def _act_widths(act_bits, layers, first_last_bits) -> dict[str, int]:
    widths = {layer.name: act_bits for layer in layers}
    if first_last_bits is not None:
        widths[layers[0].name] = widths[layers[-1].name] = first_last_bits
    return widths


def _strengths(method, strength, layers) -> dict[str, float]:
    """Layer name -> strength of a blind method."""
    if strength is None:
        strength = layer_rounding.STRENGTHS.get(method, 0.0)
    by_layer = strength
    if not isinstance(by_layer, Mapping):
        by_layer = {layer.name: by_layer for layer in layers}
    missing = [layer.name for layer in layers if layer.name not in by_layer]
    if missing:
        raise errors.InputError(f"strength has no value for layer {missing[0]}")
    shares = ("random", "top_error", "channel_split")
    most = 1.0 if method in shares else math.inf
    for name, value in by_layer.items():
        if not 0.0 <= value <= most or value == math.inf:
            raise errors.InputError(
                f"strength of {method!r} must be >= 0"
                f"{' and at most 1' if most == 1.0 else ''}, got {value} for {name}"
            )
    return dict(by_layer)


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
