"""Data sets as values, before and after they are loaded.

An `Original` describes a data set without loading it: its name, its sizes, the shape of its images,
and how an experiment splits it. Its `load` makes a `Dataset`: arrays in the computer's memory.
"""

import abc
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from experiments.data import _draws


class DamagedDatasetError(ValueError):
    """A data set was found, but its contents are not the expected ones."""


class DatasetNotFoundError(FileNotFoundError):
    """A data set is in none of the places that were searched, and cannot be downloaded."""


class Split(NamedTuple):
    """One original split in its published order.

    Attributes:
        images: uint8 array of shape [N, H, W, C].
        labels: array of integers of shape [N], classes from 0.
    """

    images: np.ndarray
    labels: np.ndarray


# Keyed by the names of the splits, "train" and "test".
Splits = Mapping[str, Split]


class Examples(NamedTuple):
    """Examples as the training loop sees them: a pytree with a leading example axis.

    Attributes:
        image: uint8 array of shape [N, H, W, C], pixels from 0 to the data set's `max_value`.
        label: int32 array of shape [N], classes from 0 to the data set's `num_classes` - 1.
    """

    image: np.ndarray
    label: np.ndarray

    def take(self, indices: np.ndarray) -> "Examples":
        """The examples with these numbers, in this order."""
        return Examples(image=self.image[indices], label=self.label[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set in memory, split for one experiment.

    Attributes:
        name: the name of its `Original`.
        train: the examples to train on; with a leading axis of seeds if each seed has its own.
        test: the examples to test on.
        num_classes: number of different labels.
        max_value: value of the brightest possible pixel; divide by it to scale pixels to [0, 1].
        train_indices: int64 array of shape [N_train]; `train` example i is example
            `train_indices[i]`, counted from 0, of the original split that it was drawn from. It has
            a leading axis of seeds if each seed has its own examples.
        source: where the bytes came from, in words.
        sha256: the checksum of its `Original`.
    """

    name: str
    train: Examples
    test: Examples
    num_classes: int
    max_value: int
    train_indices: np.ndarray
    source: str
    sha256: str = ""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width (pixels) and channels of every image."""
        height, width, channels = self.train.image.shape[-3:]
        return height, width, channels

    @property
    def num_train(self) -> int:
        """N, the number of training examples of a seed."""
        return self.train.label.shape[-1]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Original(abc.ABC):
    """The description of a data set, and how an experiment splits it.

    Attributes:
        name: its name in this package.
        image_shape: height, width (pixels) and channels of its images.
        num_examples: the number of examples in the original splits "train" and "test".
        net: the name of the default net for it; None for one that fits the shape of its images.
        trained_on: the original split that is used for training; the other one is the test split.
        num_train: the number of examples of that split that are drawn for training; None for all of
            them, in their order.
        num_classes: number of different labels.
        max_value: value of the brightest possible pixel.
        sha256: the checksum of the contents if the name does not determine them; "" otherwise.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_examples: Mapping[str, int]
    net: str | None
    trained_on: Literal["train", "test"] = "train"
    num_train: int | None = None
    num_classes: int = 10
    max_value: int = 255
    sha256: str = ""

    @property
    def tested_on(self) -> str:
        """The original split that is the test split."""
        return "test" if self.trained_on == "train" else "train"

    @property
    def sizes(self) -> tuple[int, int]:
        """The numbers of training and test images, known before the data set is loaded."""
        train = self.num_examples[self.trained_on] if self.num_train is None else self.num_train
        return train, self.num_examples[self.tested_on]

    def whole(self) -> "Original":
        """The same without a draw: all images of the split that is trained on, in their order."""
        return dataclasses.replace(self, num_train=None)

    @abc.abstractmethod
    def read(self, data_dir: Path | None, download: bool) -> tuple[Splits, str]:
        """Returns the checked original splits, and a text that says where they came from."""

    def load(self, seed: int = 0, data_dir: Path | None = None, download: bool = True) -> Dataset:
        """Reads the original splits and draws the training examples.

        Args:
            seed: determines which examples are drawn if not all of them are used for training.
            data_dir: the folder to search and to download to; None for the default places.
            download: whether the network may be used.

        Raises:
            ValueError: if the seed or `num_train` is out of range.
            DatasetNotFoundError: if no place holds the data set and it cannot be downloaded.
            DamagedDatasetError: if the first place that holds it holds other contents.
        """
        _draws.check_seed(seed)
        available = self.num_examples[self.trained_on]
        if self.num_train is not None and not 1 <= self.num_train <= available:
            raise ValueError(f"num_train must be between 1 and {available}, got {self.num_train}.")
        splits, source = self.read(data_dir, download)
        if self.num_train is None:
            drawn = np.arange(available, dtype=np.int64)
        else:
            drawn = _draws.permutation(available, seed, _draws.SPLIT)[: self.num_train]
        train, test = (as_examples(splits[name]) for name in (self.trained_on, self.tested_on))
        return Dataset(
            name=self.name,
            train=train if self.num_train is None else train.take(drawn),
            test=test,
            num_classes=self.num_classes,
            max_value=self.max_value,
            train_indices=drawn,
            source=source,
            sha256=self.sha256,
        )


def as_examples(split: Split) -> Examples:
    """A split as `Examples`, with int32 labels."""
    return Examples(image=split.images, label=split.labels.astype(np.int32))
