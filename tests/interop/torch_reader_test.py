# SPDX-License-Identifier: Apache-2.0
"""Good torch files of every age read as the values that were put into them."""

import struct
from pathlib import Path

import good_files as good
import numpy as np
import pytest
from good_files import (
    EMPTY_ORDERED,
    Ordered,
    Raw,
    Tensor,
    global_,
    legacy_file,
    program,
    reduce,
    text,
    tuple_,
    zip_archive,
    zip_file,
)

from nad_jax import errors
from nad_jax.interop import reader, torch_reader

FLOATS = {"0": good.storage("float32", (1.5, -2.0, 0.25, 4.0, 8.0, -16.0))}
MATRIX = Tensor("0", "float32", 6, (2, 3), (3, 1))
CONTAINERS = {"legacy": legacy_file, "zip": zip_file}


@pytest.fixture
def save(tmp_path: Path):
    """Writes bytes to a file and returns its path."""

    def write(data: bytes, name: str = "model.bin") -> Path:
        path = tmp_path / name
        path.write_bytes(data)
        return path

    return write


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        assert found[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("format_name", ["torch-legacy", "torch-zip"])
def test_every_dtype_and_view_reads_as_its_values(save, format_name):
    data, expected = good.SAMPLES[format_name]()
    arrays, metadata = torch_reader.read_torch(save(data))
    assert_same(arrays, expected)
    assert metadata == {"epoch": 25, "arch": "wrn_16_1", "best_prec": 85.5}


@pytest.mark.parametrize("format_name", ["torch-legacy", "torch-zip"])
def test_shared_storages_stay_shared_and_nothing_can_be_written(save, format_name):
    arrays, _ = torch_reader.read_torch(save(good.SAMPLES[format_name]()[0]))
    assert np.shares_memory(arrays["conv.weight"], arrays["conv.transposed"])
    assert not np.shares_memory(arrays["conv.weight"], arrays["part"])
    assert not any(array.flags.writeable for array in arrays.values())


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS)
def test_optimizer_is_checked_but_not_part_of_the_model(save, make):
    """NaN in a momentum buffer is nobody's business; its extent is."""
    storages = FLOATS | {"1": good.storage("float32", (float("nan"),))}
    moment = Tensor("1", "float32", 1, (1,), (1,))
    tree = {"state_dict": {"w": MATRIX}, "optimizer": {"state": {0: moment}}}
    arrays = reader.read_checkpoint(save(make(program(tree), storages))).arrays
    assert list(arrays) == ["w"]


def test_damage_outside_the_model_is_damage(save):
    """A flipped bit in a momentum buffer or in a record that nobody reads."""
    storages = FLOATS | {"1": good.storage("float32", (1234.5,))}
    moment = Tensor("1", "float32", 1, (1,), (1,))
    tree = {"state_dict": {"w": MATRIX}, "optimizer": {"state": {0: moment}}}
    data = zip_file(program(tree), storages)
    assert list(torch_reader.read_torch(save(data))[0]) == ["w"]
    for part in (storages["1"][1], b"0123456789" * 4):
        damaged = bytearray(data)
        damaged[data.index(part)] ^= 1
        with pytest.raises(errors.InputError, match="is damaged"):
            torch_reader.read_torch(save(bytes(damaged)))


def test_zip_without_descriptors_and_64_bit_records(save):
    """The archives of torch::save in C++ and of other writers of stored entries."""
    entries = good.torch_entries(program({"w": MATRIX}), FLOATS, folder="other name")
    for entry in entries:
        entry.flags = 0
    arrays, _ = torch_reader.read_torch(save(zip_archive(entries, with_end64=False)))
    assert arrays["w"].tolist() == [[1.5, -2.0, 0.25], [4.0, 8.0, -16.0]]


def test_protocol_4_with_frames(save):
    """torch.save(..., pickle_protocol=4)."""

    def short(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode() + b"\x94"

    def named(module: str, name: str) -> bytes:
        return short(module) + short(name) + b"\x93\x94"

    identifier = b"(" + short("storage") + named("torch", "FloatStorage")
    identifier += short("0") + short("cpu") + b"K\x06t\x94Q"
    hooks = named("collections", "OrderedDict") + b")R\x94"
    view = identifier + b"K\x00K\x02K\x03\x86\x94K\x03K\x01\x86\x94\x89" + hooks
    rebuilt = named("torch._utils", "_rebuild_tensor_v2") + b"(" + view + b"t\x94R\x94"
    body = b"}\x94" + short("w") + rebuilt + b"s."
    main = b"\x80\x04\x95" + struct.pack("<Q", len(body)) + body
    arrays, _ = torch_reader.read_torch(save(zip_file(main, FLOATS)))
    assert arrays["w"].tolist() == [[1.5, -2.0, 0.25], [4.0, 8.0, -16.0]]


def test_python_2_and_torch_0_4(save):
    """Byte strings, an OrderedDict of pairs, no hooks, a storage that is a view."""

    def old(value: str) -> Raw:
        return Raw(b"U" + bytes([len(value)]) + value.encode())

    kind = global_("torch", "FloatStorage")
    span = tuple_(old("77"), 2, 3)
    identifier = Raw(tuple_(old("storage"), kind, old("0"), old("cuda:0"), 6, span))
    arguments = (Raw(identifier + b"Q"), 1, (2,), (1,), False, None)
    rebuilt = reduce(global_("torch._utils", "_rebuild_tensor_v2"), *arguments)
    first = reduce(global_("torch._utils", "_rebuild_tensor"), *arguments[:4])
    pairs = [[old("a"), rebuilt], [old("b"), first]]
    tree = reduce(global_("collections", "OrderedDict"), pairs)
    arrays, _ = torch_reader.read_torch(save(legacy_file(program(tree), FLOATS)))
    assert arrays["a"].tolist() == arrays["b"].tolist() == [4.0, 8.0]


def test_untyped_storage_with_a_dtype_beside_it(save):
    """How torch saves dtypes younger than its typed storages."""
    kind = global_("torch.storage", "UntypedStorage")
    identifier = Raw(tuple_("storage", kind, "0", "cpu", 6) + b"Q")
    arguments = (identifier, 1, (2,), (1,), False, EMPTY_ORDERED)
    function = global_("torch._utils", "_rebuild_tensor_v3")
    view = reduce(function, *arguments, global_("torch", "uint16"))
    storages = {"0": ("uint8", struct.pack("<3H", 7, 40_000, 65_535))}
    arrays, _ = torch_reader.read_torch(save(zip_file(program({"w": view}), storages)))
    assert arrays["w"].dtype == np.uint16
    assert arrays["w"].tolist() == [40_000, 65_535]


def test_storage_read_once_however_many_views(save, monkeypatch):
    """200 views of one storage cost one read of it."""
    reads = []
    plain = torch_reader.stored_zip.read_array
    monkeypatch.setattr(
        torch_reader.stored_zip,
        "read_array",
        lambda file, entry: reads.append(entry.name) or plain(file, entry),
    )
    state = {f"w{i}": MATRIX for i in range(200)}
    torch_reader.read_torch(save(zip_file(program(state), FLOATS)))
    assert reads == ["model/data/0"]


def test_backdoorbench_result_file(save):
    """Its model entry is found among poisoned data keyed by numpy integers."""
    dtype = Raw(reduce(global_("numpy", "dtype"), "i8", False, True) + b"}b")
    raw = reduce(global_("_codecs", "encode"), "\x05" + "\0" * 7, "latin1")
    number = reduce(global_("numpy.core.multiarray", "scalar"), dtype, raw)
    make = global_("numpy.core.multiarray", "_reconstruct")
    indices = reduce(make, global_("numpy", "ndarray"), (0,), "b")
    indices = Raw(indices + tuple_(1, (2,), dtype, False, raw) + b"b")
    poisoned = Raw(
        b"}" + number + good.opcodes({"path": "5.png", "other_info": [0, 3]})
    )
    tree = {
        "model_name": "preactresnet18",
        "num_classes": 10,
        "model": Ordered({"conv1.weight": MATRIX}, metadata=True),
        "img_size": (32, 32, 3),
        "clean_data": "cifar10",
        "bd_train": None,
        "bd_test": {
            "bd_data_container": {"data_dict": Raw(poisoned + b"s")},
            "original_index_array": indices,
            "x": Tensor("0", "float32", 6, (6,), (1,)),
        },
    }
    for make_file in CONTAINERS.values():
        arrays, metadata = torch_reader.read_torch(
            save(make_file(program(tree), FLOATS))
        )
        assert list(arrays) == ["conv1.weight"]
        assert metadata["model_name"] == "preactresnet18"
        assert metadata["num_classes"] == 10


def test_long_text_beside_the_model_is_not_kept(save):
    tree = {"state_dict": {"w": MATRIX}, "log": "x" * 5000, "note": "short"}
    _, metadata = torch_reader.read_torch(save(legacy_file(program(tree), FLOATS)))
    assert metadata == {"note": "short"}


def test_tensor_names_come_in_the_order_of_the_file(save):
    order = ["z", "a", "m"]
    main = program(Ordered(dict.fromkeys(order, MATRIX)))
    assert list(torch_reader.read_torch(save(zip_file(main, FLOATS)))[0]) == order


def test_text_of_the_pickle_may_be_any_language(save):
    tree = Raw(b"}(" + text("gewicht.größe") + good.tensor(MATRIX) + b"u")
    arrays, _ = torch_reader.read_torch(save(legacy_file(program(tree), FLOATS)))
    assert list(arrays) == ["gewicht.größe"]
