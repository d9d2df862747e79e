# SPDX-License-Identifier: Apache-2.0
"""Finding and running the Conv and Dense layers of any Flax Linen module.

Nothing here knows about quantization or attacks: a `Layer` says where a kernel lives
and what linear map it is (`Geometry`); `run` computes that map with any kernel, and
`unfold` turns it into a plain matrix product. The module is never edited; layers are
seen by intercepting their calls while the module is traced for shapes, which costs no
arithmetic.
"""

import dataclasses
import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen import linear as flax_linear
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core as jax_core

from nad_jax import errors

Path = tuple[str, ...]
PADDING_MODES = ("SAME", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")


@dataclasses.dataclass(frozen=True)
class Geometry:
    """A convolution or dense product, without its weights; hashable.

    Attributes:
      kernel_shape: `[*window, Cin / groups, Cout]`; Dense has no window.
      strides: One per window axis.
      dilation: One per window axis.
      padding: One of `PADDING_MODES` or a (low, high) pair per window axis.
      groups: Independent channel groups; 1 for Dense.
      dtype: Name of the type the layer computes in; None = what its inputs and kernel
        promote to.
    """

    kernel_shape: tuple[int, ...]
    strides: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    padding: str | tuple[tuple[int, int], ...] = ()
    groups: int = 1
    dtype: str | None = None

    @property
    def window(self) -> tuple[int, ...]:
        return self.kernel_shape[:-2]

    @property
    def num_inputs(self) -> int:
        """K, inputs that one output sees."""
        return math.prod(self.kernel_shape[:-1])


@dataclasses.dataclass(frozen=True)
class Layer:
    """A Conv or Dense that a module calls.

    Attributes:
      path: Keys from the top of `variables["params"]` to the layer's own dict.
      geometry: The linear map it computes.
      calls: How often one forward pass calls it (2 or more = shared weights).
      batch_norm: Path of the BatchNorm that alone takes the layer's output, or None.
      batch_norm_epsilon: Its epsilon.
    """

    path: Path
    geometry: Geometry
    calls: int
    batch_norm: Path | None = None
    batch_norm_epsilon: float = 0.0

    @property
    def name(self) -> str:
        return "/".join(self.path)


def get_in(tree: Mapping[str, Any], path: Path) -> Any:
    """The subtree of a nested mapping at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def set_in(tree: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    """A copy of a nested mapping with `value` at `path`; shares all other leaves."""
    copy = dict(tree)
    copy[path[0]] = value if len(path) == 1 else set_in(tree[path[0]], path[1:], value)
    return copy


def is_layer_call(context: nn.module.InterceptorContext) -> bool:
    """Whether an intercepted method is the forward call of a bound Conv or Dense."""
    return (
        isinstance(context.module, (nn.Conv, nn.Dense))
        and context.method_name == "__call__"
        and context.module.scope is not None
        and bool(context.module.path)
    )


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> jax.Array:
    """What an intercepted call of a Conv or Dense is given, by position or by name.

    It takes nothing else, so `next_fun(x)` is the same call with another input.
    """
    return args[0] if args else kwargs["inputs"]


def find_layers(
    module: nn.Module,
    variables: Mapping[str, Any],
    images: jax.Array | jax.ShapeDtypeStruct,
    *,
    apply_kwargs: Mapping[str, Any] | None = None,
) -> list[Layer]:
    """The Conv and Dense layers in the order in which a forward pass first calls them.

    Args:
      module: Any Linen module.
      variables: Its variables, with the collection "params".
      images: Inputs; only shape and dtype are used, so a `jax.ShapeDtypeStruct` will
        do.
      apply_kwargs: Keyword arguments of the module's call, e.g. `{"train": False}`.

    Raises:
      InputError: there is no such layer; the module does not accept the images; a
        layer's kernel is stacked by `nn.scan` or `nn.vmap`, or computed from the stored
        one by `nn.WeightNorm` or `nn.SpectralNorm`.

    Warns about kernels that the forward pass does not use, or that belong to neither
    Conv nor Dense: nobody will quantize them.
    """
    params = variables.get("params", {})
    found = _trace_layers(module, variables, images, apply_kwargs or {})
    kernels = _kernel_paths(params)
    if not set(kernels) <= set(found):
        # A block under `nn.jit` that ran before is not traced again, and hides its
        # layers; without jit there is nothing to be remembered.
        with jax.disable_jit():
            found = _trace_layers(module, variables, images, apply_kwargs or {})
    if not found:
        bare = isinstance(module, (nn.Conv, nn.Dense))
        raise errors.InputError(
            f"{type(module).__name__} calls no nn.Conv or nn.Dense, so there is "
            f"nothing to quantize{' (make it part of a module)' if bare else ''}"
        )
    for path in kernels:
        if path not in found:
            warnings.warn(
                f"kernel {'/'.join(path)} is left in float: the forward pass does not "
                "use it as an nn.Conv or nn.Dense",
                stacklevel=2,
            )
    return list(found.values())


def _trace_layers(module, variables, images, apply_kwargs) -> dict[Path, Layer]:
    params = variables.get("params", {})
    found: dict[Path, Layer] = {}
    producers: dict[int, Path] = {}  # id of an output tracer -> layer that made it
    alive = []  # keeps those tracers alive, so that no id is used twice
    normed: dict[Path, tuple[Path, float]] = {}

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, (nn.WeightNorm, nn.SpectralNorm)):
            raise errors.InputError(
                f"{'/'.join(context.module.path)} computes kernels from the stored "
                "ones; quantize the module without it"
            )
        if isinstance(context.module, nn.BatchNorm):
            x = args[0] if args else kwargs.get("x")
            producer = producers.get(id(x))
            # One mean for each index of the last axis.
            if producer is not None and context.module.axis in (-1, x.ndim - 1):
                normed[producer] = (context.module.path, context.module.epsilon)
        outputs = next_fun(*args, **kwargs)
        if not is_layer_call(context):
            return outputs
        path = context.module.path
        if path in found:
            found[path] = dataclasses.replace(found[path], calls=found[path].calls + 1)
            return outputs
        kernel = context.module.variables["params"]["kernel"]
        stored = get_in(params, path)["kernel"]
        if stored.shape != kernel.shape:
            raise errors.InputError(
                f"layer {'/'.join(path)}: kernel is stored as {stored.shape} but used "
                f"as {kernel.shape}; layers stacked by nn.scan or nn.vmap are not "
                "supported, unroll them"
            )
        found[path] = Layer(
            path=path, geometry=_geometry(context.module, kernel.shape), calls=1
        )
        # Named, so that its uses can be counted afterwards.
        outputs = checkpoint_name(outputs, "/".join(path))
        producers[id(outputs)] = path
        alive.append(outputs)
        return outputs

    def forward(variables, images):
        with nn.intercept_methods(record):
            return module.apply(variables, images, **apply_kwargs)

    try:
        jaxpr = jax.make_jaxpr(forward)(variables, images).jaxpr
    except errors.InputError:
        raise
    except Exception as error:
        # An `assert` without a message has no line at all.
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        raise errors.InputError(
            f"{type(module).__name__} cannot be applied to images of shape "
            f"{np.shape(images)} ({type(error).__name__}: {reason})"
        ) from error
    uses = _count_uses(jaxpr)
    for path, (norm, epsilon) in normed.items():
        # What another consumer sees must not be scaled: a stem whose output is also
        # an identity shortcut keeps its BatchNorm.
        if uses.get("/".join(path)) != 1:
            continue
        found[path] = dataclasses.replace(
            found[path], batch_norm=norm, batch_norm_epsilon=epsilon
        )
    return found


def _count_uses(jaxpr) -> dict[str, int]:
    """How often each named value is used, by name; only what is not inside a call."""
    names = {
        equation.outvars[0]: equation.params["name"]
        for equation in jaxpr.eqns
        if equation.primitive.name == "name"
    }
    uses = dict.fromkeys(names.values(), 0)
    users = [variable for equation in jaxpr.eqns for variable in equation.invars]
    for variable in [*users, *jaxpr.outvars]:
        # Literals cannot be hashed.
        if isinstance(variable, jax_core.Var) and variable in names:
            uses[names[variable]] += 1
    return uses


def _kernel_paths(params: Mapping[str, Any], prefix: Path = ()) -> list[Path]:
    paths = []
    for key, value in params.items():
        if isinstance(value, Mapping):
            paths += _kernel_paths(value, (*prefix, key))
        elif key == "kernel":
            paths.append(prefix)
    return paths


def _geometry(module: nn.Module, kernel_shape: tuple[int, ...]) -> Geometry:
    dtype = None if module.dtype is None else jnp.dtype(module.dtype).name
    # Whatever else these classes can do is not the plain product that `run` computes.
    plain = {"dot_general", "dot_general_cls"}
    if isinstance(module, nn.Conv):
        plain = {"mask", "conv_general_dilated", "conv_general_dilated_cls"}
        plain |= set() if _is_one(module.input_dilation) else {"input_dilation"}
    used = sorted(name for name in plain if getattr(module, name, None) is not None)
    if type(module).__call__ not in (nn.Dense.__call__, nn.Conv.__call__):
        used.append("its own __call__")
    if used:
        raise errors.InputError(
            f"layer {'/'.join(module.path)} uses {', '.join(used)}; only plain "
            "convolutions and dense products can be quantized"
        )
    if isinstance(module, nn.Dense):
        return Geometry(kernel_shape, dtype=dtype)
    rank = len(kernel_shape) - 2
    padding = flax_linear.canonicalize_padding(module.padding, rank)
    if isinstance(padding, str) and padding not in PADDING_MODES:
        raise errors.InputError(
            f"convolution padding {padding!r} is not supported; use "
            f"{', '.join(PADDING_MODES)} or explicit numbers"
        )
    return Geometry(
        kernel_shape,
        strides=_per_axis(module.strides, rank),
        dilation=_per_axis(module.kernel_dilation, rank),
        padding=padding if isinstance(padding, str) else tuple(padding),
        groups=module.feature_group_count,
        dtype=dtype,
    )


def _is_one(dilation: Any) -> bool:
    return dilation is None or all(d == 1 for d in _per_axis(dilation, 1))


def _per_axis(value: Any, rank: int) -> tuple[int, ...]:
    if value is None:
        return (1,) * rank
    return (value,) * rank if isinstance(value, int) else tuple(value)


def run(
    geometry: Geometry,
    kernel: jax.Array,
    inputs: jax.Array,
    bias: jax.Array | None = None,
) -> jax.Array:
    """The layer's output, `[*batch, *positions, Cout]`; without bias unless given."""
    outputs = _run_without_bias(geometry, kernel, inputs)
    if bias is None:
        return outputs
    bias = bias.astype(outputs.dtype)
    return outputs + jnp.expand_dims(bias, range(outputs.ndim - 1))


def _run_without_bias(geometry, kernel, inputs):
    dtype = geometry.dtype or jnp.promote_types(inputs.dtype, kernel.dtype)
    inputs, kernel = inputs.astype(dtype), kernel.astype(dtype)
    if not geometry.window:
        return inputs @ kernel
    rank = len(geometry.window)
    batch = inputs.shape[: -rank - 1]
    inputs = padded(geometry, inputs.reshape((-1, *inputs.shape[-rank - 1 :])))
    letters = "DHW"[-rank:]
    outputs = jax.lax.conv_general_dilated(
        inputs,
        kernel,
        window_strides=geometry.strides,
        padding="VALID",
        rhs_dilation=geometry.dilation,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=geometry.groups,
    )
    return outputs.reshape((*batch, *outputs.shape[1:]))


def as_matrix(geometry: Geometry, kernel: jax.Array) -> jax.Array:
    """Kernel as `[groups, K, Cout / groups]`, rows in the order of `unfold`."""
    groups, channels = geometry.groups, geometry.kernel_shape[-1]
    matrix = kernel.reshape(geometry.num_inputs, groups, channels // groups)
    return jnp.swapaxes(matrix, 0, 1)


def as_kernel(geometry: Geometry, matrix: jax.Array) -> jax.Array:
    """Inverse of `as_matrix`."""
    return jnp.swapaxes(matrix, 0, 1).reshape(geometry.kernel_shape)


def unfold(geometry: Geometry, inputs: jax.Array) -> jax.Array:
    """Layer inputs as `[groups, n, K]`: one row for each output position.

    `unfold(x) @ as_matrix(kernel)` is `run(kernel, x)`, flattened over batch and
    positions. Each window offset contributes a strided slice, which is a copy; a
    convolution with an identity kernel would give the same at K times the cost.
    """
    window = geometry.window
    if not window:
        return inputs.reshape(1, -1, inputs.shape[-1])
    rank = len(window)
    inputs = padded(geometry, inputs.reshape((-1, *inputs.shape[-rank - 1 :])))
    strides, dilation = geometry.strides, geometry.dilation
    sizes = [
        (inputs.shape[a + 1] - (window[a] - 1) * dilation[a] - 1) // strides[a] + 1
        for a in range(rank)
    ]
    slices = []
    for offset in itertools.product(*(range(size) for size in window)):
        starts = [offset[a] * dilation[a] for a in range(rank)]
        index = tuple(
            slice(starts[a], starts[a] + (sizes[a] - 1) * strides[a] + 1, strides[a])
            for a in range(rank)
        )
        slices.append(inputs[(slice(None), *index)])
    groups, channels = geometry.groups, geometry.kernel_shape[-2]
    # [n, *positions, window, groups * channels] -> [groups, rows, window * channels]
    rows = jnp.stack(slices, axis=-2)
    rows = rows.reshape(-1, len(slices), groups, channels)
    rows = jnp.transpose(rows, (2, 0, 1, 3))
    return rows.reshape(groups, -1, len(slices) * channels)


def padded(geometry: Geometry, inputs: jax.Array) -> jax.Array:
    """Inputs `[n, *positions, C]` with their positions padded as by the layer."""
    mode, pairs = position_padding(geometry, inputs.shape[1:-1])
    pairs = [(0, 0), *pairs, (0, 0)]
    if mode == "constant":
        # Unlike `jnp.pad`, accepts negative numbers: they crop, as in Flax.
        zero = jnp.zeros((), inputs.dtype)
        return jax.lax.pad(inputs, zero, [(low, high, 0) for low, high in pairs])
    return jnp.pad(inputs, pairs, mode=mode)


def position_padding(
    geometry: Geometry, sizes: Sequence[int]
) -> tuple[str, list[tuple[int, int]]]:
    """How a layer pads positions of these sizes: mode, and (before, after) per axis.

    The mode is "constant" (zeros; negative numbers crop), "wrap" or "reflect".
    """
    padding, mode = geometry.padding, "constant"
    reach = [
        (w - 1) * d for w, d in zip(geometry.window, geometry.dilation, strict=True)
    ]
    if padding == "VALID":
        pairs = [(0, 0) for _ in reach]
    elif padding == "SAME":
        totals = [
            max((-(-n // s) - 1) * s + r + 1 - n, 0)
            for n, s, r in zip(sizes, geometry.strides, reach, strict=True)
        ]
        pairs = [(total // 2, total - total // 2) for total in totals]
    elif padding in ("CIRCULAR", "REFLECT"):
        mode = "wrap" if padding == "CIRCULAR" else "reflect"
        pairs = [(r // 2, r - r // 2) for r in reach]
    elif padding == "CAUSAL":
        pairs = [(r, 0) for r in reach]
    else:
        assert not isinstance(padding, str), padding
        pairs = list(padding)
    return mode, pairs


def batch_norm_factor(layer: Layer, variables: Mapping[str, Any]) -> jax.Array:
    """What the BatchNorm behind a layer multiplies its channels by, `[Cout]`.

    `scale / sqrt(var + epsilon)`, in evaluation mode; 0 where the scale is.

    Args:
      layer: From `find_layers`, with a `batch_norm`.
      variables: With collections "params" and "batch_stats".

    Raises:
      InputError: a BatchNorm without running statistics.
    """
    norm, stats = _batch_norm_of(layer, variables)
    scale = norm.get("scale", jnp.ones_like(stats["var"]))
    return scale / jnp.sqrt(stats["var"] + layer.batch_norm_epsilon)


def _batch_norm_of(layer, variables) -> tuple[dict[str, Any], dict[str, Any]]:
    """Scale and bias, where it has them, and the running statistics."""
    assert layer.batch_norm is not None
    try:
        stats = dict(get_in(variables["batch_stats"], layer.batch_norm))
    except KeyError:
        raise errors.InputError(
            f"BatchNorm {'/'.join(layer.batch_norm)} has no running statistics to fold"
        ) from None
    try:
        return dict(get_in(variables["params"], layer.batch_norm)), stats
    except KeyError:  # neither scale nor bias
        return {}, stats


def fold_batch_norm(
    variables: Mapping[str, Any], layers: list[Layer]
) -> dict[str, Any]:
    """Variables of the same structure in which every BatchNorm only shifts.

    A BatchNorm that follows a layer directly multiplies its channels by
    `batch_norm_factor` and adds a constant. The factor moves into the kernel (and
    bias), the constant stays in the BatchNorm's own bias; its mean becomes 0 and its
    variance `1 - epsilon`, so that in evaluation mode the module computes what it did
    before. Quantization grids of a runtime that folds BatchNorm are those of the folded
    kernels.

    Args:
      variables: With collections "params" and "batch_stats".
      layers: From `find_layers`; those without a `batch_norm` are left alone.

    Raises:
      InputError: a BatchNorm without running statistics or a shared layer that
        feeds one.
    """
    folded = dict(variables)
    for layer in layers:
        if layer.batch_norm is None:
            continue
        if layer.calls > 1:
            raise errors.InputError(
                f"layer {layer.name} is called {layer.calls} times; its BatchNorm "
                "cannot be folded"
            )
        norm_path = layer.batch_norm
        factor = batch_norm_factor(layer, folded)
        norm, stats = _batch_norm_of(layer, folded)
        own = dict(get_in(folded["params"], layer.path))
        dtype = own["kernel"].dtype
        own["kernel"] = own["kernel"] * jnp.expand_dims(
            factor.astype(dtype), range(own["kernel"].ndim - 1)
        )
        if "bias" in own:
            own["bias"] = own["bias"] * factor.astype(dtype)
        shift = norm.get("bias", jnp.zeros_like(factor)) - stats["mean"] * factor
        stats["mean"] = jnp.zeros_like(stats["mean"])
        stats["var"] = jnp.full_like(stats["var"], 1.0 - layer.batch_norm_epsilon)
        if "scale" in norm:
            norm["scale"] = jnp.ones_like(norm["scale"])
        if "bias" in norm:
            norm["bias"] = shift
        else:
            stats["mean"] = -shift
        folded["params"] = set_in(folded["params"], layer.path, own)
        if norm:
            folded["params"] = set_in(folded["params"], norm_path, norm)
        folded["batch_stats"] = set_in(folded["batch_stats"], norm_path, stats)
    return folded
