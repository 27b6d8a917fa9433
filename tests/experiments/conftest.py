"""Fixtures that several files use."""

import pytest

from tests.experiments.data.fashion_files import TinyFashion, make_tiny_fashion
from tests.experiments.data.source_files import NO_SERVER


@pytest.fixture(scope="module")
def tiny() -> TinyFashion:
    return make_tiny_fashion(NO_SERVER)


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
