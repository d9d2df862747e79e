# SPDX-License-Identifier: Apache-2.0
"""Is this integer file an honest rounding of that float model?

    python -m nad_jax.main --config=configs/audit.py --config.float_model=FILE \
        --config.integer_file=model.onnx --config.data.name=cifar10 \
        --config.data.data_dir=DIR

The float model is a checkpoint (as for configs/vet.py), the integer file an artefact or
an ONNX file of this program; vetting writes all three. Clean images show whether codes
that are not nearest serve the layers' outputs. Exit code 0: honest; 1: findings, with
reasons; 2: could not be judged.
"""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Codes, grids, and everything left in float."""
    if variant:
        raise ValueError(f"variant must be empty, got {variant!r}")
    config = ml_collections.ConfigDict()
    config.job = "audit"
    config.float_model = config_dict.placeholder(str)
    config.integer_file = config_dict.placeholder(str)
    config.arch = config_dict.placeholder(str)
    config.data = ml_collections.ConfigDict(
        {
            "name": "cifar10",
            "data_dir": config_dict.placeholder(str),
            "image_size": config_dict.placeholder(int),
        }
    )
    config.images = 1024
    config.seed = 0
    return config
