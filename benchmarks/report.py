"""The output of a benchmark: a table on the screen, result.json, and a picture."""

import dataclasses
import datetime
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks import machine
from experiments import figures, styles, tables
from experiments.training import runs


class Headline(NamedTuple):
    """One figure of a benchmark against its target."""

    benchmark: str
    figure: str
    measured: str
    target: str
    met: bool


@dataclasses.dataclass(frozen=True)
class Config:
    """The options of every benchmark.

    Attributes:
        repeats: The number of rounds that count; medians are over them.
        quick: Whether sizes are tiny, to see that it runs.
        out: The folder of the results, which must be new; None stands for one named after the
            benchmark.
    """

    repeats: int = 15
    quick: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self):
        # Checked before anything is measured, since `publish` would raise only after minutes.
        if self.out is not None and self.out.exists():
            raise FileExistsError(
                f"{self.out} exists already, and results are never overwritten: "
                "choose another --out."
            )


def publish(
    name: str,
    config: Config,
    rows: Sequence[dict[str, Any]],
    headlines: Sequence[Headline],
    draw: Callable[[Any], None],
    **details: Any,
) -> pathlib.Path:
    """Prints rows and headlines, writes result.json and NAME.png into a new folder.

    Args:
        name: the name of the benchmark.
        config: its configuration.
        rows: the table; the first row names the columns. Lists (raw samples) go to the file only.
        headlines: figures and their targets.
        draw: a function that draws into matplotlib axes.
        **details: further entries of the file, as JSON values.

    Returns:
        The folder.

    Raises:
        FileExistsError: if the folder exists.
    """
    folder = config.out or runs.default_folder(f"benchmarks/{name}")
    runs.create(folder)
    record = {
        "benchmark": name,
        "date": datetime.date.today().isoformat(),
        "machine": machine.describe(),
        "config": {**dataclasses.asdict(config), "out": None},
        "headlines": [headline._asdict() for headline in headlines],
        "rows": list(rows),
        **details,
    }
    (folder / "result.json").write_text(json.dumps(record, indent=1, default=float) + "\n")
    _save_plot(folder / f"{name}.png", draw)
    print(f"\n{name} ({machine.one_line()})\n")
    print(table([{k: v for k, v in row.items() if not isinstance(v, list)} for row in rows]))
    print(f"\n{headline_table(headlines)}" if headlines else "")
    print(f"\n{folder}: result.json, {name}.png")
    return folder


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as an aligned Markdown table."""
    if not rows:
        return "Nothing was measured."
    columns = list(rows[0])
    cells = [[_text(row[column]) for column in columns] for row in rows]
    return tables.markdown_table(columns, cells, padded=True)


def headline_table(headlines: Sequence[Headline]) -> str:
    """Headlines as a table."""
    rows = [
        {**headline._asdict(), "met": "yes" if headline.met else "no"} for headline in headlines
    ]
    return table(rows)


def duration(seconds: float) -> str:
    """A duration as text, in a suitable unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s"


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _save_plot(path: pathlib.Path, draw: Callable[[Any], None]) -> None:
    import matplotlib

    matplotlib.use("Agg")  # This backend needs no display.
    import matplotlib.pyplot as plt

    with matplotlib.rc_context(styles.RC):
        figure, axes = plt.subplots(figsize=(styles.WIDTH, 4.8), layout="constrained")
        draw(axes)
    figures.save(figure, path)
