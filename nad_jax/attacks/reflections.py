# SPDX-License-Identifier: Apache-2.0
"""Pictures of things that are not in the room, as a window pane shows them (Refool).

The attack lays photographs over images as if they were mirrored in glass. Here the
photographs are drawn: random scenes whose spectrum falls with the frequency as that of
photographs does, so that no second data set is needed.

References:
  Liu, Ma, Bailey, Lu, "Reflection Backdoor: A Natural Backdoor Attack on Deep Neural
  Networks", ECCV 2020.
"""

import jax
import jax.numpy as jnp
import numpy as np

# A reflection out of focus is blurred by so much, a ghost lies so far beside itself:
# shares of the width.
_BLUR = (1 / 64, 1 / 16)
_GHOST_SHIFT = (1 / 16, 1 / 8)
# A thick pane mirrors twice; the stronger image has this share of the light.
_FIRST_SURFACE = (0.5, 0.85)


def draw(
    image_shape: tuple[int, int, int], *, count: int, ghost_rate: float, key: jax.Array
) -> np.ndarray:
    """Reflections: ghosts (seen twice, sharp) and others (out of focus).

    Args:
      image_shape: ``(H, W, C)``.
      count: How many.
      ghost_rate: Share of ghosts, in [0, 1]; they come first.
      key: Typed key; decides scenes, blur and shift.

    Returns:
      float32 ``[count, H, W, C]``, each from 0 to 1.
    """
    scene_key, amount_key = jax.random.split(key)
    scenes = _scenes(image_shape, count, scene_key)
    amounts = np.asarray(jax.random.uniform(amount_key, (count, 3)), np.float64)
    width = image_shape[1]
    reflections = []
    for i, (scene, amount) in enumerate(zip(scenes, amounts, strict=True)):
        if i < round(ghost_rate * count):
            shift = [max(1, round(width * _between(_GHOST_SHIFT, a))) for a in amount]
            one = ghost(scene, shift=(shift[0], shift[1]), amount=amount[2])
        else:
            one = blur(scene, sigma=width * _between(_BLUR, amount[0]))
        reflections.append(_stretch(one))
    return np.stack(reflections).astype(np.float32)


def ghost(scene: np.ndarray, *, shift: tuple[int, int], amount: float) -> np.ndarray:
    """The scene and, weaker, itself again so many rows and columns further.

    Args:
      scene: ``[H, W, C]``; goes on at the opposite border.
      shift: Rows and columns.
      amount: From 0, both alike, to 1, the second hardly seen.
    """
    first = _between(_FIRST_SURFACE, amount)
    return first * scene + (1 - first) * np.roll(scene, shift, axis=(0, 1))


def blur(scene: np.ndarray, *, sigma: float) -> np.ndarray:
    """The scene under a Gaussian of standard deviation `sigma` pixels."""
    rows, columns = _frequencies(scene.shape[0], scene.shape[1])
    gain = np.exp(-2 * (np.pi * sigma) ** 2 * (rows**2 + columns**2))
    spectrum = np.fft.fft2(scene, axes=(0, 1)) * gain[:, :, None]
    return np.fft.ifft2(spectrum, axes=(0, 1)).real


def _scenes(
    image_shape: tuple[int, int, int], count: int, key: jax.Array
) -> np.ndarray:
    """Noise with amplitude 1 / frequency, float64 ``[count, H, W, C]`` in [0, 1]."""
    noise = jax.random.normal(key, (count, *image_shape), jnp.float32)
    rows, columns = _frequencies(image_shape[0], image_shape[1])
    frequency = np.sqrt(rows**2 + columns**2)
    frequency[0, 0] = np.inf  # no mean: the stretching sets it
    spectrum = np.fft.fft2(np.asarray(noise, np.float64), axes=(1, 2))
    scenes = np.fft.ifft2(spectrum / frequency[None, :, :, None], axes=(1, 2)).real
    return np.stack([_stretch(scene) for scene in scenes])


def _frequencies(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Periods per pixel, down ``[H, 1]`` and across ``[1, W]``."""
    return np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]


def _between(ends: tuple[float, float], amount: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * amount


def _stretch(scene: np.ndarray) -> np.ndarray:
    low, high = scene.min(), scene.max()
    return (scene - low) / max(high - low, 1e-12)
