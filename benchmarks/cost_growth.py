# SPDX-License-Identifier: Apache-2.0
"""Time and memory of EFRAP against images, layers and width, and of a whole ResNet-18.

    python -m benchmarks.cost_growth

One process for each point, which solves the net twice: the first time with compilation
(from an empty compile cache), the second without. Writes a table, and a drawing beside
it. Nothing is reported while other processes are busy.
"""

import argparse
import math
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import cases, machine, protocol, results, run
from nad_jax import whole_file
from nad_jax.report import markup

_BASE = {"arch": "resnet_14", "width": 1.0, "images": 1024, "size": 16}
# What grows -> the points, each what is different from `_BASE`.
SERIES: dict[str, list[dict[str, Any]]] = {
    "images": [{"images": count} for count in (64, 256, 1024, 4096)],
    "layers": [{"arch": f"resnet_{depth}"} for depth in (8, 14, 20, 32)],
    "width": [{"width": width} for width in (0.5, 1.0, 2.0, 4.0)],
    "resnet_18": [{"arch": "resnet_18", "size": 32}],
}


def measure(
    quiet: run.Quiet, work: pathlib.Path, series: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Series -> its points, with what each has cost."""
    bench = run.Bench(
        cases.Case("growth", "processes", "seconds", ours=(), theirs=()),
        pythons={"ours": sys.executable},
        work=work,
        quiet=quiet,
    )
    found: dict[str, list[dict[str, Any]]] = {}
    known: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name in series:
        found[name] = []
        for change in SERIES[name]:
            options = {**_BASE, **change}
            key = tuple(options.values())
            if key not in known:
                side = cases.Side("", "growth", options, cold=True)
                _, facts, peak = quiet.run(
                    lambda side=side: bench.process("ours", side, to_ready=True)
                )
                facts = {k: v for k, v in facts.items() if k != "event"}
                known[key] = {**options, **facts, "peak_bytes": peak}
                print(_row(known[key]), flush=True)
            found[name].append(known[key])
    return found


_HEAD = (
    "| net | width | images | layers | weights | first s | second s | peak GB |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|"
)


def _row(point: Mapping[str, Any]) -> str:
    cells = [
        f"{point['arch']}, {point['size']} px",
        f"{point['width']:g}",
        str(point["images"]),
        str(point["layers"]),
        f"{point['weights']:,}",
        f"{point['first_seconds']:.1f}",
        f"{point['second_seconds']:.1f}",
        f"{point['peak_bytes'] / 1e9:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


# ------------------------------------------------------------------------------ drawing

_PANEL, _LEFT, _TOP, _GAP = 200, 60, 50, 50
_VALUES = {
    "images": lambda point: point["images"],
    "layers": lambda point: point["layers"],
    "width": lambda point: point["width"],
}
_COLOURS = {"second_seconds": "#0072b2", "peak_bytes": "#c14600"}


def draw(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Each series: seconds (blue) and memory (orange) over those of its first point.

    Both axes are logarithmic, to one scale; a cost in proportion is a diagonal.
    """
    names = [name for name in found if name in _VALUES]
    width = _LEFT + len(names) * (_PANEL + _GAP)
    shapes: list[markup.Child] = [
        markup.el(
            "text",
            "EFRAP, times its first point: seconds (blue), peak memory (orange)",
            x=8,
            y=20,
            font_weight="bold",
        ),
    ]
    reach = math.log2(64)
    for i, name in enumerate(names):
        left = _LEFT + i * (_PANEL + _GAP)

        def place(x, y, left=left):
            across = left + _PANEL * math.log2(x) / reach
            down = _TOP + _PANEL * (1 - math.log2(max(y, 0.5)) / reach)
            return f"{across:.1f},{down:.1f}"

        points = found[name]
        xs = [_VALUES[name](point) / _VALUES[name](points[0]) for point in points]
        diagonal = f"M {place(1, 1)} L {place(64, 64)}"
        shapes.append(markup.el("path", d=diagonal, stroke="#bbb", fill="none"))
        for value, colour in _COLOURS.items():
            ys = [point[value] / points[0][value] for point in points]
            places = [place(x, y) for x, y in zip(xs, ys, strict=True)]
            line = f"M {' L '.join(places)}"
            shapes.append(
                markup.el("path", d=line, stroke=colour, stroke_width=2, fill="none")
            )
        title = f"{name}: {_VALUES[name](points[0]):g} to {_VALUES[name](points[-1]):g}"
        shapes.append(markup.el("text", title, x=left, y=_TOP - 10))
        for times in (1, 4, 16, 64):
            x, y = place(times, times).split(",")
            bottom = _TOP + _PANEL + 16
            label = f"{times}x"
            shapes.append(markup.el("text", label, x=x, y=bottom, text_anchor="middle"))
            shapes.append(markup.el("text", label, x=left - 6, y=y, text_anchor="end"))
    return markup.picture(shapes, width=width, height=_TOP + _PANEL + 60)


def main(argv: Sequence[str]) -> int:
    """Exit code: 0 done, 2 refused, in one line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cost_growth")
    parser.add_argument("--series", action="append", choices=list(SERIES))
    run.add_quiet_options(parser)
    parser.add_argument("--out", type=pathlib.Path, default=run.RESULTS)
    arguments = parser.parse_args(argv)
    quiet = run.quiet_of(arguments)
    print(_HEAD)
    with tempfile.TemporaryDirectory(prefix="nad_jax_benchmark_") as work:
        try:
            quiet.wait()
            found = measure(quiet, pathlib.Path(work), arguments.series or list(SERIES))
        except (run.Refused, protocol.SideFailed) as failure:
            print(f"benchmarks: {failure}", file=sys.stderr)
            return 2
    content = {
        "machine": machine.describe(),
        "other_cores_worst": quiet.worst,
        "stolen_cores_worst": quiet.stolen,
        "series": found,
    }
    results.write(arguments.out / "cost_growth.json", content)
    whole_file.write_text(arguments.out / "cost_growth.svg", draw(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
