"""The statistics of the study, from arrays with one number per seed.

All comparisons are paired by seed: both runs have the same images, labels and initial weights.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

Values = Float[np.ndarray, " seeds"]


class Difference(NamedTuple):
    """A paired difference of means, with Student's t interval.

    Attributes:
        mean: the mean of the differences.
        low, high: the ends of the confidence interval.
        p_value: the two-sided p-value of the hypothesis that the difference is 0.
        num_seeds: the number of pairs.
    """

    mean: float
    low: float
    high: float
    p_value: float
    num_seeds: int


class Share(NamedTuple):
    """The share of the gap between GD and SGD that a contestant closes: 0 is GD, 1 is SGD.

    Attributes:
        estimate: the ratio of the mean differences.
        low, high: the ends of Fieller's interval. Both are infinite if the gap itself is not
            significantly different from 0, since then no bounded interval has the given confidence.
    """

    estimate: float
    low: float
    high: float


def difference(values: Values, reference: Values, confidence: float = 0.95) -> Difference:
    """The paired difference ``values - reference``.

    Args:
        values: one number per seed.
        reference: the numbers to compare with, in the same order of seeds.
        confidence: the confidence of the interval.

    Raises:
        ValueError: if there are fewer than two pairs, or the numbers of seeds differ.
    """
    differences = _pairs(values, reference)
    if np.ptp(differences) == 0:  # Student's t would be 0/0, as for identical runs.
        mean = float(differences[0])
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, differences.size)
    test: Any = stats.ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(confidence)
    return Difference(
        float(differences.mean()),
        float(interval.low),
        float(interval.high),
        float(test.pvalue),
        differences.size,
    )


def equivalence(values: Values, reference: Values, margin: float) -> float:
    """The p-value of two one-sided t tests, small if they show ``|mean difference| < margin``.

    Raises:
        ValueError: if `margin` is not positive, or as `difference`.
    """
    if not margin > 0:
        raise ValueError(f"margin must be positive, got {margin}.")
    differences = _pairs(values, reference)
    if np.ptp(differences) == 0:
        return 0.0 if abs(differences[0]) < margin else 1.0
    above: Any = stats.ttest_1samp(differences, -margin, alternative="greater")
    below: Any = stats.ttest_1samp(differences, margin, alternative="less")
    return float(max(above.pvalue, below.pvalue))


def holm(p_values: Sequence[float], family_size: int | None = None) -> list[float]:
    """P-values adjusted by Holm's method, in the order given.

    Args:
        p_values: the p-values of the comparisons that were made.
        family_size: the number of declared comparisons, if it is larger than the number made; those
            that are missing count as if their p-values were 1.

    Raises:
        ValueError: if the family is smaller than the number of p-values, or a p-value is not in
            [0, 1].
    """
    size = len(p_values) if family_size is None else family_size
    if size < len(p_values):
        raise ValueError(
            f"family_size must be at least the {len(p_values)} comparisons, got {size}."
        )
    values = np.asarray(p_values, float)
    if not ((values >= 0) & (values <= 1)).all():
        raise ValueError("p_values must be between 0 and 1.")
    order = np.argsort(values, kind="stable")
    # Multiply the smallest by `size`, the next by `size` - 1, ..., and keep the order ascending.
    scaled = values[order] * (size - np.arange(values.size))
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    return adjusted.tolist()


def share_of_gap(values: Values, gd: Values, sgd: Values, confidence: float = 0.95) -> Share:
    """The share of the gap that is closed, ``mean(values - gd) / mean(sgd - gd)``.

    Fieller's interval (Fieller 1954, Some Problems in Interval Estimation): the shares r for which
    a paired t test does not reject that ``values - gd - r (sgd - gd)`` has mean 0.

    Args:
        values: one number per seed.
        gd: the numbers of GD, in the same order of seeds.
        sgd: the numbers of SGD.
        confidence: the confidence of the interval.

    Raises:
        ValueError: as `difference`.
    """
    closed, gap = _pairs(values, gd), _pairs(sgd, gd)
    if closed.size != gap.size:
        raise ValueError(
            f"values and sgd must have one number per seed, got {closed.size}, {gap.size}."
        )
    x, y = closed.mean(), gap.mean()
    covariance = np.cov(closed, gap) / closed.size
    square = stats.t.ppf((1 + confidence) / 2, closed.size - 1) ** 2
    a = y**2 - square * covariance[1, 1]
    b = x * y - square * covariance[0, 1]
    c = x**2 - square * covariance[0, 0]
    estimate = float(x / y) if y else math.nan
    if a <= 0:
        return Share(estimate, -math.inf, math.inf)
    root = math.sqrt(max(b**2 - a * c, 0.0))
    return Share(estimate, float((b - root) / a), float((b + root) / a))


def _pairs(values: Values, reference: Values) -> Values:
    values, reference = np.asarray(values, float), np.asarray(reference, float)
    if values.shape != reference.shape or values.ndim != 1 or values.size < 2:
        raise ValueError(
            "values and reference must be vectors with a number per seed, for at least two seeds, "
            f"got shapes {values.shape} and {reference.shape}."
        )
    return values - reference
