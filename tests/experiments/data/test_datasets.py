"""What all data sets share, the digits, and FashionMNIST from tiny files and from the real ones."""

import struct
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
import sklearn.datasets

from experiments import data
from tests.experiments.data.fashion_files import (
    PINNED_DIGITS,
    PINNED_FASHION,
    gzip_payload,
)
from tests.experiments.data.source_files import NUM_TRAIN, check_is_tiny
from tests.support.fashion import fashion_mnist_or_skip

# All data sets ------------------------------------------------------------------------------------


def test_unknown_name_lists_the_choices():
    with pytest.raises(ValueError, match=r", or a file .* \.npz, got 'no_such_name'") as caught:
        data.load("no_such_name")
    assert {"cifar10", "digits", "fashion_mnist", "svhn"} <= set(data.DATASETS)
    assert all(name in str(caught.value) for name in data.DATASETS)


@pytest.mark.parametrize("name", sorted(data.DATASETS))
@pytest.mark.parametrize("seed", [-1, 2**31, 2**32])
def test_a_seed_out_of_range_is_refused(name, seed):
    """Without this, a seed of ``2^32`` would draw what the seed 0 draws."""
    with pytest.raises(ValueError, match=rf"seed must be between 0 and .* got {seed}\."):
        data.load(name, seed=seed)


def test_import_does_not_import_the_heavy_packages():
    code = (
        "import sys, experiments.data; "
        "print([m for m in ('tensorflow_datasets', 'sklearn', 'scipy', 'jax', 'requests', 'PIL') "
        "if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(data.__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_examples_are_a_pytree_with_a_leading_example_axis():
    train = data.load("digits").train
    assert [leaf.shape for leaf in jax.tree.leaves(train)] == [(1000, 8, 8, 1), (1000,)]
    first_two = jax.tree.map(lambda leaf: leaf[:2], train)
    assert isinstance(first_two, data.Examples)
    assert first_two.image.shape == (2, 8, 8, 1)


def test_seed_draws_the_same_examples_for_ever():
    assert data.load("digits", seed=0).train_indices[:4].tolist() == PINNED_DIGITS


def test_global_random_state_is_left_alone():
    _, key_before, position_before, *_ = np.random.get_state()  # noqa: NPY002
    data.load("digits")
    _, key_after, position_after, *_ = np.random.get_state()  # noqa: NPY002
    assert position_after == position_before
    np.testing.assert_array_equal(key_after, key_before)


# The digits ---------------------------------------------------------------------------------------


def test_digits_shapes_types_and_range():
    digits = data.load("digits")
    assert (digits.name, digits.num_classes, digits.max_value) == ("digits", 10, 16)
    assert digits.train.image.shape == (1000, 8, 8, 1)
    assert digits.test.image.shape == (797, 8, 8, 1)
    assert digits.train_indices.dtype == np.int64
    for examples in (digits.train, digits.test):
        assert examples.image.dtype == np.uint8
        assert examples.label.dtype == np.int32
        assert (examples.image.min(), examples.image.max()) == (0, 16)
    assert "scikit-learn" in digits.source


def test_digits_train_and_test_are_disjoint_and_together_everything():
    digits = data.load("digits", seed=3)
    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    originals = np.column_stack([pixels, labels])

    def rows(examples: data.Examples) -> np.ndarray:
        return np.column_stack([examples.image.reshape(-1, 64), examples.label])

    np.testing.assert_array_equal(rows(digits.train), originals[digits.train_indices])
    rest = np.setdiff1d(np.arange(1797), digits.train_indices)
    assert len(rest) == 797
    # Both are sorted, since the order of test images has no meaning.
    assert sorted(map(tuple, rows(digits.test))) == sorted(map(tuple, originals[rest]))


def test_digits_class_counts_are_those_of_scikit_learn():
    digits = data.load("digits")
    counts = np.bincount(digits.train.label, minlength=10)
    counts += np.bincount(digits.test.label, minlength=10)
    _, labels = sklearn.datasets.load_digits(return_X_y=True)
    np.testing.assert_array_equal(counts, np.bincount(labels, minlength=10))


def test_digits_split_depends_on_the_seed_and_on_nothing_else():
    first, again, other = (data.load("digits", seed=seed) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.train_indices, again.train_indices)
    np.testing.assert_array_equal(first.train.image, again.train.image)
    np.testing.assert_array_equal(first.test.image, again.test.image)
    # Two independent draws share 1000 * 1000 / 1797 = 556 examples, with a standard error of 10.
    shared = np.intersect1d(first.train_indices, other.train_indices)
    assert 500 < len(shared) < 610


# The original files of FashionMNIST ---------------------------------------------------------------


@pytest.mark.parametrize("subfolder", [".", "fashion_mnist"])
@pytest.mark.parametrize("repacked", [False, True])
def test_files_in_data_dir_are_read(tiny, tmp_path, subfolder, repacked):
    folder = tiny.write(tmp_path / "files" / subfolder, repacked)
    dataset = tiny.load(tmp_path / "files")
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"the original files in {folder}"
    assert dataset.train.image.shape == (NUM_TRAIN, 28, 28, 1)
    assert dataset.train.image.dtype == dataset.test.image.dtype == np.uint8
    assert dataset.train.label.dtype == dataset.test.label.dtype == np.int32
    assert (dataset.num_classes, dataset.max_value) == (10, 255)


def test_repacked_files_of_debian_are_read(tiny, tmp_path):
    folder = tiny.write(tmp_path / "debian", repacked=True)
    dataset = tiny.load(tmp_path / "empty", debian_folder=folder)
    check_is_tiny(dataset, tiny)
    assert dataset.source == f"the original files in {folder}"


def test_data_dir_is_looked_in_before_the_folder_of_debian(tiny, tmp_path):
    debian = tiny.write(tmp_path / "debian", repacked=True)
    own = tiny.write(tmp_path / "own")
    assert str(own) in tiny.load(own, debian_folder=debian).source


def test_every_optional_field_of_a_gzip_header_is_allowed(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    name = "train-labels-idx1-ubyte.gz"
    header = b"\x1f\x8b\x08\x1e" + b"\x00" * 4 + b"\x02\x03"
    header += b"\x03\x00abc" + b"a name\x00" + b"a comment\x00"
    header += struct.pack("<H", zlib.crc32(header) & 0xFFFF)
    (folder / name).write_bytes(header + gzip_payload(tiny.contents()[name]))
    check_is_tiny(tiny.load(folder), tiny)


def test_seed_decides_which_test_images_are_trained_on(tiny, tmp_path):
    folder = tiny.write(tmp_path / "files")
    first, again, other = (tiny.load(folder, seed=seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.train_indices, again.train_indices)
    np.testing.assert_array_equal(first.train.image, again.train.image)
    assert first.train_indices.tolist() != other.train_indices.tolist()
    check_is_tiny(other, tiny)


@pytest.mark.parametrize("num_train", [0, 21])
def test_number_of_training_images_out_of_range_is_refused(tiny, tmp_path, num_train):
    folder = tiny.write(tmp_path / "files")
    with pytest.raises(ValueError, match=f"num_train must be between 1 and 20, got {num_train}"):
        tiny.load(folder, num_train=num_train)


# The real FashionMNIST, if this machine has it ----------------------------------------------------


@pytest.fixture(scope="module")
def real_fashion() -> data.Dataset:
    """The real data set; without it, the tests that use it are skipped."""
    return fashion_mnist_or_skip()


def test_real_fashion_mnist_has_the_sizes_of_the_paper(real_fashion):
    assert real_fashion.train.image.shape == (1000, 28, 28, 1)
    assert real_fashion.test.image.shape == (60000, 28, 28, 1)
    assert real_fashion.train.label.shape == (1000,)
    np.testing.assert_array_equal(np.bincount(real_fashion.test.label), np.full(10, 6000))


def test_real_fashion_mnist_has_the_right_pixels(real_fashion):
    # The mean by which this data set is usually centred is 0.2860 = 72.9404 / 255.
    assert real_fashion.test.image.mean() == pytest.approx(72.9404, abs=5e-5)
    assert (real_fashion.test.image.min(), real_fashion.test.image.max()) == (0, 255)
    # The mean of an image has a standard deviation of 32, so that of 1,000 images has one of 1.
    assert real_fashion.train.image.mean() == pytest.approx(73.1466, abs=4)


def test_real_fashion_mnist_is_drawn_without_replacement(real_fashion):
    indices = real_fashion.train_indices
    assert indices.dtype == np.int64
    assert len(np.unique(indices)) == 1000
    assert indices.min() >= 0
    assert indices.max() < 10000
    assert indices[:4].tolist() == PINNED_FASHION
    # Each class has 1,000 of the 10,000 images: 100 are drawn, with a standard error of 9.
    counts = np.bincount(real_fashion.train.label, minlength=10)
    assert counts.sum() == 1000
    assert np.all(np.abs(counts - 100) < 45)
