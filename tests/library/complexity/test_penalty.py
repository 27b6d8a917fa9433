"""The regulariser in training: its gradient, its place in chains, and bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import complexity, noise, train, transform
from tests.support.affine import (
    KEY,
    affine_losses,
    affine_supremum,
    examples,
    on_device,
    penalty_of,
    quadratic_losses,
)
from tests.support.problems import loss_vector_fn, regression

PROBLEM = regression(12)
LAW = complexity.rademacher(12)


def test_value_and_gradient_for_affine_losses_are_those_by_hand():
    """The value is ``(|v . (l + G theta)| + radius ||G v||) / N``, by hand in float64."""
    data, theta = examples(9), np.array([0.3, -0.2, 0.5, 0.1])
    v = np.random.default_rng(1).normal(size=9)
    weights = noise.Weights(jnp.asarray(v, jnp.float32), None, 9)
    penalty = penalty_of(affine_losses, radius=0.7)
    value, gradient = jax.value_and_grad(penalty)(
        jnp.asarray(theta, jnp.float32), on_device(data), weights
    )
    moved = abs((data["l"] + data["g"] @ theta) @ v)
    at_zero = affine_supremum(9, v, 0.7) - abs(data["l"] @ v) / 9
    assert value == pytest.approx(moved / 9 + at_zero, rel=1e-5)
    sign = np.sign((data["l"] + data["g"] @ theta) @ v)
    np.testing.assert_allclose(gradient, sign * (data["g"].T @ v) / 9, rtol=1e-5)


@pytest.mark.slow
def test_the_gradient_is_that_of_the_supremum(x64):
    """By Danskin's theorem; the reference is central differences of the supremum.

    The supremum is found to 1e-12, so that differences over 1e-5 are right to 1e-7.
    """
    weights = noise.Weights(jnp.asarray(np.random.default_rng(2).normal(size=6)), None, 6)
    penalty = penalty_of(quadratic_losses, radius=0.4, num_steps=60)
    data, theta = on_device(examples(6)), jnp.array([0.3, -0.2, 0.5, 0.1])
    value = jax.jit(functools.partial(penalty, data=data, multipliers=weights))
    gradient = jax.jit(jax.grad(functools.partial(penalty, data=data, multipliers=weights)))(theta)
    differences = [(value(theta + 1e-5 * e) - value(theta - 1e-5 * e)) / 2e-5 for e in np.eye(4)]
    np.testing.assert_allclose(gradient, differences, rtol=1e-5)
    at_centre = jax.grad(
        lambda p: jnp.abs(jnp.vdot(weights.values, quadratic_losses(p, data))) / 6
    )(theta)
    assert np.abs(gradient - at_centre).max() > 0.01, "the gradient is that at the centre"


def chain(scale=0.5, **options):
    return optax.chain(
        complexity.add_local_complexity(LAW, KEY, radius=0.1, scale=scale, **options),
        optax.sgd(0.1),
    )


def expected_update(params, step, scale=0.5):
    """The update of one step, from the mean loss and `penalty` with the v of this step."""
    penalty = penalty_of(loss_vector_fn, radius=0.1)
    weights = LAW.sample(KEY, step)

    def objective(params):
        mean = loss_vector_fn(params, PROBLEM.data).mean()
        return mean + scale * penalty(params, PROBLEM.data, weights)

    return jax.tree.map(lambda g: -0.1 * g, jax.grad(objective)(params))


def test_training_with_the_regulariser_minimises_eq_8():
    """Two steps of `train` with `noise.gd` are those of the mean loss plus the scaled penalty."""
    step = jax.jit(train.make_step(loss_vector_fn, chain(), noise.gd(12)))
    state = train.init(PROBLEM.params, chain(), jax.random.key(0))
    for i in range(2):
        before = state.params
        state, _ = step(state, PROBLEM.data)
        moved = jax.tree.map(jnp.subtract, state.params, before)
        for got, want in zip(
            jax.tree.leaves(moved), jax.tree.leaves(expected_update(before, i)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-6)
    penalty_state = state.opt_state[0]
    assert penalty_state.step == 2
    assert 0 < penalty_state.value < 1
    # Every step draws with the same key, and its own number.
    np.testing.assert_array_equal(jax.random.key_data(penalty_state.key), jax.random.key_data(KEY))


@pytest.mark.slow
def test_the_regulariser_works_behind_multiplicative_noise_in_a_chain():
    """The chain has mini-batches, random starts of the ascents, micro-batches and momentum."""
    optimizer = optax.chain(
        transform.multiplicative_noise(noise.sgd(12, 4), jax.random.key(1)),
        complexity.add_local_complexity(
            complexity.rademacher(12, 4),
            KEY,
            radius=0.1,
            ascent=complexity.Ascent(2, 1),
            microbatch_size=3,
        ),
        optax.sgd(0.1, momentum=0.9),
    )

    @jax.jit
    def run(params, state):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(
                (), state, params, loss_vector_fn=loss_vector_fn, data=PROBLEM.data
            )
            return (optax.apply_updates(params, updates), state), state[1].value

        return jax.lax.scan(step, (params, state), length=20)

    (params, state), values = run(PROBLEM.params, optimizer.init(PROBLEM.params))
    assert state[1].step == 20
    assert np.unique(values).size == 20
    before, after = (loss_vector_fn(p, PROBLEM.data).mean() for p in (PROBLEM.params, params))
    assert after < before


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize(
        ("wrong", "error", "message"),
        [
            ({"radius": -1.0}, ValueError, "radius must be finite and at least 0, got -1.0"),
            ({"scale": -1.0}, ValueError, "scale must be finite and at least 0, got -1.0"),
            ({"microbatch_size": 0}, ValueError, "microbatch_size must be at least 1, got 0"),
            ({"key": 3}, TypeError, "key must be a typed PRNG key"),
            ({"multipliers": "sgd"}, TypeError, "multipliers must be a complexity"),
            ({"ascent": 3}, TypeError, "ascent must be a complexity.Ascent, got 3"),
        ],
    )
    def test_bad_arguments_are_refused_at_construction(self, wrong, error, message):
        arguments = {"multipliers": LAW, "key": KEY, "radius": 0.1, **wrong}
        with pytest.raises(error, match=message):
            complexity.add_local_complexity(**arguments)

    @pytest.mark.slow
    def test_bad_arguments_of_update_are_refused(self):
        added = complexity.add_local_complexity(LAW, KEY, radius=0.1)
        params, zeros = PROBLEM.params, jax.tree.map(jnp.zeros_like, PROBLEM.params)
        state = added.init(params)
        with pytest.raises(ValueError, match="needs data"):
            added.update(zeros, state, params, loss_vector_fn=loss_vector_fn)
        with pytest.raises(ValueError, match="needs params"):
            added.update(zeros, state)
        few = jax.tree.map(lambda x: x[:5], PROBLEM.data)
        with pytest.raises(ValueError, match="num_examples = 12, but the data have 5 examples"):
            added.update(zeros, state, params, loss_vector_fn=loss_vector_fn, data=few)
        masked = optax.masked(added, {"w": True, "b": False})
        with pytest.raises(ValueError, match="masked hides some of them"):
            masked.update(
                zeros,
                masked.init(params),
                params,
                loss_vector_fn=loss_vector_fn,
                data=PROBLEM.data,
            )

    def test_bad_arguments_of_the_penalty_are_refused(self):
        penalty = penalty_of(loss_vector_fn, radius=0.1, num_starts=2)
        weights = LAW.sample(KEY, 0)
        with pytest.raises(ValueError, match="key is needed for the random starts"):
            penalty(PROBLEM.params, PROBLEM.data, weights)
        with pytest.raises(TypeError, match="multipliers must be a noise"):
            penalty(PROBLEM.params, PROBLEM.data, weights.values, KEY)
