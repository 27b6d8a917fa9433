"""Counts what is compiled, and what is never freed: arrays, programs, memory."""

import contextlib
import ctypes
import gc
from collections.abc import Callable, Iterator

import jax
import jax.monitoring
import psutil

_COMPILED = "/jax/core/compile/backend_compile_duration"


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collects one entry per program that is compiled inside the block."""
    seen: list[str] = []

    def listen(event: str, duration: float, **details: object) -> None:
        if event == _COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def live_bytes() -> int:
    """The memory, in bytes, of all arrays that are still held."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def trim() -> None:
    """Frees what nothing holds, and gives back to the system what the allocator keeps of it.

    Without this, the memory of the process would include freed memory that the allocator keeps.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # Only glibc has this function.
        ctypes.CDLL(None).malloc_trim(0)


def resources() -> tuple[int, int]:
    """The memory of this process in MiB, and the number of its memory maps, which programs take."""
    trim()
    process = psutil.Process()
    return process.memory_info().rss >> 20, len(process.memory_maps(grouped=False))


def growth(call: Callable[[int], object], times: int = 100) -> tuple[int, int]:
    """The memory in MiB and the number of maps that the calls after the first ten add.

    The first ten of ``call(0), call(1), ...`` fill caches and pools, which may stay.
    """
    for i in range(10):
        jax.block_until_ready(call(i))
    memory, maps = resources()
    for i in range(10, times):
        jax.block_until_ready(call(i))
    more_memory, more_maps = resources()
    return more_memory - memory, more_maps - maps


def assert_arrays_go(call: Callable[[int], object], size: int) -> None:
    """Asserts that calls which make fresh arrays of `size` bytes leave none of them behind.

    Three calls after the first may add half of one array, for results that are still held.
    """
    call(0)
    before = live_bytes()
    for i in range(1, 4):
        call(i)
    assert live_bytes() - before < size / 2


def assert_nothing_stays(call: Callable[[int], object]) -> None:
    """Asserts that ninety calls after the first ten keep neither memory nor memory maps.

    Ninety programs of one operation each, when they are kept, take 139 MiB and 809 maps. The bounds
    leave room for what allocators and other threads do.
    """
    memory, maps = growth(call)
    assert memory < 60, "MiB that are never freed"
    assert maps < 100, "memory maps that are never freed"
