# SPDX-License-Identifier: Apache-2.0
"""Mutated files are refused or read as an independent reader reads them."""

import os

import fuzz
import good_files as good
import numpy as np
import oracles
import pytest

from nad_jax import errors
from nad_jax.interop import reader

SEED = int(os.environ.get("NAD_JAX_FUZZ_SEED", "20261122"))


def assert_clean(report: dict) -> None:
    print(f"seed {report['seed']}: {report['outcomes']} in {report['seconds']} s")
    assert report["failures"] == [], f"seed {report['seed']}"
    assert not fuzz.is_bad(report), report
    for name, counts in report["by_format"].items():
        # A fuzzer whose every file dies, or none, looks at nothing.
        assert counts["accepted"] > 0.02 * report["cases"] / 4, name
        assert counts["rejected"] > 0.3 * report["cases"] / 4, name


@pytest.mark.slow
def test_a_thousand_mutants():
    assert_clean(fuzz.fuzz(SEED, 1000))


@pytest.mark.slow
def test_five_thousand_mutants():
    assert_clean(fuzz.fuzz(SEED + 1, 5_000))


def test_a_run_that_was_stopped_continues(tmp_path, monkeypatch):
    """Finished pieces are not run again, and the report is that of one run."""
    monkeypatch.setattr(fuzz, "_PIECE", 20)
    made_by = {"git_commit": "0123", "versions": {}}
    monkeypatch.setattr(fuzz.result_file, "provenance", lambda: made_by)
    whole = fuzz.fuzz(SEED, 70)
    run, ranges, pieces = fuzz.run, [], tmp_path / "pieces"

    def run_two(seed, start, stop):
        if len(ranges) == 2:
            raise KeyboardInterrupt
        ranges.append((start, stop))
        return run(seed, start, stop)

    monkeypatch.setattr(fuzz, "run", run_two)
    with pytest.raises(KeyboardInterrupt):
        fuzz.fuzz(SEED, 70, pieces=pieces)
    pieces.write_text(pieces.read_text() + '{"seed": 1, "ran')  # cut off in a write
    monkeypatch.setattr(fuzz, "run", run)
    other_seed = fuzz._read_pieces(pieces, SEED + 1, made_by)
    for commit in ("4567", "0123-dirty", None):
        assert fuzz._read_pieces(pieces, SEED, made_by | {"git_commit": commit}) == {}
    resumed = fuzz.fuzz(SEED, 70, pieces=pieces)
    assert ranges == [(0, 20), (20, 40)] and other_seed == {}
    for key in ("cases", "seed", "outcomes", "by_format", "failures"):
        assert resumed[key] == whole[key], key


def test_growth_without_bound_is_bad():
    report = fuzz.fuzz(SEED, 4)
    assert not fuzz.is_bad(report)
    assert fuzz.is_bad(report | {"peak_memory_growth_mb": fuzz.MAX_GROWTH_MB + 1})
    assert fuzz.is_bad(report | {"outcomes": report["outcomes"] | {"hang": 1}})


def test_a_case_is_the_same_file_again():
    for index in range(40):
        assert fuzz.mutant(5, index) == fuzz.mutant(5, index)
    assert fuzz.mutant(5, 0) != fuzz.mutant(6, 0)


@pytest.mark.parametrize("format_name", reader.FORMATS)
def test_the_oracle_sees_one_wrong_number(format_name):
    data, arrays = good.SAMPLES[format_name]()
    oracles.check(format_name, data, arrays)
    for name, array in arrays.items():
        if array.size:
            wrong = array.copy()
            wrong.reshape(-1).view(np.uint8)[0] ^= 1
            with pytest.raises(oracles.Disagreement):
                oracles.check(format_name, data, arrays | {name: wrong})


@pytest.mark.parametrize("change", ["rename", "reshape", "retype", "drop", "add"])
@pytest.mark.parametrize("format_name", reader.FORMATS)
def test_the_oracle_sees_a_wrong_name_shape_dtype_or_count(format_name, change):
    data, arrays = good.SAMPLES[format_name]()
    name = next(key for key, array in arrays.items() if array.shape == (4, 3))
    array = arrays.pop(name)
    changed = {
        "rename": {name + "x": array},
        "reshape": {name: array.reshape(3, 4)},
        "retype": {name: array.view("<i4")},
        "drop": {},
        "add": {name: array, "more": array},
    }[change]
    with pytest.raises(oracles.Disagreement):
        oracles.check(format_name, data, arrays | changed)


def test_crashes_hangs_and_long_messages_are_counted(tmp_path, monkeypatch):
    """The harness itself: each bad behaviour of a reader gets its name."""

    def crash(path):
        raise IndexError(path)

    def hang(path):
        while True:
            pass

    def two_lines(path):
        raise errors.InputError("one\ntwo")

    path = str(tmp_path / "m")
    monkeypatch.setattr(fuzz, "_HANG_SECONDS", 0.05)
    for behaviour, outcome in ((crash, "crash"), (hang, "hang"), (two_lines, "crash")):
        monkeypatch.setattr(reader, "read_checkpoint", behaviour)
        monkeypatch.setattr(fuzz.signal, "SIGALRM", fuzz.signal.SIGALRM)
        previous = fuzz.signal.signal(fuzz.signal.SIGALRM, fuzz._on_alarm)
        try:
            assert fuzz.outcome_of(path, b"")[0] == outcome
        finally:
            fuzz.signal.signal(fuzz.signal.SIGALRM, previous)
