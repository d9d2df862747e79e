# SPDX-License-Identifier: Apache-2.0
"""The one exception for mistakes a user can provoke.

Its message is a single line that names the offending value and what is accepted.
The program turns it into exit code 2 without a traceback; a library caller sees an
ordinary `ValueError`.
"""

import sys
import traceback
from collections.abc import Callable


class InputError(ValueError):
    """A value from outside (argument, config, file, data) that cannot be accepted."""


def exit_code(run: Callable[[], None]) -> int:
    """0 after `run()`, a command; 2 after anything it raises, told as above."""
    try:
        run()
    except InputError as error:
        print(f"nad_jax: {error}", file=sys.stderr)
        return 2
    except Exception:
        # Python's own exit code would be 1, which is a verdict.
        traceback.print_exc()
        return 2
    return 0
