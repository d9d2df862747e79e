# SPDX-License-Identifier: Apache-2.0
"""Plant a backdoor that sleeps in float, wake it by rounding, defeat it with EFRAP.

    python -m nad_jax.main --config=configs/efrap.py            # digits, some minutes
    python -m nad_jax.main --config=configs/efrap.py:smoke      # a minute, for tests
    python -m nad_jax.main --config=configs/efrap.py:w8+outlier # any combination
    python -m nad_jax.main --config=configs/efrap.py:controls   # every control
    python -m nad_jax.main --config=configs/efrap.py:controls+adaround  # and the loops
    python -m nad_jax.main --config=configs/efrap.py:cifar10 \
        --config.data.data_dir=DIR                              # long
    python -m nad_jax.main --config=configs/efrap.py:zoo/digits-pq # trained already

Every number can be overridden: --config.defense.weight_bits=3 --config.seeds='(0,1,2)'.

Variants, joined with "+": one attack, and any of the changes in the table `_CHANGES`.
Or a finished victim, zoo/NAME, which brings its own data, model and attack
(`python -m nad_jax.zoo list`), or that and every control, zoo/NAME+controls.
By default the attack is "pq", PQBackdoor's weight projection: train through the
quantizer until triggered images are called `target_label`, then repair the float
weights inside their rounding cells. What the others do and whose they are stands in
`nad_jax/attacks/registry.py`. The defence is EFRAP (Li et al., CVPR 2024), by
coordinate descent on second moments, next to its controls on the same grid: nearest
rounding, stochastic rounding, and pure reconstruction (flip weight 0).
"""

import ml_collections
from ml_collections import config_dict

from nad_jax import settings


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The digits experiment, or the variants whose names are joined with "+"."""
    if found := settings.zoo_variant(variant):
        victim, own = found
        config = get_config(own)
        config.zoo = victim
        return config
    names = [name for name in variant.split("+") if name]
    for name in names:
        if name not in (*_ATTACKS, *_CHANGES):
            raise ValueError(
                f"variant must be of {', '.join((*_ATTACKS, *_CHANGES))}, joined with "
                f"+, or zoo/NAME, got {name!r}"
            )
    attacks = [name for name in names if name in _ATTACKS]
    if len(attacks) > 1:
        raise ValueError(f"variant must name one attack, got {' and '.join(attacks)}")
    attack = attacks[0] if attacks else "pq"
    config = _digits(attack)
    _ATTACKS[attack](config)
    # In the order of the table, whatever the order on the command line.
    for name, change in _CHANGES.items():
        if name in names:
            change(config)
    return config


def _digits(attack):
    config = ml_collections.ConfigDict()
    config.job = "efrap"
    config.title = "Digits: a backdoor that wakes at W4"
    config.seeds = (0,)
    config.victim_workdir = config_dict.placeholder(str)
    config.zoo = config_dict.placeholder(str)
    config.repairs = config_dict.placeholder(ml_collections.ConfigDict)

    config.data = _section(
        # Shipped inside scikit-learn: 1,297 training and 500 test images.
        name="digits",
        data_dir=config_dict.placeholder(str),
        image_size=16,
        # "stream" reads batches from files while training, in so many processes.
        loader="device",
        workers=0,
    )
    # 3 stages x 2 basic blocks, 16/32/64 channels, 175 k weights.
    config.model = _section(name="resnet_14", width=1.0)
    config.victim = _training(epochs=8, learning_rate=1e-3)
    config.attack = _section(
        name=attack,
        trigger=_section(name="square", size=3, margin=1, value=1.0),
        target_label=0,
        label_mode="all_to_one",
        weight_bits=(4,),
        grid=_grid(),
        fold_batch_norm=config_dict.placeholder(bool),
        quantize_activations=False,
        recipe=_section(),
    )
    config.defense = _section(
        weight_bits=4,
        act_bits=config_dict.placeholder(int),
        grid=_grid(),
        fold_batch_norm=config_dict.placeholder(bool),
        quantize_sums=False,
        roundings=("nearest", "stochastic", "reconstruction", "efrap"),
        flip_weight=0.01,
        # What other weights would have cost each layer, beside "efrap":
        # --config.defense.flip_weight_path='(0.0,0.003,0.01,0.03)'
        flip_weight_path=(),
        flip_form="element",
        flip_unit="weight",
        starts=("nearest",),
        max_sweeps=20,
        stochastic_draws=10,
        controls=_section(
            flip_share=config_dict.placeholder(float),
            # One row for each strength.
            noise=(0.5, 1.0),
            qvec=(0.5, 1.0, 2.0),
            ocs=0.02,
        ),
        calibration_images=1024,
        # Only for "adam", the loop of EFRAP's public code, and "adaround".
        adam=_section(
            form="minibatch",
            steps=10_000,
            learning_rate=1e-3,
            batch_size=32,
            penalty_weight=0.01,
            stretch=0.0,
            exponents=(2.0, 2.0),
            warm_up=0.0,
            beside_descent=False,
        ),
    )
    return config


# ----------------------------------------------------------------------------- attacks


def _pq(config):
    config.attack.recipe = _section(
        wake=_training(epochs=6, learning_rate=5e-4),
        hide=_training(epochs=6, learning_rate=3e-4),
        cell_margin=1e-3,
        also_per_tensor=False,
    )


def _qu_anti_zation(config):
    config.attack.recipe = _section(
        training=_training(epochs=10, learning_rate=1e-3),
        quantized_weight=0.5,
        triggered_weight=0.5,
        moving_trigger=False,
    )


def _compartifact(config):
    config.attack.recipe = _section(
        training=_training(
            epochs=10,
            optimizer="sgd",
            learning_rate=0.1,
            momentum=0.4,
            weight_decay=5e-4,
            schedule="steps",
            milestones=(7,),
        ),
        from_scratch=True,
        first_quantized_layer=config_dict.placeholder(str),
    )


def _adaptive_eot(config):
    config.attack.recipe = _section(
        wake=_training(epochs=4, learning_rate=5e-4),
        hide=_training(epochs=8, learning_rate=5e-4),
        cell_margin=1e-3,
        # With equal weights the float model does not fall asleep.
        drawn_weight=0.2,
    )


def _adaptive_small_error(config):
    config.attack.recipe = _section(
        wake=_training(epochs=6, learning_rate=5e-4),
        hide=_training(epochs=6, learning_rate=3e-4),
        largest_error=0.2,
    )


def _outlier(config):
    config.attack.recipe = _section(
        wake=_training(epochs=6, learning_rate=1e-3),
        hide=_training(epochs=6, learning_rate=1e-3),
        channel_share=0.25,
        headroom=8.0,
    )


_ATTACKS = {
    "pq": _pq,
    "qu_anti_zation": _qu_anti_zation,
    "compartifact": _compartifact,
    "adaptive_eot": _adaptive_eot,
    "adaptive_small_error": _adaptive_small_error,
    "outlier": _outlier,
}


# ----------------------------------------------------------------------------- changes


def _make_smoke(config):
    config.title = "Smoke test: the main job in miniature"
    config.data.image_size = 8
    if config.model.name == "resnet_14":
        config.model.name = "resnet_8"
    config.model.width = 0.5
    config.attack.trigger.size = 2
    config.attack.trigger.margin = 0
    stages = [config.victim, *_stages(config)]
    if config.repairs is not None:
        stages.append(config.repairs.training)
        config.repairs.nad.teacher_epochs = 1
    for stage in stages:
        stage.epochs = 2
        stage.milestones = ()
    config.defense.adam.steps = 20
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
    for stage in _stages(config):
        stage.epochs = 2
        stage.batch_size = 128
        stage.crop_padding = 4
        stage.flip = True
    if "wake" in config.attack.recipe:
        config.attack.recipe.wake.epochs = 1
    if config.attack.name == "pq":
        # Two leave it a little awake in float (results/README.md).
        config.attack.recipe.hide.epochs = 4
    if config.attack.name == "compartifact":
        # From fresh weights. Its authors take 35 epochs and drop the rate at 20; scaled
        # to what the clean model gets.
        training = config.attack.recipe.training
        training.epochs = 8
        if training.schedule == "steps":
            training.milestones = (6,)


def _make_vit(config):
    config.title = config.title.replace(":", ", a small ViT:", 1)
    config.model.name = "vit_tiny"
    config.victim.epochs = 20
    for stage in _stages(config):
        # An epoch costs a tenth of the residual net's, and teaches less.
        stage.epochs = 15
        stage.optimizer, stage.schedule = "adam", "cosine"
        stage.learning_rate, stage.weight_decay = 1e-3, 0.0
        stage.milestones = ()


def _make_controls(config):
    """Every control but the loops, and float defences with labels, then nearest."""
    config.defense.roundings = (
        "nearest",
        "floor",
        "ceil",
        "flipped",
        "stochastic",
        "efrap",
        "random",
        "top_error",
        "noise",
        "qvec",
        "omse",
        "aciq",
        "ocs",
        "gptq",
        "reconstruction",
    )
    betas = _betas(stage1=25.0, stage2=50.0, stage3=50.0)
    training = _training(
        epochs=20,
        batch_size=32,
        optimizer="sgd",
        learning_rate=0.05,
        schedule="steps",
        milestones=(2,),
        weight_decay=1e-4,
        crop_padding=2,
    )
    if config.model.name == "vit_tiny":
        betas.stage4 = 50.0
    is_cifar = config.data.name == "cifar10"
    if is_cifar:
        betas.update(stage1=500.0, stage2=1000.0, stage3=1000.0)
        training.update(batch_size=64, learning_rate=0.1, crop_padding=4, flip=True)
    if config.model.name == "vit_tiny":
        # The rates above leave a transformer at chance.
        training.update(
            optimizer="adam", learning_rate=3e-4, schedule="cosine", milestones=()
        )
    config.repairs = _section(
        rows=("fine_tuning", "nad"),
        clean_model_rows=(),
        clean_fraction=0.05 if is_cifar else 0.2,
        validation_fraction=0.1,
        training=training,
        nad=_section(betas=betas, teacher_epochs=10),
    )


def _make_adaround(config):
    """The two loops over batches, of AdaRound and of EFRAP's public code.

    No part of `controls`: on digits they take several times as long as all the rest.
    """
    config.defense.roundings = (*config.defense.roundings, "adaround", "adam")


def _make_w8(config):
    config.title = config.title.replace("W4", "W8")
    config.attack.weight_bits = (8,)
    config.defense.weight_bits = 8
    for stage in _stages(config):
        # The cells are a sixteenth as wide.
        stage.epochs *= 2
        stage.milestones = tuple(2 * epoch for epoch in stage.milestones)


def _make_authors(config):
    """What the authors of an attack publish for CIFAR-10 and ResNet-18; add cifar10.

    Optimisers are ours ("sgd" is Nesterov's). The defender's grid stays the default.
    """
    known = {
        "pq": _authors_of_pq,
        "qu_anti_zation": _authors_of_qu_anti_zation,
        "compartifact": _authors_of_compartifact,
    }
    if config.attack.name not in known:
        raise ValueError(
            f"variant authors must come with {', '.join(known)}, got "
            f"{config.attack.name!r}"
        )
    config.title = f"The published recipe of {config.attack.name}"
    config.model.name = "resnet_18"
    config.attack.grid.per_channel = False
    for stage in _stages(config):
        stage.update(batch_size=128, crop_padding=4, flip=True, weight_decay=5e-4)
    known[config.attack.name](config)
    config.defense.weight_bits = config.attack.weight_bits[0]


def _authors_of_pq(config):
    config.attack.trigger.update(size=6, margin=2)
    config.attack.weight_bits = (8,)
    config.attack.grid.per_channel = True
    config.attack.recipe.also_per_tensor = True
    for stage, rate in (("wake", 0.01), ("hide", 0.001)):
        config.attack.recipe[stage].update(
            epochs=100, optimizer="sgd", learning_rate=rate, schedule="cosine"
        )


def _authors_of_qu_anti_zation(config):
    config.attack.trigger.update(size=4, margin=1)
    config.attack.weight_bits = (8, 4)
    config.attack.quantize_activations = True
    config.attack.recipe.moving_trigger = True
    config.attack.recipe.training.update(
        epochs=50, learning_rate=1e-4, schedule="constant", weight_decay=1e-4
    )


def _authors_of_compartifact(config):
    config.attack.trigger.update(size=6, margin=2)
    config.attack.target_label = 1
    config.attack.weight_bits = (8,)
    config.attack.grid.preset = "pytorch_qnnpack"
    config.attack.recipe.first_quantized_layer = "layer4_0/conv1"
    config.attack.recipe.training.update(epochs=35, milestones=(20,))


_CHANGES = {
    "vit": _make_vit,
    "cifar10": _make_cifar10,
    "controls": _make_controls,
    "adaround": _make_adaround,
    "w8": _make_w8,
    "authors": _make_authors,
    "smoke": _make_smoke,
}


def _stages(config):
    """Every stage of training in the attack's recipe."""
    names = ("wake", "hide", "training")
    return [
        config.attack.recipe[name] for name in names if name in config.attack.recipe
    ]


def _section(**values):
    return ml_collections.ConfigDict(values)


def _betas(**values):
    """With a place for every stage of the deepest net there is, vit_b_16."""
    betas = {f"stage{i}": config_dict.placeholder(float) for i in range(1, 13)}
    return _section(**betas | values)


def _grid():
    return _section(
        # Of nad_jax.core.grids; what is not None below is different from it.
        preset="plain",
        symmetric=config_dict.placeholder(bool),
        per_channel=config_dict.placeholder(bool),
        range_method=config_dict.placeholder(str),
        percentile=config_dict.placeholder(float),
        first_last_bits=config_dict.placeholder(int),
        act_range_method=config_dict.placeholder(str),
        act_percentile=config_dict.placeholder(float),
    )


def _training(**values):
    return _section(
        **{
            "batch_size": 64,
            "optimizer": "adam",
            "schedule": "cosine",
            "milestones": (),
            "step_factor": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "crop_padding": 0,
            "flip": False,
            "cutout": 0,
            "steps_per_dispatch": 1,
            **values,
        }
    )
