"""The options of the study of the noise scale."""

import dataclasses
import pathlib
from typing import ClassVar

from experiments.noise_study import _fashion
from experiments.studies.config import StudyConfig, check


@dataclasses.dataclass(frozen=True)
class ScaleConfig(StudyConfig):
    """Measures the noise scale along training on FashionMNIST, and whether it predicts batch sizes.

    Compares three estimators with the exact value along a run. Then trains with every batch size at
    the best of several learning rates to fixed losses, and compares the batch size at which steps
    begin to be wasted with the noise scale. Prints tables; writes scale.jsonl, scale.png and
    summary.json. A study that was stopped is continued; recorded runs are never made again.

    Attributes:
        num_examples: The number of training images N of each seed.
        width: The number of units in the hidden layer.
        targets: The training losses to reach, in descending order.
        batch_sizes: The batch sizes to train with, in descending order.
        first_rate: The learning rate that the search begins with at large batch sizes, at small
            ones with a smaller one; it is doubled and halved until each target has its best rate
            inside the range.
        growth: The distance between two evaluations, as a share of the steps so far.
        evaluated: The number of training images that the loss is evaluated on in these runs.
        most_epochs: The number of passes over the images after which a run is given up.
        reference_rate: The learning rate of the run along which the noise scale is measured.
        reference_steps: The number of steps of that run.
        microbatch_size: The number of images per micro-batch in that run.
        microbatches: The number of micro-batches per step in that run, an even number.
        windows: The numbers of steps over which the free estimators average.
        checkpoints: The number of measurements along that run, apart from that at the start.
        law_draws: The numbers of draws of M-SGD-Cov for the estimator from draws.
        hessian_draws: The number of draws for tr(HS).
        seeds: The number of runs, each with its own images, initial weights and noise.
        seed: The seed of the first run; those of the other runs count up from it.
        report: Whether only the table and the picture are made again from the records in `out`, and
            nothing is run.
        out: The folder of the results, which must be new or of the same command; None stands for
            runs/noise-study-scale-DATE-TIME.
    """

    parts: ClassVar = ("scale",)

    num_examples: int = 4_096
    width: int = 32
    targets: tuple[float, ...] = (0.9, 0.7, 0.5)
    batch_sizes: tuple[int, ...] = (4096, 512, 128, 64, 32, 8)
    first_rate: float = 0.5
    growth: float = 0.05
    evaluated: int = 1_024
    most_epochs: int = 400
    reference_rate: float = 0.5
    reference_steps: int = 100
    microbatch_size: int = 64
    microbatches: int = 16
    windows: tuple[int, ...] = (5, 20)
    checkpoints: int = 10
    law_draws: tuple[int, ...] = (4, 16)
    hessian_draws: int = 16
    seeds: int = 5
    seed: int = 0
    report: bool = False
    out: pathlib.Path | None = None

    def __post_init__(self):
        check(
            self,
            {
                "num_examples": 2,
                "width": 1,
                "evaluated": 1,
                "most_epochs": 1,
                "reference_steps": 2,
                "microbatch_size": 1,
                "checkpoints": 2,
                "hessian_draws": 3,
            },
            {
                name: getattr(self, name)
                for name in ("targets", "batch_sizes", "first_rate", "growth", "reference_rate")
            },
        )
        for name in ("targets", "batch_sizes"):
            values = getattr(self, name)
            if len(values) < 1 or list(values) != sorted(set(values), reverse=True):
                raise ValueError(f"{name} must be in descending order, each once, got {values}.")
        if len(self.batch_sizes) < 3:
            raise ValueError(
                f"batch_sizes must be at least 3, for a curve to fit, got {self.batch_sizes}."
            )
        if self.microbatches < 4 or self.microbatches % 2:
            raise ValueError(
                f"microbatches must be an even number of at least 4, got {self.microbatches}."
            )
        for name in ("windows", "law_draws"):
            values = getattr(self, name)
            if not values or min(values) < 2 or len(set(values)) < len(values):
                raise ValueError(f"{name} must be different numbers of at least 2, got {values}.")
        if self.checkpoints > self.reference_steps:
            raise ValueError(
                f"checkpoints must be at most the {self.reference_steps} reference_steps, got "
                f"{self.checkpoints}."
            )
        if not self.evaluated <= self.num_examples <= _fashion.POOL:
            raise ValueError(
                f"num_examples must be from evaluated = {self.evaluated} to {_fashion.POOL}, got "
                f"{self.num_examples}."
            )

    @property
    def measured_at(self) -> tuple[int, ...]:
        """The steps of the reference run at which the noise scale is measured, from 0.

        They are denser at the start, where the noise scale grows fast.
        """
        shares = [(i / self.checkpoints) ** 2 for i in range(self.checkpoints + 1)]
        steps = [max(i, round(share * self.reference_steps)) for i, share in enumerate(shares)]
        return tuple(min(step, self.reference_steps) for step in steps)
