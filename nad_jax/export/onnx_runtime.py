# SPDX-License-Identifier: Apache-2.0
"""Running an exported ONNX model on the CPU, with the numbers it was written for."""

import os

import numpy as np

from nad_jax import errors

try:
    import onnx
    import onnxruntime
except ImportError as error:
    raise errors.InputError(
        "running an ONNX model needs the packages onnx and onnxruntime; install "
        f"nad_jax[export] ({error})"
    ) from None

# Quantizers stay nodes of their own, and kernels are dequantized once, when loading.
# Left to itself, ONNX Runtime computes products of float inputs with narrow kernels in
# int8, which moves logits by thousandths.
_NO_INTEGERS = ("session.disable_quant_qdq", "1")


class Session:
    """An ONNX model with the input "images" and the output "logits", loaded once.

    Args:
      model: Path of a file, or its bytes.
      threads: CPU threads; None = as many as ONNX Runtime chooses.
      integers: Whether layers with quantized inputs and 8-bit kernels may be computed
        in integers, as a deployed model would be. Those logits differ from JAX's by
        single steps of the activation grids, which later layers spread; on x86 CPUs
        without VNNI by more, since pairs of products are then added in 16 bits and
        overflow (a deployed model meets that, too). False computes
        them in float32, equal to JAX's up to the order of sums.
      optimized_path: Where to write the graph that ONNX Runtime made of it.

    Raises:
      InputError: not such a model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        *,
        threads: int | None = None,
        integers: bool = True,
        optimized_path: str | os.PathLike[str] | None = None,
    ):
        if threads is not None and threads < 1:
            raise errors.InputError(f"threads must be at least 1, got {threads}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        if threads is not None:
            options.intra_op_num_threads = threads
        source = model if isinstance(model, bytes) else os.fspath(model)
        if optimized_path is not None:
            options.optimized_model_filepath = os.fspath(optimized_path)
        try:
            if not (integers and _quantizes_activations(source)):
                options.add_session_config_entry(*_NO_INTEGERS)
            self._session = onnxruntime.InferenceSession(
                source, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # the classes of both have no common base
            name = "bytes" if isinstance(model, bytes) else source
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise errors.InputError(
                f"{name}: not a model that ONNX Runtime can load ({reason})"
            ) from None
        inputs = self._session.get_inputs()
        outputs = [output.name for output in self._session.get_outputs()]
        if [x.name for x in inputs] != ["images"] or "logits" not in outputs:
            raise errors.InputError(
                'the model must have the input "images" and the output "logits", got '
                f"{[x.name for x in inputs]} and {outputs}"
            )
        self._image_shape = tuple(inputs[0].shape[1:])

    @property
    def metadata(self) -> dict[str, str]:
        """Texts stored with the model."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def logits(self, images: np.ndarray, batch_size: int = 500) -> np.ndarray:
        """Logits `[N, num_classes]` of float32 images `[N, H, W, C]` in [0, 1].

        Raises:
          InputError: images of another type or shape, or a batch size below 1.
        """
        images = np.asarray(images)
        if images.dtype != np.float32 or images.shape[1:] != self._image_shape:
            raise errors.InputError(
                f"the model takes float32 images [N, "
                f"{', '.join(map(str, self._image_shape))}], got {images.dtype} "
                f"{list(images.shape)}"
            )
        if len(images) == 0 or batch_size < 1:
            raise errors.InputError(
                "logits takes at least one image and a batch size of at least 1, got "
                f"{len(images)} and {batch_size}"
            )
        parts = [
            self._session.run(
                ["logits"], {"images": images[start : start + batch_size]}
            )
            for start in range(0, len(images), batch_size)
        ]
        return np.concatenate([np.asarray(part[0]) for part in parts])


def _quantizes_activations(source: str | bytes) -> bool:
    if isinstance(source, bytes):
        model = onnx.load_model_from_string(source)
    else:
        model = onnx.load_model(source, load_external_data=False)
    return any(node.op_type == "QuantizeLinear" for node in model.graph.node)
