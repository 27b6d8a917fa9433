"""When and where paths leave a region.

Mean exit times are held against the closed form in one dimension, and the direction of the exit
against theory in two.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad

from msgd_jax import loss, noise, sde
from msgd_jax._streams import Stream, derive
from tests.support.statistics import assert_agree, assert_rejected

# -zeta(1/2) / sqrt(2 pi): a barrier that is looked at only every dt acts as if it were this many
# sqrt(dt) s further away (Broadie, Glasserman and Kou, 1997).
LATE = 0.5826


def mean_exit_time(low, high, start=0.0, h=1.0, s=1.0):
    """The mean time at which dX = -h X dt + s dW leaves (low, high), by its double integral."""
    k = h / s**2
    S = lambda y: quad(lambda z: math.exp(k * z**2), low, y)[0]  # noqa: E731
    weight = lambda y: math.exp(-k * y**2)  # noqa: E731
    total, here = S(high), S(start)
    below = quad(lambda y: S(y) * weight(y), low, start)[0]
    above = quad(lambda y: (total - S(y)) * weight(y), start, high)[0]
    return 2 / s**2 * ((total - here) / total * below + here / total * above)


def bowl(eta):
    """Losses with h = 1 and s = 1: their gradient noise has the variance 1/eta everywhere."""
    fn = loss.per_example(lambda theta, x: theta**2 / 2 - x * theta)
    return loss.LossVector(fn, jnp.asarray([-1.0, 1.0]) / math.sqrt(eta))


LAW = noise.cov(2, 1)
interval = lambda low, high: lambda theta: (low < theta) & (theta < high)  # noqa: E731


def leave(low=-1.0, high=1.0, *, eta=0.01, count=4000, steps=4000, **options):
    options = {"scheme": sde.Scheme(1), "learning_rate": eta, "key": jax.random.key(0), **options}
    return sde.exit_time(
        bowl(eta),
        jnp.asarray(0.0),
        LAW,
        interval(low, high),
        sde.Trials(count, steps),
        **options,
    )


def test_the_closed_form_has_the_known_values():
    assert mean_exit_time(-1, 1) == pytest.approx(1.4452456133883471, rel=1e-9)
    assert mean_exit_time(-0.5, 1) == pytest.approx(0.5907040425765, rel=1e-9)
    assert mean_exit_time(-1, 1, s=0.5) == pytest.approx(27.43273915249977, rel=1e-9)


@pytest.mark.parametrize(("low", "substeps"), [(-1.0, 1), (-0.5, 1), (-1.0, 4)])
def test_mean_exit_times_are_the_closed_form_at_the_shifted_barrier(low, substeps):
    """Of 4,000 paths, the standard error is about 1.5 %.

    The next term of the shift is O(dt), below 0.5 % here. The time at the barrier itself is 9 to
    25 % off, and rejected.
    """
    eta = 0.01 * min(substeps, 2)
    exits = leave(low, 1.0, eta=eta, scheme=sde.Scheme(substeps))
    assert exits.censored == 0
    mean, shift = exits.restricted_mean, LATE * math.sqrt(eta / substeps)
    expected = mean_exit_time(low - shift, 1 + shift)
    if (low, substeps) == (-1.0, 1):
        assert expected == pytest.approx(1.69995, abs=1e-5)
    assert_agree(mean.value, expected, mean.standard_error)
    assert mean.standard_error < 0.02 * expected
    assert_rejected(mean.value, mean_exit_time(low, 1), mean.standard_error)


def test_exits_of_the_iteration_are_those_of_its_path():
    """With a Gaussian law and one substep, the iteration and the SDE are the same.

    Rounding can move an exit by an iteration, so that a few may differ. More paths than fit one
    pass leave the first ones as they are.
    """
    few = functools.partial(leave, count=50)
    one, other, passes = few(), few(scheme=None), leave(count=1050)
    for field in ("times", "iterations", "exited"):
        np.testing.assert_array_equal(getattr(one, field), getattr(passes, field)[:50])
        assert (getattr(one, field) == getattr(other, field)).mean() > 0.95
    np.testing.assert_allclose(one.times, 0.01 * one.iterations, rtol=1e-12)
    assert (np.abs(one.points) >= 1).all()
    # Mini-batches of one make steps of +1/10 or -1/10: this walk leaves at other times.
    sgd = sde.exit_time(
        bowl(0.01),
        jnp.asarray(0.0),
        noise.sgd(2, 1),
        interval(-1, 1),
        sde.Trials(50, 4000),
        learning_rate=0.01,
        key=jax.random.key(0),
        scheme=None,
    )
    assert sgd.censored == 0
    assert (np.abs(sgd.points) < 1.1).all()
    assert (sgd.times != other.times).any()


def test_paths_that_have_not_left_are_reported_as_censored():
    whole, short = leave(count=400), leave(count=400, steps=100)
    assert short.limit == pytest.approx(1.0)
    np.testing.assert_allclose(short.times, np.minimum(whole.times, 1.0))
    np.testing.assert_array_equal(short.exited, whole.times <= 1.0 + 1e-9)
    assert short.censored == 400 - short.exited.sum() > 0
    low, high = short.exited_interval
    assert low < short.exited_fraction < high
    assert short.restricted_mean.value < whole.restricted_mean.value
    assert (np.abs(short.points[~short.exited]) < 1).all()


def test_the_exponential_mean_counts_censored_paths():
    """Of 2,000 exponential times cut at their median, the mean of those that left is far off."""
    times = np.random.default_rng(0).exponential(3.0, 2000)
    limit = 3 * math.log(2)
    cut, exited = np.minimum(times, limit), times < limit
    exits = sde.ExitTimes(cut, np.ones(2000, np.int32), exited, cut, limit)
    mean = exits.exponential_mean
    assert_agree(mean.value, 3, mean.standard_error)
    assert mean.standard_error == pytest.approx(3 / math.sqrt(1000), rel=0.1)
    assert cut[exited].mean() < 1.2
    none = sde.ExitTimes(cut, np.ones(2000, np.int32), exited & False, cut, limit)
    with pytest.raises(ValueError, match=r"No path left until 2\.079"):
        none.exponential_mean  # noqa: B018


def test_times_are_sums_of_the_scheduled_learning_rates():
    schedule = optax.piecewise_constant_schedule(0.01, {50: 0.25})
    exits = leave(count=20, learning_rate=schedule, scheme=sde.Scheme(2))
    rates = np.where(np.arange(4000) < 50, 0.01, 0.0025)
    ends = np.cumsum(rates)
    late = ends[exits.iterations - 1] - exits.times
    parts = late / rates[exits.iterations - 1]
    assert (np.isclose(parts, 0, atol=1e-3) | np.isclose(parts, 0.5, atol=1e-3)).all()
    assert exits.limit == pytest.approx(ends[-1], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("substeps", [1, 4])
def test_exits_with_momentum_are_those_of_the_underdamped_path(substeps):
    """The reference is `underdamped` on the same paths, seen at the ends of iterations.

    With one substep the exits are the same, and almost all are those of the iteration: rounding
    can move an exit.
    """
    eta, mu, count, steps = 0.01, 0.8, 20, 400
    schedule = optax.piecewise_constant_schedule(eta, {30: 0.5})
    options = {"learning_rate": schedule, "momentum": mu, "count": count, "steps": steps}
    exits = leave(scheme=sde.Scheme(substeps), **options)
    assert exits.censored < count
    keys = jax.random.split(derive(jax.random.key(0), Stream.PATHS), count)
    walk = lambda key: sde.underdamped(  # noqa: E731
        bowl(eta),
        jnp.asarray(0.0),
        LAW,
        learning_rate=schedule,
        momentum=mu,
        num_steps=steps,
        key=key,
        scheme=sde.Scheme(substeps),
        save_at=range(1, steps + 1),
    )
    paths = jax.vmap(walk)(keys)
    outside = np.abs(np.asarray(paths.params)) >= 1
    first = np.where(outside.any(1), outside.argmax(1) + 1, steps)
    # A path that is outside within an iteration may be inside again at its end.
    assert (exits.iterations <= first).all()
    if substeps == 1:
        np.testing.assert_array_equal(exits.iterations, first)
        at = np.asarray(paths.params)[np.arange(count), first - 1]
        np.testing.assert_allclose(exits.points, at, rtol=1e-5)
        times = np.asarray(paths.times)[np.arange(count), first - 1]
        np.testing.assert_allclose(exits.times, times, rtol=1e-4)
        drawn = leave(scheme=None, **options)
        assert (drawn.iterations == exits.iterations).mean() > 0.9
        light = leave(scheme=None, **{**options, "momentum": None})
        assert (light.iterations == exits.iterations).mean() < 0.5


def direction(covariance):
    """The fraction of paths that leave a well through its saddle in x, and not in y.

    The potential is ``(x^2 - 1)^2 + (y^2 - 9/4)^2 / 9``. At its minimum (-1, -3/2), the curvatures
    are 8 and 2. The barriers are 1 in x and 9/16 in y.
    """
    eta, (cx, cy) = 0.02, covariance
    pulls = jnp.asarray([[-1.0, -1], [-1, 1], [1, -1], [1, 1]]) * jnp.sqrt(
        jnp.asarray([[cx, cy]]) / eta
    )
    fn = loss.per_example(
        lambda t, pull: (t[0] ** 2 - 1) ** 2 + (t[1] ** 2 - 2.25) ** 2 / 9 - pull @ t
    )
    exits = sde.exit_time(
        loss.LossVector(fn, pulls),
        jnp.asarray([-1.0, -1.5]),
        noise.cov(4, 1),
        lambda t: (t[0] < 0) & (t[1] < 0),
        sde.Trials(100, 20_000),
        learning_rate=eta,
        key=jax.random.key(3),
        scheme=None,
    )
    assert exits.exited_fraction > 0.5
    return float((exits.points[exits.exited, 0] >= 0).mean())


@pytest.mark.slow
def test_the_direction_of_the_exit_depends_on_the_covariance():
    """Isotropic noise leaves over the low barrier, noise like the Hessian in the sharp direction.

    The quasi-potential is 2 barrier / variance: 6.7 in x and 3.75 in y for the variance 0.3, and
    2.5 and 5.6 for the covariance 0.1 H. With the prefactors of Eyring and Kramers, 18 % and 99 %
    leave through x if the noise is small. The standard errors of 100 paths are up to 5 %, and the
    bounds leave about three of them.
    """
    assert direction((0.3, 0.3)) < 0.4
    assert direction((0.8, 0.2)) > 0.85


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"inside": lambda t: t > 1}, ValueError, "inside must hold at params"),
            ({"inside": lambda t: t}, ValueError, "inside must return a boolean scalar"),
            ({"inside": lambda t: t[None] < 1}, ValueError, "inside must return a boolean"),
            ({"inside": 1.0}, TypeError, "inside must be a function"),
            ({"learning_rate": 0.0}, ValueError, "learning_rate must be finite and above 0"),
            ({"learning_rate": lambda k: -1.0}, ValueError, "got -1 at step 0"),
            ({"trials": 4}, TypeError, r"trials must be an sde\.Trials, got 4"),
            ({"momentum": 1.0}, ValueError, "momentum must be at least 0 and below 1, got 1.0"),
            ({"momentum": "0.9"}, TypeError, "momentum must be a number"),
            (
                {"momentum": 0.9, "scheme": sde.Scheme(order=2)},
                ValueError,
                "scheme must be of order 1 with momentum, got order 2",
            ),
            ({"key": 0}, TypeError, "key must be a typed PRNG key"),
            ({"scheme": 1}, TypeError, "scheme must be"),
            ({"law": noise.cov(3, 1)}, ValueError, "num_examples = 3"),
            ({"law": noise.cov(3, 1), "scheme": None}, ValueError, "num_examples = 3"),
            ({"law": noise.random_reshuffling(2, 1)}, ValueError, "independent steps"),
        ],
    )
    def test_bad_arguments_are_refused(self, change, error, message):
        good = {
            "losses": bowl(0.1),
            "params": jnp.asarray(0.0),
            "law": LAW,
            "inside": interval(-1, 1),
            "trials": sde.Trials(4, 5),
            "learning_rate": 0.1,
            "key": jax.random.key(0),
        }
        with pytest.raises(error, match=message) as refused:
            sde.exit_time(**{**good, **change})
        assert len(str(refused.value)) <= 400

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ((1, 5), ValueError, "num_paths must be at least 2, got 1"),
            ((4, 0), ValueError, "max_steps must be between 1 and"),
            ((4, 2.0), TypeError, "max_steps must be an integer"),
            ((4, 5, 0), ValueError, "at_once must be at least 1, got 0"),
        ],
    )
    def test_bad_numbers_of_trials_are_refused(self, options, error, message):
        with pytest.raises(error, match=message):
            sde.Trials(*options)

    def test_paths_that_diverge_are_an_error_and_no_exit(self):
        fn = loss.per_example(lambda theta, x: theta**4 - x * theta)
        with pytest.raises(ValueError, match=r"of 4 paths left the finite numbers.* iteration"):
            sde.exit_time(
                loss.LossVector(fn, jnp.asarray([-1.0, 1.0])),
                jnp.asarray(2.0),
                LAW,
                lambda theta: theta == theta,
                sde.Trials(4, 50),
                learning_rate=1.0,
                key=jax.random.key(0),
            )
