"""Constants in the state of a loss vector function.

They are arguments of the program, keep their bits, and make no ghost batches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msgd_jax import loss, noise, train, transform

KEY = jax.random.key(31)
N = 12
X = jax.random.normal(jax.random.key(1), (N, 3))
# Of statistics, the mean over devices is taken. Over 3 devices the mean of three equal numbers x
# need not be x, because 3 x is rounded: constants must not go through it.
FROZEN = {
    "w": jax.random.normal(jax.random.key(2), (3, 4)),
    "table": jnp.asarray([7, -3, 2]),
    "zero": -jnp.zeros(2),
    "nothing": jnp.asarray([jnp.nan, jnp.inf]),
}


def spread(num_devices, mode=AxisType.Auto):
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(mode,), devices=devices)
    return NamedSharding(mesh, PartitionSpec("data"))


def losses_at(params, batch, frozen):
    return jnp.square(jnp.tanh(batch @ frozen["w"]) @ params - 1.0)


def frozen_losses(params, batch, state):
    losses = losses_at(params, batch, state.arrays)
    changed = jax.tree.map(lambda x: x + jnp.ones((), x.dtype), state.arrays)
    return losses, loss.Constants(changed)  # the library must ignore what comes back


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


SETTINGS = [
    {},
    {"microbatch_size": 4},
    {"sharding": spread(3)},
    {"sharding": spread(3, AxisType.Explicit), "microbatch_size": 2},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_constants_keep_their_bits_and_gradients_are_those_of_a_loss_that_reads_them(settings):
    law, params, state = noise.cov(N, 3), jnp.ones(4), loss.Constants(FROZEN)
    found = loss.noisy_value_and_grad(frozen_losses, law, has_state=True, **settings)
    (value, after), grads = found(params, X, KEY, 3, state)
    read = loss.noisy_value_and_grad(lambda p, b: losses_at(p, b, FROZEN), law, **settings)
    # The values agree only if the examples have the same order: constants alone make no ghost
    # batches.
    expected, expected_grads = read(params, X, KEY, 3)
    np.testing.assert_allclose(grads, expected_grads, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert bits(after) == bits(state)
    assert isinstance(after, loss.Constants)


def test_constants_alone_make_no_ghost_batches():
    def program(state, losses):
        law = noise.gd(2000)
        found = loss.noisy_value_and_grad(losses, law, has_state=True, microbatch_size=100)
        return str(jax.make_jaxpr(found)(jnp.ones(()), jnp.ones(2000), KEY, 0, state))

    one = loss.Constants(jnp.ones(()))
    assert "_permute" not in program(one, lambda p, x, state: (p * x, state))
    both = (one, jnp.ones(()))
    assert "_permute" in program(both, lambda p, x, state: (p * x, state))


def test_constants_keep_their_bits_beside_statistics():
    def losses(params, batch, state):
        frozen = state["frozen"].arrays
        after = {"frozen": state["frozen"], "count": state["count"] + batch.shape[0]}
        return losses_at(params, batch, frozen), after

    state = {"count": jnp.asarray(0), "frozen": loss.Constants(FROZEN)}
    law, optimizer = noise.cov(N, 3), optax.sgd(0.1)
    # Statistics are updated by `train`, and the constants beside them are not.
    step = train.make_step(losses, optimizer, law, has_state=True, microbatch_size=4)
    loop = train.make_loop(step, max_steps=5)
    after, _ = loop(train.init(jnp.ones(4), optimizer, KEY, state), X, 5)
    assert int(after.model_state["count"]) == 5 * N
    assert bits(after.model_state["frozen"]) == bits(FROZEN)
    # The transformation makes the same steps, and keeps the bits too.
    chain = transform.with_noise(optimizer, law, KEY, model_state=state, microbatch_size=4)
    params, kept = jnp.ones(4), chain.init(jnp.ones(4))
    for _ in range(5):
        updates, kept = chain.update((), kept, params, loss_vector_fn=losses, data=X)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params, after.params, rtol=1e-5)
    assert bits(kept[0].model_state["frozen"]) == bits(FROZEN)


def test_constants_are_arguments_of_the_program():
    """The arguments have more bytes than those of a step whose loss closes over the array."""
    big = {"w": jnp.ones((400, 400))}

    def losses(params, batch, state):
        return jnp.square(batch @ state.arrays["w"] @ params), state

    optimizer = optax.sgd(0.1)
    state = train.init(jnp.ones(400), optimizer, KEY, loss.Constants(big))
    data = jnp.ones((4, 400))
    step = train.make_step(losses, optimizer, noise.gd(4), has_state=True)
    as_argument = jax.jit(step).lower(state, data).compile().memory_analysis()
    reads = train.make_step(lambda p, b: jnp.square(b @ big["w"] @ p), optimizer, noise.gd(4))
    alone = train.init(jnp.ones(400), optimizer, KEY)
    read = jax.jit(reads).lower(alone, data).compile().memory_analysis()
    assert as_argument is not None
    assert read is not None
    assert as_argument.argument_size_in_bytes - read.argument_size_in_bytes == 4 * 400 * 400


def test_a_state_of_another_structure_is_refused():
    found = loss.noisy_value_and_grad(
        lambda p, b, s: (losses_at(p, b, s.arrays), s.arrays), noise.gd(N), has_state=True
    )
    with pytest.raises(ValueError, match="must return model_state with the structure"):
        found(jnp.ones(4), X, KEY, 0, loss.Constants(FROZEN))
