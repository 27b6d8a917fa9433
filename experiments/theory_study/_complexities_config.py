"""The options of the study of local complexities at equal training loss."""

import dataclasses
import pathlib
from typing import ClassVar, Literal

from experiments.studies.config import StudyConfig, check, check_names, check_sizes
from experiments.theory_study import _net

AlgorithmName = Literal["gd", "sgd", "sgd-other-key", "cov"]


@dataclasses.dataclass(frozen=True)
class ComplexitiesConfig(StudyConfig):
    """Compares local complexities of GD, SGD and M-SGD-Cov at equal training losses.

    Trains a small net on FashionMNIST, and measures the local complexities whenever the training
    loss first reaches a target. All parameters that are compared have multipliers of their own.
    Prints a table; writes complexities.jsonl, complexities.png and summary.json. A study that was
    stopped is continued; recorded runs are never made again.

    Attributes:
        algorithms: The algorithms; the others are compared with "gd". "sgd-other-key" is SGD with
            other draws, which shows how different equals are.
        targets: The training losses, in descending order.
        num_train: The number of training images N of a seed.
        batch_size: The batch size b of SGD, of M-SGD-Cov and of the SGD complexity.
        learning_rate: The learning rate eta.
        every: The number of iterations between two evaluations of the training loss.
        most_steps: The number of iterations after which a run ends, whatever its loss.
        radius: The radius of the ball.
        num_draws: The number of multipliers of each complexity.
        ascent_steps: The number of steps of the search for each supremum.
        seeds: The number of seeds, each with images, initial weights, noise and multipliers of its
            own.
        seed: The first seed; the others count up from it.
        data_dir: The folder in which data sets are looked for, and to which they are downloaded.
        report: Whether only the table and the picture are made again from the records in `out`, and
            nothing is run.
        collect: Folders of this study that were made with other seeds, whose records are put
            together in `out`.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/theory-study-complexities-DATE-TIME.
    """

    parts: ClassVar = ("complexities",)
    varied: ClassVar = (*StudyConfig.varied, "algorithms")

    algorithms: tuple[AlgorithmName, ...] = ("gd", "sgd", "sgd-other-key", "cov")
    targets: tuple[float, ...] = (0.6, 0.4, 0.2, 0.1)
    num_train: int = 1_000
    batch_size: int = 50
    learning_rate: float = 0.1
    every: int = 2
    most_steps: int = 6_000
    radius: float = 0.1
    num_draws: int = 12
    ascent_steps: int = 10
    seeds: int = 10
    seed: int = 0
    data_dir: pathlib.Path | None = None
    report: bool = False
    collect: tuple[pathlib.Path, ...] = ()
    out: pathlib.Path | None = None

    def __post_init__(self):
        check_names("algorithms", self.algorithms)
        check(
            self,
            {
                "num_train": 1,
                "batch_size": 1,
                "every": 1,
                "most_steps": 1,
                "num_draws": 2,
                "ascent_steps": 1,
            },
            {name: getattr(self, name) for name in ("targets", "learning_rate", "radius")},
            fewest_seeds=1,
        )
        if not self.targets or list(self.targets) != sorted(set(self.targets), reverse=True):
            raise ValueError(f"targets must be in descending order, each once, got {self.targets}.")
        check_sizes(self.num_train, self.batch_size, _net.POOL)
