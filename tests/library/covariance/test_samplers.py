"""Samplers of additive noise: independent draws, and matrices that are not covariances."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import covariance, noise
from tests.library.test_streams import IMPLEMENTATIONS, INTEGERS, correlations
from tests.support.problems import linear
from tests.support.statistics import bound

DENSE = {
    "svd": covariance.svd_sampler,
    "eigh": covariance.eigh_sampler,
    "cholesky": covariance.cholesky_sampler,
}
KEY = jax.random.key(0)

# Streams ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("size", "num_keys"), [(6, 300), (1500, 4)])
def test_draws_are_uncorrelated_with_what_a_user_draws(size, num_keys, impl):
    sampler = covariance.diagonal_sampler(jnp.ones(size))
    z = correlations(lambda key: sampler.sample(key, 2), size, num_keys, impl)
    assert np.abs(z).max() < bound(z.size)


def test_draws_are_uncorrelated_with_the_weights_of_the_same_step():
    """Both are Gaussian, and drawn with the same key and step."""
    sampler, law = covariance.diagonal_sampler(jnp.ones(5000)), noise.fisher(5000, 10)
    pair = sampler.sample(KEY, 2), law.sample(jax.random.key(0), 2).values
    assert abs(np.corrcoef(*pair)[0, 1]) < bound() / np.sqrt(5000)


@pytest.mark.optimized
@pytest.mark.parametrize("shape", [(7,), (7, 1500)], ids=str)
def test_the_x64_flag_changes_no_draw(shape):
    factor = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    drawn = []
    for flag in (False, True):
        with jax.enable_x64(flag):
            drawn.append(covariance.GaussianSampler(jnp.asarray(factor)).sample(KEY, 4))
    assert drawn[1].dtype == jnp.float32
    np.testing.assert_array_equal(*drawn)


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_step_of_any_integer_type_is_that_step(dtype):
    sampler = covariance.diagonal_sampler(jnp.ones(5))
    expected = sampler.sample(KEY, 103)
    draws = [sampler.sample(KEY, step) for step in (dtype.type(103), np.asarray(103, dtype))]
    with jax.enable_x64(True):
        draws.append(sampler.sample(KEY, jnp.asarray(103, dtype)))
        draws.append(jax.jit(sampler.sample)(KEY, jnp.asarray(103, dtype)))
    for draw in draws:
        np.testing.assert_array_equal(draw, expected)


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("step", [-1, np.int8(-1), 2**31, np.int64(2**32)], ids=repr)
def test_steps_out_of_range_are_refused(step):
    with pytest.raises(ValueError, match="step must be between 0 and"):
        covariance.diagonal_sampler(jnp.ones(2)).sample(KEY, step)


# Matrices that are not covariances ----------------------------------------------------------------


def rotated(eigenvalues, dtype=jnp.float32):
    """A symmetric matrix with these eigenvalues."""
    size = len(eigenvalues)
    vectors = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]
    return jnp.asarray((vectors * np.asarray(eigenvalues)) @ vectors.T, dtype)


INDEFINITE = {
    "negative": -jnp.eye(3),
    "one below 0": jnp.diag(jnp.asarray([1.0, 2.0, -0.5])),
    # The eigenvalues 1 and -1 have the same singular value, so that U and V mix their vectors.
    "opposite": jnp.asarray([[0.0, 1.0], [1.0, 0.0]]),
    "a little": rotated([*np.linspace(0, 1, 19), -0.001]),
    "a little, of many": rotated([*np.linspace(0, 1, 299), -0.001]),
    "narrow": jnp.diag(jnp.asarray([1.0, -0.5], jnp.bfloat16)),
    "in a small unit": 1e-19 * jnp.asarray([[1.0, 2.0], [2.0, 1.0]]),
}
NOT_FINITE = [np.nan, np.inf]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("matrix", INDEFINITE.values(), ids=INDEFINITE)
@pytest.mark.parametrize("name", DENSE)
def test_indefinite_matrices_are_refused(name, matrix):
    with pytest.raises(ValueError, match=r"positive semi-definite.*smallest eigenvalue -") as error:
        DENSE[name](matrix)
    assert len(str(error.value)) <= 400


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("name", DENSE)
def test_asymmetric_matrices_are_refused(name):
    matrix = jnp.eye(3).at[0, 2].set(0.01)
    with pytest.raises(ValueError, match=r"symmetric .*got 0.00\d+ at \(0, 2\) and 0.0 at \(2, 0"):
        DENSE[name](matrix)
    # The symmetric part of this matrix is a covariance, but not the one that was asked for.
    with pytest.raises(ValueError, match="matrix must be symmetric"):
        DENSE[name](jnp.asarray([[1.0, 1e-4], [0.0, 1.0]]))


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_covariances_must_be_finite(value):
    for make in DENSE.values():
        with pytest.raises(ValueError, match="matrix must be finite, got 1 entries that are not"):
            make(jnp.eye(3).at[1, 1].set(value))
    with pytest.raises(ValueError, match="variances must be finite"):
        covariance.diagonal_sampler(jnp.ones(3).at[1].set(value))
    with pytest.raises(ValueError, match="gradients of losses must be finite"):
        covariance.gradient_sampler(*linear(jnp.ones((4, 3)).at[1].set(value)), "fisher")


@pytest.mark.usefixtures("user_errors")
def test_negative_variances_are_refused():
    with pytest.raises(ValueError, match=r"variances must be at least 0, got -0.5 at position 1"):
        covariance.diagonal_sampler(jnp.asarray([1.0, -0.5]))
    rounding = covariance.diagonal_sampler(jnp.asarray([1.0, -1e-7]))
    np.testing.assert_array_equal(rounding.factor, [1, 0])


@pytest.mark.parametrize("size", [(7, 300), (300, 7), (4000, 40)], ids=str)
@pytest.mark.parametrize("name", DENSE)
def test_computed_covariances_are_accepted_and_factored(name, size):
    """They are singular or regular, and computed in several ways, from gradients of mean 1."""
    rows = np.random.default_rng(0).normal(size=size).astype(np.float32) + 1
    found = [
        covariance.noise_covariance(*linear(rows), noise.cov(size[0], 5)),
        covariance.sgd_covariance(*linear(rows)),
        covariance.fisher(*linear(rows)),
    ]
    if name != "cholesky":  # which needs a matrix that its jitter makes regular
        found.append(covariance.fisher(*linear(rows)).astype(jnp.bfloat16))
        found.append(covariance.sgd_covariance(*linear(rows), form="definition"))
    for matrix in found:
        wanted = np.asarray(matrix, np.float64)
        factor = np.asarray(DENSE[name](matrix).factor, np.float64)
        # Rounding to bfloat16 makes small eigenvalues negative, and the samplers take them as 0.
        tolerance = 0.1 if matrix.dtype == jnp.bfloat16 else 2e-3
        assert np.linalg.norm(factor @ factor.T - wanted, 2) < tolerance * np.linalg.norm(wanted, 2)


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("through", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_a_covariance_of_zero_gives_no_noise(name, through):
    sampler = through(DENSE[name])(jnp.zeros((3, 3)))
    np.testing.assert_array_equal(sampler.factor, np.zeros((3, 3)))
    np.testing.assert_array_equal(sampler.sample(KEY, 0), np.zeros(3))


def test_singular_matrices_need_jitter_for_cholesky():
    matrix = jnp.ones((3, 3))
    assert jnp.isfinite(covariance.cholesky_sampler(matrix).factor).all()
    with pytest.raises(ValueError, match=r"singular .* jitter = 0.0 of its trace: raise jitter"):
        covariance.cholesky_sampler(matrix - 1e-7 * jnp.eye(3), jitter=0.0)


def test_indefinite_matrices_under_jit_give_what_the_docstrings_state():
    matrix = jnp.diag(jnp.asarray([4.0, -1.0]))
    squares = {
        name: np.asarray(factor @ factor.T)
        for name, factor in ((name, jax.jit(make)(matrix).factor) for name, make in DENSE.items())
    }
    np.testing.assert_allclose(squares["svd"], np.diag([4, 1]), atol=1e-6)
    np.testing.assert_allclose(squares["eigh"], np.diag([4, 0]), atol=1e-6)
    assert np.isnan(squares["cholesky"]).any()
    factor = jax.jit(covariance.diagonal_sampler)(jnp.diag(matrix)).factor
    np.testing.assert_array_equal(factor, [2, 0])
    many = jax.vmap(functools.partial(covariance.cholesky_sampler, jitter=0.0))(
        jnp.stack([jnp.eye(2), jnp.zeros((2, 2))])
    )
    np.testing.assert_array_equal(many.factor, [np.eye(2), np.zeros((2, 2))])


@pytest.mark.usefixtures("user_errors")
def test_bad_input_is_refused():
    for make in DENSE.values():
        with pytest.raises(ValueError, match=r"matrix must be square, got shape \(2, 3\)"):
            make(jnp.ones((2, 3)))
        with pytest.raises(ValueError, match="matrix must be floating point, got int32"):
            make(jnp.ones((2, 2), jnp.int32))
        with pytest.raises(TypeError, match="matrix must be an array, got 'fisher' of type str"):
            make("fisher")
    with pytest.raises(ValueError, match="jitter must be finite and at least 0, got -1"):
        covariance.cholesky_sampler(jnp.eye(2), jitter=-1.0)
    with pytest.raises(ValueError, match=r"vector of floating-point numbers, got shape \(2, 2\)"):
        covariance.diagonal_sampler(jnp.eye(2))
    sampler = covariance.diagonal_sampler(jnp.ones(2))
    with pytest.raises(TypeError, match="key must be a typed PRNG key"):
        sampler.sample(jnp.zeros(2, jnp.uint32), 0)
