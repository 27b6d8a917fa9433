"""Batches that a loader drew.

Held are the covariance of a step, which includes the draw of the batch, and that every function
that takes such batches makes the same steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msgd_jax import loss, noise, sharding, streaming, train, transform
from tests.support.programs import compilations
from tests.support.statistics import bound

KEY = jax.random.key(11)
N, B_SGD = 40, 4
Z = bound(150)  # the most numbers that a case compares

_I = np.arange(1, N + 1)[:, None]
X = np.sqrt(2) * np.sin(2 * np.pi * _I * np.sqrt([2, 3, 5, 7, 11, 13])) * (1 + _I / 20)
Y = np.sign(X.sum(1) + 2 * np.cos(_I[:, 0]))
THETA = 0.5 * np.array([1, -1, 0.5, 2, -0.5, 1])
DATA = {"x": X.astype(np.float32), "y": Y.astype(np.float32)}


@loss.per_example
def loss_vector_fn(theta, example):
    return jax.nn.softplus(-2 * example["y"] * jnp.tanh(example["x"] @ theta))


def moments():
    """The mean gradient, S and F by hand, in float64."""
    t = np.tanh(X @ THETA)
    gradients = (-2 * Y / (1 + np.exp(2 * Y * t)) * (1 - t**2))[:, None] * X
    mean, fisher = gradients.mean(0), gradients.T @ gradients / N
    return mean, fisher - np.outer(mean, mean), fisher


MEAN, S, F = moments()


def taken(batches):
    return jax.tree.map(lambda x: x[jnp.asarray(batches)], DATA)


def gradients(law, batches, steps):
    """The noisy gradient of each batch in float64, [K, D]; `batches` are indices, [K, B]."""
    value_and_grad = loss.noisy_value_and_grad(loss_vector_fn, law)
    theta = jnp.asarray(THETA, jnp.float32)
    f = jax.jit(jax.vmap(lambda batch, step: value_and_grad(theta, batch, KEY, step)[1]))
    return np.asarray(f(taken(batches), jnp.asarray(steps)), np.float64)


def z_scores(values, expected):
    """How many standard errors the mean over the first axis is from what is expected."""
    return (values.mean(0) - expected) / (values.std(0, ddof=1) / np.sqrt(len(values)))


def z_of_step(gradients, covariance):
    """How many standard errors the entries of mean and covariance are from the wanted ones."""
    noise = gradients - MEAN
    products = (noise[:, :, None] * noise[:, None, :])[:, *np.triu_indices(6)]
    return np.concatenate(
        [z_scores(gradients, MEAN), z_scores(products, covariance[np.triu_indices(6)])]
    )


def generator_epochs(size, count):
    """Shuffled epochs in batches, the last of which has what is left: indices, [count, B] each."""
    order = np.random.default_rng(5).permuted(np.tile(np.arange(N), (count, 1)), axis=1)
    return [order[:, first : first + size] for first in range(0, N, size)]


def loader_epochs(loader, count):
    """The same from a loader that hands over one batch after the other."""
    epochs = [[np.asarray(b) for b in epoch] for epoch in (loader() for _ in range(count))]
    return [np.stack(batches) for batches in zip(*epochs, strict=True)]


def grain_epochs(size, count):
    grain = pytest.importorskip("grain")
    shuffled = grain.MapDataset.range(N).seed(4).shuffle()
    # The last batch, which is short, is kept, and each repetition is shuffled anew.
    loader = iter(shuffled.batch(size, drop_remainder=False).repeat(count))
    per_epoch = -(-N // size)
    return loader_epochs(lambda: [next(loader) for _ in range(per_epoch)], count)


def torch_epochs(size, count):
    torch = pytest.importorskip("torch", reason="PyTorch is not installed.")
    shuffler = torch.Generator().manual_seed(4)
    data = torch.arange(N)
    loader = torch.utils.data.DataLoader(data, size, shuffle=True, generator=shuffler)
    return loader_epochs(lambda: streaming.batches(loader, -(-N // size)), count)


COV = noise.batch_cov, S, 12
CASES = {
    "generator, cov": (generator_epochs, 10_000, *COV),
    "generator, fisher": (generator_epochs, 10_000, noise.batch_fisher, F, 15),
    "grain, cov": (grain_epochs, 500, *COV),
    "torch, cov": (torch_epochs, 500, *COV),
}


@pytest.mark.parametrize(("epochs", "count", "make", "target", "size"), CASES.values(), ids=CASES)
def test_each_step_of_shuffled_epochs_has_the_covariance_of_sgd(epochs, count, make, target, size):
    """The last batch is short: batches have 12, 12, 12 and 4 examples, or 15, 15 and 10."""
    law = make(N, B_SGD)
    batches = epochs(size, count)
    assert batches[-1].shape[1] == N % size
    for k, of_step in enumerate(batches):
        steps = len(batches) * np.arange(len(of_step)) + k
        z = z_of_step(gradients(law, of_step, steps), target / B_SGD)
        assert abs(z).max() < Z, k


def test_steps_on_independent_examples_have_the_covariance_of_sgd():
    """A stream has no number of examples: those of a batch are drawn with replacement."""
    batches = np.random.default_rng(6).integers(0, N, (10_000, 8))
    for make, target in ((noise.batch_cov, S), (noise.batch_fisher, F)):
        v = gradients(make(None, B_SGD), batches, np.arange(10_000))
        assert abs(z_of_step(v, target / B_SGD)).max() < Z


def test_a_law_that_ignores_the_draw_of_the_batch_is_rejected():
    """The near miss is `cov(B, b)`, which with the draw of the batch has 31 % too much noise."""
    batches = generator_epochs(8, 20_000)[0]
    v = gradients(noise.cov(8, B_SGD), batches, np.arange(20_000))
    assert abs(z_of_step(v, S / B_SGD)).max() > 2 * Z
    drawing, weights = (N - 8) / (8 * (N - 1)), 7 / 8 * N / (N - 1) / B_SGD
    excess = (drawing + weights) * B_SGD - 1
    squares = ((v - MEAN) ** 2).sum(1)
    assert excess == pytest.approx(0.30769, abs=1e-5)
    assert abs(z_scores(squares, (1 + excess) * np.trace(S) / B_SGD)) < Z


def test_the_problem_has_the_known_numbers():
    assert np.trace(F) / 4 == pytest.approx(1.5676554440, abs=1e-10)
    assert np.trace(S) / 4 == pytest.approx(1.447507794, abs=1e-9)
    law = noise.batch_cov(N, B_SGD)
    for size, squared in ((12, 2.4272727273), (4, 0.1)):
        assert law.of(size).covariance.alpha * size**2 == pytest.approx(squared, abs=1e-10)


@pytest.mark.parametrize(
    ("matching", "size", "expected"), [("total", 12, 4.008483122), ("gaussian", 8, 7.23753897)]
)
def test_sums_over_an_epoch_have_the_known_variance(matching, size, expected):
    """Matching "total" is right for single steps, and "gaussian" for epochs if B divides N."""
    batches = generator_epochs(size, 10_000)
    law = noise.batch_cov(N, B_SGD, matching=matching)
    total = sum(
        gradients(law, of_step, len(batches) * np.arange(10_000) + k) - MEAN
        for k, of_step in enumerate(batches)
    )
    assert abs(z_scores((total**2).sum(1), expected)) < Z
    if matching == "gaussian":
        assert expected == pytest.approx(len(batches) * np.trace(S) / B_SGD)


# Functions that take batches ----------------------------------------------------------------------

LAW = noise.batch_cov(N, B_SGD)
PARAMS = jnp.asarray(THETA, jnp.float32)
SIZES = (12, 12, 12, 4, 12)


def loaded(sizes=SIZES):
    rng = np.random.default_rng(7)
    return [jax.tree.map(np.asarray, taken(rng.permutation(N)[:size])) for size in sizes]


def trained(state, batches, optimizer):
    step = jax.jit(train.make_step(loss_vector_fn, optimizer, LAW), donate_argnums=0)
    for batch in batches:
        state, metrics = step(state, batch)
    return state, metrics


def test_train_and_the_optax_chain_make_the_same_steps():
    """The chains have `multiplicative_noise`, or aggregate the gradients of each example."""
    optimizer = optax.adam(0.1)
    expected, _ = trained(train.init(PARAMS, optimizer, KEY), loaded(), optimizer)

    chain = optax.chain(transform.multiplicative_noise(LAW, KEY), optimizer)
    aggregated = optax.chain(transform.aggregate_per_example(LAW, KEY), optimizer)
    of_each = jax.vmap(
        jax.grad(lambda p, e: loss_vector_fn(p, jax.tree.map(lambda x: x[None], e))[0]),
        in_axes=(None, 0),
    )
    for made, arguments in (
        (chain, lambda p, b: ((), {"loss_vector_fn": loss_vector_fn, "data": b})),
        (aggregated, lambda p, b: (of_each(p, b), {})),
    ):
        params, state = PARAMS, made.init(PARAMS)
        for batch in loaded():
            updates, options = arguments(params, batch)
            fn = options.pop("loss_vector_fn", None)
            update = jax.jit(functools.partial(made.update, loss_vector_fn=fn))
            new, state = update(updates, state, params, **options)
            params = optax.apply_updates(params, new)
        np.testing.assert_allclose(params, expected.params, rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_weights_of_the_step():
    batch = loaded((8,))[0]
    step = jax.jit(loss.noisy_value_and_grad(loss_vector_fn, LAW, microbatch_size=3))
    value, grads = step(PARAMS, batch, KEY, 5)
    weights = LAW.of(8).sample(KEY, 5)
    expected = loss.weighted_value_and_grad(loss_vector_fn)(PARAMS, batch, weights)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grads, expected[1], rtol=1e-5, atol=1e-6)


def test_a_size_of_batches_compiles_once():
    """Two sizes compile the step twice; outside `jax.jit`, they compile nothing again."""
    optimizer = optax.sgd(0.1)
    step = jax.jit(train.make_step(loss_vector_fn, optimizer, LAW))
    state = train.init(PARAMS, optimizer, KEY)
    for batch in loaded():
        state, _ = step(state, batch)
    assert step._cache_size() == 2

    eager = train.make_step(loss_vector_fn, optimizer, LAW)
    for batch in loaded((12, 4)):
        state, _ = eager(state, batch)
    with compilations() as names:
        for batch in loaded((12, 4)):
            state, _ = eager(state, batch)
    assert not names


@pytest.mark.optimized
def test_a_saved_run_continues_with_the_same_bits():
    """The state has the counter of steps, so that the same batches get the same weights."""
    optimizer = optax.adam(0.1)
    whole, _ = trained(train.init(PARAMS, optimizer, KEY), loaded(), optimizer)
    half, _ = trained(train.init(PARAMS, optimizer, KEY), loaded()[:2], optimizer)
    saved = jax.tree.map(np.asarray, half._replace(key=jax.random.key_data(half.key)))
    back = jax.tree.map(jnp.asarray, saved)
    back = back._replace(key=jax.random.wrap_key_data(back.key))
    resumed, _ = trained(back, loaded()[2:], optimizer)
    assert int(resumed.step) == 5
    for one, other in zip(
        *(jax.tree.leaves(s._replace(key=())) for s in (whole, resumed)), strict=True
    ):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.optimized
@pytest.mark.parametrize("size", [16, 12])
@pytest.mark.parametrize("devices", [2, 8])
def test_the_weights_are_the_same_on_any_number_of_devices(size, devices):
    """They are the same bit for bit. For 8 devices, 12 examples are filled up in the step."""
    rows = NamedSharding(jax.make_mesh((devices,), ("data",)), PartitionSpec("data"))
    numbers = np.arange(size)
    if size % devices == 0:
        numbers = sharding.shard_batch(numbers, rows)
    f = loss.noisy_value_and_grad(lambda theta, i: theta[i], LAW, sharding=rows)
    _, weights = jax.jit(f)(jnp.ones(size), numbers, KEY, 3)
    expected = LAW.of(size).sample(KEY, 3).values
    assert np.asarray(weights).tobytes() == np.asarray(expected).tobytes()


def test_the_compiled_loop_takes_a_fixed_batch():
    optimizer = optax.sgd(0.1)
    step = train.make_step(loss_vector_fn, optimizer, LAW)
    loop = train.make_loop(step, max_steps=10)
    state, metrics = loop(train.init(PARAMS, optimizer, KEY), loaded((8,))[0], 4)
    assert int(state.step) == 4
    assert metrics.loss.shape == (4,)
