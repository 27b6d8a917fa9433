"""The declared settings of the study, and its messages for bad input."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from experiments.decide import _datasets, _records, command, settings, study
from tests.experiments.decide.test_study import TINY


def npz_of(path: pathlib.Path, **changed: np.ndarray) -> pathlib.Path:
    """Writes a file with random images and labels, some of its arrays changed."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (30, 32, 32, 3), np.uint8),
        "y_train": rng.integers(0, 10, (30, 1)),
        "x_test": rng.integers(0, 256, (40, 32, 32, 3), np.uint8),
        "y_test": rng.integers(0, 10, 40),
    }
    np.savez(path, **(arrays | changed))
    return path


def test_the_declared_settings_use_seeds_that_the_pilot_did_not():
    """The pilot used the seeds up to 31. Main and tuning seeds are different as well."""
    for setting in settings.SETTINGS.values():
        main, tuning = (
            set(study.main_seeds(setting)),
            {s for s, _ in study.tuning_job(setting).runs},
        )
        assert min(main) > 31
        assert min(tuning) > 31
        assert not main & tuning
        assert not set(settings.BASELINES) & set(setting.family)
        for name in setting.contestants:
            law = settings.CONTESTANTS[name].law(setting)
            assert law.num_examples == setting.num_train
    assert len(study.main_seeds(settings.DIGITS)) >= 60
    assert len(study.main_seeds(settings.SVHN)) >= 20


def test_the_declared_part_of_a_file_is_trained_on(tmp_path):
    path = npz_of(tmp_path / "images.npz")
    for part, sizes in (("train", (10, 40)), ("test", (10, 30))):
        setting = dataclasses.replace(
            settings.SVHN, train_part=part, pool=10, num_train=10, num_test=100
        )
        loaded = _datasets.load(setting, path)
        assert (len(loaded.pool_labels), len(loaded.test_labels)) == sizes
        with np.load(path) as file:
            assert (loaded.pool_images == file[f"x_{part}"][:10]).all()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"x_test": np.zeros((40, 28, 28), np.uint8)}, "images of one shape"),
        (
            {
                f"x_{part}": np.zeros((n, 28, 28), np.uint8)
                for part, n in (("train", 30), ("test", 40))
            },
            "x_train of shape",
        ),
        ({"y_train": np.full(30, 10)}, "got 10 in y_train"),
        ({"y_train": np.zeros(29, int)}, "as many images as labels"),
        ({"x_test": np.zeros((5, 32, 32, 3), np.uint8), "y_test": np.zeros(5, int)}, "at least"),
    ],
)
def test_other_images_are_refused(tmp_path, changed, words):
    setting = dataclasses.replace(settings.SVHN, pool=30, num_train=30)
    with pytest.raises(ValueError, match=words) as error:
        _datasets.load(setting, npz_of(tmp_path / "images.npz", **changed))
    assert "dataset" in str(error.value)
    assert len(str(error.value)) <= 400


def test_other_files_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("no archive")
    for path in (None, tmp_path / "missing.npz", tmp_path / "text.npz"):
        with pytest.raises(ValueError, match=r"dataset|npz"):
            _datasets.load(settings.SVHN, path)
    with pytest.raises(ValueError, match="dataset must be left out for digits"):
        _datasets.load(settings.DIGITS, tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"setting": "mnist"}, "setting must be one of digits, svhn, cifar10, got 'mnist'"),
        ({"contestants": ("adam",)}, "contestants must be among gd, sgd"),
        ({"seeds": (-1, 5)}, "seeds must be a first seed of at least 0"),
        ({"seeds_at_once": 0}, "seeds_at_once must be at least 1, got 0"),
        ({"microbatch_size": 0}, "microbatch_size must be at least 1, or None, got 0"),
    ],
)
def test_bad_options_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        command.DecideConfig(**changed)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"num_train": 61}, "num_train must be between 1 and the pool of 60, got 61"),
        ({"label_noise": 1.5}, "label_noise must be between 0 and 1, got 1.5"),
        ({"margin": 0.0}, "margin must be finite and positive, got 0.0"),
        ({"evaluations": 13}, "evaluations must be at most the 12 steps, got 13"),
        ({"family": ("adam",)}, "must name contestants, got adam"),
    ],
)
def test_bad_settings_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(TINY, **changed)


def test_a_report_without_records_says_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match="at least two main seeds of gd, got 0"):
        command.run(command.DecideConfig(report=True, out=tmp_path))


def test_a_line_that_is_no_record_is_refused(tmp_path):
    path = _records.path_of(tmp_path, TINY)
    path.write_text(json.dumps({"some": "thing"}) + "\n")
    with pytest.raises(ValueError, match="line 1, is no record"):
        _records.lines(path, TINY)
