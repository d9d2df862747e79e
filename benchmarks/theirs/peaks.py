# SPDX-License-Identifier: Apache-2.0
"""What the machine can do at best, by PyTorch: a large product, a large copy."""

import time

import torch

from benchmarks import protocol

_SIDE = 2048
_FLOATS = 2**25  # 128 MiB, as on our side
_REPEATS = 7


def run(channel: protocol.Channel, options: dict) -> None:
    matrix, vector = torch.ones(_SIDE, _SIDE), torch.ones(_FLOATS)
    product, copy = torch.empty_like(matrix), torch.empty_like(vector)
    channel.ready(
        operations_per_second=2
        * _SIDE**3
        / _best(lambda: torch.matmul(matrix, matrix, out=product)),
        bytes_per_second=2
        * 4
        * _FLOATS
        / _best(lambda: torch.add(vector, 1, out=copy)),
        versions={"torch": str(torch.__version__)},
        threads=torch.get_num_threads(),
    )


def _best(program) -> float:
    seconds = []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        program()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
