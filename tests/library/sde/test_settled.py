"""The stationary covariance along directions, which needs no matrices, against the dense one."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import covariance, loss, noise, sde
from tests.support.sde_problems import at_minimum, logistic

N, D = 32, 5
RATES = [
    {"learning_rate": 0.3},
    {"learning_rate": 0.1, "momentum": 0.9},
    {"learning_rate": 0.1, "momentum": 0.9, "nesterov": True},
]


@functools.cache
def settled_problem():
    with jax.enable_x64(True):
        problem = at_minimum(logistic(N, D, jnp.float64))
        law = noise.cov(N, 4, dtype=jnp.float64)
        H = jax.hessian(problem.losses.mean)(problem.params)
        C = covariance.noise_covariance(problem.losses, problem.params, law)
        return problem, law, np.asarray(H), np.asarray(C)


@pytest.mark.parametrize("rates", RATES, ids=["plain", "heavy ball", "Nesterov"])
def test_with_all_products_the_covariance_is_the_dense_one(x64, rates):
    problem, law, H, C = settled_problem()
    directions = jnp.asarray(np.random.default_rng(0).normal(size=(3, D)))
    dense = directions @ sde.stationary_covariance(H, C, **rates) @ directions.T
    found = sde.stationary_covariance_along(
        problem.losses, problem.params, law, directions, **rates
    )
    np.testing.assert_allclose(found.covariance, dense, rtol=1e-8)
    assert found.last_change == 0


def test_fewer_products_are_near_and_report_their_accuracy(x64):
    """For a quadratic in 60 dimensions, 20 products are right to 1 %, and 4 are not."""
    rng, size = np.random.default_rng(1), 60
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    H = jnp.asarray(basis @ np.diag(np.geomspace(0.05, 2.0, size)) @ basis.T)
    pulls = rng.normal(size=(80, size))
    pulls = jnp.asarray(pulls - pulls.mean(0))
    fn = loss.per_example(lambda theta, pull: theta @ H @ theta / 2 - pull @ theta)
    losses, law = loss.LossVector(fn, pulls), noise.cov(80, 4, dtype=jnp.float64)
    start, direction = jnp.zeros(size), jnp.asarray(rng.normal(size=(1, size)))
    C = covariance.noise_covariance(losses, start, law)
    dense = direction @ sde.stationary_covariance(H, C, learning_rate=0.5) @ direction.T
    walk = functools.partial(sde.stationary_covariance_along, losses, start, law, direction)
    few, many = (walk(learning_rate=0.5, num_products=count) for count in (4, 20))
    off = [abs(float(found.covariance[0, 0] / dense[0, 0]) - 1) for found in (few, many)]
    assert off[1] < 0.01 < off[0]
    assert many.last_change < 0.05 < few.last_change


def test_directions_may_be_pytrees_in_an_invariant_space(x64):
    """A coordinate of a diagonal Hessian is an eigenvector: further products add nothing."""
    fn = loss.per_example(lambda p, x: p["a"] ** 2 + p["b"] @ p["b"] / 4 - x * (p["a"] + p["b"][0]))
    losses = loss.LossVector(fn, jnp.asarray([-1.0, 1.0, 0.0]), microbatch_size=2)
    params = {"a": jnp.asarray(0.0), "b": jnp.zeros(2)}
    directions = {"a": jnp.asarray([1.0, 0.0]), "b": jnp.asarray([[0.0, 0.0], [1.0, 0.0]])}
    law = noise.cov(3, 1, dtype=jnp.float64)
    found = sde.stationary_covariance_along(losses, params, law, directions, learning_rate=0.1)
    variance = 2 / 3
    H, C = np.diag([2.0, 0.5]), np.full((2, 2), variance)
    dense = sde.stationary_covariance(H, C, learning_rate=0.1)
    np.testing.assert_allclose(found.covariance, dense, rtol=1e-9)


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"directions": jnp.ones(2)}, ValueError, "directions must be like params with a leading"),
        ({"directions": jnp.ones((0, 2))}, ValueError, "with one leading axis"),
        ({"directions": jnp.zeros((2, 2))}, ValueError, "not 0, got one of length 0 at 0"),
        ({"directions": jnp.full((1, 2), jnp.nan)}, ValueError, "finite and not 0, got .* nan"),
        ({"learning_rate": 1.0}, ValueError, r"must be below 2 / 2 = 1 to settle.*eigenvalue 2"),
        ({"learning_rate": 0.0}, ValueError, "learning_rate must be finite and above 0"),
        ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1"),
        ({"num_products": 0}, ValueError, "num_products must be at least 1"),
        ({"law": noise.random_reshuffling(2, 1)}, ValueError, "law must have independent"),
        (
            {"params": jnp.ones(2, jnp.bfloat16)},
            TypeError,
            "params must be float32 or float64, got bfloat16",
        ),
        ({"sign": -1.0}, ValueError, "must be positive definite to settle, got the eigenvalue -2"),
        ({"learning_rate": math.inf}, ValueError, "learning_rate must be finite"),
    ],
)
def test_bad_input(change, error, message):
    sign = change.get("sign", 1.0)
    fn = loss.per_example(lambda theta, x: sign * theta @ theta - x @ theta)
    losses = loss.LossVector(fn, jnp.asarray([[-1.0, 0.0], [1.0, 0.0]]))
    good = {"params": jnp.zeros(2), "law": noise.cov(2, 1), "directions": jnp.eye(2)}
    good |= {"losses": losses, "learning_rate": 0.1} | change
    good.pop("sign", None)
    with pytest.raises(error, match=message) as refused:
        sde.stationary_covariance_along(**good)
    assert len(str(refused.value)) <= 400


@pytest.mark.parametrize("seed", range(4))
def test_a_flat_direction_is_refused_although_rounding_may_make_it_positive(seed):
    """Gradients in five directions of six: the variance along the sixth is infinite."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(40, 5)).astype(np.float32)
    basis = np.linalg.qr(rng.normal(size=(6, 6)))[0].astype(np.float32)

    def loss_of(theta, row):
        turned = theta @ basis
        return jnp.square(turned[:5] @ row[:5]) / 2 + turned[5] * row[5]

    rows = np.concatenate([rows, rng.choice([-1.0, 1.0], (40, 1)).astype(np.float32)], axis=1)
    losses = loss.LossVector(loss.per_example(loss_of), jnp.asarray(rows))
    with pytest.raises(ValueError, match="must be positive definite to settle, got the eigenvalue"):
        sde.stationary_covariance_along(
            losses,
            jnp.zeros(6),
            noise.cov(40, 4),
            jnp.asarray(basis.T[5:]) + 0.1,
            learning_rate=0.01,
        )
