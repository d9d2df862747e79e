# SPDX-License-Identifier: Apache-2.0
"""The defender of a config, applied to one model: its grid, its roundings by name."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import settings, solved_layers
from nad_jax import workdir as workdir_lib
from nad_jax.attacks import conditioning, triggers
from nad_jax.core import quantization
from nad_jax.data import batches, sources
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.defenses import flip_weight_choice, layer_rounding, quantized_module
from nad_jax.models import common
from nad_jax.models import layers as layers_lib
from nad_jax.training import evaluation, sharding

EVAL = {"train": False}
# What takes long enough to be a stage of the workdir.
_SOLVED = tuple(layer_rounding.LOOKING)

# Roundings that differ from one draw to the next.
BY_CHANCE = ("stochastic", "random", "noise")


def _arguments(
    defense: settings.EfrapSettings,
    name: str,
    strength: float | Mapping[str, float] | None,
) -> dict[str, Any]:
    """Arguments of `efrap` that make the row called `name`."""
    controls = settings.ControlSettings()
    if isinstance(defense, settings.QuantizationSettings):
        controls = defense.controls
    if name in ("random", "top_error"):
        share = controls.flip_share
        return {"method": name, "strength": strength if share is None else share}
    if name in ("omse", "aciq"):
        range_method = {"omse": "mse", "aciq": "aciq"}[name]
        grid = dataclasses.replace(
            defense.grid.grid(), range_method=range_method, percentile=None
        )
        return {"method": "nearest", "grid": grid}
    rows: dict[str, dict[str, Any]] = {
        "reconstruction": {"method": "coordinate", "flip_weight": 0.0},
        "efrap": {"method": "coordinate", "flip_weight": defense.flip_weight},
        "adaround": {"method": "adam", "flip_weight": 0.0},
        "gptq": {"method": "feedback", "flip_weight": 0.0},
        "noise": {"method": "noise", "strength": strength},
        "qvec": {"method": "counter_shift", "strength": strength},
        "ocs": {"method": "channel_split", "strength": controls.ocs},
    }
    return rows.get(name, {"method": name})


def weight_specs(
    bits: int, grid: settings.GridSettings, layers: list[layers_lib.Layer]
) -> dict[str, quantization.QuantSpec]:
    """Layer name -> grid of its kernel."""
    chosen = grid.grid()
    return efrap_lib.specs_by_layer(
        chosen.weight_spec(bits), layers, first_last_bits=chosen.first_last_bits
    )


def find_layers(
    model: Any, image_shape: tuple[int, int, int]
) -> list[layers_lib.Layer]:
    """What is quantized of a model for images `[H, W, C]`."""
    return layers_lib.find_layers(
        model,
        common.init(model, jax.random.key(0), image_shape),
        jnp.zeros((1, *image_shape)),
        apply_kwargs=EVAL,
    )


def attacked_grids(
    attack: settings.AttackSettings, layers: list[layers_lib.Layer]
) -> list[conditioning.ExpectedGrid]:
    """Where the backdoor of an attack is to wake, one grid for each width."""
    return [
        conditioning.ExpectedGrid(
            layers,
            weight_specs(bits, attack.grid, layers),
            bits,
            attack.folds_batch_norm,
            attack.quantize_activations,
        )
        for bits in attack.weight_bits
    ]


def make_evaluate(
    model: Any,
    test: sources.Dataset,
    *,
    trigger: triggers.Trigger | None,
    target_labels: Any = None,
    make_evaluator: Callable[..., Callable[[Any], Any]] = evaluation.make_evaluator,
) -> Callable[..., Any]:
    """Function `(variables, result=None) -> rates` on the test images.

    `result`, a `Quantized`, says how activations are quantized. One program is compiled
    for each way of it.

    Args:
      model: Of `nad_jax.models`.
      test: The images.
      trigger: To measure; None = clean accuracy only.
      target_labels: What it is for: an int, or int `[N]`.
      make_evaluator: With `evaluation.make_predicting_evaluator` the function returns
        what that one's does: rates and predictions.
    """

    def logits(net, images, act_specs):
        variables, act_params = net
        return quantized_module.apply_quantized(
            model,
            variables,
            images,
            act_params,
            act_spec=dict(act_specs) or None,
            apply_kwargs=EVAL,
        )

    @functools.cache
    def evaluator(act_specs):
        return make_evaluator(
            functools.partial(logits, act_specs=act_specs),
            test.images,
            test.labels,
            trigger=trigger,
            target_labels=target_labels,
            mesh=sharding.forward_mesh(),
        )

    def evaluate(variables, result=None):
        if result is None:
            return evaluator(())((variables, {}))
        act_specs = tuple(result.act_specs.items())
        return evaluator(act_specs)((variables, result.act_params))

    return evaluate


def calibration_images(
    train: sources.Dataset, wanted: int, key: jax.Array
) -> jax.Array:
    """Clean training images without labels or augmentation, float in [0, 1].

    In random order, since methods that work batch by batch care: a folder's images are
    stored class by class.
    """
    chosen = jax.random.permutation(key, len(train))[:wanted]
    return batches.to_float(jnp.asarray(train.images[np.asarray(chosen)]))


def tell_shortage(
    train: sources.Dataset, wanted: int, workdir: workdir_lib.Workdir
) -> list[str]:
    """Says if there are fewer than `wanted` images to calibrate on.

    Returns:
      The same as a note for the report; none if there are enough.
    """
    if len(train) >= wanted:
        return []
    note = (
        f"Calibrated on {len(train):,} images, all that {train.name} has for training; "
        f"calibration_images asks for {wanted:,}."
    )
    workdir.say(note)
    return [note]


def load_calibration_images(
    data: settings.DataSettings, wanted: int, seed: int
) -> jax.Array:
    """The same of a data set by its config; see `calibration_images`."""
    train = sources.load(
        data.name, split="train", data_dir=data.data_dir, image_size=data.image_size
    )
    return calibration_images(train, wanted, jax.random.key(seed))


def quantize(
    defense: settings.EfrapSettings,
    name: str,
    model: Any,
    variables: Any,
    images: jax.Array,
    *,
    layers: list[layers_lib.Layer],
    key: jax.Array,
    workdir: workdir_lib.Workdir,
    stage: str,
    strength: float | Mapping[str, float] | None = None,
) -> tuple[quantized_module.Quantized, float]:
    """The model, rounded by the rounding called `name`, and the seconds that took.

    What is solved layer by layer is a stage of the workdir, and goes on after the last
    layer committed; the others are done anew.

    Args:
      defense: The grid and the settings of all roundings.
      name: Of `settings.ROUNDINGS`.
      model: Of `nad_jax.models`.
      variables: Its float variables.
      images: Calibration images.
      layers: From `find_layers`.
      key: Randomness of `BY_CHANCE` and "adam".
      workdir: Keeps layers, records each under the name `stage`, and may ask to stop.
      stage: See `workdir`.
      strength: Of "noise" and "qvec": which of the settings' strengths. Of "random" and
        "top_error": share of weights to flip, for all layers or by layer name, where
        the settings leave it open. Others read none.
    """
    arguments = {
        "grid": defense.grid.grid(),
        **_arguments(defense, name, strength),
    }
    method, adam = arguments["method"], _adam(defense, name)
    options = {
        **_descent(defense),
        "flip_weight_path": _path(defense, name),
        "adam": adam,
    }
    read = layer_rounding.options_read(method, adam)

    def record(report):
        workdir.record("layer", stage=stage, **dataclasses.asdict(report))

    run = functools.partial(
        efrap_lib.efrap,
        model,
        variables,
        images,
        weight_bits=defense.weight_bits,
        act_bits=defense.act_bits,
        **arguments,
        **{option: value for option, value in options.items() if option in read},
        fold_batch_norm=defense.fold_batch_norm,
        quantize_sums=defense.quantize_sums,
        apply_kwargs=EVAL,
        key=key,
        layers=layers,
        mesh=sharding.forward_mesh(images.shape[0]),
    )
    if method not in _SOLVED:
        started = time.perf_counter()
        result = run(on_layer=record)
        jax.block_until_ready(result.variables)
        return result, time.perf_counter() - started

    solved = solved_layers.SolvedLayers(layers)
    results = []

    def solve():
        solved.keep_in(workdir.commits("layers"), workdir)
        results.append(run(on_layer=record, finished=solved))
        return solved.codes

    folder = workdir_lib.folder_name(stage)
    solved.codes = workdir.stage(folder, solved.codes, solve, solved.notes)
    if not results:
        # Every layer is there, so this is one forward pass at most.
        results.append(run(finished=solved))
    # Taken out, since the caller adds them up by rounding.
    return results[0], workdir.seconds.pop(folder)


def choose_flip_weight(
    defense: settings.EfrapSettings,
    model: Any,
    variables: Any,
    images: jax.Array,
    *,
    workdir: workdir_lib.Workdir,
    stage: str,
) -> tuple[flip_weight_choice.Choice, float]:
    """The flip weight for the rounding "efrap", and the seconds that took.

    By clean images alone, see `flip_weight_choice`; a stage of the workdir.

    Args:
      defense: The grid, and how layers are solved.
      model: Of `nad_jax.models`.
      variables: Its float variables.
      images: Calibration images, half of which are held out.
      workdir: Keeps the choice.
      stage: Its name there.
    """
    notes: dict[str, Any] = {}

    def choose():
        choice = flip_weight_choice.choose_flip_weight(
            model,
            variables,
            images,
            weight_bits=defense.weight_bits,
            act_bits=defense.act_bits,
            grid=defense.grid.grid(),
            **_descent(defense),
            fold_batch_norm=defense.fold_batch_norm,
            quantize_sums=defense.quantize_sums,
            apply_kwargs=EVAL,
        )
        # JSON has no numbers for keys.
        notes["tried"] = [list(pair) for pair in choice.disagreement.items()]
        return np.float64(choice.flip_weight)

    folder = workdir_lib.folder_name(stage)
    chosen = workdir.stage(folder, np.float64(0), choose, notes)
    tried = {float(weight): float(share) for weight, share in notes["tried"]}
    choice = flip_weight_choice.Choice(float(chosen), tried)
    return choice, workdir.seconds.pop(folder)


def _descent(defense: settings.EfrapSettings) -> dict[str, Any]:
    """How coordinate descent solves a layer, but for the flip weight."""
    return {
        "flip_form": defense.flip_form,
        "flip_unit": defense.flip_unit,
        "max_sweeps": defense.max_sweeps,
        "starts": defense.starts,
    }


def _path(defense: settings.EfrapSettings, name: str) -> tuple[float, ...]:
    if name != "efrap" or not isinstance(defense, settings.QuantizationSettings):
        return ()
    return defense.flip_weight_path


def _adam(defense: settings.EfrapSettings, name: str) -> settings.AdamSettings | None:
    if not isinstance(defense, settings.QuantizationSettings):
        return None
    if name == "adaround":
        return dataclasses.replace(
            defense.adam, stretch=0.1, exponents=(20.0, 2.0), warm_up=0.2
        )
    return defense.adam


def layer_entries(
    result: quantized_module.Quantized, *, seed: int, row: str, model_name: str
) -> list[dict[str, Any]]:
    """The layers of one row, as a report holds them."""
    return [
        {
            "seed": seed,
            "model": model_name,
            "row": row,
            "layer": report.name,
            "shape": list(report.kernel_shape),
            "weight_bits": report.bits,
            "act_bits": result.act_specs[report.name].bits
            if result.act_specs
            else None,
            "flip_rate": report.flip_rate,
            "objective_nearest": report.objective_nearest,
            "objective": report.objective,
            "soft_output_error": report.soft_output_error,
            "hard_output_error": report.hard_output_error,
            "objective_descent": report.objective_descent,
            "trace": list(report.trace),
            "converged": report.converged,
            "path": list(report.path),
            "seconds": report.seconds,
        }
        for report in result.layers.values()
    ]
