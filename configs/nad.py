# SPDX-License-Identifier: Apache-2.0
"""Plant a backdoor by poisoning data, then repair the model with a few clean images.

    python -m nad_jax.main --config=configs/nad.py            # digits, a minute or two
    python -m nad_jax.main --config=configs/nad.py:smoke      # seconds, for tests
    python -m nad_jax.main --config=configs/nad.py:blend      # another attack
    python -m nad_jax.main --config=configs/nad.py:controls   # every control
    python -m nad_jax.main --config=configs/nad.py:cifar10+blend \
        --config.data.data_dir=DIR

    python -m nad_jax.main --config=configs/nad.py:zoo/digits-blend
    python -m nad_jax.zoo list                                # what else there is

A variant is any of these, joined with +: one attack of badnets (the default), trojan,
blend, clean_label, sig, refool and wanet; "smoke" or "cifar10"; "controls". Or it is a
finished victim, zoo/NAME, which brings its own data, model and attack, or that and all
controls, zoo/NAME+controls.

Every number can be overridden: --config.attack.poison_rate=0.01 --config.seeds='(0,1)'.
Another trigger takes other options: `config.attack.trigger` in a config of your own.

The victim is trained with crop (and flip where the class survives it) on the poisoned
data. The defence is NAD (Li et al., ICLR 2021), next to its controls on the same clean
images, batches and budget: fine-tuning, which is NAD without the attention term,
fine-tuning in a SAM step, and our variant, NAD in a SAM step with the victim's own
logits as soft labels. With "controls" also fine-pruning, mode connectivity, and each
part of our variant without the other: logits without attention, attention without
logits.
"""

import ml_collections
from ml_collections import config_dict

from nad_jax import settings


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The experiment of the parts of `variant`; see above."""
    if found := settings.zoo_variant(variant):
        victim, own = found
        config = get_config(own)
        config.zoo = victim
        return config
    parts = [part for part in variant.split("+") if part]
    scales = [part for part in parts if part in _SCALES]
    attacks = [part for part in parts if part in _ATTACKS]
    controls = [part for part in parts if part == "controls"]
    kinds = (scales, attacks, controls)
    if sum(map(len, kinds)) < len(parts) or max(map(len, kinds)) > 1:
        raise ValueError(
            f"variant must be one of {', '.join(_SCALES)}, one of "
            f"{', '.join(_ATTACKS)}, controls, or these joined with +, or zoo/NAME, "
            f"got {variant!r}"
        )
    config = ml_collections.ConfigDict()
    config.job = "nad"
    config.title = "Digits: a poisoned model and its repair"
    config.seeds = (0,)
    config.victim_workdir = config_dict.placeholder(str)
    config.zoo = config_dict.placeholder(str)
    # ACC and ASR after every epoch, for the page.
    config.curves = True

    config.data = _section(
        # Shipped inside scikit-learn: 1,297 training and 500 test images.
        name="digits",
        data_dir=config_dict.placeholder(str),
        image_size=16,
        # "stream" reads batches from files while training, in so many processes.
        loader="device",
        workers=0,
    )
    # 3 groups of one block, 16/32/64 channels, 78 k weights.
    config.model = _section(name="wrn_10_1", width=1.0)
    config.victim = _training(epochs=14, learning_rate=3e-3)
    config.attack = _section(
        name="badnets",
        trigger=_section(name="grid"),
        target_label=5,
        label_mode="all_to_one",
        poison_rate=0.1,
        perturbation=0.0,
        perturbation_steps=10,
        noise_ratio=0.0,
        noise_jitter=0.5,
        trojan=config_dict.placeholder(ml_collections.ConfigDict),
    )
    config.defense = _section(
        rows=("fine_tuning", "ft_sam", "nad", "nad_sam_kd"),
        clean_model_rows=("nad",),
        clean_fraction=0.2,
        validation_fraction=0.1,
        teacher=config_dict.placeholder(str),
        training=_training(
            epochs=20,
            batch_size=32,
            optimizer="sgd",
            learning_rate=0.05,
            schedule="steps",
            milestones=(2,),
            step_factor=0.1,
            weight_decay=1e-4,
        ),
        patience=config_dict.placeholder(int),
        # (1.0, 2.0) repairs at both rates and keeps the faster one where held-out
        # images allow it. Of digits there are 26: below 1 / 26 none may be lost.
        rate_factors=(1.0,),
        rate_tolerance=0.02,
        sharpness_radius=0.1,
        # Published for CIFAR-10 (BackdoorBench): radius 2.0 by weight, smoothing 0.1.
        # As here, the one radius of all SAM rows, it made the results in results/nad.
        ft_sam=_section(
            radius=config_dict.placeholder(float), by_weight=False, label_smoothing=0.0
        ),
        victim_logits=_section(weight=1.0, temperature=2.0),
        nad=_section(
            # The published 500, 1000, 1000 per pixel belong to maps with 4 times as
            # many pixels; on these they overwhelm the labels.
            betas=_betas(stage1=25.0, stage2=50.0, stage3=50.0),
            beta_unit="mean_square",
            p=2.0,
            reduction="sum",
            teacher_epochs=10,
            # So many crops of each image, each shown to the teacher once; 0 = a new
            # crop and a teacher pass in every step.
            teacher_views=0,
            beta_factors=(1.0,),
            accuracy_tolerance=0.01,
        ),
        fine_pruning=_section(max_accuracy_drop=0.04),
        mode_connectivity=_section(
            positions=(0.1, 0.3, 0.5, 0.7, 0.9),
            accuracy_tolerance=0.01,
            learning_rate=0.01,
        ),
    )
    for scale in scales:
        _SCALES[scale](config)
    for attack in attacks:
        _ATTACKS[attack](config)
        config.attack.name = attack
        config.title += f" ({attack})"
    if controls:
        config.defense.rows = (
            "fine_tuning",
            "fine_pruning",
            "mode_connectivity",
            "ft_sam",
            "ft_sam_kd",
            "nad",
            "nad_sam",
            "nad_sam_kd",
        )
        config.defense.clean_model_rows = ("fine_tuning", "nad")
    return config


def _make_smoke(config):
    config.title = "Smoke test: the repair job in miniature"
    config.data.image_size = 8
    config.model.name = "resnet_8"
    config.model.width = 0.5
    config.victim.epochs = 2
    config.victim.crop_padding = 1
    config.defense.training.epochs = 2
    config.defense.training.crop_padding = 1
    config.defense.training.milestones = (1,)
    config.defense.nad.teacher_epochs = 1


def _make_cifar10(config):
    config.title = "CIFAR-10: a poisoned model and its repair"
    # Of 10,000 test images: as long as the epoch.
    config.curves = False
    config.data.name = "cifar10"
    config.data.image_size = config_dict.placeholder(int)
    config.model.name = "wrn_16_1"
    config.victim.update(
        epochs=8,
        optimizer="sgd",
        learning_rate=0.3,
        schedule="one_cycle",
        weight_decay=5e-4,
        steps_per_dispatch=5,
    )
    config.defense.clean_fraction = 0.05
    # The schedule of the public code.
    config.defense.training.update(
        batch_size=64, learning_rate=0.1, steps_per_dispatch=5
    )
    config.defense.nad.betas.update(stage1=500.0, stage2=1000.0, stage3=1000.0)
    for stage in (config.victim, config.defense.training):
        stage.crop_padding = 4
        stage.flip = True


def _badnets(config):
    """The grid in the corner; nothing to change."""


def _trojan(config):
    # 9 pixels, away from the corner so that a crop seldom cuts them.
    config.attack.trigger = _section(name="square", size=3, margin=2)
    config.attack.trojan = _section(neurons=2, reach=5.0, steps=200, learning_rate=0.05)


def _blend(config):
    config.attack.trigger = _section(name="blend", alpha=0.2)


def _clean_label(config):
    config.attack.trigger = _section(name="four_corner")
    # Of the whole data; one class is a tenth of it. 16 / 255 is not enough on digits,
    # whose strokes are all black and white.
    config.attack.update(
        label_mode="clean_label",
        poison_rate=0.08,
        perturbation=(16 if config.data.name == "cifar10" else 48) / 255,
    )


def _sig(config):
    # The published 40 / 255 hardly takes on digits: black cuts off half of the wave,
    # strokes the other. Four times that is plain to see and costs the victim accuracy.
    is_cifar = config.data.name == "cifar10"
    config.attack.trigger = _section(
        name="sinusoid",
        amplitude=(40 if is_cifar else 160) / 255,
        frequency=6 if is_cifar else 3,
    )
    config.attack.update(
        label_mode="clean_label", poison_rate=0.05 if is_cifar else 0.09
    )


def _refool(config):
    config.attack.trigger = _section(
        name="reflection", opacity=0.4, count=8, ghost_rate=0.49
    )


def _wanet(config):
    config.attack.trigger = _section(name="warp", grid_size=4, strength=1.5)
    config.attack.noise_ratio = 0.5


_SCALES = {"smoke": _make_smoke, "cifar10": _make_cifar10}
_ATTACKS = {
    "badnets": _badnets,
    "trojan": _trojan,
    "blend": _blend,
    "clean_label": _clean_label,
    "sig": _sig,
    "refool": _refool,
    "wanet": _wanet,
}


def _section(**values):
    return ml_collections.ConfigDict(values)


def _betas(**values):
    """With a place for every stage of the deepest net there is, vit_b_16."""
    betas = {f"stage{i}": config_dict.placeholder(float) for i in range(1, 13)}
    return _section(**betas | values)


def _training(**values):
    return _section(
        **{
            "batch_size": 128,
            "optimizer": "adam",
            "schedule": "cosine",
            "momentum": 0.9,
            "weight_decay": 0.0,
            # Digits do not survive a flip.
            "crop_padding": 2,
            "flip": False,
            "cutout": 0,
            "steps_per_dispatch": 1,
            "milestones": (),
            "step_factor": 0.1,
            **values,
        }
    )
