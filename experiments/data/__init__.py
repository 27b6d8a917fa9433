"""The room of data sets: images and labels as arrays in the computer's memory, every byte checked.

Begin at `load`. What is drawn from a data set depends on its name and a seed only, never on where
its bytes came from.
"""

from experiments.data._originals import DamagedDatasetError, DatasetNotFoundError
from experiments.data.datasets import (
    DATASETS,
    MAX_SEED,
    SIZES,
    Dataset,
    Examples,
    load,
    load_cifar10,
    load_digits,
    load_fashion_mnist,
    load_svhn,
    subset,
)

__all__ = [
    "DATASETS",
    "MAX_SEED",
    "SIZES",
    "DamagedDatasetError",
    "Dataset",
    "DatasetNotFoundError",
    "Examples",
    "load",
    "load_cifar10",
    "load_digits",
    "load_fashion_mnist",
    "load_svhn",
    "subset",
]
