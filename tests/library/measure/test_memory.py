"""The autocorrelation of gradient noise, against closed forms and exact covariances.

`exact` is what the law states, and `measured` comes from runs: both are held.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import measure, noise
from tests.support.mistakes import assert_told
from tests.support.noisy import D, N, dense, problem
from tests.support.statistics import assert_agree

KEY = jax.random.key(0)


def remembered(law, **options) -> Any:
    losses, params = problem()
    options = {
        "directions": jnp.eye(D),
        "steps": range(20),
        "max_lag": 4,
        "num_runs": 300,
        **options,
    }
    return measure.noise_autocorrelation(losses, params, law, KEY, **options)


AR = np.sqrt(1 - 0.7**2) * 0.7 ** np.arange(30)
COLOURED = {
    "white": ((1.0,), [1, 0, 0, 0, 0]),
    "anti": ((1.0, -1.0), [1, -0.5, 0, 0, 0]),
    "three": ((1.0, 0.5, -0.25), [1, 0.375 / 1.3125, -0.25 / 1.3125, 0, 0]),
    "autoregressive": (tuple(AR), [1, 0.7, 0.49, 0.343, 0.2401]),
}


@pytest.mark.parametrize("name", COLOURED)
def test_coloured_noise_remembers_its_coefficients(name):
    """The autocorrelation is that of a moving average with these coefficients."""
    coefficients, wanted = COLOURED[name]
    law = noise.cov(N, 8)
    found = remembered(noise.coloured(law, coefficients) if len(coefficients) > 1 else law)
    np.testing.assert_allclose(found.exact, wanted, atol=1e-5)
    assert float(found.measured[0]) == pytest.approx(1)
    assert_agree(found.measured, found.exact, found.standard_error, slack=1e-6)
    assert float(found.standard_error[1:].max()) < 0.05


def test_batches_of_an_epoch_repel_each_other():
    """An epoch has five steps, and only pairs of steps in one epoch are correlated.

    The covariance of such a pair is ``-S / (N - 1)``, and that of a step
    ``(N - b) / (b (N - 1)) S``.
    """
    found = remembered(noise.random_reshuffling(N, 8), num_runs=1000)
    for lag in range(1, 5):
        together = 4 * (5 - lag) / (20 - lag)  # the share of pairs that are in the same epoch
        assert float(found.exact[lag]) == pytest.approx(-together * 8 / (N - 8), rel=1e-5)
    assert_agree(found.measured, found.exact, found.standard_error, slack=1e-6)
    # The standard error is small enough to see that the correlation is there.
    assert float(found.exact[1]) < -10 * float(found.standard_error[1])


def test_momentum_remembers_like_a_power_of_the_lag():
    """After 30 steps it is mu^lag, whatever the covariance; from rest it is less."""
    found = remembered(noise.fisher(N, 8), momentum=0.6, steps=range(30, 50))
    np.testing.assert_allclose(found.exact, 0.6 ** np.arange(5), rtol=1e-5)
    assert_agree(found.measured, found.exact, found.standard_error, slack=1e-6)
    assert float(found.standard_error[1:].max()) < 0.05
    from_rest = remembered(noise.fisher(N, 8), momentum=0.9)
    assert float(from_rest.exact[4]) < 0.9**4 - 0.02
    assert_agree(from_rest.measured, from_rest.exact, from_rest.standard_error, slack=1e-6)


def test_exact_covariances_of_laws_that_are_not_centred():
    """Momentum over coloured noise of fisher, by dense algebra of the weights of all steps."""
    law = noise.coloured(noise.fisher(N, 8), (1.0, 0.5))
    found = remembered(law, steps=range(6), max_lag=2, momentum=0.5, num_runs=2)
    rho = {0: 1.25, 1: 0.5}
    gamma = np.array([[rho.get(abs(s - t), 0.0) for t in range(6)] for s in range(6)])
    a = np.tril(0.5 ** np.abs(np.arange(6)[:, None] - np.arange(6)[None]))
    times = a @ gamma @ a.T
    space = np.trace(dense().gradients @ dense().gradients.T) / (8 * N)
    wanted = [np.diagonal(times, lag).mean() * space for lag in range(3)]
    np.testing.assert_allclose(found.exact, np.array(wanted) / wanted[0], rtol=1e-5)


def test_noise_along_the_gradient_may_have_another_memory():
    """The weights are anti-correlated except along the vector of ones, where they are white."""
    law = noise.sum_of(noise.coloured(noise.cov(N, 8), (1.0, -1.0)), noise.fisher(N, 8))
    found = remembered(law, steps=range(5), max_lag=1, num_runs=2)
    s = np.trace(dense().s) / 8
    fisher = s + dense().mean @ dense().mean / 8
    assert float(found.exact[1]) == pytest.approx(-s / (2 * s + fisher), rel=1e-5)


def test_the_standard_error_of_recorded_series_is_the_spread_of_repetitions():
    """For white series they agree to 25 %; the spread of 200 repetitions is known to 5 %."""
    series = jax.random.normal(KEY, (200, 30, 12, 2))
    found = jax.jit(jax.vmap(lambda x: measure.autocorrelation(x, max_lag=2)))(series)
    spread = np.std(found.measured, axis=0, ddof=1)[1:]
    error = np.median(found.standard_error, axis=0)[1:]
    np.testing.assert_allclose(error, spread, rtol=0.25)
    assert found.exact is None


def test_laws_that_state_no_covariance_are_measured_without_one():
    counts = np.ones(N)
    counts[0] = 2.0
    law = noise.reweighted(noise.cov(N, 8), jnp.asarray(counts / counts.mean(), jnp.float32))
    found = remembered(law, num_runs=5, steps=range(5), max_lag=1)
    assert found.exact is None
    assert np.isfinite(np.asarray(found.measured)).all()


MISTAKES = {
    "runs": (lambda: remembered(noise.cov(N, 8), num_runs=1), "num_runs", "at least 2, got 1"),
    "N": (lambda: remembered(noise.cov(41, 8)), "law", "num_examples = 41"),
    "lag": (lambda: remembered(noise.cov(N, 8), max_lag=20), "max_lag", "between 1 and 19, got 20"),
    "momentum": (lambda: remembered(noise.cov(N, 8), momentum=1.0), "momentum", "got 1.0"),
    "a number": (lambda: remembered(noise.cov(N, 8), steps=20), "steps", "got 20 of type int"),
    "every other": (lambda: remembered(noise.cov(N, 8), steps=range(0, 20, 2)), "steps", "2)"),
    "before 0": (lambda: remembered(noise.cov(N, 8), steps=range(-1, 9)), "steps", "range(-1, 9)"),
    "one run": (
        lambda: measure.autocorrelation(jnp.ones((1, 5, 2)), max_lag=1),
        "series",
        "(1, 5, 2)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("user_errors")
def test_messages_name_the_argument_and_are_short(name):
    call, argument, wrong = MISTAKES[name]
    assert_told(call, argument, wrong)
