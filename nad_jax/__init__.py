# SPDX-License-Identifier: Apache-2.0
"""Make a model you did not train safe to ship.

The names below are the library. Each is loaded when it is first used, so that
`import nad_jax` costs nothing, the mathematics need jax and numpy alone, and only what
walks through a model (`efrap`, `nad`) loads Flax.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nad_jax.auditing import Audit, LayerAudit, audit
    from nad_jax.core.attention import attention_map
    from nad_jax.core.losses import (
        activation_preservation_loss,
        attention_distance,
        binarization_penalty,
        convert_betas,
        flip_loss,
        gram_preservation_loss,
        logit_distance,
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
    from nad_jax.defenses.adam_rounding import AdamSettings
    from nad_jax.defenses.efrap import efrap
    from nad_jax.defenses.flip_weight_choice import choose_flip_weight
    from nad_jax.defenses.nad_of_module import nad
    from nad_jax.defenses.quantized_module import Quantized
    from nad_jax.defenses.rounding_inspection import Inspection, inspect
    from nad_jax.errors import InputError
    from nad_jax.models.capture import Captured

__version__ = "0.1.0"

_MODULES = {
    "nad_jax.auditing": ("Audit", "LayerAudit", "audit"),
    "nad_jax.core.attention": ("attention_map",),
    "nad_jax.core.losses": (
        "activation_preservation_loss",
        "attention_distance",
        "binarization_penalty",
        "convert_betas",
        "flip_loss",
        "gram_preservation_loss",
        "logit_distance",
        "nad_loss",
        "rounding_error_weight",
    ),
    "nad_jax.core.quantization": (
        "QuantParams",
        "QuantSpec",
        "calibrate",
        "dequantize",
        "fake_quant",
        "quantize",
    ),
    "nad_jax.core.rounding": (
        "flipped_rounding",
        "hard_rounding",
        "nearest_rounding",
        "place",
        "rounded_weights",
        "rounding_error",
        "rounding_logits",
        "soft_rounding",
        "stochastic_rounding",
    ),
    "nad_jax.defenses.adam_rounding": ("AdamSettings",),
    "nad_jax.defenses.efrap": ("efrap",),
    "nad_jax.defenses.flip_weight_choice": ("choose_flip_weight",),
    "nad_jax.defenses.nad_of_module": ("nad",),
    "nad_jax.defenses.quantized_module": ("Quantized",),
    "nad_jax.defenses.rounding_inspection": ("Inspection", "inspect"),
    "nad_jax.errors": ("InputError",),
    "nad_jax.models.capture": ("Captured",),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AdamSettings",
    "Audit",
    "Captured",
    "InputError",
    "Inspection",
    "LayerAudit",
    "QuantParams",
    "QuantSpec",
    "Quantized",
    "activation_preservation_loss",
    "attention_distance",
    "attention_map",
    "audit",
    "binarization_penalty",
    "calibrate",
    "choose_flip_weight",
    "convert_betas",
    "dequantize",
    "efrap",
    "fake_quant",
    "flip_loss",
    "flipped_rounding",
    "gram_preservation_loss",
    "hard_rounding",
    "inspect",
    "logit_distance",
    "nad",
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


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'nad_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
