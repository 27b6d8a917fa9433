"""How far something random may be from its expectation: one rule for every statistical test.

Keys are fixed, so that a test which passes once always passes. The bounds decide how likely a
correct library fails a test when the test is written, or when the draws change.
"""

import math

import numpy as np
import scipy.stats

FALSE_ALARMS = 1e-5
"""The probability that a test of something correct fails, for all of its comparisons together."""


def bound(
    comparisons: int = 1,
    false_alarms: float = FALSE_ALARMS,
    *,
    degrees_of_freedom: float = math.inf,
) -> float:
    """The number of standard errors that all comparisons stay within, but for `false_alarms`.

    The bound is two-sided, and Bonferroni's rule shares the probability out: it is 4.4 for one
    comparison and 5.5 for 300. Where standard errors come from few draws, and so have finite
    degrees of freedom, it is by Student's t: 5.0 for one comparison with 40.
    """
    return float(scipy.stats.t.isf(false_alarms / (2 * comparisons), degrees_of_freedom))


def assert_agree(
    measured,
    expected,
    standard_error,
    *,
    comparisons: int | None = None,
    slack=0.0,
    degrees_of_freedom: float = math.inf,
) -> None:
    """Asserts that estimates are within `bound` standard errors of what they estimate.

    Args:
        measured: the estimates, an array or a number.
        expected: the exact values, of a shape that broadcasts.
        standard_error: the standard error of each estimate.
        comparisons: the number of comparisons in the whole test, or None if all are given here.
        slack: how much each estimate may be off besides, by rounding or a bias that is known.
        degrees_of_freedom: those of the standard errors, as in `bound`.
    """
    measured, expected, standard_error, slack = np.broadcast_arrays(
        *(np.asarray(x, np.float64) for x in (measured, expected, standard_error, slack))
    )
    comparisons = max(measured.size, 1) if comparisons is None else comparisons
    most = bound(comparisons, degrees_of_freedom=degrees_of_freedom)
    gap = np.abs(measured - expected)
    outside = ~(gap <= most * standard_error + slack)  # With ~, NaN is outside too.
    if outside.any():
        worst = np.unravel_index(np.argmax(np.where(outside, gap, -1)), gap.shape)
        raise AssertionError(
            f"{outside.sum()} of {gap.size} outside {most:.2f} standard errors, at {worst}: "
            f"{measured[worst]:.6g} ± {standard_error[worst]:.2g} for {expected[worst]:.6g}"
        )


def assert_rejected(measured, wrong, standard_error, **options) -> None:
    """Asserts that `assert_agree` fails with a near miss: at least one estimate is outside.

    Args:
        measured: the estimates, an array or a number.
        wrong: the values of the near miss, which the estimates must be able to tell apart.
        standard_error: the standard error of each estimate.
        **options: the options of `assert_agree`.
    """
    try:
        assert_agree(measured, wrong, standard_error, **options)
    except AssertionError:
        return
    raise AssertionError(f"{measured} ± {standard_error} does not reject {wrong}")
