# SPDX-License-Identifier: Apache-2.0
"""Does a float model look as if it was trained for what rounding does to it?

    python -m nad_jax.main --config=configs/inspect.py --config.float_model=FILE \
        --config.data.name=cifar10 --config.data.data_dir=DIR

Asks without a trigger, before anything is rounded, on every grid named below: an attack
on one grid leaves no traces on the others. Exit code 0: nothing found; 1: suspicious;
2: could not be judged. How often it is wrong stands in results/README.md; it proves
nothing either way.
"""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Ties, drift and outliers on the grids that users deploy."""
    if variant:
        raise ValueError(f"variant must be empty, got {variant!r}")
    config = ml_collections.ConfigDict()
    config.job = "inspect"
    config.float_model = config_dict.placeholder(str)
    config.arch = config_dict.placeholder(str)
    config.data = ml_collections.ConfigDict(
        {
            "name": "cifar10",
            "data_dir": config_dict.placeholder(str),
            "image_size": config_dict.placeholder(int),
        }
    )
    config.weight_bits = (8, 4)
    config.act_bits = config_dict.placeholder(int)
    # Of nad_jax.core.grids.
    config.presets = ("plain", "efrap_reference", "pytorch_qnnpack")
    config.images = 1024
    config.seed = 0
    return config
