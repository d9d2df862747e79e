# SPDX-License-Identifier: Apache-2.0
"""Where images come from (`sources`, `prepare`) and how they are drawn (`batches`).

Images are arrays, or stay in their files (`stored`) and are read by batches (`stream`).

Importing this package loads nothing; import the module that is needed.
"""
