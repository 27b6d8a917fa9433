"""The numbers of local complexities where they are delicate.

Held are draws that are independent of the user's, losses with a large constant, starts at critical
points, and intervals from few draws.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import complexity, loss, noise
from msgd_jax.complexity._theorem1 import _inequality
from tests.library.test_streams import DRAWN, INTEGERS, correlations
from tests.support.affine import of_problem, penalty_of
from tests.support.statistics import bound

KEY = jax.random.key(11)
LAWS = {
    "rademacher": complexity.rademacher,
    "rademacher of a subset": lambda n: complexity.rademacher(n, -(-n // 3)),
    "rademacher with replacement": lambda n: complexity.rademacher(n, -(-n // 3), replace=True),
    "gaussian": complexity.gaussian,
    "sgd": lambda n: complexity.sgd(n, -(-n // 5)),
    "sgd with replacement": lambda n: complexity.sgd(n, -(-n // 5), replace=True),
    "of a noise": lambda n: complexity.from_noise(noise.cov(n, -(-n // 5))),
}


@pytest.mark.parametrize(("impl", "size", "num_keys"), DRAWN)
@pytest.mark.parametrize("name", LAWS)
def test_multipliers_are_uncorrelated_with_what_a_user_draws(name, impl, size, num_keys):
    law = LAWS[name](size)
    z = correlations(lambda key: law.sample(key, 2).dense(), size, num_keys, impl)
    assert np.abs(z).max() < bound(z.size)


def test_multipliers_are_uncorrelated_with_the_noise_of_the_same_key():
    """This is why the key of the run may be given to the regulariser."""
    size = 5000
    ours = complexity.from_noise(noise.fisher(size, 10)).sample(KEY, 0).values
    other = noise.fisher(size, 10).sample(KEY, 0).values
    assert abs(np.corrcoef(ours, other)[0, 1]) < bound() / np.sqrt(size)


@pytest.mark.parametrize("name", LAWS)
def test_the_x64_flag_changes_no_draw(name):
    plain = LAWS[name](60).sample(KEY, 4)
    with jax.enable_x64(True):
        wide = LAWS[name](60).sample(KEY, 4)
    jax.tree.map(np.testing.assert_array_equal, plain, wide)
    assert wide.values.dtype == jnp.float32


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_a_step_of_any_integer_type_is_that_step(dtype):
    law = complexity.rademacher(20, 5)
    jax.tree.map(
        np.testing.assert_array_equal, law.sample(KEY, dtype.type(103)), law.sample(KEY, 103)
    )


@pytest.mark.parametrize("name", LAWS)
def test_laws_compare_by_value(name):
    assert LAWS[name](12) == LAWS[name](12)
    assert hash(LAWS[name](12)) == hash(LAWS[name](12))
    assert LAWS[name](12) != LAWS[name](13)


# Large constants ----------------------------------------------------------------------------------

DATA = np.random.default_rng(0).normal(size=(32, 6)).astype(np.float32)


def affine(offset):
    """The losses x . theta + y + offset, whose supremum over a ball is known: `suprema`."""

    def losses(theta, batch):
        return batch[:, :5] @ theta + batch[:, 5] + offset

    return losses


def suprema(law, num_draws, offset=0.0, radius=0.5):
    """The suprema of `affine` losses for the draws of a law, in float64: [num_draws]."""
    v = np.asarray(jax.vmap(law.sample, (None, 0))(KEY, jnp.arange(num_draws)).dense(), np.float64)
    if law != complexity.rademacher(32):
        v = v - v.mean(1, keepdims=True)  # the law is centred, and its draws up to rounding
    x = DATA.astype(np.float64)
    inside = np.abs(v @ (x[:, 5] + offset))
    return (inside + radius * np.linalg.norm(v @ x[:, :5], axis=1)) / 32


def measured(losses, law, **options):
    options = {"radius": 0.5, "key": KEY, "num_draws": 6} | options
    return of_problem(
        complexity.local_complexity, losses, jnp.zeros(5), jnp.asarray(DATA), law, **options
    )


CENTRED = {
    "sgd": complexity.sgd(32, 6),
    "sgd with replacement": complexity.sgd(32, 7, replace=True),
    "cov": complexity.from_noise(noise.cov(32, 6)),
}


@pytest.mark.parametrize("microbatch_size", [None, 5])
@pytest.mark.parametrize("name", CENTRED)
def test_a_constant_in_all_losses_changes_nothing(name, microbatch_size):
    """With 1e6 added, losses are rounded to a sixteenth; nothing else may change."""
    law = CENTRED[name]
    found = measured(affine(1e6), law, microbatch_size=microbatch_size)
    # Each loss is rounded by at most 1/32, and multiplied by v / N. The standard deviation of the
    # sum is that of uniform errors.
    v = jax.vmap(law.sample, (None, 0))(KEY, jnp.arange(6)).dense()
    rounding = 2 / 32 / np.sqrt(12) * np.linalg.norm(v, axis=1) / 32
    difference = np.abs(np.asarray(found.draws) - suprema(law, 6))
    assert (difference < 2 * rounding + 1e-5).all(), (difference, rounding)


def test_a_constant_counts_where_the_multipliers_do_not_add_up_to_zero():
    law = complexity.rademacher(32)
    found = measured(affine(1e3), law)
    np.testing.assert_allclose(found.draws, suprema(law, 6, 1e3), rtol=1e-4)


def test_a_constant_in_all_losses_does_not_change_the_penalty():
    law = CENTRED["cov"]
    plain, large = (
        penalty_of(affine(offset), radius=0.5)(jnp.zeros(5), jnp.asarray(DATA), law.sample(KEY, 0))
        for offset in (0.0, 1e6)
    )
    np.testing.assert_allclose(plain, suprema(law, 1), rtol=1e-5)
    np.testing.assert_allclose(large, plain, rtol=0.1)  # these losses are rounded to a sixteenth


@pytest.mark.parametrize("size", [1, 5, 31, 32])
@pytest.mark.parametrize("replace", [False, True])
def test_a_constant_that_rounds_no_loss_changes_nothing_at_all(size, replace):
    """Multiples of 1/8 and 2^20 add up exactly, so that only v could be off.

    For large batches v is small, and the sum of v, which should be 0, must be much smaller.
    """
    y = jnp.asarray(np.round(DATA[:, 5] * 8) / 8)
    law = complexity.sgd(32, size, replace=replace)
    plain, large = (
        of_problem(
            complexity.local_complexity,
            lambda theta, y, c=c: y + c + 0 * theta,
            jnp.zeros(()),
            y,
            law,
            radius=0.0,
            key=KEY,
            num_draws=4,
            num_starts=1,
            num_steps=0,
        ).draws
        for c in (0.0, 2.0**20)
    )
    np.testing.assert_allclose(large, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [1e-8, 1e8])
@pytest.mark.slow
def test_small_multipliers_have_small_complexities(scale):
    """The complexity for c v is c times that for v: small sums are not taken for rounding."""

    def law(scale):
        return complexity.Multipliers(
            "scaled",
            32,
            lambda key: noise.Weights(scale * jax.random.normal(key, (32,)), None, 32),
        )

    expected, found = (measured(affine(100.0), law(c), num_steps=1) for c in (1.0, scale))
    np.testing.assert_allclose(found.draws, scale * expected.draws, rtol=1e-4)
    v, x = law(1.0).sample(KEY, 0), jnp.asarray(DATA)
    penalty = penalty_of(affine(100.0), radius=0.5)
    small = noise.Weights(scale * v.values, None, 32)
    theta = jnp.zeros(5)
    np.testing.assert_allclose(penalty(theta, x, small), scale * penalty(theta, x, v), rtol=1e-4)


@pytest.mark.parametrize("name", CENTRED)
def test_laws_state_whether_they_are_centred(name):
    assert CENTRED[name].centred
    for law in (complexity.rademacher(32), complexity.gaussian(32), noise.fisher(32, 6)):
        law = complexity.from_noise(law) if isinstance(law, noise.MNoise) else law
        assert not law.centred


@pytest.mark.parametrize("losses", [lambda theta, batch: 0 * batch[:, 0] * theta[0]])
def test_gaps_of_losses_that_are_zero_are_zero(losses):
    found = measured(losses, complexity.rademacher(32))
    np.testing.assert_array_equal(found.draws, 0)
    np.testing.assert_array_equal(found.gap, 0)
    assert found.estimate.interval == (0, 0)


@pytest.mark.parametrize("unit", [2.0**-80, 2.0**70])
def test_losses_in_another_unit_have_their_complexities_in_that_unit(unit):
    """Squares of these gradients underflow or overflow; powers of two round nothing."""

    def in_unit(factor):
        def losses(theta, batch):
            return factor * jnp.tanh(batch[:, :5] @ theta + batch[:, 5])

        return measured(losses, complexity.rademacher(32))

    usual, other = in_unit(1.0), in_unit(unit)
    assert usual.first_order.min() > 0
    for name in ("draws", "at_centre", "first_order"):
        wanted = np.asarray(getattr(usual, name), np.float64) * unit
        np.testing.assert_allclose(getattr(other, name), wanted, rtol=1e-5)
    np.testing.assert_allclose(other.gap, usual.gap, rtol=1e-2, atol=1e-5)


# Critical points ----------------------------------------------------------------------------------


def quadratic(theta, batch):
    """Losses that have no slope at 0. The supremum over the ball is ``|v . x| radius^2 / N``."""
    return batch * jnp.sum(theta**2)


@pytest.mark.parametrize("num_steps", [0, 1, 20])
def test_an_ascent_leaves_a_critical_point(num_steps):
    """Even without a step, it ends at the supremum, which is known for `quadratic`."""
    x = jnp.asarray(DATA[:, 0])
    law = complexity.rademacher(32)
    found = of_problem(
        complexity.local_complexity,
        quadratic,
        jnp.zeros(3),
        x,
        law,
        radius=0.5,
        key=KEY,
        num_draws=4,
        num_starts=1,
        num_steps=num_steps,
    )
    v = np.asarray(jax.vmap(law.sample, (None, 0))(KEY, jnp.arange(4)).dense())
    np.testing.assert_allclose(found.draws, np.abs(v @ x) * 0.25 / 32, rtol=1e-5)


def test_the_penalty_leaves_a_critical_point():
    x, v = jnp.asarray(DATA[:, 0]), complexity.rademacher(32).sample(KEY, 0)
    penalty = penalty_of(quadratic, radius=0.5)
    value, gradient = jax.value_and_grad(penalty)(jnp.zeros(3), x, v)
    np.testing.assert_allclose(value, abs(float(v.values @ x)) * 0.25 / 32, rtol=1e-5)
    assert np.linalg.norm(gradient) > 0


# Few draws ----------------------------------------------------------------------------------------


def coverages(num_draws, num_keys=200):
    """The fractions of the stated 95 % intervals, of a complexity and of a ratio, that are right.

    The true values are means over 400,000 draws of numpy's.
    """
    x = jnp.asarray(DATA)
    losses, theta, radius = affine(0.0), jnp.zeros(5), 0.5
    options = {"radius": radius, "num_draws": num_draws, "num_steps": 0, "num_starts": 1}
    laws = complexity.rademacher(32), complexity.gaussian(32)

    @jax.jit
    def draws(key):
        return [
            of_problem(complexity.local_complexity, losses, theta, x, law, key=key, **options)
            for law in laws
        ]

    def exact(v):
        y = np.asarray(x, np.float64)
        return (np.abs(v @ y[:, 5]) + radius * np.linalg.norm(v @ y[:, :5], axis=-1)) / 32

    normals = np.random.default_rng(1).normal(size=(400_000, 32))
    true = exact(np.sign(normals[:, ::-1])).mean(), exact(normals).mean()
    hits = np.zeros(2)
    for seed in range(num_keys):
        rademacher, gaussian = draws(jax.random.key(seed))
        low, high = rademacher.estimate.interval
        hits[0] += low <= true[0] <= high
        low, high = _inequality("", rademacher, gaussian, 1.0).ratio.interval
        hits[1] += low <= true[0] / true[1] <= high
    return hits / num_keys


@pytest.mark.parametrize(
    ("estimate", "interval"),
    [
        (complexity.Estimate(math.inf, 0.0), (math.inf, math.inf)),
        (complexity.Estimate(math.inf, math.inf), (-math.inf, math.inf)),
        (complexity.Estimate(math.inf, 1.0, 5, True), (0.0, math.inf)),
        (complexity.Estimate(2.0, math.inf, 5, True), (0.0, math.inf)),
    ],
)
def test_intervals_of_infinite_numbers(estimate, interval):
    assert estimate.interval == interval


@pytest.mark.parametrize("num_draws", [2, 4, 10, 66])
def test_intervals_cover_as_stated(num_draws):
    """Of 200 intervals, 92 to 98 % must hold the truth, as documented.

    If the coverage were 95 % exactly, a fraction would be below with a probability of 0.024, and
    above with one of 0.009.
    """
    found = coverages(num_draws)
    assert ((found >= 0.92) & (found <= 0.98)).all(), found


def test_intervals_from_two_draws_are_wider_than_by_a_normal_quantile():
    """With two draws, an interval by the normal quantile would cover 69 %."""
    estimate = complexity.Estimate(1.0, 0.1, 1)
    low, high = complexity.Estimate(1.0, 0.1).interval
    assert estimate.interval[1] - estimate.interval[0] > 6 * (high - low)


# Programs -----------------------------------------------------------------------------------------


def test_a_changed_global_is_seen_at_the_next_call():
    factor = [1.0]

    def losses(theta, batch):
        return factor[0] * affine(0.0)(theta, batch)

    first = measured(losses, complexity.rademacher(32), num_steps=1).mean
    factor[0] = 3.0
    np.testing.assert_allclose(
        measured(losses, complexity.rademacher(32), num_steps=1).mean, 3 * first, rtol=1e-5
    )


@pytest.mark.parametrize("under_jit", [False, True])
def test_one_loss_that_is_not_finite_is_reported(under_jit):
    def losses(theta, batch):
        return affine(0.0)(theta, batch).at[3].set(jnp.nan)

    if under_jit:
        found = jax.jit(lambda: measured(losses, complexity.rademacher(32)))()
        assert np.isnan(found.draws).all()
    else:
        with pytest.raises(ValueError, match="not finite at params"):
            measured(losses, complexity.rademacher(32))


def test_losses_per_example_are_taken_too():
    """The constant is taken out of the losses of any loss vector function."""
    losses = loss.per_example(lambda theta, x: x[:5] @ theta + x[5])
    np.testing.assert_allclose(
        measured(losses, CENTRED["cov"]).draws, suprema(CENTRED["cov"], 6), rtol=1e-5
    )
