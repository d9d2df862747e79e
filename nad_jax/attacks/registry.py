# SPDX-License-Identifier: Apache-2.0
"""Quantization-conditioned attacks by name; `settings.RECIPES` has their settings.

=====================  ==============================================================
pq                     two stages, the second inside the rounding cells (PQBackdoor)
qu_anti_zation         one joint loss for float and quantized copies
compartifact           two paths with common BatchNorm statistics, from fresh weights
adaptive_eot           pq, trained against flipped and stochastic roundings
adaptive_small_error   pq with every weight close to its code
outlier                channels that collapse under a blown-up scale
=====================  ==============================================================
"""

from collections.abc import Callable, Sequence
from typing import Any

from nad_jax.attacks import (
    adaptive,
    compartifact,
    conditioning,
    outliers,
    projection,
    qu_anti_zation,
)

# (recipe, attacker) -> variables of the backdoored model
Plant = Callable[[Any, conditioning.Attacker], Any]

ATTACKS: dict[str, Plant] = {
    "pq": projection.plant,
    "qu_anti_zation": qu_anti_zation.plant,
    "compartifact": compartifact.plant,
    "adaptive_eot": adaptive.plant_eot,
    "adaptive_small_error": adaptive.plant_small_error,
    "outlier": outliers.plant,
}

# (recipe, grids the backdoor is to wake on): refuses what planting would refuse.
Check = Callable[[Any, Sequence[conditioning.ExpectedGrid]], None]

# Asked before the clean model is trained.
CHECKS: dict[str, Check] = {"compartifact": compartifact.check}
