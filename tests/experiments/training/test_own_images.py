"""Each seed's own subset of the images, wrong labels, and the part of a file to train on."""

import dataclasses

import numpy as np
import pytest
import scipy.stats

from experiments import data, training
from experiments.training import loop
from experiments.training.algorithms import NoiseSettings
from experiments.training.config import TrainConfig
from tests.support.statistics import FALSE_ALARMS, assert_agree, assert_rejected


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A file with 300 digits to train on and 90 to test on."""
    digits = data.load("digits")
    path = tmp_path_factory.mktemp("files") / "digits.npz"
    (x_train, y_train), (x_test, y_test) = digits.train, digits.test
    arrays = {"x_train": x_train[:300], "y_train": y_train[:300]}
    np.savez(path, **arrays, x_test=x_test[:90], y_test=y_test[:90])
    return str(path)


@pytest.fixture
def plan(file):
    """Two seeds that train on 100 images each of their own, a fifth of them with wrong labels."""
    return TrainConfig(
        dataset=file,
        steps=3,
        seed=3,
        seeds=2,
        num_train=100,
        learning_rate=0.1,
        eval_every=3,
        microbatch_size=None,
        noise=NoiseSettings(batch_size=10),
        subset_per_seed=True,
        label_noise=0.2,
    )


@pytest.mark.slow
def test_each_seed_trains_on_the_images_that_it_would_draw_alone(plan):
    """Images, labels and all evaluations of the second seed are those of a run of it alone."""
    images = loop.load(plan)
    assert images.train.image.shape == (2, 100, 8, 8, 1)
    assert (images.image_shape, images.num_train) == ((8, 8, 1), 100)
    # Two seeds share 33 of 100 images on average, with a standard error of 4.
    assert len(np.intersect1d(*images.train_indices)) < 60
    together = [evaluation for _, evaluation in training.train_seeds(plan.resolved(), images)]
    alone = dataclasses.replace(plan, seed=4, seeds=1, data_seed=4, subset_per_seed=False)
    own = loop.load(alone)
    np.testing.assert_array_equal(own.train_indices, images.train_indices[1])
    np.testing.assert_array_equal(own.train.label, images.train.label[1])
    for evaluation, (_, wanted) in zip(
        together, training.train_seeds(alone.resolved(), own), strict=True
    ):
        for found, expected in zip(evaluation[1:5], wanted[1:5], strict=True):
            np.testing.assert_allclose(found[1], expected[0], rtol=1e-4)
    assert together[1].train_loss[0] != together[1].train_loss[1]
    with pytest.raises(ValueError, match="examples of its own for each of 2 seeds"):
        training.make_trainer(plan.resolved(), own)


def test_the_stated_share_of_labels_is_of_another_class():
    """The nine new classes are equally likely, by a chi-square with 8 degrees of freedom.

    A third of the false alarms is for each of its two shares, and a third is for the two seeds.
    """
    most = scipy.stats.chi2.isf(FALSE_ALARMS / 3, 8)
    zeros = np.zeros(9_000, np.int32)
    images = np.zeros((9_000, 1, 1, 1), np.uint8)
    examples = data.Examples(images, zeros)
    dataset = data.Dataset("zeros", examples, examples, 10, 255, np.arange(9_000), "nowhere")
    for share in (0.0, 0.5, 1.0):
        found = data.with_wrong_labels(dataset, share, seed=1)
        counts = np.bincount(found.train.label, minlength=10)
        assert counts[0] == 9_000 - 9_000 * share
        assert ((counts[1:] - 1_000 * share) ** 2).sum() <= most * 1_000 * share
    halves = [data.with_wrong_labels(dataset, 0.5, seed=seed).train.label > 0 for seed in (1, 1, 2)]
    assert (halves[0] == halves[1]).all()
    # Two independent halves of 9,000 share a hypergeometric number. Halves drawn with one key share
    # all, and those of a rule that takes every second label share all or none.
    shared, error = (halves[0] & halves[2]).sum(), np.sqrt(4_500 * 0.25 * 4_500 / 8_999)
    assert_agree(shared, 2_250, error, comparisons=3)
    assert_rejected(shared, 2_400, error, comparisons=3)
    assert not zeros.any()
    with pytest.raises(ValueError, match="share must be between 0 and 1, got -1"):
        data.with_wrong_labels(dataset, -1, seed=0)


def test_wrong_labels_are_for_training_alone(plan):
    """Of the 100 labels of each seed, 20 are wrong, and none of the test images."""
    right = loop.load(dataclasses.replace(plan, label_noise=0.0))
    wrong = loop.load(plan)
    assert ((right.train.label != wrong.train.label).sum(1) == 20).all()
    np.testing.assert_array_equal(right.test.label, wrong.test.label)


def test_either_part_of_a_file_is_trained_on(file):
    with np.load(file) as arrays:
        for part, other in (("train", "test"), ("test", "train")):
            plan = TrainConfig(dataset=file, train_part=part)
            loaded = loop.load(plan)
            np.testing.assert_array_equal(loaded.train.image, arrays[f"x_{part}"])
            np.testing.assert_array_equal(loaded.test.label, arrays[f"y_{other}"])
            assert loop.sizes(plan) == (len(arrays[f"y_{part}"]), len(arrays[f"y_{other}"]))
    assert TrainConfig.of_record(_record(plan)) == plan


def _record(plan):
    return dataclasses.asdict(plan) | {"data_dir": None, "out": None}


def test_a_seed_draws_from_all_images_of_the_part_that_is_trained_on():
    """For FashionMNIST these are 10,000 images, and not the 1,000 that `data_seed` draws."""
    plan = TrainConfig(subset_per_seed=True, num_train=2_000)
    loop.check(plan)
    assert loop.sizes(TrainConfig(subset_per_seed=True)) == (1_000, 60_000)
    with pytest.raises(ValueError, match="num_train must be between 1 and 10000"):
        loop.check(dataclasses.replace(plan, num_train=10_001))
    digits = loop.load(TrainConfig(dataset="digits", subset_per_seed=True, seeds=2, num_train=50))
    assert digits.test.label.shape == (797,)  # The other 1,000 are those to draw from.


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"label_noise": 1.1}, "label_noise must be between 0 and 1, got 1.1"),
        ({"train_part": "test"}, "train_part is for FILE.npz, got 'test' with fashion_mnist"),
        ({"train_part": "all", "dataset": "x.npz"}, "train_part must be one of train, test"),
    ],
)
def test_bad_settings_are_refused(changed, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(**changed)


def test_one_seed_over_many_devices_has_no_subset_per_seed(plan, tmp_path):
    with pytest.raises(ValueError, match="subset_per_seed is for several seeds"):
        training.check_distributed(dataclasses.replace(plan, seeds=1, out=tmp_path))
