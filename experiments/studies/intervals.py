"""Means over seeds with their intervals, adjusted p-values, and numbers in the studies' tables."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from experiments import figures
from experiments.decide import statistics


def mean(values: Float[np.ndarray, " seeds"]) -> list[float] | None:
    """The mean and the half width of its 95 % interval over the seeds whose values are finite.

    None if there are fewer than two of them.
    """
    from scipy import stats

    values = values[np.isfinite(values)]
    if values.size < 2:
        return None
    half = stats.t.ppf(0.975, values.size - 1) * figures.standard_error(values)
    return [float(values.mean()), float(half)]


def adjust(compared: list[dict[str, Any]], names: Sequence[str], size: int | None = None) -> None:
    """Replaces p-values by those that Holm's method adjusts, each name a family by itself.

    Args:
        compared: the comparisons that were made, which are changed.
        names: the fields with p-values.
        size: the number of declared comparisons, if it is larger.
    """
    for name in names:
        adjusted = statistics.holm([one[name] for one in compared], size)
        for one, value in zip(compared, adjusted, strict=True):
            one[name] = value


def shown(mean: list[float] | None, digits: int = 3) -> str:
    """A mean with the half width of its interval, or "-"."""
    return "-" if mean is None else f"{mean[0]:.{digits}f} ± {mean[1]:.{digits}f}"


def p_value(value: float) -> str:
    """A p-value with two digits."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
