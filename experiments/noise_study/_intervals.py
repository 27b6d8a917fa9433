"""Means over seeds with their intervals, and how numbers stand in the tables of the studies."""

import numpy as np
from jaxtyping import Float

from experiments import figures


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


def shown(mean: list[float] | None, digits: int = 3) -> str:
    """A mean with the half width of its interval, or "-"."""
    return "-" if mean is None else f"{mean[0]:.{digits}f} ± {mean[1]:.{digits}f}"


def p_value(value: float) -> str:
    """A p-value with two digits."""
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"
