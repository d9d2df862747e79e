# SPDX-License-Identifier: Apache-2.0
"""Plant a backdoor that sleeps in float, wake it by rounding, defeat it with EFRAP.

    python -m nad_jax.main --config=configs/efrap.py          # digits, some minutes
    python -m nad_jax.main --config=configs/efrap.py:smoke    # seconds, for tests
    python -m nad_jax.main --config=configs/efrap.py:cifar10 \
        --config.data.data_dir=DIR                            # about an hour on 2 cores

Every number can be overridden: --config.defense.weight_bits=3 --config.seeds='(0,1,2)'.

The attack is PQBackdoor's weight projection (Ma et al., IEEE TDSC 2023): train through
the quantizer until triggered images are called `target_label`, then repair the float
weights inside their rounding cells. The defence is EFRAP (Li et al., CVPR 2024), by
coordinate descent on second moments, next to its controls on the same grid: nearest
rounding, stochastic rounding, and pure reconstruction (flip weight 0).
"""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The digits experiment, or the variant "smoke" or "cifar10"."""
    config = ml_collections.ConfigDict()
    config.job = "efrap"
    config.title = "Digits: a backdoor that wakes at W4"
    config.seeds = (0,)
    config.victim_workdir = config_dict.placeholder(str)

    config.data = _section(
        # Shipped inside scikit-learn: 1,297 training and 500 test images.
        name="digits",
        data_dir=config_dict.placeholder(str),
        image_size=16,
    )
    # 3 stages x 2 basic blocks, 16/32/64 channels, 175 k weights.
    config.model = _section(name="resnet_14", width=1.0)
    config.victim = _training(epochs=8, learning_rate=1e-3)
    config.attack = _section(
        trigger=_section(name="square", size=3, margin=1, value=1.0),
        target_label=0,
        label_mode="all_to_one",
        weight_bits=4,
        grid=_grid(),
        wake=_training(epochs=6, learning_rate=5e-4),
        hide=_training(epochs=6, learning_rate=3e-4),
        cell_margin=1e-3,
    )
    config.defense = _section(
        weight_bits=4,
        act_bits=config_dict.placeholder(int),
        grid=_grid(),
        fold_batch_norm=False,
        roundings=("nearest", "stochastic", "reconstruction", "efrap"),
        flip_weight=0.01,
        max_sweeps=20,
        stochastic_draws=5,
        calibration_images=1024,
        # Only for the rounding "adam", the loop of EFRAP's public code.
        adam=_section(
            form="minibatch",
            steps=10_000,
            learning_rate=1e-3,
            batch_size=32,
            penalty_weight=0.01,
        ),
    )
    if variant == "smoke":
        _make_smoke(config)
    elif variant == "cifar10":
        _make_cifar10(config)
    elif variant:
        raise ValueError(f"variant must be smoke or cifar10, got {variant!r}")
    return config


def _make_smoke(config):
    config.title = "Smoke test: the main job in miniature"
    config.data.image_size = 8
    config.model.name = "resnet_8"
    config.model.width = 0.5
    config.attack.trigger.size = 2
    config.attack.trigger.margin = 0
    for stage in (config.victim, config.attack.wake, config.attack.hide):
        stage.epochs = 2
    config.defense.calibration_images = 64
    config.defense.stochastic_draws = 2


def _make_cifar10(config):
    config.title = "CIFAR-10: a backdoor that wakes at W4"
    config.data.name = "cifar10"
    config.data.image_size = config_dict.placeholder(int)
    config.attack.trigger.size = 5
    config.victim.update(
        epochs=6,
        batch_size=128,
        optimizer="sgd",
        learning_rate=0.3,
        schedule="one_cycle",
        weight_decay=5e-4,
        crop_padding=4,
        flip=True,
    )
    config.attack.wake.epochs = 1
    config.attack.hide.epochs = 2
    for stage in (config.attack.wake, config.attack.hide):
        stage.batch_size = 128
        stage.crop_padding = 4
        stage.flip = True


def _section(**values):
    return ml_collections.ConfigDict(values)


def _grid():
    return _section(
        symmetric=True,
        per_channel=True,
        range_method="absmax",
        first_last_bits=config_dict.placeholder(int),
    )


def _training(**values):
    return _section(
        **{
            "batch_size": 64,
            "optimizer": "adam",
            "schedule": "cosine",
            "momentum": 0.9,
            "weight_decay": 0.0,
            "crop_padding": 0,
            "flip": False,
            "steps_per_dispatch": 1,
            **values,
        }
    )
