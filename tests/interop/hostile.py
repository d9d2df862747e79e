# SPDX-License-Identifier: Apache-2.0
"""All hand-made bad files of this folder, under names that are unique."""

import hostile_containers
import hostile_formats
import hostile_pickles
from hostile_case import Case


def _named(group: str, cases: list[Case]) -> list[Case]:
    return [Case(f"{group}: {case.name}", case.words, case.make) for case in cases]


# Cases that try to cost memory or time.
BOMBS = [
    *hostile_formats.BOMB_CASES,
    *_named("cost", hostile_pickles.COST_CASES),
]
CASES = [
    *_named("tensor", hostile_pickles.TENSOR_CASES),
    *_named("pickle", hostile_pickles.PICKLE_CASES),
    *_named("legacy", hostile_containers.LEGACY_CASES),
    *_named("zip", hostile_containers.ZIP_CASES),
    *_named("entry", hostile_containers.CONTENT_CASES),
    *_named("values", hostile_containers.VALUE_CASES),
    *hostile_formats.SAFETENSORS_CASES,
    *hostile_formats.MSGPACK_CASES,
    *hostile_formats.UNKNOWN_CASES,
    *BOMBS,
]
