"""The options that all studies have, as the base of dataclasses that are also the command line."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any, ClassVar

from experiments.training.config import check_seeds


class StudyConfig:
    """The base of the options of all studies, which have the first four of these among them.

    Attributes:
        collect: the folders of parts of a study that were made elsewhere, with other seeds, and
            whose records are put together in `out`; a study need not have this option.
        varied: the options in which such parts may differ.
    """

    seeds: int
    seed: int
    report: bool
    out: pathlib.Path | None
    collect: tuple[pathlib.Path, ...] = ()
    varied: ClassVar[tuple[str, ...]] = ("seeds", "seed", "report", "collect")

    @property
    def all_seeds(self) -> range:
        """The seeds of all runs."""
        return range(self.seed, self.seed + self.seeds)


def evenly(steps: int, checkpoints: int) -> tuple[int, ...]:
    """The iterations at which a run of so many is measured, from 0."""
    return tuple(round(i * steps / checkpoints) for i in range(checkpoints + 1))


def check(
    config: StudyConfig,
    fewest: Mapping[str, int],
    positive: Mapping[str, Any],
    fewest_seeds: int = 2,
) -> None:
    """Checks the options that all studies have, and some others.

    Args:
        config: the options.
        fewest: the least allowed value of each of these options.
        positive: options whose values, one number or several, must be finite and above 0.
        fewest_seeds: the least number of seeds; 1 where parts of a study may be put together.

    Raises:
        ValueError: for the first option that is wrong; it is named.
    """
    for name, values in positive.items():
        several = values if isinstance(values, tuple) else (values,)
        if not all(math.isfinite(value) and value > 0 for value in several):
            raise ValueError(f"{name} must be finite and above 0, got {values}.")
    for name, least in {**fewest, "seeds": fewest_seeds}.items():
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}.")
    check_seeds("seed", config.seed, config.seeds)
    if config.report and config.out is None:
        raise ValueError("out must name the folder of the records where report is chosen.")


def check_names(name: str, values: tuple[str, ...], needed: str | None = None) -> None:
    """Raises ValueError unless each value is there once: `needed` and others, or one at least."""
    lacking = needed not in values if needed else not values
    if lacking or len(set(values)) < len(values):
        wanted = f"{needed} and others" if needed else "one or more"
        raise ValueError(f"{name} must name {wanted}, each once, got {values}.")


def check_sizes(num_train: int, batch_size: int, most: int) -> None:
    """Raises ValueError unless b is at most N, and N at most the number of images."""
    if num_train > most:
        raise ValueError(f"num_train must be at most {most}, got {num_train}.")
    if batch_size > num_train:
        raise ValueError(f"batch_size must be at most num_train = {num_train}, got {batch_size}.")
