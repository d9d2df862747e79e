# SPDX-License-Identifier: Apache-2.0
"""Fine-pruning: cut channels that clean images leave asleep, then fine-tune.

The inputs of the last Dense layer are ranked by their mean magnitude on clean images;
the quietest are cut off, one after the other, for as long as accuracy on *held-out
clean* images stays within a tolerance. (A public port looks at test images here.) What
was cut stays cut during the fine-tuning.

References:
  Liu, Dolan-Gavitt, Garg, "Fine-Pruning: Defending Against Backdooring Attacks on Deep
  Neural Networks", RAID 2018.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from nad_jax import errors, settings
from nad_jax.data import batches
from nad_jax.defenses import base
from nad_jax.models import head
from nad_jax.models import layers as layers_lib
from nad_jax.training import steps

_BATCH_SIZE = 500


def run(
    victim: base.Net,
    clean_data: base.CleanData,
    tuning: settings.TuningSettings,
    pruning: settings.FinePruningSettings,
    *,
    key: jax.Array,
    on_epoch: base.OnEpoch | None = None,
    should_stop: base.ShouldStop | None = None,
    commits: base.CommitsOf | None = None,
) -> base.Defended:
    """The victim without its quiet channels, fine-tuned; see the module docstring.

    Raises:
      InputError: the last layer is not a Dense over one vector per image.
    """
    sample = batches.to_float(jnp.asarray(clean_data.images[:1]))
    path = head.find(victim.model, victim.variables, sample)
    own = layers_lib.get_in(victim.variables["params"], path)
    kept = choose_channels(
        _head_inputs(victim, path, clean_data.images),
        _head_inputs(victim, path, clean_data.validation_images),
        clean_data.validation_labels,
        np.asarray(own["kernel"]),
        np.asarray(own.get("bias", np.zeros(own["kernel"].shape[-1]))),
        max_accuracy_drop=pruning.max_accuracy_drop,
    )
    mask = jnp.asarray(kept[:, None], own["kernel"].dtype)
    project = functools.partial(_cut, path=path, mask=mask)
    start = {**victim.variables, "params": project(victim.variables["params"])}
    loss_fn = steps.classification_loss(victim.model.apply)
    tuned = base.tune(
        victim._replace(variables=start),
        clean_data,
        tuning,
        make_loss=lambda _: loss_fn,
        key=key,
        project=project,
        on_epoch=on_epoch,
        should_stop=should_stop,
        commits=None if commits is None else commits("tuned"),
    )
    cut = {"channels_cut": int(np.sum(~kept)), "channels": len(kept)}
    return tuned._replace(chosen=cut)


def choose_channels(
    inputs: np.ndarray,
    validation_inputs: np.ndarray,
    validation_labels: np.ndarray,
    kernel: np.ndarray,
    bias: np.ndarray,
    *,
    max_accuracy_drop: float,
) -> np.ndarray:
    """Which inputs of a linear classifier stay, bool `[K]`; at least one does.

    Args:
      inputs: Of clean images, `[N, K]`; decide the order.
      validation_inputs: Of held-out clean images, `[M, K]`; decide how many.
      validation_labels: int `[M]`.
      kernel: `[K, C]`.
      bias: `[C]`.
      max_accuracy_drop: What held-out accuracy may lose, a fraction.
    """
    if not len(validation_labels):
        raise errors.InputError(
            "fine-pruning needs held-out images; raise validation_fraction, got 0 of "
            "them"
        )
    kept = np.ones(len(kernel), bool)

    def accuracy(kept):
        logits = (validation_inputs * kept[None]) @ kernel + bias[None]
        return np.mean(np.argmax(logits, axis=1) == validation_labels)

    least = accuracy(kept) - max_accuracy_drop
    for channel in np.argsort(np.mean(np.abs(inputs), axis=0), kind="stable")[:-1]:
        kept[channel] = False
        if accuracy(kept) < least:
            kept[channel] = True
            break
    return kept


def _head_inputs(
    victim: base.Net, path: layers_lib.Path, images: np.ndarray
) -> np.ndarray:
    """What the last Dense layer sees of each image, `[N, K]`."""
    forward = jax.jit(lambda v, x: head.inputs(victim.model, v, x, path))
    outputs = []
    for start in range(0, len(images), _BATCH_SIZE):
        pixels = batches.to_float(jnp.asarray(images[start : start + _BATCH_SIZE]))
        outputs.append(np.asarray(forward(victim.variables, pixels)))
    return np.concatenate(outputs) if outputs else np.zeros((0, 1), np.float32)


def _cut(params, *, path: layers_lib.Path, mask: jax.Array):
    own = layers_lib.get_in(params, path)
    return layers_lib.set_in(params, path, {**own, "kernel": own["kernel"] * mask})
