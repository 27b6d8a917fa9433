"""A description of the machine, and its speed in matrix products."""

import json
import os
import platform
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from benchmarks.timing import alternate
from experiments import huge_pages


def describe() -> dict[str, Any]:
    """The machine and the versions, as JSON values."""
    return {
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "device": jax.devices()[0].device_kind,
        "backend": jax.default_backend(),
        "system": platform.system(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "huge_pages": huge_pages.are_requested(),
    }


def one_line() -> str:
    """The machine in one line, for tables."""
    facts = describe()
    device = "" if facts["backend"] == "cpu" else f", {facts['device']}"
    return (
        f"{facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB{device}, "
        f"Python {facts['python']}, jax {facts['jax']}"
    )


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def matmul_rate(
    dtype: Any = jnp.float32, sizes: tuple[int, ...] = (512, 1024, 2048), repeats: int = 9
) -> float:
    """Floating-point operations per second in square matrix products: the best size's median."""
    rates = []
    for size in sizes:
        matrix = jnp.ones((size, size), dtype)
        product = jax.jit(jnp.matmul)
        seconds = alternate({"product": lambda: product(matrix, matrix)}, repeats=repeats)  # noqa: B023
        rates.append(2 * size**3 / float(jnp.median(seconds["product"])))
    return max(rates)


def in_fresh_process(name: str, *arguments: Any, environment: dict[str, str] | None = None) -> Any:
    """Runs ``python -m benchmarks.NAME``; returns its last line of output, which is JSON.

    Args:
        name: the name of the benchmark.
        arguments: the arguments of the command line.
        environment: environment variables to add.

    Raises:
        RuntimeError: if the process fails; the error contains its output.
    """
    command = [sys.executable, "-m", f"benchmarks.{name}", *map(str, arguments)]
    ran = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | (environment or {}), check=False
    )
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr}")
    return json.loads(ran.stdout.splitlines()[-1])
