# SPDX-License-Identifier: Apache-2.0
"""What a report is: rows, the dictionary around them, their check and their file.

Everything else in this package reads the dictionary described here, so it is checked
once, on the way in: numbers are plain Python numbers, fractions lie in [0, 1], and
nothing is NaN. Conventions shared by all files of the package:

- A *row* is one network evaluated once: one rounding or defence, one seed.
- ACC, ASR, RA and the flip rate are fractions in [0, 1], never per cent. `acc_count`
  and `asr_count` are the numbers of images they were divided by.
- `None` means "not measured" (no trigger is known) or "does not apply" (bits of a
  float network).

Keys of a report: `schema`, `config`, `git_commit`, `versions`, `devices`, `seconds`
and `rows` always; `title`, `command`, `layers`, `claims`, `notes` and `curves` when
there is something to say; and the facts a run is found by, such as `attack` and
`dataset`. Entries of `layers` hold `seed`, `row` (the name of the row they belong to),
`layer`, `shape`, `flip_rate`, `objective_nearest`, `objective` and `seconds`, and
optionally `model`, `weight_bits`, `act_bits`, `soft_output_error` and
`hard_output_error` (of a soft rounding before and after it was hardened),
`objective_descent` (what coordinate descent reaches where another solver was used),
`trace` (objective before the first sweep of coordinate descent and after each),
`converged` (whether no further flip would gain) and `path` (what other flip weights
cost: a list of `flip_weight`, `output_error` and `flip_rate`). Entries of `curves` hold
`seed`, `model`, `row`, and `acc` and `asr`, lists by epoch that begin before the first.

A run against a planted backdoor is found by `attack`, `dataset` and `seed` (a list if
there were several); one that rounds weights also by `weight_bits`, and it holds the
list `acceptance`, with `seed` and `accepted` in each entry: whether the attack was what
it claims to be (`nad_jax.acceptance`).
`made_by` lists commit, versions and number of devices of every run that had a part in
it, this one first, if they differ.
"""

import dataclasses
import json
import math
import numbers
import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nad_jax.errors import InputError

SCHEMA = "nad_jax.report/1"
MODELS = ("backdoored", "given", "clean")
METRICS = ("acc", "asr", "ra", "flip_rate", "seconds")

# ASR and RA share their images and exclude each other, so their sum cannot exceed 1;
# the slack is for values that went through float32.
_SUM_SLACK = 1e-4


# ---------------------------------------------------------------------- plain values


def plain(value: Any, where: str = "value") -> Any:
    """Copy of `value` made of plain JSON types only.

    Args:
      value: Mappings, sequences, arrays, scalars (also of numpy and jax), paths.
      where: Name of the value in messages.

    Returns:
      The same content as dict, list, str, int, float, bool and None.

    Raises:
      InputError: For NaN, an infinity, a key that is neither text nor an integer,
        or a type that JSON does not know.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            raise InputError(f"{where} is {number}; a report holds finite numbers")
        return number
    if isinstance(value, Mapping):
        return {
            _plain_key(k, where): plain(v, f"{where}.{k}") for k, v in value.items()
        }
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    # Arrays of numpy and jax, scalars included, without importing either.
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        return plain(value.tolist(), where)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name), f"{where}.{field.name}")
            for field in dataclasses.fields(value)
        }
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    raise InputError(
        f"{where} is of type {type(value).__name__}; a report holds mappings, lists, "
        "text, numbers, true/false and null"
    )


def _plain_key(key: Any, where: str) -> str:
    if isinstance(key, str):
        return key
    if isinstance(key, numbers.Integral) and not isinstance(key, bool):
        return str(int(key))
    raise InputError(f"{where} has the key {key!r}; keys are text or integers")


# ------------------------------------------------------------------------------ rows


@dataclasses.dataclass(frozen=True)
class Row:
    """One network evaluated once.

    Attributes:
      name: What was done to the network: "float", "nearest", "efrap", ...
      model: "backdoored" (planted here), "given" (from outside, nothing known), or
        "clean" (trained here without an attack).
      seed: Seed of the whole run the row belongs to.
      weight_bits: Bits of a weight; None for float.
      act_bits: Bits of an activation; None for float.
      acc: Share of the clean test images classified correctly.
      asr: Share of the triggered test images of other classes that are classified as
        the target; None when no trigger is known.
      ra: Share of the same images classified as what they are; None as for `asr`.
      acc_count: Number of clean test images.
      asr_count: Number of triggered test images whose label is not the target.
      flip_rate: Share of weights whose code differs from nearest rounding on the
        same grid; None for float.
      seconds: Time the defence took (not the evaluation), compilation included.
      extra: Anything else worth keeping; `extra["description"]`, if it is text,
        replaces the explanation of the row on the page.
    """

    name: str
    model: str
    seed: int
    weight_bits: int | None
    act_bits: int | None
    acc: float
    asr: float | None
    ra: float | None
    acc_count: int
    asr_count: int | None
    flip_rate: float | None
    seconds: float | None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = plain(getattr(self, field.name), f"row.{field.name}")
            object.__setattr__(self, field.name, value)
        _check_row(dataclasses.asdict(self), f"row {self.name!r}")

    def to_dict(self) -> dict[str, Any]:
        """The row as it stands in `report.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Row":
        """Row from an entry of `report.json`; keys it does not know go to `extra`."""
        known = {field.name for field in dataclasses.fields(cls)} - {"extra"}
        missing = sorted(known - set(row))
        if missing:
            raise InputError(f"row {row.get('name')!r} lacks {', '.join(missing)}")
        extra = {k: v for k, v in row.items() if k not in known and k != "extra"}
        return cls(
            **{name: row[name] for name in known},
            extra={**extra, **row.get("extra", {})},
        )


# ---------------------------------------------------------------------------- checks


def build_report(
    *,
    title: str,
    config: Mapping[str, Any],
    rows: Iterable[Row | Mapping[str, Any]],
    git_commit: str | None,
    versions: Mapping[str, str],
    devices: Sequence[str],
    seconds: Mapping[str, float],
    layers: Iterable[Mapping[str, Any]] = (),
    claims: Iterable[Mapping[str, Any]] = (),
    notes: Iterable[str] = (),
    curves: Iterable[Mapping[str, Any]] = (),
    command: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Report dictionary, checked and made of plain JSON types.

    Args:
      title: One line for the head of the page.
      config: The whole configuration of the run, nested.
      rows: `Row`s or dictionaries with the same keys.
      git_commit: Commit the run was made with, "-dirty" included; None if unknown.
      versions: Version by package name.
      devices: One line per device.
      seconds: Seconds by stage, in the order they happened.
      layers: Per-layer measurements; see the module docstring.
      claims: `{"text": ..., "passed": bool}` for each thing the run was to show.
      notes: Sentences for the foot of the page.
      curves: Rates by epoch; see the module docstring.
      command: The command that repeats the run; None if there is none.
      facts: Keys of their own beside those above, such as "attack".

    Returns:
      A dictionary that `validate` accepts.

    Raises:
      InputError: As `validate` does.
    """
    report = {
        "schema": SCHEMA,
        "title": title,
        "command": command,
        "config": config,
        "git_commit": git_commit,
        "versions": versions,
        "devices": devices,
        "seconds": seconds,
        "rows": [row.to_dict() if isinstance(row, Row) else row for row in rows],
        "layers": list(layers),
        "claims": list(claims),
        "notes": list(notes),
        "curves": list(curves),
    }
    report = plain({**(facts or {}), **report}, "report")
    validate(report)
    return report


def validate(report: Any) -> None:
    """Check that `report` is a report; returns nothing.

    Keys beyond those of the schema are allowed and ignored, so that newer files stay
    readable.

    Args:
      report: What was read from `report.json`, or is about to be written there.

    Raises:
      InputError: With one line that names the first field that is missing, of the
        wrong type or out of range.
    """
    _need(isinstance(report, Mapping), f"a report is a mapping, not {_show(report)}")
    for key in ("schema", "config", "git_commit", "versions", "devices", "seconds"):
        _need(key in report, f"the report lacks {key!r}")
    _need("rows" in report, "the report lacks 'rows'")
    _need(
        report["schema"] == SCHEMA,
        f"schema is {_show(report['schema'])}; this version reads {SCHEMA!r}",
    )
    _is_mapping(report["config"], "config")
    _is_text(report["git_commit"], "git_commit", optional=True)
    for key in ("title", "command"):
        _is_text(report.get(key), key, optional=True)
    _is_mapping(report["versions"], "versions")
    for name, version in report["versions"].items():
        _is_text(version, f"versions.{name}")
    _is_list(report["devices"], "devices")
    for i, device in enumerate(report["devices"]):
        _is_text(device, f"devices[{i}]")
    _is_mapping(report["seconds"], "seconds")
    for stage, value in report["seconds"].items():
        _is_seconds(value, f"seconds.{stage}")

    _is_list(report["rows"], "rows")
    _need(len(report["rows"]) > 0, "rows is empty; a report has at least one row")
    for i, row in enumerate(report["rows"]):
        _check_row(row, f"rows[{i}]")
    _no_twice(report["rows"], _row_key, "rows")

    for key in ("layers", "claims", "notes", "curves", "acceptance"):
        _is_list(report.get(key, []), key)
    for i, layer in enumerate(report.get("layers", [])):
        _check_layer(layer, f"layers[{i}]")
    _no_twice(report.get("layers", []), _layer_key, "layers")
    for i, claim in enumerate(report.get("claims", [])):
        _is_mapping(claim, f"claims[{i}]")
        _is_text(claim.get("text"), f"claims[{i}].text")
        _is_bool(claim.get("passed"), f"claims[{i}].passed")
    for i, note in enumerate(report.get("notes", [])):
        _is_text(note, f"notes[{i}]")
    for i, curve in enumerate(report.get("curves", [])):
        _check_curve(curve, f"curves[{i}]")
    for i, entry in enumerate(report.get("acceptance", [])):
        _is_mapping(entry, f"acceptance[{i}]")
        _is_integer(entry.get("seed"), f"acceptance[{i}].seed")
        _is_bool(entry.get("accepted"), f"acceptance[{i}].accepted")
    _no_twice(report.get("acceptance", []), lambda entry: entry["seed"], "acceptance")


def _check_row(row: Any, where: str) -> None:
    _is_mapping(row, where)
    for field in dataclasses.fields(Row):
        _need(
            field.name == "extra" or field.name in row, f"{where} lacks {field.name!r}"
        )
    _is_text(row["name"], f"{where}.name")
    _need(row["name"] != "", f"{where}.name is empty")
    _is_model(row["model"], f"{where}.model")
    _is_integer(row["seed"], f"{where}.seed")
    _is_bits(row["weight_bits"], f"{where}.weight_bits")
    _is_bits(row["act_bits"], f"{where}.act_bits")
    _is_fraction(row["acc"], f"{where}.acc")
    for key in ("asr", "ra", "flip_rate"):
        _is_fraction(row[key], f"{where}.{key}", optional=True)
    _is_count(row["acc_count"], f"{where}.acc_count")
    _is_count(row["asr_count"], f"{where}.asr_count", optional=True)
    _is_seconds(row["seconds"], f"{where}.seconds", optional=True)
    _is_mapping(row.get("extra", {}), f"{where}.extra")

    _need(row["acc_count"] > 0, f"{where}.acc is a share of acc_count = 0 images")
    if row["asr"] is not None or row["ra"] is not None:
        _need(
            bool(row["asr_count"]),
            f"{where} has asr or ra, but asr_count is {_show(row['asr_count'])}",
        )
    if row["asr"] is not None and row["ra"] is not None:
        _need(
            row["asr"] + row["ra"] <= 1 + _SUM_SLACK,
            f"{where}: asr {row['asr']} and ra {row['ra']} add up to more than 1, but "
            "no image can count for both",
        )


def _check_layer(layer: Any, where: str) -> None:
    _is_mapping(layer, where)
    keys = ("seed", "row", "layer", "shape", "flip_rate")
    for key in (*keys, "objective_nearest", "objective", "seconds"):
        _need(key in layer, f"{where} lacks {key!r}")
    _is_integer(layer["seed"], f"{where}.seed")
    _is_text(layer["row"], f"{where}.row")
    _is_text(layer["layer"], f"{where}.layer")
    _is_list(layer["shape"], f"{where}.shape")
    for i, size in enumerate(layer["shape"]):
        _is_count(size, f"{where}.shape[{i}]")
    _is_fraction(layer["flip_rate"], f"{where}.flip_rate", optional=True)
    for key in ("objective_nearest", "objective", "seconds"):
        _is_seconds(layer[key], f"{where}.{key}", optional=True)
    _is_model(layer.get("model", "backdoored"), f"{where}.model")
    for key in ("soft_output_error", "hard_output_error", "objective_descent"):
        _is_seconds(layer.get(key), f"{where}.{key}", optional=True)
    reached = layer.get("trace", [])
    _is_list(reached, f"{where}.trace")
    for i, value in enumerate(reached):
        _is_seconds(value, f"{where}.trace[{i}]")
    _is_bool(layer.get("converged"), f"{where}.converged", optional=True)
    for key in ("weight_bits", "act_bits"):
        _is_bits(layer.get(key), f"{where}.{key}")
    points = layer.get("path", [])
    _is_list(points, f"{where}.path")
    for i, point in enumerate(points):
        here = f"{where}.path[{i}]"
        _is_mapping(point, here)
        for key in ("flip_weight", "output_error"):
            _is_seconds(point.get(key), f"{here}.{key}")
        _is_fraction(point.get("flip_rate"), f"{here}.flip_rate")


def _check_curve(curve: Any, where: str) -> None:
    _is_mapping(curve, where)
    for key in ("seed", "model", "row", "acc", "asr"):
        _need(key in curve, f"{where} lacks {key!r}")
    _is_integer(curve["seed"], f"{where}.seed")
    _is_model(curve["model"], f"{where}.model")
    _is_text(curve["row"], f"{where}.row")
    for key in ("acc", "asr"):
        _is_list(curve[key], f"{where}.{key}")
        for i, share in enumerate(curve[key]):
            _is_fraction(share, f"{where}.{key}[{i}]", optional=key == "asr")
    _need(
        len(curve["acc"]) == len(curve["asr"]) > 0,
        f"{where} has {len(curve['acc'])} values of acc and {len(curve['asr'])} of asr",
    )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise InputError(message)


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _number(value: Any) -> bool:
    # bool is an int in Python; a metric that is True is a mistake.
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_mapping(value: Any, where: str) -> None:
    _need(isinstance(value, Mapping), f"{where} is {_show(value)}; it is a mapping")


def _is_list(value: Any, where: str) -> None:
    good = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    _need(good, f"{where} is {_show(value)}; it is a list")


def _is_text(value: Any, where: str, *, optional: bool = False) -> None:
    if not (optional and value is None):
        _need(isinstance(value, str), f"{where} is {_show(value)}; it is text")


def _is_bool(value: Any, where: str, *, optional: bool = False) -> None:
    if not (optional and value is None):
        _need(
            isinstance(value, bool), f"{where} is {_show(value)}; it is true or false"
        )


def _is_model(value: Any, where: str) -> None:
    _need(
        value in MODELS, f"{where} is {_show(value)}; it is one of {', '.join(MODELS)}"
    )


def _is_integer(value: Any, where: str) -> None:
    good = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    _need(good, f"{where} is {_show(value)}; it is an integer")


def _is_count(value: Any, where: str, *, optional: bool = False) -> None:
    if not (optional and value is None):
        _is_integer(value, where)
        _need(value >= 0, f"{where} is {_show(value)}; it is a count, 0 or more")


def _is_bits(value: Any, where: str) -> None:
    if value is not None:
        _is_integer(value, where)
        _need(value >= 1, f"{where} is {_show(value)}; it is 1 or more, or null: float")


def _is_fraction(value: Any, where: str, *, optional: bool = False) -> None:
    if not (optional and value is None):
        good = _number(value) and 0 <= value <= 1  # false for NaN too
        _need(good, f"{where} is {_show(value)}; it is a fraction in [0, 1]")


def _is_seconds(value: Any, where: str, *, optional: bool = False) -> None:
    if not (optional and value is None):
        good = _number(value) and 0 <= value < math.inf
        _need(good, f"{where} is {_show(value)}; it is a finite number, 0 or more")


def _row_key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (row["model"], row["name"], row["weight_bits"], row["act_bits"], row["seed"])


def _layer_key(layer: Mapping[str, Any]) -> tuple[Any, ...]:
    bits = (layer.get("weight_bits"), layer.get("act_bits"))
    model = layer.get("model", "backdoored")
    return (model, layer["row"], *bits, layer["seed"], layer["layer"])


def _no_twice(entries: Iterable[Any], key_of: Any, where: str) -> None:
    """A measurement that is there twice would count twice in every mean."""
    seen = set()
    for entry in entries:
        key = key_of(entry)
        _need(key not in seen, f"{where} holds {_show(key)} twice")
        seen.add(key)


# ----------------------------------------------------------------------- aggregation


@dataclasses.dataclass(frozen=True)
class Stat:
    """Mean and spread of one metric.

    Attributes:
      mean: Arithmetic mean over the seeds that have a value; None if none has.
      std: Sample standard deviation, divided by `n - 1`; None below two values.
      n: Number of values.
    """

    mean: float | None
    std: float | None
    n: int


@dataclasses.dataclass(frozen=True)
class Aggregate:
    """The rows that differ only in their seed.

    Attributes:
      name: As in `Row`.
      model: As in `Row`.
      weight_bits: As in `Row`.
      act_bits: As in `Row`.
      stats: Mean, deviation and count of values, keyed by the names in `METRICS`.
      rows: The rows themselves, in the order they came.
    """

    name: str
    model: str
    weight_bits: int | None
    act_bits: int | None
    stats: Mapping[str, Stat]
    rows: tuple[Row, ...]

    @property
    def n(self) -> int:
        """Number of seeds."""
        return len(self.rows)

    def mean(self, metric: str) -> float | None:
        """Mean of one of `METRICS` over the seeds that have it."""
        return self.stats[metric].mean

    def counts(self, key: str) -> tuple[int, ...]:
        """Denominators ("acc_count" or "asr_count") seed by seed, None left out."""
        counts = (getattr(row, key) for row in self.rows)
        return tuple(count for count in counts if count is not None)


def stat(values: Iterable[float | None]) -> Stat:
    """Mean, sample standard deviation and count of the values that are not None.

    Example:
      >>> stat([1.0, 2.0, None, 6.0])
      Stat(mean=3.0, std=2.6457513110645907, n=3)
    """
    known = [float(value) for value in values if value is not None]
    if not known:
        return Stat(None, None, 0)
    std = statistics.stdev(known) if len(known) > 1 else None
    return Stat(statistics.fmean(known), std, len(known))


def aggregate(rows: Iterable[Row | Mapping[str, Any]]) -> list[Aggregate]:
    """Means over seeds, one per model, name and bit widths, in first-seen order.

    Args:
      rows: Rows of one or several reports of the same configuration.

    Returns:
      One `Aggregate` per (model, name, weight_bits, act_bits).

    Raises:
      InputError: If a seed is there twice, which would count it twice.
    """
    typed = [row if isinstance(row, Row) else Row.from_dict(row) for row in rows]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in typed:
        key = (row.model, row.name, row.weight_bits, row.act_bits)
        group = groups.setdefault(key, [])
        _need(
            row.seed not in {other.seed for other in group},
            f"row {row.name!r} of the {row.model} model is there twice for seed "
            f"{row.seed}",
        )
        group.append(row)
    return [
        Aggregate(
            name=name,
            model=model,
            weight_bits=weight_bits,
            act_bits=act_bits,
            stats={
                metric: stat(getattr(r, metric) for r in group) for metric in METRICS
            },
            rows=tuple(group),
        )
        for (model, name, weight_bits, act_bits), group in groups.items()
    ]


# ----------------------------------------------------------------------------- files


def read_report(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The report in a JSON file, checked.

    Raises:
      InputError: If the file cannot be read, is not JSON or is not a report.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        report = json.loads(text, parse_constant=_refuse_constant)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not a JSON file: {error}") from None
    try:
        validate(report)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return report


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"it holds {name}")
