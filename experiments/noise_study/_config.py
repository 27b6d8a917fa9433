"""The options of the studies of gradient noise, as dataclasses that are also the command line.

A study whose options are not here has them in its own file.
"""

import dataclasses
import math
import pathlib
from typing import ClassVar, Literal

from experiments.studies.config import StudyConfig, check, check_names, evenly

NoiseName = Literal[
    "gd", "sgd", "sgd-other-key", "cov", "bernoulli", "sparse_cov", "student_t", "isotropic"
]
MAX_BATCH = 400
"""The largest batch size: 1,000 digits are for training, and `sparse_cov` uses 2 b of them."""


@dataclasses.dataclass(frozen=True)
class EdgeConfig(StudyConfig):
    """Measures where training stabilises with laws that share SGD's covariance, on the digits.

    Trains a small net with squared loss with each law, and measures batch sharpness and the largest
    eigenvalue of the Hessian along the way. Prints a table; writes edge.jsonl, edge.png and
    summary.json. A study that was stopped is continued; recorded runs are never made again.

    Attributes:
        noises: The noises to train with at the learning rate; "sgd" must be among them, since all
            others are compared with it.
        learning_rate: The learning rate eta at which the noises are compared.
        other_rates: The learning rates at which GD, SGD and M-SGD-Cov are trained as well.
        batch_size: The batch size b of SGD, whose noise all others imitate.
        steps: The number of iterations of each run.
        checkpoints: The number of measurements on the way, apart from that at the start; those in
            the second half of the iterations are averaged, and decide.
        width: The number of units in each of the two hidden layers.
        degrees_of_freedom: Those of the Student t noise, above 2.
        refresh_every: The number of iterations after which the variance of isotropic noise is
            measured again.
        law_draws: The number of draws of each law's own batch sharpness; that of SGD takes 6 times
            as many, which are cheaper.
        lanczos_steps: The number of Hessian products for the largest eigenvalue.
        margin: The difference from SGD, in units of 2 / eta, within which a noise counts as
            equivalent.
        seeds: The number of runs, each with its own images, initial weights and noise.
        seed: The seed of the first run; those of the other runs count up from it.
        report: Whether only the table and the picture are made again from the records in `out`, and
            nothing is run.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/noise-study-edge-DATE-TIME.
    """

    parts: ClassVar = ("edge",)

    noises: tuple[NoiseName, ...] = (
        "gd",
        "sgd",
        "sgd-other-key",
        "cov",
        "bernoulli",
        "sparse_cov",
        "student_t",
        "isotropic",
    )
    learning_rate: float = 0.2
    other_rates: tuple[float, ...] = (0.1, 0.4)
    batch_size: int = 16
    steps: int = 6_000
    checkpoints: int = 12
    width: int = 32
    degrees_of_freedom: float = 3.0
    refresh_every: int = 25
    law_draws: int = 64
    lanczos_steps: int = 20
    margin: float = 0.1
    seeds: int = 8
    seed: int = 0
    report: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self):
        check_names("noises", self.noises, "sgd")
        rates = (self.learning_rate, *self.other_rates)
        check(
            self,
            {
                "steps": 1,
                "checkpoints": 2,
                "width": 1,
                "refresh_every": 1,
                "law_draws": 2,
                "lanczos_steps": 1,
            },
            {name: getattr(self, name) for name in ("learning_rate", "other_rates", "margin")},
        )
        if len(set(rates)) < len(rates):
            raise ValueError(
                "other_rates must be different from learning_rate and from each other, got "
                f"{self.other_rates}."
            )
        if not 1 <= self.batch_size <= MAX_BATCH:
            raise ValueError(
                f"batch_size must be between 1 and {MAX_BATCH}, got {self.batch_size}."
            )
        if self.checkpoints > self.steps:
            raise ValueError(
                f"checkpoints must be at most the {self.steps} steps, got {self.checkpoints}."
            )
        if not (math.isfinite(self.degrees_of_freedom) and self.degrees_of_freedom > 2):
            raise ValueError(
                f"degrees_of_freedom must be finite and above 2, got {self.degrees_of_freedom}."
            )

    @property
    def measured_at(self) -> tuple[int, ...]:
        """The steps at which quantities are measured, from 0."""
        return evenly(self.steps, self.checkpoints)

    @property
    def runs(self) -> tuple[tuple[NoiseName, float], ...]:
        """The noises and learning rates of all runs."""
        others: tuple[NoiseName, ...] = ("gd", "sgd", "cov")
        return (
            *((name, self.learning_rate) for name in self.noises),
            *((name, rate) for rate in self.other_rates for name in others),
        )
