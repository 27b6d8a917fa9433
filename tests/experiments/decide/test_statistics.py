"""The statistics of the study, compared with closed forms, scipy, hand values and simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from experiments.decide import statistics
from tests.support.statistics import assert_agree, assert_rejected


def normals(seed: int, *shape: int) -> np.ndarray:
    """Standard normal numbers."""
    return np.random.default_rng(seed).normal(size=shape)


def test_a_difference_has_students_interval_and_p_value():
    x, y = normals(0, 2, 12)
    got = statistics.difference(x, y)
    d = x - y
    half = stats.t.ppf(0.975, 11) * d.std(ddof=1) / math.sqrt(12)
    assert (got.mean, got.low, got.high) == pytest.approx(
        (d.mean(), d.mean() - half, d.mean() + half)
    )
    assert got.p_value == pytest.approx(stats.ttest_rel(x, y).pvalue)
    assert got.num_seeds == 12


def test_equal_runs_differ_by_nothing_and_are_equivalent():
    x = normals(0, 5)
    assert statistics.difference(x, x) == (0.0, 0.0, 0.0, 1.0, 5)
    assert statistics.equivalence(x, x, 0.1) == 0.0
    assert statistics.share_of_gap(x, x, x + 1.0) == pytest.approx((0.0, 0.0, 0.0))


def test_the_p_value_of_equivalence_is_5_percent_where_the_90_percent_interval_ends():
    """Two one-sided tests at 5 % reject just where the interval lies within the margin."""
    x, y = normals(1, 2, 30)
    interval = statistics.difference(x, y, confidence=0.9)
    edge = max(abs(interval.low), abs(interval.high))
    assert statistics.equivalence(x, y, edge) == pytest.approx(0.05, abs=1e-9)
    assert statistics.equivalence(x, y, 1.1 * edge) < 0.05 < statistics.equivalence(x, y, edge / 2)


def test_holm_by_hand():
    # In ascending order: 4 x 0.005 = 0.02, 3 x 0.01 = 0.03 and 2 x 0.03 = 0.06. The last one,
    # 1 x 0.04, is raised to the one before it.
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.01, 0.5], 5) == pytest.approx([0.05, 1.0])
    with pytest.raises(ValueError, match="family_size must be at least the 2"):
        statistics.holm([0.1, 0.2], 1)


def test_the_ends_of_the_share_are_where_the_difference_it_implies_is_rejected():
    """Fieller's interval has those shares for which scipy's t-test does not reject 0 at 5 %."""
    gd, closed, gap = normals(2, 3, 25)
    values, sgd = gd + 1.5 + closed, gd + 3.0 + gap
    share = statistics.share_of_gap(values, gd, sgd)
    assert share.low < share.estimate < share.high
    for end in (share.low, share.high):
        rest = (values - gd) - end * (sgd - gd)
        assert stats.ttest_1samp(rest, 0.0).pvalue == pytest.approx(0.05, abs=1e-9)


def test_fiellers_interval_covers_as_often_as_it_says():
    """Of 2,000 studies of 20 seeds, 95 % cover the true share of a half, and not 93 %.

    Intervals of 50 % confidence cover it in half of the studies.
    """
    rng, hits, hits_of_half = np.random.default_rng(3), 0, 0
    for _ in range(2_000):
        shared, own, gap = rng.normal(size=(3, 20))
        gd = np.zeros(20)
        sgd, values = 2.0 + gap + shared, 1.0 + own + shared
        share = statistics.share_of_gap(values, gd, sgd)
        hits += share.low <= 0.5 <= share.high
        half = statistics.share_of_gap(values, gd, sgd, confidence=0.5)
        hits_of_half += half.low <= 0.5 <= half.high
    for found, wanted, wrong in ((hits, 0.95, 0.92), (hits_of_half, 0.5, 0.44)):
        error = math.sqrt(wanted * (1 - wanted) / 2_000)
        assert_agree(found / 2_000, wanted, error, comparisons=2)
        assert_rejected(found / 2_000, wrong, error, comparisons=2)


def test_without_a_clear_gap_a_share_has_no_bounds():
    gd, values, sgd = normals(4, 3, 10)
    share = statistics.share_of_gap(values, gd, sgd)
    assert share.low == -math.inf
    assert share.high == math.inf


def test_pairs_have_to_match():
    with pytest.raises(ValueError, match="at least two seeds"):
        statistics.difference(np.ones(1), np.ones(1))
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        statistics.difference(np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="margin must be positive, got 0"):
        statistics.equivalence(np.ones(2), np.ones(2), 0.0)
