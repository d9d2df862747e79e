# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in, artefacts out. `reader.read_checkpoint` is the door for both kinds
of guest, the trusted and the hostile: it treats them alike.
"""
