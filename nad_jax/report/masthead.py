# SPDX-License-Identifier: Apache-2.0
"""The top of the page: title, headline, three large numbers, claims, facts."""

from collections.abc import Mapping, Sequence
from typing import Any

from nad_jax.report import markup, schema, tables


def header(
    report: Mapping[str, Any],
    groups: Sequence[schema.Aggregate],
    decimals: int,
    title: str,
) -> markup.Markup:
    """Everything above the first section."""
    total = sum(report["seconds"].values())
    facts = [f"{total:,.0f} s in all"] if report["seconds"] else []
    if report["devices"]:
        facts.append(device_names(report["devices"]))
    if report["git_commit"]:
        commit, _, dirty = report["git_commit"].partition("-")
        changed = " with local changes" if dirty else ""
        facts.append(f"commit {commit[:12]}{changed}")
    comparison = tables.comparison(report["rows"])
    return markup.el(
        "header",
        markup.el("p", "nad_jax", markup.el("span", " report"), class_="brand"),
        markup.el("h1", title),
        markup.el("p", tables.headline(report["rows"]), class_="lead"),
        markup.el("p", comparison, class_="comparison") if comparison else None,
        _tiles(groups, decimals),
        _claims(report.get("claims", [])),
        markup.el("p", " · ".join(facts), class_="facts") if facts else None,
    )


def device_names(devices: Sequence[str]) -> str:
    """Each kind of device once, with how many there are."""
    names = list(dict.fromkeys(devices))
    return ", ".join(
        name if devices.count(name) == 1 else f"{devices.count(name)} × {name}"
        for name in names
    )


def _tiles(groups: Sequence[schema.Aggregate], decimals: int) -> markup.Markup | None:
    """Float, deployed, defended: the attack success rate as three large numbers."""
    tiles = []
    for group in tables.pick_story(groups):
        asr = None if group is None else group.mean("asr")
        if group is None or asr is None:
            continue
        state = tables.describe_state(asr)
        bits = tables.bits_label(group.weight_bits, group.act_bits)
        label = tables.row_label(group.name)
        label += "" if group.weight_bits is None else f" {bits}"
        tiles.append(
            markup.el(
                "li",
                markup.el("span", label, class_="tile-label"),
                markup.el("span", state, class_="tile-state"),
                markup.el("span", tables.percent(asr, decimals), class_="tile-number"),
                markup.el("span", "attack success", class_="tile-unit"),
                markup.el(
                    "span",
                    f"accuracy {tables.percent(group.mean('acc'), decimals)}",
                    class_="tile-acc",
                ),
                class_=f"tile {state.replace(' ', '-')}",
            )
        )
    if not tiles:
        return None
    return markup.el("ol", tiles, class_="tiles", aria_label="From float to defended")


def _claims(claims: Sequence[Mapping[str, Any]]) -> markup.Markup | None:
    items = [
        markup.el(
            "li",
            markup.el("span", "✓" if claim["passed"] else "✗", aria_hidden="true"),
            markup.el("strong", "Holds: " if claim["passed"] else "Does not hold: "),
            claim["text"],
            class_="holds" if claim["passed"] else "fails",
        )
        for claim in claims
    ]
    return (
        markup.el("ul", items, class_="claims", aria_label="Claims") if items else None
    )
