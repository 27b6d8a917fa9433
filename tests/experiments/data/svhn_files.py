"""A tiny SVHN in the original file format, made by the tests."""

import dataclasses
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import scipy.io

from experiments import data
from experiments.data import svhn
from experiments.data._originals import Split
from experiments.data._published import PublishedFile
from tests.experiments.data.source_files import NO_SERVER, NUM_TRAIN, published_as

# The first of 26,032 images that seed 0 draws. They may never change: old runs could not be
# repeated then.
PINNED_SVHN = [21868, 10768, 24928, 10467]


def mat_file(variables: Mapping[str, object], **kwargs) -> bytes:
    """A MATLAB file, compressed as the published ones are unless `kwargs` say otherwise."""
    file = io.BytesIO()
    scipy.io.savemat(file, dict(variables), **{"do_compression": True, **kwargs})
    return file.getvalue()


def mat_variables(split: Split) -> dict[str, np.ndarray]:
    """Images and labels as SVHN stores them: ``X[row, column, colour, i]``, and 10 for a 0."""
    labels = np.where(split.labels == 0, 10, split.labels).astype(np.uint8)
    return {"X": np.stack(list(split.images), axis=-1), "y": labels[:, np.newaxis]}


@dataclasses.dataclass(frozen=True)
class TinySvhn:
    """An SVHN of 12 training and 20 test images.

    Attributes:
        splits: the images and labels.
        published: name, address, size and checksum of each file.
        contents: the files.
    """

    splits: dict[str, Split]
    published: dict[str, PublishedFile]
    contents: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Writes the files into a new folder."""
        folder.mkdir(parents=True)
        for name, content in self.contents.items():
            (folder / name).write_bytes(content)
        return folder

    def load(self, folder: Path, **kwargs) -> data.Dataset:
        """Loads the data set from `folder` alone, without a network unless ``download=True``."""
        published = kwargs.pop("published", self.published)
        num_train = kwargs.pop("num_train", NUM_TRAIN)
        tiny = original(published, num_train)
        return tiny.load(data_dir=folder, **{"download": False, **kwargs})


def original(published: Mapping[str, PublishedFile], num_train: int = NUM_TRAIN) -> data.Original:
    """The data set SVHN, with these tiny files in place of the published ones."""
    return dataclasses.replace(
        svhn.SVHN,
        num_examples={"train": 12, "test": 20},
        num_train=num_train,
        registered={file.name: file for file in published.values()},
    )


def make_tiny_svhn(base_url: str = NO_SERVER, seed: int = 0) -> TinySvhn:
    """Random images, published at an address."""
    random = np.random.default_rng(seed)
    splits, published, contents = {}, {}, {}
    for name, num_examples in (("train", 12), ("test", 20)):
        images = random.integers(0, 256, (num_examples, 32, 32, 3), dtype=np.uint8)
        labels = random.permutation(np.arange(num_examples, dtype=np.uint8) % 10)
        splits[name] = Split(images, labels)
        file_name = f"{name}_32x32.mat"
        contents[file_name] = mat_file(mat_variables(splits[name]))
        file = PublishedFile(file_name, base_url + file_name, 0, "")
        published[name] = published_as(file, contents[file_name])
    return TinySvhn(splits, published, contents)


def write_tiny_svhn(
    folder: Path, num_train: int = NUM_TRAIN
) -> tuple[data.Original, dict[str, Split]]:
    """Writes the original files of a tiny SVHN, and returns the data set and its arrays."""
    tiny = make_tiny_svhn()
    tiny.write(folder)
    return original(tiny.published, num_train), tiny.splits
