"""The options of the measurements of the paper's theory, as dataclasses that are also the command
line.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, Literal

from experiments.training.config import AlgorithmName, check_seeds

# The parts that read each option; options that are not listed are read by all parts.
_SDE_PARTS = {"strong_paths": ("strong",), "weak_paths": ("weak",)} | dict.fromkeys(
    (
        "learning_rate",
        "halvings",
        "network_paths",
        "iterations",
        "batch_size",
        "substeps",
        "points",
        "microbatch_size",
    ),
    ("network",),
)
_COMPLEXITY_PARTS = (
    {"theorem1_draws": ("theorem1",)}
    | dict.fromkeys(
        ("regularizer_steps", "regularizer_radius", "regularizer_scale"), ("regularizer",)
    )
    | dict.fromkeys(
        (
            "algorithms",
            "steps",
            "every",
            "radius",
            "trace_draws",
            "ascent_steps",
            "microbatch_size",
        ),
        ("trace",),
    )
    | dict.fromkeys(("batch_size", "seeds"), ("regularizer", "trace"))
)
SDEPart = Literal["strong", "weak", "paths", "network"]
ComplexityPart = Literal["theorem1", "regularizer", "trace"]


def _check_sizes(config: Any) -> None:
    if config.batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {config.batch_size}.")
    if config.microbatch_size is not None and config.microbatch_size < 1:
        raise ValueError(
            f"microbatch_size must be at least 1, or None, got {config.microbatch_size}."
        )


def check_batch_size(batch_size: int, num_examples: int) -> None:
    """Raises ValueError unless `batch_size` is between 1 and `num_examples`."""
    if not 1 <= batch_size <= num_examples:
        raise ValueError(f"batch_size must be between 1 and {num_examples}, got {batch_size}.")


def _check_read(config: Any, read_by: Mapping[str, tuple[str, ...]]) -> None:
    """Raises ValueError for an option that none of the chosen parts reads."""
    for field in dataclasses.fields(config):
        parts = read_by.get(field.name, config.parts)
        value = getattr(config, field.name)
        if value != field.default and not set(parts) & set(config.parts):
            raise ValueError(
                f"{field.name} is read by the part {' and '.join(parts)} only, got {value} with "
                f"parts = {' '.join(config.parts)}."
            )


@dataclasses.dataclass(frozen=True)
class SDEConfig:
    """Measures how close iterations are to their SDE, and draws it.

    Strong and weak orders against the learning rate, paths on a loss of two parameters, and the
    distance between M-SGD-Fisher and the SDE on the LeNet-like net and FashionMNIST. Prints tables,
    and writes pictures and summary.json.

    Attributes:
        parts: The measurements to make: the strong orders, the weak orders, the paths on a loss of
            two parameters, and the net (which needs FashionMNIST).
        strong_paths: The number of paths of each strong order, at least 32 for the constant a.
        weak_paths: The number of paths of each weak order 1, on each side; each order 2 takes 4
            times as many.
        learning_rate: The largest learning rate eta of the net.
        halvings: How often the learning rate is halved.
        network_paths: The number of Brownian paths of the net, all from the same initial weights.
        iterations: The number of iterations of the net at the largest learning rate; at smaller
            ones there are more, for the same time.
        batch_size: The batch size b of M-SGD-Fisher on the net.
        substeps: The number of substeps of the net's SDE in one iteration, a power of two.
        points: How often distances are measured on the way.
        microbatch_size: The number of examples of the net in one pass; None stands for all of them
            at once.
        seed: The seed from which all keys come.
        data_dir: The folder in which data sets are looked for, and to which they are downloaded.
        out: The folder of the results, which must be new; None stands for runs/sde-DATE-TIME.
    """

    parts: tuple[SDEPart, ...] = ("strong", "weak", "paths", "network")
    strong_paths: int = 256
    weak_paths: int = 64_000
    learning_rate: float = 0.1
    halvings: int = 2
    network_paths: int = 3
    iterations: int = 80
    batch_size: int = 50
    substeps: int = 4
    points: int = 20
    microbatch_size: int | None = 100
    seed: int = 0
    data_dir: pathlib.Path | None = None
    out: pathlib.Path | None = None

    def __post_init__(self):
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts must name one or more, each once, got {self.parts}.")
        for name, fewest in (("strong_paths", 32), ("weak_paths", 4)):
            if getattr(self, name) < fewest:
                raise ValueError(f"{name} must be at least {fewest}, got {getattr(self, name)}.")
        for name in ("iterations", "points", "network_paths"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        _check_sizes(self)
        if self.substeps < 1 or self.substeps & (self.substeps - 1):
            raise ValueError(f"substeps must be a power of two, got {self.substeps}.")
        if self.halvings < 0:
            raise ValueError(f"halvings must be at least 0, got {self.halvings}.")
        check_seeds("seed", self.seed)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and above 0, got {self.learning_rate}.")
        _check_read(self, _SDE_PARTS)


@dataclasses.dataclass(frozen=True)
class ComplexityConfig:
    """Measures local complexities: Theorem 1, the regulariser in training, and a trace of training.

    Prints tables, and writes pictures and summary.json.

    Attributes:
        parts: The measurements to make: how tight Theorem 1 is, training with the Rademacher
            regulariser on the digits, and the complexities along training on FashionMNIST.
        theorem1_draws: The number of multipliers of each complexity in Theorem 1 where losses are
            affine; for the net it is a 300th of that.
        regularizer_steps: The number of iterations of training with the regulariser.
        regularizer_radius: The radius of the regulariser's ball.
        regularizer_scale: The factor of the regulariser; None stands for the one at which its first
            order has the variance of SGD's noise.
        algorithms: The algorithms whose training is traced.
        steps: The number of iterations of traced training.
        every: The number of iterations between two measurements.
        learning_rate: The learning rate eta of all training: traced, with the regulariser, and of
            the net in Theorem 1.
        batch_size: The batch size b of SGD and M-SGD, and of the SGD complexity.
        radius: The radius of the ball whose complexities are traced.
        trace_draws: The number of multipliers of each traced complexity.
        ascent_steps: The number of steps of the search for each supremum in the trace.
        seeds: The number of runs, each with its own initial weights and noise.
        seed: The seed of the first run; those of the other runs count up from it.
        microbatch_size: The number of examples of LeNet in one pass; None stands for all of them at
            once.
        data_dir: The folder in which data sets are looked for, and to which they are downloaded.
        out: The folder of the results, which must be new; None stands for
            runs/complexity-DATE-TIME.
    """

    parts: tuple[ComplexityPart, ...] = ("theorem1", "regularizer", "trace")
    theorem1_draws: int = 20_000
    regularizer_steps: int = 1_000
    regularizer_radius: float = 0.1
    regularizer_scale: float | None = None
    algorithms: tuple[AlgorithmName, ...] = ("gd", "sgd", "m-sgd-cov")
    steps: int = 2_000
    every: int = 500
    learning_rate: float = 0.1
    batch_size: int = 50
    radius: float = 0.1
    trace_draws: int = 6
    ascent_steps: int = 10
    seeds: int = 3
    seed: int = 0
    microbatch_size: int | None = 100
    data_dir: pathlib.Path | None = None
    out: pathlib.Path | None = None

    def __post_init__(self):
        for name in ("parts", "algorithms"):
            chosen = getattr(self, name)
            if not chosen or len(set(chosen)) < len(chosen):
                raise ValueError(f"{name} must name one or more, each once, got {chosen}.")
        _check_sizes(self)
        scale = self.regularizer_scale
        if scale is not None and not (math.isfinite(scale) and scale >= 0):
            raise ValueError(
                f"regularizer_scale must be finite and at least 0, or None, got {scale}."
            )
        for name in ("theorem1_draws", "trace_draws"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2, got {getattr(self, name)}.")
        for name in ("regularizer_steps", "steps", "every", "ascent_steps", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("radius", "regularizer_radius", "learning_rate"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be finite and above 0, got {getattr(self, name)}.")
        check_seeds("seed", self.seed, self.seeds)
        _check_read(self, _COMPLEXITY_PARTS)
