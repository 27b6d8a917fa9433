"""Projections, kurtosis and the test of Gaussianity, against exact values.

Numbers of many digits were computed elsewhere.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from msgd_jax import measure, noise
from tests.support.mistakes import assert_told
from tests.support.noisy import D, N, dense, problem, within
from tests.support.statistics import assert_agree

KEY = jax.random.key(0)
DIAGONAL = jnp.full((1, D), 1 / np.sqrt(D), jnp.float32)
P = 8 / N
SLOPES = jnp.asarray(dense().gradients @ np.full((D, 1), 1 / np.sqrt(D)), jnp.float32).T


@functools.cache
def projections(law, num_draws=20_000):
    losses, params = problem()
    return measure.noise_projections(
        losses, params, law, KEY, directions=DIAGONAL, num_draws=num_draws
    )


# Projections --------------------------------------------------------------------------------------


@pytest.mark.parametrize("law", [noise.sgd(N, 8), noise.fisher(N, 8)], ids=["sgd", "fisher"])
@pytest.mark.usefixtures("x64")
def test_projections_are_those_of_the_noisy_gradients(law):
    losses, params = problem(jnp.float64, leaves=True, microbatch_size=7)
    directions = measure.random_directions(params, KEY, 3)
    flat = np.concatenate([np.asarray(x).reshape(3, -1) for x in jax.tree.leaves(directions)], 1)
    np.testing.assert_allclose(flat @ flat.T, np.eye(3), atol=1e-12)
    found = measure.noise_projections(
        losses, params, law, KEY, directions=directions, num_draws=5, first_step=7
    )
    np.testing.assert_allclose(found.slopes, flat @ dense().gradients.T, atol=1e-12)
    for k in range(5):
        weights = np.asarray(law.sample(KEY, 7 + k).dense(), np.float64)
        wanted = flat @ (dense().gradients.T @ (weights - 1 / N))
        np.testing.assert_allclose(found.noise[k], wanted, atol=1e-6)


# Kurtosis -----------------------------------------------------------------------------------------

EXACT = {
    "fisher": (noise.fisher(N, 8), 0.0, lambda: 0.0),
    "rademacher": (
        noise.rademacher(N, 2.0),
        -0.4500278271,
        lambda: measure.independent_kurtosis(SLOPES, -2.0),
    ),
    "bernoulli": (
        noise.bernoulli(N, 8),
        0.0562534784,
        lambda: measure.independent_kurtosis(SLOPES, (1 - 6 * P * (1 - P)) / (P * (1 - P))),
    ),
    "student_t": (
        noise.student_t(N, 8, degrees_of_freedom=9.0),
        0.252021282,
        lambda: measure.student_t_kurtosis(SLOPES, 9.0),
    ),
    "replacing": (
        noise.sgd(N, 8, replace=True),
        0.6750886749,
        lambda: measure.sgd_kurtosis(SLOPES, 8, replace=True),
    ),
    "sgd": (noise.sgd(N, 8), -0.0838335778, lambda: measure.sgd_kurtosis(SLOPES, 8)),
    "b = 1": (noise.sgd(N, 1), 5.400709399, lambda: measure.sgd_kurtosis(SLOPES, 1)),
}


@pytest.mark.parametrize("name", EXACT)
def test_projected_kurtosis_is_its_exact_value(name):
    """The closed form has the value computed elsewhere, and the estimate agrees with it."""
    law, wanted, formula = EXACT[name]
    np.testing.assert_allclose(formula(), wanted, rtol=2e-5)
    samples = projections(law).noise[:, 0]
    found = measure.excess_kurtosis(samples)
    within(found, wanted)
    assert found.standard_error < max(0.06, 0.15 * wanted)
    assert found.value == pytest.approx(stats.kurtosis(np.asarray(samples, np.float64)), abs=1e-3)


def test_kurtosis_without_replacement_agrees_with_enumeration():
    """The reference lists all batches of 3 out of 7 examples, in float64."""
    slopes = np.random.default_rng(0).normal(size=7) ** 3
    means = [np.mean(batch) for batch in itertools.combinations(slopes, 3)]
    found = measure.sgd_kurtosis(jnp.asarray(slopes, jnp.float32), 3)
    assert float(found) == pytest.approx(stats.kurtosis(means), rel=1e-4)


def test_the_standard_error_of_a_kurtosis_is_the_spread_of_repetitions():
    """They agree to 15 %, which is four standard errors of the spread of 400 repetitions."""
    samples = jax.random.normal(jax.random.key(2), (400, 2000))
    found = jax.vmap(measure.excess_kurtosis)(samples)
    spread = np.std(found.value, ddof=1)
    assert float(np.median(found.standard_error)) == pytest.approx(float(spread), rel=0.15)
    assert float(spread) == pytest.approx(np.sqrt(24 / 2000), rel=0.15)


def test_students_law_of_four_degrees_has_an_infinite_kurtosis():
    assert measure.student_t_kurtosis(SLOPES, 4.0).tolist() == [np.inf]


# The test of Gaussianity --------------------------------------------------------------------------


def test_mardias_kurtosis_has_the_known_value_under_affine_maps():
    t = np.arange(1, 101)[:, None]
    y = np.sin(2 * np.pi * t * np.sqrt([2, 3, 5]))
    assert float(measure.mardia_kurtosis(jnp.asarray(y, jnp.float32))) == pytest.approx(
        10.294988022974994, rel=2e-5
    )
    moved = y @ np.array([[3.0, 1, 0], [0, 1, 5], [2, 0, 1]]) + 7
    assert float(measure.mardia_kurtosis(jnp.asarray(moved, jnp.float32))) == pytest.approx(
        10.294988022974994, rel=1e-4
    )


@functools.cache
def p_values(law, tests):
    """The p-values of many tests, each of 100 draws along 3 directions."""
    losses, params = problem()
    directions = measure.random_directions(params, KEY, 3)
    found = measure.noise_projections(
        losses, params, law, KEY, directions=directions, num_draws=100 * tests
    )
    samples = found.noise.reshape(tests, 100, 3)
    one = jax.jit(
        jax.vmap(lambda y, key: measure.gaussianity_test(y, key, num_simulations=39).p_value)
    )
    return np.asarray(one(samples, jax.random.split(jax.random.key(9), tests)))


def test_the_test_has_the_level_five_per_cent():
    """The level of the test is exact; from 800 tests it has a standard error of 0.0077.

    The level of the asymptotic test, 0.029, is only 2.7 of these away: the mean of the p-values,
    which is sharper, would reject that test.
    """
    found = p_values(noise.fisher(N, 8), 800)
    error = np.sqrt(0.05 * 0.95 / 800)
    assert_agree((found <= 0.05).mean(), 0.05, error, comparisons=2)
    # The p-values are uniform on 0.05, 0.1, ... 1: the standard error of their mean is 0.0102.
    assert_agree(found.mean(), 0.525, 0.0102, comparisons=2)


def test_the_test_has_power_against_noise_that_is_not_gaussian():
    """For SGD of batch size 1, the power is 1.00."""
    assert (p_values(noise.sgd(N, 1), 100) <= 0.05).mean() > 0.95


def test_the_expected_kurtosis_is_that_of_gaussians():
    samples = jax.random.normal(jax.random.key(1), (2000, 100, 3))
    found = np.asarray(jax.vmap(measure.mardia_kurtosis)(samples))
    expected = measure.gaussianity_test(samples[0], KEY, num_simulations=39).expected
    assert expected == pytest.approx(14.70297, abs=1e-5)
    assert_agree(found.mean(), expected, found.std(ddof=1) / np.sqrt(2000))


# Bad input ----------------------------------------------------------------------------------------


def projected(law=None, num_draws=10, **options):
    losses, params = problem()
    law = noise.cov(N, 8) if law is None else law
    options = {"directions": DIAGONAL, **options}
    return measure.noise_projections(losses, params, law, KEY, num_draws=num_draws, **options)


MISTAKES = {
    "K": (lambda: projected(num_draws=1), "num_draws", "at least 2, got 1"),
    "N": (lambda: projected(noise.cov(41, 8)), "law", "num_examples = 41"),
    "correlated": (
        lambda: projected(noise.random_reshuffling(N, 8)),
        "law",
        "depend on each other",
    ),
    "directions": (lambda: projected(directions=jnp.ones((2, 5))), "directions", "[5]"),
    "many": (
        lambda: measure.random_directions(jnp.ones(3), KEY, 4),
        "num_directions",
        "between 1 and 3, got 4",
    ),
    "few": (lambda: measure.excess_kurtosis(jnp.ones(3)), "samples", "at least 4"),
    "nan": (lambda: measure.excess_kurtosis(jnp.full(5, jnp.nan)), "samples", "finite, got 5 of 5"),
    "whole": (lambda: measure.sgd_kurtosis(jnp.ones(5), 5), "batch_size", "between 1 and 4"),
    "flat": (lambda: measure.gaussianity_test(jnp.ones((4, 3)), KEY), "samples", "(4, 3)"),
    "rank": (
        lambda: measure.gaussianity_test(
            jnp.sin(jnp.arange(20.0))[:, None] * jnp.ones((1, 2)), KEY
        ),
        "samples",
        "span all 2 directions",
    ),
    "simulations": (
        lambda: measure.gaussianity_test(jnp.ones((9, 3)), KEY, num_simulations=38),
        "num_simulations",
        "at least 39",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("user_errors")
def test_messages_name_the_argument_and_are_short(name):
    call, argument, wrong = MISTAKES[name]
    assert_told(call, argument, wrong)
