# SPDX-License-Identifier: Apache-2.0
"""Every file is the old one or the new one, and whatever prevents that is one line."""

import json
import math
import os

import pytest

from nad_jax import errors, whole_file


def test_parts_follow_each_other_and_nothing_else_is_left(tmp_path):
    whole_file.write_bytes(tmp_path / "x", b"one", memoryview(b"two"), bytearray(b"3"))
    assert (tmp_path / "x").read_bytes() == b"onetwo3"
    assert os.listdir(tmp_path) == ["x"]


def test_text_is_utf_8_and_json_is_ascii(tmp_path):
    whole_file.write_text(tmp_path / "x.txt", "Zürich \ud800\n")
    assert (tmp_path / "x.txt").read_bytes() == "Zürich ?\n".encode()
    whole_file.write_json(tmp_path / "x.json", {"name": "Zürich \ud800", "n": [1, 0.5]})
    text = (tmp_path / "x.json").read_bytes().decode("ascii")
    assert json.loads(text) == {"name": "Zürich \ud800", "n": [1, 0.5]}


@pytest.mark.parametrize("bad", [math.nan, math.inf, object(), b"bytes", {1, 2}])
def test_what_json_does_not_have_is_refused_and_the_old_file_stays(tmp_path, bad):
    path = tmp_path / "x.json"
    whole_file.write_json(path, {"good": 1})
    with pytest.raises(errors.InputError, match="x.json' as JSON") as caught:
        whole_file.write_json(path, {"a": [0, bad]})
    assert "\n" not in str(caught.value)
    assert json.loads(path.read_text()) == {"good": 1}
    assert os.listdir(tmp_path) == ["x.json"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_rubbish(
    tmp_path, monkeypatch, step
):
    path = tmp_path / "x.json"
    whole_file.write_json(path, {"good": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(errors.InputError, match="No space left"):
        whole_file.write_json(path, {"good": 2})
    assert json.loads(path.read_text()) == {"good": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_the_bytes_are_on_disk_before_they_take_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (order.append("fsync"), fsync(f))[1])

    def record(temporary, target):
        name = os.path.basename(temporary)
        assert name.startswith(".x.json.") and name.endswith(".tmp")
        order.append("replace")
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", record)
    whole_file.write_json(tmp_path / "x.json", {})
    assert order == ["fsync", "replace", "fsync"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    places = [tmp_path / "no\nne" / "x", tmp_path / "file" / "x", tmp_path, "a\0b", "."]
    for path in places:
        with pytest.raises(errors.InputError, match="cannot write") as caught:
            whole_file.write_json(path, {})
        assert "\n" not in str(caught.value)


def test_written_files_have_the_usual_permissions(tmp_path):
    ordinary = tmp_path / "ordinary"
    ordinary.write_text("")
    whole_file.write_json(tmp_path / "x.json", {})
    assert (tmp_path / "x.json").stat().st_mode == ordinary.stat().st_mode


def test_a_file_is_removed_and_one_that_is_not_there_is_no_matter(tmp_path):
    (tmp_path / "x").write_text("")
    whole_file.remove(tmp_path / "x")
    whole_file.remove(tmp_path / "x")
    assert os.listdir(tmp_path) == []
    with pytest.raises(errors.InputError, match="cannot remove"):
        whole_file.remove(tmp_path)
