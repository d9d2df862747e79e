# SPDX-License-Identifier: Apache-2.0
"""The end of the page: time by stage, what the numbers mean, how to repeat the run."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax.report import drawings, markup, masthead, schema, tables


def time(seconds: Mapping[str, float]) -> list[markup.Child]:
    """Seconds of each stage as shares of them all."""
    total = sum(seconds.values())
    if not total:
        return []
    unit = "\N{NARROW NO-BREAK SPACE}s"
    bars = [
        drawings.Bar(stage, tables.duration(value) + unit, value / total)
        for stage, value in seconds.items()
    ]
    title = f"{tables.duration(total)}{unit} in all, by stage"
    drawing = drawings.bar_chart(bars, css="time", title=title)
    return [
        markup.el("figure", markup.el("figcaption", title), drawing, class_="time-bars")
    ]


def definitions(groups: Sequence[schema.Aggregate]) -> list[markup.Child]:
    """What each number of the page is, with how many images it was measured on."""
    acc = tables.counts_text([c for g in groups for c in g.counts("acc_count")])
    asr = tables.counts_text([c for g in groups for c in g.counts("asr_count")])
    # Without a trigger nothing was counted, but the terms still need their meaning.
    asr = "the" if asr in ("–", "0") else asr
    entries = [
        (
            "ACC",
            f"Accuracy: of {acc} clean test images, the share classified correctly.",
        ),
        (
            "ASR",
            f"Attack success rate: of {asr} triggered test images whose label is not "
            "the target, the share classified as the target. Images of the target "
            "class are left out: an attack that does nothing would succeed on them.",
        ),
        (
            "RA",
            "Robust accuracy: of the same images as for ASR, the share classified as "
            "what they are. High in a repaired network, low in a broken one.",
        ),
        (
            "Flip rate",
            "Of all quantized weights, the share whose code is not the one that "
            "nearest rounding on the same grid gives. Nearest is 0 by definition.",
        ),
        (
            "Bits",
            "W4: weights on 16 levels, activations in float. W4A8: activations on 256.",
        ),
        (
            "±",
            "Sample standard deviation over seeds, divided by n − 1. A seed is a run.",
        ),
    ]
    return [
        markup.el("dl", [[markup.el("dt", t), markup.el("dd", d)] for t, d in entries])
    ]


def reproduction(report: Mapping[str, Any]) -> list[markup.Child]:
    """Command, commit, devices, versions, configuration and notes of the run."""
    versions = ", ".join(f"{k} {v}" for k, v in report["versions"].items())
    facts = [
        ("Commit", report["git_commit"] or "unknown (not run from a checkout)"),
        ("Devices", masthead.device_names(report["devices"]) or "unknown"),
        ("Versions", versions or "unknown"),
    ]
    config = json.dumps(report["config"], indent=2, ensure_ascii=False)
    command = report.get("command")
    notes = report.get("notes", [])
    return [
        markup.el("pre", markup.el("code", command), class_="command")
        if command
        else None,
        markup.el(
            "dl",
            [[markup.el("dt", term), markup.el("dd", text)] for term, text in facts],
        ),
        markup.el(
            "details",
            markup.el("summary", "The whole configuration"),
            markup.el("pre", markup.el("code", config)),
        ),
        markup.el("ul", [markup.el("li", note) for note in notes], class_="notes")
        if notes
        else None,
        markup.el(
            "p", "The numbers behind this page are in report.json.", class_="note"
        ),
    ]
