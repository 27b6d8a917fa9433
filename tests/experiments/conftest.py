"""Fixtures that several files use."""

import pytest

from tests.experiments.fashion_files import TinyFashion, make_tiny_fashion


@pytest.fixture(scope="module")
def tiny() -> TinyFashion:
    # Port 9 of this machine: nothing listens there, so that asking it fails at once.
    return make_tiny_fashion("http://127.0.0.1:9/")


@pytest.fixture
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
