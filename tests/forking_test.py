# SPDX-License-Identifier: Apache-2.0
"""Forked children tell what they did, and how they ended."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

_CODE = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[1])
import forking

def die(tell):
    tell(1)
    os.kill(os.getpid(), signal.SIGKILL)

def answer(question):
    if question == "die":
        os._exit(3)
    return {"double": 2 * question, "pid": os.getpid()}

server = forking.Server(answer)
answers = [server(1), server(2), server(None), server("die"), server(3)]
outcomes = [
    forking.call(lambda tell: tell([1]) or {"a": 2}),
    forking.call(die),
    forking.call(lambda tell: 1 / 0),
    forking.call(lambda tell: os._exit(4)),
]
print(json.dumps([answers, [[*o, o.was_killed] for o in outcomes]]))
"""


@pytest.mark.slow
def test_what_children_tell_survives_them():
    """In an interpreter of its own: here, JAX may have looked for devices."""
    output = subprocess.check_output(
        [sys.executable, "-c", _CODE, pathlib.Path(__file__).parent], text=True
    )
    answers, outcomes = json.loads(output)
    assert [answer.get("double") for answer in answers] == [2, 4, None, None, 6]
    assert "TypeError" in answers[2]["error"] and "wait status" in answers[3]["error"]
    assert answers[0]["pid"] == answers[1]["pid"] != answers[4]["pid"]
    assert outcomes[0] == [0, [[1]], {"a": 2}, None, False]
    assert outcomes[1] == [9, [1], None, None, True]
    assert outcomes[2][2:] == [None, "ZeroDivisionError: division by zero", False]
    assert os.WEXITSTATUS(outcomes[3][0]) == 4 and not outcomes[3][-1]
