"""The options of the study of the regulariser in training."""

import dataclasses
import math
import pathlib
import typing
from typing import ClassVar, Literal

from experiments.studies.config import StudyConfig, check, check_names, check_sizes
from experiments.training.config import check_seeds

MOST_EXAMPLES = 1_000
"""The number of digits that a seed has to train on; the other 797 are its test images."""


CaseName = Literal[
    "gd",
    "gd-longer",
    "full",
    "full-rates",
    "tenth",
    "no-sup",
    "sgd",
    "sgd-longer",
    "sgd-full",
]


@dataclasses.dataclass(frozen=True)
class RegularizerConfig(StudyConfig):
    """Compares the full regulariser in training with GD at equal compute and at other rates.

    Trains the small net on scikit-learn's digits with and without the local Rademacher complexity.
    The endpoint is the test accuracy after the last step. The best learning rates are chosen on
    seeds of their own. Prints tables; writes regularizer.jsonl, regularizer.png and summary.json. A
    study that was stopped is continued; recorded runs are never made again.

    Attributes:
        cases: The ways to train, of which the regulariser at other learning rates is one: with the
            regulariser, these take six times as long as GD.
        num_train: The number of training images N of a seed.
        label_noise: The fraction of the training labels that is replaced by other classes.
        batch_size: The batch size b of SGD, which also sets the scale of the regulariser.
        steps: The number of iterations of each run, apart from those with as many gradients as the
            regulariser takes.
        decay_at: The fraction of the iterations after which the learning rate is multiplied by 0.1.
        learning_rate: The learning rate eta.
        other_rates: The other learning rates of GD, with the regulariser and without.
        radius: The radius of the regulariser's ball.
        seeds: The number of seeds, each with images, labels, initial weights and noise of its own.
        seed: The first seed; the others count up from it.
        tuning_seeds: The number of seeds that choose the best learning rates; 0 for no choice.
        tuning_seed: The first of these seeds.
        report: Whether only the table and the picture are made again from the records in `out`, and
            nothing is run.
        collect: Folders of this study that were made with other seeds, whose records are put
            together in `out`.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/theory-study-regularizer-DATE-TIME.
    """

    parts: ClassVar = ("regularizer",)
    varied: ClassVar = (*StudyConfig.varied, "cases", "tuning_seeds", "tuning_seed")

    cases: tuple[CaseName, ...] = typing.get_args(CaseName)
    num_train: int = MOST_EXAMPLES
    label_noise: float = 0.0
    batch_size: int = 50
    steps: int = 1_000
    decay_at: float = 0.7
    learning_rate: float = 0.1
    other_rates: tuple[float, ...] = (0.2, 0.3, 0.5, 0.8)
    radius: float = 0.1
    seeds: int = 30
    seed: int = 0
    tuning_seeds: int = 15
    tuning_seed: int = 1_000
    report: bool = False
    collect: tuple[pathlib.Path, ...] = ()
    out: pathlib.Path | None = None

    def __post_init__(self):
        check(
            self,
            {"num_train": 1, "batch_size": 1, "steps": 1, "tuning_seeds": 0},
            {name: getattr(self, name) for name in ("learning_rate", "other_rates", "radius")},
            fewest_seeds=1,
        )
        check_names("cases", self.cases)
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(
                "other_rates must be different from learning_rate and from each other, got "
                f"{self.other_rates}."
            )
        check_sizes(self.num_train, self.batch_size, MOST_EXAMPLES)
        for name in ("label_noise", "decay_at"):
            value = getattr(self, name)
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"{name} must be between 0 and 1, got {value}.")
        check_seeds("tuning_seed", self.tuning_seed, max(self.tuning_seeds, 1))
        if set(self.all_seeds) & set(self.all_tuning_seeds):
            raise ValueError(
                f"tuning_seed must leave the seeds {self.seed} to {self.seed + self.seeds - 1} "
                f"alone, got {self.tuning_seed} with {self.tuning_seeds} tuning_seeds."
            )

    @property
    def rates(self) -> tuple[float, ...]:
        """All learning rates."""
        return (self.learning_rate, *self.other_rates)

    @property
    def all_tuning_seeds(self) -> range:
        """The seeds that choose the best learning rates."""
        return range(self.tuning_seed, self.tuning_seed + self.tuning_seeds)
