"""The options of the measurements of the paper's theory, as dataclasses that are also the command
line.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from experiments.training.config import check_seeds

# The parts that read each option; options that are not listed are read by all parts.
_SDE_PARTS = {"strong_paths": ("strong",), "weak_paths": ("weak",)}
SDEPart = Literal["strong", "weak", "paths"]


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

    Strong and weak orders against the learning rate, and paths on a loss of two parameters. Prints
    tables, and writes pictures and summary.json. Nets are measured by `theory-study network`.

    Attributes:
        parts: The measurements to make: the strong orders, the weak orders, and the paths on a loss
            of two parameters.
        strong_paths: The number of paths of each strong order, at least 32 for the constant a.
        weak_paths: The number of paths of each weak order 1, on each side; each order 2 takes 4
            times as many.
        seed: The seed from which all keys come.
        out: The folder of the results, which must be new; None stands for runs/sde-DATE-TIME.
    """

    parts: tuple[SDEPart, ...] = ("strong", "weak", "paths")
    strong_paths: int = 256
    weak_paths: int = 64_000
    seed: int = 0
    out: pathlib.Path | None = None

    def __post_init__(self):
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts must name one or more, each once, got {self.parts}.")
        for name, fewest in (("strong_paths", 32), ("weak_paths", 4)):
            if getattr(self, name) < fewest:
                raise ValueError(f"{name} must be at least {fewest}, got {getattr(self, name)}.")
        check_seeds("seed", self.seed)
        _check_read(self, _SDE_PARTS)


@dataclasses.dataclass(frozen=True)
class ComplexityConfig:
    """Measures how tight Theorem 1 is, for several classes of losses.

    Prints a table, and writes a picture and summary.json. Complexities along training are measured
    by `theory-study complexities`, and the regulariser in training by `theory-study regularizer`.

    Attributes:
        theorem1_draws: The number of multipliers of each complexity where losses are affine; for
            the net it is a 300th of that.
        learning_rate: The learning rate eta with which the net is trained.
        seed: The seed from which all keys come.
        out: The folder of the results, which must be new; None stands for
            runs/complexity-DATE-TIME.
    """

    parts: ClassVar = ("theorem1",)

    theorem1_draws: int = 20_000
    learning_rate: float = 0.1
    seed: int = 0
    out: pathlib.Path | None = None

    def __post_init__(self):
        if self.theorem1_draws < 2:
            raise ValueError(f"theorem1_draws must be at least 2, got {self.theorem1_draws}.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate must be finite and above 0, got {self.learning_rate}.")
        check_seeds("seed", self.seed)
