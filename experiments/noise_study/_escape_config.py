"""The options of the study of anisotropic noise."""

import dataclasses
import pathlib
from typing import ClassVar, Literal

from experiments.studies.config import StudyConfig, check, check_names

EscapeName = Literal[
    "gd", "sgd", "sgd-other-key", "cov", "diagonal", "isotropic", "top_eigenvector"
]

MAX_EXAMPLES = 1_000
"""The number of digits for training."""


@dataclasses.dataclass(frozen=True)
class EscapeConfig(StudyConfig):
    """Measures how noises of equal trace leave a minimum that GD has found, on the digits.

    Trains a small net with squared loss by GD and by SGD, and measures how their noise is aligned
    with the Hessian. Then starts at GD's end with five noises of equal trace and different shapes:
    how fast the loss rises, compared with a prediction without a fitted constant, and how flat the
    place is that they arrive at. Prints tables; writes escape.jsonl, escape.png and summary.json. A
    study that was stopped is continued; recorded runs are never made again.

    Attributes:
        noises: The noises to start with at the minimum; "sgd" must be among them, since all others
            are compared with it.
        learning_rate: The learning rate of all runs.
        batch_size: The batch size b of SGD, whose trace all others have.
        gd_steps: The number of iterations of GD, and of SGD beside it, before the noises start.
        steps: The number of iterations of each noise from the minimum on.
        short_steps: The number of iterations over which the rise of the loss is measured.
        repetitions: The number of repetitions of these short runs, with noise keys of their own.
        checkpoints: The number of measurements of each long run, apart from that at the start;
            those in the second half of the iterations are averaged.
        path_checkpoints: The number of measurements of alignment along GD and SGD, apart from that
            at the start.
        num_examples: The number of training images N of each seed.
        width: The number of units in each of the two hidden layers.
        refresh_every: The number of iterations after which the shape of additive noise is computed
            again.
        probes: The number of random probes for the trace of the Hessian.
        lanczos_steps: The number of Hessian products for the largest eigenvalue.
        seeds: The number of runs, each with its own images, initial weights and noise.
        seed: The seed of the first run; those of the other runs count up from it.
        report: Whether only the table and the picture are made again from the records in `out`, and
            nothing is run.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/noise-study-escape-DATE-TIME.
    """

    parts: ClassVar = ("escape",)

    noises: tuple[EscapeName, ...] = (
        "gd",
        "sgd",
        "sgd-other-key",
        "cov",
        "diagonal",
        "isotropic",
        "top_eigenvector",
    )
    learning_rate: float = 0.2
    batch_size: int = 16
    gd_steps: int = 2_000
    steps: int = 1_000
    short_steps: int = 50
    repetitions: int = 10
    checkpoints: int = 6
    path_checkpoints: int = 3
    num_examples: int = 500
    width: int = 8
    refresh_every: int = 25
    probes: int = 32
    lanczos_steps: int = 20
    seeds: int = 5
    seed: int = 0
    report: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self):
        check_names("noises", self.noises, "sgd")
        check(
            self,
            {
                "gd_steps": 1,
                "steps": 2,
                "short_steps": 1,
                "repetitions": 2,
                "checkpoints": 2,
                "path_checkpoints": 2,
                "num_examples": 2,
                "width": 1,
                "refresh_every": 1,
                "probes": 2,
                "lanczos_steps": 1,
            },
            {"learning_rate": self.learning_rate},
        )
        if self.num_examples > MAX_EXAMPLES:
            raise ValueError(
                f"num_examples must be at most {MAX_EXAMPLES}, got {self.num_examples}."
            )
        if not 1 <= self.batch_size <= self.num_examples:
            raise ValueError(
                f"batch_size must be between 1 and {self.num_examples}, got {self.batch_size}."
            )
        for name, steps in (("checkpoints", self.steps), ("path_checkpoints", self.gd_steps)):
            if getattr(self, name) > steps:
                raise ValueError(
                    f"{name} must be at most the {steps} steps, got {getattr(self, name)}."
                )
