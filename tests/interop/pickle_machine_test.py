# SPDX-License-Identifier: Apache-2.0
"""The machine knows a few opcodes, agrees with the stdlib on them, refuses the rest."""

import gc
import pickle
import pickletools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nad_jax import errors
from nad_jax.interop import bounded_file, limits, pickle_machine

ACCEPTED = {
    *("PROTO", "FRAME", "STOP", "NONE", "NEWTRUE", "NEWFALSE"),
    *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("SHORT_BINSTRING", "BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
    *("MARK", "EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE"),
    *("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "APPEND", "APPENDS"),
    *("SETITEM", "SETITEMS", "BINPUT", "LONG_BINPUT", "MEMOIZE"),
    *("BINGET", "LONG_BINGET", "GLOBAL", "STACK_GLOBAL"),
    *("REDUCE", "BUILD", "BINPERSID"),
}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("pickles") / "x"
    path.write_bytes(b"x")
    with bounded_file.BoundedFile(path) as opened:
        yield opened


def run(file, data: bytes) -> object:
    value, length = pickle_machine.run_pickle(data, start=0, file=file, allowed={})
    assert length == len(data)
    return value


@pytest.mark.parametrize("opcode", pickletools.opcodes, ids=lambda opcode: opcode.name)
def test_exactly_the_opcodes_of_the_list_are_known(file, opcode):
    data = b"\x80\x04" + opcode.code.encode("latin-1") + b"\0" * 8
    with pytest.raises(errors.InputError) as caught:
        run(file, data)
    refused = f"opcode {opcode.name} is not accepted" in str(caught.value)
    assert refused == (opcode.name not in ACCEPTED)


keys = st.text(max_size=20) | st.integers(-(2**63), 2**63 - 1)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**79), 2**79 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.dictionaries(keys, inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=30,
)


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(tree=trees, protocol=st.integers(2, 5))
def test_plain_data_reads_as_the_stdlib_wrote_it(file, tree, protocol):
    assert run(file, pickle.dumps(tree, protocol)) == tree


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60))
def test_any_bytes_give_a_value_or_one_line(file, data):
    try:
        pickle_machine.run_pickle(data, start=0, file=file, allowed={})
    except errors.InputError as error:
        assert len(str(error).splitlines()) == 1


def test_shared_parts_are_read_once(file):
    part = [1, 2]
    value = run(file, pickle.dumps({"a": part, "b": part}, 2))
    assert isinstance(value, dict)
    assert value["a"] is value["b"]


@pytest.mark.parametrize("depth", [64, 65])
def test_depth_is_counted_along_the_longest_path(file, depth):
    """A shallow mention first must not hide a deep one of the same list."""
    inner: list = [1]
    deep: list = inner
    for _ in range(depth - 2):
        deep = [deep]
    data = pickle.dumps([inner, deep], 2)
    if depth == 64:
        assert run(file, data) == [inner, deep]
    else:
        with pytest.raises(errors.InputError, match="nested deeper than 64"):
            run(file, data)


def test_the_collector_runs_again_afterwards(file):
    assert gc.isenabled()
    for data in (b"\x80\x02N.", b"\x80\x02R."):
        try:
            run(file, data)
        except errors.InputError:
            pass
        assert gc.isenabled()


def test_offsets_in_messages_are_those_of_the_file(file):
    with pytest.raises(errors.InputError, match=r"opcode POP .*\(at byte 1003\)"):
        pickle_machine.run_pickle(b"\x80\x02N0.", start=1000, file=file, allowed={})


def test_entries_of_the_memo_may_begin_with_one_and_leave_gaps(file):
    """As cPickle numbered them, and as an old `pickletools.optimize` left them."""
    assert run(file, b"\x80\x02]q\x01h\x01\x86.") == ([], [])
    assert run(file, b"\x80\x02]q\x01]q\x06h\x06\x87.") == ([], [], [])
    with pytest.raises(errors.InputError, match="entry 3 was never written"):
        run(file, b"\x80\x02]q\x01]q\x06h\x03.")


def test_many_images_and_a_few_addresses_may_be_keys(file):
    """Of a list of poisoned images; of an optimizer in an old version of torch."""
    for keys in (range(100_000), range(2**40, 2**40 + 2048 * 64, 64)):
        expected = dict.fromkeys(keys)
        assert run(file, pickle.dumps(expected, 2)) == expected


def test_what_is_counted_is_counted_over_all_dicts(file, monkeypatch):
    data = pickle.dumps([{-1: 0, 2**40: 0}, {-1: 1, 7: 1, 2**17: 1}], 2)
    monkeypatch.setattr(limits, "MAX_PICKLE_WIDE_KEYS", 4)
    monkeypatch.setattr(limits, "MAX_PICKLE_CONTAINERS", 3)
    assert isinstance(run(file, data), list)
    monkeypatch.setattr(limits, "MAX_PICKLE_WIDE_KEYS", 3)
    with pytest.raises(errors.InputError, match="more than 3 integer keys that"):
        run(file, data)
    monkeypatch.setattr(limits, "MAX_PICKLE_CONTAINERS", 2)
    with pytest.raises(errors.InputError, match="more than 2 containers"):
        run(file, data)


def test_what_a_writer_pushes_once_is_within_the_bound_on_arguments(file, monkeypatch):
    pairs = [(str(i), None) for i in range(100)]
    data = b"\x80\x02ccollections\nOrderedDict\n" + pickle.dumps(pairs, 2)[2:-1]
    allowed = {("collections", "OrderedDict"): pickle_machine.ORDERED_DICT}

    def read():
        return pickle_machine.run_pickle(
            data + b"\x85R.", start=0, file=file, allowed=allowed
        )[0]

    monkeypatch.setattr(limits, "MAX_PICKLE_ARGUMENTS", 101)
    assert read() == dict(pairs)
    monkeypatch.setattr(limits, "MAX_PICKLE_ARGUMENTS", 100)
    with pytest.raises(errors.InputError, match="more than 100 arguments"):
        read()
