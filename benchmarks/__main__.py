"""All benchmarks, one after the other: ``python -m benchmarks``, or ``make benchmark``."""

import dataclasses
import importlib
import json
import pathlib
import time

import tyro

from benchmarks import machine, report
from experiments.training import runs

NAMES = (
    "against_torch",
    "step_overhead",
    "many_draws",
    "measuring",
    "regularizer",
    "memory",
    "import_time",
    "index_sampling",
    "streaming",
    "weak_scaling",
    "noise_generation",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Runs all benchmarks; writes summary.md and summary.json beside their folders.

    Attributes:
        only: The benchmarks to run; all of them by default.
        quick: Whether sizes are tiny, to see that everything runs.
        out: The folder of the results, which must be new; None stands for
            runs/benchmarks-DATE-TIME.
    """

    only: tuple[str, ...] = NAMES
    quick: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self):
        unknown = sorted(set(self.only) - set(NAMES))
        if unknown:
            raise ValueError(f"only must name benchmarks among {NAMES}, got {unknown}.")


def main(config: Config) -> pathlib.Path:
    """Runs the benchmarks; returns the folder of the results."""
    folder = config.out or runs.default_folder("benchmarks")
    runs.create(folder)
    start = time.perf_counter()
    headlines: list[report.Headline] = []
    text = ""
    for name in config.only:
        module = importlib.import_module(f"benchmarks.{name}")
        headlines += module.main(module.Config(quick=config.quick, out=folder / name))
        # Written after each one, so that a benchmark that fails does not lose earlier results.
        text = _summarise(folder, headlines, (time.perf_counter() - start) / 60)
    print(f"\n{text}\n{folder / 'summary.md'}")
    return folder


def _summarise(folder: pathlib.Path, headlines: list[report.Headline], minutes: float) -> str:
    """Writes summary.md and summary.json; returns the text."""
    table = report.headline_table(headlines) if headlines else "nothing was measured"
    text = f"{table}\n\n{machine.one_line()}; {minutes:.1f} minutes in all.\n"
    (folder / "summary.md").write_text(text)
    record = {
        "machine": machine.describe(),
        "minutes": minutes,
        "headlines": [headline._asdict() for headline in headlines],
    }
    (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n")
    return text


if __name__ == "__main__":
    main(tyro.cli(Config))
