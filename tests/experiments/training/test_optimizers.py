"""Schedules, weight decay and the baselines with additive noise, compared with numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.training import _optimizers
from experiments.training.algorithms import NoiseSettings
from experiments.training.config import TrainConfig
from tests.support import problems
from tests.support.statistics import assert_agree

PROBLEM = problems.regression()


def gradients():
    """The gradient of each loss, [N, *leaf], by hand in float64."""
    return PROBLEM.gradient_matrix()


def test_decays_multiply_the_rate_at_their_iterations():
    plan = TrainConfig(learning_rate=0.2, decay_at=(3, 5), decay_factor=0.1)
    rates = [float(_optimizers.schedule(plan)(step)) for step in range(7)]
    np.testing.assert_allclose(rates, [0.2, 0.2, 0.2, 0.02, 0.02, 0.002, 0.002], rtol=1e-6)


@pytest.mark.parametrize(("scaling", "factor"), [("none", 1), ("sqrt", 2), ("linear", 4)])
def test_the_rate_of_a_large_batch(scaling, factor):
    settings = NoiseSettings(batch_size=25, support_size=100)
    plan = TrainConfig(
        algorithm="sgd-b", learning_rate=0.1, noise=settings, learning_rate_scaling=scaling
    )
    assert _optimizers.scaled_learning_rate(plan) == pytest.approx(0.1 * factor)
    assert plan.total_steps == plan.steps


def test_without_regime_adaptation_epochs_are_kept():
    """Batches that are four times as large take a quarter of the steps, and decay as early."""
    settings = NoiseSettings(batch_size=25, support_size=100)
    plan = TrainConfig(
        algorithm="sgd-b",
        steps=1000,
        decay_at=(400,),
        noise=settings,
        learning_rate=1.0,
        regime_adaptation=False,
    )
    assert plan.total_steps == 250
    rates = [float(_optimizers.schedule(plan)(step)) for step in (99, 100)]
    np.testing.assert_allclose(rates, [1, 0.1], rtol=1e-6)


def test_momentum_and_weight_decay_follow_pytorchs_recursion():
    """The recursion is written out in numpy: weight decay is added to the gradient."""
    plan = TrainConfig(learning_rate=0.1, momentum=0.9, weight_decay=0.01)
    optimizer = _optimizers.make(plan)
    params, expected, velocity = jnp.array([1.0, -2.0]), np.array([1.0, -2.0]), np.zeros(2)
    state = optimizer.init(params)
    for gradient in (np.array([0.5, 0.1]), np.array([-1.0, 2.0]), np.array([0.3, 0.0])):
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        velocity = 0.9 * velocity + gradient + 0.01 * expected
        expected = expected - 0.1 * velocity
        np.testing.assert_allclose(params, expected, rtol=1e-5)


def additive(kind="diagonal-fisher", refresh_every=3):
    """The transformation that adds noise of batches of 10."""
    return _optimizers.additive_noise(
        jax.random.key(8), kind, batch_size=10, refresh_every=refresh_every, microbatch_size=40
    )


def update(transform, state, params):
    """The update of a gradient of zero, which is the noise alone, and the next state."""
    zeros = optax.tree.zeros_like(params)
    return transform.update(
        zeros, state, params, loss_vector_fn=problems.loss_vector_fn, data=PROBLEM.data
    )


@pytest.mark.parametrize("kind", ["diagonal-fisher", "isotropic"])
def test_additive_noise_has_the_stated_variances(kind):
    """Means are 0, variances are ``diag(F) / b`` or all ``trace(S) / (b d)``, correlations are 0.

    F and S are computed in numpy from gradients by hand. The comparisons are d means, d variances
    and d (d - 1) / 2 correlations of 2,000 draws.
    """
    transform = additive(kind, refresh_every=10_000)
    _, state = update(transform, transform.init(PROBLEM.params), PROBLEM.params)

    def one(step):
        noise, _ = update(transform, state._replace(step=step + 1), PROBLEM.params)
        return jnp.concatenate([x.reshape(-1) for x in jax.tree.leaves(noise)])

    draws = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(2_000)))
    rows = [rows.reshape(len(rows), -1) for rows in jax.tree.leaves(gradients())]
    of_examples = np.concatenate(rows, 1)
    expected = (of_examples**2).mean(0) / 10
    if kind == "isotropic":
        expected = np.full_like(expected, of_examples.var(0).mean() / 10)
    number = expected.size * (expected.size + 3) // 2
    assert_agree(draws.mean(0), 0, np.sqrt(expected / 2_000), comparisons=number)
    error = expected * np.sqrt(2 / 2_000)
    assert_agree((draws**2).mean(0), expected, error, comparisons=number)
    off = np.corrcoef(draws.T) - np.eye(draws.shape[1])
    assert_agree(off, 0, 1 / np.sqrt(2_000), comparisons=number)


def test_the_two_kinds_draw_different_normals():
    """Divided by their standard deviations, no two of their numbers are alike."""
    drawn = []
    for kind in ("diagonal-fisher", "isotropic"):
        transform = additive(kind)
        noise, state = update(transform, transform.init(PROBLEM.params), PROBLEM.params)
        scaled = jax.tree.map(lambda x, v: x / jnp.sqrt(v / 10), noise, state.variances)
        drawn.append(np.concatenate([x.reshape(-1) for x in jax.tree.leaves(scaled)]))
    assert not np.isclose(drawn[0][:, None], drawn[1], rtol=1e-4).any()
    with pytest.raises(ValueError, match="kind must be diagonal-fisher or isotropic, got 'none'"):
        additive("none")


def test_variances_are_kept_between_refreshes():
    transform = additive()
    state = transform.init(PROBLEM.params)
    far = jax.tree.map(lambda x: x + 1.0, PROBLEM.params)
    kept = []
    for step in range(5):
        _, state = update(transform, state, far if step else PROBLEM.params)
        kept.append(jax.tree.leaves(state.variances)[0])
    # They are computed at step 0, where the parameters are others, and again at step 3.
    np.testing.assert_array_equal(kept[0], kept[2])
    assert (np.asarray(kept[3]) != np.asarray(kept[2])).any()
    np.testing.assert_array_equal(kept[3], kept[4])


def test_additive_noise_needs_losses_of_single_examples():
    transform = additive()
    with pytest.raises(ValueError, match="needs loss_vector_fn"):
        transform.update(PROBLEM.params, transform.init(PROBLEM.params), PROBLEM.params)
