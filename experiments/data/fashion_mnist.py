"""FashionMNIST: what was published, and how its four IDX files are read and checked."""

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.data import _idx, _places, _tfds_copies
from experiments.data._originals import Original, Rows, Split, Splits, registered_files

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
DEBIAN_PACKAGE = "dataset-fashion-mnist"


class PublishedSplit(NamedTuple):
    """What one split of FashionMNIST has to be.

    Attributes:
        images: the file of images, of shape (N, H, W).
        labels: the file of labels, of shape (N,).
        sha256: checksum, in hexadecimal digits, of all pixels and then all labels as bytes, in the
            published order; for copies that no longer consist of the published files.
    """

    images: _idx.IdxFile
    labels: _idx.IdxFile
    sha256: str


# Keyed by tfds's names of the splits, "train" and "test".
Published = Mapping[str, PublishedSplit]


def published_files() -> dict[str, PublishedSplit]:
    """Returns what was published, with the addresses, sizes and checksums that tfds registers."""
    registered = registered_files("fashion_mnist")

    def file(name: str, modified: int, shape: tuple[int, ...]) -> _idx.IdxFile:
        return _idx.IdxFile(**dataclasses.asdict(registered[name]), modified=modified, shape=shape)

    # tfds does not register the times in the gzip headers and the checksums of the contents;
    # both are properties of the files that have the registered checksums.
    return {
        "train": PublishedSplit(
            file("train-images-idx3-ubyte.gz", 1504176606, (60000, 28, 28)),
            file("train-labels-idx1-ubyte.gz", 1504176606, (60000,)),
            "16d82e2b505296aa2b78bd5ea0992634f30419a4c97def7c907d154a35ac6157",
        ),
        "test": PublishedSplit(
            file("t10k-images-idx3-ubyte.gz", 1504176627, (10000, 28, 28)),
            file("t10k-labels-idx1-ubyte.gz", 1504176627, (10000,)),
            "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4",
        ),
    }


def read(
    published: Published,
    *,
    data_dir: Path | None = None,
    download: bool = True,
    debian_folder: Path = DEBIAN_FOLDER,
) -> tuple[Splits, str]:
    """Reads the original splits from the first of `sources.read`'s places that holds them.

    Args:
        published: what the splits have to be, usually `published_files()`.
        data_dir: folder to look in and to download into; None means tfds's default folder.
        download: whether the network may be used.
        debian_folder: where Debian's package puts the original files.

    Returns:
        The splits, whose images have shape [N, 28, 28, 1], and where they came from in words.

    Raises:
        DatasetNotFoundError: if no place holds them and they cannot be downloaded.
        DamagedDatasetError: if the first place that holds them does not hold what was published.
    """
    original = Original(
        name="fashion_mnist",
        tfds_name="fashion_mnist",
        files=[file for split in published.values() for file in (split.images, split.labels)],
        num_examples={name: split.labels.shape[0] for name, split in published.items()},
        read_files=functools.partial(_read_files, published),
        read_rows=functools.partial(_read_rows, published),
        other_folders=[debian_folder],
        advice=[f"`apt-get install {DEBIAN_PACKAGE}` on Debian or Ubuntu"],
    )
    return _places.read(original, data_dir=data_dir, download=download)


def _read_files(published: Published, paths: Mapping[str, Path]) -> Splits:
    """Reads and checks the four original files; `paths` is keyed by their published names."""
    return {
        name: Split(
            images=_idx.read(paths[split.images.name], split.images)[..., np.newaxis],
            labels=_idx.read(paths[split.labels.name], split.labels),
        )
        for name, split in published.items()
    }


def _read_rows(published: Published, rows: Rows, split_name: str, shuffled: bool) -> Split:
    """Reads a split prepared with tfds; ValueError unless it is the published one in its order."""
    split = _tfds_copies.in_order_of_keys(rows, split_name, shuffled)
    digest = hashlib.sha256(split.images.tobytes() + split.labels.tobytes())
    if digest.hexdigest() != published[split_name].sha256:
        raise ValueError(
            "it holds other images or labels than the published ones, or holds them in an order "
            "that tensorflow-datasets does not give them"
        )
    return split
