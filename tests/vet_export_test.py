# SPDX-License-Identifier: Apache-2.0
"""Files that a vetting ships belong together, or there is no card that says so."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from nad_jax import errors, vet_export, whole_file
from nad_jax.attacks import triggers
from nad_jax.data import batches, sources
from nad_jax.defenses import efrap as efrap_lib
from nad_jax.interop import bounded_file
from nad_jax.models import layers as layers_lib
from nad_jax.training import evaluation

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SHAPE = (6, 6, 2)


class _Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.fixture(scope="module")
def shipped():
    images = jax.random.uniform(jax.random.key(0), (8, *SHAPE))
    module = _Net()
    variables = module.init(jax.random.key(1), images)
    return efrap_lib.efrap(module, variables, images, weight_bits=8, method="nearest")


def _write(shipped, folder):
    layers = layers_lib.find_layers(
        shipped.module, shipped.variables, jax.ShapeDtypeStruct((1, *SHAPE), "float32")
    )
    return vet_export.write(
        folder,
        card={"source_sha256": "0" * 64, "arch": "net"},
        shipped=shipped,
        layers=layers,
        image_shape=SHAPE,
        floats={"fc.bias": np.zeros(3, "f4")},
    )


@pytest.mark.slow
def test_the_card_holds_the_hashes_and_the_files_predict_alike(shipped, tmp_path):
    files = _write(shipped, tmp_path)
    card = json.loads(files.card.read_text())
    assert card["arch"] == "net" and len(card["files"]) == 4
    for name, digest in card["files"].items():
        assert digest == bounded_file.sha256(tmp_path / name)
    images = np.random.default_rng(0).integers(0, 256, (20, *SHAPE)).astype(np.uint8)
    logits = shipped.apply(shipped.variables, images.astype("f4") / 255)
    predictions = np.argmax(logits, -1)
    test = sources.Dataset(images, predictions.astype(np.int32), 3, "some")
    counts, agreement = vet_export.run(
        files, test, predictions, trigger=None, target_label=0
    )
    assert agreement == 1.0 and counts["acc"] == 1.0 and counts["asr"] is None
    wrong = np.where(np.arange(20) < 5, (predictions + 1) % 3, predictions)
    assert vet_export.run(files, test, wrong, trigger=None, target_label=0)[1] == 0.75


@pytest.mark.slow
def test_a_test_set_is_counted_in_batches(shipped, tmp_path, monkeypatch):
    """The same counts, and no program sees more images than a batch has."""
    files = _write(shipped, tmp_path)
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (20, *SHAPE)).astype(np.uint8)
    labels = generator.integers(0, 3, 20).astype(np.int32)
    test = sources.Dataset(images, labels, 3, "some")
    trigger = triggers.square_trigger(SHAPE, size=3, margin=0)
    sizes = []
    real = batches.to_float
    monkeypatch.setattr(
        batches, "to_float", lambda x: (sizes.append(len(x)), real(x))[1]
    )
    found = []
    for size in (20, 8):
        monkeypatch.setattr(evaluation, "DEFAULT_BATCH_SIZE", size)
        predictions = np.argmax(
            shipped.apply(shipped.variables, images.astype("f4") / 255), -1
        )
        found.append(
            vet_export.run(files, test, predictions, trigger=trigger, target_label=1)
        )
    assert found[0] == found[1] and found[0][1] == 1.0
    assert found[0][0]["asr_count"] == np.sum(labels != 1)
    # Each ends with the images of the StableHLO program.
    assert sizes == [20, 20, 8, 8, 4, 20]


@pytest.mark.slow
@pytest.mark.parametrize(
    "failing", ["model.safetensors", "model.onnx", "model.stablehlo", "card.json"]
)
def test_a_second_vetting_that_fails_leaves_no_card_of_the_first(
    shipped, tmp_path, monkeypatch, failing
):
    seals = ("card.json", "report.json", "report.html")
    _write(shipped, tmp_path)
    for name in seals[1:]:
        whole_file.write_text(tmp_path / name, "of the first")
    write_bytes = whole_file.write_bytes

    def full(path, *parts):
        if str(path).endswith(failing):
            raise errors.InputError(f"cannot write {path}: No space left on device")
        write_bytes(path, *parts)

    monkeypatch.setattr(whole_file, "write_bytes", full)
    with pytest.raises(errors.InputError, match=f"{failing}: No space left"):
        _write(shipped, tmp_path)
    assert not any((tmp_path / name).exists() for name in seals)
