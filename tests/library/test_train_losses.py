"""Keys, statistics and extra outputs in training, by `train`, `streaming` and `transform`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import loss, noise, streaming, train, transform
from msgd_jax._streams import Stream, derive
from tests.library.loss.test_keys import spread
from tests.support.mistakes import assert_told

KEY = jax.random.key(77)
N = 12
X = jnp.asarray(np.random.default_rng(1).normal(size=(N, 3)), jnp.float32)
LAW, SGD = noise.sgd(N, 5), optax.sgd(0.1, momentum=0.9)
FLAGS = {"has_state": True, "has_aux": True, "has_keys": True}


def everything(theta, batch, state, keys):
    """Losses with dropout of the inputs, a count of the micro-batches, and two outputs."""
    masks = jax.vmap(lambda key: jax.random.bernoulli(key, 0.7, (3,)))(keys)
    scores = (batch * masks) @ theta
    outputs = loss.Outputs({"kept": masks.mean(1)}, {"norm": jnp.linalg.norm(theta)})
    return (scores - 1) ** 2, state + 1, outputs


def masks(step: int) -> np.ndarray:
    """The masks of all examples at a step, drawn one by one: [N, 3]."""
    keys = [derive(KEY, Stream.LOSSES, step, i) for i in range(N)]
    return np.asarray([jax.random.bernoulli(key, 0.7, (3,)) for key in keys])


def start(seed=None):
    key = KEY if seed is None else jax.random.key(seed)
    return train.init(jnp.ones(3), SGD, key, jnp.zeros((), jnp.int32))


def make_step(**settings):
    return train.make_step(everything, SGD, LAW, **FLAGS, **settings)


@pytest.mark.parametrize(
    "settings",
    [{}, {"microbatch_size": 2}, {"sharding": spread(4)}],
    ids=["all", "runs", "devices"],
)
def test_a_loop_reports_outputs_and_metrics_of_the_user(settings):
    """The reference draws the masks and the weights of each step by themselves."""

    def more(of):
        return {
            "weights": of.weights,
            "moved": of.updates,
            "norm": optax.tree.norm(of.gradient),
            "theta": of.params,
            "step": of.step,
        }

    loop = train.make_loop(make_step(metrics_fn=more, **settings), max_steps=4)
    state, metrics = loop(start(), X, 4)
    extra = metrics.extra
    assert extra["step"].tolist() == [0, 1, 2, 3]
    for step in range(4):
        drawn = LAW.sample(KEY, step)
        np.testing.assert_array_equal(extra["weights"].values[step], drawn.values)
        np.testing.assert_array_equal(extra["weights"].indices[step], drawn.indices)
        kept = masks(step)[np.asarray(drawn.indices)]
        np.testing.assert_allclose(metrics.aux.averaged["kept"][step], kept.mean(), rtol=1e-6)
        scores = (np.asarray(X)[np.asarray(drawn.indices)] * kept) @ extra["theta"][step]
        np.testing.assert_allclose(metrics.loss[step], ((scores - 1) ** 2).mean(), rtol=1e-5)
    assert extra["weights"].num_examples == N
    np.testing.assert_allclose(extra["norm"], metrics.gradient_norm, rtol=1e-6)
    np.testing.assert_allclose(
        extra["theta"][1:], (extra["theta"] + extra["moved"])[:-1], rtol=1e-6
    )
    runs = {"microbatch_size": (4, 3), "sharding": (4, 4, 1)}.get(next(iter(settings), ""), (4, 1))
    assert metrics.aux.stacked["norm"].shape == runs
    assert int(state.model_state) == 4 * (3 if "microbatch_size" in settings else 1)


@pytest.mark.optimized
def test_stopping_changes_no_bit_of_parameters_and_outputs():
    loop = train.make_loop(make_step(microbatch_size=2), max_steps=6)
    straight, metrics = loop(start(), X, 6)
    state, first = loop(start(), X, 2)
    state, second = loop(state, X, 4)
    np.testing.assert_array_equal(state.params, straight.params)
    both = jax.tree.map(lambda *x: np.concatenate(x), first.aux, second.aux)
    jax.tree.map(np.testing.assert_array_equal, both, jax.tree.map(np.asarray, metrics.aux))


def test_seeds_may_be_mapped():
    step = make_step(metrics_fn=lambda of: of.weights.indices)
    states = jax.vmap(start)(jnp.arange(3))
    states, metrics = jax.jit(jax.vmap(step, in_axes=(0, None)))(states, X)
    for seed in range(3):
        state, alone = jax.jit(step)(start(seed), X)
        np.testing.assert_allclose(states.params[seed], state.params, rtol=1e-5)
        np.testing.assert_array_equal(metrics.extra[seed], alone.extra)
        np.testing.assert_allclose(metrics.aux.averaged["kept"][seed], alone.aux.averaged["kept"])


def test_line_searches_are_given_the_loss_with_the_keys_of_the_step():
    """With other keys, the loss at the same parameters would not be that of the step."""

    def update(updates, state, params=None, *, value, value_fn, **_):
        return updates, (value, value_fn(params))

    zeros = jnp.zeros(())
    asks = optax.GradientTransformationExtraArgs(lambda _: (zeros, zeros), update)
    step = jax.jit(train.make_step(everything, asks, LAW, **FLAGS))
    state = train.init(jnp.ones(3), asks, KEY, jnp.zeros((), jnp.int32))
    for _ in range(2):
        state, _ = step(state, X)
        np.testing.assert_allclose(*state.opt_state, rtol=1e-6)
    assert int(state.model_state) == 2


def test_streamed_examples_have_the_keys_of_their_numbers():
    source = streaming.ArraySource(np.asarray(X))
    loop = streaming.make_loop(everything, SGD, LAW, source, microbatch_size=2, **FLAGS)
    read = loop(start(), 3)
    on_device = train.make_loop(make_step(microbatch_size=2), max_steps=3)(start(), X, 3)
    for found, expected in zip(*map(jax.tree.leaves, (read, on_device)), strict=True):
        if not jnp.issubdtype(found.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(found, expected)


# In an optax chain --------------------------------------------------------------------------------

LIKE = loss.Outputs({"kept": jnp.zeros(())}, {"norm": jax.ShapeDtypeStruct((1,), jnp.float32)})
IN_STATE = {"model_state": jnp.zeros((), jnp.int32), "aux": LIKE, "has_keys": True}


def test_a_chain_makes_the_steps_of_train():
    """Parameters, statistics and outputs agree. The scan needs a state of a fixed structure."""
    optimizer = transform.with_noise(SGD, LAW, KEY, **IN_STATE)

    def update(carry, _):
        params, state = carry
        updates, state = optimizer.update((), state, params, loss_vector_fn=everything, data=X)
        return (optax.apply_updates(params, updates), state), state[0].aux

    params = jnp.ones(3)
    (params, state), outputs = jax.lax.scan(update, (params, optimizer.init(params)), length=4)
    expected, metrics = train.make_loop(make_step(), max_steps=4)(start(), X, 4)
    np.testing.assert_allclose(params, expected.params, rtol=1e-6)
    assert int(state[0].model_state) == 4
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), outputs, metrics.aux)


@pytest.mark.parametrize("options", [{"has_keys": True}, {}])
def test_a_loss_behind_a_mask_gets_its_keys(options):
    """The mask hides one of two parameters from the transformation."""

    def losses(params, batch, *keys):
        assert len(keys) == len(options)
        return (batch @ params["a"] - params["b"]) ** 2

    optimizer = optax.masked(transform.msgd(0.1, LAW, KEY, **options), {"a": True, "b": False})
    params = {"a": jnp.ones(3), "b": jnp.ones(())}
    updates, _ = optimizer.update(
        jax.tree.map(jnp.zeros_like, params),
        optimizer.init(params),
        params,
        loss_vector_fn=losses,
        data=X,
        full_params=params,
    )
    assert float(updates["b"]) == 0
    assert np.abs(updates["a"]).min() > 0


def of_chain(fn=everything, **changes):
    optimizer = transform.multiplicative_noise(LAW, KEY, **(IN_STATE | changes))
    state = optimizer.init(jnp.ones(3))
    return optimizer.update((), state, jnp.ones(3), loss_vector_fn=fn, data=X)


MISTAKES = [
    ("aux", lambda: of_chain(aux={"kept": 0.0}), "must be a loss.Outputs("),
    (
        "aux",
        lambda: of_chain(aux=loss.Outputs({"kept": jnp.zeros(2)}, LIKE.stacked)),
        "given float32[2] at aux",
    ),
    (
        "model_state",
        lambda: of_chain(
            model_state=jnp.zeros(2, jnp.int32), fn=lambda p, b, s, k: everything(p, b, s[0], k)
        ),
        "int32[2]",
    ),
    ("model_state", lambda: of_chain(model_state={"f": jnp.tanh}), "must be an array"),
    ("has_keys", lambda: of_chain(has_keys=False), "(params, batch, state)"),
    (
        "has_keys",
        lambda: train.make_step(lambda p, b: p * b, SGD, LAW, has_keys=True),
        "(params, batch, keys)",
    ),
    ("has_keys", lambda: train.make_step(lambda p, b, keys: p * b, SGD, LAW), "(params, batch)"),
    ("metrics_fn", lambda: make_step(metrics_fn=3), "must be a function"),
]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_messages_name_the_argument_and_are_short(name, call, wrong):
    assert_told(call, name, wrong, hides_frames=True)
