"""Counts what is compiled, and what stays behind: arrays, programs, memory."""

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
    """Collects one entry for each program that is compiled inside the block."""
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
    """The memory of all arrays that anything still holds."""
    gc.collect()
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def trim() -> None:
    """Frees what nothing holds; what the allocator kept of it for later goes back to the system.

    Without this, the memory of a process says where the allocator found room, not what is in use.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def resources() -> tuple[int, int]:
    """Memory of this process in MiB, and how many maps it has: every program takes some."""
    trim()
    process = psutil.Process()
    return process.memory_info().rss >> 20, len(process.memory_maps(grouped=False))


def growth(call: Callable[[int], object], times: int = 100) -> tuple[int, int]:
    """How much memory (MiB) and how many maps ``call(0), call(1), ...`` add from the tenth on."""
    for i in range(10):
        jax.block_until_ready(call(i))
    memory, maps = resources()
    for i in range(10, times):
        jax.block_until_ready(call(i))
    more_memory, more_maps = resources()
    return more_memory - memory, more_maps - maps


def assert_arrays_go(call: Callable[[int], object], size: int) -> None:
    """Of calls with fresh arrays of `size` bytes, ``call(0), call(1), ...``, none stays behind."""
    call(0)
    before = live_bytes()
    for i in range(1, 4):
        call(i)
    assert live_bytes() - before < size / 2


def assert_nothing_stays(call: Callable[[int], object]) -> None:
    """A hundred calls end with the memory and the maps of ten."""
    memory, maps = growth(call)
    assert memory < 60, "MiB that are never freed"
    assert maps < 100, "memory maps that are never freed"
