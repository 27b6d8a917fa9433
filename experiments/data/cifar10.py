"""CIFAR-10, and how its archive of binary files is read and checked.

A binary file is a sequence of records: one byte for the label, then 3 * 32 * 32 bytes for the
pixels, all red ones first, then the green and the blue ones, each in row-major order. The archive
is read in memory, and nothing of it is written to the disk or executed; the Python version of
CIFAR-10, which consists of pickles, is not read at all.
"""

import dataclasses
import io
import math
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.data._originals import DamagedDatasetError, Split, Splits
from experiments.data._published import Published, read_bytes

ARCHIVE_NAME = "cifar-10-binary.tar.gz"
# The files of every split, in the published order.
MEMBERS: Mapping[str, tuple[str, ...]] = {
    "train": tuple(f"cifar-10-batches-bin/data_batch_{number}.bin" for number in range(1, 6)),
    "test": ("cifar-10-batches-bin/test_batch.bin",),
}
_IMAGE_SHAPE = _HEIGHT, _WIDTH, _NUM_CHANNELS = 32, 32, 3
_NUM_CLASSES = 10
_RECORD_LENGTH = 1 + math.prod(_IMAGE_SHAPE)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BinaryArchive(Published):
    """A data set in one archive of binary files, all of the length of the file for "test".

    A copy prepared with tfds is checked less thoroughly: see `_tfds_copies.in_order_of_ids`.
    """

    def read_files(self, paths: Mapping[str, Path]) -> Splits:
        """Reads and checks the archive; `paths` is keyed by its published name."""
        (name,) = self.file_names
        content = read_bytes(paths[name], self.files[name])
        try:
            return parse(content, self.num_examples["test"])
        except ValueError as reason:
            raise DamagedDatasetError(f"{paths[name]} is damaged: {reason}") from reason


CIFAR10 = BinaryArchive(
    name="cifar10",
    tfds_name="cifar10",
    image_shape=_IMAGE_SHAPE,
    num_examples={"train": 50_000, "test": 10_000},
    file_names=(ARCHIVE_NAME,),
    net="resnet18",
    remark=(
        "The archive is needed as it is: no checksums are published of the .bin files in it, "
        "so files already unpacked are not accepted."
    ),
)
"""CIFAR-10 with its standard split (appendix B.3)."""


def parse(content: bytes, num_records: int) -> Splits:
    """Parses the archive.

    Args:
        content: the whole archive, a gzip-compressed tar file.
        num_records: the number of images that each of its six binary files has to hold.

    Returns:
        The splits "train" and "test"; images have shape [N, 32, 32, 3].

    Raises:
        ValueError: if it is not such an archive, or if a binary file in it is missing, is there
            twice, has a wrong length, or holds a label above 9.
    """
    files = _unpack(content, num_records * _RECORD_LENGTH)
    splits = {}
    for split_name, names in MEMBERS.items():
        records = np.concatenate([_records(name, files[name]) for name in names])
        planes = records[:, 1:].reshape(-1, _NUM_CHANNELS, _HEIGHT, _WIDTH)
        images = np.ascontiguousarray(np.moveaxis(planes, 1, -1))
        splits[split_name] = Split(images=images, labels=records[:, 0].copy())
    return splits


def _records(name: str, content: bytes) -> np.ndarray:
    """The records of a binary file, uint8 of shape [num_records, 3073]; `name` is for errors."""
    records = np.frombuffer(content, dtype=np.uint8).reshape(-1, _RECORD_LENGTH)
    largest = records[:, 0].max()
    if largest >= _NUM_CLASSES:
        raise ValueError(f"{name} holds the label {largest}, expected 0 to {_NUM_CLASSES - 1}")
    return records


def _unpack(content: bytes, expected_length: int) -> dict[str, bytes]:
    """The binary files of the archive by their names in it, each of the expected length."""
    wanted = {name for names in MEMBERS.values() for name in names}
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
            for member in archive:
                # Other names, such as "../x" or "/x", are ignored.
                if member.name not in wanted:
                    continue
                if member.name in files:
                    raise ValueError(f"it holds {member.name} twice")
                # Links are not followed, and nothing longer than expected is unpacked.
                file = archive.extractfile(member) if member.isreg() else None
                if file is None or member.size != expected_length:
                    raise ValueError(
                        f"{member.name} in it has {member.size:,} bytes and type {member.type!r}, "
                        f"expected {expected_length:,} bytes and type {tarfile.REGTYPE!r}"
                    )
                files[member.name] = file.read()
    except (tarfile.TarError, zlib.error, OSError, EOFError) as error:
        raise ValueError(f"it is no gzip-compressed tar archive: {error}") from error
    missing = sorted(wanted - files.keys())
    if missing:
        raise ValueError(f"it does not hold {', '.join(missing)}")
    return files
