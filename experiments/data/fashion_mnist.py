"""FashionMNIST, and how its four IDX files are read and checked."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.data import _idx, _tfds_copies
from experiments.data._originals import DamagedDatasetError, Split, Splits
from experiments.data._published import Published

DEBIAN_PACKAGE = "dataset-fashion-mnist"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class IdxFiles(Published):
    """A data set in IDX files: images and labels of "train", then images and labels of "test".

    The contents have a checksum, so neither a different gzip header nor a copy prepared with tfds
    makes a difference.

    Attributes:
        contents_sha256: for each split the checksum, in hexadecimal digits, of all pixels and then
            all labels as bytes, in the published order.
    """

    contents_sha256: Mapping[str, str]

    def read_files(self, paths: Mapping[str, Path]) -> Splits:
        """Reads and checks the four original files; `paths` is keyed by their published names."""
        splits = {}
        for i, split_name in enumerate(("train", "test")):
            images, labels = (paths[name] for name in self.file_names[2 * i : 2 * i + 2])
            count = self.num_examples[split_name]
            split = Split(
                images=_idx.read(images, (count, *self.image_shape[:2]))[..., np.newaxis],
                labels=_idx.read(labels, (count,)),
            )
            try:
                splits[split_name] = self._as_published(split, split_name)
            except ValueError as reason:
                raise DamagedDatasetError(f"{images} or {labels} is damaged: {reason}") from None
        return splits

    def read_rows(self, rows: _tfds_copies.Rows, split_name: str, shuffled: bool) -> Split:
        """Reads a split prepared with tfds; ValueError unless it is the published one."""
        split = _tfds_copies.in_order_of_keys(rows, split_name, shuffled)
        return self._as_published(split, split_name)

    def _as_published(self, split: Split, split_name: str) -> Split:
        digest = hashlib.sha256(split.images.tobytes() + split.labels.tobytes()).hexdigest()
        if digest != self.contents_sha256[split_name]:
            raise ValueError(
                "it holds other images or labels than the published ones, or holds them in an "
                f"order that was not published (their sha256 is {digest}, that of the published "
                f"ones is {self.contents_sha256[split_name]})"
            )
        return split


FASHION_MNIST = IdxFiles(
    name="fashion_mnist",
    tfds_name="fashion_mnist",
    image_shape=(28, 28, 1),
    num_examples={"train": 60_000, "test": 10_000},
    file_names=(
        "train-images-idx3-ubyte.gz",
        "train-labels-idx1-ubyte.gz",
        "t10k-images-idx3-ubyte.gz",
        "t10k-labels-idx1-ubyte.gz",
    ),
    # tfds registers no checksums of the contents. These were computed from files that have the
    # registered checksums.
    contents_sha256={
        "train": "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
        "test": "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
    },
    # Appendix B.1 of the paper.
    trained_on="test",
    num_train=1_000,
    net="lenet",
    other_folders=(Path("/usr/share/datasets/fashion-mnist"),),
    advice=(f"`apt-get install {DEBIAN_PACKAGE}` on Debian or Ubuntu",),
)
"""FashionMNIST, split as in appendix B.1: 1,000 of the 10,000 original test images are trained on,
and all 60,000 original training images, in their order, are tested on."""
