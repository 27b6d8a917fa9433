"""The updates of the transformations, by dense algebra, and what they compose with."""

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from flax import nnx

from msgd_jax import loss, noise, transform
from tests.support.noises import ROWS
from tests.support.problems import loss_vector_fn, regression
from tests.support.transforms import (
    NOISE,
    PROBLEM,
    TRANSFORMS,
    aggregated_update,
    assert_trees_close,
    fast_update,
    fresh_key,
)

# The updates --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ROWS))
def test_one_backward_pass_and_aggregation_give_the_same_update(name):
    law = ROWS[name].make(100, 10)
    fast = transform.multiplicative_noise(law, fresh_key())
    slow = transform.aggregate_per_example(law, fresh_key())
    fast_state, slow_state = fast.init(PROBLEM.params), slow.init(PROBLEM.params)
    for _ in range(2):
        a, fast_state = fast_update(fast, fast_state, PROBLEM.params)
        b, slow_state = aggregated_update(slow, slow_state, PROBLEM.params)
        assert_trees_close(a, b)


def test_updates_are_the_gradient_matrix_times_the_weights_of_the_step():
    tx = transform.multiplicative_noise(NOISE, fresh_key())
    state = tx.init(PROBLEM.params)
    for step in range(3):
        update, state = fast_update(tx, state, PROBLEM.params)
        w = np.asarray(NOISE.sample(fresh_key(), step).dense(), np.float64)
        for leaf, gradients in PROBLEM.gradient_matrix().items():
            np.testing.assert_allclose(
                update[leaf], np.tensordot(w, gradients, 1), rtol=1e-4, atol=1e-6
            )
        np.testing.assert_allclose(state.value, w @ PROBLEM.losses(), rtol=1e-5)


@pytest.mark.parametrize(("momentum", "nesterov"), [(None, False), (0.9, False), (0.9, True)])
def test_msgd_is_sgd_on_the_noisy_gradient(momentum, nesterov):
    """The reference is the recursion, written out in numpy's float64."""
    tx = transform.msgd(0.5, NOISE, fresh_key(), momentum=momentum, nesterov=nesterov)
    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    expected = {k: np.asarray(v, np.float64) for k, v in params.items()}
    trace = {k: np.zeros_like(v) for k, v in expected.items()}
    for step in range(4):
        update, state = fast_update(tx, state, params)
        params = optax.apply_updates(params, update)
        w = np.asarray(NOISE.sample(fresh_key(), step).dense(), np.float64)
        for leaf, matrix in PROBLEM._replace(params=dict(expected)).gradient_matrix().items():
            gradient = np.tensordot(w, matrix, 1)
            trace[leaf] = gradient + (momentum or 0) * trace[leaf]
            direction = gradient + momentum * trace[leaf] if nesterov else trace[leaf]
            expected[leaf] = expected[leaf] - 0.5 * direction
    assert_trees_close(params, expected, rtol=1e-4, atol=1e-5)


def test_the_value_is_found_by_optax_tree_get():
    tx = optax.chain(transform.multiplicative_noise(NOISE, fresh_key()), optax.adam(1e-3))
    state = tx.init(PROBLEM.params)
    assert float(optax.tree.get(state, "value")) == np.inf
    _, state = fast_update(tx, state, PROBLEM.params)
    w = np.asarray(NOISE.sample(fresh_key(), 0).dense())
    np.testing.assert_allclose(optax.tree.get(state, "value"), w @ PROBLEM.losses(), rtol=1e-5)


def test_bfloat16_params_get_bfloat16_updates():
    problem = regression(dtype=jnp.bfloat16)
    for row in (TRANSFORMS["multiplicative_noise"], TRANSFORMS["aggregate_per_example"]):
        tx = row.make(fresh_key())
        update, _ = row.update(tx, tx.init(problem.params), problem.params, problem)
        chex.assert_trees_all_equal_dtypes(update, problem.params)
        exact, _ = row.update(tx, tx.init(PROBLEM.params), PROBLEM.params)
        for leaf in exact:  # bfloat16 has 8 bits, and the problem itself is rounded too
            scale = np.abs(exact[leaf]).max()
            difference = np.asarray(update[leaf], np.float32) - exact[leaf]
            assert np.abs(difference).max() < 0.05 * max(scale, 0.1)


# Compositions -------------------------------------------------------------------------------------

MASK = {"w": True, "b": False}


def test_masked_noise_replaces_the_selected_leaves_only():
    tx = optax.masked(transform.multiplicative_noise(NOISE, fresh_key()), MASK)
    passed = {"w": jnp.zeros(5), "b": jnp.full((), 3.0)}
    update, _ = tx.update(
        passed,
        tx.init(PROBLEM.params),
        PROBLEM.params,
        loss_vector_fn=loss_vector_fn,
        data=PROBLEM.data,
        full_params=PROBLEM.params,
    )
    plain = transform.multiplicative_noise(NOISE, fresh_key())
    expected, _ = fast_update(plain, plain.init(PROBLEM.params), PROBLEM.params)
    np.testing.assert_allclose(update["w"], expected["w"], rtol=1e-5)
    assert float(update["b"]) == 3.0


def test_masked_aggregators_can_split_the_parameters():
    """Of two masked aggregators in one chain, one adds noise for "w", the other none for "b"."""
    flipped = {name: not selected for name, selected in MASK.items()}
    tx = optax.chain(
        optax.masked(transform.aggregate_per_example(NOISE, fresh_key()), MASK),
        optax.masked(transform.aggregate_per_example(noise.gd(100), fresh_key()), flipped),
    )
    update, _ = aggregated_update(tx, tx.init(PROBLEM.params), PROBLEM.params)
    w = np.asarray(NOISE.sample(fresh_key(), 0).dense(), np.float64)
    gradients = PROBLEM.gradient_matrix()
    np.testing.assert_allclose(update["w"], w @ gradients["w"], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(update["b"], gradients["b"].mean(), rtol=1e-4, atol=1e-6)


def test_partition_gives_each_group_its_own_optimizer():
    """For "w" there are noisy gradients; for "b", the updates that were given."""
    noisy = optax.chain(transform.multiplicative_noise(NOISE, fresh_key()), optax.sgd(1.0))
    tx = optax.partition({"noisy": noisy, "plain": optax.sgd(2.0)}, {"w": "noisy", "b": "plain"})
    passed = {"w": jnp.zeros(5), "b": jnp.full((), 3.0)}
    update, _ = tx.update(
        passed,
        tx.init(PROBLEM.params),
        PROBLEM.params,
        loss_vector_fn=loss_vector_fn,
        data=PROBLEM.data,
        full_params=PROBLEM.params,
    )
    w = np.asarray(NOISE.sample(fresh_key(), 0).dense(), np.float64)
    expected = -w @ PROBLEM.gradient_matrix()["w"]
    np.testing.assert_allclose(update["w"], expected, rtol=1e-4, atol=1e-6)
    assert float(update["b"]) == -6.0


def test_the_aggregator_works_in_optax_process():
    """Gradients are clipped per example before the noise, and optax's sgd comes behind it."""
    clip = jax.vmap(lambda gradient: optax.projections.projection_l2_ball(gradient, 0.5))
    tx = optax.experimental.aggregating.process(
        optax.stateless(lambda gradients, _: clip(gradients)),
        transform.aggregate_per_example(NOISE, fresh_key()),
        optax.sgd(1.0),
    )
    update, _ = aggregated_update(tx, tx.init(PROBLEM.params), PROBLEM.params)
    gradients = PROBLEM.gradient_matrix()
    norms = np.sqrt((gradients["w"] ** 2).sum(1) + gradients["b"] ** 2)
    w = np.asarray(NOISE.sample(fresh_key(), 0).dense(), np.float64) * np.minimum(1, 0.5 / norms)
    np.testing.assert_allclose(update["w"], -w @ gradients["w"], rtol=1e-4, atol=1e-6)


def test_an_injected_learning_rate_can_be_changed():
    make = optax.inject_hyperparams(transform.msgd, static_args=("law", "key"))
    tx = make(learning_rate=0.1, law=NOISE, key=fresh_key())
    state = tx.init(PROBLEM.params)
    small, _ = fast_update(tx, state, PROBLEM.params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.2)
    large, _ = fast_update(tx, state, PROBLEM.params)
    assert_trees_close(jax.tree.map(lambda x: 2 * x, small), large)


def test_multi_steps_behind_the_noise_averages_noisy_gradients():
    inner = transform.multiplicative_noise(NOISE, fresh_key())
    tx = optax.chain(inner, optax.MultiSteps(optax.sgd(1.0), 2).gradient_transformation())
    state = tx.init(PROBLEM.params)
    first, state = fast_update(tx, state, PROBLEM.params)
    second, state = fast_update(tx, state, PROBLEM.params)
    assert not np.any(first["w"])
    weights = [np.asarray(NOISE.sample(fresh_key(), t).dense(), np.float64) for t in (0, 1)]
    expected = -np.mean(weights, axis=0) @ PROBLEM.gradient_matrix()["w"]
    np.testing.assert_allclose(second["w"], expected, rtol=1e-4, atol=1e-6)


class LinenModel(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        return flax.linen.Dense(1)(flax.linen.tanh(flax.linen.Dense(4)(x)))[0]


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.out = nnx.Linear(5, 4, rngs=rngs), nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.hidden(x)))[0]


def flax_cases():
    linen = LinenModel()
    yield "linen", linen.init(jax.random.key(0), jnp.ones(5)), linen.apply
    graphdef, state = nnx.split(NnxModel(nnx.Rngs(0)))
    yield "nnx", state, lambda state, x: nnx.merge(graphdef, state)(x)


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_flax_models_train(flavour):
    """On linearly separable data, the mean loss halves; the first step agrees with aggregation."""
    ((_, params, apply),) = [case for case in flax_cases() if case[0] == flavour]

    def loss_fn(params, example):
        return jax.nn.softplus(-example["y"] * apply(params, example["x"]))

    losses = loss.per_example(loss_fn)
    tx = transform.msgd(0.5, noise.cov(100, 10), fresh_key(), momentum=0.9)
    slow = transform.aggregate_per_example(noise.cov(100, 10), fresh_key())

    @jax.jit
    def step(params, state):
        updates, state = tx.update((), state, params, loss_vector_fn=losses, data=PROBLEM.data)
        return optax.apply_updates(params, updates), state

    gradients = jax.vmap(jax.grad(loss_fn), (None, 0))(params, PROBLEM.data)
    aggregated, _ = slow.update(gradients, slow.init(params), params)
    before = float(losses(params, PROBLEM.data).mean())
    state, start = tx.init(params), params
    for i in range(60):
        params, state = step(params, state)
        if i == 0:
            moved = jax.tree.map(lambda a, b: (a - b) / 0.5, start, params)
            assert_trees_close(moved, aggregated, rtol=1e-3, atol=1e-5)
    assert float(losses(params, PROBLEM.data).mean()) < 0.5 * before


def test_an_optimizer_of_nnx_takes_the_transformation():
    model = NnxModel(nnx.Rngs(0))
    tx = transform.msgd(0.5, noise.fisher(100, 10), fresh_key())
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    graphdef, start = nnx.split(model)
    start = jax.tree.map(jnp.copy, start)  # the update below changes the variables of the model
    losses = loss.per_example(
        lambda state, e: jax.nn.softplus(-e["y"] * nnx.merge(graphdef, state)(e["x"]))
    )
    expected, _ = tx.update((), tx.init(start), start, loss_vector_fn=losses, data=PROBLEM.data)
    # `nnx.Optimizer` gives the transformation plain arrays, in the structure of the model's state.
    optimizer.update(
        model,
        None,
        loss_vector_fn=lambda s, batch: losses(_like(start, s), batch),
        data=PROBLEM.data,
    )
    moved = jax.tree.map(lambda a, b: a - b, nnx.split(model)[1], start)
    for a, b in zip(jax.tree.leaves(moved), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def _like(template, tree):
    return jax.tree.unflatten(jax.tree.structure(template), jax.tree.leaves(tree))
