"""Products with the Hessian, its trace and its spectrum, against numpy's float64 and ARPACK."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from msgd_jax import covariance, loss, measure, noise
from tests.support.mistakes import assert_told
from tests.support.noisy import D, N, dense, problem, within
from tests.support.statistics import assert_agree

KEY = jax.random.key(0)
# These were computed elsewhere: the largest Ritz value after 1 to 6 steps from a vector of ones,
# the trace, and the squared norm.
TOP = [0.3798561552, 0.8258199997, 1.1634571455, 1.2185969319, 1.2212340329, 1.2212341177]
TRACE, NORM2 = -0.6067437141177827, 5.372995044630875


# The Hessian --------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 7])
@pytest.mark.usefixtures("x64")
def test_products_with_hessians_of_mean_and_weighted_losses_are_dense_ones(microbatch_size):
    losses, params = problem(jnp.float64, leaves=True, microbatch_size=microbatch_size)
    vector = {"a": jnp.ones((2, 1)), "b": jnp.arange(4.0)}
    flat = np.concatenate([leaf.ravel() for leaf in vector.values()])
    product = measure.hessian_product(losses, params)
    np.testing.assert_allclose(ravel_pytree(product(vector))[0], dense().h @ flat, rtol=1e-11)
    for law in (noise.cov(N, 8), noise.sgd(N, 8)):
        weights = law.sample(KEY, 0)
        found = measure.hessian_product(losses, params, weights)(vector)
        wanted = np.einsum(
            "i,ijk,k->j", np.asarray(weights.dense(), np.float64), dense().hessians, flat
        )
        np.testing.assert_allclose(ravel_pytree(found)[0], wanted, rtol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_hessian_is_a_symmetric_operator_of_lineax():
    losses, params = problem(jnp.float64, leaves=True)
    operator = measure.hessian_operator(losses, params)
    assert lineax.is_symmetric(operator)
    assert not lineax.is_positive_semidefinite(operator)
    np.testing.assert_allclose(operator.as_matrix(), dense().h, rtol=1e-10, atol=1e-12)


def test_without_lineax_the_error_states_what_to_install():
    script = (
        "import sys; sys.modules['lineax'] = None\n"
        "from msgd_jax import measure\n"
        "measure.hessian_operator(None, None)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert "pip install 'msgd-jax[solvers]'" in ran.stderr
    assert "hessian_product" in ran.stderr


@pytest.mark.parametrize(("kind", "variance"), [("rademacher", 9.964), ("gaussian", 10.746)])
def test_probes_estimate_the_trace_and_the_norm(kind, variance):
    """The standard error must be right to 10 %, which is 4.5 of its own from 2,000 probes."""
    losses, params = problem()
    found = measure.hessian_trace(losses, params, KEY, num_probes=2000, kind=kind)
    within(found.trace, TRACE, comparisons=2)
    within(found.squared_norm, NORM2, comparisons=2)
    assert found.trace.standard_error == pytest.approx(np.sqrt(variance / 2000), rel=0.1)


# Lanczos ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_ritz_values_from_a_given_start_have_the_known_values():
    losses, params = problem(jnp.float64)
    product = measure.hessian_product(losses, params)
    for steps, wanted in ((3, TOP[2]), (6, TOP[5])):
        ritz = measure.lanczos(product, params, KEY, num_steps=steps, start=jnp.ones(D))
        assert float(ritz.values[0]) == pytest.approx(wanted, abs=2e-10)
        # Every Ritz value has an eigenvalue within its residual.
        gaps = np.abs(np.asarray(ritz.values)[:, None] - np.linalg.eigvalsh(dense().h)).min(1)
        assert (gaps <= np.asarray(ritz.residuals) + 1e-10).all()
        assert float(ritz.weights.sum()) == pytest.approx(1)
        start = np.ones(D) / np.sqrt(D)
        assert float(ritz.values @ ritz.weights) == pytest.approx(start @ dense().h @ start)


@pytest.mark.parametrize("leaves", [False, True])
def test_as_many_steps_as_parameters_find_all_eigenvalues(leaves):
    losses, params = problem(leaves=leaves)
    ritz = measure.hessian_eigenvalues(losses, params, KEY, num_steps=D)
    np.testing.assert_allclose(ritz.values, np.linalg.eigvalsh(dense().h)[::-1], atol=3e-5)


def test_large_problems_agree_with_arpack():
    from scipy.sparse.linalg import eigsh

    rng = np.random.default_rng(0)
    root = rng.normal(size=(300, 300)) * np.linspace(0.1, 2, 300)
    matrix = jnp.asarray(root + root.T, jnp.float32)
    run = jax.jit(
        lambda key: measure.lanczos(
            lambda v: jnp.matmul(matrix, v, precision="highest"), jnp.zeros(300), key, num_steps=80
        )
    )
    ritz = run(KEY)
    ends = eigsh(np.asarray(matrix, np.float64), k=6, which="BE", return_eigenvectors=False)
    found = np.sort(np.concatenate([ritz.values[:3], ritz.values[-3:]]))
    np.testing.assert_allclose(found, np.sort(ends), rtol=1e-4)


@pytest.mark.parametrize("eigenvalues", [[3.0, 3, 1, 0, 0, 0], [0.0] * 6, [2.0] * 6])
def test_exhausted_starts_continue_in_new_directions(eigenvalues):
    """Eigenvalues that are repeated or zero are found with their multiplicity, and none is NaN."""
    values = jnp.asarray(eigenvalues)
    ritz = measure.lanczos(lambda v: values * v, jnp.ones(6), KEY, num_steps=6, start=jnp.ones(6))
    np.testing.assert_allclose(ritz.values, eigenvalues, atol=1e-5)
    assert np.isfinite(np.asarray(ritz.residuals)).all()


def test_lanczos_takes_operators_of_covariances():
    losses, params = problem(leaves=True)
    operator = covariance.sgd_covariance_operator(losses, params)
    ritz = measure.lanczos(operator.mv, params, KEY, num_steps=D)
    assert float(ritz.values[0]) == pytest.approx(2.4001245970726464, rel=1e-5)


def test_spectral_density_has_the_moments_of_the_spectrum():
    """Its first two moments are tr H / D and |H|_F^2 / D, over 300 starts, and its mass is 1."""
    values = np.linspace(-1, 2, 40) ** 3
    losses = loss.LossVector(
        loss.per_example(lambda p, x: x * (p * p) @ jnp.asarray(values / 2, jnp.float32)),
        jnp.ones(3),
    )
    density = measure.hessian_density(losses, jnp.zeros(40), KEY, num_steps=10, num_starts=300)
    for power in (1, 2):
        of_starts = (density.ritz.values**power * density.ritz.weights).sum(-1)
        error = of_starts.std(ddof=1) / np.sqrt(300)
        wanted = (values**power).mean()
        assert_agree(of_starts.mean(), wanted, error, comparisons=2, degrees_of_freedom=299)
    grid = jnp.linspace(-4, 12, 400)
    mean, error = density.density(grid, width=0.3)
    assert float(np.trapezoid(mean, grid)) == pytest.approx(1, abs=1e-3)
    exact = np.exp(-((grid[:, None] - values[None]) ** 2) / 0.18).mean(1) / np.sqrt(0.18 * np.pi)
    # One start has only 10 points for 40 eigenvalues: the average over starts is compared.
    assert np.abs(mean - exact).max() < 0.1 * exact.max()
    assert (np.asarray(error) >= 0).all()


# Bad input ----------------------------------------------------------------------------------------


def unfinished():
    losses, params = problem()
    data = {**losses.data, "x": losses.data["x"].at[2].set(jnp.nan)}
    return losses.replace(data=data), params


MISTAKES = {
    "probes": (
        lambda: measure.hessian_trace(*problem(), KEY, num_probes=1),
        "num_probes",
        "at least 2, got 1",
    ),
    "kind": (
        lambda: measure.hessian_trace(*problem(), KEY, num_probes=2, kind="signs"),
        "kind",
        "'rademacher'",
    ),
    "steps": (
        lambda: measure.hessian_eigenvalues(*problem(), KEY, num_steps=7),
        "num_steps",
        "between 1 and 6, got 7",
    ),
    "loss": (
        lambda: measure.hessian_trace(*unfinished(), KEY, num_probes=2),
        "losses",
        "nan of example 2",
    ),
    "types": (
        lambda: measure.hessian_operator(
            problem()[0], {"a": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(4)}
        ),
        "params",
        "bfloat16, float32",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("user_errors")
def test_messages_name_the_argument_and_are_short(name):
    call, argument, wrong = MISTAKES[name]
    assert_told(call, argument, wrong)
