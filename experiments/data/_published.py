"""Data sets of which files were published: names, addresses, sizes, checksums, and where they lie.

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


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Published(Original):
    """A data set of which files were published, all of which are needed.

    A subclass is a file format: it says how the files are read and checked.

    Attributes:
        tfds_name: its name in tfds.
        file_names: the published names of its files.
        registered: the files; None for those that tfds registers under `file_names`.
        other_folders: where a package of the operating system puts the published files.
        advice: ways to get it that no other data set has, each in words.
        remark: one more sentence for who does not have it.
    """

    tfds_name: str
    file_names: tuple[str, ...]
    registered: Mapping[str, PublishedFile] | None = None
    other_folders: Sequence[Path] = ()
    advice: Sequence[str] = ()
    remark: str = ""

    @property
    def files(self) -> Mapping[str, PublishedFile]:
        """What the files have to be, by their published names."""
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
            ValueError: unless they are what was published, as far as that is known.
        """
        del shuffled  # the ids tell the order
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
