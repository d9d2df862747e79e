# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: bit for bit or not at all, and always something to go back to."""

import json
import logging
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nad_jax import errors
from nad_jax.training import checkpoints, receipts, records
from nad_jax.training import state as state_lib


def small_tree(value=0.0):
    return {
        "kernel": jnp.full((3, 5), value, jnp.float32),
        "count": jnp.asarray(7, jnp.int32),
    }


def assert_bitwise(got, expected):
    """Same structure, types, dtypes and bytes, key data for keys."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert isinstance(a, np.ndarray) == isinstance(b, np.ndarray)
        if jnp.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def data_file(directory, step):
    """The largest file of a step: the one with the weights."""
    files = [p for p in (directory / str(step)).rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.slow
def test_a_train_state_comes_back_bit_for_bit(tmp_path, toy_net, toy_variables):
    """NamedTuples of optax and the typed key included, from shapes alone."""
    tx = optax.chain(optax.clip(1.0), optax.adam(1e-3))
    state = state_lib.create(toy_variables, tx, jax.random.key(5))
    state = state.replace(step=jnp.asarray(12, jnp.int32))
    metadata = {"epoch": 3, "loss": 0.1, "history": [1.5, None], "text": "BadNets"}
    checkpoints.save(tmp_path, 12, state, metadata)
    like = jax.eval_shape(lambda: state)
    restored, found = checkpoints.restore(tmp_path, like)
    assert_bitwise(restored, state)
    assert found == metadata
    assert type(restored.opt_state) is type(state.opt_state)


@pytest.mark.slow
def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    tree = {
        "nan": jnp.asarray([jnp.nan, -0.0, jnp.inf, 1e-45]),
        "bfloat16": jnp.arange(4, dtype=jnp.bfloat16),
        "int4": jnp.asarray([-8, 7], jnp.int4),
        "bool": jnp.asarray([True, False]),
        "numpy": np.arange(3, dtype=np.float64),
        "empty": jnp.zeros((0, 3)),
        "scalar": np.asarray(2, np.uint8),
        "keys": jax.random.split(jax.random.key(1), 3),
        "rbg": jax.random.key(2, impl="rbg"),
        "nested": ({"a.b": jnp.ones(1)}, [jnp.zeros((2, 1, 2)), None]),
    }
    checkpoints.save(tmp_path, 0, tree)
    restored, metadata = checkpoints.restore(tmp_path, tree)
    assert_bitwise(restored, tree)
    assert restored["numpy"].dtype == np.float64
    assert metadata == {}


@pytest.mark.slow
@pytest.mark.parametrize("keep_newest", [1, 2])
def test_the_newest_are_kept(tmp_path, keep_newest):
    for step in (3, 10, 20, 100):
        checkpoints.save(tmp_path, step, small_tree(step), keep_newest=keep_newest)
        assert checkpoints.steps(tmp_path)[-1] == step
    assert checkpoints.steps(tmp_path) == [3, 10, 20, 100][-keep_newest:]
    restored = checkpoints.restore(tmp_path, small_tree())[0]
    assert_bitwise(restored, small_tree(100))


@pytest.mark.slow
def test_a_step_without_receipt_gets_one_from_its_writer_alone(tmp_path, monkeypatch):
    """A save killed after its rename has left it so, maybe not yet on disk."""
    checkpoints.save(tmp_path, 1, small_tree(1))
    receipt = tmp_path / "1" / "SHA256SUMS"
    content = receipt.read_bytes()
    receipt.unlink()
    checkpoints.restore(tmp_path, small_tree())
    assert not receipt.exists()
    synced = []
    sync = receipts._sync
    monkeypatch.setattr(
        receipts, "_sync", lambda path: (synced.append(path), sync(path))
    )
    checkpoints.restore(tmp_path, small_tree(), settle=True)
    assert receipt.read_bytes() == content
    files = {path for path in (tmp_path / "1").rglob("*")} - {receipt}
    assert {*files, tmp_path / "1", tmp_path, tmp_path.parent} <= {*synced}
    synced.clear()
    checkpoints.restore(tmp_path, small_tree(), settle=True)
    assert not synced


@pytest.mark.slow
def test_the_names_of_new_folders_are_forced_to_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(receipts, "_sync", synced.append)
    root = tmp_path / "run" / "checkpoints" / "stage"
    checkpoints.save(root, 1, small_tree(1))
    assert {root, *root.parents} <= {*synced}


@pytest.fixture
def two_steps(tmp_path):
    for step in (1, 2):
        checkpoints.save(tmp_path, step, small_tree(step), {"epoch": step})
    return tmp_path


def assert_falls_back_to_step_1(directory, caplog):
    with caplog.at_level(logging.WARNING):
        tree, metadata = checkpoints.restore(directory, small_tree())
    assert_bitwise(tree, small_tree(1))
    assert metadata == {"epoch": 1}
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"{directory / '2'} is damaged" in message and "\n" not in message


def test_a_flipped_bit_is_named_and_the_previous_step_used(two_steps, caplog):
    path = data_file(two_steps, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_falls_back_to_step_1(two_steps, caplog)


@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.99])
def test_a_cut_file_is_named_and_the_previous_step_used(two_steps, caplog, fraction):
    path = data_file(two_steps, 2)
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    assert_falls_back_to_step_1(two_steps, caplog)


@pytest.fixture
def no_receipts(two_steps):
    """As after kills between the rename of a step and its receipt."""
    for path in two_steps.glob("*/SHA256SUMS"):
        path.unlink()


def test_a_step_without_a_receipt_is_good_if_its_leaves_are(two_steps, no_receipts):
    assert checkpoints.restore(two_steps, small_tree())[1] == {"epoch": 2}


@pytest.mark.parametrize("change", ["edit", "remove", "add", "edit receipt", "cut"])
def test_every_file_of_a_step_is_under_seal(two_steps, caplog, change):
    """Also those that nothing reads; the log names the file."""
    path = two_steps / "2" / "_CHECKPOINT_METADATA"
    if change == "edit":
        path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    elif change == "remove":
        path.unlink()
    elif change == "add":
        (two_steps / "2" / "new").touch()
    else:
        path = two_steps / "2" / "SHA256SUMS"
        content = path.read_bytes()
        path.write_bytes(content[:-1] if change == "cut" else content[1:])
    assert_falls_back_to_step_1(two_steps, caplog)
    assert f"file {path.name if change != 'add' else 'new'} " in caplog.text


def test_changed_values_with_valid_checksums_are_noticed(
    two_steps, no_receipts, caplog
):
    """Bytes of another save, in files that Orbax finds in perfect order."""
    other = two_steps / "other"
    checkpoints.save(other, 2, small_tree(3), {"epoch": 2})
    arrays = two_steps / "2" / "arrays"
    arrays.rename(two_steps / "old")
    (other / "2" / "arrays").rename(arrays)
    assert_falls_back_to_step_1(two_steps, caplog)
    assert "sha256 of" in caplog.text


def test_a_changed_number_in_the_metadata_is_noticed(two_steps, no_receipts, caplog):
    path = two_steps / "2" / "record" / "metadata"
    sealed = json.loads(path.read_text())
    sealed["metadata"]["epoch"] = 5
    path.write_text(json.dumps(sealed))
    assert_falls_back_to_step_1(two_steps, caplog)


def test_a_step_under_another_number_is_noticed(two_steps, caplog):
    (two_steps / "2").rename(two_steps / "9")
    tree, _ = checkpoints.restore(two_steps, small_tree())
    assert_bitwise(tree, small_tree(1))
    assert "that of step 2" in caplog.text


@pytest.mark.slow
def test_no_flipped_bit_or_cut_anywhere_gives_other_values(two_steps, caplog):
    """Every file of a step, at 6 places: noticed, or without any consequence."""
    generator = np.random.default_rng(0)
    folder = two_steps / "2"
    noticed = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes()
        for position in generator.integers(0, len(content), 6):
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.integers(8)
            if position % 3 == 0:
                damaged = damaged[:position]
            path.write_bytes(damaged)
            tree, metadata = checkpoints.restore(two_steps, small_tree())
            assert_bitwise(tree, small_tree(metadata["epoch"]))
            noticed += metadata["epoch"] == 1
            path.write_bytes(content)
    assert noticed > 10


@pytest.mark.slow
@pytest.mark.parametrize(
    "forged", [[], {}, {"leaves": 3}, {"leaves": {"kernel": 3}}, {"step": "x"}]
)
def test_a_forged_record_with_a_right_hash_is_damage(
    two_steps, no_receipts, caplog, forged
):
    path = two_steps / "2" / "record" / "metadata"
    if isinstance(forged, dict):
        honest = json.loads(path.read_text())
        del honest["sha256"]
        record = honest | forged if forged else {"format": 1}
        forged = record | {"sha256": records._hash_record(record)}
    path.write_text(json.dumps(forged))
    assert_falls_back_to_step_1(two_steps, caplog)


def test_a_record_of_a_later_format_is_an_error_that_says_so(two_steps, no_receipts):
    path = two_steps / "2" / "record" / "metadata"
    record = json.loads(path.read_text()) | {"format": 2}
    del record["sha256"]
    path.write_text(json.dumps(record | {"sha256": records._hash_record(record)}))
    with pytest.raises(errors.InputError, match="format is 2; this version reads 1"):
        checkpoints.restore(two_steps, small_tree())


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.03, 0.11])
def test_a_killed_writer_loses_no_committed_step(tmp_path, delay):
    """kill -9 while steps are written: the last one reported, or a later, is there."""
    script = (
        "import sys, numpy as np\n"
        "from nad_jax.training import checkpoints\n"
        "for step in range(1000):\n"
        "    tree = {'values': np.full(300_000, step, np.int32)}\n"
        "    checkpoints.save(sys.argv[1], step, tree)\n"
        "    print(step, flush=True)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True
    )
    with writer:
        assert writer.stdout is not None
        for _ in range(3):
            reported = int(writer.stdout.readline())
        time.sleep(delay)
        writer.kill()
        for line in writer.stdout:
            reported = int(line)
    like = {"values": np.zeros(300_000, np.int32)}
    values = checkpoints.restore(tmp_path, like)[0]["values"]
    last = int(values[0])
    assert last >= reported and np.all(values == last)
    checkpoints.save(tmp_path, last + 1, like)
    assert sorted(map(int, os.listdir(tmp_path))) == [last, last + 1]


@pytest.mark.slow
def test_training_goes_on_after_a_damaged_step(two_steps):
    """The damaged step may be written again; a good one may not be overwritten."""
    path = data_file(two_steps, 2)
    path.write_bytes(b"")
    checkpoints.save(two_steps, 2, small_tree(2), {"epoch": 2})
    assert checkpoints.restore(two_steps, small_tree())[1] == {"epoch": 2}
    for step in (1, 2):
        with pytest.raises(errors.InputError, match="already holds step"):
            checkpoints.save(two_steps, step, small_tree(9))
    assert_bitwise(checkpoints.restore(two_steps, small_tree())[0], small_tree(2))


@pytest.mark.slow
def test_damage_to_old_steps_does_not_stop_a_save(two_steps):
    for path in [p for p in (two_steps / "1").rglob("*") if p.is_file()]:
        path.write_bytes(b"\xff")
    checkpoints.save(two_steps, 3, small_tree(3))
    assert checkpoints.steps(two_steps) == [2, 3]


@pytest.mark.slow
def test_leftovers_of_a_killed_save_are_ignored_and_then_removed(two_steps):
    """The rename that makes a step appear did not happen."""
    (two_steps / "2").rename(two_steps / "2.orbax-checkpoint-tmp")
    assert checkpoints.steps(two_steps) == [1]
    assert checkpoints.restore(two_steps, small_tree())[1] == {"epoch": 1}
    checkpoints.save(two_steps, 3, small_tree(3))
    assert sorted(os.listdir(two_steps)) == ["1", "3"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kernel": jnp.zeros((3, 5), jnp.int8)},
            "dtype of kernel is float32, .* int8",
        ),
        ({"kernel": jnp.zeros((5, 3))}, r"shape of kernel is \[3, 5\], .* \[5, 3\]"),
        ({"bias": jnp.zeros(5)}, "bias is missing"),
        ({"kernel": None}, "kernel is not expected"),
        ({"count": jax.random.key(0)}, r"dtype of count is int32, expected key<fry>"),
    ],
)
def test_another_model_is_an_error_and_never_a_cast(two_steps, change, message):
    """The fault is the caller's, so the previous step is not tried."""
    with pytest.raises(errors.InputError, match=message) as caught:
        checkpoints.restore(two_steps, small_tree() | change)
    assert "\n" not in str(caught.value)


def test_a_shape_that_lies_is_refused_before_it_is_read(
    two_steps, no_receipts, monkeypatch
):
    """The record fits, the array declares another size: it is not read."""
    import orbax.checkpoint as ocp

    other = two_steps / "other"
    checkpoints.save(other, 2, {"kernel": jnp.zeros((999, 999))})
    arrays = two_steps / "2" / "arrays"
    arrays.rename(two_steps / "old")
    (other / "2" / "arrays").rename(arrays)
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", pytest.fail)
    with pytest.raises(records.DamagedStep, match="not one of 64 bytes"):
        checkpoints._read(two_steps, 2, small_tree())


def test_misuse_is_one_line(tmp_path):
    with pytest.raises(errors.InputError, match="no checkpoint in"):
        checkpoints.restore(tmp_path / "nowhere", small_tree())
    with pytest.raises(errors.InputError, match="metadata must be JSON"):
        checkpoints.save(tmp_path, 0, small_tree(), {"array": np.zeros(2)})
    with pytest.raises(errors.InputError, match="lr must be an array, got float"):
        checkpoints.save(tmp_path, 0, {"lr": 0.1})
    with pytest.raises(errors.InputError, match="both called a/b"):
        checkpoints.save(tmp_path, 0, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})
    with pytest.raises(errors.InputError, match="nothing to save"):
        checkpoints.save(tmp_path, 0, {})
    with pytest.raises(errors.InputError, match="at least 1, got 0 and 0"):
        checkpoints.save(tmp_path, 0, small_tree(), keep_newest=0)
    with pytest.raises(errors.InputError, match="local .* got gs://bucket/run"):
        checkpoints.restore("gs://bucket/run", small_tree())
    checkpoints.save(tmp_path, 0, small_tree())
    data_file(tmp_path, 0).write_bytes(b"")
    with pytest.raises(errors.InputError, match=r"no undamaged .*\(step 0: "):
        checkpoints.restore(tmp_path, small_tree())


def test_orbax_is_quiet_and_its_logger_left_as_it_was(tmp_path, capfd, caplog):
    logger = logging.getLogger("absl")
    before = logger.level
    with caplog.at_level(logging.DEBUG, logger="absl"):
        checkpoints.save(tmp_path, 0, small_tree())
        checkpoints.restore(tmp_path, small_tree())
    assert [r for r in caplog.records if r.name == "absl"] == []
    assert capfd.readouterr() == ("", "")
    assert logger.level == before
