"""Tail indices against numbers that were computed elsewhere, also where no tail is heavy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import measure, noise
from tests.library.measure.test_tails import DIAGONAL, projections
from tests.support.mistakes import assert_told
from tests.support.noisy import D, N, problem, within
from tests.support.statistics import assert_agree, bound

KEY = jax.random.key(0)


def test_hill_indices_of_known_samples():
    samples = jnp.arange(1.0, 13.0)
    found = measure.hill_index(samples, num_top=3)
    assert found.estimate.value == pytest.approx(5.05294404388614, rel=1e-5)
    assert found.estimate.standard_error == pytest.approx(5.05294404388614 / np.sqrt(3), rel=1e-5)
    rng = np.random.default_rng
    checked = {"standard_normal": 4.612379351298437, "standard_cauchy": 1.0467494159960529}
    for name, wanted in checked.items():
        samples = jnp.asarray(getattr(rng(0), name)(10_000), jnp.float32)
        found = measure.hill_index(samples, num_top=1000)
        assert found.estimate.value == pytest.approx(wanted, rel=1e-4)


@pytest.mark.slow
def test_hill_indices_of_gaussian_and_heavy_noise():
    for share, wanted in ((2000, 4.717482130), (1000, 5.998456720), (200, 9.004106013)):
        found = measure.hill_index(projections(noise.fisher(N, 8)).noise[:, 0], num_top=share)
        assert found.without_tails == pytest.approx(wanted, rel=1e-8)
        within(found.estimate, wanted, comparisons=4)
    # The mean of other runs was 2.40, with a spread of 0.08.
    heavy = projections(noise.student_t(N, 8, degrees_of_freedom=2.1), 10_000).noise[:, 0]
    found = measure.hill_index(heavy, num_top=1000).estimate
    assert_agree(found.value, 2.40, 0.08, comparisons=4)
    # Ties at the top make the index infinite.
    assert measure.hill_index(jnp.ones(10), num_top=3).estimate.value == np.inf


def test_block_indices_of_known_samples():
    found = measure.block_index(jnp.arange(1.0, 13.0), block_size=3)
    assert found.estimate.value == pytest.approx(0.9739543539140694, rel=1e-5)
    rng = np.random.default_rng
    checked = {"standard_normal": 2.0848402677822193, "standard_cauchy": 1.0358883160384371}
    for name, wanted in checked.items():
        samples = jnp.asarray(getattr(rng(0), name)(10_000), jnp.float32)
        found = measure.block_index(samples, block_size=100)
        assert found.estimate.value == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("law", "vector", "scalar"),
    [(noise.cov(N, 8), 2.0, 2.0), (noise.sgd(N, 1), 1.6095, 2.0524)],
    ids=["cov", "sgd, b = 1"],
)
@pytest.mark.slow
def test_block_indices_of_bounded_noise_look_heavy_and_their_limit_says_so(law, vector, scalar):
    """Both limits without tails were computed elsewhere, and the estimates are at the limits."""
    losses, params = problem()
    directions = jnp.eye(D)
    vectors = measure.noise_projections(
        losses, params, law, KEY, directions=directions, num_draws=10_000
    ).noise
    for samples, wanted in ((vectors, vector), (vectors @ DIAGONAL[0], scalar)):
        found = measure.block_index(samples, block_size=100)
        assert found.without_tails == pytest.approx(wanted, abs=0.02)
        within(found.estimate, found.without_tails, comparisons=2)
    # Vectors of a bounded law look as if their tails were heavy: the index is far below 2.
    if vector < 2:
        found = measure.block_index(vectors, block_size=100).estimate
        assert found.value + 10 * found.standard_error < 2


def test_the_limit_without_tails_is_that_of_gaussian_norms():
    """For samples of two scales; the reference simulates 400,000 Gaussian vectors."""
    signs = np.sign(np.sin(np.arange(1, 2001)))[:, None] * np.array([[1.0, 0.0]])
    other = np.sign(np.sin(3 * np.arange(1, 2001)))[:, None] * np.array([[0.0, 3.0]])
    samples = signs + other
    found = measure.block_index(jnp.asarray(samples, jnp.float32), block_size=10).without_tails
    cov = samples.T @ samples / 2000
    normal = np.random.default_rng(0).multivariate_normal([0, 0], cov, 400_000)
    logs = np.log(np.linalg.norm(normal, axis=1))
    mean, error = logs.mean(), logs.std() / np.sqrt(400_000)
    log = np.log(10)  # of the block size; and all samples have the squared norm 10
    low, high = (1 / (0.5 + (mean + z * error - log / 2) / log) for z in (bound(), -bound()))
    assert low < found < high


def test_directions_without_noise_do_not_change_the_limit():
    """More directions than samples have their eigenvalues computed from another matrix."""
    samples = jnp.stack([jnp.sin(jnp.arange(40.0) * x) for x in (1.0, 2.3, 5.1)], 1)
    wide = jnp.concatenate([samples, jnp.zeros((40, 60))], 1)
    found, wanted = (measure.block_index(x, block_size=10).without_tails for x in (wide, samples))
    assert found == pytest.approx(wanted, rel=1e-5)


VECTORS = jnp.sin(jnp.arange(60.0)).reshape(20, 3)
ESTIMATORS = {
    "block_index": lambda x: measure.block_index(x, block_size=5),
    "hill_index": lambda x: measure.hill_index(x[:, 1], num_top=3),
    "excess_kurtosis": lambda x: measure.excess_kurtosis(x[:, 1]),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_sample_that_is_nan_makes_traced_estimates_nan(name):
    """Outside of `jax.jit` such samples are refused; none is left out as if it were 0."""
    estimator = ESTIMATORS[name]
    found = jax.jit(estimator)(VECTORS.at[3, 1].set(jnp.nan))
    estimate = getattr(found, "estimate", found)
    assert np.isnan(estimate.value)
    assert np.isnan(estimate.standard_error)
    assert np.isfinite(jax.tree.leaves(jax.jit(estimator)(VECTORS))[0])


MISTAKES = {
    "top": (lambda: measure.hill_index(jnp.ones(9), num_top=9), "num_top", "between 1 and 8"),
    "blocks": (lambda: measure.block_index(jnp.ones(9), block_size=5), "block_size", "got 5"),
    "nan": (
        lambda: measure.block_index(VECTORS.at[3, 1].set(jnp.nan), block_size=5),
        "samples",
        "finite, got 1 of 20",
    ),
    "infinite": (
        lambda: measure.hill_index(VECTORS[:, 0].at[4:6].set(jnp.inf), num_top=3),
        "samples",
        "got 2 of 20 with entries that are not, number 4 first",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("user_errors")
def test_messages_name_the_argument_and_are_short(name):
    call, argument, wrong = MISTAKES[name]
    assert_told(call, argument, wrong)
