"""FashionMNIST for tests that need the real images."""

import pytest

from experiments import data


def fashion_mnist_or_skip() -> data.Dataset:
    """FashionMNIST, if this machine has it; otherwise the test is skipped."""
    try:
        return data.load("fashion_mnist", seed=0, download=False)
    except data.DatasetNotFoundError as error:
        pytest.skip(f"the test needs the real images: {error}")
