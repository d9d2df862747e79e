# SPDX-License-Identifier: Apache-2.0
"""What a user waits for who asks for help."""

import sys

from benchmarks import protocol


def run(channel: protocol.Channel, options: dict) -> None:
    from nad_jax import main

    assert main.main(["nad_jax", "--help"]) == 0
    version = {"python": sys.version.split()[0]}
    channel.ready(versions=version, threads=1)
