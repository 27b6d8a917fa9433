"""Programs belong to functions that the user holds: none is compiled twice, and none stays."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import loss, noise, train, transform
from tests.support.noises import ROWS
from tests.support.programs import assert_arrays_go, assert_nothing_stays, compilations

KEY = jax.random.key(0)
SIZE = 2000  # permutations of up to 1,024 would be sorted instead
FEW = 200
CAPTURED = 8 << 20  # bytes of the array in each fresh loss


def fresh_loss(seed=0.0):
    """A new loss vector function, which holds an array of its own."""
    held = jnp.full(CAPTURED // 4, seed, jnp.float32)
    return lambda params, batch: (params - batch) ** 2 + held[0]


def fresh_data(seed=0, size=SIZE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=size).astype(np.float32))


def spread():
    return jax.NamedSharding(jax.make_mesh((2,), ("data",)), jax.P("data"))


def update(optimizer, losses, data):
    state = optimizer.init(jnp.ones(()))
    return optimizer.update((), state, jnp.ones(()), loss_vector_fn=losses, data=data)[0]


def draws(law, count=3):
    return jax.vmap(law.sample, in_axes=(None, 0))(KEY, jnp.arange(count))


LAW = noise.sparse_cov(SIZE, 50, support_size=200)
STATISTICS = jnp.zeros(())


def with_statistics(losses):
    return lambda params, batch, model_state: (losses(params, batch), model_state + 1)


# The calls, each of a loss vector function, a law and data.
CALLS = {
    "noise.MNoise.sample": lambda losses, law, data: law.sample(KEY, 3),
    "noise.permute": lambda losses, law, data: noise.permute(KEY, jnp.arange(50), SIZE),
    "loss.weighted_value_and_grad": lambda losses, law, data: loss.weighted_value_and_grad(losses)(
        jnp.ones(()), data, law.sample(KEY, 0)
    ),
    "in micro-batches": lambda losses, law, data: loss.weighted_value_and_grad(
        losses, microbatch_size=100
    )(jnp.ones(()), data, law.sample(KEY, 0)),
    "spread": lambda losses, law, data: loss.weighted_value_and_grad(losses, sharding=spread())(
        jnp.ones(()), data, law.sample(KEY, 0)
    ),
    "loss.noisy_value_and_grad": lambda losses, law, data: loss.noisy_value_and_grad(
        with_statistics(losses), law, has_state=True, microbatch_size=100
    )(jnp.ones(()), data, KEY, 0, STATISTICS),
    "loss.weighted_values_and_grads": lambda losses, law, data: loss.weighted_values_and_grads(
        losses, microbatch_size=100
    )(jnp.ones(()), data, draws(law)),
    "transform.multiplicative_noise": lambda losses, law, data: update(
        transform.multiplicative_noise(law, KEY, microbatch_size=100), losses, data
    ),
    "transform.msgd": lambda losses, law, data: update(
        transform.msgd(0.1, law, KEY, microbatch_size=100), losses, data
    ),
    "train.make_loop": lambda losses, law, data: train.make_loop(
        train.make_step(losses, optax.sgd(0.1), law), max_steps=3
    )(train.init(jnp.ones(()), optax.sgd(0.1), KEY), data, 2),
}


def call(name, seed):
    law = noise.sparse_cov(FEW, 5, support_size=50)  # quick to compile
    return CALLS[name](fresh_loss(float(seed)), law, fresh_data(seed, FEW))


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_arrays_of_earlier_calls_are_freed(name):
    """Each call has a fresh loss vector function with 8 MB, fresh data and a fresh law."""
    assert_arrays_go(lambda seed: call(name, seed), CAPTURED)


def test_what_a_loss_of_spread_examples_holds_is_freed():
    """A quick case of the test above: `jax.closure_convert` keeps its function, and kept this."""
    assert_arrays_go(lambda seed: call("spread", seed), CAPTURED)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_a_hundred_calls_leave_nothing_behind(name):
    assert_nothing_stays(lambda seed: call(name, seed))


# Eager calls --------------------------------------------------------------------------------------


def eager_functions():
    """Functions that a user makes once, and calls again and again without `jax.jit`."""
    losses, data = fresh_loss(), fresh_data()
    weights, dense = LAW.sample(KEY, 0), noise.cov(SIZE, 50).sample(KEY, 0)
    micro = loss.weighted_value_and_grad(losses, microbatch_size=100)
    sharded = loss.weighted_value_and_grad(losses, sharding=spread())
    of_step = loss.noisy_value_and_grad(
        with_statistics(losses), noise.cov(SIZE, 50), has_state=True, microbatch_size=100
    )
    many = loss.weighted_values_and_grads(losses, microbatch_size=100)
    stacked = draws(LAW)
    optimizer = transform.multiplicative_noise(LAW, KEY, microbatch_size=100)
    one = jnp.ones(())
    return {
        "permute": lambda step: noise.permute(jax.random.key(step), jnp.arange(50), SIZE),
        "micro-batches": lambda step: micro(one, data, weights),
        "micro-batches of a dense law": lambda step: micro(one, data, dense),
        "spread": lambda step: sharded(one, data, weights),
        "a step with statistics": lambda step: of_step(one, data, KEY, step, STATISTICS),
        "many draws": lambda step: many(one, data, stacked),
        "multiplicative_noise": lambda step: update(optimizer, losses, data),
    }


@pytest.mark.parametrize("name", eager_functions())
def test_a_second_eager_call_compiles_nothing(name):
    function = eager_functions()[name]
    function(0)
    with compilations() as compiled:
        function(1)
    assert not compiled


@pytest.mark.parametrize("name", list(ROWS))
def test_a_second_draw_compiles_nothing(name):
    law = ROWS[name].make(1500, 30)
    law.sample(KEY, 0)
    with compilations() as compiled:
        law.sample(KEY, 1)
        law.sample(jax.random.key(1), np.int64(2))
    assert not compiled


def test_the_counter_counts_compilations():
    with compilations() as compiled:
        jax.jit(lambda x: x + 1)(1.0)
    assert len(compiled) == 1


@pytest.mark.parametrize("options", [{}, {"microbatch_size": 100}], ids=str)
def test_a_changed_global_is_seen_by_a_new_jit(options):
    """A loss reads everything but its arguments when it is traced, which a new `jax.jit` does."""
    factor = [1.0]

    def losses(params, batch):
        return factor[0] * (params - batch) ** 2

    of_weights = loss.weighted_value_and_grad(losses, **options)
    data, weights = fresh_data(), noise.gd(SIZE).sample(KEY, 0)
    values = []
    for factor[0] in (1.0, 3.0):
        step = jax.jit(lambda *args: of_weights(*args))
        values.append(float(step(jnp.ones(()), data, weights)[0]))
    np.testing.assert_allclose(values[1], 3 * values[0], rtol=1e-5)
