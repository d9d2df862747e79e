# SPDX-License-Identifier: Apache-2.0
"""Models for other runtimes, with the integers that were chosen here.

A rounding that was learned survives an export only if no later tool rounds again: the
writers of this room copy codes and scales, and none takes a float kernel to quantize.
Importing this package loads neither onnx nor onnxruntime (`nad_jax[export]`).
"""
