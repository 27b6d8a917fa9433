"""The options of the study of nets beside their SDE."""

import dataclasses
import pathlib
from typing import ClassVar

from experiments.studies.config import StudyConfig, check, check_names, check_sizes
from experiments.theory_study import _net


@dataclasses.dataclass(frozen=True)
class NetworkConfig(StudyConfig):
    """Measures the distance between M-SGD-Fisher and its SDE on smooth nets and on others.

    Trains small nets on FashionMNIST with tanh or ReLU and with average or max-pooling, beside the
    SDE of the same Brownian path, and as a control beside that of another one. The endpoint is the
    exponent of the distance at the last time. Prints a table; writes network.jsonl, network.png and
    summary.json. A study that was stopped is continued; recorded runs are never made again.

    Attributes:
        nets: The nets, by activation and pooling; the others are compared with "relu-max".
        num_train: The number of training images N of a seed.
        batch_size: The batch size b of M-SGD-Fisher.
        learning_rates: The learning rates eta, in descending order; each must be the first one
            divided by an integer.
        iterations: The number of iterations at the first learning rate; at smaller ones there are
            more, for the same time.
        points: The number of times at which distances are measured, which must divide
            `iterations`.
        substeps: The number of substeps of the SDE in one iteration, a power of two.
        seeds: The number of paths, each with images, initial weights and a Brownian path of its
            own.
        seed: The first seed; the others count up from it.
        data_dir: The folder in which data sets are looked for, and to which they are downloaded.
        report: Whether only the table and the picture are made again from the records in `out`, and
            nothing is run.
        collect: Folders of this study that were made with other seeds, whose records are put
            together in `out`.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/theory-study-network-DATE-TIME.
    """

    parts: ClassVar = ("network",)
    varied: ClassVar = (*StudyConfig.varied, "nets")

    nets: tuple[_net.NetName, ...] = ("relu-max", "tanh-average", "relu-average", "tanh-max")
    num_train: int = 300
    batch_size: int = 50
    learning_rates: tuple[float, ...] = (0.1, 0.05, 0.025, 0.0125)
    iterations: int = 80
    points: int = 8
    substeps: int = 4
    seeds: int = 20
    seed: int = 0
    data_dir: pathlib.Path | None = None
    report: bool = False
    collect: tuple[pathlib.Path, ...] = ()
    out: pathlib.Path | None = None

    def __post_init__(self):
        check_names("nets", self.nets)
        check(
            self,
            {"num_train": 1, "batch_size": 1, "iterations": 1, "points": 1, "substeps": 1},
            {"learning_rates": self.learning_rates},
            fewest_seeds=1,
        )
        check_sizes(self.num_train, self.batch_size, _net.POOL)
        if self.substeps & (self.substeps - 1):
            raise ValueError(f"substeps must be a power of two, got {self.substeps}.")
        rates = self.learning_rates
        if len(rates) < 3 or list(rates) != sorted(set(rates), reverse=True):
            raise ValueError(
                f"learning_rates must be at least 3, in descending order, each once, got {rates}."
            )
        if any(abs(rates[0] / rate - round(rates[0] / rate)) > 1e-6 for rate in rates):
            raise ValueError(
                "learning_rates must be the first one divided by integers, so that all of them "
                f"reach the same times, got {rates}."
            )
        if self.iterations % self.points:
            raise ValueError(
                f"points must divide the {self.iterations} iterations, got {self.points}."
            )

    @property
    def times(self) -> tuple[float, ...]:
        """The times at which distances are measured."""
        between = self.iterations // self.points
        return tuple(self.learning_rates[0] * between * (i + 1) for i in range(self.points))
