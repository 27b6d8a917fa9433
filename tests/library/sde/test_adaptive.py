"""The SDE of Adam and RMSprop.

Held are the path, against optax and against the equation in numpy, the strong and weak orders, the
scaling rule, and bad input.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import loss, noise, sde, transform
from tests.support.sde_problems import logistic
from tests.support.statistics import assert_agree, assert_rejected

N, D = 8, 2
_RNG = np.random.default_rng(0)
PULLS = _RNG.normal(size=(N, D))
HESSIAN = np.diag([2.0, 0.7]) + 0.1
START = np.array([1.0, -1.0])
ADAM = sde.Adam(0.2, b1=0.6, b2=0.8, eps=1e-3)
RMSPROP = sde.RMSprop(0.2, decay=0.8, eps=1e-3, initial_scale=1.0)
RULES = {"adam": ADAM, "rmsprop": RMSPROP, "adam without mean": sde.Adam(0.2, b1=0.0, b2=0.8)}


@loss.per_example
def quadratic(theta, pull):
    """Losses of different curvatures, so that the noise depends on the parameters."""
    hessian = jnp.asarray(HESSIAN, theta.dtype)
    return (1 + 0.3 * pull[0]) * theta @ hessian @ theta / 2 - 2 * pull @ theta


def problem(dtype=jnp.float64, microbatch_size=None):
    pulls = jnp.asarray(PULLS, dtype)
    losses = loss.LossVector(quadratic, pulls, microbatch_size=microbatch_size)
    return losses, jnp.asarray(START, dtype)


def trained(losses, start, law, rule, key, num_steps):
    """The parameters after some steps of optax, with weights from the path of the key."""
    optimizer = rule.optimizer()

    def advance(step, at):
        params, state = at
        gradient = losses.gradient(params, law.sample(key, step))
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, num_steps, advance, (start, optimizer.init(start)))[0]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("schedule", [None, optax.cosine_decay_schedule(0.2, 15)])
def test_without_noise_one_substep_is_a_step_of_optax(x64, name, schedule):
    (losses, start), law, key = problem(), noise.gd(N, dtype=jnp.float64), jax.random.key(0)
    rule = RULES[name]
    if schedule is not None:
        rule = (
            sde.Adam(schedule, rule.decays[1], rule.decays[0])
            if rule.decays[2]
            else (sde.RMSprop(schedule, rule.decays[0], initial_scale=1.0))
        )
    path = sde.adaptive(losses, start, law, rule, num_steps=12, key=key, scheme=sde.Scheme(1))
    expected = trained(losses, start, law, rule, key, 12)
    np.testing.assert_allclose(path.last.params, expected, rtol=1e-9)
    rates = [0.2 if schedule is None else float(schedule(k)) for k in range(12)]
    np.testing.assert_allclose(path.times, [np.square(rates).sum()], rtol=1e-6)


def test_training_with_the_same_key_is_nearer_than_with_another():
    """Training by `transform.with_noise` differs only by the squares of the noise in the scale.

    It must end clearly nearer to the path of its own key than to that of another, and the path must
    be much longer than the distance.
    """
    (losses, start), key = problem(jnp.float32), jax.random.key(1)
    law, rule, start = noise.cov(N, 0.05), sde.Adam(0.02, b1=0.9, b2=0.99, eps=1e-3), start / 2
    optimizer = transform.with_noise(rule.optimizer(), law, key)

    @jax.jit
    def train(carry, _):
        params, state = carry
        extra = {"loss_vector_fn": quadratic, "data": losses.data}
        updates, state = optimizer.update((), state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    end = jax.lax.scan(train, (start, optimizer.init(start)), length=100)[0][0]
    walk = jax.jit(lambda key: sde.adaptive(losses, start, law, rule, num_steps=100, key=key))
    same, other = (walk(k).last.params for k in (key, jax.random.key(2)))
    assert np.linalg.norm(end - same) < 0.6 * np.linalg.norm(end - other)
    assert np.linalg.norm(end - start) > 5 * np.linalg.norm(end - same)


@pytest.mark.parametrize("name", RULES)
def test_paths_are_those_of_the_equation_in_numpy(x64, name):
    """The reference has dense matrices and four substeps per iteration."""
    (losses, start), key, substeps, rule = problem(), jax.random.key(2), 4, RULES[name]
    law = noise.cov(N, 2, dtype=jnp.float64)
    covariance = (np.eye(N) - 1 / N) / (2 * N)
    root, h = np.eye(N) / math.sqrt(2 * N) - np.full((N, N), 1 / (N * math.sqrt(2 * N))), 1 / 4
    decay, decay_of_mean, adam = rule.decays
    theta, m, v, count = START.copy(), np.zeros(D), np.full(D, 0.0 if adam else 1.0), 0
    for step in range(5):
        draw = functools.partial(sde.brownian_increments, key, step, N, dtype=jnp.float64)
        for unit in np.asarray(draw(substeps=substeps)):
            count += 1
            G = (1 + 0.3 * PULLS[:, :1]) * (HESSIAN @ theta) - 2 * PULLS
            kick = h * G.mean(0) - G.T @ root @ unit
            v = v + (1 - decay) * h * (np.diag(G.T @ covariance @ G) + G.mean(0) ** 2 - v)
            m = m + (1 - decay_of_mean) * (kick - h * m)
            corrected = v / (1 - (1 - (1 - decay) * h) ** count) if adam else v
            push = h * m / (1 - (1 - (1 - decay_of_mean) * h) ** count) if decay_of_mean else kick
            theta = theta - 0.2 * push / (np.sqrt(corrected) + rule.eps)
    scheme = sde.Scheme(substeps)
    path = sde.adaptive(losses, start, law, rule, num_steps=5, key=key, scheme=scheme)
    np.testing.assert_allclose(path.last.params, theta, rtol=1e-9)
    np.testing.assert_allclose(path.last.square, v, rtol=1e-9)
    np.testing.assert_allclose(path.last.mean, m if decay_of_mean else 0 * m, rtol=1e-9)


@pytest.mark.optimized
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_a_continued_path_is_the_same_and_micro_batches_change_nothing(name):
    (losses, start), law, key = problem(jnp.float32), noise.fisher(N, 2), jax.random.key(3)
    walk = functools.partial(sde.adaptive, law=law, rule=RULES[name], key=key)
    path = walk(losses, start, num_steps=6, save_at=[0, 2, 6])
    np.testing.assert_array_equal(path.params[0], start)
    middle = sde.AdaptiveState(path.params[1], path.mean[1], path.square[1], 2)
    rest = walk(losses, middle, num_steps=6)
    for one, other in zip(rest.last, path.last, strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(path.last.step) == 6
    parts = walk(problem(jnp.float32, 3)[0], start, num_steps=6)
    np.testing.assert_allclose(parts.last.params, path.last.params, rtol=2e-5)


@functools.cache
def ends(name, refinement, power=0.5, paths=1000):
    """Ends of training and of the SDE on the same paths, at the time 0.48: [paths, D] each.

    The law has `refinement` times the covariance, and the learning rate is divided by
    `refinement` to the `power`, which is 1/2 by the scaling rule.
    """
    with jax.enable_x64(True):
        rule = RULES[name].scaled(1 / refinement)
        num_steps = 12 * refinement
        losses, start = problem()
        if name == "rmsprop":
            losses, start = logistic(N, D, jnp.float64).losses, jnp.array([-1.5, 1.0])
        law = noise.cov(N, 2 / refinement, dtype=jnp.float64)
        rate = 0.2 / refinement**power
        iterate = dataclasses.replace(rule, learning_rate=rate)

        def both(key):
            options = {"num_steps": num_steps, "key": key, "scheme": sde.Scheme(8)}
            path = sde.adaptive(losses, start, law, rule, **options)
            return trained(losses, start, law, iterate, key, num_steps), path.last.params

        keys = jax.random.split(jax.random.key(4), paths)
        return tuple(map(np.asarray, jax.jit(jax.vmap(both))(keys)))


def strong(name, refinement, **options):
    """The root mean square distance of the ends, with its standard error."""
    one, other = ends(name, refinement, **options)
    squares = ((one - other) ** 2).sum(1)
    error = math.sqrt(squares.mean())
    return error, squares.std(ddof=1) / math.sqrt(len(squares)) / (2 * error)


def squared(theta):
    return (theta**2).sum(1)


def first(theta):
    return theta[:, 0]


def weak(name, refinement, value=squared, **options):
    """The difference of the expected value, with its standard error."""
    one, other = ends(name, refinement, **options)
    differences = value(one) - value(other)
    return differences.mean(), differences.std(ddof=1) / math.sqrt(len(differences))


def order(of, name, refinements, paths=1000):
    """The order in eta, which is proportional to the inverse root of the refinement."""
    errors, spreads = np.array([of(name, each, paths=paths) for each in refinements]).T
    etas = 0.2 / np.sqrt(np.array(refinements))
    return sde.ErrorSweep(etas, errors, spreads, paths - 1).order


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_the_strong_order_is_one_in_eta(name):
    """At these rates, the next order adds up to 0.25 to it."""
    measured = order(strong, name, (2, 4, 8))
    assert measured.standard_error < 0.1
    assert_agree(measured.value, 1.0, measured.standard_error, slack=0.25)
    assert_rejected(measured.value, 0.5, measured.standard_error)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value", "refinements", "paths"),
    [("adam", first, (2, 4, 8), 24_000), ("rmsprop", squared, (1, 2, 4), 1000)],
    ids=["adam", "rmsprop"],
)
def test_the_weak_order_is_two_in_eta(name, value, refinements, paths):
    """It is 1 in eta^2, the unit of time; at these rates, the next order adds up to 0.2.

    Adam's error of E |theta|^2 is mostly noise, so it is measured by E theta_1.
    """
    measured = order(functools.partial(weak, value=value), name, refinements, paths)
    assert measured.standard_error < 0.15
    assert_agree(measured.value, 2.0, measured.standard_error, slack=0.2)
    assert_rejected(measured.value, 1.0, measured.standard_error)


@pytest.mark.slow
def test_the_weak_error_of_adam_is_of_higher_order_than_the_distance():
    """At 48 steps it is at most a tenth of the distance, and above a half by the linear rule."""
    difference, spread = weak("adam", 4)
    distance, _ = strong("adam", 4)
    assert_agree(difference, 0.0, spread, slack=0.1 * distance)
    linear, linear_spread = weak("adam", 4, power=1.0)
    assert_rejected(linear, 0.0, linear_spread, slack=0.5 * distance)


@pytest.mark.slow
def test_the_error_shrinks_by_the_square_root_rule_and_not_by_the_linear_one():
    """From 12 to 48 steps of RMSprop, weak errors shrink by 4, of which 10 % are the next order's.

    By the linear rule they do not vanish, and are more than four times as large.
    """
    (first, first_spread), (second, second_spread) = weak("rmsprop", 1), weak("rmsprop", 4)
    assert_agree(4 * second, first, math.hypot(4 * second_spread, first_spread), slack=0.1 * first)
    linear, linear_spread = weak("rmsprop", 4, power=1.0)
    assert_rejected(linear, 0.0, linear_spread)
    assert abs(linear) > 4 * abs(second)


class TestScalingRule:
    def test_scaled_rules_have_the_numbers_worked_out_by_hand(self):
        scaled = sde.Adam(0.01, b1=0.9, b2=0.99, eps=1e-8).scaled(4)
        found = scaled.learning_rate, scaled.b1, scaled.b2, scaled.eps
        np.testing.assert_allclose(found, (0.02, 0.6, 0.96, 5e-9), rtol=1e-12)
        scaled = sde.RMSprop(0.01, decay=0.99, eps=1e-8, initial_scale=1.0).scaled(1 / 4)
        found = scaled.learning_rate, scaled.decay, scaled.eps, scaled.initial_scale
        np.testing.assert_allclose(found, (0.005, 0.9975, 2e-8, 4.0), rtol=1e-12)

    @pytest.mark.parametrize("rule", [ADAM, RMSPROP], ids=["adam", "rmsprop"])
    def test_scaling_back_and_forth_gives_the_same_rule(self, rule):
        back = rule.scaled(1 / 16).scaled(16)
        np.testing.assert_allclose(list(vars(back).values()), list(vars(rule).values()), rtol=1e-9)

    def test_schedules_are_stretched(self):
        schedule = optax.cosine_decay_schedule(0.1, 20)
        scaled = sde.Adam(schedule).scaled(1 / 4).learning_rate
        found = [float(scaled(k)) for k in (0, 40, 60, 80)]
        expected = [0.5 * float(schedule(k)) for k in (0, 10, 15, 20)]
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)

    def test_the_law_of_svag_has_the_covariance_that_the_rule_expects(self):
        svag, small = noise.svag(noise.sgd(N, 4, replace=True), 4), noise.cov(N, 1)
        for name in ("diagonal", "off_diagonal"):
            one, other = (getattr(law.covariance, name) for law in (svag, small))
            assert one == pytest.approx(other)


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"rule": optax.adam(0.1)}, TypeError, r"rule must be an sde\.Adam or an sde\.RMSprop"),
            ({"scheme": sde.Scheme(order=2)}, ValueError, "scheme must be of order 1 for adaptive"),
            ({"num_steps": 0}, ValueError, "num_steps must be"),
            ({"save_at": [2]}, ValueError, "save_at must be between 0 and 1, got 2"),
            ({"key": 0}, TypeError, "key must be a typed PRNG key"),
            ({"law": noise.cov(N + 1, 2)}, ValueError, "num_examples = 9, but the data have 8"),
            ({"law": noise.random_reshuffling(N, 2)}, ValueError, "law must have independent"),
            (
                {"rule": sde.Adam(lambda k: 0.1 - k)},
                ValueError,
                "learning_rate must be finite and at least 0 at every step .* got -0.9 at step 1",
            ),
            (
                {"params": sde.AdaptiveState(jnp.ones(2), jnp.ones(3), jnp.ones(2))},
                ValueError,
                "mean must be like params",
            ),
            (
                {"params": sde.AdaptiveState(jnp.ones(2), jnp.ones(2), -jnp.ones(2))},
                ValueError,
                "square must be at least 0, got -1",
            ),
        ],
    )
    def test_bad_arguments_are_refused(self, change, error, message):
        losses, start = problem(jnp.float32)
        good = {"rule": ADAM, "num_steps": 1, "key": jax.random.key(0)}
        good |= {"losses": losses, "params": start, "law": noise.cov(N, 2)}
        if "rule" in change and callable(getattr(change["rule"], "learning_rate", None)):
            change = change | {"num_steps": 2}
        with pytest.raises(error, match=message) as refused:
            sde.adaptive(**{**good, **change})
        assert len(str(refused.value)) <= 400

    @pytest.mark.parametrize(
        ("make", "error", "message"),
        [
            (lambda: sde.Adam(0.0), ValueError, "learning_rate must be finite and above 0"),
            (lambda: sde.Adam(None), TypeError, "learning_rate must be a number, got None"),
            (lambda: sde.Adam(0.1, b1=1.0), ValueError, "b1 must be at least 0 and below 1"),
            (lambda: sde.Adam(0.1, b2=math.nan), ValueError, "b2 must be finite .* got nan"),
            (lambda: sde.Adam(0.1, eps=-1.0), ValueError, "eps must be finite and at least 0"),
            (lambda: sde.RMSprop(0.1, decay=-0.1), ValueError, "decay must be finite and at least"),
            (lambda: sde.RMSprop(0.1, initial_scale="0"), TypeError, "initial_scale must be a num"),
            (lambda: ADAM.scaled(0.0), ValueError, "ratio must be finite and above 0, got 0.0"),
            (lambda: ADAM.scaled("4"), TypeError, "ratio must be a number"),
            (
                lambda: ADAM.scaled(4.0),
                ValueError,
                r"ratio must be at most 1/\(1 - b1\) = 2.5, since",
            ),
            (lambda: RMSPROP.scaled(6.0), ValueError, r"at most 1/\(1 - decay\) = 5, since"),
        ],
    )
    def test_bad_numbers_of_rules_are_refused(self, make, error, message):
        with pytest.raises(error, match=message) as refused:
            make()
        assert len(str(refused.value)) <= 400

    def test_the_step_of_divergence_is_reported(self):
        losses, start = problem(jnp.float32)
        rule = sde.Adam(1e37, eps=0.0)
        options = {"num_steps": 200, "key": jax.random.key(0), "scheme": sde.Scheme(1)}
        path = sde.adaptive(losses, start, noise.cov(N, 2), rule, **options)
        assert 0 < path.diverged_at < 200
        assert np.isnan(path.params).all()
        assert np.isfinite(path.last.params).all()
        assert int(path.last.step) == int(path.diverged_at) - 1
