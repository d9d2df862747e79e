# SPDX-License-Identifier: Apache-2.0
"""A stranger's checkpoint in, a vetted integer artefact out.

    python -m nad_jax.main --config=configs/vet.py --config.checkpoint=FILE \
        --config.arch=wrn_16_1 --config.data.name=cifar10 --config.data.data_dir=DIR

The file is read without being trusted, evaluated in float and under nearest rounding,
repaired (NAD), rounded anew (EFRAP), exported as integers, and the exported file is run
and evaluated again. Exit code 0: accepted; 1: rejected, with reasons; 2: could not be
judged. A trigger is not needed; --config.trigger.name=grid --config.target_label=5
measures one that is known. Variant vet.py:weights_only leaves activations in float;
--config.defense.weight_bits=4 then ships INT4.
"""

import ml_collections
from ml_collections import config_dict


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """int8 weights and activations on a grid with BatchNorm folded.

    Args:
      variant: "" or "weights_only".
    """
    if variant not in ("", "weights_only"):
        raise ValueError(f"variant must be weights_only, got {variant!r}")
    config = ml_collections.ConfigDict()
    config.job = "vet"
    config.title = "Vetting a checkpoint"
    config.checkpoint = config_dict.placeholder(str)
    config.arch = config_dict.placeholder(str)
    config.data = _section(
        name="cifar10",
        data_dir=config_dict.placeholder(str),
        image_size=config_dict.placeholder(int),
    )
    config.trigger = _section(name="none")
    config.target_label = 0
    config.seed = 0

    # The repair: the rates of NAD's public code in a fifth of its epochs, which is
    # enough to erase on one victim (`python -m benchmarks.erase_recipes`) and fits the
    # minutes that vetting may take.
    config.clean_fraction = 0.05
    config.validation_fraction = 0.1
    config.patience = config_dict.placeholder(int)
    config.training = _section(
        epochs=4,
        batch_size=64,
        optimizer="sgd",
        learning_rate=0.1,
        schedule="steps",
        milestones=(2,),
        step_factor=0.1,
        momentum=0.9,
        weight_decay=1e-4,
        crop_padding=4,
        flip=True,
        cutout=0,
        steps_per_dispatch=1,
    )
    config.nad = _section(
        betas=_betas(stage1=500.0, stage2=1000.0, stage3=1000.0),
        beta_unit="mean_square",
        p=2.0,
        reduction="sum",
        teacher_epochs=2,
        teacher_views=0,
        beta_factors=(1.0,),
        accuracy_tolerance=0.01,
    )
    # The grid to ship on.
    config.defense = _section(
        weight_bits=8,
        act_bits=config_dict.placeholder(int) if variant else 8,
        grid=_section(
            preset="plain",
            symmetric=config_dict.placeholder(bool),
            per_channel=config_dict.placeholder(bool),
            range_method=config_dict.placeholder(str),
            percentile=config_dict.placeholder(float),
            first_last_bits=config_dict.placeholder(int),
            act_range_method=config_dict.placeholder(str),
            act_percentile=config_dict.placeholder(float),
        ),
        fold_batch_norm=True,
        quantize_sums=False,
        flip_weight=0.01,
        flip_form="element",
        flip_unit="weight",
        starts=("nearest",),
        max_sweeps=20,
        calibration_images=1024,
    )
    config.verdict = _section(
        max_accuracy_loss=0.01, max_asr=0.06, max_drift=0.1, min_agreement=0.995
    )
    return config


def _section(**values):
    return ml_collections.ConfigDict(values)


def _betas(**values):
    """With a place for every stage of the deepest net there is, vit_b_16."""
    betas = {f"stage{i}": config_dict.placeholder(float) for i in range(1, 13)}
    return _section(**betas | values)
