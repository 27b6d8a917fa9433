"""Reads copies of data sets that tensorflow-datasets (tfds) has prepared.

tfds stores the examples of a split in the order of a hash of their keys. In that order, a seed
would draw other images than from the original files. So the published order is restored, from the
hash or from the numbers stored with the examples.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.data._originals import DamagedDatasetError, Split, Splits

if TYPE_CHECKING:
    from experiments.data._published import Published

# The rows of a prepared data set: the features of each example by name.
Rows = Sequence[Mapping[str, Any]]


class NotHereError(Exception):
    """One place does not hold the data set; the text names the place and says what is missing."""


def read(original: "Published", data_dir: Path | None) -> tuple[Splits, str]:
    """Reads a prepared copy and checks it as far as possible.

    Args:
        original: the data set.
        data_dir: the folder of tfds; None means its default folder.

    Returns:
        The splits, and a text that says where they came from.

    Raises:
        NotHereError: if there is no prepared copy that can be read without TensorFlow.
        DamagedDatasetError: if the copy does not hold the published data.
    """
    builder = original.builder(data_dir)
    folder = builder.data_path
    data_sources = _data_sources(original, builder)
    splits = {}
    for name, data_source in data_sources.items():
        num_wanted = original.num_examples[name]
        num_registered = builder.info.splits[name].num_examples
        # A copy stored as parquet may return fewer rows than it claims to have, without an error.
        if not len(data_source) == num_registered == num_wanted:
            raise DamagedDatasetError(
                f"{folder} is damaged: split {name!r} gives {len(data_source):,} rows and says "
                f"that it has {num_registered:,}; {num_wanted:,} were published"
            )
        try:
            rows = data_source.__getitems__(range(len(data_source)))
            splits[name] = original.read_rows(rows, name, not builder.info.disable_shuffling)
        except (RuntimeError, OSError, ValueError, LookupError) as reason:
            raise DamagedDatasetError(f"{folder} is damaged: split {name!r}: {reason}") from reason
    return splits, f"prepared with tensorflow-datasets in {folder}"


def _data_sources(original: "Published", builder: Any) -> dict[str, Any]:
    """The rows of the wanted splits, by the names of the splits; nothing is read yet."""
    folder = builder.data_path
    if not (folder.exists() and builder.is_prepared()):
        raise NotHereError(f"{folder}: not prepared with tensorflow-datasets")
    missing = [name for name in original.num_examples if name not in builder.info.splits]
    if missing:
        raise NotHereError(f"{folder}: prepared without the split {', '.join(missing)}")
    try:
        return {name: builder.as_data_source(name) for name in original.num_examples}
    except NotImplementedError:
        raise NotHereError(
            f"{folder}: prepared as {builder.info.file_format.value}, which cannot be read without "
            "TensorFlow (file_format='array_record' can)"
        ) from None


def in_order_of_keys(rows: Rows, split_name: str, shuffled: bool) -> Split:
    """Puts rows whose keys were the examples' numbers back into the published order.

    Args:
        rows: all rows of the split, with features "image" and "label".
        split_name: name of the split, which is part of tfds's hash.
        shuffled: whether tfds stored them in the order of the hash of their keys.

    Returns:
        The split.
    """
    from tensorflow_datasets.core import hashing

    numbers = list(range(len(rows)))  # The published number of every row.
    if shuffled:
        numbers.sort(key=hashing.Hasher(split_name).hash_key)
    return _arrange(rows, numbers)


def in_order_of_ids(
    rows: Rows, split_name: str, *, image_shape: tuple[int, int, int], num_classes: int
) -> Split:
    """Puts rows with ids like "train_00042" back into the published order, and checks them.

    Unlike the original files, a prepared copy has no published checksum. The ids, the shape and the
    type (uint8) of every image, and the range of the labels are checked, but not whether pixels and
    labels are the published ones.

    Args:
        rows: all rows of the split, with features "id", "image" and "label".
        split_name: name of the split, with which every id begins.
        image_shape: the height, width and channels that every image must have.
        num_classes: number of different labels.

    Returns:
        The split.

    Raises:
        ValueError: if the ids do not number the rows, or if an image has a wrong shape or type, or
            a label is out of range.
    """
    numbers = [_number_of_id(row["id"], split_name) for row in rows]
    if sorted(numbers) != list(range(len(rows))):
        raise ValueError(
            f"its ids do not number the rows from 0 to {len(rows) - 1}, each once, so that the "
            "published order is unknown"
        )
    for row, number in zip(rows, numbers, strict=True):
        image, label = np.asarray(row["image"]), row["label"]
        if (image.shape, image.dtype) != (image_shape, np.uint8):
            raise ValueError(
                f"image {number} has shape {image.shape} and type {image.dtype}, expected "
                f"{image_shape} and uint8"
            )
        if label not in range(num_classes):
            raise ValueError(f"label {number} is {label}, expected 0 to {num_classes - 1}")
    return _arrange(rows, numbers)


def _number_of_id(row_id: object, split_name: str) -> int:
    """The number in an id like b"train_00042"; rows stored without ids give None for it."""
    text = row_id.decode(errors="replace") if isinstance(row_id, bytes) else str(row_id)
    match = re.fullmatch(rf"{re.escape(split_name)}_([0-9]+)", text)
    if match is None:
        raise ValueError(
            f"a row has the id {text!r}, expected one like '{split_name}_00042', so that the "
            "published order is unknown"
        )
    return int(match[1])


def _arrange(rows: Rows, numbers: Sequence[int]) -> Split:
    """The split whose example number `numbers[i]` is row i."""
    rows_in_order = [rows[position] for position in np.argsort(numbers)]
    return Split(
        images=np.stack([row["image"] for row in rows_in_order]),
        labels=np.stack([row["label"] for row in rows_in_order]).astype(np.uint8),
    )
