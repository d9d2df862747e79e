# SPDX-License-Identifier: Apache-2.0
"""What flax.serialization writes reads as what was written."""

import good_files as good
import jax.numpy as jnp
import numpy as np
import pytest
from flax import serialization

from nad_jax.interop import msgpack_reader

TREE = {
    "step": 4,
    "rate": 0.5,
    "params": {
        "conv": {"kernel": np.arange(24, dtype=np.float32).reshape(2, 3, 4)},
        "head": {"bias": np.array([1, -2], np.int8), "scale": np.float32(0.25)},
        "empty": {"w": np.zeros((0, 5), np.float16)},
    },
    "batch_stats": {"bn": {"mean": jnp.array([1.5, -2.0], jnp.bfloat16)}},
    "opt_state": {"0": {"count": np.int32(3)}},
}
EXPECTED = {
    "params/conv/kernel": TREE["params"]["conv"]["kernel"],
    "params/head/bias": TREE["params"]["head"]["bias"],
    "params/head/scale": np.asarray(TREE["params"]["head"]["scale"]),
    "params/empty/w": TREE["params"]["empty"]["w"],
    "batch_stats/bn/mean": np.asarray(TREE["batch_stats"]["bn"]["mean"]),
}


def assert_read(path, data: bytes) -> None:
    path.write_bytes(data)
    arrays, metadata = msgpack_reader.read_msgpack(path)
    assert metadata == {"step": 4, "rate": 0.5}
    assert arrays.keys() == EXPECTED.keys()
    for name, array in EXPECTED.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)
        assert not arrays[name].flags.writeable


def test_a_flax_tree_reads_as_its_values(tmp_path):
    assert_read(tmp_path / "m", serialization.msgpack_serialize(TREE))


@pytest.mark.parametrize("chunk_bytes", [4, 20, 64])
def test_arrays_that_flax_split_are_joined(tmp_path, monkeypatch, chunk_bytes):
    """Flax splits at 1 GiB; here at a few elements."""
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", chunk_bytes)
    data = serialization.msgpack_serialize(TREE)
    assert b"__msgpack_chunked_array__" in data
    assert_read(tmp_path / "m", data)


def test_our_own_small_writer_writes_what_flax_reads():
    """The hostile files are lies about files that flax itself understands."""
    data, expected = good.msgpack_sample()
    tree = serialization.msgpack_restore(data)
    for name, array in expected.items():
        leaf = tree
        for part in name.split("/"):
            leaf = leaf[part]
        np.testing.assert_array_equal(leaf, array, strict=True)


def test_sample_reads_as_its_values(tmp_path):
    data, expected = good.msgpack_sample()
    (tmp_path / "m").write_bytes(data)
    arrays, _ = msgpack_reader.read_msgpack(tmp_path / "m")
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(arrays[name], array, strict=True)
