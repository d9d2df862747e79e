# SPDX-License-Identifier: Apache-2.0
"""A run that stops itself at a point asked for; see `resume_sweep.py`.

    python tests/resume_child.py \\
        '{"point": POINT, "signal": 9, "states": FILE}' ARGUMENTS

ARGUMENTS are those of `python -m nad_jax.main`. POINT is null, or one of

    ["training", NAME, STEP]   before that step of the training kept under NAME
    ["layer", STAGE, N]        in the middle of the n-th layer of a solve

Commits are made after every third program or layer, not by the clock, so that there is
always something to go on from and something to lose. FILE gets a line for each
training that ends: the hash of its whole state. FILE.modules is what was imported.
"""

import hashlib
import json
import os
import sys

import jax
import numpy as np

from nad_jax import main, roundings, solved_layers
from nad_jax.defenses import moments
from nad_jax.training import commits, loop

_EVERY = 3


def install(point: list | None, number: int, states: str) -> None:
    """Wraps what passes the points."""

    def pass_by(*here):
        if point is not None and list(here) == point:
            os.kill(os.getpid(), number)

    asked = [0]

    def is_due(self):
        asked[0] += 1
        return asked[0] % _EVERY == 0

    commits.Commits.is_due = is_due
    real_fit, real_compile = loop.fit, loop._compile_steps
    training = [""]

    def fit(*arguments, commits, **options):
        training[0] = f"{commits._folder.parent.name}/{commits._folder.name}"
        state = real_fit(*arguments, commits=commits, **options)
        with open(states, "a", encoding="utf-8") as file:
            file.write(json.dumps([training[0], _digest(state)]) + "\n")
        return state

    def compile_steps(*arguments):
        run_steps = real_compile(*arguments)

        def run(state, *rest, count):
            pass_by("training", training[0], int(state.step))
            return run_steps(state, *rest, count=count)

        return run

    loop.fit, loop._compile_steps = fit, compile_steps

    real_quantize = roundings.quantize
    real_keep, real_collect = (
        solved_layers.SolvedLayers.keep_in,
        moments.Collector.collect,
    )
    solve: dict = {}

    def quantize(*arguments, stage, **options):
        solve["stage"] = stage
        return real_quantize(*arguments, stage=stage, **options)

    def keep_in(self, *arguments):
        solve["layers"] = self
        real_keep(self, *arguments)

    def collect(self, *arguments):
        result = real_collect(self, *arguments)
        pass_by("layer", solve["stage"], len(solve["layers"]) + 1)
        return result

    roundings.quantize = quantize
    solved_layers.SolvedLayers.keep_in = keep_in
    moments.Collector.collect = collect


def _digest(state) -> str:
    """Of every bit of a train state."""
    state = state.replace(key=jax.random.key_data(state.key))
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    order = json.loads(sys.argv[1])
    install(order["point"], order["signal"], order["states"])
    code = main.main(["main", *sys.argv[2:]])
    with open(f"{order['states']}.modules", "w", encoding="utf-8") as file:
        json.dump(list(sys.modules), file)
    sys.exit(code)
