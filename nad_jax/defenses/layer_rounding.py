# SPDX-License-Identifier: Apache-2.0
"""Rounding one layer by any method; the layer walk calls it layer after layer."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nad_jax import errors, settings
from nad_jax.core import (
    blind_rounding,
    channel_splitting,
    error_feedback,
    losses,
    quantization,
    rounding,
    shapes,
    solvers,
)
from nad_jax.defenses import activation_tails, adam_rounding, common_sizes
from nad_jax.defenses import moments as moments_lib
from nad_jax.models import layers as layers_lib
from nad_jax.training import sharding

# Methods that look at the weights alone.
BLIND = (*settings.BLIND_ROUNDINGS, "counter_shift", "channel_split")
# Those of them that come in degrees, with their default strength.
STRENGTHS = {
    "random": 0.5,
    "top_error": 0.5,
    "noise": 1.0,
    "counter_shift": 1.0,
    "channel_split": 0.02,
}
# Methods that look at the calibration images, with their default flip weight.
LOOKING = {"coordinate": 0.01, "feedback": 0.0, "adam": 1.0}
METHODS = (*BLIND, *LOOKING)
STARTS = ("nearest", "feedback", "flipped")
FLIP_FORMS = ("element", "neuron")
FLIP_UNITS = ("weight", "step")
# Option of `efrap` -> the methods that read it.
OPTIONS = {
    "flip_weight": tuple(LOOKING),
    "flip_form": tuple(LOOKING),
    "flip_unit": tuple(LOOKING),
    "max_sweeps": ("coordinate",),
    "starts": ("coordinate",),
    "flip_weight_path": ("coordinate",),
    "adam": ("adam",),
    "strength": tuple(STRENGTHS),
}
# Of the blind methods, those that draw a number per weight.
_DRAWING = ("stochastic", "random", "noise")
# Of a weight that stays at nearest, in units where errors are around 1: more than any
# flip can cost, and nothing that overflows in a sum.
_HIGHEST_PRICE = 1e30


@dataclasses.dataclass(frozen=True)
class Method:
    """How layers are rounded; hashable, so that it can be compiled in.

    Attributes:
      name: One of `METHODS`.
      flip_form: What a weight's price counts: its own error ("element") or the norm of
        its neuron's ("neuron").
      flip_unit: "weight" units, as published, or "step": errors in steps, times what
        one step of an average weight costs at the layer's output. That price follows
        the layer when all its weights or all its inputs are scaled, so one flip weight
        means the same in every layer and at every width.
      max_sweeps: Passes of coordinate descent at most.
      starts: Of coordinate descent, of `STARTS`; each channel keeps the best end.
    """

    name: str
    flip_form: str = "element"
    flip_unit: str = "weight"
    max_sweeps: int = 20
    starts: tuple[str, ...] = ("nearest",)

    def __post_init__(self):
        for field, value, known in (
            ("method", self.name, METHODS),
            ("flip_form", self.flip_form, FLIP_FORMS),
            ("flip_unit", self.flip_unit, FLIP_UNITS),
            *(("starts", start, STARTS) for start in self.starts or ("",)),
        ):
            if value not in known:
                raise errors.InputError(
                    f"{field} must be one of {', '.join(known)}, got {value!r}"
                )
        if self.max_sweeps < 1:
            raise errors.InputError(
                f"max_sweeps must be at least 1, got {self.max_sweeps}"
            )


class Rounded(NamedTuple):
    """A kernel on its grid: float values, codes, the grid, share of weights flipped.

    Values of bfloat16 kernels are float32: narrower ones would miss their grid.
    """

    kernel: jax.Array
    codes: jax.Array
    params: quantization.QuantParams
    flip_rate: jax.Array | float


def options_read(
    method: str, adam: adam_rounding.AdamSettings | None = None
) -> frozenset[str]:
    """Names of `OPTIONS` that a method reads.

    Args:
      method: Of `METHODS`.
      adam: Its settings; beside coordinate descent, that one's options are read, too.
    """
    runs = {method}
    if method == "adam" and adam is not None and adam.beside_descent:
        runs.add("coordinate")
    return frozenset(name for name, readers in OPTIONS.items() if runs & set(readers))


# (layer, float_inputs, inputs) -> result and details for the layer's report
Rounder = Callable[..., tuple[Rounded, dict[str, Any]]]


def make_blind_rounder(
    method: Method,
    kernels: Mapping[str, jax.Array],
    layers: list[layers_lib.Layer],
    specs: Mapping[str, quantization.QuantSpec],
    strengths: Mapping[str, float],
    key: jax.Array,
) -> Rounder:
    """What rounds a layer by a method of `BLIND`.

    Args:
      method: The method.
      kernels: Layer name -> float kernel.
      layers: All of them.
      specs: Layer name -> grid.
      strengths: Layer name -> the method's strength.
      key: Randomness.
    """
    draws: dict[str, Any] = {layer.name: None for layer in layers}
    if method.name in _DRAWING:
        draws = _draw(key, layers)

    def round_layer(layer, float_inputs, inputs):
        del float_inputs, inputs
        name, kernel = layer.name, kernels[layer.name]
        how = method.name
        if how == "channel_split":
            # Pixels have no outliers to split, and groups have no inputs in common.
            if name != layers[0].name and layer.geometry.groups == 1:
                num_splits = math.ceil(strengths[name] * kernel.shape[-2])
                return _round_split(specs[name], num_splits, kernel), {}
            how = "nearest"
        padded = common_sizes.pad_kernel(kernel)
        params = common_sizes.kernel_params(kernel, specs[name], padded)
        result = _round_blindly(
            how,
            specs[name],
            padded,
            params,
            draws[name],
            np.float32(strengths[name]),
            np.float32(math.prod(layer.geometry.kernel_shape)),
        )
        return _trimmed(result, layer.geometry), {}

    return round_layer


def make_descending_rounder(
    method: Method,
    kernels: Mapping[str, jax.Array],
    specs: Mapping[str, quantization.QuantSpec],
    flip_weight: float,
    mesh: Mesh | None = None,
    flip_weight_path: Sequence[float] = (),
) -> Rounder:
    """What rounds a layer by "coordinate" or "feedback"; arguments as above.

    Args:
      mesh: What inputs are split over, if anything; channels then are, too.
      flip_weight_path: Other flip weights, of which the report shall tell.
    """
    collector = moments_lib.Collector(mesh)

    def round_layer(layer, float_inputs, inputs):
        kernel, geometry = kernels[layer.name], layer.geometry
        spec = specs[layer.name]
        units = None
        if method.name == "coordinate":
            units = moments_lib.natural_units(layer, kernel, inputs)
        moments = collector.collect(geometry, kernel, float_inputs, inputs, units)
        posed, top = _posing(geometry, units)
        shape, padded = geometry, None
        if geometry.groups == 1:
            padded = common_sizes.pad_kernel(kernel)
            moments = common_sizes.pad_moments(moments)
            shape = layers_lib.Geometry(padded.shape)
            posed = posed.padded(padded.shape)
        task = (
            shape,
            spec,
            method,
            mesh,
            moments,
            kernel if padded is None else padded,
            common_sizes.kernel_params(kernel, spec, padded),
            posed,
        )
        result, solution = _descend(*task, flip_weight)
        if padded is not None:
            result = _trimmed(result, geometry)
        trace = [float(value) * top**2 for value in np.sum(solution.trace, axis=0)]
        moments_lib.check_finite(layer, "output error", trace[-1])
        sweeps = int(np.max(solution.sweeps))
        details: dict[str, Any] = {
            "objective_nearest": float(np.sum(solution.nearest)) * top**2,
            "objective": trace[-1],
        }
        if method.name == "coordinate":
            details["trace"] = tuple(trace[: sweeps + 1])
            details["converged"] = sweeps < method.max_sweeps
        if flip_weight_path:
            points = jnp.asarray(flip_weight_path, jnp.float32)
            output_errors, flips = jax.device_get(_walk_path(*task, points))
            details["path"] = tuple(
                {
                    "flip_weight": float(point),
                    # A sum of parts that cancel may come out below 0.
                    "output_error": max(float(output_error) * top**2, 0.0),
                    "flip_rate": float(count / math.prod(geometry.kernel_shape)),
                }
                for point, output_error, count in zip(
                    flip_weight_path, output_errors, flips, strict=True
                )
            )
        return result, details

    return round_layer


def make_adam_rounder(
    method: Method,
    own: Mapping[str, Mapping[str, Any]],
    specs: Mapping[str, quantization.QuantSpec],
    flip_weight: float,
    tails: Mapping[str, activation_tails.Tail],
    num_images: int,
    keys: Mapping[str, jax.Array],
    adam: adam_rounding.AdamSettings,
) -> Rounder:
    """What rounds a layer by "adam".

    Args:
      method: The method.
      own: Layer name -> its parameters.
      specs: Layer name -> grid.
      flip_weight: Weight of the flip loss.
      tails: Layer name -> what follows it.
      num_images: Of the calibration set.
      keys: Layer name -> randomness.
      adam: Its settings.
    """
    collector = moments_lib.Collector()

    def round_layer(layer, float_inputs, inputs):
        name, geometry = layer.name, layer.geometry
        kernel = own[name]["kernel"]
        moments = collector.collect(geometry, kernel, float_inputs, inputs)
        params = common_sizes.kernel_params(kernel, specs[name])
        posed, _ = _posing(geometry, None)
        placement, problem = _pose(
            geometry, specs[name], method, moments, kernel, params, posed, flip_weight
        )
        # The loop has no comparison that NaN could slip through, but no end either.
        reached = jax.vmap(solvers.objective)(problem, problem.nearest)
        moments_lib.check_finite(layer, "output error", float(jnp.sum(reached)))
        task = adam_rounding.LayerTask(
            layer,
            kernel,
            own[name].get("bias"),
            params,
            placement,
            float_inputs,
            inputs,
            problem,
            tails[name],
            num_images,
            keys[name],
        )
        chosen, details = adam_rounding.solve(task, adam)
        if adam.beside_descent:
            reach = _descent_reach(method, adam_rounding.at_vertices(problem))
            details["objective_descent"] = float(np.sum(reach))
        return _finish(kernel, chosen, params, placement, specs[name]), details

    return round_layer


class _Posing(NamedTuple):
    """How `moments_lib.Units` enter the problem of a layer; arrays of float32.

    Attributes:
      of_weights: What weights and steps are multiplied with, in the kernel's shape.
      outputs: `[*1, Cout]`, the unit of each output channel.
      weight: `[groups, Cout / groups]`, `RoundingProblem.weight`.
    """

    of_weights: np.ndarray
    outputs: np.ndarray
    weight: np.ndarray

    def padded(self, shape: tuple[int, int]) -> "_Posing":
        """The same for a kernel without groups that went through `pad_kernel`."""
        rows, columns = shape
        matrix = self.of_weights.reshape(-1, self.outputs.size)
        more = (0, columns - self.outputs.size)
        return _Posing(
            np.pad(matrix, ((0, rows - len(matrix)), more)),
            np.pad(self.outputs.reshape(1, -1), ((0, 0), more), constant_values=1.0),
            np.pad(self.weight, ((0, 0), more)),
        )


def _posing(
    geometry: layers_lib.Geometry, units: moments_lib.Units | None
) -> tuple[_Posing, float]:
    """A layer's `_Posing`, and the unit in which it tells objectives, not squared."""
    units = moments_lib.Units.plain(geometry) if units is None else units
    top = float(np.max(units.outputs))
    shares = np.square(units.outputs / top).reshape(geometry.groups, -1)
    of_weights = np.broadcast_to(units.of_weights(geometry), geometry.kernel_shape)
    outputs = units.outputs.reshape(*[1] * (of_weights.ndim - 1), -1)
    arrays = of_weights, outputs, shares
    return _Posing(*(x.astype(np.float32) for x in arrays)), top


def _draw(key: jax.Array, layers: list[layers_lib.Layer]) -> dict[str, np.ndarray]:
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


def _trimmed(result: Rounded, geometry: layers_lib.Geometry) -> Rounded:
    """The layer's own part of a result for its padded kernel."""
    padded = result.kernel.size / math.prod(geometry.kernel_shape)
    kernel, codes, params = jax.tree.map(
        lambda x: common_sizes.trim(x, geometry.kernel_shape), result[:3]
    )
    return Rounded(kernel, codes, params, float(result.flip_rate) * padded)


@functools.partial(jax.jit, static_argnums=4)
def _finish(kernel, chosen, params, placement, spec) -> Rounded:
    return Rounded(
        rounding.rounded_weights(placement, chosen, params).astype(
            shapes.accumulation_dtype(kernel)
        ),
        rounding.codes(placement, chosen, spec),
        params,
        rounding.flip_rate(placement, chosen),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _round_blindly(name, spec, kernel, params, draws, strength, size) -> Rounded:
    placement = rounding.place(kernel, params, spec)
    if name in ("noise", "counter_shift"):
        if name == "noise":
            codes = blind_rounding.noisy_codes(
                draws, kernel, params, spec, deviation=strength
            )
        else:
            codes = blind_rounding.counter_shifted_codes(
                kernel, params, spec, strength=strength
            )
        moved = codes != rounding.codes(placement, placement.nearest, spec)
        return Rounded(
            quantization.dequantize(codes, params).astype(
                shapes.accumulation_dtype(kernel)
            ),
            codes,
            params,
            jnp.mean(moved.astype(jnp.float32)),
        )
    error = rounding.rounding_error(kernel, placement, params)
    chosen = {
        "nearest": lambda: rounding.nearest_rounding(placement),
        "floor": lambda: jnp.zeros_like(placement.nearest),
        "ceil": lambda: jnp.where(placement.free, 1.0, 0.0),
        "flipped": lambda: rounding.flipped_rounding(placement),
        "stochastic": lambda: rounding.threshold_rounding(draws, placement),
        "random": lambda: blind_rounding.random_flips(
            draws, placement, strength * size
        ),
        "top_error": lambda: blind_rounding.largest_error_flips(
            error, placement, strength * size
        ),
    }[name]()
    return _finish(kernel, chosen, params, placement, spec)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _round_split(spec, num_splits, kernel) -> Rounded:
    codes, params = channel_splitting.split_codes(kernel, spec, num_splits=num_splits)
    steps = jnp.round(quantization.divide(kernel, params.scale))
    unsplit = steps.astype(jnp.int32) + params.zero_point
    return Rounded(
        quantization.dequantize(codes, params).astype(
            shapes.accumulation_dtype(kernel)
        ),
        codes,
        params,
        jnp.mean((codes.astype(jnp.int32) != unsplit).astype(jnp.float32)),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _pose(geometry, spec, method, moments, kernel, params, posed, flip_weight):
    """Placement and `RoundingProblem` of a layer, stacked over its groups."""
    placement = rounding.place(kernel, params, spec)
    as_matrix = functools.partial(layers_lib.as_matrix, geometry)
    # In units of the output; the price is one of its square, as the error is.
    error = rounding.rounding_error(kernel, placement, params) / posed.outputs
    price = flip_weight * losses.rounding_error_weight(error, form=method.flip_form)
    if method.flip_unit == "step":
        # error / step * (step^2 * mean diagonal of the Gram matrix of live inputs),
        # with inputs in the largest of their units
        inputs = as_matrix(posed.of_weights * posed.outputs)[:, :, 0]
        largest = jnp.max(inputs)
        rows = jnp.maximum(moments.count, 1.0)[:, None]
        diagonal = jnp.diagonal(moments.gram, axis1=1, axis2=2) / rows
        diagonal = diagonal * jnp.square(inputs / largest)
        live = jnp.sum((diagonal > 0.0).astype(jnp.float32), axis=1)
        power = jnp.sum(diagonal, axis=1) / jnp.maximum(live, 1.0)
        step = jnp.broadcast_to(params.scale * largest / posed.outputs, kernel.shape)
        price = as_matrix(price * largest) * as_matrix(step) * power[:, None, None]
    else:
        price = as_matrix(price / posed.outputs)
    price = jnp.where(as_matrix(placement.free), price, 0.0)
    weights = {
        "step": as_matrix(
            jnp.where(placement.free, params.scale * posed.of_weights, 0.0)
        ),
        "fraction": as_matrix(placement.fraction),
        "nearest": as_matrix(placement.nearest),
        "stay_cost": jnp.minimum(jnp.nan_to_num(price), _HIGHEST_PRICE),
        "weight": posed.weight,
    }
    problem = jax.vmap(lambda m, w: solvers.rounding_problem(m, **w))(moments, weights)
    return placement, problem


class _Descent(NamedTuple):
    """Objective of nearest, trace and sweeps, stacked over groups."""

    nearest: jax.Array
    trace: jax.Array
    sweeps: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _descend(geometry, spec, method, mesh, moments, kernel, params, posed, flip_weight):
    """Whole on every device, whoever has solved which channels."""
    placement, problem = _pose(
        geometry, spec, method, moments, kernel, params, posed, flip_weight
    )
    if mesh is not None:
        problem = _split_channels(problem, mesh)
    solution = moments_lib.per_group(functools.partial(_solve, method), problem)
    chosen = layers_lib.as_kernel(geometry, solution.rounding)
    result = _finish(kernel, chosen, params, placement, spec)
    if method.name == "coordinate" and method.starts == ("nearest",):
        nearest = solution.trace[:, 0]
    else:
        nearest = jax.vmap(
            lambda own: solvers.over_channels(own, solvers.objective(own, own.nearest))
        )(problem)
    outcome = result, _Descent(nearest, solution.trace, solution.sweeps)
    if mesh is None:
        return outcome
    return jax.lax.with_sharding_constraint(outcome, sharding.replicated(mesh))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _walk_path(
    geometry, spec, method, mesh, moments, kernel, params, posed, flip_weights
):
    """Output error and number of flipped weights at each flip weight, `[P]`."""
    _, problem = _pose(geometry, spec, method, moments, kernel, params, posed, 1.0)
    if mesh is not None:
        problem = _split_channels(problem, mesh)

    def walk(problem):
        path = solvers.flip_weight_path(
            problem, flip_weights, max_sweeps=method.max_sweeps
        )
        flipped = (path.rounding != problem.nearest[None]).astype(jnp.float32)
        return path.output_error, jnp.sum(flipped, axis=(1, 2))

    outcome = jax.tree.map(
        lambda x: jnp.sum(x, axis=0), moments_lib.per_group(walk, problem)
    )
    if mesh is None:
        return outcome
    return jax.lax.with_sharding_constraint(outcome, sharding.replicated(mesh))


@functools.partial(jax.jit, static_argnums=0)
def _descent_reach(method: Method, problem: solvers.RoundingProblem) -> jax.Array:
    """Objective of coordinate descent with the options of `method`, `[groups]`."""
    descent = dataclasses.replace(method, name="coordinate")
    solution = moments_lib.per_group(functools.partial(_solve, descent), problem)
    return solution.trace[:, -1]


def _split_channels(problem: solvers.RoundingProblem, mesh: Mesh):
    """The problem `[groups, ..., C]` with its channels split, where they divide."""
    if problem.fraction.shape[-1] % mesh.size:
        return problem

    def split(x):
        spec = PartitionSpec(*[None] * (x.ndim - 1), sharding.DATA_AXIS)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    # All channels share the Gram matrix.
    return jax.tree.map(split, problem)._replace(gram=problem.gram)


def _solve(method: Method, problem: solvers.RoundingProblem) -> solvers.Solution:
    if method.name == "feedback":
        chosen = error_feedback.error_feedback(problem)
        reached = solvers.over_channels(problem, solvers.objective(problem, chosen))
        return solvers.Solution(chosen, reached[None], jnp.int32(0))
    starts = {
        "nearest": lambda: problem.nearest,
        "feedback": lambda: error_feedback.error_feedback(problem),
        "flipped": lambda: jnp.where(
            problem.step > 0.0, 1.0 - problem.nearest, problem.nearest
        ),
    }
    chosen = [starts[name]() for name in method.starts]
    sweeps = method.max_sweeps
    if len(chosen) == 1:
        return solvers.coordinate_descent(problem, chosen[0], max_sweeps=sweeps)
    return solvers.descend_from_all(problem, jnp.stack(chosen), max_sweeps=sweeps)
