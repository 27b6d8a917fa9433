"""Loads the data sets of the experiments as uint8 arrays in the computer's memory.

`load("digits")` needs no file and no network; the others, such as `load("fashion_mnist")`, find the
original files or download them, and check every byte of them before anything is trained on it.
What a data set is split into depends on its name and the seed only, never on where its bytes came
from.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import cifar10, fashion_mnist, svhn
from experiments.data._originals import (
    NUM_CLASSES,
    Split,
    Splits,
)

SIZES: Mapping[str, tuple[int, int]] = {
    "digits": (1_000, 797),
    "fashion_mnist": (1_000, 60_000),
    "svhn": (svhn.NUM_TRAIN, 73_257),
    "cifar10": (50_000, 10_000),
}
"""How many images each data set trains on, and tests on: known before it is loaded."""

MAX_SEED = 2**31 - 1
"""The largest seed: of larger ones jax drops the high bits, so that 2^32 would be 0 again."""

# What is drawn with a seed, apart from each other: an order is never used twice.
_SPLIT, _SUBSET, _TEST_SUBSET = range(3)

_NUM_DIGITS_FOR_TRAINING = 1000
_NUM_FASHION_IMAGES_FOR_TRAINING = 1000  # appendix B.1 of the paper


class Examples(NamedTuple):
    """Examples as the training loop sees them: a pytree with a leading example axis.

    Attributes:
        image: uint8 array of shape [N, H, W, C], pixels from 0 to the data set's `max_value`.
        label: int32 array of shape [N], classes from 0 to the data set's `num_classes` - 1.
    """

    image: np.ndarray
    label: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set, split for one experiment.

    Attributes:
        name: key of `DATASETS`.
        train: the examples to train on.
        test: the examples to test on.
        num_classes: number of different labels.
        max_value: value of the brightest possible pixel; divide by it to scale pixels to [0, 1].
        train_indices: int64 array of shape [N_train]; `train` example i is example
            `train_indices[i]`, counted from 0, of the original split that it was drawn from.
        source: where the bytes came from, in words.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    max_value: int
    train_indices: np.ndarray
    source: str


def load(
    name: str,
    *,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
) -> Dataset:
    """Loads a data set and draws its training examples.

    Args:
        name: one of `DATASETS`.
        seed: decides which examples are trained on; from 0 to `MAX_SEED`. The same seed draws the
            same examples on every machine, from every source and with every version of NumPy.
        data_dir: folder to look in first and to download into; None means the default folder of
            tensorflow-datasets (the environment variable TFDS_DATA_DIR, or ~/tensorflow_datasets).
        download: whether the network may be used when the data set is not on this machine.

    Returns:
        The data set, in the computer's memory.

    Raises:
        ValueError: if the name is unknown, the seed out of range, or `data_dir` no folder.
        DatasetNotFoundError: if the data set is nowhere to be had.
        DamagedDatasetError: if it was found, but its contents are not the published ones.
    """
    if name not in DATASETS:
        raise ValueError(f"name must be one of {', '.join(sorted(DATASETS))}, got {name!r}")
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be between 0 and 2^31 - 1 = {MAX_SEED}, got {seed}.")
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(
            f"data_dir must be a folder, got {str(folder)[-200:]}, which is no folder."
        )
    return DATASETS[name](seed, folder, download)


def load_digits(seed: int, data_dir: Path | None = None, download: bool = True) -> Dataset:
    """Loads scikit-learn's 1,797 handwritten digits: 1,000 to train on, the rest to test on.

    Args:
        seed: decides which 1,000 digits are trained on.
        data_dir: not used, the digits come with scikit-learn.
        download: not used either.

    Returns:
        The data set; images have shape [8, 8, 1] and pixels from 0 to 16.
    """
    del data_dir, download
    import sklearn
    import sklearn.datasets

    pixels, labels = sklearn.datasets.load_digits(return_X_y=True)
    digits = _as_examples(Split(pixels.reshape(-1, 8, 8, 1).astype(np.uint8), labels))
    permutation = _permutation(len(digits.label), seed, _SPLIT)
    train_indices = permutation[:_NUM_DIGITS_FOR_TRAINING]
    return Dataset(
        name="digits",
        train=_take(digits, train_indices),
        test=_take(digits, permutation[_NUM_DIGITS_FOR_TRAINING:]),
        num_classes=10,
        max_value=16,
        train_indices=train_indices,
        source=f"load_digits of scikit-learn {sklearn.__version__}",
    )


def load_fashion_mnist(
    seed: int,
    data_dir: Path | None = None,
    download: bool = True,
    *,
    published: fashion_mnist.Published | None = None,
    debian_folder: Path = fashion_mnist.DEBIAN_FOLDER,
    num_train: int = _NUM_FASHION_IMAGES_FOR_TRAINING,
) -> Dataset:
    """Loads FashionMNIST, split as in appendix B.1 of the paper.

    The training set is drawn without replacement from the 10,000 original *test* images; the test
    set is the 60,000 original *training* images, in their order.

    Args:
        seed: decides which images are trained on.
        data_dir: see `load`.
        download: see `load`.
        published: what "train" and "test" have to be; None means as registered in
            tensorflow-datasets, which is the source of truth for addresses, sizes and checksums.
        debian_folder: where Debian's package puts the original files.
        num_train: how many images are trained on, at least 1 and at most all original test images.

    Returns:
        The data set; images have shape [28, 28, 1] and pixels from 0 to 255.

    Raises:
        ValueError: if `num_train` is out of range.
        DatasetNotFoundError: if no place holds it and it cannot be downloaded.
        DamagedDatasetError: if the first place that holds it does not hold what was published.
    """
    if published is None:
        published = fashion_mnist.published_files()
    (num_test,) = published["test"].labels.shape
    _check_num_train(num_train, num_test)
    splits, source = fashion_mnist.read(
        published, data_dir=data_dir, download=download, debian_folder=debian_folder
    )
    return _trained_on_test("fashion_mnist", splits, source, seed, num_train)


def load_svhn(
    seed: int,
    data_dir: Path | None = None,
    download: bool = True,
    *,
    published: svhn.Published | None = None,
    num_train: int | None = None,
) -> Dataset:
    """Loads SVHN (the cropped digits), split as in appendix B.2 of the paper.

    The training set is drawn without replacement from the 26,032 original *test* images; the test
    set is all 73,257 original *training* images, in their order. (The paper says 75,000, which is
    more than there are.)

    Args:
        seed: decides which images are trained on.
        data_dir: see `load`.
        download: see `load`.
        published: what "train" and "test" have to be; None means `svhn.published_files()`.
        num_train: how many images are trained on, at least 1 and at most all original test images;
            None means `svhn.NUM_TRAIN`.

    Returns:
        The data set; images have shape [32, 32, 3] and pixels from 0 to 255, labels are digits.

    Raises:
        ValueError: if `num_train` is out of range.
        DatasetNotFoundError: if no place holds it and it cannot be downloaded.
        DamagedDatasetError: if the first place that holds it does not hold what was published.
    """
    if published is None:
        published = svhn.published_files()
    if num_train is None:
        num_train = svhn.NUM_TRAIN
    _check_num_train(num_train, published["test"].num_examples)
    splits, source = svhn.read(published, data_dir=data_dir, download=download)
    return _trained_on_test("svhn", splits, source, seed, num_train)


def load_cifar10(
    seed: int,
    data_dir: Path | None = None,
    download: bool = True,
    *,
    published: cifar10.Archive | None = None,
) -> Dataset:
    """Loads CIFAR-10 with its standard split: 50,000 images to train on, 10,000 to test on.

    Args:
        seed: not used, since nothing is drawn.
        data_dir: see `load`.
        download: see `load`.
        published: what the archive has to be; None means `cifar10.published_files()`.

    Returns:
        The data set; images have shape [32, 32, 3] and pixels from 0 to 255.

    Raises:
        DatasetNotFoundError: if no place holds it and it cannot be downloaded.
        DamagedDatasetError: if the first place that holds it does not hold what was published.
    """
    del seed
    if published is None:
        published = cifar10.published_files()
    splits, source = cifar10.read(published, data_dir=data_dir, download=download)
    return Dataset(
        name="cifar10",
        train=_as_examples(splits["train"]),
        test=_as_examples(splits["test"]),
        num_classes=NUM_CLASSES,
        max_value=255,
        train_indices=np.arange(len(splits["train"].labels), dtype=np.int64),
        source=source,
    )


DATASETS: Mapping[str, Callable[[int, Path | None, bool], Dataset]] = {
    "digits": load_digits,
    "fashion_mnist": load_fashion_mnist,
    "svhn": load_svhn,
    "cifar10": load_cifar10,
}


def _check_num_train(num_train: int, num_test: int) -> None:
    if not 1 <= num_train <= num_test:
        raise ValueError(f"num_train must be between 1 and {num_test}, got {num_train}")


def _trained_on_test(name: str, splits: Splits, source: str, seed: int, num_train: int) -> Dataset:
    """Trains on a draw from the original test split and tests on all of the training split."""
    train_indices = _permutation(len(splits["test"].labels), seed, _SPLIT)[:num_train]
    return Dataset(
        name=name,
        train=_take(_as_examples(splits["test"]), train_indices),
        test=_as_examples(splits["train"]),
        num_classes=NUM_CLASSES,
        max_value=255,
        train_indices=train_indices,
        source=source,
    )


def subset(dataset: Dataset, num_train: int | None, num_test: int | None, *, seed: int) -> Dataset:
    """Draws some of the images of a data set.

    Args:
        dataset: a data set.
        num_train: how many of the training images; None for all.
        num_test: how many of the test images, the same for every seed; None for all.
        seed: decides which training images.

    Raises:
        ValueError: if there are not as many.
    """

    def drawn(name: str, examples: Examples, count: int | None, seed: int, draw: int) -> np.ndarray:
        available = len(examples.label)
        if count is None:
            return np.arange(available)
        if not 1 <= count <= available:
            raise ValueError(f"{name} must be between 1 and {available}, or None, got {count}.")
        return _permutation(available, seed, draw)[:count]

    train = drawn("num_train", dataset.train, num_train, seed, _SUBSET)
    test = drawn("num_test", dataset.test, num_test, 0, _TEST_SUBSET)
    return dataclasses.replace(
        dataset,
        train=_take(dataset.train, train),
        test=_take(dataset.test, test),
        train_indices=dataset.train_indices[train],
    )


def _permutation(num_examples: int, seed: int, draw: int) -> np.ndarray:
    """A random order of the numbers below `num_examples`, int64, a pure function of seed and draw.

    NumPy promises the integers that Philox makes of a key to every later version, but not what
    `Generator.permutation` makes of them; so the integers themselves are sorted.
    """
    # Heavy, and not needed by who only reads files.
    import jax

    from msgd_jax._streams import Stream, derive

    # Named, since the default may be another: every machine draws the same.
    key = derive(jax.random.key(seed, impl="threefry2x32"), Stream.EXAMPLES, draw)
    words = np.asarray(jax.random.key_data(key), np.uint64)
    draws = np.random.Philox(key=words).random_raw(num_examples)
    return np.argsort(draws, kind="stable").astype(np.int64)


def _as_examples(split: Split) -> Examples:
    return Examples(image=split.images, label=split.labels.astype(np.int32))


def _take(examples: Examples, indices: np.ndarray) -> Examples:
    return Examples(image=examples.image[indices], label=examples.label[indices])
