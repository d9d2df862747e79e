# SPDX-License-Identifier: Apache-2.0
"""Elements in which nothing but markup is markup."""

import re

from nad_jax.report import markup


def test_invisible_direction_marks_cannot_rearrange_a_line():
    word = "abc\u202e\u2066\u200ddef"
    text = markup.el("p", word, title=word)
    assert text.count("abc") == text.count("def") == 2
    assert not re.search("[\u200b-\u200f\u202a-\u202e\u2060-\u206f]", text)
