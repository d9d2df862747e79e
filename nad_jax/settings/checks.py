# SPDX-License-Identifier: Apache-2.0
"""What the settings have in common: complaints that name the field and its value."""

from typing import Any

from nad_jax.errors import InputError

# What `is_seed` accepts, in words.
SEEDS = "0 to 2**32 - 1"


def check(settings: Any, name: str, good: bool, accepted: str) -> None:
    if not good:
        raise InputError(f"{name} must be {accepted}, got {getattr(settings, name)!r}")


def check_name(settings: Any, name: str, known: tuple[str, ...]) -> None:
    check(settings, name, getattr(settings, name) in known, f"of {', '.join(known)}")


def check_bits(settings: Any, name: str, *, optional: bool = False) -> None:
    value = getattr(settings, name)
    good = value in range(2, 9) or (optional and value is None)
    check(settings, name, good, "2 to 8" + (" or None" if optional else ""))


def check_widths(settings: Any, name: str) -> None:
    """For several widths at once, each once."""
    widths = getattr(settings, name)
    good = all(bits in range(2, 9) for bits in widths)
    good = good and 0 < len(widths) == len(set(widths))
    check(settings, name, good, "2 to 8, or several such numbers")


def check_different(settings: Any, name: str) -> None:
    values = getattr(settings, name)
    check(settings, name, len(set(values)) == len(values), "all different")


def check_loader(settings: Any) -> None:
    """For jobs that take a part of the training images and look at no more."""
    if settings.data.loader != "device":
        raise InputError(
            f"data.loader must be device in the job {settings.job}, which holds its "
            f"few images in memory, got {settings.data.loader!r}"
        )


def check_patience(settings: Any) -> None:
    good = settings.patience is None or settings.patience >= 1
    check(settings, "patience", good, "at least 1 or None")


def check_seed(settings: Any) -> None:
    check(settings, "seed", is_seed(settings.seed), SEEDS)


def check_seeds(settings: Any) -> None:
    check(settings, "seeds", len(settings.seeds) > 0, "at least one")
    check(settings, "seeds", all(map(is_seed, settings.seeds)), SEEDS)
    check_different(settings, "seeds")


def is_seed(value: Any) -> bool:
    """Whether `jax.random.key` makes another key of it than of any other such number.

    Outside of these, numbers that are equal modulo 2**32 are one key, or none.
    """
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**32
