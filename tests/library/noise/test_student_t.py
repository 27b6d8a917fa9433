"""Student's t weights: their law against SciPy's, far into the tails, and exact centring."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from msgd_jax import noise
from msgd_jax.noise import _building_blocks, _student_t
from tests.support.statistics import FALSE_ALARMS, assert_agree

pytestmark = pytest.mark.usefixtures("strict_dtypes")

KEY = jax.random.key(5)
SIZE = 2_000_000


def variates(nu: float, size: int = SIZE) -> np.ndarray:
    draw = jax.jit(lambda key: _student_t._variates(key, size, nu, jnp.dtype("float32")))
    return np.asarray(draw(jax.random.fold_in(KEY, int(100 * nu))), np.float64)


@pytest.mark.parametrize("nu", [2.1, 3.0, 10.0, 1e6])
def test_the_law_is_students(nu):
    """By the test of Kolmogorov and Smirnov, which rejects 0.3 more degrees of freedom."""
    draws = variates(nu)
    assert scipy.stats.kstest(draws, scipy.stats.t(nu).cdf).pvalue > FALSE_ALARMS
    if nu < 4:
        assert scipy.stats.kstest(draws, scipy.stats.t(nu + 0.3).cdf).pvalue < FALSE_ALARMS


@pytest.mark.parametrize("nu", [2.1, 3.0, 10.0])
def test_the_tails_are_students(nu):
    """Of 2,000,000 draws, 2,000, 200 and 20 are expected beyond SciPy's quantiles."""
    draws = np.abs(variates(nu))
    for probability in (1e-3, 1e-4, 1e-5):
        beyond = (draws > scipy.stats.t(nu).isf(probability / 2)).sum()
        pvalue = scipy.stats.binomtest(int(beyond), SIZE, probability).pvalue
        assert pvalue > FALSE_ALARMS / 3, f"{beyond} beyond, {SIZE * probability} expected"


def test_uniforms_keep_their_bits_where_they_are_small():
    words = jnp.asarray([[0, 0, 1, 2**31, 2**32 - 1], [0, 1, 0, 0, 2**32 - 1]], jnp.uint32)
    found = np.asarray(_student_t._uniform(words, jnp.dtype("float32")), np.float64)
    wanted = [2.0**-65, 1.5 * 2.0**-64, 2.0**-32 + 2.0**-65, 0.5, 1.0]
    np.testing.assert_allclose(found, wanted, rtol=2.0**-23)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("nu", [2.1, 3.0])
def test_centring_is_exact_to_rounding_under_heavy_tails(dtype, nu, x64):
    """The reference subtracts a mean that is taken in float64."""
    size = 100_003
    values = _student_t._variates(jax.random.key(6), size, nu, jnp.dtype(dtype))
    centred = np.asarray(jax.jit(_building_blocks.centre_symmetric)(values), np.float64)
    exact = np.asarray(values, np.float64) - np.asarray(values, np.float64).mean()
    unit = np.finfo(dtype).eps
    # Each difference is rounded, and so is the mean that is subtracted from all.
    tolerance = unit * np.abs(exact) + 4 * unit * np.abs(np.asarray(values).mean())
    assert np.all(np.abs(centred - exact) <= tolerance + 1e-300)


def test_centring_bears_one_value_a_million_times_the_others():
    values = jax.random.normal(jax.random.key(7), (1000,)).at[3].set(1e6)
    exact = np.asarray(values, np.float64) - np.asarray(values, np.float64).mean()
    centred = np.asarray(_building_blocks.centre_symmetric(values), np.float64)
    np.testing.assert_allclose(centred, exact, rtol=2e-7, atol=4 * 2.0**-23 * 1e6 / 1000)


def test_the_weight_of_one_example_is_one():
    np.testing.assert_array_equal(
        noise.student_t(1, 1, degrees_of_freedom=3).sample(KEY, 0).dense(), [1.0]
    )


def test_fourth_moments_are_students_and_approach_the_normal_ones():
    """The excess kurtosis is 6 / (nu - 4), and approaches zero."""
    for nu, excess in ((30.0, 6 / 26), (1e6, 0.0)):
        draws = variates(nu)
        fourth = (draws / np.sqrt(nu / (nu - 2))) ** 4
        error = fourth.std() / np.sqrt(SIZE)
        assert_agree(fourth.mean(), 3 + excess, error, comparisons=2)


@pytest.mark.parametrize("value", [2, 2.0, 1.5, 0, -3.0, float("nan"), float("inf")])
def test_degrees_of_freedom_without_a_variance_are_refused(value, user_errors):
    with pytest.raises(ValueError, match=r"degrees_of_freedom must be finite and above 2.*got"):
        noise.student_t(10, 2, degrees_of_freedom=value)


@pytest.mark.parametrize("value", ["3", None, True, 3j])
def test_degrees_of_freedom_are_a_number(value, user_errors):
    with pytest.raises(TypeError, match=r"degrees_of_freedom must be a number, got"):
        noise.student_t(10, 2, degrees_of_freedom=value)
