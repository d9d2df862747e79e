# SPDX-License-Identifier: Apache-2.0
"""Every attack has settings, and the other way round."""

from nad_jax import settings
from nad_jax.attacks import registry


def test_attacks_and_their_settings_have_the_same_names():
    assert list(registry.ATTACKS) == list(settings.RECIPES)
    for name in registry.ATTACKS:
        assert f"\n{name} " in registry.__doc__
