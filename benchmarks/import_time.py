"""The time to import the library beyond that of `import jax, optax, chex`, in fresh interpreters.

``python -m benchmarks.import_time``. `import msgd_jax` alone imports nothing else: its modules are
imported when they are first used. So two cases are measured: the modules that training needs, on
which the target is, and every module.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from benchmarks import report, timing

OURS, EVERY, REFERENCE = "noise, train", "every module of msgd_jax", "jax, optax, chex"
IMPORTS = {
    REFERENCE: "import jax, optax, chex",
    OURS: "import jax, optax, chex; from msgd_jax import noise, train",
    EVERY: "import jax, optax, chex; from msgd_jax import *",
}


@dataclasses.dataclass(frozen=True)
class Config(report.Config):
    """Measures the import time beyond that of the libraries that are imported anyway."""

    repeats: int = 15


def main(config: Config) -> list[report.Headline]:
    """Measures, prints, writes; returns the headline."""
    if config.quick:
        config = dataclasses.replace(config, repeats=2)
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    packages = {}
    rounds = tqdm(range(config.repeats + 1), desc="import_time", unit="round", leave=False)
    with tempfile.TemporaryDirectory() as cache:
        environment = _with_bytecode(cache)
        for round_ in rounds:
            for name in list(IMPORTS) if round_ % 2 else list(IMPORTS)[::-1]:
                elapsed, packages[name] = _import(IMPORTS[name], environment)
                if round_:  # The first round fills the caches of bytecode and files.
                    seconds[name].append(elapsed)
    more = timing.spread(1e3 * (np.array(seconds[OURS]) - np.array(seconds[REFERENCE])))
    rows = [_row(name, seconds[name], packages[name]) for name in IMPORTS]
    headline = report.Headline(
        "import_time",
        f"from msgd_jax import {OURS}, more than import {REFERENCE}",
        f"{more.median:.0f} ms (quartiles {more.low:.0f} to {more.high:.0f})",
        "<= 50 ms",
        more.median <= 50,
    )
    added = sorted(set(packages[EVERY]) - set(packages[REFERENCE]))
    report.publish(
        "import_time",
        config,
        rows,
        [headline],
        functools.partial(_plot, seconds),
        seconds=seconds,
        packages_added=added,
    )
    print(f"Packages that only import msgd_jax pulls in: {', '.join(added)}.")
    return [headline]


def _with_bytecode(cache: str) -> dict[str, str]:
    """This environment, with bytecode written to `cache` even if the environment forbids writing.

    Otherwise the modules of a checkout would be compiled at every import, unlike those of installed
    libraries.
    """
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": cache}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    return environment


def _import(statement: str, environment: dict[str, str]) -> tuple[float, list[str]]:
    """The seconds of an import statement in a fresh interpreter, and the packages it imported."""
    script = (
        "import sys, time, json\n"
        "start = time.perf_counter()\n"
        f"{statement}\n"
        "elapsed = time.perf_counter() - start\n"
        "packages = {name.split('.')[0] for name in sys.modules}\n"
        "print(json.dumps([elapsed, sorted(packages - set(sys.stdlib_module_names))]))\n"
    )
    command = [sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    elapsed, packages = json.loads(ran.stdout)
    return elapsed, packages


def _row(name: str, seconds: list[float], packages: list[str]) -> dict[str, Any]:
    time = timing.spread(seconds)
    return {
        "import": name,
        "ms": f"{1e3 * time.median:.0f}",
        "quartiles": f"{1e3 * time.low:.0f} to {1e3 * time.high:.0f}",
        "packages": len(packages),
    }


def _plot(seconds: dict[str, list[float]], axes: Any) -> None:
    milliseconds = [[1e3 * value for value in values] for values in seconds.values()]
    axes.boxplot(milliseconds, tick_labels=list(seconds))
    axes.set_ylim(bottom=0)
    axes.set_ylabel("ms")
    axes.set_title("Import time in a fresh interpreter", fontsize=11)


if __name__ == "__main__":
    main(tyro.cli(Config))
