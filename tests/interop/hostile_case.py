# SPDX-License-Identifier: Apache-2.0
"""The form of one hand-made bad file."""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Case:
    """A bad file.

    Attributes:
        name: what is wrong with it.
        words: what its refusal must say; a file refused for another reason than the
            one it was made for tests nothing.
        make: its bytes.
    """

    name: str
    words: str
    make: Callable[[], bytes]
