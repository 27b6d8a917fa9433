"""The walker through micro-batches: every law against dense algebra, on any number of devices.

No example may move between devices.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msgd_jax import loss, noise, sharding
from tests.support.noises import ROWS
from tests.support.problems import loss_vector_fn, regression
from tests.support.spread import assert_is_dense_gradient, sent, spread

KEY = jax.random.key(271)
N = 1003  # not divisible by any number of devices here
SPARSE = (
    "sgd",
    "sgd_replace",
    "sparse_fisher",
    "sparse_cov",
    "random_reshuffling",
    "scaled_reshuffling",
    "mixture",
    "coloured_sparse",
    "svag",
)


# Gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ROWS))
def test_gradients_of_every_law_on_eight_devices_are_dense_algebra(name):
    problem, law, rows = regression(N), ROWS[name].make(N, 400), spread(8)
    f = loss.noisy_value_and_grad(loss_vector_fn, law, microbatch_size=30, sharding=rows)
    value, grads = f(problem.params, sharding.shard_examples(problem.data, rows), KEY, 2)
    assert_is_dense_gradient(problem, law.sample(KEY, 2), value, grads)


@pytest.mark.parametrize("size", [1, 7, 125, 126, 501, 1002])
def test_the_last_micro_batch_counts_no_example_twice(size):
    problem, law = regression(N), noise.cov(N, 20)
    f = loss.noisy_value_and_grad(loss_vector_fn, law, microbatch_size=size)
    assert_is_dense_gradient(problem, law.sample(KEY, 0), *f(problem.params, problem.data, KEY, 0))
    losses = loss.LossVector(loss_vector_fn, problem.data, microbatch_size=size)
    np.testing.assert_allclose(losses(problem.params), problem.losses(), rtol=1e-5)


def test_micro_batches_may_be_larger_than_the_number_of_examples():
    problem = regression(10)
    weights = noise.Weights(jnp.ones(50) / 50, jnp.arange(50, dtype=jnp.int32) % 10, 10)
    f = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=20)
    assert_is_dense_gradient(problem, weights, *f(problem.params, problem.data, weights))


LISTS = {
    "all on one device": np.arange(60) % 40,  # the other devices have nothing to do
    "one": np.array([1002]),
    "spread": np.random.default_rng(0).permutation(N)[:300],
    "the ends of parts": np.array([125, 126, 251, 252, 1002, 0]),  # each device has 126 examples
}


@pytest.mark.parametrize("microbatch_size", [None, 7])
@pytest.mark.parametrize("name", list(LISTS))
def test_gradients_do_not_depend_on_where_listed_examples_are(name, microbatch_size):
    problem, indices = regression(N), jnp.asarray(LISTS[name], jnp.int32)
    values = jax.random.normal(KEY, indices.shape)
    weights = noise.Weights(values, indices, N)
    rows = spread(8)
    f = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=microbatch_size, sharding=rows)
    data = sharding.shard_examples(problem.data, rows)
    assert_is_dense_gradient(problem, weights, *f(problem.params, data, weights))
    one_device = loss.weighted_value_and_grad(loss_vector_fn)
    near = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-6)
    expected = one_device(problem.params, problem.data, weights)
    jax.tree.map(near, f(problem.params, problem.data, weights), expected)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["sparse_cov", "sgd_replace"])
def test_parameters_may_be_sharded_along_another_axis(name, mode):
    rows = spread(4, mode, model=2)
    problem, law = regression(N, dim=6), ROWS[name].make(N, 40)
    layout = {"w": PartitionSpec("model"), "b": PartitionSpec()}
    layout = {k: NamedSharding(rows.mesh, spec) for k, spec in layout.items()}
    f = loss.noisy_value_and_grad(loss_vector_fn, law, microbatch_size=6, sharding=rows)
    params = jax.device_put(problem.params, layout)
    value, grads = jax.jit(f)(params, sharding.shard_examples(problem.data, rows), KEY, 4)
    assert_is_dense_gradient(problem, law.sample(KEY, 4), value, grads)


@pytest.mark.parametrize("name", ["sparse_cov", "cov"])
def test_keys_and_means_are_those_of_one_device(name):
    """An example has its key on any device, and what fills up a micro-batch is not averaged."""
    law = ROWS[name].make(N, 30)
    x = jax.random.normal(jax.random.key(0), (N,))
    fn = loss.per_example(
        lambda theta, x, key: (theta * (x + jax.random.normal(key)), {"x": x}),
        has_aux=True,
        has_keys=True,
    )
    found = []
    for rows in (None, spread(8)):
        f = loss.noisy_value_and_grad(
            fn, law, microbatch_size=20, has_aux=True, has_keys=True, sharding=rows
        )
        (value, aux), grad = f(jnp.ones(()), x, KEY, 3)
        found.append((value, aux.averaged["x"], grad))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_stacked_outputs_have_the_number_of_micro_batches_that_is_known_beforehand():
    law = noise.sgd(N, 64)
    fn = lambda p, x: (p * x, loss.Outputs(stacked={"most": x.max()}))  # noqa: E731
    f = loss.noisy_value_and_grad(fn, law, microbatch_size=4, has_aux=True, sharding=spread(8))
    (_, aux), _ = f(jnp.ones(()), jnp.arange(float(N)), KEY, 0)
    assert aux.stacked["most"].shape == (8, 2)


# Derivatives --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sparse_cov", "cov"])
def test_gradients_over_devices_are_differentiable_again(name):
    """Reverse mode and forward over reverse mode, also in a number that the loss closes over."""
    problem, law, rows = regression(N), ROWS[name].make(N, 40), spread(8)

    def contracted(params, scale, where):
        fn = lambda params, batch: scale * loss_vector_fn(params, batch)  # noqa: E731
        f = loss.noisy_value_and_grad(fn, law, microbatch_size=6, sharding=where)
        value, grads = f(params, problem.data, KEY, 1)
        return value**2 + jnp.sum(jnp.sin(grads["w"])) + grads["b"] ** 2

    found = []
    for where in (None, rows):
        of = functools.partial(contracted, where=where)
        first = jax.jit(jax.grad(of, argnums=(0, 1)))
        ones = jax.tree.map(jnp.ones_like, problem.params)
        along = lambda p, first=first: first(p, 1.5)[0]  # noqa: E731
        second = jax.jit(lambda p, along=along, ones=ones: jax.jvp(along, (p,), (ones,)))
        found.append((first(problem.params, 1.5), second(problem.params)))
    near = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(near, found[1], found[0])
    assert abs(found[0][0][1]) > 1e-3


def test_keys_may_be_mapped_over_devices():
    problem, law, rows = regression(N), noise.sparse_cov(N, 20, support_size=80), spread(8)
    f = loss.noisy_value_and_grad(loss_vector_fn, law, microbatch_size=6, sharding=rows)
    data = sharding.shard_examples(problem.data, rows)
    keys = jax.random.split(jax.random.key(9), 3)
    values, grads = jax.jit(jax.vmap(f, (None, None, 0, None)))(problem.params, data, keys, 0)
    for k in range(3):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], (values, grads))
        assert_is_dense_gradient(problem, law.sample(keys[k], 0), *one)


# What moves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 6])
@pytest.mark.parametrize("name", list(ROWS))
def test_no_example_moves_between_devices(name, microbatch_size):
    """Collectives carry the gradient in float32, and at most four numbers per listed example."""
    rows, size, batch = spread(8), 512, 40
    law = ROWS[name].make(1008, batch)
    shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32, sharding=rows)  # noqa: E731
    params = jax.ShapeDtypeStruct((size,), jnp.float32)
    f = loss.noisy_value_and_grad(
        lambda w, x: jnp.tanh(x @ w), law, microbatch_size=microbatch_size, sharding=rows
    )
    program = jax.jit(f).lower(params, shape(1008, size), KEY, 3).compile().as_text() or ""
    carried = sent(program)
    gradient = 4 * (size + 1)
    listed = law.support_size if name in SPARSE else batch
    assert carried >= gradient
    assert carried <= gradient + 16 * max(listed, 1)
    # An example has 2 KiB: if each device sent a single one, that would be more.
    assert 16 * listed < 8 * 4 * size
