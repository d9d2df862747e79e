# SPDX-License-Identifier: Apache-2.0
"""Single values out of messages: as protobuf reads them, or one line."""

import importlib
import time
import tracemalloc
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from nad_jax.data import tf_examples

_INTEGERS = strategies.integers(-(2**63), 2**63 - 1)
_FEATURES = strategies.one_of(
    strategies.lists(strategies.binary(max_size=300), max_size=3),
    strategies.lists(_INTEGERS, max_size=3),
    strategies.lists(strategies.just(0.5), max_size=3),
)
_NAMES = ("image", "label", "id")


def message(features: dict) -> bytes:
    proto: Any = importlib.import_module("tensorflow_datasets.proto")
    example = proto.tf_example_pb2.Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        if not values:
            continue
        if isinstance(values[0], bytes):
            feature.bytes_list.value.extend(values)
        elif isinstance(values[0], int):
            feature.int64_list.value.extend(values)
        else:
            feature.float_list.value.extend(values)
    return example.SerializeToString()


@pytest.mark.slow
@hypothesis.settings(max_examples=200, deadline=None)
@hypothesis.given(
    strategies.dictionaries(
        strategies.sampled_from((*_NAMES, "image/other", "Label", "")), _FEATURES
    )
)
def test_single_values_are_those_that_were_written(features):
    expected = {}
    for name in _NAMES:
        values = features.get(name, [])
        fits = len(values) == 1 and not isinstance(values[0], float)
        expected[name] = values[0] if fits else None
    assert tf_examples.read(message(features), _NAMES) == expected


def test_integers_may_be_written_unpacked():
    """As other writers than TFDS do: each with a tag of its own."""
    record = b"\x0a\x10\x0a\x0e\x0a\x05label\x12\x05\x1a\x03\x08\xac\x02"
    assert tf_examples.read(record, ("label",)) == {"label": 300}


def test_a_message_cut_off_or_damaged_anywhere_is_a_value_error():
    good = message({"image": [b"x" * 200], "label": [2**40], "id": [b"abc"]})
    draw = np.random.default_rng(0)
    for place in range(len(good)):
        flipped = bytes([good[place] ^ int(draw.integers(1, 256))])
        for bad in (good[:place], good[:place] + flipped + good[place + 1 :]):
            try:
                values = tf_examples.read(bad, _NAMES)
            except ValueError as error:
                assert "\n" not in str(error)
            else:
                assert set(values) == set(_NAMES)


@pytest.mark.parametrize(
    "record",
    [
        b"\x0a\x80\x80\x80\x02" + b"\x0a\x00" * 2**21,  # 2 M empty features
        b"\x08\x00" * 2**21,  # fields that no example has
        b"\x0d\0\0\0\0" * 2**20,  # the same, of fixed width
        b"\xff" * 2**22,
        b"\x0b" * 2**22,
    ],
)
def test_a_message_of_very_many_parts_is_refused_at_once(record):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="example"):
        tf_examples.read(record, _NAMES)
    assert time.perf_counter() - start < 1


def test_lists_that_nobody_asked_for_take_no_memory():
    """A megabyte of numbers of one byte; protobuf makes eight of it."""
    record = message({"other": [1] * 2**20, "label": [7]})
    tracemalloc.start()
    try:
        assert tf_examples.read(record, ("label",)) == {"label": 7}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**16
