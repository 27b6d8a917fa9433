"""What has no unit is the same in every unit of the losses, and unknown errors are not 0."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import complexity, covariance, loss, measure, noise
from msgd_jax.measure import Estimate

KEY = jax.random.key(0)
SAMPLES = jnp.asarray(np.random.default_rng(1).normal(size=400), jnp.float32)
SERIES = jnp.asarray(np.random.default_rng(2).normal(size=(4, 30, 2)), jnp.float32)
ROWS = np.random.default_rng(3).normal(size=(20, 6)).astype(np.float32)
START = 0.3 * jnp.ones(6)


def curved(unit):
    """Losses with a curvature that changes, and so with a Hessian that is not that of squares."""

    def one(params, row):
        along = row @ params
        return unit * (along - row[0] + 0.1 * along**2) ** 2

    return loss.LossVector(loss.per_example(one), jnp.asarray(ROWS))


def aligned(unit):
    found = measure.alignment(curved(unit), START, noise.cov(20, 2), KEY, num_draws=8, num_probes=4)
    return found.alignment, found.cosine, found.participation_ratio


def sharp(unit):
    found = measure.batch_sharpness(curved(unit), START, noise.sgd(20, 2), KEY, num_draws=8)
    return found.ratio_of_expectations.value / unit, found.expectation_of_ratios.value / unit


def ritz(unit):
    matrix = jnp.diag(jnp.arange(1.0, 9.0))
    found = measure.lanczos(lambda v: unit * (matrix @ v), jnp.zeros(8), KEY, num_steps=8)
    return found.values / unit, found.weights


# What has no unit, as a function of the unit of losses or samples, and the units that are tried.
WITHOUT_UNIT = {
    "alignment": (aligned, (1e-6, 1e6)),
    "batch_sharpness": (sharp, (1e-15, 1e9)),
    "lanczos": (ritz, (1e-20, 1e20)),
    "block_index": (
        lambda unit: measure.block_index(unit * SAMPLES, block_size=10),
        (1e-22, 1e-18, 1e18),
    ),
    "hill_index": (lambda unit: measure.hill_index(unit * SAMPLES, num_top=20), (1e-22, 1e22)),
    "excess_kurtosis": (lambda unit: measure.excess_kurtosis(unit * SAMPLES), (1e-18, 1e18)),
    "autocorrelation": (
        lambda unit: measure.autocorrelation(unit * SERIES, max_lag=3),
        (1e-19, 1e19),
    ),
    "independent_kurtosis": (
        lambda unit: measure.independent_kurtosis(unit * SAMPLES, -2.0),
        (1e-10, 1e10),
    ),
    "student_t_kurtosis": (
        lambda unit: measure.student_t_kurtosis(unit * SAMPLES, 6.0),
        (1e-10, 1e10),
    ),
    "sgd_kurtosis": (lambda unit: measure.sgd_kurtosis(unit * SAMPLES, 5), (1e-10, 1e10)),
    "to_multiplicative": (
        lambda unit: (
            covariance.to_multiplicative(curved(1.0), START, unit * jnp.arange(6.0)).residual
        ),
        (1e-22, 1e20),
    ),
}


@pytest.mark.parametrize("name", WITHOUT_UNIT)
def test_numbers_without_a_unit_are_the_same_in_every_unit(name):
    function, units = WITHOUT_UNIT[name]
    usual = function(np.float32(1))
    for unit in units:
        found = function(np.float32(unit))
        for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(usual), strict=True):
            np.testing.assert_allclose(value, wanted, rtol=2e-3, atol=2e-4, err_msg=str(unit))


def population(unit):
    rows = jnp.asarray(5 + SAMPLES[:200])
    losses = loss.LossVector(lambda theta, x: unit * theta * x, rows)
    return measure.noise_scale(losses, jnp.zeros(()), population=True).total


def monitored(unit):
    monitor = measure.noise_scale_monitor(2, batch_size=1)
    state = monitor.init(jnp.zeros(()))
    for x in 2 + SAMPLES[:20]:
        _, state = monitor.update(unit * jnp.asarray(x), state)
    return measure.monitored_noise_scale(state).total


@pytest.mark.parametrize("measured", [population, monitored])
@pytest.mark.parametrize("unit", [1e-7, 1e-5, 1e5, 1e8])
def test_the_interval_of_the_noise_scale_is_the_same_under_jit_and_in_every_unit(measured, unit):
    """It was a tenth as wide under jit from gradients of 1e-5 on, and NaN from 1e5 on."""
    usual = measured(1.0).interval
    for found in (measured(unit), jax.jit(lambda: measured(unit))()):
        np.testing.assert_allclose(found.interval, usual, rtol=2e-3)


def test_an_error_that_underflows_is_unknown_and_not_0():
    rows = jnp.asarray(1 + SAMPLES[:100])

    def linear(params, x):
        return (params["a"] + 1e-12 * params["b"]) * x

    losses = loss.LossVector(linear, rows)
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    found = measure.noise_scale(losses, params, population=True).leaves
    assert 0 < found["a"].interval[0] < found["a"].interval[1] < 10
    assert found["b"].noise_scale.value == pytest.approx(found["a"].noise_scale.value, rel=1e-3)
    assert found["b"].noise_scale.standard_error == np.inf
    assert found["b"].interval == (0.0, np.inf)
    # Draws of noise leave the gradient exact.
    law = noise.cov(100, 5)
    drawn = measure.noise_scale_from_draws(losses, params, law, KEY, num_draws=5).leaves["b"]
    assert drawn.trace.standard_error == np.inf
    assert drawn.squared_gradient.standard_error == 0
    # Without `population` nothing is estimated, and nothing is unknown.
    exact = measure.noise_scale(losses, params).leaves["b"]
    assert exact.noise_scale.standard_error == 0


def test_two_examples_say_nothing_about_the_error_of_their_spread():
    losses = loss.LossVector(lambda theta, x: theta * x, jnp.asarray([1.0, 3.0]))
    found = measure.noise_scale(losses, jnp.zeros(()), population=True).total
    assert found.trace.value == pytest.approx(2)
    assert found.trace.standard_error == np.inf
    assert found.trace.interval == (0.0, np.inf)


def test_blocks_whose_sum_is_0_are_left_out():
    """Sums of two signs are 0, or 2 in size: ln 2 / ln 2 is 1, in any unit."""
    signs = jnp.where(SAMPLES > 0, 1.0, -1.0)
    for unit in (1.0, 10.0, 1e-3):
        found = measure.block_index(unit * signs, block_size=2)
        assert found.estimate.value == pytest.approx(1, rel=1e-5)


def test_equal_samples_have_no_kurtosis():
    assert np.isnan(measure.excess_kurtosis(jnp.full(10, 3.3)).value)


def test_float16_slopes_are_summed_in_float32():
    slopes = jnp.tile(jnp.asarray([1.0, -1.0], jnp.float16), 2000)
    assert float(measure.independent_kurtosis(slopes, -2.0)) == pytest.approx(-2 / 4000)


def test_hills_index_is_nan_where_a_sample_is_nan_and_the_threshold_0():
    samples = jnp.asarray([jnp.nan, 0, 0, 0, 0, 1, 2.0])
    found = jax.jit(lambda x: measure.hill_index(x, num_top=3).estimate)(samples)
    assert np.isnan(found.value)


def test_an_estimate_of_minus_infinity_with_an_infinite_error_excludes_nothing():
    assert Estimate(-np.inf, np.inf).interval == (-np.inf, np.inf)


def test_the_standard_error_of_a_complexity_does_not_underflow():
    def of(unit):
        losses = loss.LossVector(lambda theta, row: unit * (row @ theta), jnp.asarray(ROWS))
        draws = complexity.rademacher(20)
        return complexity.local_complexity(losses, START, draws, radius=0.1, num_draws=8, key=KEY)

    usual, small = float(of(1.0).standard_error), float(of(1e-20).standard_error)
    assert small == pytest.approx(1e-20 * usual, rel=1e-3, abs=0)
    assert usual > 0


def test_a_regulariser_whose_ascent_leaves_the_domain_is_nan():
    """Comparisons with NaN are false: it was the value at the centre, without a word."""
    rows = jnp.asarray([1.0, 2.0, 3.0])
    losses = loss.LossVector(lambda theta, x: x * jnp.log(theta), rows)
    signs = noise.Weights(jnp.asarray([1.0, -1.0, 1.0]), None, 3)

    def penalty(theta):
        return complexity.penalty(losses, theta, signs, radius=0.1)

    value, slope = jax.value_and_grad(penalty)(jnp.asarray(0.05))
    assert np.isnan(value)
    assert np.isnan(slope)
    assert np.isfinite(penalty(jnp.asarray(0.5)))


def test_what_fills_up_a_mixture_does_not_bias_averages():
    """The mean number of the drawn example is 49.5; it was 4.8, as nine of ten were example 0."""
    law = noise.mixture([noise.sgd(100, 10), noise.sgd(100, 1)], [0.0, 1.0])

    def one(theta, x):
        return theta * x, x

    f = loss.noisy_value_and_grad(loss.per_example(one, has_aux=True), law, has_aux=True)
    steps = jnp.arange(2_000)
    (_, aux), _ = jax.vmap(lambda step: f(jnp.ones(()), jnp.arange(100.0), KEY, step))(steps)
    # Six standard errors, 28.9 / sqrt(2000): one false alarm in 5e8.
    assert abs(float(aux.averaged.mean()) - 49.5) < 6 * 28.9 / np.sqrt(2_000)
