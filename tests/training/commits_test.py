# SPDX-License-Identifier: Apache-2.0
"""A commit comes back with what belongs to it, and costs a twentieth of the time."""

import logging

import numpy as np
import pytest

from nad_jax.training import checkpoints, commits


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when told."""
    now = [100.0]
    monkeypatch.setattr(commits.time, "monotonic", lambda: now[0])
    return now


def test_nothing_committed_is_nothing_restored(tmp_path):
    assert commits.Commits(tmp_path / "none").restore(np.zeros(1)) is None


@pytest.mark.slow
def test_tree_metadata_and_what_was_remembered_come_back(tmp_path):
    first = commits.Commits(tmp_path, remember=lambda: ["a", "b"])
    first.save(3, {"x": np.arange(3)}, {"notes": 1})
    recalled = []
    second = commits.Commits(tmp_path, recall=recalled.append)
    restored = second.restore({"x": np.zeros(3, int)})
    assert restored is not None
    np.testing.assert_array_equal(restored[0]["x"], [0, 1, 2])
    assert restored[1] == {"notes": 1} and recalled == [["a", "b"]]


def test_the_same_step_is_committed_once(tmp_path):
    """A second stop at the place of the first one finds everything on disk."""
    commits.Commits(tmp_path).save(3, np.zeros(1), {})
    again = commits.Commits(tmp_path)
    again.restore(np.zeros(1))
    again.save(3, np.zeros(1), {})
    again.save(4, np.ones(1), {})
    assert checkpoints.steps(tmp_path) == [3, 4]


def test_commits_take_a_twentieth_of_the_time(tmp_path, clock, monkeypatch):
    """The first after ten seconds; then by what the last one has taken."""

    def slow_save(*arguments):
        clock[0] += 2.0

    monkeypatch.setattr(commits.checkpoints, "save", slow_save)
    kept = commits.Commits(tmp_path)
    for seconds, due in ((9.9, False), (0.2, True)):
        clock[0] += seconds
        assert kept.is_due() == due
    kept.save(1, np.zeros(1), {})
    for seconds, due in ((39.9, False), (0.2, True)):
        clock[0] += seconds
        assert kept.is_due() == due


def test_after_damage_the_commit_before_is_used_and_the_bad_one_replaced(
    tmp_path, caplog
):
    kept = commits.Commits(tmp_path)
    for step in (1, 2):
        kept.save(step, np.full(4, step), {})
    for path in (tmp_path / "2").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    resumed = commits.Commits(tmp_path)
    with caplog.at_level(logging.WARNING):
        restored = resumed.restore(np.zeros(4, int))
    assert restored is not None and restored[0].tolist() == [1] * 4
    assert f"{tmp_path / '2'} is damaged" in caplog.text
    resumed.save(2, np.full(4, 7), {})
    again = commits.Commits(tmp_path).restore(np.zeros(4, int))
    assert again is not None and again[0].tolist() == [7] * 4
