"""The SDE through diffrax: the same increments, the same path; Itô and Stratonovich."""

import math

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import pytest

from experiments.sde_problems import logistic
from msgd_jax import covariance, noise, sde
from tests.problems import loss_vector_fn, regression

# diffrax's tree of Brownian increments reads a key twice, on branches of which one is taken.
pytestmark = pytest.mark.usefixtures("unchecked_key_reuse")

N, B, ETA = 20, 4, 0.2
LAW = noise.cov(N, B)


def motion():
    return diffrax.VirtualBrownianTree(0.0, 1.0, tol=2**-10, shape=(N,), key=jax.random.key(2))


@pytest.mark.parametrize("order", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_euler_agrees_with_our_own_loop_on_the_same_increments(x64, order):
    problem, key = logistic(N, dtype=jnp.float64), jax.random.key(0)
    steps, substeps = 5, 4
    increments = jnp.concatenate([
        sde.brownian_increments(key, step, N, substeps=substeps, dtype=jnp.float64)
        for step in range(steps)
    ])  # fmt: skip
    path = jnp.concatenate([jnp.zeros((1, N)), math.sqrt(ETA) * jnp.cumsum(increments, 0)])
    times = ETA / substeps * jnp.arange(steps * substeps + 1)
    terms = sde.diffrax_terms(
        problem.loss_vector_fn, LAW, diffrax.LinearInterpolation(times, path),
        learning_rate=ETA, order=order,
    )  # fmt: skip
    solution = diffrax.diffeqsolve(
        terms, diffrax.Euler(), 0.0, times[-1], dt0=None, y0=problem.params, args=problem.data,
        stepsize_controller=diffrax.StepTo(times),
        saveat=diffrax.SaveAt(ts=ETA * jnp.arange(steps + 1)),
    )  # fmt: skip
    ours = sde.euler_maruyama(
        *problem, LAW, learning_rate=ETA, num_steps=steps, key=key, substeps=substeps,
        save_at=range(steps + 1), order=order,
    )  # fmt: skip
    # Of order 2 our drift is Heun's: the two agree up to the difference of the methods.
    tolerance = 1e-10 if order == 1 else 0.03
    np.testing.assert_allclose(solution.ys, ours.params, rtol=tolerance)
    if order == 2:
        assert np.abs(np.asarray(solution.ys - ours.params)).max() > 1e-6


def ends(solver, interpretation):
    """A function of keys and a step: theta(T = 1) on `VirtualBrownianTree` paths, [paths, D]."""
    problem = logistic(N)

    def one(key, step):
        motion = diffrax.VirtualBrownianTree(0.0, 1.0, tol=2**-10, shape=(N,), key=key)
        terms = sde.diffrax_terms(
            problem.loss_vector_fn, noise.cov(N, 1), motion,
            learning_rate=0.5, interpretation=interpretation,
        )  # fmt: skip
        solution = diffrax.diffeqsolve(
            terms, solver, 0.0, 1.0, dt0=step, y0=problem.params, args=problem.data
        )
        assert solution.ys is not None
        return solution.ys[-1]

    return jax.jit(jax.vmap(one, in_axes=(0, None)))


@pytest.mark.slow
def test_stratonovich_solvers_find_the_same_solution():
    """Root mean square over 16 paths: Heun with the corrected drift ends where Euler does.

    Without the correction it ends elsewhere, however fine the steps.
    """
    keys = jax.random.split(jax.random.key(1), 16)
    ito = ends(diffrax.Euler(), "ito")(keys, 1 / 512)

    def distance(paths, step):
        return float(jnp.sqrt(((paths(keys, step) - ito) ** 2).sum(1).mean()))

    corrected, wrong = (ends(diffrax.Heun(), name) for name in ("stratonovich", "ito"))
    assert distance(corrected, 1 / 256) < 0.4 * distance(corrected, 1 / 8)
    assert distance(corrected, 1 / 256) < 0.25 * distance(wrong, 1 / 256)


@pytest.mark.parametrize(
    "law", [LAW, pytest.param(noise.fisher(N, B), marks=pytest.mark.slow)], ids=["cov", "fisher"]
)
def test_stratonovich_drift_against_dense_algebra(x64, law):
    """-grad L - eta/4 grad tr(C C^T), the trace of a dense covariance differentiated by jax."""
    problem = logistic(N, dtype=jnp.float64)

    def trace(params):
        gradients = covariance.gradient_matrix(problem.loss_vector_fn, params, problem.data)
        return jnp.trace(covariance.noise_covariance(law, gradients))

    expected = sde.drift(*problem) - ETA / 4 * jax.grad(trace)(problem.params)
    for microbatch_size in (None, 7):
        terms = sde.diffrax_terms(
            problem.loss_vector_fn, law, motion(), learning_rate=ETA,
            interpretation="stratonovich", microbatch_size=microbatch_size,
        )  # fmt: skip
        got = terms.terms[0].vf(0.0, problem.params, problem.data)
        np.testing.assert_allclose(got, expected, rtol=1e-10)


def test_adaptive_steps_and_saving():
    """A pytree of parameters; `SaveAt` and step size control are diffrax's own."""
    problem = regression(N)
    terms = sde.diffrax_terms(
        loss_vector_fn, LAW, motion(), learning_rate=ETA, interpretation="stratonovich"
    )

    @jax.jit
    def solve(tolerance):
        return diffrax.diffeqsolve(
            terms, diffrax.Heun(), 0.0, 1.0, dt0=0.1, y0=problem.params,
            args=problem.data, saveat=diffrax.SaveAt(ts=jnp.linspace(0, 1, 5)),
            stepsize_controller=diffrax.PIDController(rtol=0, atol=tolerance),
        )  # fmt: skip

    coarse, fine = solve(1e-2), solve(1e-4)
    assert coarse.ys is not None
    assert fine.ys is not None
    assert fine.ys["w"].shape == (5, 5)
    assert fine.stats["num_accepted_steps"] > 2 * coarse.stats["num_accepted_steps"]
    np.testing.assert_allclose(fine.ys["w"][0], problem.params["w"])
    np.testing.assert_allclose(coarse.ys["w"][-1], fine.ys["w"][-1], atol=0.02)


def test_the_diffusion_is_a_lineax_operator(x64):
    problem = logistic(N, dtype=jnp.float64)
    terms = sde.diffrax_terms(problem.loss_vector_fn, LAW, motion(), learning_rate=ETA)
    operator = terms.terms[1].vf(0.0, problem.params, problem.data)
    assert isinstance(operator, lineax.AbstractLinearOperator)
    vector = jax.random.normal(jax.random.key(4), (N,), jnp.float64)
    expected = math.sqrt(ETA) * sde.diffusion(*problem, LAW, vector)
    np.testing.assert_allclose(operator.mv(vector), expected, rtol=1e-12)
    np.testing.assert_allclose(operator.as_matrix() @ vector, expected, rtol=1e-10)


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"learning_rate": 0}, ValueError, "learning_rate must be finite and above 0, got 0"),
        ({"order": 3}, ValueError, "order must be between 1 and 2"),
        ({"interpretation": "Ito"}, ValueError, "interpretation must be one of 'ito', 'strat"),
        ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        sde.diffrax_terms(loss_vector_fn, LAW, motion(), **{"learning_rate": ETA, **change})
