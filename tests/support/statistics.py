"""How far from a number may something random be: one rule for every statistical test.

Keys are fixed, so a test that passes passes always; what these bounds decide is how likely it was
that a correct library fails a test when it was written, or when draws change.
"""

import math

import numpy as np
import scipy.stats

FALSE_ALARMS = 1e-5
"""The probability that a test of something correct fails, all of its comparisons together."""


def bound(
    comparisons: int = 1,
    false_alarms: float = FALSE_ALARMS,
    *,
    degrees_of_freedom: float = math.inf,
) -> float:
    """How many standard errors so many comparisons stay within, but for that probability.

    Two-sided, shared out by Bonferroni: 4.4 for one, 5.5 for 300. By Student's t where standard
    errors have finite degrees of freedom, since they come from few draws: 5.0 for one with 40.
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
    """Asserts that estimates are within their standard errors of what they estimate.

    Args:
        measured: estimates, an array or a number.
        expected: what they estimate, of a shape that broadcasts.
        standard_error: of each.
        comparisons: how many there are in the whole test; None for those given here.
        slack: what the estimates may be off besides: rounding, a bias that is known.
        degrees_of_freedom: of the standard errors, as in `bound`.
    """
    measured, expected, standard_error, slack = np.broadcast_arrays(
        *(np.asarray(x, np.float64) for x in (measured, expected, standard_error, slack))
    )
    comparisons = max(measured.size, 1) if comparisons is None else comparisons
    most = bound(comparisons, degrees_of_freedom=degrees_of_freedom)
    gap = np.abs(measured - expected)
    outside = ~(gap <= most * standard_error + slack)  # what is not a number is outside
    if outside.any():
        worst = np.unravel_index(np.argmax(np.where(outside, gap, -1)), gap.shape)
        raise AssertionError(
            f"{outside.sum()} of {gap.size} outside {most:.2f} standard errors, at {worst}: "
            f"{measured[worst]:.6g} ± {standard_error[worst]:.2g} for {expected[worst]:.6g}"
        )


def assert_rejected(measured, wrong, standard_error, **options) -> None:
    """Asserts that a near miss would be seen: `assert_agree` with it fails.

    Args:
        measured: estimates, an array or a number.
        wrong: what they do not estimate.
        standard_error: of each.
        **options: of `assert_agree`.
    """
    try:
        assert_agree(measured, wrong, standard_error, **options)
    except AssertionError:
        return
    raise AssertionError(f"{measured} ± {standard_error} does not reject {wrong}")
