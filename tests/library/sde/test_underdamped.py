"""The SDE of momentum.

Held are the path, against training and against the equation in numpy, strong and weak orders with
near misses, the limit at a fixed momentum, and bad input.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import loss, noise, sde, transform
from tests.support.statistics import assert_agree, assert_rejected

N, D, Q, HORIZON = 8, 3, 1.5, 2.0
_RNG = np.random.default_rng(0)
PULLS = _RNG.normal(size=(N, D))
HESSIAN = np.diag([2.0, 1.0, 0.3]) + 0.1
START = np.array([1.0, -1.0, 0.5])


@loss.per_example
def quadratic(theta, example):
    """Losses of different curvatures, so that the noise depends on the parameters."""
    pull, hessian = example
    return (1 + 0.3 * pull[0]) * theta @ hessian @ theta / 2 - pull @ theta


def problem(dtype=jnp.float64):
    pulls = jnp.asarray(PULLS, dtype)
    hessians = jnp.broadcast_to(jnp.asarray(HESSIAN, dtype), (N, D, D))
    return loss.LossVector(quadratic, (pulls, hessians)), jnp.asarray(START, dtype)


def law(dtype=jnp.float64):
    return noise.cov(N, 2, dtype=dtype)


@pytest.mark.parametrize("constant", [True, False], ids=["constant", "cosine"])
def test_one_substep_is_training_with_momentum_and_the_same_key(constant):
    (losses, start), key, eta, mu = problem(jnp.float32), jax.random.key(1), 0.04, 0.8
    rate = eta if constant else optax.cosine_decay_schedule(eta, 40)
    optimizer = transform.msgd(rate, law(jnp.float32), key, momentum=mu)

    @jax.jit
    def train(carry, _):
        params, state = carry
        extra = {"loss_vector_fn": quadratic, "data": losses.data}
        updates, state = optimizer.update((), state, params, **extra)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, optax.tree.get(state, "trace"))

    points, traces = jax.lax.scan(train, (start, optimizer.init(start)), length=30)[1]
    options = {"learning_rate": rate, "momentum": mu, "key": key, "scheme": sde.Scheme(1)}
    walk = functools.partial(sde.underdamped, losses, law=law(jnp.float32), **options)
    path = walk(start, num_steps=30, save_at=[10, 30])
    np.testing.assert_allclose(path.params, points[np.array([9, 29])], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(path.trace, traces[np.array([9, 29])], rtol=1e-4, atol=1e-5)
    roots = [math.sqrt(eta if constant else rate(k)) for k in range(30)]
    np.testing.assert_allclose(path.times, [sum(roots[:10]), sum(roots)], rtol=1e-5)
    assert path.diverged_at == -1
    # Continued from a point with its momentum, it is the same path.
    rest = walk(sde.Moving(path.params[0], path.trace[0], 10), num_steps=30)
    np.testing.assert_array_equal(rest.last_params, path.last_params)
    np.testing.assert_array_equal(rest.last_trace, path.last_trace)


def test_paths_are_those_of_the_equation_in_numpy(x64):
    """The reference has dense matrices and four substeps per iteration."""
    (losses, start), key, eta, mu, substeps = problem(), jax.random.key(2), 0.04, 0.7, 4
    k = math.sqrt(eta)
    h, q = k / substeps, (1 - mu) / k
    root = np.eye(N) - 1 / N  # of b N Cov(W) = I - 1 1^T / N, which is its own root
    theta, p = START.copy(), np.zeros(D)
    for step in range(6):
        draw = functools.partial(sde.brownian_increments, key, step, N, dtype=jnp.float64)
        for unit in np.asarray(draw(substeps=substeps)):
            G = (1 + 0.3 * PULLS[:, :1]) * (HESSIAN @ theta) - PULLS
            motion = math.sqrt(k) * unit  # the increment of Brownian motion over h: variance h
            push = eta**0.25 * G.T @ root @ motion / math.sqrt(2 * N)
            p = p - h * q * p - h * G.mean(0) + push
            theta = theta + h * p
    options = {"learning_rate": eta, "momentum": mu, "num_steps": 6, "key": key}
    path = sde.underdamped(losses, start, law(), scheme=sde.Scheme(substeps), **options)
    np.testing.assert_allclose(path.last_params, theta, rtol=1e-10)
    np.testing.assert_allclose(-math.sqrt(eta) * path.last_trace, p, rtol=1e-10)


@functools.cache
def distances():
    """How far iterations with momentum are from the SDE on the same paths, at four eta.

    By name of the iteration, root mean square distances with their standard errors; and under
    "weak " and the name, differences of variances with theirs. The SDE has 16 substeps.
    """
    with jax.enable_x64(True):
        losses, start = problem()
        coupled = sde.coupling(law(), N)

        def ball(key, eta, steps, sign=1.0, friction=Q, shape=None, nesterov=False):
            """Training with momentum, written out, with increments of a sign."""
            mu = 1 - friction * jnp.sqrt(eta)

            def advance(step, at):
                theta, v = at
                increment = sde.brownian_increments(key, step, N, dtype=jnp.float64)[0]
                gradient = losses.gradient(theta, coupled(sign * increment))
                v = mu * v + gradient
                rate = eta if shape is None else eta * shape(step * jnp.sqrt(eta))
                return theta - rate * (gradient + mu * v if nesterov else v), v

            return jax.lax.fori_loop(0, steps, advance, (start, 0 * start))[0]

        @jax.jit
        def squares(key, eta, steps):
            mu, pace = 1 - Q * jnp.sqrt(eta), jnp.sqrt(eta)
            walk = functools.partial(sde.underdamped, losses, start, law(), momentum=mu)
            options = {"num_steps": steps, "key": key, "scheme": sde.Scheme(16)}
            fine = walk(learning_rate=eta, **options).last_params
            scheduled = walk(learning_rate=lambda k: eta * COSINE(k * pace), **options).last_params
            return {
                "right": (ball(key, eta, steps), fine),
                "nesterov": (ball(key, eta, steps, nesterov=True), fine),
                "cosine": (ball(key, eta, steps, shape=COSINE), scheduled),
                "wrong sign": (ball(key, eta, steps, sign=-1.0), fine),
                "wrong friction": (ball(key, eta, steps, friction=1.2 * Q), fine),
                "wrong schedule": (ball(key, eta, steps), scheduled),
            }

        keys = jax.random.split(jax.random.key(3), 200)
        found, moments = {}, {}
        for eta in ETAS:
            steps = jnp.int32(round(HORIZON / math.sqrt(eta)))
            all_paths = jax.vmap(squares, in_axes=(0, None, None))(keys, eta, steps)
            for name, (one, other) in jax.tree.map(np.asarray, all_paths).items():
                moments.setdefault(name, []).append(_difference_of_variances(one, other, eta))
                values = ((one - other) ** 2).sum(1)
                mean, spread = values.mean(), values.std(ddof=1) / math.sqrt(len(keys))
                error = math.sqrt(mean)
                found.setdefault(name, []).append((error, float(spread) / (2 * error)))
        strong, weak = ({n: np.array(x).T for n, x in of.items()} for of in (found, moments))
        return strong | {f"weak {name}": pairs for name, pairs in weak.items()}


def _difference_of_variances(one, other, eta):
    """The difference of the variances of iteration and SDE, with its standard error.

    Both are in units of sqrt(eta), to which the variances themselves are proportional.
    """
    squares = [((x - x.mean(0)) ** 2).sum(1) for x in (one, other)]
    values = (squares[0] - squares[1]) / math.sqrt(eta)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


COSINE = optax.cosine_decay_schedule(1.0, HORIZON, alpha=0.1)
ETAS = (0.04, 0.01, 0.0025, 0.000625)


def order(name):
    errors, spreads = distances()[name]
    return sde.ErrorSweep(np.array(ETAS), errors, spreads, 199).order


@pytest.mark.slow
@pytest.mark.parametrize("name", ["right", "nesterov", "cosine"])
def test_the_strong_order_is_one_half_in_eta(name):
    """It is 1 in the time step sqrt(eta); at these rates, the next order adds up to 0.04."""
    measured = order(name)
    assert measured.standard_error < 0.02
    assert_agree(measured.value, 0.5, measured.standard_error, slack=0.04)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["right", "nesterov", "cosine", "wrong sign"])
def test_the_weak_order_of_variances_is_one_half_in_eta(name):
    """In units of sqrt(eta), a flow without noise would be off by order 0.

    Noise of the other sign has the same law, so that its weak order is the same.
    """
    measured = order(f"weak {name}")
    assert measured.standard_error < 0.1
    assert_agree(measured.value, 0.5, measured.standard_error, slack=0.04)
    assert_rejected(measured.value, 0.0, measured.standard_error)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wrong friction", "wrong schedule"])
def test_variances_of_near_misses_do_not_approach_those_of_the_sde(name):
    measured, (errors, spreads) = order(f"weak {name}"), distances()[f"weak {name}"]
    assert_agree(measured.value, 0.0, measured.standard_error, slack=0.1)
    assert_rejected(errors[-1], 0.0, spreads[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expected"), [("wrong sign", 0.25), ("wrong friction", 0.0), ("wrong schedule", 0.0)]
)
def test_near_misses_of_the_coupling_lose_the_order(name, expected):
    """The order is 1/4 in eta with the other sign, and 0 with another friction or schedule."""
    measured = order(name)
    assert measured.value < expected + 0.06
    assert measured.standard_error < 0.03
    assert distances()[name][0][-1] > 3 * distances()["right"][0][-1]


def test_the_limit_at_a_fixed_momentum_is_the_effective_learning_rate():
    """On the same path, the distance from the SDE at eta / (1 - mu) falls like eta.

    A fourth of eta makes a fourth of the distance. Of 64 paths, ratios of root mean squares have
    standard errors of about 10 %. The distance from the SDE at eta stays.
    """
    losses, start = problem(jnp.float32)
    mu, horizon = 0.8, 2.0

    @jax.jit
    def squares(key, eta, steps):
        options = {"num_steps": steps, "key": key, "scheme": sde.Scheme(2)}
        common = losses, start, law(jnp.float32)
        heavy = sde.underdamped(*common, learning_rate=eta, momentum=mu, **options)
        light = sde.euler_maruyama(*common, learning_rate=eta / (1 - mu), **options)
        slow = sde.euler_maruyama(*common, learning_rate=eta, **options)
        return tuple(jnp.sum((heavy.last_params - o.last_params) ** 2) for o in (light, slow))

    def distance(eta):
        steps = jnp.int32(round(horizon * (1 - mu) / eta))
        keys = jax.random.split(jax.random.key(4), 64)
        found = jax.vmap(squares, in_axes=(0, None, None))(keys, jnp.float32(eta), steps)
        return [math.sqrt(values.mean()) for values in found]

    (near, far), (nearer, as_far) = distance(0.02), distance(0.005)
    assert 2.5 < near / nearer < 6
    assert as_far > 10 * nearer
    assert far / as_far < 1.5


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
            ({"momentum": -0.1}, ValueError, "momentum must be finite and at least 0, got -0.1"),
            ({"momentum": math.nan}, ValueError, "momentum must be finite .* got nan"),
            ({"momentum": None}, TypeError, "momentum must be a number, got None"),
            ({"learning_rate": 0.0}, ValueError, "learning_rate must be finite and above 0"),
            ({"learning_rate": "0.1"}, TypeError, "learning_rate must be a number"),
            (
                {"learning_rate": lambda k: 0.1 - 0.1 * k, "num_steps": 3},
                ValueError,
                "learning_rate must be finite and at least 0 at every step .* got -0.1 at step 2",
            ),
            ({"scheme": sde.Scheme(order=2)}, ValueError, "scheme must be of order 1"),
            (
                {"params": sde.Moving(jnp.zeros(3), jnp.zeros(2))},
                ValueError,
                "trace must be like",
            ),
            ({"num_steps": 0}, ValueError, "num_steps must be"),
            ({"save_at": [2]}, ValueError, "save_at must be between 0 and 1, got 2"),
            ({"key": 0}, TypeError, "key must be a typed PRNG key"),
        ],
    )
    def test_bad_arguments_are_refused(self, change, error, message):
        losses, start = problem(jnp.float32)
        good = {"learning_rate": 0.1, "momentum": 0.9, "num_steps": 1, "key": jax.random.key(0)}
        good |= {"losses": losses, "params": start, "law": law(jnp.float32)}
        with pytest.raises(error, match=message) as refused:
            sde.underdamped(**{**good, **change})
        assert len(str(refused.value)) <= 400

    def test_the_step_of_divergence_is_reported(self):
        losses, start = problem(jnp.float32)
        path = sde.underdamped(
            losses,
            start,
            law(jnp.float32),
            learning_rate=100.0,
            momentum=0.9,
            num_steps=200,
            key=jax.random.key(0),
            scheme=sde.Scheme(1),
        )
        assert 0 < path.diverged_at < 200
        assert np.isnan(path.params).all()
        assert np.isfinite(path.last_params).all()
