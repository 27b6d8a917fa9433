"""The scale of gradient noise, against numpy's float64 and exact expectations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from jax.sharding import NamedSharding, PartitionSpec

from msgd_jax import _estimate, loss, measure, noise
from tests.support.mistakes import assert_told
from tests.support.noisy import D, N, dense, loss_vector_fn, problem, within
from tests.support.statistics import assert_agree, assert_rejected

KEY = jax.random.key(0)
# The trace of S, |grad L|^2 and their ratio, which were computed elsewhere.
T, G2, B = 5.790031175884462, 0.4805906000137221, 12.047741207837067


def values(scale: measure.Scale) -> tuple[float, float, float]:
    return scale.trace.value, scale.squared_gradient.value, scale.noise_scale.value


def test_the_reference_has_the_known_values():
    assert np.trace(dense().s) == pytest.approx(T, rel=1e-13)
    assert dense().mean @ dense().mean == pytest.approx(G2, rel=1e-13)
    assert dense().gradients[0, 0] == pytest.approx(-0.8641050108145706, rel=1e-13)
    assert np.trace(dense().h) == pytest.approx(-0.6067437141177827, rel=1e-11)


# Exact --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 7])
@pytest.mark.usefixtures("x64")
def test_the_scale_is_exact_in_total_and_per_leaf(microbatch_size):
    losses, params = problem(jnp.float64, leaves=True, microbatch_size=microbatch_size)
    scale = measure.noise_scale(losses, params)
    assert values(scale.total) == pytest.approx((T, G2, B), rel=1e-12)
    assert scale.total.trace.standard_error == 0
    assert scale.total.interval == (scale.total.noise_scale.value,) * 2
    s, g = np.diag(dense().s), dense().mean ** 2
    for name, part in {"a": slice(0, 2), "b": slice(2, 6)}.items():
        wanted = s[part].sum(), g[part].sum(), s[part].sum() / g[part].sum()
        assert values(scale.leaves[name]) == pytest.approx(wanted, rel=1e-12)


def test_the_scale_is_accurate_in_float32_under_jit_and_vmap():
    losses, params = problem()
    scale = measure.noise_scale(losses, params)
    assert values(scale.total) == pytest.approx((T, G2, B), rel=2e-6)
    inside = jax.jit(measure.noise_scale)(losses, params)
    assert values(inside.total) == pytest.approx(values(scale.total), rel=1e-6)
    both = jax.vmap(lambda p: measure.noise_scale(losses, p).total.trace.value)(
        jnp.stack([params, 2 * params])
    )
    assert both.shape == (2,)
    assert float(both[0]) == pytest.approx(T, rel=2e-6)


@pytest.mark.usefixtures("x64")
def test_the_scale_of_a_population_has_standard_errors():
    """The unbiased numbers were computed elsewhere, and the errors are held by the bootstrap."""
    losses, params = problem(jnp.float64)
    scale = measure.noise_scale(losses, params, population=True).total
    assert scale.trace.value == pytest.approx(5.938493513727653, rel=1e-12)
    assert scale.squared_gradient.value == pytest.approx(0.3321282621705308, rel=1e-12)
    rng, found = np.random.default_rng(0), []
    for _ in range(2000):
        rows = dense().gradients[rng.integers(0, N, N)]
        mean = rows.mean(0)
        trace = ((rows - mean) ** 2).sum() / (N - 1)
        found.append((trace, mean @ mean - trace / N))
    spread = np.std(found, axis=0)
    assert scale.trace.standard_error == pytest.approx(spread[0], rel=0.15)
    # The standard error of |g|^2 is of first order. As N |g|^2 is not much larger than tr S here,
    # the bootstrap, which has the other orders too, finds more.
    assert 0.5 * spread[1] < scale.squared_gradient.standard_error < 1.1 * spread[1]


def test_eight_devices_measure_what_one_does():
    mesh = jax.make_mesh((8,), ("data",))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    losses, params = problem(leaves=True)
    spread, _ = problem(leaves=True, sharding=sharding, microbatch_size=2)
    one, many = (measure.noise_scale(each, params) for each in (losses, spread))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    norms = [measure.squared_gradient_norms(each, params) for each in (losses, spread)]
    np.testing.assert_allclose(*norms, rtol=1e-5)


# From draws ---------------------------------------------------------------------------------------


def from_draws(losses, params, law=None, key=KEY, **options):
    law = noise.cov(N, 8) if law is None else law
    options = {"num_draws": 400, "draws_per_pass": 100, **options}
    return measure.noise_scale_from_draws(losses, params, law, key, **options)


LAWS = {
    "sgd": noise.sgd(N, 8),
    "fisher": noise.fisher(N, 8),
    "bernoulli": noise.bernoulli(N, 8),
    "student_t": noise.student_t(N, 8, degrees_of_freedom=9.0),
}


@pytest.mark.parametrize("name", LAWS)
def test_any_law_gives_the_trace_and_its_standard_error(name):
    losses, params = problem(leaves=True)
    scale = from_draws(losses, params, LAWS[name])
    within(scale.total.trace, T, comparisons=2)
    within(scale.leaves["a"].trace, np.diag(dense().s)[:2].sum(), comparisons=2)
    assert scale.total.squared_gradient.value == pytest.approx(G2, rel=1e-5)
    assert scale.total.squared_gradient.standard_error == 0
    assert scale.total.trace.standard_error < 0.1 * T  # an error of 50 % would be seen


def test_the_standard_error_of_a_gaussian_law_is_that_of_its_participation_ratio():
    """It is T sqrt(2 / (K p)) with p = 3.4454, to 20 %.

    The spread of 400 draws is known to about 7 %.
    """
    losses, params = problem()
    error = from_draws(losses, params).total.trace.standard_error
    assert error == pytest.approx(T * np.sqrt(2 / (400 * 3.4454792134)), rel=0.2)


def test_laws_that_are_not_centred_where_the_gradient_is_large():
    """|grad L|^2 is 25 times tr S, so that a part of it in the trace would be seen."""
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(20, 3)) + 5, jnp.float32)
    losses, params, law = (
        loss.LossVector(lambda p, g: g @ p, rows),
        jnp.zeros(3),
        noise.fisher(20, 4),
    )
    trace = np.var(np.asarray(rows, np.float64), axis=0).sum()
    within(from_draws(losses, params, law).total.trace, trace, comparisons=3)

    monitor = measure.noise_scale_monitor(4, law=law)
    weights = jax.vmap(law.sample, in_axes=(None, 0))(KEY, jnp.arange(4000)).dense()
    state, _ = jax.lax.scan(
        lambda state, g: (monitor.update(g, state)[1], None), monitor.init(params), weights @ rows
    )
    found = measure.monitored_noise_scale(state).total
    within(found.trace, trace, comparisons=3)
    wanted = float((np.asarray(rows).mean(0) ** 2).sum())
    within(found.squared_gradient, wanted, comparisons=3)
    # Without the correction, it would be off by more than ten of these standard errors.
    assert found.trace.standard_error < 2 * trace


# Micro-batches ------------------------------------------------------------------------------------


def micro(order, sizes, gradients=None):
    gradients = dense().gradients if gradients is None else gradients
    parts = np.split(np.asarray(order), np.cumsum(sizes)[:-1])
    return jnp.asarray(np.stack([gradients[part].mean(0) for part in parts]))


@pytest.mark.usefixtures("x64")
def test_moments_of_micro_batches_have_the_known_values():
    gradients, sizes = micro(range(16), (3, 5, 2, 6)), (3, 5, 2, 6)
    distinct = measure.microbatch_moments(gradients, sizes, num_examples=N)
    assert float(distinct.trace[-1]) == pytest.approx(3.8965248285433915, rel=1e-12)
    assert float(distinct.squared_gradient[-1]) == pytest.approx(0.39960723433797324, rel=1e-12)
    drawn = measure.microbatch_moments(gradients, np.array(sizes))
    assert float(drawn.trace[-1]) == pytest.approx(3.9964357215829653, rel=1e-12)
    assert float(drawn.squared_gradient[-1]) == pytest.approx(0.29969634129839906, rel=1e-12)


@pytest.mark.parametrize("sizes", [(1, 3), (2, 2), (1, 1, 2), (2, 4)])
@pytest.mark.usefixtures("x64")
def test_moments_of_micro_batches_are_unbiased(sizes):
    """Their mean over all ordered choices of examples is the truth."""
    rows = np.random.default_rng(0).normal(size=(6, 2)) + 1
    orders = list(itertools.permutations(range(6), sum(sizes)))
    gradients = jnp.stack([micro(order, sizes, rows) for order in orders])
    moments = jax.vmap(lambda g: measure.microbatch_moments(g, sizes, num_examples=6))(gradients)
    mean = rows.mean(0)
    assert float(moments.trace[:, -1].mean()) == pytest.approx(rows.var(0).sum(), rel=1e-11)
    assert float(moments.squared_gradient[:, -1].mean()) == pytest.approx(mean @ mean, rel=1e-11)


@pytest.mark.usefixtures("x64")
def test_the_pooled_ratio_has_the_known_bias_and_its_interval_covers():
    """Each of 300 runs has 30 steps with 4 micro-batches of 4 examples.

    The mean of 4,000 other runs was 12.401 with a spread of 2.39, so that 300 have a standard error
    of 0.14. The median standard error by the delta method was 2.15. Fieller's interval covered in
    0.948 of the runs, for which 300 have a standard error of 0.013.
    """
    rng = np.random.default_rng(1)
    rows = dense().gradients[rng.integers(0, N, (300, 30, 4, 4))].mean(-2)
    params = jnp.zeros(D)

    @jax.jit
    @jax.vmap
    def of_run(gradients):
        moments = jax.vmap(lambda g: measure.microbatch_moments(g, 4))(gradients)
        return measure.pooled_noise_scale(params, moments).total

    scale = of_run(jnp.asarray(rows))
    found = np.asarray(scale.noise_scale.value)
    assert_agree(found.mean(), 12.401, 0.14, comparisons=2)
    assert np.median(scale.noise_scale.standard_error) == pytest.approx(2.15, rel=0.1)
    covered = (np.asarray(scale.interval[0]) <= B) & (np.asarray(scale.interval[1]) >= B)
    assert_agree(covered.mean(), 0.948, 0.013, comparisons=2)


@pytest.mark.usefixtures("x64")
def test_intervals_from_few_steps_or_draws_cover():
    """Of 4,000 others 0.970 and 0.915 covered; by normal quantiles 0.80 and 0.72 would."""
    rng = np.random.default_rng(3)
    rows = dense().gradients[rng.integers(0, N, (1000, 4, 4, 4))].mean(-2)

    def of_run(gradients):
        moments = jax.vmap(lambda g: measure.microbatch_moments(g, 4))(gradients)
        return measure.pooled_noise_scale(jnp.zeros(D), moments).total.interval

    low, high = jax.jit(jax.vmap(of_run))(jnp.asarray(rows))
    covered = float(((low <= B) & (high >= B)).mean())
    assert_agree(covered, 0.970, 0.0061, comparisons=2)
    assert_rejected(0.80, 0.970, 0.0061, comparisons=2)

    losses = loss.LossVector(lambda th, x: (th - x) ** 2 / 2, jnp.linspace(-1, 2, 50))
    law, at = noise.cov(50, 5), jnp.zeros(())
    exact = measure.noise_scale(losses, at).total.noise_scale.value

    def of_draws(key):
        return measure.noise_scale_from_draws(losses, at, law, key, num_draws=4).total.interval

    low, high = jax.jit(jax.vmap(of_draws))(jax.random.split(KEY, 1000))
    covered = float(((low <= exact) & (high >= exact)).mean())
    assert_agree(covered, 0.915, 0.0098, comparisons=2)
    assert_rejected(0.72, 0.915, 0.0098, comparisons=2)


@pytest.mark.parametrize("degrees", [1.0, 1.3, 2.0, 7.5, 29.0, 1e6])
def test_quantiles_of_traced_degrees_of_freedom_are_right(degrees):
    found = jax.jit(_estimate.t_quantile)(degrees)
    assert float(found) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-4)


def test_the_interval_is_unbounded_where_nothing_bounds_the_scale():
    moments = measure.MicrobatchMoments(
        jnp.asarray([[4.0, 4.0], [5.0, 5.0], [6.0, 6.0]]),
        jnp.asarray([[0.5, 0.5], [-0.4, -0.4], [0.2, 0.2]]),
    )
    scale = measure.pooled_noise_scale(jnp.zeros(1), moments).total
    assert scale.noise_scale.value == pytest.approx(50)
    assert scale.interval[1] == np.inf
    # The lower end solves T - B U = 4.303 standard errors of T - B U, by Student's t.
    b, t, u = scale.interval[0], moments.trace[:, 0], moments.squared_gradient[:, 0]
    residual = np.asarray(t - b * u)
    assert residual.mean() == pytest.approx(4.302653 * residual.std(ddof=1) / np.sqrt(3), rel=1e-4)


# Norms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 7])
@pytest.mark.usefixtures("x64")
def test_squared_norms_are_exact(microbatch_size):
    losses, params = problem(jnp.float64, leaves=True, microbatch_size=microbatch_size)
    squares = measure.squared_gradient_norms(losses, params)
    assert float(squares[0]) == pytest.approx(11.579551192266038, rel=1e-12)
    np.testing.assert_allclose(squares, (dense().gradients ** 2).sum(1), rtol=1e-12, atol=1e-15)


def test_probed_norms_are_unbiased():
    """For every example, the mean over 500 keys is the norm, and so is that of the squares.

    Without the correction for 4 probes, norms would be 6 % too small.
    """
    losses, params = problem(leaves=True, microbatch_size=11)
    exact = (dense().gradients ** 2).sum(1)
    probed = jax.jit(
        jax.vmap(lambda key: measure.probed_gradient_norms(losses, params, key, num_probes=4))
    )(jax.random.split(KEY, 500))
    assert probed.relative_error[0] == pytest.approx(np.sqrt(0.5))
    for found, wanted in ((probed.squared, exact), (probed.norm, np.sqrt(exact))):
        found = np.asarray(found)
        error = found.std(0, ddof=1) / np.sqrt(500)
        assert_agree(found.mean(0), wanted, error, comparisons=2 * N + 2, degrees_of_freedom=499)
    # The mean over all examples is sharper, and rejects norms without the correction.
    relative = (np.asarray(probed.norm) / np.sqrt(exact)).mean(1)
    error = relative.std(ddof=1) / np.sqrt(500)
    options = {"comparisons": 2 * N + 2, "degrees_of_freedom": 499}
    assert_agree(relative.mean(), 1, error, **options)
    assert_rejected(relative.mean(), 1 / 0.94, error, **options)
    trace = np.asarray(probed.trace.value)
    error = trace.std(ddof=1) / np.sqrt(500)
    assert_agree(trace.mean(), T, error, **options)
    # The variance of z^T S z is 2 |S|_F^2 = 19.46, and a mean of 4 probes has a fourth of it.
    # The bound is five standard errors of the variance of 500 values.
    assert 4 * trace.var(ddof=1) == pytest.approx(2 * 9.729984986507235, rel=0.5)


# Bad input ----------------------------------------------------------------------------------------


def test_a_zero_gradient_has_an_infinite_noise_scale():
    rows = jnp.asarray([[1.0, 2.0], [-1.0, -2.0]])
    losses = loss.LossVector(lambda theta, g: g @ theta, rows)
    for scale in (
        measure.noise_scale(losses, jnp.zeros(2)).total,
        from_draws(losses, jnp.zeros(2), noise.cov(2, 1), num_draws=5).total,
    ):
        assert scale.noise_scale.value == np.inf
        assert scale.interval[1] == np.inf
        assert not np.isnan(jax.tree.leaves(scale)).any()
    assert "inf" in str(scale.noise_scale)
    # Without noise, the scale is 0, whatever the gradient.
    quiet = loss.LossVector(lambda theta, g: g @ theta, jnp.zeros((3, 2)))
    assert measure.noise_scale(quiet, jnp.zeros(2)).total.noise_scale.value == 0


def broken(where, value):
    """Losses of which one, or its gradient, is not finite."""
    losses, params = problem()
    data = {**losses.data, "bad": jnp.zeros(N).at[where].set(value)}
    return loss.LossVector(lambda p, b: loss_vector_fn(p, b) * (1 + b["bad"]), data), params


def kinked():
    """Finite losses. That of example 3 has an infinite slope, as the root has at 0."""
    x = jnp.ones((5, 1)).at[3].set(0.0)
    return loss.LossVector(loss.per_example(lambda p, x: jnp.sqrt(p @ x)), x), jnp.ones(1)


MISTAKES = {
    "K": (lambda: from_draws(*problem(), num_draws=1), "num_draws", "at least 2, got 1"),
    "N": (lambda: from_draws(*problem(), noise.cov(41, 8)), "law", "num_examples = 41"),
    "gd": (lambda: from_draws(*problem(), noise.gd(N)), "law", "alpha = 0"),
    "reshuffling": (
        lambda: from_draws(*problem(), noise.random_reshuffling(N, 8)),
        "law",
        "depend on each other",
    ),
    "kind": (lambda: from_draws(*problem(), "cov"), "law", "noise.MNoise"),
    "loss": (lambda: measure.noise_scale(*broken(5, jnp.nan)), "losses", "nan of example 5"),
    "draws": (lambda: from_draws(*broken(5, jnp.inf)), "losses", "inf of example 5"),
    "norms": (lambda: measure.squared_gradient_norms(*kinked()), "gradients", "of example 3"),
    "losses": (lambda: measure.noise_scale(None, 1.0), "losses", "loss.LossVector"),
    "probes": (
        lambda: measure.probed_gradient_norms(*problem(), KEY, num_probes=1),
        "num_probes",
        "at least 2",
    ),
    "micro": (
        lambda: measure.microbatch_moments(jnp.ones((1, 3)), 4),
        "gradients",
        "at least 2, got 1",
    ),
    "sizes": (lambda: measure.microbatch_moments(jnp.ones((2, 3)), (1, 0)), "sizes", "(1, 0)"),
    "too many": (
        lambda: measure.microbatch_moments(jnp.ones((2, 3)), 4, num_examples=7),
        "num_examples",
        "at least 8, got 7",
    ),
    "pool": (
        lambda: measure.pooled_noise_scale(
            jnp.ones(3), measure.MicrobatchMoments(jnp.ones((1, 2)), jnp.ones((1, 2)))
        ),
        "moments",
        "at least 2 steps",
    ),
    "group": (lambda: measure.noise_scale_monitor(1, batch_size=4), "num_microbatches", "got 1"),
    "neither": (lambda: measure.noise_scale_monitor(2), "batch_size", "not both"),
    "correlated": (
        lambda: measure.noise_scale_monitor(2, law=noise.random_reshuffling(N, 8)),
        "law",
        "depend on each other",
    ),
    "decay": (lambda: measure.noise_scale_monitor(2, batch_size=1, decay=0.0), "decay", "got 0.0"),
    "no monitor": (lambda: measure.monitored_noise_scale(()), "opt_state", "0 of them"),
    "no group": (
        lambda: measure.monitored_noise_scale(
            measure.noise_scale_monitor(2, batch_size=1).init(jnp.ones(2))
        ),
        "opt_state",
        "no complete group",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.usefixtures("user_errors")
def test_messages_name_the_argument_and_are_short(name):
    call, argument, wrong = MISTAKES[name]
    assert_told(call, argument, wrong)
