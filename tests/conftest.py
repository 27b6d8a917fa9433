"""The settings of every test: 8 CPU devices, no implicit rank promotion, checked annotations.

Most of the suite's time is XLA's compiling, of programs that run for milliseconds. XLA is asked for
little effort: it takes half the time, and the last bits differ, as it joins no product with a sum.
So tests of exact bits have the mark `optimized`: they are compiled as users' programs are, like the
few that compute for seconds or whose trained numbers meet recorded ones.
`JAX_DISABLE_MOST_OPTIMIZATIONS=0 make test` compiles everything like that.
"""

import os
import pathlib

os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jaxtyping
import pytest

from tests.support.effort import QUICKLY

LITTLE_EFFORT = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"

# XLA reads these when it starts: several devices on one machine, for the tests of sharding.
FLAGS = "--xla_force_host_platform_device_count=8"
if LITTLE_EFFORT:
    FLAGS += f" {QUICKLY}"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"

# Shapes and types of the library's annotations are checked at run time, in the tests only.
jaxtyping.install_import_hook("msgd_jax", "beartype.beartype")

# These files are for the type checker alone.
collect_ignore = ["clients"]

jax.config.update("jax_numpy_rank_promotion", "raise")
# The checker is off: on explicit meshes and streamed data, jax 0.9 takes the second step with a
# key for a reuse of the key.
jax.config.update("jax_debug_key_reuse", False)


SLOW_CASES = pathlib.Path(__file__).parent / "slow_cases.txt"
COLLECTED = pytest.StashKey[dict[str, bool]]()


def is_optimized(item: pytest.Item) -> bool:
    return item.get_closest_marker("optimized") is not None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Sets XLA's effort for this process and those that it starts."""
    little = LITTLE_EFFORT and not is_optimized(item)
    if little != (os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0"):
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1" if little else "0"
        jax.config.update("jax_disable_most_optimizations", little)
        jax.clear_caches()


def pytest_collection_modifyitems(config, items):
    """Marks the cases in `slow_cases.txt` as slow; other cases of these tests always run."""
    # The optimized tests come first, so that XLA's effort changes once.
    items.sort(key=lambda item: not is_optimized(item))
    listed = set(SLOW_CASES.read_text().splitlines())
    for item in items:
        if item.nodeid in listed:
            item.add_marker(pytest.mark.slow)
    # `test_slow_cases.py` compares this with the file. Here -m and -k have left out nothing yet.
    config.stash[COLLECTED] = {
        item.nodeid: item.get_closest_marker("slow") is not None for item in items
    }


@pytest.fixture
def collected(request):
    """Maps the id of each case to whether it is slow.

    A test that needs this is skipped if only parts of files were collected.
    """
    parts = any("::" in argument for argument in request.config.args)
    if parts or request.config.getoption("lf", False):
        pytest.skip("only parts of files were collected")
    return request.config.stash[COLLECTED]


@pytest.fixture
def strict_dtypes():
    """Forbids implicit promotion of dtypes, on which optax's Adam relies."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def x64():
    """Switches double precision on, for comparisons with float64 references."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_key_reuse():
    """Switches off the checker of reused keys, which takes uses of other libraries for reuses."""
    with jax.debug_key_reuse(False):
        yield


@pytest.fixture
def user_errors():
    """Switches off the checks of annotations, so that a test sees the errors that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
