# SPDX-License-Identifier: Apache-2.0
"""Reports in words: the names of rows, one sentence, and Markdown tables.

Tables of result files are printed by this module, never typed:

    python -m nad_jax.report.tables results/efrap/*.json

Files that hold other seeds of one experiment (`experiment_key`) are merged into one
table; other files get tables of their own.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nad_jax.errors import InputError
from nad_jax.report import schema

# Above this many test images the second decimal of a per cent figure means something.
_TWO_DECIMALS_FROM = 2000

# An attack that takes no more than this share of the triggered images sleeps; one that
# takes at least half of them is awake. Words only: no number depends on them.
ASLEEP_ASR = 0.05
AWAKE_ASR = 0.5

# What may differ between runs of one experiment, of a configuration and of its `data`:
# seeds, where files lie, how images are read. Deeper keys of these names are other
# things: a trigger's `seed` draws another trigger.
_RUN_KEYS = frozenset({"seed", "seeds", "workdir", "victim_workdir"})
_DATA_RUN_KEYS = frozenset({"data_dir", "loader", "workers"})

_KINDS = {
    "float": ("Float", "the network as handed over, before anything is done to it"),
    "nearest": (
        "Nearest",
        "what deployment does: each weight goes to the nearest grid point",
    ),
    "stochastic": (
        "Stochastic",
        "control: up or down by chance, more often to the nearer; mean over draws",
    ),
    "reconstruction": (
        "Reconstruction",
        "control: keeps each layer's output and nothing else (flip weight 0)",
    ),
    "flipped": (
        "Flipped",
        "control: each weight goes to its other neighbour, never to the nearest",
    ),
    "floor": ("Floor", "control: each weight goes to the grid point below"),
    "ceil": ("Ceil", "control: each weight goes to the grid point above"),
    "random": (
        "Random flips",
        "control: flips by chance, EFRAP's share unless told; mean over draws",
    ),
    "top_error": (
        "Largest errors",
        "control: flips those nearest moves furthest, EFRAP's share unless told",
    ),
    "noise": (
        "Noise",
        "control: Gaussian noise of so many half steps, then nearest; mean over draws",
    ),
    "qvec": (
        "QVec",
        "control: so many times the shift of nearest rounding subtracted, then nearest",
    ),
    "omse": ("OMSE", "control: nearest on the range of least squared weight error"),
    "aciq": ("ACIQ", "control: nearest on the range that fits a normal or Laplace"),
    "ocs": ("OCS", "control: nearest after outlier input channels were split in two"),
    "gptq": (
        "GPTQ",
        "control: one pass in which weights make up for the errors before them",
    ),
    "adaround": (
        "AdaRound",
        "control: the loop of EFRAP's public code without its flip term",
    ),
    "adam": ("EFRAP, Adam", "defence: the loop of EFRAP's public code"),
    "efrap": (
        "EFRAP",
        "defence: keeps each layer's output and moves weights away from the nearest",
    ),
    "efrap_chosen": (
        "EFRAP, chosen",
        "defence: EFRAP with the flip weight that held-out clean images can afford",
    ),
    "fine_tuning": (
        "Fine-tuning",
        "control: training on the clean images without the attention term",
    ),
    "fine_pruning": (
        "Fine-pruning",
        "control: cuts channels that clean images leave asleep, then fine-tunes",
    ),
    "mode_connectivity": (
        "Mode connectivity",
        "control: a point on a curve from the victim to its fine-tuned copy",
    ),
    "ft_sam": (
        "FT-SAM",
        "control: fine-tuning with gradients taken at the worst point nearby",
    ),
    "ft_sam_kd": (
        "FT-SAM-KD",
        "control: FT-SAM that keeps the victim's own logits on clean images",
    ),
    "nad_sam": (
        "NAD-SAM",
        "variant: NAD with gradients taken at the worst point nearby",
    ),
    "nad_sam_kd": (
        "NAD-SAM-KD",
        "variant: NAD-SAM that keeps the victim's own logits on clean images",
    ),
    "nad": (
        "NAD",
        "defence: training on the clean images towards a teacher's attention maps",
    ),
    "exported": (
        "Exported file",
        "the integers of the written file, run by ONNX Runtime",
    ),
}
# Networks that are shown but never counted, and so have no row.
_OTHERS = {"teacher": "Teacher"}
_DEFENCES = ("efrap", "nad")
# What rows end in that round a repaired network: "nad_nearest".
_THEN_NEAREST = "_nearest"
# Rows of a control that comes in several strengths: "noise_0.5".
_IN_DEGREES = re.compile(r"(.+)_(\d+\.\d+|\d[\d.]*e[-+]\d+)")


# ----------------------------------------------------------------------------- words


def row_label(name: str) -> str:
    """Name of a row as a reader sees it; names without a label stand as they are.

    Example:
      >>> row_label("nad"), row_label("nad_nearest"), row_label("mine")
      ('NAD', 'NAD, then nearest', 'mine')
      >>> row_label("noise_0.5")
      'Noise 0.5'
    """
    in_degrees = _IN_DEGREES.fullmatch(name)
    if in_degrees and in_degrees[1] in _KINDS:
        return f"{_KINDS[in_degrees[1]][0]} {in_degrees[2].removesuffix('.0')}"
    repair = name.removesuffix(_THEN_NEAREST)
    if repair != name and repair in _KINDS:
        return f"{_KINDS[repair][0]}, then nearest"
    return _KINDS[name][0] if name in _KINDS else _OTHERS.get(name, name)


def row_description(row: schema.Row) -> str:
    """What was done to the network of this row, as half a sentence; may be empty."""
    own = row.extra.get("description")
    if isinstance(own, str):
        return own
    in_degrees = _IN_DEGREES.fullmatch(row.name)
    kind = in_degrees[1] if in_degrees else row.name
    if kind in _KINDS:
        return _KINDS[kind][1]
    if row.name.removesuffix(_THEN_NEAREST) in _KINDS:
        return "control: the repaired network, rounded to nearest on the same grid"
    return ""


def worst_draw(rows: Iterable[schema.Row]) -> float | None:
    """Highest ASR of any draw in rows that are means over draws; None if none is."""
    draws = [asr for row in rows for asr in row.extra.get("asr_draws", ())]
    return max((asr for asr in draws if asr is not None), default=None)


def is_defence(name: str) -> bool:
    """Whether the row is one of the defences rather than a control."""
    return name in _DEFENCES


def bits_label(weight_bits: int | None, act_bits: int | None) -> str:
    """Bit widths in the usual shorthand.

    Example:
      >>> bits_label(4, None), bits_label(4, 8), bits_label(None, None)
      ('W4', 'W4A8', 'float')
    """
    weights = "" if weight_bits is None else f"W{weight_bits}"
    activations = "" if act_bits is None else f"A{act_bits}"
    return weights + activations or "float"


def decimals_for(rows: Iterable[schema.Row]) -> int:
    """Decimals of a per cent figure that the number of test images supports."""
    largest = max((row.acc_count for row in rows), default=0)
    return 2 if largest >= _TWO_DECIMALS_FROM else 1


def hundredfold(fraction: float | None, decimals: int = 1) -> str:
    """Fraction as a per cent figure without the sign; a dash for None.

    Example:
      >>> hundredfold(0.9875), hundredfold(None)
      ('98.8', '–')
    """
    return "–" if fraction is None else f"{100 * fraction:.{decimals}f}"


def percent(fraction: float | None, decimals: int = 1) -> str:
    """As `hundredfold`, with the sign after a narrow no-break space."""
    text = hundredfold(fraction, decimals)
    return text if fraction is None else f"{text}\N{NARROW NO-BREAK SPACE}%"


def duration(seconds: float | None) -> str:
    """Seconds as text, with one decimal below a hundred; a dash for None."""
    if seconds is None:
        return "–"
    return f"{seconds:.1f}" if seconds < 99.95 else f"{seconds:,.0f}"


def counts_text(counts: Sequence[int]) -> str:
    """Denominators in words; those of several seeds are only listed if they differ.

    Example:
      >>> counts_text([1500, 1500]), counts_text([500, 499]), counts_text([])
      ('1,500', '500 / 499', '–')
    """
    different = list(dict.fromkeys(counts))
    return " / ".join(f"{count:,}" for count in different) or "–"


def describe_state(asr: float) -> str:
    """One word for an attack success rate: asleep, half awake, or awake."""
    if asr <= ASLEEP_ASR:
        return "asleep"
    return "awake" if asr >= AWAKE_ASR else "half awake"


# -------------------------------------------------------------------------- headline


def pick_story(
    groups: Sequence[schema.Aggregate],
) -> tuple[schema.Aggregate | None, schema.Aggregate | None, schema.Aggregate | None]:
    """The three rows that tell the story: before, deployed, defended.

    Args:
      groups: What `schema.aggregate` returns.

    Returns:
      Float, nearest and defended row of the model in question; None for a row that is
      not there. The nearest row is the one with the bit widths of the defended one.
    """
    victims = [group for group in groups if group.model != "clean"]
    defended = next((g for name in _DEFENCES for g in victims if g.name == name), None)
    before = next((g for g in victims if g.name == "float"), None)
    nearest = [g for g in victims if g.name == "nearest"]
    if defended is not None and defended.weight_bits is not None:
        nearest = [g for g in nearest if _bits(g) == _bits(defended)]
    return before, next(iter(nearest), None), defended


def headline(rows: Iterable[schema.Row | Mapping[str, Any]]) -> str:
    """One sentence that says what happened, with numbers; plain text.

    It claims no more than the rows show: a backdoor that did not wake up, or a
    defence that did not hold, is called that.
    """
    groups = schema.aggregate(rows)
    before, nearest, defended = pick_story(groups)
    decimals = decimals_for(row for group in groups for row in group.rows)

    def asr(group: schema.Aggregate) -> str:
        return f"ASR {percent(group.mean('asr'), decimals)}"

    def state(group: schema.Aggregate | None) -> str | None:
        value = None if group is None else group.mean("asr")
        return None if value is None else describe_state(value)

    parts = []
    if before is not None and state(before) is not None:
        verb = {"asleep": "sleeps", "awake": "is awake"}.get(state(before) or "")
        parts.append(
            f"the backdoor {verb or 'is half awake'} in the float model ({asr(before)})"
        )
    if nearest is not None and state(nearest) is not None:
        verb = {
            ("asleep", "awake"): "wakes",
            ("asleep", "half awake"): "half wakes",
            ("asleep", "asleep"): "does not wake",
        }.get((state(before) or "asleep", state(nearest) or ""))
        verb = verb or f"is {state(nearest)}"
        subject = "" if parts else "the backdoor "
        parts.append(
            f"{subject}{verb} when {_rounding_words(nearest)} ({asr(nearest)})"
        )
    if defended is not None and state(defended) is not None:
        threat = state(before) if nearest is None else state(nearest)
        verb = {
            ("awake", "asleep"): "puts it back to sleep",
            ("half awake", "asleep"): "puts it back to sleep",
            ("awake", "half awake"): "weakens it",
            ("asleep", "asleep"): "has nothing to do",
            ("asleep", "half awake"): "half wakes it",
            ("asleep", "awake"): "wakes it",
        }.get((threat or "", state(defended) or ""), "does not stop it")
        if threat is None:
            verb = f"leaves the backdoor {state(defended)}"
        elif nearest is None and verb == "puts it back to sleep":
            verb = "puts it to sleep"
        same_grid = nearest is not None and _bits(nearest) == _bits(defended)
        where = " on the same grid" if same_grid else ""
        text = f"{row_label(defended.name)}{where} {verb} ({asr(defended)})"
        parts.append(text + _accuracy_words(defended, before, decimals))
    sentence = _join(parts) or _accuracy_sentence(groups, decimals)
    seeds = max((group.n for group in groups), default=0)
    tail = f" Figures are means over {seeds} seeds." if seeds > 1 else ""
    return sentence[:1].upper() + sentence[1:] + "." + tail


def comparison(rows: Iterable[schema.Row | Mapping[str, Any]]) -> str:
    """What the controls and the clean model did, in one or two sentences; plain text.

    Belongs beside every `headline`: a defence that does no better than a control of
    three lines is not worth its name. Empty if there are neither.
    """
    groups = schema.aggregate(rows)
    decimals = decimals_for(row for group in groups for row in group.rows)
    story = pick_story(groups)
    controls = [
        f"{_label_with_bits(group, story[2])} {percent(group.mean('asr'), decimals)}, "
        f"{percent(group.mean('acc'), decimals)}"
        for group in groups
        if group.model != "clean"
        and not any(group is told for told in story)
        and group.mean("asr") is not None
    ]
    text = f"For comparison (ASR, ACC): {'; '.join(controls)}." if controls else ""
    clean = [group for group in groups if group.model == "clean"]
    before = next((g for g in clean if g.name == "float"), None)
    after = next((g for name in _DEFENCES for g in clean if g.name == name), None)
    if before is not None and after is not None:
        text += (
            f" A model without a backdoor has {percent(before.mean('acc'), decimals)} "
            f"accuracy in float and {percent(after.mean('acc'), decimals)} after "
            f"{row_label(after.name)}."
        )
    return text.strip()


def _label_with_bits(group: schema.Aggregate, other: schema.Aggregate | None) -> str:
    """Label of a row; with its bits if they are not those of the defended row."""
    label = row_label(group.name)
    if other is None or _bits(group) == _bits(other):
        return label
    return f"{label} {bits_label(*_bits(group))}"


def _bits(group: schema.Aggregate) -> tuple[int | None, int | None]:
    return (group.weight_bits, group.act_bits)


def _rounding_words(group: schema.Aggregate) -> str:
    if group.weight_bits is None:
        return "the network is quantized"
    text = f"the weights are rounded to {group.weight_bits} bits"
    if group.act_bits is not None:
        text += f" and the activations to {group.act_bits}"
    return text


def _accuracy_words(
    defended: schema.Aggregate, before: schema.Aggregate | None, decimals: int
) -> str:
    text = f" at an accuracy of {percent(defended.mean('acc'), decimals)}"
    if before is not None:
        text += f", against {percent(before.mean('acc'), decimals)} in float"
    return text


def _accuracy_sentence(groups: Sequence[schema.Aggregate], decimals: int) -> str:
    """For a model nobody knows a trigger of."""
    shown = [group for group in groups if group.model != "clean"] or groups
    figures = "; ".join(
        f"{row_label(group.name)} {percent(group.mean('acc'), decimals)}"
        for group in shown
    )
    return f"no trigger is known, so only accuracy was measured: {figures}"


def _join(parts: Sequence[str]) -> str:
    if len(parts) <= 1:
        return "".join(parts)
    return ", ".join(parts[:-1]) + ", and " + parts[-1]


# -------------------------------------------------------------------------- markdown

_HEAD = (
    ("Model", "Rounding or defence", "Bits", "ACC %", "ASR %", "RA %")
    + ("Flip rate %", "Seeds", "Seconds")
)  # fmt: skip


def markdown_table(
    reports: Sequence[Mapping[str, Any]],
    *,
    decimals: int | None = None,
    caption: bool = True,
) -> str:
    """Markdown table of the rows of all reports, seeds merged.

    Args:
      reports: Reports of one experiment, or of several.
      decimals: Decimals of per cent figures; None lets the number of images decide.
      caption: Whether a line below the table says what the numbers are shares of.

    Returns:
      One table per experiment, "mean ± sample standard deviation" where there are
      several seeds. Ends with a newline.

    Raises:
      InputError: If there is no report, one is damaged, or two of the same
        experiment hold the same seed.
    """
    if not reports:
        raise InputError("no report was given; a table needs at least one")
    for report in reports:
        schema.validate(report)
    experiments = _group_by_experiment(reports)
    blocks = []
    for experiment in experiments:
        rows = [
            schema.Row.from_dict(r) for report in experiment for r in report["rows"]
        ]
        groups = schema.aggregate(rows)
        places = decimals_for(rows) if decimals is None else decimals
        lines = [_line(_HEAD), _line(["---"] * 3 + ["---:"] * 6)]
        lines += [_line(_cells(group, places)) for group in groups]
        block = "\n".join(lines) + "\n"
        if len(experiments) > 1:
            block = f"{_table_title(experiment[0], experiments[0][0])}\n\n{block}"
        if caption:
            block += "\n" + _caption(groups) + "\n"
        blocks.append(block)
    return "\n".join(blocks)


def experiment_key(report: Mapping[str, Any]) -> str:
    """The same for reports that may be read as seeds of one experiment, else another.

    The number of devices is part of it: by the order of float sums it decides outcomes
    near a threshold.
    """
    return json.dumps([report.get("attack"), _setup(report)], sort_keys=True)


def _group_by_experiment(
    reports: Iterable[Mapping[str, Any]],
) -> list[list[Mapping[str, Any]]]:
    """Reports of equal `experiment_key`, in first-seen order."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for report in reports:
        groups.setdefault(experiment_key(report), []).append(report)
    return list(groups.values())


def _setup(report: Mapping[str, Any]) -> dict[str, Any]:
    """Configuration without what may differ between runs, and the number of devices."""
    config = {k: v for k, v in report["config"].items() if k not in _RUN_KEYS}
    data = config.get("data")
    if isinstance(data, Mapping):
        config["data"] = {k: v for k, v in data.items() if k not in _DATA_RUN_KEYS}
    return {**config, "devices": len(report.get("devices", ()))}


def _cells(group: schema.Aggregate, decimals: int) -> list[str]:
    name = _escape(row_label(group.name))
    return [
        group.model,
        f"**{name}**" if is_defence(group.name) else name,
        bits_label(group.weight_bits, group.act_bits),
        *(
            _with_std(group.stats[key], lambda x: hundredfold(x, decimals))
            for key in ("acc", "asr", "ra", "flip_rate")
        ),
        str(group.n),
        _with_std(group.stats["seconds"], duration),
    ]


def _with_std(value: schema.Stat, text_of: Any) -> str:
    text = text_of(value.mean)
    return text if value.std is None else f"{text} ± {text_of(value.std)}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _caption(groups: Sequence[schema.Aggregate]) -> str:
    acc = counts_text([count for g in groups for count in g.counts("acc_count")])
    asr = counts_text([count for g in groups for count in g.counts("asr_count")])
    text = f"ACC over {acc} clean test images"
    if asr not in ("–", "0"):
        text += (
            f"; ASR and RA over {asr} triggered ones of other classes than the target"
        )
    seeds = sorted({row.seed for group in groups for row in group.rows})
    text += f"; seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    if len(seeds) > 1:
        text += ", mean ± sample standard deviation"
    return text + "."


def _table_title(report: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    """Title of the table and what sets its configuration apart from the first."""
    mine, theirs = dict(_leaves(_setup(report))), dict(_leaves(_setup(first)))
    keys = [key for key in mine if key not in theirs or mine[key] != theirs[key]]
    difference = ", ".join(f"{key}={mine[key]}" for key in keys)
    title = f"**{_escape(report.get('title') or 'Report')}**"
    return f"{title} ({_escape(difference)})" if difference else title


def _leaves(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, value


def _escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line and in one cell."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables of the report files named on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m nad_jax.report.tables",
        description="Markdown tables from report files, seeds of one config merged.",
    )
    parser.add_argument("files", nargs="+", metavar="REPORT.json")
    parser.add_argument("--decimals", type=int, choices=range(5), metavar="0-4")
    parser.add_argument("--no-caption", action="store_true")
    arguments = parser.parse_args(argv)
    try:
        reports = [schema.read_report(path) for path in arguments.files]
        text = markdown_table(
            reports, decimals=arguments.decimals, caption=not arguments.no_caption
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
