"""Stationary covariances against Lyapunov equations by SciPy, and against long runs of training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from msgd_jax import covariance, loss, noise, sde, transform
from tests.support.statistics import assert_agree, assert_rejected


@functools.cache
def matrices():
    """H = F + 0.1 I and C = S / 8 of a problem that needs no random numbers, in float64.

    It has 40 examples and 6 parameters.
    """
    i = np.arange(1, 41)[:, None]
    x = np.sqrt(2) * np.sin(2 * np.pi * i * np.sqrt([2, 3, 5, 7, 11, 13])) * (1 + i / 20)
    y = np.sign(x.sum(1) + 2 * np.cos(i[:, 0]))
    theta = 0.5 * np.array([1, -1, 0.5, 2, -0.5, 1])
    u = np.tanh(x @ theta)
    slopes = -2 * y / (1 + np.exp(2 * y * u)) * (1 - u**2)
    gradients = slopes[:, None] * x
    assert gradients[0, 0] == pytest.approx(-0.8641050108145706, rel=1e-12)
    F = gradients.T @ gradients / 40
    mean = gradients.mean(0)
    return F + 0.1 * np.eye(6), (F - np.outer(mean, mean)) / 8


HEAVY = {"momentum": 0.9}
NESTEROV = {"momentum": 0.9, "nesterov": True}


def dense(H, C, eta, momentum=0.0, nesterov=False):
    """The reference solves one equation for parameters and momentum together, by SciPy."""
    one, ahead = np.eye(len(H)), momentum if nesterov else 0.0
    pull = momentum * (momentum if nesterov else 1.0)
    top = [one - eta * (1 + ahead) * H, -eta * pull * one]
    A = np.block([top, [H, momentum * one]])
    push = np.concatenate([-eta * (1 + ahead) * one, one])
    settled = scipy.linalg.solve_discrete_lyapunov(A, push @ C @ push.T)
    return settled[: len(H), : len(H)]


@pytest.mark.parametrize(
    ("options", "trace"),
    [
        ({}, 0.028905849392010092),
        (HEAVY, 0.27907673371215896),
        (NESTEROV, 0.17265780570528982),
    ],
    ids=["plain", "heavy ball", "nesterov"],
)
def test_the_iteration_settles_at_the_solution_of_its_lyapunov_equation(options, trace):
    H, C = matrices()
    X = sde.stationary_covariance(H, C, learning_rate=0.1, **options)
    assert np.trace(X) == pytest.approx(trace, rel=1e-10)
    np.testing.assert_allclose(X, dense(H, C, 0.1, **options), rtol=1e-8, atol=1e-12)
    np.testing.assert_array_equal(X, X.T)
    if not options:
        residual = H @ X + X @ H - 0.1 * H @ X @ H - 0.1 * C
        assert np.abs(residual).max() < 1e-14
        assert np.trace(H @ X) == pytest.approx(0.0400103608, abs=1e-10)


@pytest.mark.parametrize("curvature", [1e-16, 1e-13, 1e-10])
@pytest.mark.parametrize("mu", [0.0, 0.9])
def test_flat_directions_lose_no_digits(curvature, mu):
    """The closed form of heavy ball's variance: it was 10 % off at 1e-15, and singular at 1e-16."""
    eta = 0.1
    closed = eta * (1 + mu) / (curvature * (1 - mu) * (2 * (1 + mu) - eta * curvature))
    beside = [np.diag([1.0, curvature])] if curvature > 1e-15 else []  # else it is rounding
    for matrix in (np.diag([curvature]), *beside):
        X = sde.stationary_covariance(matrix, np.eye(len(matrix)), learning_rate=eta, momentum=mu)
        assert X[-1, -1] == pytest.approx(closed, rel=1e-9)


def test_the_sde_settles_at_the_solution_of_its_own():
    H, C = matrices()
    X = sde.stationary_covariance_of_sde(H, C, learning_rate=0.1)
    assert np.trace(X) == pytest.approx(0.026905331350367333, rel=1e-10)
    expected = scipy.linalg.solve_continuous_lyapunov(H, 0.1 * C)
    np.testing.assert_allclose(X, expected, rtol=1e-9, atol=1e-13)


def test_the_underdamped_sde_settles_at_the_solution_of_its_own():
    """The SDE is dtheta = p dt, dp = -(q p + H theta) dt + eta^(1/4) root(C) dW.

    It is linear in theta and p together.
    """
    H, C = matrices()
    eta, q, one = 0.01, 1.5, np.eye(6)
    mu = 1 - q * np.sqrt(eta)
    X = sde.stationary_covariance_of_sde(H, C, learning_rate=eta, momentum=mu)
    A = np.block([[0 * one, one], [-H, -q * one]])
    kick = np.sqrt(eta) * scipy.linalg.block_diag(0 * C, C)
    expected = scipy.linalg.solve_continuous_lyapunov(A, -kick)[:6, :6]
    np.testing.assert_allclose(X, expected, rtol=1e-8, atol=1e-12)
    assert np.trace(X) == pytest.approx(0.0179368876, abs=1e-10)
    discrete = sde.stationary_covariance(H, C, learning_rate=eta, momentum=mu)
    assert np.trace(discrete) == pytest.approx(0.0180024243, abs=1e-10)
    # In the eigenbasis of H, the variances are those at the effective learning rate, and the
    # covariances are others.
    basis = np.linalg.eigh(H)[1]
    plain = sde.stationary_covariance_of_sde(H, C, learning_rate=eta / (1 - mu))
    ours, theirs = basis.T @ X @ basis, basis.T @ plain @ basis
    np.testing.assert_allclose(np.diag(ours), np.diag(theirs), rtol=1e-9)
    assert (np.abs(ours - theirs) > 1e-6).any()


def test_momentum_is_the_effective_learning_rate_as_eta_goes_to_zero():
    """For heavy ball and Nesterov alike, it is eta / (1 - mu) as eta falls and mu stays.

    The known ratios of traces come from the two Lyapunov equations in float64.
    """
    H, C = matrices()
    known = {"heavy": (1.0373, 1.00356, 1.00035), "nesterov": (0.642, 0.920, 0.991)}
    for options, ratios in ((HEAVY, known["heavy"]), (NESTEROV, known["nesterov"])):
        for eta, ratio in zip((0.1, 0.01, 0.001), ratios, strict=True):
            X = sde.stationary_covariance(H, C, learning_rate=eta, **options)
            limit = sde.stationary_covariance_of_sde(H, C, learning_rate=eta / (1 - 0.9))
            assert np.trace(X) / np.trace(limit) == pytest.approx(ratio, abs=6e-4)


@pytest.mark.parametrize("options", [{}, HEAVY, NESTEROV], ids=["plain", "heavy", "nesterov"])
def test_long_runs_of_training_have_the_stationary_variance(options):
    """Each of 256 runs of `transform.msgd` gives a mean over 400 iterations, after the first 150.

    The runs are independent, so that the standard error over them, about 1 % of tr X, includes the
    correlation in time. The variances of the SDE and of the other kind of momentum, which are 8 %
    off or more, are rejected.
    """
    H, eta, runs = np.array([[2.0, 0.5], [0.5, 1.0]]), 0.3, 256
    pulls = jnp.asarray(np.random.default_rng(0).normal(size=(12, 2)), jnp.float32)
    curved = jnp.asarray(H, jnp.float32)
    fn = loss.per_example(lambda theta, pull: theta @ curved @ theta / 2 - pull @ theta)
    law, start = noise.cov(12, 2), jnp.linalg.solve(curved, pulls.mean(0))
    C = covariance.noise_covariance(loss.LossVector(fn, pulls), start, law)
    X = sde.stationary_covariance(H, C, learning_rate=eta, **options)

    def spread(key):
        optimizer = transform.msgd(eta, law, key, **options)

        def advance(carry, _):
            params, state = carry
            extra = {"loss_vector_fn": fn, "data": pulls}
            updates, state = optimizer.update((), state, params, **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), jnp.sum((params - start) ** 2)

        squares = jax.lax.scan(advance, (start, optimizer.init(start)), length=550)[1]
        return squares[150:].mean()

    means = np.asarray(jax.jit(jax.vmap(spread))(jax.random.split(jax.random.key(1), runs)))
    error = means.std(ddof=1) / np.sqrt(runs)
    assert_agree(means.mean(), np.trace(X), error, degrees_of_freedom=runs - 1)
    assert error < 0.02 * np.trace(X)
    others = [sde.stationary_covariance(H, C, learning_rate=eta, **HEAVY)]
    if options is HEAVY:
        others = [sde.stationary_covariance(H, C, learning_rate=eta, **NESTEROV)]
    rate = eta / (1 - options.get("momentum", 0))
    others.append(sde.stationary_covariance_of_sde(H, C, learning_rate=rate))
    for other in others:
        assert_rejected(means.mean(), np.trace(other), error, degrees_of_freedom=runs - 1)


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    one = np.eye(2)

    @pytest.mark.parametrize(
        "function", [sde.stationary_covariance, sde.stationary_covariance_of_sde]
    )
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"hessian": np.diag([1.0, -0.5])}, ValueError, "definite .* the eigenvalue -0.5 "),
            ({"hessian": np.diag([1.0, 0.0])}, ValueError, "positive definite .* eigenvalue 0 "),
            ({"hessian": np.array([[1.0, 1], [0, 1]])}, ValueError, "hessian must be symmetric"),
            ({"hessian": np.ones((2, 3))}, ValueError, r"matrix \[D, D\], got shape \(2, 3\)"),
            ({"hessian": np.full((2, 2), np.nan)}, ValueError, "hessian must be finite"),
            ({"hessian": "H"}, TypeError, "hessian must be a matrix of real numbers"),
            ({"hessian": np.eye(3)}, ValueError, r"noise_covariance must be \[3, 3\]"),
            ({"noise_covariance": np.diag([1.0, -2.0])}, ValueError, "semi-definite.*value -2 "),
            ({"learning_rate": 0.0}, ValueError, "learning_rate must be finite and above 0"),
            ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
            ({"momentum": -0.1}, ValueError, "momentum must be finite and at least 0, got -0.1"),
        ],
    )
    def test_bad_arguments_are_refused(self, function, change, error, message):
        good = {"hessian": self.one, "noise_covariance": self.one, "learning_rate": 0.1}
        with pytest.raises(error, match=message) as refused:
            function(**{**good, **change})
        assert len(str(refused.value)) <= 400

    @pytest.mark.parametrize(
        ("options", "limit"),
        [({}, 1.0), ({"momentum": 0.5}, 1.5), ({"momentum": 0.5, "nesterov": True}, 0.75)],
    )
    def test_learning_rates_beyond_stability_are_refused(self, options, limit):
        H = np.diag([1.0, 2.0])
        settle = functools.partial(sde.stationary_covariance, H, self.one, **options)
        assert np.linalg.eigvalsh(settle(learning_rate=0.999 * limit))[0] > 0
        with pytest.raises(ValueError, match=f"= {limit:g} to settle.* the eigenvalue 2,") as no:
            settle(learning_rate=1.001 * limit)
        assert len(str(no.value)) <= 400

    def test_traced_matrices_are_refused(self):
        settle = functools.partial(sde.stationary_covariance, learning_rate=0.1)
        with pytest.raises(TypeError, match="hessian must not be traced"):
            jax.jit(settle)(self.one, self.one)
