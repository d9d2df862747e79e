# SPDX-License-Identifier: Apache-2.0
"""Exit codes of small commands: a user's mistake is a line, ours a traceback."""

import pytest

from nad_jax import errors


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (None, 0, ""),
        (errors.InputError("x must be 1, got 2"), 2, "nad_jax: x must be 1, got 2\n"),
        (ZeroDivisionError("oh"), 2, None),
    ],
)
def test_a_command_ends_as_its_error_says(capsys, error, code, lines):
    def run():
        if error is not None:
            raise error

    assert errors.exit_code(run) == code
    said = capsys.readouterr().err
    if lines is None:
        assert said.startswith("Traceback") and "ZeroDivisionError: oh" in said
    else:
        assert said == lines
