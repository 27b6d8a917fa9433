"""Fixtures that several files of tests of the experiments use."""

import pytest

from tests.experiments.data.fashion_files import TinyFashion, make_tiny_fashion
from tests.experiments.data.source_files import NO_SERVER


@pytest.fixture(scope="module")
def tiny() -> TinyFashion:
    """A FashionMNIST of a few images, which no server has."""
    return make_tiny_fashion(NO_SERVER)


@pytest.fixture
def no_proxy(monkeypatch):
    """Lets downloads from this machine pass by the proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
