# SPDX-License-Identifier: Apache-2.0
"""Where images come from (`sources`, `prepare`) and how they are drawn (`batches`).

Importing this package loads nothing; import the module that is needed.
"""
