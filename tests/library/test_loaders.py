"""Loaders that have tensors, too few batches or errors of their own, and bad input."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msgd_jax import loss, noise, sharding, streaming, train, transform
from tests.library.test_loaded_batches import (
    B_SGD,
    DATA,
    KEY,
    LAW,
    PARAMS,
    N,
    X,
    Y,
    loaded,
    loss_vector_fn,
    trained,
)
from tests.support.mistakes import assert_told


class Tensor:
    """A stand-in for a tensor of PyTorch: it has its own dtype, and numpy can read it."""

    dtype = "torch.float32"

    def __init__(self, values, device="cpu"):
        self.values, self.device, self.shape = np.asarray(values), device, np.shape(values)

    def __array__(self, dtype=None, copy=None):
        if self.device != "cpu":
            raise TypeError("can't convert cuda:0 device type tensor to numpy.")
        return self.values


def test_tensors_become_arrays():
    loader = [[Tensor(b["x"]), {"y": Tensor(b["y"])}] for b in loaded()]
    step = jax.jit(
        train.make_step(lambda p, b: loss_vector_fn(p, {"x": b[0], **b[1]}), optax.adam(0.1), LAW)
    )
    state = train.init(PARAMS, optax.adam(0.1), KEY)
    for batch in streaming.batches(loader, 5):
        state, _ = step(state, batch)
    expected, _ = trained(train.init(PARAMS, optax.adam(0.1), KEY), loaded(), optax.adam(0.1))
    np.testing.assert_allclose(state.params, expected.params, rtol=1e-5, atol=1e-6)


def test_the_state_stays_usable_when_a_loader_ends_early():
    optimizer = optax.sgd(0.1)
    step = jax.jit(train.make_step(loss_vector_fn, optimizer, LAW), donate_argnums=0)
    state = train.init(PARAMS, optimizer, KEY)
    batches = streaming.batches(iter(loaded()), 100, first_step=int(state.step))
    for batch in itertools.islice(batches, 5):
        state, _ = step(state, batch)
    with pytest.raises(streaming.LoaderEnded, match=r"at step 5: it had 5 .* for 100 s") as caught:
        next(batches)
    assert caught.value.num_batches == 5
    assert int(state.step) == 5
    again, _ = step(state, loaded((12,))[0])
    assert int(again.step) == 6


def test_errors_of_a_loader_name_the_step():
    def broken():
        yield from loaded((12, 12))
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire") as caught:
        list(streaming.batches(broken(), 10, first_step=100))
    assert caught.value.__notes__ == ["This was batch 2 of the loader, for step 102"]


def test_more_batches_than_steps_are_left_in_the_loader():
    loader = iter(loaded())
    assert len(list(streaming.batches(loader, 2))) == 2
    assert len(list(loader)) == 3


STATE = train.init(PARAMS, optax.sgd(0.1), KEY)


def step_with(law, batch, **options):
    return train.make_step(loss_vector_fn, optax.sgd(0.1), law, **options)(STATE, batch)


def update_with(make, law, updates, **options):
    transformation = make(law, KEY)
    return transformation.update(updates, transformation.init(PARAMS), PARAMS, **options)


BATCH = loaded((8,))[0]
ROWS = NamedSharding(jax.make_mesh((8,), ("data",)), PartitionSpec("data"))
FIXED = noise.cov(N, B_SGD)
NOISY = transform.multiplicative_noise
OPTIONS = {"loss_vector_fn": loss_vector_fn, "data": BATCH}
USE = "noise.batch_cov(40, batch_size)"
MISTAKES = {
    "train": (lambda: step_with(FIXED, BATCH), "the data have 8", USE),
    "train, spread": (
        lambda: step_with(noise.cov(41, 4), BATCH, sharding=ROWS),
        "num_examples = 41 (48 when filled up",
        "noise.batch_fisher(41, batch_size)",
    ),
    "chain": (lambda: update_with(NOISY, FIXED, (), **OPTIONS), "the data have 8", USE),
    "aggregate": (
        lambda: update_with(transform.aggregate_per_example, FIXED, jnp.ones((8, 6))),
        "the data have 8",
        USE,
    ),
    "averaged": (
        lambda: update_with(transform.aggregate_per_example, LAW, jnp.ones(6)),
        "(6, 6)",
        "averaged already",
    ),
    "loss": (
        lambda: loss.noisy_value_and_grad(loss_vector_fn, FIXED)(PARAMS, BATCH, KEY, 0),
        "the data have 8",
        USE,
    ),
    "weights": (
        lambda: loss.weighted_value_and_grad(loss_vector_fn)(PARAMS, BATCH, FIXED.sample(KEY, 0)),
        "weights",
        USE + ".of(8)",
    ),
    "larger data": (lambda: step_with(noise.gd(4), BATCH), "num_examples = 4", "have 8 examples"),
    "changed size": (
        lambda: jax.jit(functools.partial(step_with, LAW.of(12)))(BATCH),
        "num_examples = 12",
        "have 8",
    ),
    "too few": (lambda: step_with(LAW, loaded((3,))[0]), "at least 4 examples", "drop_last"),
    "too many": (lambda: step_with(noise.batch_cov(7, 4), BATCH), "num_examples = 7", "got 8"),
    "streaming": (
        lambda: streaming.make_loop(
            loss_vector_fn, optax.sgd(0.1), LAW, streaming.ArraySource(DATA)
        ),
        "law",
        "law.of(B)",
    ),
    "tensors": (
        lambda: step_with(LAW, {"x": Tensor(X[:8]), "y": Tensor(Y[:8])}),
        "data['x']",
        "jax.tree.map(numpy.asarray, batch)",
    ),
    "tensors on a GPU": (
        lambda: list(streaming.batches([{"x": Tensor(X, "cuda")}], 1)),
        "batch['x']",
        "tensor.detach().cpu()",
    ),
    "no loader": (lambda: streaming.batches(3, 1), "loader", "iterable"),
    "no steps": (lambda: streaming.batches([], 0), "num_steps", "at least 1"),
    "numbers": (lambda: list(streaming.batches([{"y": [1, 2]}], 1)), "batch['y'][0]", "scalar"),
    "uneven": (lambda: sharding.shard_batch(np.ones((12, 2)), ROWS), "batch", "drop_last"),
    "no sharding": (lambda: sharding.shard_batch(np.ones((8, 2)), None), "sharding", "None"),
}


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("call", "name", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_messages_name_the_argument_and_are_short(call, name, wrong):
    assert_told(call, name, wrong, hides_frames=True)
