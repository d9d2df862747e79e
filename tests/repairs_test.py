# SPDX-License-Identifier: Apache-2.0
"""Rows of repairs; a teacher from a file is read first, and stays the same file."""

import contextlib
import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import efrap as efrap_config
from configs import nad as nad_config
from configs import vet as vet_config
from nad_jax import (
    efrap_experiment,
    errors,
    nad_experiment,
    repairs,
    settings,
    vet_experiment,
    zoo,
)
from nad_jax import workdir as workdir_lib
from nad_jax.data import sources
from nad_jax.defenses import base, fine_pruning, fine_tuning, nad
from nad_jax.models import common

# Variant of a config, the section with its repairs, and what runs it.
JOBS = {
    "nad": (nad_config.get_config("smoke"), "defense", nad_experiment),
    "efrap": (efrap_config.get_config("controls+smoke"), "repairs", efrap_experiment),
}


class CameToTheData(Exception):
    """What a run loads before it trains."""


@pytest.fixture(params=JOBS)
def run(request, tmp_path, monkeypatch):
    """Runs an experiment whose teacher is a file, as far as its data."""
    sections, name, experiment = JOBS[request.param]
    config = settings.parse(sections.to_dict())
    repairs = dataclasses.replace(getattr(config, name), teacher=str(tmp_path / "file"))
    config = dataclasses.replace(config, **{name: repairs})

    def load(*arguments, **options):
        raise CameToTheData

    monkeypatch.setattr(sources, "load", load)

    def run():
        workdir = workdir_lib.Workdir(tmp_path / "run", {})
        with contextlib.closing(workdir):
            experiment.run(config, workdir)

    return run


def test_a_file_that_is_no_model_is_refused_before_anything_is_loaded(run, tmp_path):
    (tmp_path / "file").write_bytes(b"no model")
    with pytest.raises(errors.InputError, match="file"):
        run()


def test_another_file_in_the_same_workdir_is_refused(run, monkeypatch):
    hashes = iter(["1" * 64, "1" * 64, "2" * 64])
    monkeypatch.setattr(zoo, "read_net", lambda path: (None, next(hashes)))
    for _ in range(2):
        with pytest.raises(CameToTheData):
            run()
    with pytest.raises(errors.InputError, match="belongs to another teacher"):
        run()


@pytest.mark.parametrize(
    ("row", "radius", "has_logits"),
    [("nad", 0.0, False), ("nad_sam", 0.25, False), ("nad_sam_kd", 0.25, True)],
)
def test_the_rows_that_distil_differ_in_radius_and_logits(
    tmp_path, monkeypatch, row, radius, has_logits
):
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    logits = settings.LogitSettings(weight=0.5, temperature=3.0)
    defense = dataclasses.replace(
        config.defense, sharpness_radius=0.25, victim_logits=logits
    )
    net = base.Net(None, {"params": {"w": np.ones(2, np.float32)}})
    seen = {}

    def make_teacher(victim, data, tuning, **options):
        return base.Defended(victim.variables, ({"loss": 0.0},))

    def run(victim, data, tuning, nad_settings, **options):
        seen.update(options, radius=tuning.sharpness_radius)
        return base.Defended(victim.variables, ({"loss": 0.0},))

    monkeypatch.setattr(nad, "make_teacher", make_teacher)
    monkeypatch.setattr(nad, "run", run)
    with contextlib.closing(workdir_lib.Workdir(tmp_path / "run", {})) as workdir:
        patient = repairs.Patient("backdoored", 0, net, None, None)
        repairs.Stages(defense, workdir, patient).repair(row)
    assert seen["radius"] == radius
    assert seen["victim_logits"] == (logits if has_logits else None)


@pytest.mark.parametrize("field", ["weight", "temperature"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_logits_that_cannot_count_are_refused_by_name(field, value):
    sections = nad_config.get_config("smoke").to_dict()
    sections["defense"]["victim_logits"][field] = value
    words = f"victim_logits.{field} must be (> 0|finite), got {value}"
    with pytest.raises(errors.InputError, match=words):
        settings.parse(sections)


class _Net(nn.Module):
    """Stages of the sizes it is told."""

    sides: tuple[int, ...]
    num_classes: int = 10

    @nn.compact
    def __call__(self, images, train=False):
        features = {
            f"stage{i}": nn.Conv(2, (1, 1))(images)[:, :side, :side]
            for i, side in enumerate(self.sides, start=1)
        }
        return nn.Dense(self.num_classes)(images.mean(axis=(1, 2))), features


def _net(*sides):
    model = _Net(sides)
    return base.Net(model, common.expected_shapes(model, (4, 4, 3)))


def _check(teacher=None, sides=(4, 2, 2), **changes):
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    labels = np.arange(50, dtype=np.int32) % 10
    train = sources.Dataset(np.zeros((50, 4, 4, 3), np.uint8), labels, 10, "small")
    defense = dataclasses.replace(config.defense, **changes)
    repairs.check(defense, _Net(sides), train, teacher)


def _betas(*names, factors=(1.0,)):
    return settings.NadSettings(dict.fromkeys(names, 1.0), beta_factors=factors)


@pytest.mark.slow
def test_repairs_that_can_be_are_not_refused():
    _check()
    _check(teacher=_net(4, 2, 2, 2))
    # Nobody asks stages that do not count.
    _check(nad=settings.NadSettings({"stage1": 1.0, "stage2": 0.0}), sides=(4, 1))
    _check(rows=("fine_tuning",), clean_model_rows=(), nad=_betas("stage9"))
    _check(clean_fraction=0.1, rows=("nad",))
    _check(rows=("ft_sam_kd",), clean_model_rows=(), sides=(4, 2, 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nad": _betas("stage1", "stage9")}, "must name stages of .*, got stage9"),
        ({"nad": _betas("stage1", factors=(0.0,))}, "one above 0 for .*nad"),
        (
            {"nad": _betas("stage9"), "rows": ("ft_sam_kd",), "clean_model_rows": ()},
            "must name stages of .*, got stage9",
        ),
        ({"sides": (4, 2, 1)}, "'stage3' of the victim is .1, 1, 2. per image"),
        ({"teacher": _net(4, 2)}, "must name stages of stage1, stage2, got stage3"),
        ({"teacher": _net(4, 2, 1)}, "'stage3' of the teacher is .1, 1, 2."),
        ({"teacher": _net(4, 2, 3)}, "teacher has a map of .3, 3., of the victim"),
        (
            {"clean_fraction": 0.1, "rows": settings.REPAIRS},
            "clean_fraction 0.1 and validation_fraction 0.1 leave none of 5 clean "
            "images held out for fine_pruning, mode_connectivity.positions",
        ),
        (
            {"clean_fraction": 0.1, "rows": ("nad",), "patience": 2},
            "none of 5 clean images held out for patience",
        ),
    ],
)
def test_what_a_repair_would_refuse_is_known_by_shapes(changes, words):
    with pytest.raises(errors.InputError, match=words):
        _check(**changes)


def test_ft_sam_has_a_recipe_of_its_own(tmp_path, monkeypatch):
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    net = base.Net(None, {"params": {"w": np.ones(2, np.float32)}})
    seen = []

    def run(victim, data, tuning, *, label_smoothing=0.0, **options):
        ball = (tuning.sharpness_radius, tuning.sharpness_by_weight)
        seen.append((*ball, label_smoothing))
        return base.Defended(victim.variables, ({"loss": 0.0},))

    monkeypatch.setattr(fine_tuning, "run", run)
    published = settings.FtSamSettings(2.0, by_weight=True, label_smoothing=0.1)
    for number, own in enumerate((config.defense.ft_sam, published)):
        defense = dataclasses.replace(config.defense, sharpness_radius=0.25, ft_sam=own)
        folder = tmp_path / str(number)
        with contextlib.closing(workdir_lib.Workdir(folder, {})) as workdir:
            patient = repairs.Patient("backdoored", 0, net, None, None)
            stages = repairs.Stages(defense, workdir, patient)
            stages.repair("ft_sam")
            stages.repair("fine_tuning")
    plain = (0.0, False, 0.0)
    assert seen == [(0.25, False, 0.0), plain, (2.0, True, 0.1), plain]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tolerance", "taken"), [(0.02, 2.0), (0.019, 1.0), (0.04, 4.0)]
)
def test_of_several_rates_the_fastest_that_held_out_images_allow_is_kept(
    tmp_path, monkeypatch, tolerance, taken
):
    """And its seconds are those of all of them; what was decided there is told."""
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    base_rate = config.defense.training.learning_rate
    held_out = {1.0: 1.0, 2.0: 0.98, 4.0: 0.96}
    net = base.Net(None, {"params": {"w": np.ones(2, np.float32)}})
    trained = []

    def run(victim, data, tuning, *arguments, **options):
        factor = tuning.training.learning_rate / base_rate
        trained.append(factor)
        variables = {"params": {"w": np.full(2, factor, np.float32)}}
        options["on_epoch"](variables, {"epoch": 1, "loss": 0.0})
        decided = {"pruned": 10 * factor}
        return base.Defended(variables, ({"loss": 0.0},), decided)

    monkeypatch.setattr(fine_tuning, "run", run)
    monkeypatch.setattr(fine_pruning, "run", run)
    monkeypatch.setattr(
        base,
        "validation_accuracy",
        lambda *_: lambda variables: held_out[float(variables["params"]["w"][0])],
    )
    defense = dataclasses.replace(
        config.defense, rate_factors=(2.0, 1.0, 4.0), rate_tolerance=tolerance
    )
    curves = []
    for _ in range(2):  # The second time from the workdir.
        with contextlib.closing(workdir_lib.Workdir(tmp_path / "run", {})) as workdir:
            patient = repairs.Patient("backdoored", 0, net, None, None)
            stages = repairs.Stages(defense, workdir, patient, curves.append)
            tuned, seconds = stages.repair("fine_tuning")
            pruned, _ = stages.repair("fine_pruning")
            own = [s for name, s in workdir.seconds.items() if "fine_tuning" in name]
        assert tuned.variables["params"]["w"][0] == taken
        assert pruned.variables["params"]["w"][0] == taken
        assert stages.chosen["fine_pruning"] == {
            "pruned": 10 * taken,
            "rate_factor": taken,
            "held_out_by_rate": {"2.0": 0.98, "1.0": 1.0, "4.0": 0.96},
        }
        assert len(own) == 3 and seconds == pytest.approx(sum(own))
    assert trained == [2.0, 1.0, 4.0] * 2 and curves == []


def test_at_each_rate_students_have_the_teacher_of_that_rate(tmp_path, monkeypatch):
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    base_rate = config.defense.training.learning_rate
    net = base.Net(None, {"w": np.zeros(1, np.float32)})
    taught = []

    def at(tuning):
        return np.float32(tuning.training.learning_rate / base_rate)

    def make_teacher(victim, data, tuning, **options):
        return base.Defended({"w": np.full(1, 10 * at(tuning))}, ({"loss": 0.0},))

    def run(victim, data, tuning, nad_settings, *, teacher, **options):
        taught.append((float(at(tuning)), float(teacher.variables["w"][0])))
        return base.Defended({"w": np.full(1, at(tuning))}, ({"loss": 0.0},))

    monkeypatch.setattr(nad, "make_teacher", make_teacher)
    monkeypatch.setattr(nad, "run", run)
    monkeypatch.setattr(base, "validation_accuracy", lambda *_: lambda _: 1.0)
    defense = dataclasses.replace(config.defense, rate_factors=(1.0, 2.0))
    with contextlib.closing(workdir_lib.Workdir(tmp_path / "run", {})) as workdir:
        patient = repairs.Patient("backdoored", 0, net, None, None)
        stages = repairs.Stages(defense, workdir, patient)
        assert stages.teacher()[0].variables["w"][0] == 10.0
        stages.repair("nad")
        assert stages.teacher()[0].variables["w"][0] == 20.0
    assert taught == [(1.0, 10.0), (2.0, 20.0)]


@pytest.mark.slow
def test_the_logits_alone_are_nad_sam_kd_without_attention(tmp_path, monkeypatch):
    """From the same batches, and no teacher is made for what asks none."""
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    zero = settings.NadSettings({"stage1": 0.0})
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3), np.uint8)
    labels = np.arange(40, dtype=np.int32) % 10
    data = base.CleanData(images, labels, images[:0], labels[:0])
    model = _Net((4, 2, 2))
    net = base.Net(model, model.init(jax.random.key(1), images[:1] / np.float32(255)))

    def repaired(row, **changes):
        defense = dataclasses.replace(config.defense, **changes)
        with contextlib.closing(workdir_lib.Workdir(tmp_path / row, {})) as workdir:
            patient = repairs.Patient("backdoored", 0, net, data, jax.random.key(0))
            stages = repairs.Stages(defense, workdir, patient)
            if row == "ft_sam_kd":
                monkeypatch.setattr(stages._at_rates[1.0], "teacher", None)
            return jax.tree.leaves(stages.repair(row)[0].variables)

    alone = repaired("ft_sam_kd")
    # Nobody may ask for such a row by config.
    without = repaired("nad_sam_kd", nad=zero, rows=(), clean_model_rows=())
    plain = repaired("ft_sam")
    assert all(np.array_equal(*pair) for pair in zip(alone, without, strict=True))
    assert not all(np.array_equal(*pair) for pair in zip(alone, plain, strict=True))


def test_a_given_teacher_is_read_once(tmp_path, monkeypatch):
    config = settings.parse(nad_config.get_config("smoke").to_dict())
    defense = dataclasses.replace(config.defense, teacher="file")
    net, reads = base.Net(None, None), []

    def read(path):
        reads.append(path)
        return net, "1" * 64

    monkeypatch.setattr(zoo, "read_net", read)
    with contextlib.closing(workdir_lib.Workdir(tmp_path / "run", {})) as workdir:
        patient = repairs.Patient("backdoored", 0, net, None, None)
        stages = repairs.Stages(defense, workdir, patient)
        assert stages.teacher() == stages.teacher() == (net, 0.0)
    assert reads == ["file"]


@pytest.mark.parametrize("other", ["victim", "clean model"])
def test_a_run_goes_on_with_the_victim_of_the_zoo_it_began_with(
    other, tmp_path, monkeypatch
):
    first = {"sha256": "1" * 64, "clean_sha256": "2" * 64}
    key = {"victim": "sha256", "clean model": "clean_sha256"}[other]
    manifests = iter([first, first, {**first, key: "3" * 64}])

    def load(name, folder):
        return zoo.Victim(None, None, next(manifests), clean={})

    monkeypatch.setattr(zoo, "load", load)
    with contextlib.closing(workdir_lib.Workdir(tmp_path / "run", {})) as workdir:
        for _ in range(2):
            zoo.take("one", workdir)
        with pytest.raises(errors.InputError, match=f"another {other} of the zoo"):
            zoo.take("one", workdir)


@pytest.mark.slow
@pytest.mark.parametrize("factors", [(1.0,), (0.5, 2.0)])
def test_lines_of_metrics_tell_students_apart(tmp_path, monkeypatch, factors):
    """So in both experiments that distil; and the progress is told of all epochs."""
    epochs, totals = 3, []
    net = base.Net(None, {"params": {"w": np.ones(2, np.float32)}})

    def tune(victim, data, tuning, *, on_epoch, **options):
        history = tuple({"epoch": i + 1, "loss": 0.0} for i in range(epochs))
        for metrics in history:
            on_epoch(victim.variables, metrics)
        return base.Defended(victim.variables, history)

    monkeypatch.setattr(base, "tune", tune)
    monkeypatch.setattr(base, "validation_accuracy", lambda *_: lambda _: 1.0)
    monkeypatch.setattr(nad, "check", lambda *_, **__: None)
    monkeypatch.setattr(nad, "check_stages", lambda *_: None)
    monkeypatch.setattr(nad, "mean_square_betas", lambda *_: {"stage1": 1.0})
    monkeypatch.setattr(
        workdir_lib.Workdir,
        "progress",
        lambda self, title, total: totals.append(total) or _NoProgress(),
    )
    labels = np.arange(20, dtype=np.int32) % 2
    train = sources.Dataset(np.zeros((20, 4, 4, 3), np.uint8), labels, 2, "small")
    given = settings.NadSettings({"stage1": 1.0}, beta_factors=factors)
    keys = dict.fromkeys(("clean_key", "repair_key"), jax.random.key(0))

    sections = nad_config.get_config("smoke").to_dict()
    defense = settings.parse(sections).defense
    training = dataclasses.replace(defense.training, epochs=epochs)
    defense = dataclasses.replace(defense, nad=given, training=training)
    vetting = dataclasses.replace(
        settings.parse({**vet_config.get_config().to_dict(), "checkpoint": "x"}),
        nad=given,
        training=training,
    )
    data = base.clean_data(train, np.arange(18), np.arange(18, 20))

    def repair(workdir):
        patient = repairs.Patient("clean", 0, net, data, keys["clean_key"])
        monkeypatch.setattr(
            repairs._StagesAtRate, "teacher", lambda self: (self._patient.net, 0.0)
        )
        rates = {"acc": 1.0, "asr": 0.0}
        repairs.Stages(defense, workdir, patient, lambda _: rates).repair("nad")

    def vet(workdir):
        monkeypatch.setattr(
            nad, "make_teacher", lambda *_, **__: base.Defended(net.variables, ())
        )
        scene = vet_experiment._Scene(train, train, None, [], None, lambda *_: ({}, 0))
        vet_experiment._repair(vetting, scene, workdir, net.variables, **keys)

    for job in (repair, vet):
        path = tmp_path / job.__name__
        with contextlib.closing(workdir_lib.Workdir(path, {})) as workdir:
            job(workdir)
        lines = (path / "metrics.jsonl").read_text("utf-8").splitlines()
        told = [json.loads(line) for line in lines]
        several = len(factors) > 1
        assert [(line.get("beta_factor"), line["epoch"]) for line in told] == [
            (factor if several else None, i + 1)
            for factor in factors
            for i in range(epochs)
        ]
        assert totals.pop() == len(told)
        # Of several students no curve would be that of the row.
        shown = job is repair and not several
        assert [line.get("asr") for line in told] == [0.0 if shown else None] * len(
            told
        )


class _NoProgress:
    def advance(self, note=""):
        pass

    done = advance
