"""The options of figures, lists and reports, as dataclasses that are also the command line."""

import dataclasses
import pathlib
from typing import Annotated, Literal

import tyro

from experiments import data
from experiments.paper.panels import Scale
from experiments.training import AlgorithmName, NoiseSettings, TrainConfig

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
class DemoConfig:
    """Trains a small convolutional net on real digits with six algorithms, several seeds each.

    Prints a table, and writes curves.png: test accuracy against iteration.

    Attributes:
        steps: The number of iterations of each algorithm.
        seeds: The number of runs side by side for each algorithm.
        learning_rate: The learning rate eta, the same for all algorithms.
        noise: The numbers that the noises are built from.
        eval_every: The number of iterations between two evaluations.
        out: The folder of the results, which must be new; None stands for runs/demo-DATE-TIME.
    """

    steps: int = 1_000
    seeds: int = 5
    learning_rate: float = 0.1
    noise: NoiseSettings = dataclasses.field(default_factory=NoiseSettings)
    eval_every: int = 50
    out: pathlib.Path | None = None

    algorithms = (
        "gd",
        "sgd",
        "m-sgd-fisher",
        "m-sgd-cov",
        "m-sgd-bernoulli",
        "m-sgd-sparse-fisher",
    )

    def runs(self) -> dict[AlgorithmName, TrainConfig]:
        """One training run per algorithm."""
        return {
            algorithm: TrainConfig(
                algorithm=algorithm,
                dataset="digits",
                steps=self.steps,
                seeds=self.seeds,
                learning_rate=self.learning_rate,
                noise=self.noise,
                eval_every=self.eval_every,
                microbatch_size=None,
            )
            for algorithm in self.algorithms
        }


@dataclasses.dataclass(frozen=True)
class FigureConfig:
    """Draws a panel of the paper's figures: makes the missing runs, and reuses the others.

    Every run has its own folder under `runs`, named after its settings, and is continued if it was
    stopped. Writes a picture, a table as CSV, and a page into `out`.

    Attributes:
        panel: The panel; those with a word in their name are not in the paper.
        scale: "paper" is the panel in full; "medium" is what two cores compute in an hour or two,
            chosen to show what the panel shows; "small" shows in minutes that it can be made.
        dataset: A file FILE.npz, as for `train`, with images to use in place of the panel's data
            set, and split as that is: for SVHN, x_test is trained on. None stands for the data set.
            If the file is not there, finished runs of a file of this name are drawn.
        seeds: The number of runs of each algorithm; None stands for the panel's own.
        seeds_at_once: The number of runs side by side in one process, as memory allows.
        runs: The folder of the runs.
        data_dir: The folder in which data sets are looked for, and to which they are downloaded.
        out: The folder of the figure, whose earlier version is replaced; None stands for
            runs/figure-PANEL.
    """

    panel: Annotated[PanelName, tyro.conf.Positional]
    scale: Scale = "paper"
    dataset: pathlib.Path | None = None
    seeds: int | None = None
    seeds_at_once: int = 5
    runs: pathlib.Path = pathlib.Path("runs")
    data_dir: pathlib.Path | None = None
    out: pathlib.Path | None = None

    def __post_init__(self):
        if self.seeds is not None and self.seeds < 1:
            raise ValueError(f"seeds must be at least 1, or None, got {self.seeds}.")
        if self.dataset is not None and not data.is_file(self.dataset.name):
            raise ValueError(f"dataset must be a file FILE.npz, or None, got {self.dataset}.")
        if self.seeds_at_once < 1:
            raise ValueError(f"seeds_at_once must be at least 1, got {self.seeds_at_once}.")


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
