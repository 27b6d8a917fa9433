"""Lines through measured errors: against numpy's, and how often their intervals hold the truth."""

import functools
import math

import jax
import numpy as np
import pytest

from msgd_jax import noise, sde
from tests.support.problems import of_sde
from tests.support.sde_problems import logistic

RATES = (0.1, 0.05, 0.025, 0.0125)


class TestFits:
    x = np.log([0.1, 0.05, 0.025, 0.0125])

    def test_a_weighted_line_is_that_of_numpy(self):
        rng = np.random.default_rng(0)
        y, errors = 5 * rng.normal(size=4), rng.uniform(0.1, 1, size=4)
        fit = sde.fit_line(self.x, y, errors)
        coefficients, covariance = np.polyfit(self.x, y, 1, w=1 / errors, cov="unscaled")
        residuals = (y - np.polyval(coefficients, self.x)) / errors
        chi_square = residuals @ residuals
        assert fit.chi_square == pytest.approx(chi_square)
        assert fit.p_value == pytest.approx(math.exp(-chi_square / 2))
        assert fit.degrees_of_freedom == 2
        assert chi_square > 2  # so that standard errors grow by Birge's ratio
        expected = np.sqrt(np.diag(covariance) * chi_square / 2)
        assert fit.slope[:3] == pytest.approx((coefficients[0], expected[0], 2))
        assert fit.intercept[:3] == pytest.approx((coefficients[1], expected[1], 2))

    def test_standard_errors_of_a_line_that_fits_are_those_of_its_points(self):
        y, errors = 2 * self.x + np.array([0.01, -0.02, 0.01, 0.0]), np.array([0.1, 0.2, 0.1, 0.3])
        fit = sde.fit_line(self.x, y, errors)
        coefficients, covariance = np.polyfit(self.x, y, 1, w=1 / errors, cov="unscaled")
        assert fit.chi_square < 0.1
        assert fit.p_value > 0.9
        assert fit.slope[:3] == pytest.approx(
            (coefficients[0], math.sqrt(covariance[0, 0]), math.inf)
        )
        # The variance of the slope is a weighted sum of the variances of the points, whose degrees
        # of freedom are Satterthwaite's.
        few = sde.fit_line(self.x, y, errors, 5)
        assert few.slope[:2] == fit.slope[:2]
        parts = errors**-2 * (self.x - np.average(self.x, weights=errors**-2)) * errors
        assert few.slope.degrees_of_freedom == pytest.approx(
            5 * (parts**2).sum() ** 2 / (parts**4).sum()
        )

    def test_two_points_have_the_smaller_degrees_of_freedom(self):
        fit = sde.fit_line(self.x[:2], 2 * self.x[:2], np.array([0.1, 0.2]), np.array([9, 5]))
        assert fit.slope.degrees_of_freedom == 5
        assert fit.intercept.degrees_of_freedom == 5

    def test_without_standard_errors_the_residuals_take_their_place(self):
        y = np.random.default_rng(1).normal(size=4)
        fit = sde.fit_line(self.x, y, np.zeros(4))
        coefficients, covariance = np.polyfit(self.x, y, 1, cov=True)
        assert fit.slope[:3] == pytest.approx((coefficients[0], math.sqrt(covariance[0, 0]), 2))
        assert math.isnan(fit.p_value)
        two = sde.fit_line(self.x[:2], y[:2], np.zeros(2)).slope
        assert two.value == pytest.approx((y[1] - y[0]) / (self.x[1] - self.x[0]))
        assert math.isnan(two.standard_error)

    def test_the_error_model_finds_its_coefficients(self):
        eta = np.exp(self.x)
        errors = np.sqrt(0.3**2 * eta**2 + 0.7 * eta**3)
        model = sde.ErrorSweep(eta, errors, 0.01 * errors).error_model
        assert model.deterministic.value == pytest.approx(0.3)
        assert model.noise.value == pytest.approx(0.7)
        noise_only = sde.ErrorSweep(eta, eta**1.5, 0.01 * eta**1.5).error_model.deterministic
        assert noise_only.value < 3 * noise_only.standard_error + 1e-6

    def test_errors_of_zero_have_no_order(self):
        with pytest.raises(ValueError, match="errors must not be 0"):
            _ = sde.ErrorSweep(np.array([0.1, 0.2]), np.zeros(2), np.zeros(2)).order

    def test_one_learning_rate_has_no_order(self):
        with pytest.raises(ValueError, match="two different"):
            _ = sde.ErrorSweep(np.array([0.1]), np.array([1.0]), np.array([0.1])).order


def power_law(rng, draws, sampled, rates=RATES):
    """A sweep whose true errors are eta^p, estimated from some draws; and p.

    Args:
        rng: numpy's generator.
        draws: how many draws each error is estimated from.
        sampled: the law of the draws: squares of distances, or "weak" for normal differences.
        rates: the learning rates.
    """
    rates, shape = np.array(rates), (len(rates), draws)
    if sampled == "weak":
        values = np.array(rates)[:, None] ** 2 + rng.normal(size=shape) * 3e-5 * math.sqrt(draws)
        errors, spread = values.mean(1), values.std(1, ddof=1) / math.sqrt(draws)
        return sde.ErrorSweep(rates, errors, spread, draws - 1), 2
    squares = (
        rates[:, None] ** 2
        * {
            "one dimension": lambda: rng.chisquare(1, shape),
            "five dimensions": lambda: rng.chisquare(5, shape) / 5,
            "log-normal": lambda: np.exp(rng.normal(size=shape) - 0.5),
        }[sampled]()
    )
    errors = np.sqrt(squares.mean(1))
    spread = squares.std(1, ddof=1) / math.sqrt(draws) / (2 * errors)
    return sde.ErrorSweep(rates, errors, spread, draws - 1), 1


def coverage(intervals, truth):
    return np.mean([low <= truth <= high for low, high in intervals])


class TestIntervals:
    """How many of the stated 95 % intervals cover the truth.

    Of 600 sweeps, the fraction has a standard error of 0.9 %. The bounds allow for three of them,
    since the intervals themselves are approximate.
    """

    @pytest.mark.parametrize("draws", [4, 10, 66])
    @pytest.mark.parametrize("sampled", ["one dimension", "five dimensions", "log-normal", "weak"])
    def test_intervals_of_orders_cover_as_stated(self, draws, sampled):
        rng = np.random.default_rng(draws)
        sweeps = [power_law(rng, draws, sampled) for _ in range(600)]
        covered = coverage([sweep.order.interval for sweep, _ in sweeps], sweeps[0][1])
        assert 0.92 <= covered <= 0.98

    @pytest.mark.parametrize(
        ("draws", "sampled"), [(4, "one dimension"), (10, "log-normal"), (66, "weak")]
    )
    def test_intervals_of_orders_from_two_learning_rates_cover_as_stated(self, draws, sampled):
        """Of 2,000 sweeps. With Satterthwaite's degrees of freedom: 0.897, 0.909 and 0.945."""
        rng = np.random.default_rng(draws + 1000)
        sweeps = [power_law(rng, draws, sampled, RATES[:2]) for _ in range(2000)]
        covered = coverage([sweep.order.interval for sweep, _ in sweeps], sweeps[0][1])
        assert 0.92 <= covered <= 0.98

    @pytest.mark.parametrize("draws", [32, 66])
    def test_intervals_of_error_models_cover_as_stated(self, draws):
        """The squares of the errors are eta^2 + 3 eta^3, estimated in five dimensions."""
        rng, rates = np.random.default_rng(draws), np.array(RATES)
        a, c = [], []
        for _ in range(600):
            squares = (rates**2 + 3 * rates**3)[:, None] * rng.chisquare(5, (4, draws)) / 5
            errors = np.sqrt(squares.mean(1))
            spread = squares.std(1, ddof=1) / math.sqrt(draws) / (2 * errors)
            model = sde.ErrorSweep(rates, errors, spread, draws - 1).error_model
            a.append(model.deterministic.interval)
            c.append(model.noise.interval)
        assert 0.92 <= coverage(a, 1) <= 0.98
        assert 0.92 <= coverage(c, 3) <= 0.98

    def test_a_curve_widens_the_interval_of_its_slope(self):
        """The errors eta + eta^2 have the order 1.012 at one end and 1.091 at the other.

        They are known to 0.1 %. From that alone, the interval would be 1.037 to 1.041.
        """
        rates = np.array(RATES)
        sizes = rates + rates**2
        sweep = sde.ErrorSweep(rates, sizes, 0.001 * sizes, 10_000)
        fit = sweep.order_fit
        assert fit.p_value < 1e-10
        assert sweep.order.degrees_of_freedom == 2
        low, high = sweep.order.interval
        assert low < 1.0123 < high
        assert 0.05 < high - low < 0.2

    def test_an_error_model_needs_32_paths(self):
        sweep, _ = power_law(np.random.default_rng(0), 31, "five dimensions")
        with pytest.raises(ValueError, match=r"num_paths must be at least 32 .* got 31"):
            _ = sweep.error_model

    @pytest.mark.slow
    def test_intervals_from_four_paths_cover_the_order_of_many(self):
        """At least 6 of 8 intervals cover the order from 2,000 paths.

        Fewer would do so with a probability of 0.006 if each covers it with 95 %.
        """
        run = functools.partial(
            of_sde,
            sde.strong_error,
            *logistic(32),
            noise.cov(32, 32),
            learning_rates=[0.1, 0.05, 0.025],
            horizon=0.2,
            num_paths=4,
            substeps=2,
        )
        truth = run(num_paths=2_000, key=jax.random.key(1)).order.value
        orders = [run(key=jax.random.key(100 + seed)).order for seed in range(8)]
        assert sum(low <= truth <= high for low, high in (o.interval for o in orders)) >= 6
