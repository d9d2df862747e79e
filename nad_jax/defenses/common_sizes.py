# SPDX-License-Identifier: Apache-2.0
"""Layers padded to few sizes, so that they share compiled programs.

Rounding a small layer takes milliseconds; compiling a program for its shape takes a
second. A kernel `[*window, Cin, Cout]` without channel groups is a matrix `[K, C]`, and
rows and columns of zeros change nothing: zero is on every grid, so these weights are
pinned, and nobody feeds or reads them. The padding is done on the host, where it needs
no program of its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax.core import quantization, solvers

_MULTIPLE = 64


def padded_size(size: int) -> int:
    """The size next to `size` that is in use."""
    return size + -size % _MULTIPLE


def pad_kernel(kernel: Any) -> np.ndarray:
    """The kernel as a matrix `[K', C']`, zeros below and to the right of it."""
    matrix = np.asarray(kernel).reshape(-1, kernel.shape[-1])
    return _pad(matrix, [padded_size(n) for n in matrix.shape])


def pad_moments(moments: solvers.Moments) -> solvers.Moments:
    """Moments `[groups, ...]` of a layer whose kernel went through `pad_kernel`."""
    rows, columns = (padded_size(n) for n in moments.drift.shape[-2:])
    groups = moments.drift.shape[0]
    return solvers.Moments(
        _pad(moments.gram, (groups, rows, rows)),
        _pad(moments.drift, (groups, rows, columns)),
        _pad(moments.drift_power, (groups, columns)),
        moments.count,
    )


def kernel_params(
    kernel: Any, spec: quantization.QuantSpec, padded: Any = None
) -> quantization.QuantParams:
    """The kernel's grid, broadcastable to `padded` (default: to the kernel itself).

    Ranges that depend on how many weights there are must not see the padding.
    """
    if padded is None:
        return _calibrate(kernel, spec)
    if spec.range_method not in ("percentile", "aciq"):
        return _calibrate(padded, spec)
    params = _calibrate(np.asarray(kernel).reshape(-1, kernel.shape[-1]), spec)
    widths = (1, 1 if spec.channel_axis is None else padded.shape[1])
    scale, zero_point = (_pad(x, widths) for x in params)
    # Nobody is on the grid of a channel that does not exist, but it divides.
    return quantization.QuantParams(jnp.where(scale > 0, scale, 1), zero_point)


_calibrate = jax.jit(quantization.calibrate, static_argnums=1)


def trim(matrix: Any, kernel_shape: tuple[int, ...]) -> jax.Array:
    """What belongs to the kernel in a result `[K', C']`, in the kernel's rank.

    Axes of size 1, as those of scales, stay 1.
    """
    channels = kernel_shape[-1]
    rows = int(np.prod(kernel_shape[:-1]))
    matrix = np.asarray(matrix)
    own = matrix[:rows, :channels]
    if matrix.shape[0] > 1:
        return jax.device_put(own.reshape(kernel_shape))
    return jax.device_put(own.reshape(*[1] * (len(kernel_shape) - 1), own.shape[-1]))


def _pad(array: Any, shape: Any) -> Any:
    if tuple(array.shape) == tuple(shape):
        return array  # Large layers stay on the device.
    array = np.asarray(array)
    widths = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
    return np.pad(array, widths)
