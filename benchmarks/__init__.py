# SPDX-License-Identifier: Apache-2.0
"""Timings side by side: this library and our own PyTorch writing of the references.

    python -m benchmarks.run --case=nad_step --torch_python=PATH

`run` starts the sides as child processes (`ours`, `theirs`), lets them work in turn,
and writes `results/<case>.json`. README.md is the ledger of what was tried for speed.
"""
