"""One setting for every test: 8 CPU devices, no silent broadcasting, checked key reuse."""

import os
import pathlib

# Before jax starts: several devices on one machine, for the tests of sharding.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest

# Shapes and types of the library's annotations are checked at run time, in the tests only.
jaxtyping.install_import_hook("msgd_jax", "beartype.beartype")

# Files for the type checker.
collect_ignore = ["clients"]

jax.config.update("jax_numpy_rank_promotion", "raise")
# jax 0.9 takes the second step with a key for its reuse where meshes are explicit or data streamed.
jax.config.update("jax_debug_key_reuse", False)


SLOW_CASES = pathlib.Path(__file__).parent / "slow_cases.txt"
COLLECTED = pytest.StashKey[dict[str, bool]]()


def pytest_collection_modifyitems(config, items):
    """Marks as slow what `slow_cases.txt` lists: cases of tests of which others always run."""
    listed = set(SLOW_CASES.read_text().splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    # Before -m and -k leave some out; `test_slow_cases.py` compares it with the file.
    config.stash[COLLECTED] = {
        item.nodeid: item.get_closest_marker("slow") is not None for item in items
    }


@pytest.fixture
def collected(request):
    """By the id of each case of every file that was collected as a whole: whether it is slow."""
    parts = any("::" in argument for argument in request.config.args)
    if parts or request.config.getoption("lf", False):
        pytest.skip("only parts of files were collected")
    return request.config.stash[COLLECTED]


@pytest.fixture
def strict_dtypes():
    """No implicit promotion. (Not for every test: optax's Adam relies on it.)"""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """Double precision, for comparisons with float64 references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_key_reuse():
    """For other libraries that trip the checker."""
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture
def user_errors():
    """Users do not run the annotations' checks: what they see is the library's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
