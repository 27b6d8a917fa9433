"""Losses with a key per example.

An example has the same key on any device and in any micro-batch, and dropout adds the covariance
that listing all masks gives.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msgd_jax import loss, noise
from msgd_jax._streams import Stream, derive
from tests.support.mistakes import assert_told
from tests.support.statistics import assert_agree

KEY = jax.random.key(2718)
N = 16


def spread(num_devices: int, mode: AxisType = AxisType.Auto) -> NamedSharding:
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(mode,), devices=devices)
    return NamedSharding(mesh, PartitionSpec("data"))


# Which key an example has ------------------------------------------------------------------------


def number_of(key) -> jax.Array:
    """A number in [0, 1), whose product with a power of two is exact."""
    return jax.random.uniform(key)


def reads_keys(theta, batch, keys):
    """Losses whose gradient has the entries ``W_i u(key_i)``, one per example."""
    return theta[batch] * jax.vmap(number_of)(keys)


def expected_numbers(step: int) -> np.ndarray:
    """The numbers of all examples, each from the example's own key: ``[N]``."""
    keys = [derive(KEY, Stream.LOSSES, step, i) for i in range(N)]
    return np.asarray([number_of(key) for key in keys])


LAWS = {
    "gd": noise.gd(N),
    "sgd": noise.sgd(N, 4),
    "sgd with replacement": noise.sgd(N, 8, replace=True),
    "reshuffling": noise.random_reshuffling(N, 4),
}


@pytest.mark.optimized
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"microbatch_size": 3},
        {"sharding": spread(8)},
        {"sharding": spread(2, AxisType.Explicit), "microbatch_size": 3},
    ],
    ids=["one pass", "micro-batches", "8 devices", "2 devices and micro-batches"],
)
@pytest.mark.parametrize("name", LAWS)
def test_an_example_has_one_key_wherever_it_is_computed(name, settings):
    """The gradients agree bit for bit, because the weights are powers of two."""
    law = LAWS[name]
    f = jax.jit(loss.noisy_value_and_grad(reads_keys, law, has_keys=True, **settings))
    for step in (0, 3):
        _, found = f(jnp.ones(N), jnp.arange(N), KEY, step)
        weights = np.asarray(law.sample(KEY, step).dense())
        np.testing.assert_array_equal(found, weights * expected_numbers(step))


@pytest.mark.optimized
def test_an_example_has_one_key_in_any_order_of_the_micro_batches():
    def with_count(theta, batch, count, keys):
        return reads_keys(theta, batch, keys), count + 1

    f = loss.noisy_value_and_grad(
        with_count, noise.gd(N), has_state=True, has_keys=True, microbatch_size=3
    )
    (_, count), found = jax.jit(f)(jnp.ones(N), jnp.arange(N), KEY, 3, 0)
    assert int(count) == 6
    np.testing.assert_array_equal(found, expected_numbers(3) / N)


def test_given_weights_take_the_key_and_the_step_of_the_call():
    weights = LAWS["sgd"].sample(KEY, 0)
    f = loss.weighted_value_and_grad(reads_keys, has_keys=True, microbatch_size=3)
    _, found = f(jnp.ones(N), jnp.arange(N), weights, key=KEY, step=5)
    np.testing.assert_array_equal(found, np.asarray(weights.dense()) * expected_numbers(5))


def test_an_example_that_a_loader_draws_twice_has_two_keys():
    """In a loader's batch, keys belong to the positions in the batch."""
    law, batch = noise.batch_cov(N, 1), jnp.asarray([3, 3, 1, 0])
    f = loss.noisy_value_and_grad(reads_keys, law, has_keys=True, microbatch_size=2)
    _, found = f(jnp.ones(N), batch, KEY, 3)
    expected = np.zeros(N)
    products = np.asarray(law.of(4).sample(KEY, 3).values) * expected_numbers(3)[:4]
    np.add.at(expected, np.asarray(batch), products)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_keys_may_be_mapped():
    f = loss.noisy_value_and_grad(reads_keys, noise.gd(N), has_keys=True, microbatch_size=3)
    keys = jnp.stack([jax.random.clone(KEY), jax.random.key(5)])
    _, found = jax.vmap(f, in_axes=(None, None, 0, None))(jnp.ones(N), jnp.arange(N), keys, 3)
    np.testing.assert_array_equal(found[0], expected_numbers(3) / N)
    assert len(np.unique(found)) == 2 * N


def test_keys_are_never_those_of_all_examples_at_once():
    n = 4096
    f = loss.noisy_value_and_grad(
        lambda theta, batch, keys: theta * jax.vmap(number_of)(keys) * batch,
        noise.gd(n),
        has_keys=True,
        microbatch_size=64,
    )
    with jax.debug_key_reuse(False):
        program = str(jax.make_jaxpr(f)(jnp.ones(()), jnp.ones(n), KEY, 0))
    assert "key<fry>[64]" in program
    assert f"key<fry>[{n}]" not in program


# The covariance of the noisy gradient -------------------------------------------------------------

KEEP = 0.8
X = np.random.default_rng(7).normal(size=(6, 2))
Y = np.random.default_rng(8).normal(size=6)
THETA = np.array([0.7, -0.4])


def dropped_out(theta, example, key):
    """Linear regression with dropout of the inputs."""
    x, y = example
    mask = jax.random.bernoulli(key, KEEP, (2,)).astype(x.dtype)
    return 0.5 * (jnp.sum(x * mask * theta) - y) ** 2


def dropout_moments() -> tuple[np.ndarray, np.ndarray]:
    """Lists all masks: the mean gradient per example, [N, 2], and the mean covariance, [2, 2].

    The second, Sigma-bar, is the mean over examples of the covariance that the gradient of an
    example has by its mask alone.
    """
    mean, second = np.zeros((6, 2)), np.zeros((2, 2))
    for mask in itertools.product([0.0, 1.0], repeat=2):
        p = np.prod([KEEP if kept else 1 - KEEP for kept in mask])
        x = X * np.asarray(mask)
        gradients = x * (x @ THETA - Y)[:, None]
        mean += p * gradients
        second += p * gradients.T @ gradients / 6
    return mean, second - mean.T @ mean / 6


@pytest.mark.parametrize(
    "law",
    [noise.sgd(6, 3), noise.cov(6, 3), noise.fisher(6, 3), noise.gd(6)],
    ids=["sgd", "cov", "fisher", "gd"],
)
def test_dropout_adds_its_own_covariance(law):
    """It is ``alpha N F + beta N^2 g g^T + (1/N + N (alpha + beta)) Sigma-bar``, in each entry.

    Without the last term, as if the masks added no noise, the trace would be more than 10 standard
    errors away.
    """
    draws = 20_000
    f = loss.noisy_value_and_grad(loss.per_example(dropped_out, has_keys=True), law, has_keys=True)
    data = (jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32))
    theta = jnp.asarray(THETA, jnp.float32)
    with jax.debug_key_reuse(False):
        many = jax.vmap(lambda step: f(theta, data, KEY, step)[1])
        gradients = np.asarray(jax.jit(many)(jnp.arange(draws)), np.float64)

    means, sigma = dropout_moments()
    fisher, g = means.T @ means / 6, means.mean(0)
    alpha, beta = law.covariance.alpha, law.covariance.beta
    own = (1 / 6 + 6 * (alpha + beta)) * sigma
    expected = alpha * 6 * fisher + beta * 36 * np.outer(g, g) + own

    products = np.einsum("ti,tj->tij", gradients - g, gradients - g)
    errors = products.std(0) / np.sqrt(draws)
    assert_agree(products.mean(0), expected, errors)
    squares = np.trace(products, axis1=1, axis2=2)
    error = squares.std() / np.sqrt(draws)
    assert squares.mean() - np.trace(expected - own) > 10 * error


# Keys that stay the same --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"microbatch_size": 4}, {"sharding": spread(4), "microbatch_size": 1}]
)
def test_a_loss_vector_has_the_keys_of_step_0(settings):
    """L is a function of the parameters alone: the keys are the same at each evaluation."""
    losses = loss.LossVector(
        lambda theta, batch, keys: theta * jax.vmap(number_of)(keys) * batch,
        jnp.ones(13),
        key=KEY,
        **settings,
    )
    expected = expected_numbers(0)[:13]
    for theta in (1.0, 1.0, 2.0):
        np.testing.assert_array_equal(losses(jnp.asarray(theta)), theta * expected)
    np.testing.assert_allclose(losses.gradient(jnp.asarray(1.0)), expected.mean(), rtol=1e-6)
    np.testing.assert_array_equal(losses.gradient_matrix(jnp.asarray(1.0)), expected)


def test_the_key_of_a_loss_vector_is_an_argument_of_the_program():
    """Loss vectors with two keys are traced once, and have the values of each key."""
    fn = loss.per_example(dropped_out, has_keys=True)
    data = (jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32))
    losses = loss.LossVector(fn, data, key=KEY)
    theta = jnp.asarray(THETA, jnp.float32)
    traces = []

    @jax.jit
    def mean(losses, theta):
        traces.append(1)
        return losses.mean(theta)

    for key in (KEY, jax.random.key(1)):
        own = loss.LossVector(fn, data, key=key)
        np.testing.assert_allclose(mean(own, theta), own.mean(theta), rtol=1e-6)
    np.testing.assert_array_equal(losses.replace(data=losses.data)(theta), losses(theta))
    assert len(traces) == 1


# Bad input ----------------------------------------------------------------------------------------


def without(theta, batch):
    return theta[batch]


WEIGHTS = noise.gd(N).sample(KEY, 0)
KEYED = loss.weighted_value_and_grad(reads_keys, has_keys=True)
PLAIN = loss.weighted_value_and_grad(without)
ARGS = jnp.ones(N), jnp.arange(N)
MISTAKES = [
    ("loss_vector_fn", lambda: loss.weighted_value_and_grad(reads_keys), "has_keys = False"),
    (
        "loss_vector_fn",
        lambda: loss.noisy_value_and_grad(without, noise.gd(N), has_keys=True),
        "(params, batch, keys), as has_state = False and has_keys = True",
    ),
    (
        "loss_vector_fn",
        lambda: loss.noisy_value_and_grad(
            loss.per_example(dropped_out, has_keys=True), noise.gd(N)
        ),
        "(params: ",
    ),
    ("loss_vector_fn", lambda: loss.LossVector(reads_keys, ARGS[1]), "key=None"),
    ("loss_vector_fn", lambda: loss.LossVector(without, ARGS[1], key=KEY), "key=..."),
    ("loss_vector_fn", lambda: loss.weighted_values_and_grads(reads_keys), "loss.LossVector("),
    ("key", lambda: loss.LossVector(reads_keys, ARGS[1], key=3), "typed PRNG key"),
    ("key", lambda: KEYED(*ARGS, WEIGHTS), "must be given, since has_keys=True"),
    ("step", lambda: KEYED(*ARGS, WEIGHTS, key=KEY), "must be given, since has_keys=True"),
    ("step", lambda: KEYED(*ARGS, WEIGHTS, key=KEY, step=-1), "between 0 and"),
    ("key", lambda: KEYED(*ARGS, WEIGHTS, key=jax.random.PRNGKey(0), step=0), "typed PRNG key"),
    ("key", lambda: PLAIN(*ARGS, WEIGHTS, key=KEY), "must not be given"),
    ("step", lambda: PLAIN(*ARGS, WEIGHTS, step=3), "must not be given"),
    (
        "has_keys",
        lambda: loss.noisy_value_and_grad(without, noise.gd(N), has_keys=1),
        "must be True or False",
    ),
    (
        "data",
        lambda: loss.LossVector(reads_keys, ARGS[1], key=KEY).replace(data=ARGS[1])(ARGS[0]),
        "loss.WithKeys",
    ),
]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_messages_name_the_argument_and_are_short(name, call, wrong):
    assert_told(call, name, wrong)
