# SPDX-License-Identifier: Apache-2.0
"""--help of a script that imports torch at its head, as the references do."""

import argparse

import torch

from benchmarks import protocol


def run(channel: protocol.Channel, options: dict) -> None:
    argparse.ArgumentParser(prog="main.py").format_help()
    channel.ready(
        versions={"torch": str(torch.__version__)}, threads=torch.get_num_threads()
    )
