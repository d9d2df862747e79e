# SPDX-License-Identifier: Apache-2.0
"""The one exception for mistakes a user can provoke.

Its message is a single line that names the offending value and what is accepted.
The program turns it into exit code 2 without a traceback; a library caller sees an
ordinary `ValueError`.
"""


class InputError(ValueError):
    """A value from outside (argument, config, file, data) that cannot be accepted."""
