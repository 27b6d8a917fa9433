"""The monitor of the noise scale in training, against numpy's float64 and exact expectations."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import measure, noise, train, transform
from tests.library.measure.test_scale import G2, LAWS, B, T
from tests.support.noisy import D, N, dense, loss_vector_fn, problem, within

KEY = jax.random.key(0)


def watched(steps, optimizer, law, **options):
    losses, params = problem(leaves=True)
    step = train.make_step(loss_vector_fn, optimizer, law)
    loop = train.make_loop(step, max_steps=steps)
    state, _ = loop(train.init(params, optimizer, KEY), losses.data, steps)
    return state


@pytest.mark.parametrize("name", ["batch_size", *LAWS])
def test_the_monitor_in_training_finds_the_noise_scale_for_any_law(name):
    """The learning rate is 0, so that the parameters stay, and with them the true scale."""
    law = LAWS.get(name, noise.cov(N, 8))
    known = {"batch_size": 8} if name == "batch_size" else {"law": law}
    optimizer = optax.chain(
        measure.noise_scale_monitor(4, **known),
        optax.MultiSteps(optax.sgd(0.0), every_k_schedule=4).gradient_transformation(),
    )
    scale = measure.monitored_noise_scale(watched(1200, optimizer, law).opt_state)
    within(scale.total.trace, T, comparisons=3)
    within(scale.total.squared_gradient, G2, comparisons=3)
    within(scale.leaves["b"].trace, np.diag(dense().s)[2:].sum(), comparisons=3)
    low, high = scale.total.interval
    assert low < B < high
    assert scale.total.trace.standard_error < 0.1 * T


@pytest.mark.usefixtures("x64")
def test_the_monitor_has_the_pooled_ratio_of_its_groups():
    rows = dense().gradients[np.random.default_rng(2).integers(0, N, (10, 3, 4))].mean(-2)
    monitor = measure.noise_scale_monitor(3, batch_size=4, num_examples=N)
    state = monitor.init(jnp.zeros(D, jnp.float64))
    update = jax.jit(monitor.update)
    for row in rows.reshape(-1, D):
        updates, state = update(jnp.asarray(row), state)
        np.testing.assert_array_equal(updates, row)
    moments = jax.vmap(lambda g: measure.microbatch_moments(g, 4, num_examples=N))(
        jnp.asarray(rows)
    )
    wanted = measure.pooled_noise_scale(jnp.zeros(D), moments)
    found = measure.monitored_noise_scale((state, optax.EmptyState()))
    np.testing.assert_allclose(jax.tree.leaves(found), jax.tree.leaves(wanted), rtol=1e-9)
    # A group that is not complete changes nothing.
    _, state = update(jnp.asarray(rows[0, 0]), state)
    after = measure.monitored_noise_scale(state)
    np.testing.assert_allclose(jax.tree.leaves(after), jax.tree.leaves(wanted), rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_decay_forgets_and_its_standard_error_is_that_of_its_window():
    """With decay d = 0.9, the estimate is as accurate as one from (1 + d) / (1 - d) = 19 groups.

    Before the 200 groups that count, there are 50 of a much larger scale. What is left of those,
    0.9^200 of their squares, is less than the tolerance of 2 %.
    """
    rng = np.random.default_rng(3)
    rows = jnp.asarray(dense().gradients[rng.integers(0, N, (200, 2, 4))].mean(-2))
    monitor = measure.noise_scale_monitor(2, batch_size=4, decay=0.9)
    far = jnp.full((50, 2, D), 1e3) * jnp.asarray([1.0, -1.0])[None, :, None]
    gradients = jnp.concatenate([far, rows]).reshape(-1, D)
    state, _ = jax.lax.scan(
        lambda state, g: (monitor.update(g, state)[1], None), monitor.init(gradients[0]), gradients
    )
    trace = measure.monitored_noise_scale(state).total.trace
    assert trace.degrees_of_freedom == pytest.approx(18, rel=1e-6)
    single = jax.vmap(lambda g: measure.microbatch_moments(g, 4).trace[-1])(rows)
    weights = 0.9 ** np.arange(200)[::-1]
    assert trace.value == pytest.approx(np.average(single, weights=weights), rel=0.02)


def test_the_monitor_in_a_chain_changes_no_update():
    """It pairs steps at parameters that stay, and passes gradients on as they are."""
    losses, params = problem(leaves=True)
    law = noise.sgd(N, 4)
    parts = (transform.multiplicative_noise(law, KEY), optax.sgd(0.0))
    watched_chain = optax.chain(parts[0], measure.noise_scale_monitor(2, law=law), parts[1])

    def run(optimizer, steps):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(
                (), state, params, loss_vector_fn=loss_vector_fn, data=losses.data
            )
            return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)

    (_, state), updates = run(watched_chain, 600)
    scale = measure.monitored_noise_scale(state).total
    within(scale.trace, T)
    within(scale.squared_gradient, G2)
    _, plain = run(optax.chain(*parts), 600)
    jax.tree.map(np.testing.assert_array_equal, updates, plain)
