"""Drift, diffusion, Brownian path and `euler_maruyama` against dense algebra in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

from msgd_jax import covariance, loss, noise, sde, train
from tests.support.noises import ROWS
from tests.support.problems import linear, loss_vector_fn, of_sde, regression
from tests.support.sde_problems import logistic
from tests.support.statistics import assert_agree, bound

N, B = 20, 4
LAWS = {
    "cov": noise.cov(N, B),
    "fisher": noise.fisher(N, B),
    "sgd": noise.sgd(N, B),
    "sparse_fisher": noise.sparse_fisher(N, B, support_size=10),
}


def root(law) -> np.ndarray:
    """The symmetric root of Cov(W), as a dense matrix."""
    values, vectors = np.linalg.eigh(law.covariance.matrix(law.num_examples))
    return vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T


def dense(features, labels):
    """Gradients per example and the mean Hessian of logistic regression, in float64."""
    x, y = np.asarray(features, np.float64), np.asarray(labels, np.float64)

    def gradients(theta):
        return (-y / (1 + np.exp(y * (x @ theta))))[:, None] * x

    def hessian(theta):
        p = 1 / (1 + np.exp(-(x @ theta)))
        return (x * (p * (1 - p))[:, None]).T @ x / len(x)

    return gradients, hessian


@pytest.mark.parametrize("microbatch_size", [None, 7])
@pytest.mark.parametrize("law", LAWS)
def test_diffusion_is_the_root_of_the_covariance(x64, law, microbatch_size):
    problem = regression(N, dtype=jnp.float64)
    law = LAWS[law]
    apply = functools.partial(
        of_sde,
        sde.diffusion,
        loss_vector_fn,
        problem.params,
        problem.data,
        law,
        microbatch_size=microbatch_size,
    )
    columns = jax.vmap(apply)(jnp.eye(N, dtype=jnp.float64))
    C = np.concatenate([columns["w"].T, columns["b"][None]])
    by_hand = problem.gradient_matrix()
    G = np.concatenate([by_hand["w"], by_hand["b"][:, None]], 1)
    # An eigenvalue that should be 0 is a rounding error, and so is its root, which is larger.
    np.testing.assert_allclose(C, G.T @ root(law), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(
        C @ C.T, covariance.noise_covariance(*linear(G), law), rtol=1e-12, atol=1e-14
    )


def test_diffusion_of_the_fisher_form_is_one_weighted_gradient(x64):
    """It is ``C w = grad(L . w) / sqrt(b N)``, and w is centred for the covariance form."""
    problem = regression(N, dtype=jnp.float64)
    w = jax.random.normal(jax.random.key(0), (N,), jnp.float64)
    for law, weights in ((noise.fisher(N, B), w), (noise.cov(N, B), w - w.mean())):
        expected = jax.vjp(lambda p: loss_vector_fn(p, problem.data), problem.params)[1](weights)[0]
        got = of_sde(sde.diffusion, loss_vector_fn, problem.params, problem.data, law, w)
        for name in expected:
            np.testing.assert_allclose(got[name], expected[name] / math.sqrt(B * N), rtol=1e-10)


@pytest.mark.parametrize("microbatch_size", [None, 7])
def test_the_drift_agrees_with_dense_algebra(x64, microbatch_size):
    problem = logistic(dtype=jnp.float64)
    gradients, hessian = dense(*problem.data)
    theta, eta = np.asarray(problem.params), 0.3
    gradient = gradients(theta).mean(0)
    first = of_sde(sde.drift, *problem, microbatch_size=microbatch_size)
    np.testing.assert_allclose(first, -gradient, rtol=1e-12)
    second = of_sde(
        sde.drift, *problem, order=2, learning_rate=eta, microbatch_size=microbatch_size
    )
    np.testing.assert_allclose(
        second, -(gradient + eta / 2 * hessian(theta) @ gradient), rtol=1e-12
    )


class TestBrownianIncrements:
    @pytest.mark.optimized
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
    def test_coarse_increments_are_sums_of_fine_ones_to_the_last_bit(self, x64, dtype):
        draw = functools.partial(sde.brownian_increments, jax.random.key(1), 3, 1000, dtype=dtype)
        finest = np.asarray(draw(substeps=16))
        assert finest.dtype == dtype
        for substeps in (1, 8):
            sums = finest.reshape(substeps, -1, 1000).sum(1, dtype=dtype)
            np.testing.assert_array_equal(draw(substeps=substeps), sums)
            backwards = finest.reshape(substeps, -1, 1000)[:, ::-1].sum(1, dtype=dtype)
            np.testing.assert_array_equal(backwards, sums)

    def test_increments_of_iterations_are_the_normals_of_the_gaussian_laws(self):
        key = jax.random.key(2)
        for step in (0, 7):
            w = noise.fisher(N, B).sample(key, step).values
            increment = sde.brownian_increments(key, step, N)[0]
            np.testing.assert_allclose(w, 1 / N - increment / math.sqrt(B * N), atol=2e-7)
            centred = noise.cov(N, B).sample(key, step).values
            np.testing.assert_allclose(
                sde.coupling(noise.cov(N, B), N)(increment), centred, atol=2e-7
            )

    def test_increments_have_the_moments_of_brownian_motion(self):
        """Every mean, variance and covariance of 16 substeps of 2 iterations, from 40,000 draws.

        In units of the deviation of a substep, the standard errors from M draws are 1/sqrt(M) for
        means and covariances, and sqrt(2/M) for variances.
        """
        count, substeps = 40_000, 16
        draw = lambda step: sde.brownian_increments(  # noqa: E731
            jax.random.key(3), step, 2 * count, substeps=substeps
        )
        x = np.concatenate([np.asarray(draw(step), np.float64) for step in (0, 1)])
        x = x.reshape(2 * substeps, 2, count).reshape(-1, count) * math.sqrt(substeps)
        second = x @ x.T / count
        z = np.abs(second - np.eye(len(x))) * math.sqrt(count)
        z[np.diag_indices(len(x))] /= math.sqrt(2)
        assert z.max() < bound(z.size)
        assert (np.abs(x.mean(1)) * math.sqrt(count)).max() < bound(len(x))
        # A near miss, variances that are a tenth too large, would be seen.
        assert np.abs(1.1 * second - np.eye(len(x))).max() * math.sqrt(count / 2) > 10

    def test_the_path_is_the_same_under_jit_and_vmap(self):
        draw = lambda key, step: sde.brownian_increments(key, step, 50, substeps=8)  # noqa: E731
        keys = jax.random.split(jax.random.key(4), 3)
        together = jax.jit(jax.vmap(draw, in_axes=(0, None)))(keys, 5)
        for i in range(3):
            np.testing.assert_allclose(together[i], draw(keys[i], 5), atol=2e-6)
        assert np.abs(np.asarray(together[0] - together[1])).max() > 0.1


def reference_path(problem, law, eta, num_steps, key, substeps, order):
    """The ends of all iterations by the method of Euler and Maruyama, with a dense C, in numpy.

    At order 2, the drift is the modified one, by Heun's method.
    """
    gradients, hessian = dense(*problem.data)
    A = root(law)

    def drift(theta):
        g = gradients(theta).mean(0)
        return -g if order == 1 else -(g + eta / 2 * hessian(theta) @ g)

    theta = np.asarray(problem.params, np.float64)
    points, h = [theta], eta / substeps
    for step in range(num_steps):
        for dW in np.asarray(
            sde.brownian_increments(key, step, len(A), substeps=substeps, dtype=jnp.float64)
        ):
            kick = eta * gradients(theta).T @ A @ dW
            move = h * drift(theta)
            if order == 2:
                move = (move + h * drift(theta + move + kick)) / 2
            theta = theta + move + kick
        points.append(theta)
    return np.stack(points)


class TestEulerMaruyama:
    @pytest.mark.parametrize(("substeps", "order"), [(1, 1), (4, 1), (4, 2)])
    def test_paths_agree_with_dense_algebra(self, x64, substeps, order):
        problem, law = logistic(N, dtype=jnp.float64), noise.cov(N, B, dtype=jnp.float64)
        key, eta = jax.random.key(5), 0.2
        path = of_sde(
            sde.euler_maruyama,
            *problem,
            law,
            learning_rate=eta,
            num_steps=6,
            key=key,
            substeps=substeps,
            order=order,
            save_at=[0, 1, 4],
            microbatch_size=8,
        )
        expected = reference_path(problem, law, eta, 6, key, substeps, order)
        np.testing.assert_allclose(path.params, expected[[0, 1, 4]], rtol=1e-10)
        np.testing.assert_allclose(path.last_params, expected[6], rtol=1e-10)
        np.testing.assert_allclose(path.times, [0, eta, 4 * eta])
        assert path.steps.tolist() == [0, 1, 4]
        assert path.diverged_at == -1

    @pytest.mark.parametrize("name", ["fisher", "cov"])
    def test_one_substep_is_training_with_the_same_key(self, name):
        problem, law = regression(N), ROWS[name].make(N, B)
        key, optimizer = jax.random.key(6), optax.sgd(0.2)
        step = train.make_step(loss_vector_fn, optimizer, law)
        state = train.init(problem.params, optimizer, key)
        for _ in range(10):
            state, _ = step(state, problem.data)
        path = of_sde(
            sde.euler_maruyama,
            loss_vector_fn,
            problem.params,
            problem.data,
            law,
            learning_rate=0.2,
            num_steps=10,
            key=key,
            substeps=1,
        )
        for name, leaf in state.params.items():
            np.testing.assert_allclose(path.params[name][0], leaf, rtol=1e-5, atol=1e-6)

    @pytest.mark.optimized
    def test_a_path_is_continued_to_the_last_bit(self):
        problem, law = regression(N), noise.cov(N, B)
        options = {"learning_rate": 0.2, "key": jax.random.key(10), "substeps": 4}
        run = functools.partial(
            of_sde, sde.euler_maruyama, loss_vector_fn, data=problem.data, law=law
        )
        whole = run(params=problem.params, num_steps=7, save_at=[3, 5, 7], **options)
        half = run(params=problem.params, num_steps=3, **options).last_params
        rest = run(params=half, num_steps=7, first_step=3, save_at=[3, 5, 7], **options)
        assert rest.steps.tolist() == [3, 5, 7]
        for name in half:
            np.testing.assert_array_equal(rest.params[name], whole.params[name])

    def test_memory_does_not_grow_with_the_number_of_steps(self):
        problem = regression(N)

        def bytes_for(num_steps: int) -> int:
            run = lambda key: of_sde(  # noqa: E731
                sde.euler_maruyama,
                loss_vector_fn,
                problem.params,
                problem.data,
                noise.cov(N, B),
                learning_rate=0.1,
                num_steps=num_steps,
                key=key,
            )
            compiled = jax.jit(run).lower(jax.random.key(0)).compile()
            memory = compiled.memory_analysis()
            assert memory is not None
            return memory.temp_size_in_bytes

        assert bytes_for(10) == bytes_for(1_000_000)

    def test_keys_and_learning_rates_may_be_mapped_under_jit(self):
        problem, law = regression(N), noise.cov(N, B)

        @jax.jit
        @jax.vmap
        def run(key, rate):
            return of_sde(
                sde.euler_maruyama,
                loss_vector_fn,
                problem.params,
                problem.data,
                law,
                learning_rate=rate,
                num_steps=5,
                key=key,
                substeps=2,
                save_at=[2, 5],
            )

        keys, rates = jax.random.split(jax.random.key(7), 3), jnp.array([0.1, 0.2, 0.3])
        together = run(keys, rates)
        assert together.params["w"].shape == (3, 2, 5)
        alone = of_sde(
            sde.euler_maruyama,
            loss_vector_fn,
            problem.params,
            problem.data,
            law,
            learning_rate=0.2,
            num_steps=5,
            key=keys[1],
            substeps=2,
            save_at=[2, 5],
        )
        np.testing.assert_allclose(together.params["w"][1], alone.params["w"], rtol=1e-5, atol=1e-6)

    def test_data_may_be_spread_over_devices(self):
        n = 40
        problem, law = regression(n), noise.cov(n, B)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        options = {"learning_rate": 0.2, "num_steps": 5, "key": jax.random.key(8), "substeps": 2}
        one = of_sde(
            sde.euler_maruyama, loss_vector_fn, problem.params, problem.data, law, **options
        )
        eight = of_sde(
            sde.euler_maruyama,
            loss_vector_fn,
            problem.params,
            jax.device_put(problem.data, rows),
            law,
            **options,
        )
        np.testing.assert_allclose(eight.params["w"], one.params["w"], rtol=1e-5, atol=1e-6)


def quadratic(H, Z):
    """The losses theta^T H theta / 2 + z_i . theta, and z_i, whose mean is 0.

    Their gradient noise is the same everywhere.
    """
    H = jnp.asarray(H, jnp.float32)
    losses = loss.per_example(lambda theta, z: 0.5 * theta @ H @ theta + z @ theta)
    return losses, jnp.asarray(Z - Z.mean(0), jnp.float32)


@pytest.mark.parametrize(("substeps", "eta"), [(1, 0.4), (16, 0.1)])
def test_moments_of_the_ornstein_uhlenbeck_process(substeps, eta):
    """Mean and covariance of 4,000 paths against Lyapunov equations.

    With substeps the equation is that of the SDE, in continuous time. With one substep it is that
    of the iteration, in discrete time, and the paths reject that of the SDE.
    """
    rng = np.random.default_rng(0)
    H = np.array([[1.5, 0.5], [0.5, 1.0]])
    losses, data = quadratic(H, 3 * rng.normal(size=(8, 2)))
    law, start = noise.cov(8, 2), np.array([4.0, -3.0])
    noise_covariance = eta * np.asarray(data, np.float64).T @ np.asarray(data) / (8 * 2)
    steps, paths = round(2 / eta), 4_000
    run = lambda key: of_sde(  # noqa: E731
        sde.euler_maruyama,
        losses,
        jnp.asarray(start, jnp.float32),
        data,
        law,
        learning_rate=eta,
        num_steps=4 * steps,
        key=key,
        substeps=substeps,
        save_at=[steps // 2],
    )
    result = jax.jit(jax.vmap(run))(jax.random.split(jax.random.key(9), paths))
    early = np.asarray(result.params[:, 0], np.float64)
    late = np.asarray(result.last_params, np.float64)

    # The paths have settled: after T = 8, exp(-2 lambda T) is below 2e-5 for the smaller eigenvalue
    # lambda of H.
    continuous = scipy.linalg.solve_continuous_lyapunov(H, noise_covariance)
    flow = np.eye(2) - eta * H
    discrete = scipy.linalg.solve_discrete_lyapunov(flow, eta * noise_covariance)
    right, wrong = (discrete, continuous) if substeps == 1 else (continuous, discrete)

    def z(sigma):
        got = late.T @ late / paths
        deviations = np.sqrt((np.outer(np.diag(sigma), np.diag(sigma)) + sigma**2) / paths)
        return np.abs((got - sigma) / deviations).max()

    assert z(right) < bound(4)
    if substeps == 1:  # at eta = 0.1, the two are too close to be told apart
        assert z(wrong) > bound(4, 1e-8)
    mean = np.linalg.matrix_power(flow, steps // 2) @ start
    if substeps > 1:
        mean = scipy.linalg.expm(-H * eta * (steps // 2)) @ start
        # Steps of h of Euler's method are off from exp(-H t) by t h H^2 / 2 of it.
        fine = np.linalg.matrix_power(np.eye(2) - eta / substeps * H, steps // 2 * substeps) @ start
        assert np.abs(fine - mean).max() < 0.02
        mean = fine
    error = early.std(0) / math.sqrt(paths)
    assert_agree(early.mean(0), mean, error)
