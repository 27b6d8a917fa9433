"""Data sets in published files: their names, addresses, sizes, checksums, and usual places.

tensorflow-datasets (tfds) is the source of truth for names, addresses, sizes and checksums; the
files themselves are parsed by the modules of the data sets, so that TensorFlow is not needed.
"""

import abc
import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.data import _places, _tfds_copies
from experiments.data._originals import DamagedDatasetError, Original, Split, Splits


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """The description of one published file.

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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Published(Original):
    """A data set in published files, all of which are needed.

    A subclass stands for a file format: it defines how the files are read and checked.

    Attributes:
        tfds_name: its name in tfds.
        file_names: the published names of its files.
        registered: the files; None for those that tfds registers under `file_names`.
        other_folders: the folders where packages of the operating system put the published files.
        advice: further ways to get this data set, as texts for the error message.
        remark: one more sentence for the error message if it is not found.
    """

    tfds_name: str
    file_names: tuple[str, ...]
    registered: Mapping[str, PublishedFile] | None = None
    other_folders: Sequence[Path] = ()
    advice: Sequence[str] = ()
    remark: str = ""

    @property
    def files(self) -> Mapping[str, PublishedFile]:
        """The descriptions of the files, by their published names."""
        known = registered_files(self.tfds_name) if self.registered is None else self.registered
        return {name: known[name] for name in self.file_names}

    def builder(self, data_dir: Path | None) -> Any:
        """Returns its tfds builder for a folder, or for tfds's default folder."""
        import tensorflow_datasets as tfds

        return tfds.builder(self.tfds_name, data_dir=data_dir)

    @abc.abstractmethod
    def read_files(self, paths: Mapping[str, Path]) -> Splits:
        """Reads and checks the published files, given their paths by published name."""

    def read_rows(self, rows: _tfds_copies.Rows, split_name: str, shuffled: bool) -> Split:
        """Makes a split, in published order, of all rows of a copy prepared with tfds.

        Args:
            rows: all rows of the split.
            split_name: its name.
            shuffled: whether tfds shuffled them.

        Raises:
            ValueError: if they are not the published examples, as far as that can be checked.
        """
        del shuffled  # The ids determine the order.
        return _tfds_copies.in_order_of_ids(
            rows, split_name, image_shape=self.image_shape, num_classes=self.num_classes
        )

    def read(self, data_dir: Path | None, download: bool) -> tuple[Splits, str]:
        """Reads the splits from the first of `_places.read`'s places that holds them."""
        return _places.read(self, data_dir=data_dir, download=download)


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
    """Reads a whole file, and returns it only if it is the published one.

    Args:
        path: the file to read; its name does not matter.
        published: the description of the file.

    Returns:
        The file's contents, which have the published size and checksum.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedDatasetError: if it is another file, or cut short; the text names the file.
    """
    size = path.stat().st_size  # This comes first, so that a file that is too long is not read.
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
