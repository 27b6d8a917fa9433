"""The room of data sets: images and labels as arrays in the computer's memory, every byte checked.

Begin at `load`. What is drawn from a data set depends on its name and a seed only, never on where
its bytes came from.

    datasets        the data sets by name, loading and drawing
    svhn, cifar10,  one data set each, as a value: what it is, and how its files are read
    fashion_mnist
    npz             data sets of the user's own
"""

from experiments.data._draws import MAX_SEED
from experiments.data._originals import (
    DamagedDatasetError,
    Dataset,
    DatasetNotFoundError,
    Examples,
    Original,
)
from experiments.data.datasets import DATASETS, find, is_file, load, subset

__all__ = [
    "DATASETS",
    "MAX_SEED",
    "DamagedDatasetError",
    "Dataset",
    "DatasetNotFoundError",
    "Examples",
    "Original",
    "find",
    "is_file",
    "load",
    "subset",
]
