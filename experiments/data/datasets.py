"""The data sets by name, loading one of them, and drawing a subset."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from experiments.data import _draws, npz
from experiments.data._digits import DIGITS
from experiments.data._originals import Dataset, Examples, Original
from experiments.data.cifar10 import CIFAR10
from experiments.data.fashion_mnist import FASHION_MNIST
from experiments.data.svhn import SVHN

DATASETS: Mapping[str, Original] = {
    original.name: original for original in (DIGITS, FASHION_MNIST, SVHN, CIFAR10)
}
"""The data sets by name. A user's own data set is not among them: it is given as a file."""


Part = Literal["train", "test"]
"""One of the two original splits."""


def is_file(name: str) -> bool:
    """Whether a data set is given by its file, and not by its name."""
    return name.endswith(npz.SUFFIX)


def find(name: str, train_part: Part = "train") -> Original:
    """The data set of this name, or in this file, which is read.

    Args:
        name: one of `DATASETS`, or a file whose name ends in ".npz"; see `npz`.
        train_part: the part of a file to train on. Data sets with a name have their own.

    Raises:
        ValueError: if it is neither, or if the file is not as `npz` says.
    """
    if is_file(name):
        return dataclasses.replace(npz.open_npz(name), trained_on=train_part)
    if name not in DATASETS:
        raise ValueError(
            f"dataset must be one of {', '.join(sorted(DATASETS))}, or a file whose name ends in "
            f"{npz.SUFFIX}, got {name!r}."
        )
    return DATASETS[name]


def load(
    name: str,
    *,
    seed: int = 0,
    data_dir: str | os.PathLike[str] | None = None,
    download: bool = True,
    train_part: Part = "train",
    whole: bool = False,
) -> Dataset:
    """Loads a data set and draws its training examples.

    Args:
        name: as in `find`.
        seed: determines the training examples; from 0 to `MAX_SEED`. The same seed draws the same
            examples on every machine, from every source and with every version of NumPy.
        data_dir: the folder to search first and to download to; None means the default folder of
            tensorflow-datasets (the environment variable TFDS_DATA_DIR, or ~/tensorflow_datasets).
        download: whether the network may be used when the data set is not on this machine.
        train_part: as in `find`.
        whole: whether nothing is drawn: all images of the split that is trained on are taken. (Of
            the digits, which are one split, the training digits are drawn all the same.)

    Returns:
        The data set, in the computer's memory.

    Raises:
        ValueError: if the name is unknown, the seed is out of range, or `data_dir` is not a folder.
        DatasetNotFoundError: if the data set is in none of the places and cannot be downloaded.
        DamagedDatasetError: if it was found, but its contents are not the published ones.
    """
    original = find(name, train_part)
    original = original.whole() if whole else original
    _draws.check_seed(seed)
    folder = None if data_dir is None else Path(data_dir).expanduser()
    if folder is not None and folder.exists() and not folder.is_dir():
        raise ValueError(
            f"data_dir must be a folder, got {str(folder)[-200:]}, which is no folder."
        )
    return original.load(seed, folder, download)


def subset(dataset: Dataset, num_train: int | None, num_test: int | None, *, seed: int) -> Dataset:
    """Draws some of the images of a data set.

    Args:
        dataset: a data set.
        num_train: the number of training images to draw; None for all.
        num_test: the number of test images to draw, the same ones for all seeds; None for all.
        seed: determines which training images are drawn.

    Raises:
        ValueError: if the data set has fewer images.
    """

    def drawn(name: str, examples: Examples, count: int | None, seed: int, draw: int) -> np.ndarray:
        available = len(examples.label)
        if count is None:
            return np.arange(available)
        if not 1 <= count <= available:
            raise ValueError(f"{name} must be between 1 and {available}, or None, got {count}.")
        return _draws.permutation(available, seed, draw)[:count]

    train = drawn("num_train", dataset.train, num_train, seed, _draws.SUBSET)
    test = drawn("num_test", dataset.test, num_test, 0, _draws.TEST_SUBSET)
    return dataclasses.replace(
        dataset,
        train=dataset.train.take(train),
        test=dataset.test.take(test),
        train_indices=dataset.train_indices[train],
    )


def with_wrong_labels(dataset: Dataset, share: float, *, seed: int) -> Dataset:
    """Replaces the labels of some training examples by other classes, all equally likely.

    Args:
        dataset: a data set.
        share: the fraction of the labels, from 0 to 1; the number is rounded.
        seed: determines which labels are replaced, and by what.

    Raises:
        ValueError: if the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be between 0 and 1, got {share}.")
    labels = dataset.train.label.copy()
    # One integer per example decides the order in which labels are replaced, and one the class.
    order, other = np.split(_draws.integers(2 * len(labels), seed, _draws.WRONG_LABELS), 2)
    wrong = np.argsort(order, kind="stable")[: round(share * len(labels))]
    shifts = 1 + other[wrong] % np.uint64(dataset.num_classes - 1)
    labels[wrong] = (labels[wrong] + shifts.astype(labels.dtype)) % dataset.num_classes
    return dataclasses.replace(dataset, train=dataset.train._replace(label=labels))


def side_by_side(datasets: Sequence[Dataset]) -> Dataset:
    """One data set in which each seed has its own training examples.

    Args:
        datasets: the data set of each seed; they have the same test examples and the same number of
            training examples.

    Returns:
        The first of them with a leading axis of seeds in `train` and `train_indices`.
    """
    train = Examples(*map(np.stack, zip(*(one.train for one in datasets), strict=True)))
    indices = np.stack([one.train_indices for one in datasets])
    return dataclasses.replace(datasets[0], train=train, train_indices=indices)
