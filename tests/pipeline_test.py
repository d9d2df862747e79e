# SPDX-License-Identifier: Apache-2.0
"""A run goes on with what it began with; its report tells what numbers come from."""

import contextlib
import dataclasses

import numpy as np
import pytest

from configs import efrap as config_file
from nad_jax import errors, pipeline, settings, workdir
from nad_jax.attacks import triggers
from nad_jax.data import sources
from nad_jax.report import schema

CONFIG = settings.parse(config_file.get_config("smoke").to_dict())
_ROW = schema.Row(
    name="float",
    model="backdoored",
    seed=0,
    weight_bits=None,
    act_bits=None,
    acc=0.5,
    asr=None,
    ra=None,
    acc_count=2,
    asr_count=None,
    flip_rate=None,
    seconds=0.0,
)


def _origin(commit):
    return {"git_commit": commit, "versions": {"jaxlib": "0.10.1"}, "devices": 1}


def _report(path, earlier=None):
    run = workdir.Workdir(path, dataclasses.asdict(CONFIG), origin=_origin("now"))
    with contextlib.closing(run):
        if earlier is not None:
            like = np.zeros(2)
            config = dataclasses.replace(CONFIG, victim_workdir=str(earlier))
            restored = pipeline.EarlierRun(config, run).stage("work", like, None)
            assert restored.tolist() == [1.0, 1.0]
        return pipeline.write_report(
            CONFIG,
            run,
            rows=[_ROW],
            claims=(),
            canary={"passed": True},
            figures=None,
        )


@pytest.mark.slow
def test_stages_of_another_commit_are_told_of(tmp_path):
    assert "made_by" not in _report(tmp_path / "alone")
    with contextlib.closing(
        workdir.Workdir(
            tmp_path / "earlier", dataclasses.asdict(CONFIG), origin=_origin("then")
        )
    ) as run:
        run.stage("work", np.zeros(2), lambda: np.ones(2))
    report = _report(tmp_path / "late", tmp_path / "earlier")
    assert report["made_by"] == [_origin("now"), _origin("then")]
    assert any("2 setups" in note for note in report["notes"])
    assert not list((tmp_path / "earlier").rglob("*.tmp"))


@pytest.fixture
def write(tmp_path):
    """Writes a small data set; `changed` replaces one of its arrays."""

    def write(name="one.npz", **changed):
        images = np.arange(6 * 12, dtype=np.uint8).reshape(6, 2, 2, 3)
        labels = np.array([0, 1, 2, 0, 1, 2])
        arrays = {"images_train": images, "labels_train": labels}
        arrays |= {"images_test": images, "labels_test": labels}
        path = tmp_path / name
        np.savez(path, **{**arrays, **changed})
        return settings.DataSettings("npz", str(path))

    return write


OTHER_IMAGES = np.full((6, 2, 2, 3), 7, np.uint8)
OTHER_LABELS = np.array([0, 1, 2, 2, 1, 0])


@pytest.mark.parametrize("loader", settings.LOADERS)
@pytest.mark.parametrize(
    ("array", "values", "named"),
    [
        ("images_train", OTHER_IMAGES, "training set"),
        ("labels_train", OTHER_LABELS, "training set"),
        ("images_test", OTHER_IMAGES, "test set"),
        ("labels_test", OTHER_LABELS, "test set"),
    ],
)
def test_a_run_goes_on_with_the_data_it_began_with(
    tmp_path, write, loader, array, values, named
):
    data = dataclasses.replace(write(), loader=loader)
    moved = dataclasses.replace(write("two.npz"), loader=loader)
    with contextlib.closing(workdir.Workdir(tmp_path / "run", {})) as run:
        pipeline.load_data(data, run)
        pipeline.load_data(moved, run)
        write(**{array: values})
        with pytest.raises(errors.InputError, match=f"belongs to another {named}"):
            pipeline.load_data(data, run)
    pipeline.load_data(data)  # Nobody's.


def _config(data, **changes):
    return dataclasses.replace(CONFIG, data=data, **changes)


def _begin(path, config):
    """A workdir whose run has looked at its data."""
    run = workdir.Workdir(path, dataclasses.asdict(config))
    pipeline.load_data(config.data, run)
    return run


def test_models_made_of_other_data_are_refused(tmp_path, write):
    _begin(tmp_path / "earlier", _config(write())).close()
    for name, array, values in (
        ("training set", "images_train", OTHER_IMAGES),
        ("test set", "labels_test", OTHER_LABELS),
    ):
        data = write(f"{array}.npz", **{array: values})
        config = _config(data, victim_workdir=str(tmp_path / "earlier"))
        with contextlib.closing(_begin(tmp_path / array, config)) as run:
            with pytest.raises(errors.InputError, match=f"had another {name} "):
                pipeline.EarlierRun(config, run)
            # Runs of earlier versions kept no record.
            record = tmp_path / "earlier" / "inputs.json"
            hidden = record.rename(record.with_suffix(".hidden"))
            pipeline.EarlierRun(config, run)
            hidden.rename(record)


def test_models_may_be_of_the_same_data_read_otherwise(tmp_path, write):
    _begin(tmp_path / "earlier", _config(write())).close()
    for workers in (0, 2):
        data = dataclasses.replace(write("two.npz"), loader="stream", workers=workers)
        config = _config(data, victim_workdir=str(tmp_path / "earlier"))
        with contextlib.closing(_begin(tmp_path / str(workers), config)) as run:
            pipeline.EarlierRun(config, run)


def test_models_are_asked_for_of_seeds_that_are_there(tmp_path):
    """Before the first of them is worked on, not when the missing one is reached."""
    earlier = dataclasses.replace(CONFIG, seeds=(0, 1))
    workdir.Workdir(tmp_path / "earlier", dataclasses.asdict(earlier)).close()
    config = dataclasses.replace(CONFIG, victim_workdir=str(tmp_path / "earlier"))
    with contextlib.closing(workdir.Workdir(tmp_path / "run", {})) as run:
        pipeline.EarlierRun(config, run)
        more = dataclasses.replace(config, seeds=(0, 2))
        with pytest.raises(errors.InputError, match=r"of 0, 1, those .*got \(0, 2\)"):
            pipeline.EarlierRun(more, run)


def test_a_share_at_its_limit_keeps_it():
    """Whatever the last bit of a difference is; one image more is too many."""
    assert 0.856 - 0.846 > 0.01 and pipeline.at_most(0.856 - 0.846, 0.01)
    assert pipeline.at_most(np.float64(0.25), 0.25) is True
    assert not pipeline.at_most(0.01 + 1e-8, 0.01)
    assert not pipeline.at_most(float("nan"), 0.01)


@pytest.mark.slow
def test_a_run_goes_on_with_the_victims_it_began_with(tmp_path):
    """Else its finished stages would be beside rows of others."""
    like = np.zeros(2)
    config = dataclasses.replace(CONFIG, victim_workdir=str(tmp_path / "0"))
    for i in range(2):
        with contextlib.closing(
            workdir.Workdir(tmp_path / str(i), dataclasses.asdict(CONFIG))
        ) as earlier:
            earlier.stage("work", like, lambda i=i: np.full(2, float(i)))
    with contextlib.closing(workdir.Workdir(tmp_path / "late", {})) as run:
        for _ in range(2):
            pipeline.EarlierRun(config, run).stage("work", like, None)
        other = dataclasses.replace(config, victim_workdir=str(tmp_path / "1"))
        with pytest.raises(errors.InputError, match="another work of victim_workdir"):
            pipeline.EarlierRun(other, run).stage("work", like, None)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, "one", True])
def test_a_trigger_is_drawn_from_a_seed_that_is_one(seed):
    choice = settings.TriggerSettings("blend", {"alpha": 0.5, "seed": seed})
    with pytest.raises(errors.InputError, match="config.attack.trigger.seed must be 0"):
        pipeline.build_trigger(choice, (4, 4, 1))


def test_where_there_is_no_checkout_the_variable_names_the_commit(monkeypatch):
    monkeypatch.setenv("NAD_JAX_COMMIT", "0123")
    unknown = pipeline.git_commit.__wrapped__
    monkeypatch.setenv("PATH", "")
    assert unknown() == "0123"
    monkeypatch.delenv("NAD_JAX_COMMIT")
    assert unknown() is None


def test_the_origin_is_what_numbers_depend_on():
    origin = pipeline.origin()
    assert origin["versions"]["jaxlib"] and origin["devices"] >= 1
    assert origin["git_commit"] == pipeline.git_commit()


def _data(labels, num_classes, channels=3):
    images = np.zeros((len(labels), 4, 4, channels), np.uint8)
    return sources.Dataset(images, np.asarray(labels, np.int32), num_classes, "some")


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (_data([0, 0], 1), _data([0], 1), "some has 1 class; an attack needs"),
        (_data([0, 1], 2), _data([1, 1], 2), "every test image of some is of the cl"),
        (_data([0, 0], 1), _data([0, 0], 1), "needs at least 2"),
    ],
)
def test_an_attack_that_cannot_be_measured_is_refused(train, test, message):
    with pytest.raises(errors.InputError, match=message):
        pipeline.check_target(min(1, train.num_classes - 1), train, test)
    pipeline.check_target(1, _data([0, 1], 2), _data([0, 1], 2))


@pytest.mark.slow
@pytest.mark.parametrize("channels", [2, 4])
def test_pictures_are_drawn_of_images_with_any_number_of_channels(channels):
    """A report that fails after the last training is a run lost."""
    test = _data([0, 1, 2], 3, channels)
    trigger = triggers.square_trigger((4, 4, channels), size=2, margin=0)

    def apply(variables, images, *, train):
        del variables, train
        return None, {"stage1": images}

    figures = pipeline.draw(apply, trigger, test, np.zeros(3, int), [("nad", {})])
    assert figures.trigger is not None and figures.trigger.shape[-1] in (1, 3)
    assert figures.attention[0][1].shape[-1] in (1, 3)
