# SPDX-License-Identifier: Apache-2.0
"""Colours that can be told from their ground, in light and in dark mode."""

import re

import numpy as np
import pytest

from nad_jax.report import style


def _luminance(colour):
    digits = colour[1:] if len(colour) == 7 else "".join(2 * c for c in colour[1:])
    values = np.array([int(digits[i : i + 2], 16) for i in (0, 2, 4)]) / 255
    linear = np.where(
        values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4
    )
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def _contrast(first, second):
    low, high = sorted((_luminance(first), _luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_and_marks_stand_out_in_both_modes(mode):
    """WCAG 2.2: 4.5 for text, 3 for what a drawing consists of."""
    light, dark = style.STYLE.split("prefers-color-scheme: dark", 1)
    colours = dict(re.findall(r"--([a-z]+): (#[0-9a-f]+)", light))
    if mode == "dark":
        block = dark[: dark.index("}\n}")]
        colours.update(re.findall(r"--([a-z]+): (#[0-9a-f]+)", block))
    for ground in ("paper", "panel"):
        for name in ("ink", "soft"):
            assert _contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
    for name in ("asr", "efrap"):  # these two colour text as well
        assert _contrast(colours[name], colours["paper"]) >= 4.5, name
    for name in ("acc", "time", "reconstruction", "stochastic", "flipped", "other"):
        assert _contrast(colours[name], colours["paper"]) >= 3, name
    for name in ("acc", "asr", "time"):
        assert _contrast(colours[name], colours["track"]) >= 3, name
