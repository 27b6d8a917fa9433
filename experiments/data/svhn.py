"""SVHN, the cropped digits: what was published, and how its MATLAB files are read and checked."""

import dataclasses
import functools
import io
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments.data import _places, _tfds_copies
from experiments.data._originals import (
    IMAGE_SHAPE,
    DamagedDatasetError,
    Original,
    PublishedFile,
    Split,
    Splits,
    read_bytes,
    registered_files,
)

NUM_TRAIN = 25_000  # images that are trained on: appendix B.2 of the paper
_LABEL_OF_DIGIT_0 = 10


@dataclasses.dataclass(frozen=True)
class MatFile(PublishedFile):
    """What one published file has to be.

    Attributes:
        num_examples: number of images, and of labels, that it holds.
    """

    num_examples: int


# Keyed by tfds's names of the splits, "train" and "test".
Published = Mapping[str, MatFile]


def published_files() -> dict[str, MatFile]:
    """Returns what was published, with the addresses, sizes and checksums that tfds registers.

    The third file, extra_32x32.mat, is not used here and never fetched.
    """
    registered = registered_files("svhn_cropped")

    def file(name: str, num_examples: int) -> MatFile:
        return MatFile(**dataclasses.asdict(registered[name]), num_examples=num_examples)

    return {"train": file("train_32x32.mat", 73_257), "test": file("test_32x32.mat", 26_032)}


def read(
    published: Published, *, data_dir: Path | None = None, download: bool = True
) -> tuple[Splits, str]:
    """Reads the original splits from the first of `sources.read`'s places that holds them.

    Args:
        published: what the splits have to be, usually `published_files()`.
        data_dir: folder to look in and to download into; None means tfds's default folder.
        download: whether the network may be used.

    Returns:
        The splits, whose images have shape [N, 32, 32, 3], and where they came from in words.
        Of a copy prepared with tfds less is checked: see `prepared.in_order_of_ids`.

    Raises:
        DatasetNotFoundError: if no place holds them and they cannot be downloaded.
        DamagedDatasetError: if the first place that holds them does not hold what was published.
    """
    original = Original(
        name="svhn",
        tfds_name="svhn_cropped",
        files=list(published.values()),
        num_examples={name: file.num_examples for name, file in published.items()},
        read_files=functools.partial(_read_files, published),
        read_rows=_tfds_copies.in_order_of_ids,
    )
    return _places.read(original, data_dir=data_dir, download=download)


def _read_files(published: Published, paths: Mapping[str, Path]) -> Splits:
    """Reads and checks both original files; `paths` is keyed by their published names."""
    splits = {}
    for split_name, file in published.items():
        path = paths[file.name]
        # Checked before it is parsed, since the parser is not made for files from anywhere.
        content = read_bytes(path, file)
        try:
            splits[split_name] = parse(content, file.num_examples)
        except ValueError as reason:
            raise DamagedDatasetError(f"{path} is damaged: {reason}") from reason
    return splits


def parse(content: bytes, num_examples: int) -> Split:
    """Parses a MATLAB file (version 5) with images X and labels y, in which 10 is the digit 0.

    Args:
        content: the whole file.
        num_examples: the number of images that it has to hold.

    Returns:
        The split; images have shape [N, 32, 32, 3].

    Raises:
        ValueError: if it is no such file, or holds something else.
    """
    variables = _variables(content)
    expected_shapes = {"X": (*IMAGE_SHAPE, num_examples), "y": (num_examples, 1)}
    for name, expected in expected_shapes.items():
        if name not in variables:
            raise ValueError(f"it holds no array {name!r}")
        if variables[name].shape != expected:
            raise ValueError(f"{name} has shape {variables[name].shape}, expected {expected}")
    images, labels = variables["X"], variables["y"][:, 0]
    if images.dtype != np.uint8 or labels.dtype.kind not in "iuf":
        raise ValueError(
            f"X and y hold values of types {images.dtype} and {labels.dtype}, expected uint8 and "
            "numbers"
        )
    wrong_labels = labels[~np.isin(labels, np.arange(1, _LABEL_OF_DIGIT_0 + 1))]
    if len(wrong_labels):
        raise ValueError(f"y holds the label {wrong_labels[0]}, expected 1 to {_LABEL_OF_DIGIT_0}")
    return Split(
        # MATLAB counts examples with the last axis; the copy puts every image in one piece.
        images=np.ascontiguousarray(np.moveaxis(images, -1, 0)),
        labels=(labels % _LABEL_OF_DIGIT_0).astype(np.uint8),
    )


def _variables(content: bytes) -> dict[str, np.ndarray]:
    """The arrays X and y of a MATLAB file, as far as it holds them."""
    import scipy.io
    from scipy.io.matlab import MatReadError

    try:
        variables = scipy.io.loadmat(io.BytesIO(content), variable_names=("X", "y"))
    except (MatReadError, NotImplementedError, OSError, TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"it is no MATLAB file of version 5: {error}") from error
    arrays = {name: variables.get(name) for name in ("X", "y")}
    return {name: array for name, array in arrays.items() if isinstance(array, np.ndarray)}
