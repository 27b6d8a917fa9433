"""A tiny CIFAR-10 in the original file format, made by the tests."""

import dataclasses
import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from experiments import data
from experiments.data import cifar10
from experiments.data._originals import Split
from experiments.data._published import PublishedFile
from tests.experiments.data.source_files import NO_SERVER, published_as

NUM_RECORDS = 3  # The number of images in each of the six binary files.
FOLDER_IN_ARCHIVE = "cifar-10-batches-bin"
# As in the published archive, files are in no natural order, and some of them have no images.
ORDER_IN_ARCHIVE = [
    "data_batch_1.bin",
    "batches.meta.txt",
    "data_batch_3.bin",
    "data_batch_4.bin",
    "test_batch.bin",
    "readme.html",
    "data_batch_5.bin",
    "data_batch_2.bin",
]

Member = tuple[tarfile.TarInfo | str, bytes]


def binary_file(images: np.ndarray, labels: np.ndarray) -> bytes:
    """One record per image: the label, and then all red, all green and all blue pixels."""
    return b"".join(
        bytes([label]) + b"".join(image[..., colour].tobytes() for colour in range(3))
        for image, label in zip(images, labels, strict=True)
    )


def tar_archive(members: Iterable[Member]) -> bytes:
    """A gzip-compressed tar archive of files, each given by its name or by a `TarInfo`."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for member, content in members:
            information = tarfile.TarInfo(member) if isinstance(member, str) else member
            information.size = len(content)
            archive.addfile(information, io.BytesIO(content))
    return file.getvalue()


@dataclasses.dataclass(frozen=True)
class TinyCifar10:
    """A CIFAR-10 of 15 training and 3 test images.

    Attributes:
        splits: the images and labels.
        members: the files in the archive.
        content: the archive.
        published: name, address, size and checksum of the archive.
    """

    splits: dict[str, Split]
    members: dict[str, bytes]
    content: bytes
    published: PublishedFile

    def write(self, folder: Path) -> Path:
        """Writes the archive into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.published.name).write_bytes(self.content)
        return folder

    def load(self, folder: Path, **kwargs) -> data.Dataset:
        """Loads the data set from `folder` alone, without a network unless ``download=True``."""
        published = kwargs.pop("published", self.published)
        return original(published).load(data_dir=folder, **{"download": False, **kwargs})


def original(published: PublishedFile) -> data.Original:
    """The data set CIFAR-10, with this tiny archive in place of the published one."""
    return dataclasses.replace(
        cifar10.CIFAR10,
        num_examples={"train": 5 * NUM_RECORDS, "test": NUM_RECORDS},
        registered={published.name: published},
    )


def make_tiny_cifar10(base_url: str = NO_SERVER, seed: int = 0) -> TinyCifar10:
    """Random images, published at an address."""
    random = np.random.default_rng(seed)
    splits = {}
    for name, num_files in (("train", 5), ("test", 1)):
        num_examples = num_files * NUM_RECORDS
        images = random.integers(0, 256, (num_examples, 32, 32, 3), dtype=np.uint8)
        splits[name] = Split(images, random.integers(0, 10, num_examples, dtype=np.uint8))
    files = {"batches.meta.txt": b"airplane\nautomobile\n", "readme.html": b"<html></html>"}
    for number in range(5):
        part = slice(number * NUM_RECORDS, (number + 1) * NUM_RECORDS)
        images, labels = splits["train"].images[part], splits["train"].labels[part]
        files[f"data_batch_{number + 1}.bin"] = binary_file(images, labels)
    files["test_batch.bin"] = binary_file(*splits["test"])
    members = {f"{FOLDER_IN_ARCHIVE}/{name}": files[name] for name in ORDER_IN_ARCHIVE}
    content = tar_archive(members.items())
    name = cifar10.ARCHIVE_NAME
    archive = PublishedFile(name, base_url + name, 0, "")
    return TinyCifar10(splits, members, content, published_as(archive, content))


def write_tiny_cifar10(folder: Path) -> tuple[data.Original, dict[str, Split]]:
    """Writes the archive of a tiny CIFAR-10, and returns the data set and its arrays."""
    tiny = make_tiny_cifar10()
    tiny.write(folder)
    return original(tiny.published), tiny.splits
