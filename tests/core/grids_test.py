# SPDX-License-Identifier: Apache-2.0
"""The grids of runtimes, against numbers worked out by hand and their own code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nad_jax import errors
from nad_jax.core import grids, quantization

KERNEL = np.float32([[-1.0, 0.1], [0.3, 0.21], [0.25, -0.06], [0.5, 0.4]])

calibrate = jax.jit(quantization.calibrate, static_argnums=1)


@pytest.mark.parametrize(
    ("preset", "bits", "scales", "zero_points", "codes"),
    [
        ("plain", 8, [1 / 127, 0.4 / 127], [0, 0], [[38, 67], [32, -19]]),
        ("plain", 4, [1 / 7, 0.4 / 7], [0, 0], [[2, 4], [2, -1]]),
        ("pytorch_fbgemm", 8, [1 / 127.5, 0.4 / 127.5], [0, 0], [[38, 67], [32, -19]]),
        ("pytorch_fbgemm", 4, [1 / 7.5, 0.4 / 7.5], [0, 0], [[2, 4], [2, -1]]),
        ("pytorch_qnnpack", 8, [1 / 127.5], [0], [[38, 27], [32, -8]]),
        ("onnxruntime", 8, [1 / 127], [0], [[38, 27], [32, -8]]),
        ("onnxruntime", 4, [1 / 7.5], [0], [[2, 2], [2, 0]]),
        ("litert", 8, [1 / 127, 0.4 / 127], [0, 0], [[38, 67], [32, -19]]),
        ("litert", 4, [1 / 7, 0.4 / 7], [0, 0], [[2, 4], [2, -1]]),
    ],
)
def test_weights_of_a_preset_by_hand(preset, bits, scales, zero_points, codes):
    spec = grids.GRIDS[preset].weight_spec(bits)
    params = calibrate(KERNEL, spec)
    np.testing.assert_allclose(params.scale[0], np.float32(scales), rtol=1e-7)
    np.testing.assert_array_equal(params.zero_point[0], zero_points)
    got = quantization.quantize(jnp.asarray(KERNEL[1:3]), params, spec)
    np.testing.assert_array_equal(got, codes)


@pytest.mark.slow
def test_the_largest_weight_is_clipped_where_all_codes_are_used():
    spec = grids.GRIDS["pytorch_fbgemm"].weight_spec(8)
    params = calibrate(KERNEL, spec)
    codes = quantization.quantize(jnp.asarray(KERNEL), params, spec)
    assert (spec.qmin, spec.qmax) == (-128, 127) and codes[3, 1] == 127


@pytest.mark.slow
def test_the_reference_grid_by_hand():
    """Weights on an affine grid exactly: nothing is gained by a smaller range."""
    codes = np.float32([[0, 1], [255, 0], [102, 255], [17, 201]])
    zero_point, scale = np.float32([102, 1]), np.float32([0.25, 0.125])
    kernel = scale * (codes - zero_point)
    spec = grids.GRIDS["efrap_reference"].weight_spec(8)
    params = calibrate(kernel, spec)
    np.testing.assert_array_equal(params.scale[0], scale)
    np.testing.assert_array_equal(params.zero_point[0], zero_point)
    got = quantization.quantize(jnp.asarray(kernel), params, spec)
    np.testing.assert_array_equal(got, codes)


@pytest.mark.slow
def test_the_reference_grid_gives_up_an_outlier():
    """One weight far out of 15 codes costs less clipped than all others coarser."""
    kernel = np.float32(np.append(np.linspace(0, 1, 4000), 1.6))[:, None]
    spec = grids.GRIDS["efrap_reference"].weight_spec(4)
    scale = float(calibrate(kernel, spec).scale[0, 0])
    tried = {}
    for percent in range(100, 20, -1):
        step = 1.6 * percent / 100 / 15
        rounded = step * np.clip(np.round(kernel.astype(np.float64) / step), 0, 15)
        tried[percent] = np.mean(np.square(rounded - kernel))
    best = min(tried, key=lambda percent: tried[percent])
    assert best < 80
    assert scale == pytest.approx(1.6 * best / 100 / 15, rel=1e-5)


@pytest.mark.parametrize(
    ("preset", "bits", "top"),
    [("plain", 8, 255), ("pytorch_fbgemm", 8, 127), ("onnxruntime", 4, 15)],
)
def test_layer_inputs_are_affine_and_per_tensor(preset, bits, top):
    spec = grids.GRIDS[preset].act_spec(bits)
    assert (spec.qmin, spec.qmax, spec.channel_axis) == (0, top, None)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("what", ["weights", "inputs"])
def test_onnxruntime_computes_the_same_grid(what, bits):
    """Its own code for the default types: signed weights, signed activations."""
    utils = pytest.importorskip("onnxruntime.quantization.quant_utils")
    onnx = pytest.importorskip("onnx")
    symmetric = what == "weights"
    kind = {8: onnx.TensorProto.INT8, 4: onnx.TensorProto.INT4}[bits]
    least, most = utils.get_qmin_qmax_for_qType(kind, False, symmetric=symmetric)
    least, most = np.int32(least), np.int32(most)
    zero_point, scale = utils.compute_scale_zp(
        KERNEL.min(), KERNEL.max(), least, most, symmetric
    )
    grid = grids.GRIDS["onnxruntime"]
    spec = grid.weight_spec(bits) if symmetric else grid.act_spec(bits)
    params = calibrate(KERNEL, spec)
    np.testing.assert_allclose(params.scale.squeeze(), scale, rtol=2e-7)
    shift = int(least) - spec.qmin
    assert int(params.zero_point.squeeze()) + shift == int(zero_point)
    assert spec.qmax + shift == int(most)


@pytest.mark.parametrize("preset", grids.GRIDS)
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_every_preset_has_a_weight_grid_of_every_width(preset, bits):
    spec = grids.named(preset).weight_spec(bits)
    assert spec.bits == bits
    codes = spec.qmax - spec.qmin + 1
    assert codes in (2**bits, 2**bits - 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"range_method": "histogram"}, "histogram measures activations"),
        ({"range_method": "percentile"}, "percentile goes with"),
        ({"percentile": 99.0}, "percentile goes with"),
        ({"act_range_method": "percentile", "act_percentile": 50.0}, "50, 100"),
        ({"first_last_bits": 9}, "first_last_bits must be 2 to 8, got 9"),
        ({"act_ema": 1.0}, "act_ema"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(changes, message):
    with pytest.raises(errors.InputError, match=message):
        dataclasses.replace(grids.GRIDS["plain"], **changes)


def test_unknown_names_and_widths_are_answered_with_the_known_ones():
    with pytest.raises(errors.InputError, match=r"plain, efrap_reference.*'tflite'"):
        grids.named("tflite")
    with pytest.raises(errors.InputError, match="act_bits must be 3 to 8"):
        grids.GRIDS["pytorch_fbgemm"].act_spec(2)
    with pytest.raises(errors.InputError, match="weight_bits must be 2 to 8, got 16"):
        grids.GRIDS["plain"].weight_spec(16)
