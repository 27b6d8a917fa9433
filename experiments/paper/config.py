"""The options of figures, lists and reports, as dataclasses that are also the command line."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from experiments import data
from experiments.paper.panels import Scale

PanelName = Literal[
    "1a",
    "1b",
    "1c",
    "1d",
    "1e",
    "1f",
    "2a",
    "2b",
    "3a",
    "3b",
    "1a-converged",
    "1b-converged",
    "large-batch",
]


@dataclasses.dataclass(frozen=True)
class FigureConfig:
    """Draws a panel of the paper's figures: makes the missing runs, and reuses the others.

    Every run has its own folder under `runs`, named after its settings, and is continued if it was
    stopped. Writes a picture, a table as CSV, and a page into `out`.

    Attributes:
        panel: The panel; those with a word in their name are not in the paper.
        scale: "paper" is the panel in full; "large" is what a graphics card computes in minutes,
            and "medium" what two cores compute in up to three hours, both chosen to show what the
            panel shows; "small" shows that it can be made.
        dataset: A file FILE.npz, as for `train`, with images to use in place of the panel's data
            set, and split as that is: for SVHN, x_test is trained on. None stands for the data set.
            If the file is not there, finished runs of a file of this name are drawn.
        seeds: The number of runs of each algorithm; None stands for the panel's own.
        seeds_at_once: The number of runs side by side in one process, as memory allows; None stands
            for 5, or, at the scale for a graphics card, for all.
        runs: The folder of the runs.
        data_dir: The folder in which data sets are looked for, and to which they are downloaded.
        out: The folder of the figure, whose earlier version is replaced; None stands for
            runs/figure-PANEL.
    """

    panel: Annotated[PanelName, tyro.conf.Positional]
    scale: Scale = "paper"
    dataset: pathlib.Path | None = None
    seeds: int | None = None
    seeds_at_once: int | None = None
    runs: pathlib.Path = pathlib.Path("runs")
    data_dir: pathlib.Path | None = None
    out: pathlib.Path | None = None

    def __post_init__(self):
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, or None, got {self.seeds}.")
        if self.dataset is not None and not data.is_file(self.dataset.name):
            raise ValueError(f"dataset must be a file FILE.npz, or None, got {self.dataset}.")
        if self.seeds_at_once is not None and self.seeds_at_once < 1:
            raise ValueError(
                f"seeds_at_once must be at least 1, or None, got {self.seeds_at_once}."
            )


@dataclasses.dataclass(frozen=True)
class ListConfig:
    """Lists the runs below a folder: their state, how far they are, and their accuracies.

    Attributes:
        runs: The folder of the runs.
    """

    runs: pathlib.Path = pathlib.Path("runs")


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Draws the finished runs below a folder on one page, in Markdown and in HTML.

    Runs that differ in nothing but algorithm and noise stand together.

    Attributes:
        runs: The folder of the runs.
        out: The folder of the page, whose earlier version is replaced; None stands for the folder
            report in `runs`.
    """

    runs: pathlib.Path = pathlib.Path("runs")
    out: pathlib.Path | None = None
