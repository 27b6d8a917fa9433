"""Theorem 1: constants, both inequalities by enumeration and sampled, and the counterexample."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special

from msgd_jax import complexity
from tests.support.affine import (
    EXACT,
    KEY,
    affine_losses,
    examples,
    of_problem,
    on_device,
    sample_data,
)
from tests.support.statistics import assert_agree

ALL = {"radius": 1.0, "num_draws": None, **EXACT}


def spike(n):
    """All losses 0 but one, which is 1: the class on which the bounds are attained."""
    return (lambda p, batch: batch + 0 * p), jnp.zeros(()), jnp.zeros(n).at[0].set(1.0)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 1000, 60_000])
def test_the_constant_of_the_gaussian_bound(n):
    """Against scipy's quadrature, and below sqrt(2 ln 2N)."""
    beyond = lambda x: -math.expm1(n * math.log1p(-special.erfc(x / math.sqrt(2))))  # noqa: E731
    expected, _ = integrate.quad(beyond, 1e-12, 12, limit=500)
    found = complexity.expected_max_normal(n)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found <= math.sqrt(2 * math.log(2 * n)) + 1e-9
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        complexity.expected_max_normal(0)


@pytest.mark.slow
@pytest.mark.parametrize("b", [1, 2, 4])
def test_the_counterexample_with_replacement(b):
    """(1 - 1/N)^b / (1 - b/N): 1.0208 and 1.1724 at N = 8. Without replacement equality."""
    ratios, violated = {}, {}
    for replace, bound in itertools.product((False, True), ("paper", "corrected")):
        found = of_problem(
            complexity.sgd_inequality, *spike(8), batch_size=b, replace=replace, bound=bound, **ALL
        )
        assert found.ratio.standard_error == 0
        ratios[replace, bound] = found.ratio.value
        violated[replace, bound] = found.violated
    assert ratios[True, "paper"] == pytest.approx((7 / 8) ** b / (1 - b / 8), rel=1e-5)
    assert ratios[False, "paper"] == ratios[False, "corrected"] == pytest.approx(1, rel=1e-5)
    assert ratios[True, "corrected"] <= 1 + 1e-5
    if b == 1:  # sampling once is sampling once
        assert ratios[True, "corrected"] == pytest.approx(1, rel=1e-5)
    assert violated == {key: key == (True, "paper") and b > 1 for key in ratios}


@pytest.mark.slow
@pytest.mark.parametrize("b", [1, 2, 3, 4, 5])
def test_the_sgd_bounds_on_random_losses(b):
    """N = 6, every b, all draws, both samplings: no corrected bound is exceeded.

    Also where b does not divide N, and beyond N/2, where the other N - b examples bound.
    """
    for replace in (False, True):
        found = of_problem(
            complexity.sgd_inequality,
            affine_losses,
            jnp.zeros(4),
            on_device(examples(6)),
            batch_size=b,
            replace=replace,
            **ALL,
        )
        assert 0.2 < found.ratio.value < 1 + 1e-5
        assert not found.violated
        size = b if replace else min(b, 6 - b)
        law = complexity.rademacher(6, size, replace=replace)
        right = of_problem(
            complexity.local_complexity,
            affine_losses,
            jnp.zeros(4),
            on_device(examples(6)),
            law,
            **ALL,
        )
        assert found.right.mean == pytest.approx(float(right.mean), rel=1e-6)
        assert found.factor == pytest.approx(2 * (5 / 6 if replace else 1 - b / 6))


def test_one_loss_attains_the_left_gaussian_bound():
    """500 draws."""
    lower, upper = of_problem(
        complexity.gaussian_inequalities, *spike(8), radius=1.0, key=KEY, num_draws=500, **EXACT
    )
    assert_agree(lower.ratio.value, 1, lower.ratio.standard_error)
    assert 0.3 < upper.ratio.value < 0.8


@pytest.mark.slow
def test_separate_losses_attain_the_right_gaussian_bound():
    """Sup |sum v_i theta_i^2| over the unit ball is max |v_i|. 500 draws."""
    n = 8
    lower, upper = of_problem(
        complexity.gaussian_inequalities,
        lambda p, batch: jnp.square(batch @ p),
        jnp.zeros(n),
        jnp.eye(n),
        radius=1.0,
        key=KEY,
        num_draws=500,
        num_starts=8,
        num_steps=30,
    )
    np.testing.assert_allclose(n * lower.left.draws, 1, atol=0.03)  # of signs the largest is 1
    assert_agree(upper.ratio.value, 1, upper.ratio.standard_error, slack=0.02)  # the ascents'
    assert lower.ratio.value < 0.6


@pytest.mark.slow
def test_a_measured_ratio_and_its_error():
    """Standard normal losses and slopes, N = 32, b = 8: (1/2) sqrt(k / (k - 1)) with k = N/b.

    200 draws; the standard error by the jackknife.
    """
    found = of_problem(
        complexity.sgd_inequality,
        affine_losses,
        jnp.zeros(4),
        sample_data,
        batch_size=8,
        radius=1.0,
        key=KEY,
        num_draws=200,
        bound="paper",
        **EXACT,
    )
    ratio = found.ratio
    assert_agree(ratio.value, 0.5 * math.sqrt(4 / 3), ratio.standard_error)
    above, below = (np.asarray(x.draws, np.float64) for x in (found.left, found.right))
    means = [np.delete(above, i).mean() / np.delete(below, i).mean() for i in range(200)]
    jackknife = np.sqrt(199**2 / 200 * np.var(means)) / found.factor
    assert ratio.standard_error == pytest.approx(jackknife, rel=0.02)


@pytest.mark.slow
def test_both_parts_together():
    """The same draws as each part by itself; R(G) / R(A) is near 1 for affine losses."""
    problem = (affine_losses, jnp.zeros(4), sample_data)
    options = {"radius": 1.0, "key": KEY, "num_draws": 200, **EXACT}
    found = of_problem(complexity.theorem1, *problem, batch_size=8, **options)
    assert found.violated == ()
    assert (
        found.sgd.ratio
        == of_problem(complexity.sgd_inequality, *problem, batch_size=8, **options).ratio
    )
    lower = found.gaussian_lower.ratio
    assert_agree(lower.value, math.sqrt(2 / math.pi), lower.standard_error, slack=0.0225)
    assert found.gaussian_lower.left.estimate == found.gaussian_upper.right.estimate


def test_a_violation_is_shown():
    left, right = (complexity.Estimate(1.2, 0.05), complexity.Estimate(1.05, 0.05))
    shown = [complexity.Inequality("x <= y", None, None, 1.0, ratio) for ratio in (left, right)]
    assert [inequality.violated for inequality in shown] == [True, False]
    assert str(shown[0]) == "x <= y: ratio 1.2 ± 0.05, VIOLATED"
    assert complexity.Theorem1(shown[1], shown[0], shown[1]).violated == (shown[0],)


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"batch_size": 4, "bound": "paper"},
            r"needs N = k b with k > 1, got batch_size = 4 and N",
        ),
        ({"batch_size": 6}, "batch_size must be between 1 and 5, got 6"),
        ({"batch_size": 0}, "batch_size must be between 1 and 5, got 0"),
        ({"bound": "mine"}, "bound must be one of 'corrected', 'paper', got 'mine'"),
    ],
)
def test_bad_input(wrong, message):
    arguments = {"batch_size": 2, **ALL, **wrong}
    with pytest.raises(ValueError, match=message):
        of_problem(
            complexity.sgd_inequality,
            affine_losses,
            jnp.zeros(4),
            on_device(examples(6)),
            **arguments,
        )


def test_no_ratio_of_zeros():
    with pytest.raises(ValueError, match="The complexities are 0"):
        of_problem(
            complexity.sgd_inequality,
            lambda p, batch: 0 * batch + 0 * p,
            jnp.zeros(()),
            jnp.ones(4),
            batch_size=2,
            **ALL,
        )
