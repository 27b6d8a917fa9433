"""With statistics, micro-batches are ghost batches: every step puts other examples together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.datasets import load_digits

from msgd_jax import loss, noise, streaming, train
from msgd_jax._streams import Stream, derive
from tests.support.statistics import assert_agree, bound

KEY = jax.random.key(5)


def visits(params, batch, state):
    """Losses that are zero, with statistics that record the order of the examples."""
    seen, count = state["seen"], state["count"]
    seen = jax.lax.dynamic_update_slice(seen, batch.astype(jnp.int32), (count,))
    losses = params * jnp.ones(batch.shape[0])
    return losses, {"seen": seen, "count": count + batch.shape[0]}


def nothing_seen(size):
    return {"seen": jnp.full(size, -1, jnp.int32), "count": jnp.zeros((), jnp.int32)}


def visited(law, num_steps):
    """The examples of each step in the order in which they are visited: [steps, N]."""
    of_step = loss.noisy_value_and_grad(visits, law, has_state=True, microbatch_size=4)
    data = jnp.arange(law.num_examples, dtype=jnp.float32)

    def one(step):
        empty = nothing_seen(law.num_examples)
        return of_step(jnp.asarray(1.0), data, KEY, step, empty)[0][1]["seen"]

    return np.asarray(jax.jit(lambda: jax.lax.map(one, jnp.arange(num_steps)))())


@pytest.mark.parametrize(
    "law", [noise.gd(12), noise.cov(12, 3), noise.bernoulli(12, 3)], ids=lambda law: law.name
)
def test_a_dense_law_goes_through_the_examples_in_an_order_of_the_step(law):
    orders = visited(law, 20)
    assert (np.sort(orders) == np.arange(12)).all()
    assert len({tuple(order) for order in orders.tolist()}) == 20
    # The order is that of `permute`, with a key of the stream of orders.
    key = jax.random.fold_in(derive(KEY, Stream.ORDER, 3), 0)
    np.testing.assert_array_equal(orders[3], noise.permute(key, np.arange(12), 12))


def test_every_pair_of_examples_is_equally_often_in_one_ghost_batch():
    """Two examples share a ghost batch of 4 out of 12 with probability 3/11."""
    orders = visited(noise.gd(12), 150)
    batch_of = np.argsort(orders) // 4
    together = (batch_of[:, :, None] == batch_of[:, None]).mean(0)[np.triu_indices(12, 1)]
    chance = 3 / 11
    z = (together - chance) / np.sqrt(chance * (1 - chance) / 150)
    assert np.abs(z).max() < bound(z.size)


def test_weights_stay_with_their_examples():
    """The gradient of sum_i W_i x_i theta does not depend on the order."""

    def losses(params, batch, state):
        return params * batch, state + 1

    law, data = noise.cov(50, 5), jnp.linspace(-1, 1, 50)
    of_step = loss.noisy_value_and_grad(losses, law, has_state=True, microbatch_size=7)
    (_, state), gradient = of_step(jnp.asarray(1.0), data, KEY, 2, jnp.zeros(()))
    np.testing.assert_allclose(gradient, law.sample(KEY, 2).values @ data, rtol=1e-5)
    assert float(state) == 8  # of 7 examples each, the last one filled up


def test_losses_without_statistics_keep_the_order_of_the_data():
    def program_of(losses, *state):
        options = {"microbatch_size": 100, "has_state": bool(state)}
        f = loss.noisy_value_and_grad(losses, noise.gd(2000), **options)
        return jax.make_jaxpr(f)(jnp.ones(()), jnp.ones(2000), KEY, 0, *state)

    program = program_of(loss.per_example(lambda p, x: p * x))
    with_order = program_of(lambda p, x, state: (p * x, state), ())
    assert "_permute" not in str(program)
    assert "_permute" in str(with_order)


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("num_devices", [2, 4])
def test_each_device_shuffles_its_own_examples(num_devices, explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(kind,))
    sharding = jax.NamedSharding(mesh, jax.P("data"))
    size = 16
    own = size // num_devices

    def positions(params, batch, state):
        """Adds 10^k times the k-th visited example, for two examples of each batch."""
        value = state["value"] + state["factor"] * (batch[0] + 10 * batch[1])
        return params * batch, {"value": value, "factor": 100 * state["factor"]}

    law = noise.gd(size)
    of_step = loss.noisy_value_and_grad(
        positions, law, has_state=True, microbatch_size=2, sharding=sharding
    )
    # All devices number their examples from 0, so that the mean over devices of the recorded
    # orders can be computed from the orders of the parts.
    data = jax.device_put(jnp.tile(jnp.arange(own, dtype=jnp.float32), num_devices), sharding)
    state = {"value": jnp.zeros(()), "factor": jnp.ones(())}
    (_, state), _ = of_step(jnp.ones(()), data, KEY, 1, state)
    parts = [
        noise.permute(jax.random.fold_in(derive(KEY, Stream.ORDER, 1), part), np.arange(own), own)
        for part in range(num_devices)
    ]
    expected = np.mean([(10.0 ** np.arange(own)) @ np.asarray(part) for part in parts])
    np.testing.assert_allclose(state["value"], expected, rtol=1e-6)


def test_streamed_examples_come_in_the_same_order(tmp_path):
    """Streamed examples and examples on the device give the same bits."""
    x = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)

    def losses(params, batch, state):
        centred = batch - batch.mean(0, keepdims=True)
        return (centred @ params) ** 2, 0.9 * state + 0.1 * batch.mean(0)

    optimizer, law = optax.sgd(0.1), noise.sparse_cov(40, 5, support_size=12)
    start = functools.partial(train.init, jnp.ones(3), optimizer, KEY, jnp.zeros(3))
    step = train.make_step(losses, optimizer, law, has_state=True, microbatch_size=4)
    on_device, _ = train.make_loop(step, max_steps=5)(start(), jnp.asarray(x), 5)
    loop = streaming.make_loop(
        losses, optimizer, law, streaming.ArraySource(x), has_state=True, microbatch_size=4
    )
    read, _ = loop(start(), 5)
    np.testing.assert_array_equal(read.params, on_device.params)
    np.testing.assert_array_equal(read.model_state, on_device.model_state)


# What it is for -----------------------------------------------------------------------------------


def network(params, batch, state):
    """One hidden layer with batch norm; the statistics are running means and variances."""
    x, label = batch
    hidden = x @ params["in"]
    mean, variance = hidden.mean(0), hidden.var(0)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits_of(params, hidden, mean, variance), label
    )
    return losses, jax.tree.map(lambda old, new: 0.98 * old + 0.02 * new, state, (mean, variance))


def logits_of(params, hidden, mean, variance):
    normal = (hidden - mean[None]) * jax.lax.rsqrt(variance + 1e-3)[None]
    return jax.nn.relu(normal * params["scale"][None] + params["shift"][None]) @ params["out"]


def start_of(seed):
    keys = jax.random.split(jax.random.key(seed))
    params = {
        "in": jax.random.normal(keys[0], (64, 32)) / 8,
        "scale": jnp.ones(32),
        "shift": jnp.zeros(32),
        "out": jax.random.normal(keys[1], (32, 10)) / 6,
    }
    return params, (jnp.zeros(32), jnp.ones(32))


@functools.cache
def digits():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = images[order], labels[order].astype(np.int32)
    by_class = np.argsort(labels[:300], kind="stable")
    shuffled = (images[:300], labels[:300])
    return shuffled, tuple(part[by_class] for part in shuffled), (images[300:], labels[300:])


def accuracies(losses_at, data, seeds=4, steps=150):
    """The test accuracy of each seed, in per cent, after training on some data.

    Args:
        losses_at: ``losses_at(params, data, key, step, state)`` returns the value with the new
            state, and the gradient.
        data: images and labels.
        seeds: how many runs there are.
        steps: how many steps each run has.
    """
    optimizer = optax.sgd(0.5)

    def run(seed):
        params, state = start_of(seed)

        def step(carry, t):
            params, state = carry
            (_, state), grads = losses_at(params, data, jax.random.key(100 + seed), t, state)
            updates, _ = optimizer.update(grads, optimizer.init(params))
            return (optax.apply_updates(params, updates), state), None

        (params, (mean, variance)), _ = jax.lax.scan(step, (params, state), jnp.arange(steps))
        images, labels = digits()[2]
        hidden = jnp.asarray(images) @ jnp.asarray(params["in"])
        logits = logits_of(params, hidden, mean, variance)
        return (logits.argmax(1) == labels).mean()

    return 100 * np.asarray(jax.jit(jax.vmap(run))(jnp.arange(seeds)), np.float64)


LAWS = {
    "gd": noise.gd(300),
    "cov": noise.cov(300, 30),
    "sparse_cov": noise.sparse_cov(300, 30, support_size=90),
    "sgd": noise.sgd(300, 90),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAWS)
def test_sorted_data_are_as_good_as_shuffled_data(name):
    """Mean accuracies agree within their standard error, and within one percentage point."""
    of_step = loss.noisy_value_and_grad(network, LAWS[name], has_state=True, microbatch_size=30)
    shuffled, by_class, _ = digits()
    first, second = accuracies(of_step, shuffled), accuracies(of_step, by_class)
    error = np.hypot(first.std(ddof=1), second.std(ddof=1)) / np.sqrt(len(first))
    assert_agree(first.mean(), second.mean(), error, degrees_of_freedom=2 * (len(first) - 1))
    assert abs(first.mean() - second.mean()) < 1
    assert second.mean() > 90


@pytest.mark.slow
def test_ghost_batches_in_the_order_of_sorted_data_ruin_batch_norm():
    """The control: in the order of sorted data, a ghost batch has one or two classes."""
    law = noise.cov(300, 30)
    of_weights = loss.weighted_value_and_grad(network, has_state=True, microbatch_size=30)

    def in_the_order_of_the_data(params, data, key, step, state):
        return of_weights(params, data, law.sample(key, step), state)

    shuffled, by_class, _ = digits()
    assert accuracies(in_the_order_of_the_data, by_class).mean() < 80
    assert accuracies(in_the_order_of_the_data, shuffled).mean() > 90
