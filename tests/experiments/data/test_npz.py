"""The user's own data sets, from the file to a trained net by the command line."""

import json
import shlex

import numpy as np
import pytest

from experiments import data
from experiments.__main__ import main
from experiments.data import npz
from experiments.training import TrainConfig, loop, runs

TRAIN = shlex.split(
    "train --algorithm gd --steps 2 --eval-every 1 --microbatch-size None --noise.batch-size 5"
)


def arrays(num_train=12, num_test=6, shape=(16, 18, 3), num_classes=3, seed=0):
    """The four arrays of a file, with random images."""
    random = np.random.default_rng(seed)

    def split(name, count):
        images = random.integers(0, 256, (count, *shape), np.uint8)
        return {f"x_{name}": images, f"y_{name}": np.arange(count) % num_classes}

    return split("train", num_train) | split("test", num_test)


def write(path, **held):
    """Writes arrays to a file, and returns its path."""
    np.savez(path, **held)
    return path


@pytest.mark.parametrize(
    ("shape", "net"), [((16, 18, 3), "lenet"), ((16, 16), "lenet"), ((5, 4, 1), "digits_net")]
)
def test_a_file_is_trained_on_with_a_net_that_fits(tmp_path, shape, net, capsys):
    path = write(tmp_path / "mine.npz", **arrays(shape=shape))
    main([*TRAIN, "--dataset", str(path), "--out", str(tmp_path / "run")])
    assert "mine: 12 training and 6 test images" in capsys.readouterr().out
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (record["dataset"], record["model"]) == (str(path), net)
    assert record["dataset_sha256"] == data.find(str(path)).sha256
    assert record["dataset_sha256"] in record["data_source"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["step"] == 2
    main(["list", "--runs", str(tmp_path)])
    assert "finished" in capsys.readouterr().out


def test_pixels_and_labels_arrive_as_they_are(tmp_path):
    held = arrays()
    wide = {name: array.astype(np.int64) for name, array in held.items()}
    wide["y_train"] = wide["y_train"][:, None]  # Labels of CIFAR-10 in Keras have this shape.
    dataset = data.load(str(write(tmp_path / "a.npz", **wide)))
    np.testing.assert_array_equal(dataset.train.image, held["x_train"])
    np.testing.assert_array_equal(dataset.test.image, held["x_test"])
    np.testing.assert_array_equal(dataset.train.label, held["y_train"])
    assert (dataset.train.image.dtype, dataset.train.label.dtype) == (np.uint8, np.int32)
    assert (dataset.num_classes, dataset.max_value, dataset.image_shape) == (3, 255, (16, 18, 3))
    assert dataset.train_indices.tolist() == list(range(12))


@pytest.mark.slow
def test_a_run_is_known_by_the_contents_of_the_file_and_not_by_its_path(tmp_path):
    """A finished run is shown for a moved copy, and refused for a file with other pixels."""
    held = arrays()
    one = write(tmp_path / "one.npz", **held)
    np.savez_compressed(tmp_path / "moved.npz", **held)
    changed = held | {"x_test": held["x_test"] ^ np.uint8(1)}
    write(tmp_path / "changed.npz", **changed)
    plans = [
        TrainConfig(dataset=str(tmp_path / f"{name}.npz")).resolved()
        for name in ("one", "moved", "changed")
    ]
    first, moved, other = (runs.settings(plan) for plan in plans)
    assert first == moved != other
    out = tmp_path / "run"
    main([*TRAIN, "--dataset", str(one), "--out", str(out)])
    before = (out / "metrics.jsonl").read_bytes()
    main([*TRAIN, "--dataset", str(tmp_path / "moved.npz"), "--out", str(out)])
    assert (out / "metrics.jsonl").read_bytes() == before
    with pytest.raises(SystemExit, match="differs in dataset_sha256"):
        main([*TRAIN, "--dataset", str(tmp_path / "changed.npz"), "--out", str(out)])
    write(one, **changed)
    with pytest.raises(ValueError, match="must hold what it held when the run began"):
        loop.load(plans[0])


def test_settings_of_data_sets_with_names_have_no_checksum():
    """A checksum would tell old runs from new ones of the same data set."""
    assert "dataset_sha256" not in runs.settings(TrainConfig())
    assert runs.settings(TrainConfig())["dataset"] == "fashion_mnist"


WRONG = [
    ({"y_test": None}, "with no y_test"),
    ({"x_train": None, "y_train": None}, "with no x_train and no y_train"),
    ({"x_train": np.zeros(12, np.uint8)}, r"x_train of shape \(12,\)"),
    ({"x_train": np.zeros((12, 4, 4, 2), np.uint8)}, r"x_train of shape \(12, 4, 4, 2\)"),
    ({"x_train": np.zeros((0, 16, 18, 3), np.uint8)}, r"x_train of shape \(0, 16, 18, 3\)"),
    ({"x_test": np.zeros((6, 16, 18, 1), np.uint8)}, r"images of one shape, got .*\(16, 18, 1\)"),
    ({"x_train": np.zeros((12, 16, 18, 3))}, "x_train of type float64"),
    ({"x_train": np.full((12, 16, 18, 3), 256)}, "x_train with values from 256 to 256"),
    ({"x_train": np.full((12, 16, 18, 3), -1)}, "x_train with values from -1 to -1"),
    ({"x_train": np.zeros((11, 16, 18, 3), np.uint8)}, "11 images and y_train with 12 labels"),
    ({"y_train": np.zeros((12, 3), int)}, r"y_train of shape \(12, 3\)"),
    ({"y_train": np.zeros(12)}, "y_train of type float64"),
    ({"y_train": np.array(["a"] * 12)}, "y_train of type <U1"),
    ({"y_test": np.full(6, -1)}, "y_test with labels from -1 to -1"),
    ({"y_train": np.ones(12, int), "y_test": np.ones(6, int)}, "labels from 1 to 1"),
    ({"y_test": np.array([0, 1, 2, 0, 1, 10**6])}, "labels from 0 to 1000000"),
    ({"y_train": np.zeros(12, int), "y_test": np.zeros(6, int)}, "labels from 0 to 0"),
    ({"y_test": np.array([None] * 6)}, "without pickles"),
]


@pytest.mark.parametrize(("changes", "words"), WRONG)
def test_a_wrong_array_is_named_before_anything_is_trained(tmp_path, changes, words):
    """With the longest path that a message may have to quote, it has at most 400 characters."""
    held = {k: v for k, v in (arrays() | changes).items() if v is not None}
    path = write(tmp_path / ("long-" * 30 + ".npz"), **held)
    with pytest.raises(SystemExit, match=words) as stopped:
        main([*TRAIN, "--dataset", str(path), "--out", str(tmp_path / "run")])
    assert str(stopped.value).startswith("error: dataset must ")
    assert len(str(stopped.value)) <= 400
    assert not (tmp_path / "run").exists()


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    one = tmp_path / "one.npz"
    with open(one, "wb") as file:
        np.save(file, np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    (tmp_path / "empty.npz").touch()
    whole = write(tmp_path / "whole.npz", **arrays()).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    for name in ("one", "text", "empty", "half"):
        with pytest.raises(ValueError, match=r"must be a NumPy archive without pickles, got .*: "):
            npz.open_npz(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="which does not exist"):
        npz.open_npz(tmp_path / "absent.npz")
    with pytest.raises(ValueError, match="which is no file"):
        npz.open_npz(tmp_path)


def test_a_net_that_does_not_take_the_images_is_refused(tmp_path):
    path = write(tmp_path / "mine.npz", **arrays())
    with pytest.raises(ValueError, match="model must be lenet or digits_net or resnet18"):
        TrainConfig(dataset=str(path), model="vgg11").resolved()
    with pytest.raises(ValueError, match="width is for vgg11 and resnet18, got 3 with lenet"):
        TrainConfig(dataset=str(path), width=3).resolved()
    assert TrainConfig(dataset=str(path), model="resnet18", width=3).resolved().width == 3
