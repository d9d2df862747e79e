# SPDX-License-Identifier: Apache-2.0
"""PyTorch's side: our own writing of the reference recipes, from their description.

`python -m benchmarks.theirs TASK OPTIONS` runs one task. Needs torch and numpy only, so
its interpreter may be another than that of the library.
"""
