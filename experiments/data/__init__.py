"""Data sets: images and labels as arrays in the computer's memory, with every byte checked.

Start with `load`. The examples drawn from a data set depend on its name and a seed only, never on
the place that its bytes came from.

    datasets        the data sets by name, loading and drawing
    svhn, cifar10,  one data set each, as a value: its description, and how its files are read
    fashion_mnist
    npz             the user's own data sets
"""

from experiments.data._draws import MAX_SEED
from experiments.data._originals import (
    DamagedDatasetError,
    Dataset,
    DatasetNotFoundError,
    Examples,
    Original,
)
from experiments.data.datasets import (
    DATASETS,
    Part,
    find,
    is_file,
    load,
    side_by_side,
    subset,
    with_wrong_labels,
)

__all__ = [
    "DATASETS",
    "MAX_SEED",
    "DamagedDatasetError",
    "Dataset",
    "DatasetNotFoundError",
    "Examples",
    "Original",
    "Part",
    "find",
    "is_file",
    "load",
    "side_by_side",
    "subset",
    "with_wrong_labels",
]
