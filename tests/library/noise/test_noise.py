"""Moments of the laws' draws against the stated ones, and near misses that must be seen."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import noise
from tests.support.noises import ROWS, cases
from tests.support.statistics import bound

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(20240229)
NUM_DRAWS = 40_000
Z = bound(3)  # the mean, the diagonal and the rest of the covariance


@functools.cache
def draws(name: str, n: int, b: int) -> np.ndarray:
    """Draws NUM_DRAWS weights in float32, and returns them as float64: [NUM_DRAWS, N]."""
    law = ROWS[name].make(n, b)
    sample = jax.jit(jax.vmap(lambda step: law.sample(jax.random.fold_in(KEY, step), step).dense()))
    return np.asarray(sample(jnp.arange(NUM_DRAWS)), np.float64)


def z_scores(w: np.ndarray, covariance: noise.Exchangeable) -> dict[str, float]:
    """How many standard errors the sample moments are from the stated ones.

    Every draw gives one number per moment, the mean over exchangeable entries. The standard error
    is that of these numbers. Gaps that the rounding of float32 weights explains count as none.
    """
    n = w.shape[1]
    deviation = w - 1 / n
    squares = (deviation**2).mean(1)
    statistics = {"mean": (deviation.mean(1), 0.0), "diagonal": (squares, covariance.diagonal)}
    if n > 1:
        products = (deviation.sum(1) ** 2 - (deviation**2).sum(1)) / (n * (n - 1))
        statistics["off_diagonal"] = (products, covariance.off_diagonal)
    rounding = 1e-6 * max(1 / n**2, covariance.diagonal)
    scores = {}
    for name, (values, expected) in statistics.items():
        allowed = rounding if name != "mean" else 1e-6 / n
        error = max(abs(values.mean() - expected) - allowed, 0.0)
        spread = values.std(ddof=1) / np.sqrt(len(values))
        scores[name] = error / spread if error > 0 else 0.0
    return scores


@pytest.mark.parametrize(
    ("name", "n", "b"),
    [
        *cases((1, 1), (100, 10)),
        # These are few enough examples to be enumerated, which `test_exact.py` does.
        *cases((7, 3)),
    ],
)
def test_moments_agree_with_monte_carlo(name, n, b):
    scores = z_scores(draws(name, n, b), ROWS[name].make(n, b).covariance)
    assert max(scores.values()) < Z, scores


@pytest.mark.parametrize(("name", "n", "b"), cases((7, 3), (100, 10)))
def test_every_entry_has_its_moments(name, n, b):
    """No entry and no pair of entries is special: each is within its own standard error."""
    w = draws(name, n, b)
    covariance = ROWS[name].make(n, b).covariance
    deviation = w - 1 / n
    error = deviation.T @ deviation / len(w) - covariance.matrix(n)
    variance = (deviation**2).T @ (deviation**2) / len(w) - (deviation.T @ deviation / len(w)) ** 2
    spread = np.sqrt(np.maximum(variance, 0) / len(w)) + 1e-7 * max(1 / n**2, covariance.diagonal)
    most = bound(n * n + n)
    assert np.abs(error / spread).max() < most
    mean_spread = np.sqrt(covariance.diagonal / len(w)) + 1e-7 / n
    assert np.abs(deviation.mean(0) / mean_spread).max() < most


@pytest.mark.parametrize("name", [name for name in ROWS if name != "gd"])
def test_wrong_variances_are_rejected(name):
    stated = ROWS[name].make(100, 10).covariance
    for factor in (0.95, 1.05):
        wrong = noise.Exchangeable(stated.diagonal * factor, stated.off_diagonal)
        assert z_scores(draws(name, 100, 10), wrong)["diagonal"] > Z


def test_near_misses_of_the_paper_are_rejected():
    # Section 5.2 prints the Bernoulli weights as 1/N + 1/b and 1/N, whose mean is 2/N.
    printed = draws("bernoulli", 100, 10) + 1 / 100
    assert z_scores(printed, noise.bernoulli(100, 10).covariance)["mean"] > Z
    # Without Bessel's correction, [Cov-m] would be (m - 1) N / (m (N - 1)) times what it should be.
    naive = noise.Exchangeable(*(x * 49 * 100 / (50 * 99) for x in _pair("estimated_cov")))
    assert z_scores(draws("estimated_cov", 100, 10), naive)["diagonal"] > Z
    # The weights of cov add up to 1, and those of fisher do so only in the mean.
    assert z_scores(draws("fisher", 100, 10), noise.cov(100, 10).covariance)["off_diagonal"] > Z
    assert z_scores(draws("cov", 100, 10), noise.fisher(100, 10).covariance)["off_diagonal"] > Z


def _pair(name: str) -> tuple[float, float]:
    covariance = ROWS[name].make(100, 10).covariance
    return covariance.diagonal, covariance.off_diagonal


@pytest.mark.parametrize("name", [name for name in ROWS if name != "gd"])
def test_draws_differ_across_steps_keys_and_examples(name):
    law = ROWS[name].make(100, 10)
    first, other_step = law.sample(KEY, 0).dense(), law.sample(KEY, 1).dense()
    other_key = law.sample(jax.random.key(1), 0).dense()
    assert (first != other_step).any()
    assert (first != other_key).any()
    assert np.unique(first).size > 1
