"""Weak orders without sampling: two problems where every expectation is a matrix product.

The iteration ``theta - eta grad(L . W)`` is compared with the SDE with the covariance of
``grad(L . W)`` (Eq. 12), or, for order 2, with the drift -grad(L + eta/4 |grad L|^2). Everything is
in numpy's float64; only the data of the problems are random.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import scipy.linalg
import scipy.stats
from jaxtyping import Complex, Float

from msgd_jax import noise

RATES = (0.02, 0.01, 0.005, 0.0025, 0.00125)
STILL = noise.Exchangeable(0.0, 0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearRegression:
    """Losses (x_i . theta - y_i)^2 / 2: the second moments of theta obey a linear equation.

    With z = (theta, 1), the gradient of loss i is A_i z, so E zz^T obeys an exact recursion.

    Attributes:
        features: x, [N, D].
        labels: y, [N].
        start: theta_0, [D].
    """

    features: Float[np.ndarray, "N D"]
    labels: Float[np.ndarray, " N"]
    start: Float[np.ndarray, " D"]

    @classmethod
    def random(cls, num_examples: int = 20, dim: int = 3, seed: int = 0) -> "LinearRegression":
        """Normal features, noisy labels, a start of ones."""
        rng = np.random.Generator(np.random.Philox(seed))
        features = rng.standard_normal((num_examples, dim))
        labels = features.sum(1) / 2 + rng.standard_normal(num_examples)
        return cls(features, labels, np.ones(dim))

    def iteration(
        self, law: noise.Exchangeable, learning_rate: float, num_steps: int
    ) -> Float[np.ndarray, "D+1 D+1"]:
        """E zz^T after `num_steps` of the iteration whose weights have this covariance."""
        mean = self._gradient_maps().mean(0)
        still = np.eye(len(mean)) - learning_rate * mean
        step = np.kron(still, still) + learning_rate**2 * self._noise(law)
        return self._apply(np.linalg.matrix_power(step, num_steps))

    def sde(
        self, law: noise.Exchangeable, learning_rate: float, time: float, order: int = 1
    ) -> Float[np.ndarray, "D+1 D+1"]:
        """E zz^T at this time for the SDE with this covariance; `order` is that of its drift."""
        drift = self._gradient_maps().mean(0)
        if order == 2:
            drift = drift + learning_rate / 2 * drift @ drift
        identity = np.eye(len(drift))
        generator = -np.kron(drift, identity) - np.kron(identity, drift)
        generator = generator + learning_rate * self._noise(law)
        return self._apply(scipy.linalg.expm(time * generator))

    def mean_loss(self, moments: Float[np.ndarray, "D+1 D+1"]) -> float:
        """E L, from E zz^T."""
        residuals = np.column_stack([self.features, -self.labels])
        return float(np.einsum("ia,ab,ib->", residuals, moments, residuals) / (2 * len(residuals)))

    @staticmethod
    def square_norm(moments: Float[np.ndarray, "D+1 D+1"]) -> float:
        """E |theta|^2, from E zz^T."""
        return float(np.trace(moments[:-1, :-1]))

    def _gradient_maps(self) -> Float[np.ndarray, "N D+1 D+1"]:
        residuals = np.column_stack([self.features, -self.labels])
        padded = np.column_stack([self.features, np.zeros(len(self.features))])
        return np.einsum("ia,ib->iab", padded, residuals)

    def _noise(self, law: noise.Exchangeable) -> Float[np.ndarray, "M M"]:
        """The contribution of the weights' covariance alpha I + beta 11^T to E zz^T."""
        maps = self._gradient_maps()
        own = sum(np.kron(one, one) for one in maps)
        total = maps.sum(0)
        return law.alpha * own + law.beta * np.kron(total, total)

    def _apply(self, evolution: Float[np.ndarray, "M M"]) -> Float[np.ndarray, "D+1 D+1"]:
        z = np.append(self.start, 1.0)
        return (evolution @ np.kron(z, z)).reshape(len(z), len(z))


@dataclasses.dataclass(frozen=True, eq=False)
class PeriodicLosses:
    """One parameter, losses a_i sin(theta + p_i) + c_i cos(2 theta + q_i): bounded and smooth.

    Expectations are functions of the start on a grid of the circle. There an iteration is a matrix,
    by trigonometric interpolation, and so is the SDE, by its generator.

    Attributes:
        amplitudes: a and c, [2, N].
        phases: p and q, [2, N].
        grid: an odd number of starts, evenly spaced on the circle.
    """

    amplitudes: Float[np.ndarray, "2 N"]
    phases: Float[np.ndarray, "2 N"]
    grid: Float[np.ndarray, " n"]

    @classmethod
    def random(cls, num_examples: int = 5, num_points: int = 65, seed: int = 0) -> "PeriodicLosses":
        """Normal amplitudes, uniform phases; `num_points` must be odd."""
        if num_points % 2 == 0:
            raise ValueError(f"num_points must be odd, got {num_points}.")
        rng = np.random.Generator(np.random.Philox(seed))
        amplitudes = rng.standard_normal((2, num_examples)) * np.array([[1.0], [0.5]])
        phases = rng.uniform(0, 2 * np.pi, (2, num_examples))
        return cls(amplitudes, phases, 2 * np.pi * np.arange(num_points) / num_points)

    def losses(self, derivative: int = 0) -> Float[np.ndarray, "N n"]:
        """Every loss at every point of the grid, or a derivative of it."""
        turns = derivative * np.pi / 2
        first, second = self.grid + self.phases[0, :, None], 2 * self.grid + self.phases[1, :, None]
        a, c = self.amplitudes[0, :, None], 2**derivative * self.amplitudes[1, :, None]
        return a * np.sin(first + turns) + c * np.cos(second + turns)

    def sampled(
        self, weights: Float[np.ndarray, "outcomes N"], learning_rate: float
    ) -> Float[np.ndarray, "n n"]:
        """The matrix f -> E f(theta - eta grad(L . W)), W uniform on the rows of `weights`."""
        ends = self.grid - learning_rate * weights @ self.losses(1)
        return self._interpolate(np.mean([self._waves(end) for end in ends], axis=0))

    def gaussian(self, law: noise.Exchangeable, learning_rate: float) -> Float[np.ndarray, "n n"]:
        """That matrix for Gaussian weights with this covariance, by characteristic functions."""
        damping = np.exp(
            -0.5 * np.outer(self.variance(law), (learning_rate * self._frequencies()) ** 2)
        )
        waves = self._waves(self.grid - learning_rate * self.losses(1).mean(0))
        return self._interpolate(damping * waves)

    def sde(
        self, law: noise.Exchangeable, learning_rate: float, time: float, order: int = 1
    ) -> Float[np.ndarray, "n n"]:
        """The matrix f -> E f(Theta_time) of the SDE."""
        slope, curvature = self.losses(1).mean(0), self.losses(2).mean(0)
        drift = -slope if order == 1 else -slope - learning_rate / 2 * curvature * slope
        waves, k = self._waves(self.grid), self._frequencies()
        first, second = self._interpolate(waves * 1j * k), self._interpolate(-waves * k**2)
        diffusion = learning_rate / 2 * self.variance(law)
        return scipy.linalg.expm(time * (drift[:, None] * first + diffusion[:, None] * second))

    def variance(self, law: noise.Exchangeable) -> Float[np.ndarray, " n"]:
        """Var(grad(L . W)) on the grid."""
        gradients = self.losses(1)
        return law.alpha * (gradients**2).sum(0) + law.beta * gradients.sum(0) ** 2

    def harmonics(self) -> Float[np.ndarray, "n 6"]:
        """Cosines and sines of theta, 2 theta and 3 theta: test functions that tell laws apart."""
        waves = self.grid[:, None] * np.arange(1, 4)
        return np.concatenate([np.cos(waves), np.sin(waves)], 1)

    def _frequencies(self) -> Float[np.ndarray, " n"]:
        half = len(self.grid) // 2
        return np.arange(-half, half + 1).astype(float)

    def _waves(self, points: Float[np.ndarray, " n"]) -> Complex[np.ndarray, "n n"]:
        return np.exp(1j * np.outer(points, self._frequencies()))

    def _interpolate(self, waves: Complex[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
        """From the waves of a function's interpolant to its values on the grid."""
        return np.real(waves @ self._waves(self.grid).conj().T) / len(self.grid)


def batches(
    num_examples: int, batch_size: int, *, replace: bool
) -> Float[np.ndarray, "outcomes N"]:
    """The weight vectors of all batches of SGD, equally likely."""
    if replace:
        chosen = itertools.product(range(num_examples), repeat=batch_size)
    else:
        chosen = itertools.combinations(range(num_examples), batch_size)
    counts = [np.bincount(batch, minlength=num_examples) for batch in chosen]
    return np.array(counts) / batch_size


def pairs(weights: Float[np.ndarray, "outcomes N"], refinement: int) -> Float[np.ndarray, "all N"]:
    """The weight vectors of SVAG: all pairs of draws, equally likely."""
    root = np.sqrt(2 * refinement - 1)
    both = (1 + root) / 2 * weights[:, None] + (1 - root) / 2 * weights[None]
    return both.reshape(-1, weights.shape[1])


def order(abscissae: Sequence[float], errors: Sequence[float]) -> float:
    """The slope of log error against log abscissa."""
    slope = np.asarray(scipy.stats.linregress(np.log(abscissae), np.log(errors)))[0]
    return float(slope)


def table() -> list[dict[str, Any]]:
    """The weak orders of comparisons with and without power, and of SVAG as it tends to the SDE.

    Returns:
        Rows with keys "group", "label", "expected", "abscissa", "learning_rates", "errors" and
        "order"; for SVAG, "learning_rates" are 1/l.
    """
    return [*_regression_rows(), *_periodic_rows(), *_svag_rows()]


def _row(
    group: str,
    label: str,
    expected: float,
    error: Callable[[float], float],
    abscissae: Sequence[float] = RATES,
    abscissa: str = "learning rate $\\eta$",
) -> dict[str, Any]:
    errors = [error(x) for x in abscissae]
    return {
        "group": group,
        "label": label,
        "expected": expected,
        "abscissa": abscissa,
        "learning_rates": list(abscissae),
        "errors": errors,
        "order": order(abscissae, errors),
    }


def _regression_rows() -> list[dict[str, Any]]:
    problem, n, b = LinearRegression.random(), 20, 4
    replacing, without = (noise.sgd(n, b, replace=r).covariance for r in (True, False))
    cov = noise.cov(n, b).covariance

    def row(
        label: str,
        expected: float,
        iteration: noise.Exchangeable,
        sde: noise.Exchangeable,
        drift: int,
    ) -> dict[str, Any]:
        def error(eta: float) -> float:
            ends = (
                problem.iteration(iteration, eta, round(1 / eta)),
                problem.sde(sde, eta, 1, drift),
            )
            return abs(problem.mean_loss(ends[0]) - problem.mean_loss(ends[1]))

        return _row("exact: linear regression, g = L", label, expected, error)

    return [
        row("SGD or M-SGD-Cov, SDE (12)", 1, replacing, cov, 1),
        row("SGD, noise-free flow", 1, replacing, STILL, 1),
        row("SGD, modified SDE", 2, replacing, replacing, 2),
        row("SGD, modified flow without noise", 1, replacing, STILL, 2),
        row("SGD without replacement, modified SDE with its own noise", 2, without, without, 2),
        row("SGD without replacement, modified SDE with S/b", 1, without, replacing, 2),
    ]


def _periodic_rows() -> list[dict[str, Any]]:
    problem, n, b = PeriodicLosses.random(), 5, 2
    g = problem.losses().mean(0)
    cov, fisher = noise.cov(n, b).covariance, noise.fisher(n, b).covariance
    draws = batches(n, b, replace=True)

    def row(
        label: str,
        expected: float,
        step: Callable[[float], Float[np.ndarray, "n n"]],
        law: noise.Exchangeable,
        drift: int,
    ) -> dict[str, Any]:
        def error(eta: float) -> float:
            iteration = np.linalg.matrix_power(step(eta), round(1 / eta))
            return float(np.abs((iteration - problem.sde(law, eta, 1, drift)) @ g).max())

        return _row("exact: periodic losses, sup over starts", label, expected, error)

    def sgd(eta: float) -> Float[np.ndarray, "n n"]:
        return problem.sampled(draws, eta)

    def msgd(eta: float) -> Float[np.ndarray, "n n"]:
        return problem.gaussian(fisher, eta)

    return [
        row("SGD, SDE (12)", 1, sgd, cov, 1),
        row("SGD, noise-free flow", 1, sgd, STILL, 1),
        row("SGD, modified SDE", 2, sgd, cov, 2),
        row("M-SGD-Fisher, its modified SDE", 2, msgd, fisher, 2),
        row("SGD, modified flow without noise", 1, sgd, STILL, 2),
        row("SGD, modified SDE of Fisher", 1, sgd, fisher, 2),
    ]


def _svag_rows() -> list[dict[str, Any]]:
    """SVAG at a fixed eta against the SDE (12) of SGD, with l times the steps of eta/l."""
    problem, eta, time = PeriodicLosses.random(), 0.5, 2.0
    draws = batches(5, 2, replace=True)
    goal = problem.sde(noise.cov(5, 2).covariance, eta, time) @ problem.harmonics()

    def error(share: float) -> float:
        refinement = round(1 / share)
        step = problem.sampled(pairs(draws, refinement), eta * share)
        end = np.linalg.matrix_power(step, round(time / eta) * refinement)
        return float(np.abs(end @ problem.harmonics() - goal).max())

    shares = [1 / refinement for refinement in (4, 8, 16, 32, 64)]
    group = "exact: SVAG at learning rate 0.5, six test functions"
    return [_row(group, "SVAG of SGD, SDE (12)", 1, error, shares, "1 / refinement")]
