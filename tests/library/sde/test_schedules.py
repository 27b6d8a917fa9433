"""The SDE under schedules of the learning rate.

Held are the path, which is that of training, the variance in closed form, strong and weak orders,
and that bad schedules are refused.
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

N, B, HORIZON = 8, 2, 2.0
LAW = noise.cov(N, B)
DATA = jnp.asarray(np.random.default_rng(0).normal(size=(N, 2)), jnp.float32)


@loss.per_example
def quadratic(theta, example):
    """Losses of different curvatures, so that the noise depends on the parameters."""
    return 0.5 * (1 + 0.5 * example[0]) * (theta[0] - example[1]) ** 2 + 0.1 * theta[1] ** 2


LOSSES = loss.LossVector(quadratic, DATA)
START = jnp.asarray([1.0, -1.0])
SHAPES = {
    "cosine": optax.cosine_decay_schedule(1.0, HORIZON),
    "steps": optax.piecewise_constant_schedule(1.0, {0.99: 0.1}),
}


@pytest.mark.parametrize(
    "schedule",
    [
        optax.piecewise_constant_schedule(0.3, {4: 0.1}),
        optax.warmup_cosine_decay_schedule(0.0, 0.4, 3, 12),
    ],
    ids=["steps", "cosine after a warm-up"],
)
def test_one_substep_is_training_under_the_schedule_with_the_same_key(schedule):
    key, steps = jax.random.key(1), 12
    optimizer = transform.msgd(schedule, LAW, key)
    params, state = START, optimizer.init(START)
    points = [params]

    @jax.jit
    def train(params, state):
        updates, state = optimizer.update((), state, params, loss_vector_fn=quadratic, data=DATA)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = train(params, state)
        points.append(params)
    options = {"learning_rate": schedule, "scheme": sde.Scheme(1), "key": key}
    walk = functools.partial(sde.euler_maruyama, LOSSES, law=LAW, **options)
    path = walk(START, num_steps=steps, save_at=[0, 5, 12])
    np.testing.assert_allclose(path.params, np.stack(points)[[0, 5, 12]], rtol=1e-5, atol=1e-6)
    rates = [float(schedule(step)) for step in range(steps)]
    np.testing.assert_allclose(path.times, [0, sum(rates[:5]), sum(rates)], rtol=1e-6)
    # Continued from a saved point, with traced steps, it is the same path with the same times.
    rest = jax.jit(lambda at, first, end: walk(at, num_steps=end, first_step=first))
    rest = rest(path.params[1], jnp.int32(5), jnp.int32(12))
    np.testing.assert_array_equal(rest.params[0], path.params[2])
    np.testing.assert_allclose(rest.times, path.times[2:], rtol=1e-6)


@pytest.mark.slow
def test_the_variance_under_a_schedule_has_its_closed_form(x64):
    """The rate is eta / (1 + k eta) on the loss h theta^2 / 2, with noise of the variance s2.

    Of 40,000 paths, the standard error of a variance is sqrt(2 / 40,000) = 0.7 % of it. Iteration
    and SDE differ by 3.3 %.
    """
    eta, h, s2, steps, count = 0.1, 1.2, 0.9, 20, 40_000
    # The gradients at the two examples are their mean plus and minus sqrt(s2).
    centres = math.sqrt(s2) * jnp.asarray([1.0, -1.0])
    losses = loss.LossVector(lambda theta, x: h * theta**2 / 2 - x * theta, centres)
    law = noise.cov(2, 1, dtype=jnp.float64)
    keys = jax.random.split(jax.random.key(2), count)
    schedule = lambda step: eta / (1 + step * eta)  # noqa: E731

    def end(key, substeps):
        return sde.euler_maruyama(
            losses,
            jnp.asarray(1.0),
            law,
            learning_rate=schedule,
            num_steps=steps,
            key=key,
            scheme=sde.Scheme(substeps),
        ).last_params

    def expected(substeps):
        variance = 0.0
        for step in range(steps):
            rate = schedule(step)
            for _ in range(substeps):
                variance = (1 - rate * h / substeps) ** 2 * variance + rate**2 * s2 / substeps
        return variance

    assert expected(1) == pytest.approx(0.0179701266, abs=1e-9)
    # The SDE holds the rate over each iteration. If it fell within iterations too, the variance
    # would be 0.0168257570, which is further from that of the iteration.
    assert 0.0168257570 < expected(1024) < expected(1)
    for substeps in (1, 16):
        values = np.asarray(jax.vmap(functools.partial(end, substeps=substeps))(keys))
        ratio, error = values.var() / expected(substeps), math.sqrt(2 / count)
        assert_agree(ratio, 1, error, comparisons=2)
    assert_rejected(expected(16) / expected(1), 1, error, comparisons=2)


def strong(shape, iterate=None):
    sweep = sde.Sweep((0.1, 0.05, 0.025), HORIZON, 256, schedule=SHAPES[shape])
    scheme = sde.Scheme(substeps=8)
    return sde.strong_error(
        LOSSES, START, LAW, sweep, key=jax.random.key(3), scheme=scheme, iterate=iterate
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_strong_order_is_one_under_schedules(shape):
    """It is between 1 and 3/2, which it has where the noise dominates.

    With the sign of the paper's Eq. 71 it is 1/2. The standard errors are about 0.02.
    """
    order = strong(shape).order
    assert_agree(order.value, 1.25, order.standard_error, comparisons=2, slack=0.25)
    assert order.standard_error < 0.04
    if shape == "steps":
        return
    coupled = sde.coupling(LAW, N)
    wrong = strong(shape, lambda increment: coupled(-increment)).order
    assert_agree(wrong.value, 0.5, wrong.standard_error, comparisons=2, slack=0.03)
    assert wrong.standard_error < 0.05


@pytest.mark.slow
def test_training_at_a_constant_rate_is_far_from_the_sde_of_a_schedule():
    """The near miss of the strong error, on the same path at the same times."""
    eta = 0.05
    schedule = lambda step: eta * SHAPES["cosine"](step * eta)  # noqa: E731

    def ends(key):
        options = {"num_steps": round(HORIZON / eta), "key": key}
        walk = functools.partial(sde.euler_maruyama, LOSSES, START, LAW, **options)
        fine = walk(learning_rate=schedule, scheme=sde.Scheme(4))
        rates = (schedule, eta)
        coarse = [walk(learning_rate=rate, scheme=sde.Scheme(1)).last_params for rate in rates]
        return jnp.stack([jnp.linalg.norm(end - fine.last_params) for end in coarse])

    distances = jax.vmap(ends)(jax.random.split(jax.random.key(4), 64))
    scheduled, constant = np.sqrt((np.asarray(distances) ** 2).mean(0))
    assert scheduled < 0.05
    assert constant > 0.2


def test_the_weak_order_is_two_under_a_schedule():
    """Without noise, the errors have no standard error. The drift is that of order 2."""
    sweep = sde.Sweep((0.2, 0.1, 0.05), HORIZON, 4, schedule=SHAPES["cosine"])
    scheme = sde.Scheme(substeps=8, order=2)
    options = {"key": jax.random.key(5), "scheme": scheme, "control_variate": False}
    measured = sde.weak_error(LOSSES, START, noise.gd(N), sweep, **options)
    slope = np.polyfit(np.log(sweep.rates), np.log(np.abs(measured.errors)), 1)[0]
    assert abs(slope - 2) < 0.2


@pytest.mark.parametrize("measure", [sde.strong_error, sde.weak_error])
def test_errors_take_the_schedule_at_the_time_k_eta(measure):
    """Without noise, both sides are gradient descent, which the reference does in float64."""
    eta, substeps = 0.2, 4
    curved, pulls = (1 + 0.5 * np.asarray(DATA, np.float64).T[0]), np.asarray(DATA, np.float64).T[1]

    def mean_gradient(theta):
        return np.array([(curved * (theta[0] - pulls)).mean(), 0.2 * theta[1]])

    def end(substeps):
        theta = np.array([1.0, -1.0])
        for step in range(round(HORIZON / eta)):
            rate = eta * float(SHAPES["cosine"](step * eta))
            for _ in range(substeps):
                theta = theta - rate / substeps * mean_gradient(theta)
        return theta

    def value(theta):
        return (0.5 * curved * (theta[0] - pulls) ** 2).mean() + 0.1 * theta[1] ** 2

    one, other = end(1), end(substeps)
    expected = np.linalg.norm(one - other)
    if measure is sde.weak_error:
        expected = value(one) - value(other)
    sweep = sde.Sweep((eta,), HORIZON, 4, schedule=SHAPES["cosine"])
    options = {"key": jax.random.key(6), "scheme": sde.Scheme(substeps)}
    measured = measure(LOSSES, START, noise.gd(N), sweep, **options)
    np.testing.assert_allclose(measured.errors, [expected], rtol=1e-3)


@pytest.mark.usefixtures("user_errors")
class TestBadSchedules:
    @pytest.mark.parametrize(
        ("schedule", "message"),
        [
            (lambda k: 0.1 - 0.03 * k, r"at every step from 0 to 9, got -0.02 at step 4"),
            (lambda k: jnp.where(k < 7, 0.1, jnp.nan), r"got nan at step 7"),
            (lambda k: jnp.where(k < 3, 0.1, jnp.inf), r"got inf at step 3"),
            (lambda k: jnp.full(2, 0.1), r"learning_rate\(step\) must return a real number"),
        ],
    )
    def test_bad_rates_are_refused_with_their_step(self, schedule, message):
        options = {"num_steps": 10, "key": jax.random.key(0)}
        walk = functools.partial(sde.euler_maruyama, LOSSES, START, LAW, learning_rate=schedule)
        for run in (walk, lambda **options: jax.jit(lambda: walk(**options))()):
            with pytest.raises(ValueError, match=message) as refused:
                run(**options)
            assert len(str(refused.value)) <= 400

    def test_rates_beyond_the_last_step_are_not_checked(self):
        schedule = lambda k: 0.1 - 0.03 * k  # noqa: E731
        path = sde.euler_maruyama(
            LOSSES, START, LAW, learning_rate=schedule, num_steps=4, key=jax.random.key(0)
        )
        assert path.diverged_at == -1

    def test_bad_schedules_of_sweeps_and_drifts_are_refused(self):
        with pytest.raises(ValueError, match=r"schedule must be .* got -0.5 at time 1.5"):
            sde.Sweep((0.5,), 2.0, 4, schedule=lambda t: 1 - t)
        with pytest.raises(TypeError, match="schedule must be a function"):
            sde.Sweep((0.5,), 2.0, 4, schedule=0.1)
        with pytest.raises(TypeError, match="learning_rate must be a number"):
            sde.drift(LOSSES, START, order=2, learning_rate=SHAPES["cosine"])
