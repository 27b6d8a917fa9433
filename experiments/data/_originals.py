"""What a data set was published as: its files, their checksums, and how they are read.

tensorflow-datasets (tfds) is the source of truth for names, addresses, sizes and checksums; the
files themselves are parsed by the modules of the data sets, so that TensorFlow is not needed.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

IMAGE_SHAPE = (32, 32, 3)  # of SVHN and of CIFAR-10
NUM_CLASSES = 10  # of every data set here


class DamagedDatasetError(ValueError):
    """A data set is there, but its contents are not the published ones."""


class DatasetNotFoundError(FileNotFoundError):
    """A data set is in none of the places looked in and cannot be downloaded."""


class NotHereError(Exception):
    """One place does not hold the data set; the text names the place and says what is missing."""


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """What one published file has to be.

    Attributes:
        name: file name.
        url: where it is published.
        size: length in bytes.
        sha256: checksum in hexadecimal digits.
    """

    name: str
    url: str
    size: int
    sha256: str


class Split(NamedTuple):
    """One original split in its published order.

    Attributes:
        images: uint8 array of shape [N, H, W, C], pixels from 0 to 255.
        labels: uint8 array of shape [N], classes from 0 to 9.
    """

    images: np.ndarray
    labels: np.ndarray


# Keyed by tfds's names of the splits, "train" and "test".
Splits = Mapping[str, Split]
# What a data set prepared with tfds gives: for every example its features by name.
Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Original:
    """A data set as it was published, and how it is read.

    Attributes:
        name: its name here, also that of the folder in `data_dir` in which its files may lie.
        tfds_name: its name in tfds.
        files: the published files, all of which are needed.
        num_examples: the number of examples in each split, keyed by the splits' names.
        read_files: reads and checks the published files, given their paths by published name.
        read_rows: makes a split of all rows of a copy prepared with tfds, in published order; takes
            the rows, the split's name and whether tfds shuffled them, and raises ValueError unless
            they are what was published.
        other_folders: where a package of the operating system puts the published files.
        advice: ways to get it that no other data set has, each in words.
        remark: one more sentence for who does not have it.
    """

    name: str
    tfds_name: str
    files: Sequence[PublishedFile]
    num_examples: Mapping[str, int]
    read_files: Callable[[Mapping[str, Path]], Splits]
    read_rows: Callable[[Rows, str, bool], Split]
    other_folders: Sequence[Path] = ()
    advice: Sequence[str] = ()
    remark: str = ""

    def builder(self, data_dir: Path | None) -> Any:
        """Returns its tfds builder for a folder, or for tfds's default folder."""
        import tensorflow_datasets as tfds

        return tfds.builder(self.tfds_name, data_dir=data_dir)


def registered_files(tfds_name: str) -> dict[str, PublishedFile]:
    """Returns the files that tfds registers for one of its data sets, keyed by their names."""
    import tensorflow_datasets as tfds

    url_infos: Any = tfds.builder_cls(tfds_name).url_infos
    files = {}
    for url, info in url_infos.items():
        name = url.rpartition("/")[2]
        files[name] = PublishedFile(name, url, int(info.size), info.checksum)
    return files


def read_bytes(path: Path, published: PublishedFile) -> bytes:
    """Reads a file whole, and hands it out only when it is the published one.

    Args:
        path: the file to read; its own name does not matter.
        published: what it has to be.

    Returns:
        The file's contents, which have the published size and checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedDatasetError: if it is another file, or cut short. The text names the file.
    """
    size = path.stat().st_size  # so that a file that is far too long is not even read
    if size != published.size:
        raise DamagedDatasetError(
            f"{path} is damaged: it has {size:,} bytes, but {published.name} as published has "
            f"{published.size:,}"
        )
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != published.sha256:
        raise DamagedDatasetError(
            f"{path} is damaged: it has sha256 {sha256}, but {published.name} as published has "
            f"sha256 {published.sha256}"
        )
    return content
