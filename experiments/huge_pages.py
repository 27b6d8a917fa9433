"""Memory in pages of 2 MiB instead of 4 KiB, which Linux gives to programs that ask for them.

jax returns the memory of a program to the system when the program ends, so every training step on
a CPU begins with fresh pages, and each of them is cleared when it is first touched. For a ResNet-18
of width 64 these are 100,000 pages per step, and a quarter of its time. With huge pages there are a
few hundred.
"""

import contextlib
import os
import pathlib
import sys
from collections.abc import Iterator

VARIABLE, SETTING = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_SYSTEM = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def restart() -> None:
    """Starts this Python again with huge pages, if it lacks them and the system has them.

    The C library reads its settings when a program starts. Nothing else changes: the process keeps
    its number and its arguments. A user's own setting of malloc is left alone.
    """
    if are_available() and VARIABLE not in os.environ:
        os.environ[VARIABLE] = SETTING
        os.execv(sys.executable, sys.orig_argv)


def are_available() -> bool:
    """Whether the system has huge pages on request, and a C library that can ask for them."""
    try:
        library = os.confstr("CS_GNU_LIBC_VERSION") or ""
        return library.startswith("glibc") and "[madvise]" in _SYSTEM.read_text()
    except (AttributeError, ValueError, OSError):  # Other systems and C libraries.
        return False


def are_requested() -> bool:
    """Whether the system has them, and this process was started with a request for them."""
    return are_available() and SETTING in os.environ.get(VARIABLE, "")


@contextlib.contextmanager
def requested() -> Iterator[None]:
    """Processes that are started meanwhile ask for huge pages."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = SETTING if before is None else f"{before}:{SETTING}"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
