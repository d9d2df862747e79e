# SPDX-License-Identifier: Apache-2.0
"""From the nested mapping of a config file to settings."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from nad_jax.errors import InputError
from nad_jax.settings.attacks import RECIPES, AttackSettings
from nad_jax.settings.basics import TriggerSettings
from nad_jax.settings.jobs import JOBS


def parse(mapping: Mapping[str, Any]) -> Any:
    """The settings of the job that a whole config names in `job`.

    Raises:
      InputError: no mapping, an unknown job, or as `from_mapping`.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"config must be a mapping, got {mapping!r:.80}")
    job = mapping.get("job")
    if job not in JOBS:
        raise InputError(f"config.job must be of {', '.join(JOBS)}, got {job!r}")
    return from_mapping(JOBS[job], mapping)


def from_mapping(cls: type, mapping: Mapping[str, Any], where: str = "config") -> Any:
    """An instance of the dataclass `cls` from a nested mapping.

    Args:
      cls: One of the dataclasses above.
      mapping: Keys are field names; a section is a mapping again.
      where: Dotted name of this section, for messages.

    Raises:
      InputError: an unknown or missing key, a value of the wrong type or out of range.
        The message starts with the key's dotted name.
    """
    if not isinstance(mapping, Mapping):
        raise InputError(f"{where} must be a section, got {mapping!r}")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    # As a config has it, not as `dataclasses.asdict` has written it.
    if cls is TriggerSettings and set(mapping) != {"name", "options"}:
        options = {key: value for key, value in mapping.items() if key != "name"}
        mapping = {"name": mapping.get("name"), "options": options}
    if cls is AttackSettings:
        name = mapping.get("name")
        if name not in RECIPES:
            raise InputError(
                f"{where}.name must be of {', '.join(RECIPES)}, got {name!r}"
            )
        hints["recipe"] = RECIPES[name]
    unknown = sorted(set(mapping) - set(fields))
    if unknown:
        raise InputError(
            f"{where}.{unknown[0]} is not known; {where} has {', '.join(fields)}"
        )
    for name, field in fields.items():
        required = (
            field.default is dataclasses.MISSING
            and field.default_factory is dataclasses.MISSING
        )
        if required and name not in mapping:
            raise InputError(f"{where}.{name} is missing")
    values = {
        key: _convert(hints[key], value, f"{where}.{key}")
        for key, value in mapping.items()
    }
    try:
        return cls(**values)
    except InputError as error:
        raise InputError(f"{where}.{error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_mapping(typing.cast(type, hint), value, where)
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None:
            return None
        (hint,) = (a for a in typing.get_args(hint) if a is not type(None))
        return _convert(hint, value, where)
    if origin is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (list, tuple)):
            return tuple(_convert(item, v, where) for v in value)
        return (_convert(item, value, where),)
    item = typing.get_args(hint)[1] if origin is Mapping else Any
    if item is not Any and isinstance(value, Mapping):
        # None is a placeholder that nobody has filled.
        return {
            key: _convert(item, one, f"{where}.{key}")
            for key, one in value.items()
            if one is not None
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            # Without the digits: of more than 4,300, Python prints none.
            raise InputError(
                f"{where} must be a float, at most 1.8e308 in size, got an integer of "
                f"{value.bit_length()} bits"
            ) from None
    if hint is float and isinstance(value, float) and not math.isfinite(value):
        # A report could not hold it, and would say so after the whole run.
        raise InputError(f"{where} must be finite, got {value!r}")
    accepted = origin or hint
    wrong_bool = isinstance(value, bool) and accepted is not bool
    if not isinstance(value, accepted) or wrong_bool:
        raise InputError(f"{where} must be {accepted.__name__}, got {value!r}")
    return value
