# SPDX-License-Identifier: Apache-2.0
"""Starts one task of our side as `nad_jax.main` starts a job: same cores, same cache.

TASK is a key of `TASKS`, OPTIONS a JSON object with what the task is told.
"""

import os
import sys

# Read when jax is imported; see nad_jax.main.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from benchmarks import protocol  # noqa: E402

TASKS = {
    "peaks": "benchmarks.ours.peaks:run",
    "data": "benchmarks.ours.files:write_data",
    "judge": "benchmarks.ours.files:judge",
    "nad_step": "benchmarks.ours.steps:nad_step",
    "plain_step": "benchmarks.ours.plain:nad_step",
    "victim_step": "benchmarks.ours.steps:victim_step",
    "evaluation": "benchmarks.ours.steps:evaluation",
    "erase": "benchmarks.ours.whole:erase",
    "efrap": "benchmarks.ours.whole:efrap",
    "growth": "benchmarks.ours.growth:efrap",
    "help": "benchmarks.ours.help:run",
}

if __name__ == "__main__":
    protocol.serve(TASKS, *sys.argv[1:])
