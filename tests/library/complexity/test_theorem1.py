"""Theorem 1: its constants, both inequalities, enumerated and sampled, and the counterexample."""

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
    """All losses are 0 except one, which is 1: the class for which the bounds are attained."""
    return (lambda p, batch: batch + 0 * p), jnp.zeros(()), jnp.zeros(n).at[0].set(1.0)


@pytest.mark.parametrize("n", [1, 2, 8, 64, 1000, 60_000])
def test_the_constant_of_the_gaussian_bound_is_the_mean_maximum(n):
    """The reference is SciPy's quadrature. The paper's constant sqrt(2 ln 2N) is above it."""
    beyond = lambda x: -math.expm1(n * math.log1p(-special.erfc(x / math.sqrt(2))))  # noqa: E731
    expected, _ = integrate.quad(beyond, 1e-12, 12, limit=500)
    found = complexity.expected_max_normal(n)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found <= math.sqrt(2 * math.log(2 * n)) + 1e-9
    with pytest.raises(ValueError, match="num_examples must be at least 1, got 0"):
        complexity.expected_max_normal(0)


@pytest.mark.slow
@pytest.mark.parametrize("b", [1, 2, 4])
def test_the_counterexample_violates_the_bound_with_replacement(b):
    """With replacement, the ratio is ``(1 - 1/N)^b / (1 - b/N)``, above 1 for b = 2 and 4.

    Without replacement there is equality, and the corrected bound holds.
    """
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
    if b == 1:  # one example is drawn alike with and without replacement
        assert ratios[True, "corrected"] == pytest.approx(1, rel=1e-5)
    assert violated == {key: key == (True, "paper") and b > 1 for key in ratios}


@pytest.mark.slow
@pytest.mark.parametrize("b", [1, 2, 3, 4, 5])
def test_the_corrected_sgd_bounds_hold_for_random_losses(b):
    """All draws are enumerated, for N = 6 and every b, with and without replacement.

    Some b do not divide N. Beyond N/2, the bound is that of the other N - b examples.
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
    """Of 500 draws, the ratio of the left bound is 1 within its standard error."""
    lower, upper = of_problem(
        complexity.gaussian_inequalities, *spike(8), radius=1.0, key=KEY, num_draws=500, **EXACT
    )
    assert_agree(lower.ratio.value, 1, lower.ratio.standard_error)
    assert 0.3 < upper.ratio.value < 0.8


@pytest.mark.slow
def test_separate_losses_attain_the_right_gaussian_bound():
    """For losses theta_i^2, the supremum over the unit ball is max |v_i|, here of 500 draws."""
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
    np.testing.assert_allclose(n * lower.left.draws, 1, atol=0.03)  # max |v_i| of signs is 1
    # The ascents may end up to 2 % below the supremum.
    assert_agree(upper.ratio.value, 1, upper.ratio.standard_error, slack=0.02)
    assert lower.ratio.value < 0.6


@pytest.mark.slow
def test_a_sampled_ratio_and_its_standard_error():
    """For standard normal losses and slopes, it is (1/2) sqrt(k / (k - 1)) with k = N/b = 4.

    The standard error from 200 draws agrees with the jackknife.
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
def test_theorem1_has_the_draws_of_its_parts():
    """The ratio of the lower Gaussian bound is known: suprema are proportional to ||v||.

    The data are standard normal and drawn anew, so that nothing else of v counts. ||v|| is
    sqrt(32) for signs, and a chi with 32 degrees of freedom for normals.
    """
    problem = (affine_losses, jnp.zeros(4), sample_data)
    options = {"radius": 1.0, "key": KEY, "num_draws": 200, **EXACT}
    found = of_problem(complexity.theorem1, *problem, batch_size=8, **options)
    assert found.violated == ()
    assert (
        found.sgd.ratio
        == of_problem(complexity.sgd_inequality, *problem, batch_size=8, **options).ratio
    )
    lower = found.gaussian_lower.ratio
    chi = math.sqrt(2) * math.gamma(16.5) / math.gamma(16)
    expected = math.sqrt(2 / math.pi) * math.sqrt(32) / chi
    assert_agree(lower.value, expected, lower.standard_error)
    assert lower.standard_error < 0.05
    assert found.gaussian_lower.left.estimate == found.gaussian_upper.right.estimate


def test_a_violation_is_reported():
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
def test_bad_arguments_are_refused(wrong, message):
    arguments = {"batch_size": 2, **ALL, **wrong}
    with pytest.raises(ValueError, match=message):
        of_problem(
            complexity.sgd_inequality,
            affine_losses,
            jnp.zeros(4),
            on_device(examples(6)),
            **arguments,
        )


def test_a_ratio_of_zeros_is_refused():
    with pytest.raises(ValueError, match="The complexities are 0"):
        of_problem(
            complexity.sgd_inequality,
            lambda p, batch: 0 * batch + 0 * p,
            jnp.zeros(()),
            jnp.ones(4),
            batch_size=2,
            **ALL,
        )
