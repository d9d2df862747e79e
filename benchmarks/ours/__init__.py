# SPDX-License-Identifier: Apache-2.0
"""Our side of the cases; `python -m benchmarks.ours TASK OPTIONS` runs one of them."""
