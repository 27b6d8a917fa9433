"""Errors of momentum, Adam and RMSprop: against paths made one by one, bad input."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import loss, noise, sde
from msgd_jax._streams import Stream, derive
from tests.library.sde.test_adaptive import ADAM, RMSPROP, N, problem, trained

KEY = jax.random.key(5)
FRICTION = 1.5
RULES = {"momentum": sde.Momentum(FRICTION), "adam": ADAM, "rmsprop": RMSPROP}


def law():
    return noise.cov(N, 2, dtype=jnp.float64)


def sweep(name, rates=(0.1,), paths=4, **options):
    """Two iterations at the rate 0.1."""
    horizon = 2 * RULES[name].time(0.1)
    return sde.Sweep(rates, horizon, paths, rule=RULES[name], **options)


def by_hand(name, keys, schedule=None):
    """Ends of training and of the SDE on the path of each key, [paths, D] each."""
    of_one = functools.partial(on_one_path, name, schedule=schedule)
    return map(np.asarray, jax.jit(jax.vmap(of_one))(keys))


def on_one_path(name, key, schedule=None):
    """Ends of training and of the SDE on one path, at the rate 0.1 (of which it is a half of 0.2).

    At half of an adaptive rule's own rate the batch is a fourth, so the law has 4 times the noise.
    """
    losses, start = problem()
    rate = 0.1 if schedule is None else lambda k: 0.1 * schedule(k * RULES[name].time(0.1))
    options = {"num_steps": 2, "key": key, "scheme": sde.Scheme(4)}
    if name == "momentum":
        mu = 1 - FRICTION * math.sqrt(0.1)
        heavy = optax.sgd(rate, momentum=mu)
        state, params = heavy.init(start), start
        for step in range(2):
            gradient = losses.gradient(params, law().sample(key, step))
            updates, state = heavy.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        walk = sde.underdamped(losses, start, law(), learning_rate=rate, momentum=mu, **options)
        return params, walk.last_params
    rule, noisy = RULES[name].scaled(0.25), noise.cov(N, 0.5, dtype=jnp.float64)
    rule = type(rule)(**{**vars(rule), "learning_rate": rate})
    end = trained(losses, start, noisy, rule, key, 2)
    return end, sde.adaptive(losses, start, noisy, rule, **options).last.params


@pytest.mark.parametrize(
    ("name", "schedule"),
    [*((name, None) for name in RULES), ("momentum", optax.cosine_decay_schedule(1.0, 1.0))],
    ids=[*RULES, "momentum and a schedule"],
)
def test_the_strong_error_is_the_distance_of_training_and_sde(x64, name, schedule):
    own = sweep(name, schedule=schedule)
    found = sde.strong_error(*problem(), law(), own, key=KEY, scheme=sde.Scheme(4))
    keys = jax.random.split(derive(KEY, Stream.PATHS, 0), 4)
    one, other = by_hand(name, jax.vmap(jax.random.split)(keys)[:, 0], schedule)
    squares = ((one - other) ** 2).sum(1)
    np.testing.assert_allclose(found.errors, [math.sqrt(np.mean(squares))], rtol=1e-7)


@pytest.mark.parametrize("name", RULES)
def test_the_weak_error_is_the_difference_of_means(x64, name):
    found = sde.weak_error(
        *problem(),
        law(),
        sweep(name),
        key=KEY,
        scheme=sde.Scheme(4),
        test_fn=lambda params, data: params @ params,
        control_variate=False,
    )
    sides = jax.random.split(derive(KEY, Stream.PATHS, 0))
    means = [
        (list(by_hand(name, jax.random.split(side, 4)))[i] ** 2).sum(1).mean()
        for i, side in enumerate(sides)
    ]
    np.testing.assert_allclose(found.errors, [means[0] - means[1]], rtol=1e-6)


@pytest.mark.slow
def test_the_control_variate_of_momentum_takes_away_the_noise_of_a_linear_problem(x64):
    """Gradients that are linear, with the same curvature: the response to noise is exact."""

    @loss.per_example
    def quadratic(theta, pull):
        return theta @ theta / 2 - pull @ theta

    losses, start = problem()
    losses = losses.replace(quadratic)
    measure = functools.partial(sde.weak_error, losses, start, law(), sweep("momentum"), key=KEY)
    mean = {"test_fn": lambda params, data: params.sum()}
    assert measure(**mean).standard_errors[0] < 1e-12
    assert measure(**mean, control_variate=False).standard_errors[0] > 1e-3


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: sde.Momentum(0.0), ValueError, "friction must be finite and above 0, got 0.0"),
            (lambda: sde.Momentum("1"), TypeError, "friction must be a number, got '1'"),
            (
                lambda: sde.Sweep([0.1], 0.2, 4, rule=optax.sgd(0.1)),
                TypeError,
                "rule must be an sde.Momentum, an sde.Adam, an sde.RMSprop or None, got",
            ),
            (
                lambda: sde.Sweep([0.25], 2.0, 4, rule=sde.Momentum(3.0)),
                ValueError,
                r"learning_rates must be at most 1/friction\^2 = 0.111111, .* got 0.25",
            ),
            (
                lambda: sde.Sweep([0.1], 0.2, 4, rule=sde.Momentum(1.0)),
                ValueError,
                "divide horizon = 0.2 into whole iterations, got 0.1, which makes 0.632456",
            ),
            (
                lambda: sde.Sweep([0.4], 0.48, 4, rule=ADAM),
                ValueError,
                r"ratio must be at most 1/\(1 - b1\) = 2.5",
            ),
            (
                lambda: sde.Sweep([0.1], 0.02, 4, rule=sde.Adam(optax.constant_schedule(0.1))),
                TypeError,
                "rule.learning_rate must be a number",
            ),
        ],
    )
    def test_sweeps(self, make, error, message):
        with pytest.raises(error, match=message) as refused:
            make()
        assert len(str(refused.value)) <= 400

    @pytest.mark.parametrize("measure", [sde.strong_error, sde.weak_error])
    def test_a_scheme_of_order_two(self, measure):
        with pytest.raises(ValueError, match="scheme must be of order 1 with a rule, got order 2"):
            measure(
                *problem(jnp.float32),
                noise.cov(N, 2),
                sweep("momentum"),
                key=KEY,
                scheme=sde.Scheme(order=2),
            )

    def test_an_iterate_with_an_adaptive_rule(self):
        other = {"iterate": noise.sgd(N, 2), "key": KEY}
        with pytest.raises(ValueError, match="iterate must be None with an adaptive rule"):
            sde.strong_error(*problem(jnp.float32), noise.cov(N, 2), sweep("adam"), **other)
