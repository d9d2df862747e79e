# SPDX-License-Identifier: Apache-2.0
"""The model is found among the other entries, or the choice is handed back."""

import good_files as good
import numpy as np
import pytest
from good_files import Ordered, Tensor, legacy_file, msgpack, program

from nad_jax import errors
from nad_jax.interop import model_entry, reader

STORAGES = {
    "0": good.storage("float32", (1, 2)),
    "1": good.storage("float32", (3, 4)),
}
ONE = Tensor("0", "float32", 2, (2,), (1,))
TWO = Tensor("1", "float32", 2, (2,), (1,))


@pytest.fixture
def read(tmp_path):
    """Reads a tree written as a legacy stream, or bytes as they are."""

    def read_tree(tree: object, entry: str | None = None) -> reader.Checkpoint:
        path = tmp_path / "model"
        raw = isinstance(tree, bytes)
        path.write_bytes(tree if raw else legacy_file(program(tree), STORAGES))
        return reader.read_checkpoint(path, entry=entry)

    return read_tree


@pytest.mark.parametrize("wrapper", model_entry.WRAPPERS)
def test_each_wrapper_is_opened(read, wrapper):
    found = read({wrapper: {"a": ONE, "b": TWO}, "epoch": 7, "optimizer": {}})
    assert list(found.arrays) == ["a", "b"]
    assert found.metadata == {"epoch": 7}


def test_plain_state_dict_is_its_own_entry(read):
    assert list(read(Ordered({"a": ONE, "b": TWO})).arrays) == ["a", "b"]


def test_a_wrapper_name_that_holds_a_text_is_metadata(read):
    """{'model': 'resnet18', 'state_dict': ...} is common."""
    found = read({"model": "resnet18", "state_dict": {"a": ONE, "b": TWO}})
    assert found.metadata == {"model": "resnet18"}


@pytest.mark.parametrize("prefix", ["module.", "module.module."])
def test_data_parallel_prefixes_go(read, prefix):
    found = read({"state_dict": {prefix + "a.w": ONE, prefix + "b": TWO}})
    assert list(found.arrays) == ["a.w", "b"]


def test_a_prefix_only_some_names_have_stays(read):
    found = read({"module.a": ONE, "b": TWO})
    assert list(found.arrays) == ["module.a", "b"]


def test_two_entries_are_listed_and_one_can_be_chosen(read):
    tree = {"state_dict": {"a": ONE}, "model": {"b": TWO}}
    with pytest.raises(errors.InputError, match="'state_dict', 'model'.*entry="):
        read(tree)
    assert list(read(tree, entry="model").arrays) == ["b"]
    assert list(read(tree, entry="state_dict").arrays) == ["a"]


def test_an_entry_of_another_name_can_be_chosen(read):
    tree = {"model": {"a": ONE}, "model_ema": {"b": TWO}}
    assert list(read(tree).arrays) == ["a"]
    assert list(read(tree, entry="model_ema").arrays) == ["b"]
    with pytest.raises(errors.InputError, match="no model entry 'x'.*'model_ema'"):
        read(tree, entry="x")


def test_flax_train_state_gives_its_variables(read):
    weights = np.ones((2, 2), "<f4")
    variables = {"params": {"conv": {"kernel": weights}}, "batch_stats": {"m": weights}}
    state = {"step": 9, **variables, "opt_state": {"0": {"mu": weights * np.nan}}}
    expected = ["params/conv/kernel", "batch_stats/m"]
    assert list(read(msgpack(state)).arrays) == expected
    assert list(read(msgpack({"model": variables})).arrays) == expected
    assert read(msgpack(state)).metadata == {"step": 9}


def test_bare_flax_parameters_keep_their_names(read):
    tree = {"conv": {"kernel": np.ones(2, "<f4")}, "bias": np.zeros(1, "<f4")}
    assert list(read(msgpack(tree)).arrays) == ["conv/kernel", "bias"]
