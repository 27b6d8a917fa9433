"""A tiny FashionMNIST in the original file format, made by the tests."""

import dataclasses
import hashlib
import struct
import zlib
from pathlib import Path

import numpy as np

from experiments import data
from experiments.data import fashion_mnist
from experiments.data._originals import Split
from experiments.data._published import PublishedFile
from tests.experiments.data.source_files import NUM_TRAIN

MODIFIED = 1504176606  # The time in the header of a published file.
# The first examples that seed 0 draws. They may never change: old runs could not be repeated then.
PINNED_DIGITS = [718, 1489, 786, 1261]
PINNED_FASHION = [6681, 718, 5135, 9652]


def idx_file(array: np.ndarray, type_code: int = 8) -> bytes:
    """A file in the IDX format; 8 is its code for bytes."""
    header = bytes([0, 0, type_code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.tobytes()


def gzip_payload(content: bytes) -> bytes:
    """The rest of a gzip file, after its header: the compressed data, the CRC and the length."""
    compressor = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    compressed = compressor.compress(content) + compressor.flush()
    return compressed + struct.pack("<II", zlib.crc32(content), len(content))


def published_gzip(name: str, content: bytes) -> bytes:
    """A gzip file as FashionMNIST publishes it, with the file's name and time in its header."""
    stored_name = name.removesuffix(".gz").encode() + b"\x00"
    header = b"\x1f\x8b\x08\x08" + struct.pack("<I", MODIFIED) + b"\x00\x03" + stored_name
    return header + gzip_payload(content)


def repacked_gzip(content: bytes) -> bytes:
    """The same file as Debian packs it, without the name and with another time."""
    return b"\x1f\x8b\x08\x00" + struct.pack("<I", 1591347949) + b"\x00\x03" + gzip_payload(content)


@dataclasses.dataclass(frozen=True)
class TinyFashion:
    """A FashionMNIST of 12 training and 20 test images.

    Attributes:
        splits: the images and labels.
        original: the data set, with checksums of these images in place of the published ones.
    """

    splits: dict[str, Split]
    original: fashion_mnist.IdxFiles

    def contents(self) -> dict[str, bytes]:
        """The unpacked original files by their names."""
        contents = {}
        names = iter(self.original.file_names)
        for split in self.splits.values():
            contents[next(names)] = idx_file(split.images[..., 0])
            contents[next(names)] = idx_file(split.labels)
        return contents

    def write(self, folder: Path, repacked: bool = False) -> Path:
        """Writes the original files into a new folder, or those of Debian with `repacked`."""
        folder.mkdir(parents=True)
        for name, content in self.contents().items():
            packed = repacked_gzip(content) if repacked else published_gzip(name, content)
            (folder / name).write_bytes(packed)
        return folder

    def load(self, folder: Path, **kwargs) -> data.Dataset:
        """Loads the data set from `folder` alone, without a network unless ``download=True``."""
        debian = kwargs.pop("debian_folder", folder / "absent")
        num_train = kwargs.pop("num_train", NUM_TRAIN)
        tiny = dataclasses.replace(self.original, other_folders=(debian,), num_train=num_train)
        return tiny.load(data_dir=folder, **{"download": False, **kwargs})


def make_tiny_fashion(base_url: str, seed: int = 0) -> TinyFashion:
    """Random images, published at an address."""
    random = np.random.default_rng(seed)
    splits, registered, digests = {}, {}, {}

    def publish(name: str, array: np.ndarray) -> None:
        packed = published_gzip(name, idx_file(array))
        sha256 = hashlib.sha256(packed).hexdigest()
        registered[name] = PublishedFile(name, base_url + name, len(packed), sha256)

    for name, prefix, num_examples in (("train", "train", 12), ("test", "t10k", 20)):
        images = random.integers(0, 256, (num_examples, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, num_examples, dtype=np.uint8)
        splits[name] = Split(images[..., np.newaxis], labels)
        publish(f"{prefix}-images-idx3-ubyte.gz", images)
        publish(f"{prefix}-labels-idx1-ubyte.gz", labels)
        digests[name] = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    tiny = dataclasses.replace(
        fashion_mnist.FASHION_MNIST,
        num_examples={"train": 12, "test": 20},
        registered=registered,
        contents_sha256=digests,
    )
    return TinyFashion(splits, tiny)
