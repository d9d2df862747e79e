# SPDX-License-Identifier: Apache-2.0
"""Starts one task of PyTorch's side, with as many threads as PyTorch chooses.

TASK is a key of `TASKS`, OPTIONS a JSON object with what the task is told.
"""

import sys

from benchmarks import protocol

TASKS = {
    "peaks": "benchmarks.theirs.peaks:run",
    "victim": "benchmarks.theirs.whole:victim",
    "nad_step": "benchmarks.theirs.steps:nad_step",
    "victim_step": "benchmarks.theirs.steps:victim_step",
    "evaluation": "benchmarks.theirs.steps:evaluation",
    "erase": "benchmarks.theirs.whole:erase",
    "efrap": "benchmarks.theirs.rounding:efrap",
    "help": "benchmarks.theirs.help:run",
    "agreement": "benchmarks.theirs.agreement:run",
}

if __name__ == "__main__":
    protocol.serve(TASKS, *sys.argv[1:])
