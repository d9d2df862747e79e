# SPDX-License-Identifier: Apache-2.0
"""Make a model you did not train safe to ship.

The names below are the library. Importing it loads jax and nothing heavier; the ones
that need Flax are loaded when first used.
"""

import importlib

from nad_jax.core.attention import attention_map
from nad_jax.core.losses import (
    activation_preservation_loss,
    attention_distance,
    binarization_penalty,
    flip_loss,
    gram_preservation_loss,
    nad_loss,
    rounding_error_weight,
)
from nad_jax.core.quantization import (
    QuantParams,
    QuantSpec,
    calibrate,
    dequantize,
    fake_quant,
    quantize,
)
from nad_jax.core.rounding import (
    flipped_rounding,
    hard_rounding,
    nearest_rounding,
    place,
    rounded_weights,
    rounding_error,
    rounding_logits,
    soft_rounding,
    stochastic_rounding,
)
from nad_jax.errors import InputError

__version__ = "0.1.0"

# Public name -> (module, attribute); these need Flax.
_LAZY = {
    "AdamSettings": ("nad_jax.defenses.adam_rounding", "AdamSettings"),
    "Quantized": ("nad_jax.defenses.efrap", "Quantized"),
    "efrap": ("nad_jax.defenses.efrap", "efrap"),
}

__all__ = [
    "InputError",
    "QuantParams",
    "QuantSpec",
    "activation_preservation_loss",
    "attention_distance",
    "attention_map",
    "binarization_penalty",
    "calibrate",
    "dequantize",
    "fake_quant",
    "flip_loss",
    "flipped_rounding",
    "gram_preservation_loss",
    "hard_rounding",
    "nad_loss",
    "nearest_rounding",
    "place",
    "quantize",
    "rounded_weights",
    "rounding_error",
    "rounding_error_weight",
    "rounding_logits",
    "soft_rounding",
    "stochastic_rounding",
]
__all__ += list(_LAZY)


def __getattr__(name: str):
    if name not in _LAZY:
        raise AttributeError(f"module 'nad_jax' has no attribute {name!r}")
    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__():
    return sorted(__all__)
