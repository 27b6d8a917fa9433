"""The exact weak orders, and the matrices from which they are computed."""

import itertools

import numpy as np
import pytest

from experiments.theory import weak_order
from experiments.theory.weak_order import STILL, LinearRegression, PeriodicLosses
from msgd_jax import noise


@pytest.fixture(scope="module")
def rows():
    """The rows of the table of weak orders."""
    return weak_order.table()


def test_every_order_is_as_expected(rows):
    """Slopes over finite learning rates are within 0.1 of the orders, which differ by 1.

    Order 2 needs the right noise, while a flow without noise has order 1 too.
    """
    for row in rows:
        assert abs(row["order"] - row["expected"]) < 0.1, row["label"]
        assert (np.diff(row["errors"]) < 0).all(), row["label"]
    expected = [row["expected"] for row in rows]
    assert expected.count(2) == 4
    assert expected.count(1) == 9


def test_the_table_tells_the_right_noise_from_the_wrong_one(rows):
    """With the wrong noise, the error at the smallest learning rate is over ten times as large."""
    last = {(row["group"], row["label"]): row["errors"][-1] for row in rows}
    for group, right, wrong in (
        ("linear", "SGD, modified SDE", "SGD, modified flow without noise"),
        ("periodic", "SGD, modified SDE", "SGD, modified SDE of Fisher"),
    ):
        size = {label: error for (name, label), error in last.items() if group in name}
        assert size[wrong] > 10 * size[right]


class TestLinearRegression:
    """Moments of the iteration and of the SDE, compared with enumeration and closed forms."""

    problem = LinearRegression.random(num_examples=3, dim=2, seed=1)

    @pytest.mark.parametrize("replace", [True, False])
    def test_iteration_is_the_mean_over_all_batches(self, replace):
        """The reference enumerates all pairs of batches of two steps."""
        eta, draws = 0.1, weak_order.batches(3, 2, replace=replace)
        law = noise.sgd(3, 2, replace=replace).covariance
        x, y = self.problem.features, self.problem.labels
        moments = []
        for two in itertools.product(draws, repeat=2):
            theta = self.problem.start
            for w in two:
                theta = theta - eta * (w * (x @ theta - y)) @ x
            z = np.append(theta, 1)
            moments.append(np.outer(z, z))
        got = self.problem.iteration(law, eta, 2)
        np.testing.assert_allclose(got, np.mean(moments, 0), rtol=1e-12)
        assert self.problem.square_norm(got) == pytest.approx(np.trace(got) - 1)
        square, cross = (x @ got[:2, :2] * x).sum(1), x @ got[:2, 2]
        loss = (square - 2 * y * cross + y**2).mean() / 2
        assert self.problem.mean_loss(got) == pytest.approx(loss)

    def test_flow_without_noise_is_the_limit_of_gradient_descent(self):
        fine = self.problem.iteration(STILL, 1e-5, 100_000)
        np.testing.assert_allclose(self.problem.sde(STILL, 0.1, 1.0), fine, rtol=1e-4)

    def test_one_dimension_with_labels_alone_is_an_ornstein_uhlenbeck_process(self):
        """With the feature 1 and labels +-s, gradients are theta -+ s: the noise is constant."""
        s, eta, time, b = 0.7, 0.3, 1.5, 4
        problem = LinearRegression(np.ones((2, 1)), np.array([s, -s]), np.array([2.0]))
        got = problem.sde(noise.Exchangeable(1 / (4 * b), -1 / (4 * b)), eta, time)
        variance = eta * s**2 / b * (1 - np.exp(-2 * time)) / 2
        assert got[0, 1] == pytest.approx(2 * np.exp(-time))
        assert got[0, 0] == pytest.approx(4 * np.exp(-2 * time) + variance)
        modified = problem.sde(STILL, eta, time, order=2)
        assert modified[0, 1] == pytest.approx(2 * np.exp(-(1 + eta / 2) * time))


class TestPeriodicLosses:
    """Operators on the grid, compared with enumeration, quadrature and closed forms."""

    problem = PeriodicLosses.random()
    law = noise.fisher(5, 2).covariance

    def test_derivatives_are_those_of_finite_differences(self):
        step = 1e-5
        moved = PeriodicLosses(
            self.problem.amplitudes, self.problem.phases, self.problem.grid + step
        )
        for derivative in (0, 1):
            slope = (moved.losses(derivative) - self.problem.losses(derivative)) / step
            np.testing.assert_allclose(slope, self.problem.losses(derivative + 1), atol=1e-3)

    def test_step_of_sgd_is_the_mean_over_its_outcomes(self):
        weights, eta = weak_order.batches(5, 2, replace=False), 0.2
        got = self.problem.sampled(weights, eta) @ np.cos(2 * self.problem.grid + 0.3)
        ends = self.problem.grid - eta * weights @ self.problem.losses(1)
        np.testing.assert_allclose(got, np.cos(2 * ends + 0.3).mean(0), atol=1e-12)

    def test_gaussian_step_is_the_mean_by_quadrature(self):
        eta = 0.2
        nodes, masses = np.polynomial.hermite_e.hermegauss(40)
        noises = np.outer(nodes, eta * np.sqrt(self.problem.variance(self.law)))
        ends = self.problem.grid - eta * self.problem.losses(1).mean(0) + noises
        expected = masses @ np.sin(ends + 0.1) / masses.sum()
        got = self.problem.gaussian(self.law, eta) @ np.sin(self.problem.grid + 0.1)
        np.testing.assert_allclose(got, expected, atol=1e-12)

    def test_variance_is_that_of_the_outcomes(self):
        outcomes = weak_order.batches(5, 2, replace=True) @ self.problem.losses(1)
        law = noise.sgd(5, 2, replace=True).covariance
        np.testing.assert_allclose(self.problem.variance(law), outcomes.var(0), atol=1e-12)

    def test_generator_without_drift_is_the_heat_equation(self):
        """Four losses cancel: L is 0, and the sum of g_i^2, 2 sin^2 + 2 cos^2, is constant."""
        amplitudes = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
        phases = np.array([[0, np.pi, np.pi / 2, -np.pi / 2], [0.0, 0.0, 0.0, 0.0]])
        problem = PeriodicLosses(amplitudes, phases, self.problem.grid)
        law = noise.Exchangeable(0.3, 0.0)  # The variance is 0.3 * 2 = 0.6 everywhere.
        got = problem.sde(law, 0.5, 2.0) @ np.cos(3 * problem.grid)
        decay = np.exp(-0.5 * 0.5 * 0.6 * 9 * 2.0)
        np.testing.assert_allclose(got, decay * np.cos(3 * problem.grid), atol=1e-10)

    def test_drift_is_the_gradient_flow(self):
        small = np.linalg.matrix_power(self.problem.gaussian(STILL, 1e-4), 10_000)
        flow = self.problem.sde(STILL, 0.1, 1.0)
        g = np.sin(self.problem.grid)
        np.testing.assert_allclose(flow @ g, small @ g, atol=1e-3)

    def test_pairs_have_the_covariance_of_svag(self):
        weights = weak_order.pairs(weak_order.batches(5, 2, replace=False), 3)
        law = noise.svag(noise.sgd(5, 2), 3).covariance
        covariance = (weights - 1 / 5).T @ (weights - 1 / 5) / len(weights)
        np.testing.assert_allclose(weights.mean(0), 1 / 5, atol=1e-12)
        np.testing.assert_allclose(covariance, law.matrix(5), atol=1e-12)

    def test_the_grid_must_be_odd(self):
        with pytest.raises(ValueError, match="num_points must be odd, got 64"):
            PeriodicLosses.random(num_points=64)
