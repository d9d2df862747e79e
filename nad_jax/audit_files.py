# SPDX-License-Identifier: Apache-2.0
"""The two sides of an audit: read, and brought to one form.

The integer file comes from a stranger: what its readers have not checked and an audit
depends on is checked here, before anything is allocated by it.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.core import grids as grids_lib
from nad_jax.core import quantization
from nad_jax.interop import (
    artifact,
    bounded_file,
    name_maps,
    onnx_codes,
    reader,
    safetensors_file,
)
from nad_jax.models import layers as layers_lib
from nad_jax.models import sums

MAX_SIDE = 2**14


@dataclasses.dataclass(frozen=True)
class FloatModel:
    """What the integers are said to be.

    Attributes:
      module: The Linen module.
      variables: Its variables.
      apply_kwargs: Keyword arguments of its call.
      source: What messages call it.
      sha256: Of its file, in hexadecimal; None if there is none.
    """

    module: nn.Module
    variables: Mapping[str, Any]
    apply_kwargs: dict[str, Any]
    source: str
    sha256: str | None


@dataclasses.dataclass(frozen=True)
class IntegerFile:
    """An integer file, whatever its format.

    Attributes:
      source: What messages call it.
      format: "artifact" or "onnx".
      codes: Layer name -> int8 or uint8 `[*window, Cin / groups, Cout]`.
      quant_params: Layer name -> grid of the kernel, of its rank.
      specs: Layer name -> what the file says that grid is; empty if it does not.
      storage_bits: Layer name -> width of the type of its codes; empty where `specs`
        tells more.
      act_params: Layer name -> grid of its input `[]`; name of a sum's operand
        (`models.sums`) -> its grid. Empty for float activations.
      act_spec: Description of those grids, None for float activations.
      image_shape: `(H, W, C)` as the file has it, unchecked; None if it does not say.
      content: Variables of an artefact, `onnx.ModelProto` of an ONNX file.
      sha256: Of the file, in hexadecimal.
    """

    source: str
    format: str
    codes: Mapping[str, np.ndarray]
    quant_params: Mapping[str, quantization.QuantParams]
    specs: Mapping[str, quantization.QuantSpec]
    storage_bits: Mapping[str, int]
    act_params: Mapping[str, quantization.QuantParams]
    act_spec: quantization.QuantSpec | None
    image_shape: Any
    content: Any
    sha256: str


def read_floats(
    float_model: str | os.PathLike[str] | Mapping[str, Any],
    *,
    module: nn.Module | None,
    arch: str | None,
    apply_kwargs: Mapping[str, Any] | None,
) -> FloatModel:
    """The float model in a file, or made of variables and their module.

    Raises:
      InputError: a file that cannot be read, or variables without a module.
    """
    if isinstance(float_model, Mapping):
        if module is None:
            raise errors.InputError("audit of variables needs module=, their module")
        kwargs = dict(apply_kwargs or {})
        return FloatModel(module, float_model, kwargs, "the float model", None)
    path = os.fspath(float_model)
    checkpoint = reader.read_checkpoint(path)
    converted = name_maps.convert(checkpoint.arrays, arch, source=path)
    kwargs = {"train": False} if apply_kwargs is None else dict(apply_kwargs)
    source = bounded_file.shown(path, 200)
    return FloatModel(
        converted.model, converted.variables, kwargs, source, checkpoint.sha256
    )


def read_integers(path: str | os.PathLike[str]) -> IntegerFile:
    """The integers in an artefact or an ONNX file, told apart by content.

    Raises:
      InputError: neither, or one that is damaged.
    """
    with bounded_file.BoundedFile(path) as file:
        is_artifact = safetensors_file.looks_like_safetensors(file)
        source = file.label
    if is_artifact:
        stored = artifact.read_artifact(path)
        assert stored.sha256 is not None
        return IntegerFile(
            source=source,
            format="artifact",
            codes=stored.codes,
            quant_params=stored.quant_params,
            specs=stored.specs,
            storage_bits={},
            act_params=stored.act_params,
            act_spec=stored.act_spec,
            image_shape=stored.card.get("image_shape"),
            content=stored.variables,
            sha256=stored.sha256,
        )
    read = onnx_codes.read_onnx(path)
    act_spec = None
    if read.act_bits is not None:
        act_spec = grids_lib.GRIDS["plain"].act_spec(read.act_bits)
    return IntegerFile(
        source=source,
        format="onnx",
        codes=read.codes,
        quant_params=read.quant_params,
        specs={},
        storage_bits=read.storage_bits,
        act_params=read.act_params,
        act_spec=act_spec,
        image_shape=read.image_shape,
        content=read.model,
        sha256=read.sha256,
    )


def image_shape(integers: IntegerFile, images: jax.Array | None) -> tuple[int, ...]:
    """`(H, W, C)` of the clean images, or without any what the file says.

    Raises:
      InputError: the file does not say, or says what no image has.
    """
    if images is not None:
        return images.shape[1:]
    shape = integers.image_shape
    if shape is None:
        raise errors.InputError(
            f"{integers.source} does not say how large its images are; give images="
        )
    sizes = shape if isinstance(shape, (list, tuple)) else []
    good = len(sizes) == 3 and all(type(n) is int for n in sizes)
    if not good or not all(1 <= n <= MAX_SIDE for n in sizes):
        said = ", ".join(map(bounded_file.shown, sizes[:8] or [shape]))
        raise errors.InputError(
            f"{integers.source} says its images are {said}; accepted are three "
            f"integers from 1 to {MAX_SIDE}: height, width, channels"
        )
    return tuple(sizes)


def find_layers(
    floats: FloatModel, integers: IntegerFile, shape: tuple[int, ...]
) -> list[layers_lib.Layer]:
    """The layers of the float model, once the integers are known to fit them.

    Args:
      floats: The model.
      integers: The file.
      shape: `(H, W, C)`.

    Raises:
      InputError: other layers or shapes, or a grid that fits no layer.
    """
    layers = layers_lib.find_layers(
        floats.module,
        floats.variables,
        jax.ShapeDtypeStruct((1, *shape), jnp.float32),
        apply_kwargs=floats.apply_kwargs,
    )
    strangers = f"{integers.source} does not belong to {floats.source}"
    names = {layer.name for layer in layers}
    odd = sorted(names ^ set(integers.codes))
    if odd:
        where = "no codes" if odd[0] in names else "codes of an unknown layer"
        raise errors.InputError(f"{strangers}: {where} {odd[0]!r}")
    for layer in layers:
        given, expected = integers.codes[layer.name].shape, layer.geometry.kernel_shape
        if given != expected:
            raise errors.InputError(
                f"{strangers}: codes of {layer.name!r} are {list(given)}, its kernel "
                f"{list(expected)}"
            )
        _check_channels(integers, layer)
    inputs = {name for name in integers.act_params if not sums.is_operand(name)}
    needed = set() if integers.act_spec is None else names
    if inputs != needed or (integers.act_params and not inputs):
        raise errors.InputError(
            f"{integers.source}: some layers' inputs have a grid, some none"
        )
    return layers


def _check_channels(integers: IntegerFile, layer: layers_lib.Layer) -> None:
    """Refuses grids that are neither per tensor nor per output channel."""
    kernel_shape = layer.geometry.kernel_shape
    scale_shape = integers.quant_params[layer.name].scale.shape
    ones = (1,) * (len(kernel_shape) - 1)
    spec = integers.specs.get(layer.name)
    axes = (None, -1, len(kernel_shape) - 1)
    if scale_shape not in ((*ones, 1), (*ones, kernel_shape[-1])):
        raise errors.InputError(
            f"{integers.source}: scales of {layer.name!r} have shape "
            f"{list(scale_shape)}; accepted are one number, or one for each of its "
            f"{kernel_shape[-1]} output channels"
        )
    if spec is not None and spec.channel_axis not in axes:
        raise errors.InputError(
            f"{integers.source}: channel_axis of {layer.name!r} is "
            f"{spec.channel_axis}; accepted are {', '.join(map(str, axes))}"
        )


def in_same_form(
    variables: Mapping[str, Any],
    layers: list[layers_lib.Layer],
    integers: IntegerFile,
) -> tuple[Any, bool]:
    """The variables as the file has them, and whether BatchNorm is folded there."""
    if all(layer.batch_norm is None for layer in layers):
        return variables, False
    forms = (variables, layers_lib.fold_batch_norm(variables, layers))
    misfits = []
    for form in forms:
        missed = 0.0
        for layer in layers:
            kernel = np.asarray(layers_lib.get_in(form["params"], layer.path)["kernel"])
            params = integers.quant_params[layer.name]
            shift = integers.codes[layer.name] - np.asarray(
                params.zero_point, np.float64
            )
            missed += np.mean(np.abs(shift - kernel / np.asarray(params.scale)) > 1)
        misfits.append(missed)
    folded = bool(misfits[1] < misfits[0])
    return forms[folded], folded
