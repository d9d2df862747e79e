# SPDX-License-Identifier: Apache-2.0
"""A quantized model as a StableHLO program: one blob for CPU, CUDA and TPU.

The program holds the integers and dequantizes them itself, so what is shipped are the
codes that were evaluated. The batch size stays open.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from nad_jax import errors
from nad_jax.core import quantization

PLATFORMS = ("cpu", "cuda", "tpu")


def to_stablehlo(
    apply: Callable[[Any, jax.Array], Any],
    variables: Mapping[str, Any],
    image_shape: Sequence[int],
    *,
    codes: Mapping[str, Any],
    quant_params: Mapping[str, quantization.QuantParams],
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """The serialized program `images [N, H, W, C] -> logits [N, K]`.

    Args:
      apply: (variables, images) -> logits or (logits, ...), activations quantized or
        not as it likes.
      variables: Of the model; kernels of layers with codes are replaced.
      image_shape: (H, W, C).
      codes: Layer name -> integers in the kernel's shape.
      quant_params: Layer name -> grid of the kernel.
      platforms: Where the program is to run.

    Raises:
      InputError: flatbuffers is not installed.
    """
    codes = {name: np.asarray(array) for name, array in codes.items()}

    def logits(images):
        tree = variables
        for name, integers in codes.items():
            kernel = quantization.dequantize(jnp.asarray(integers), quant_params[name])
            tree = _replaced(tree, ["params", *name.split("/"), "kernel"], kernel)
        output = apply(tree, images)
        return output[0] if isinstance(output, tuple) else output

    (batch,) = jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32)
    exported = jax.export.export(jax.jit(logits), platforms=tuple(platforms))(images)
    try:
        return bytes(exported.serialize())
    except ImportError as error:
        raise errors.InputError(
            f"StableHLO needs flatbuffers ({error}); install nad_jax[export]"
        ) from None


def load(program: bytes) -> Callable[[jax.Array], jax.Array]:
    """`images -> logits` of a program of `to_stablehlo`, on this machine's device.

    A program is code: load only what you made yourself.
    """
    return jax.jit(jax.export.deserialize(bytearray(program)).call)


def _replaced(tree: Mapping[str, Any], path: list[str], leaf: Any) -> dict[str, Any]:
    if not path:
        return leaf
    return {**tree, path[0]: _replaced(tree[path[0]], path[1:], leaf)}
