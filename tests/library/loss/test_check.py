"""`loss.check` finds and names each mistake of a loss vector function, and good ones pass."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from msgd_jax import loss
from tests.support.mistakes import assert_told

KEY = jax.random.key(2)
SIZE = 24
_RNG = np.random.default_rng(0)
DATA = {
    "x": _RNG.normal(size=(SIZE, 5)).astype(np.float32),
    "y": _RNG.integers(0, 3, SIZE),
}
PARAMS = {"w": jnp.asarray(_RNG.normal(size=(5, 3)), jnp.float32)}
ORDER = jnp.asarray(_RNG.uniform(0.5, 2, SIZE), jnp.float32)


def scores(params, batch):
    return jnp.tanh(batch["x"] @ params["w"])


def entropies(scores, batch):
    return optax.losses.softmax_cross_entropy_with_integer_labels(scores, batch["y"])


def good(params, batch):
    return entropies(scores(params, batch), batch)


def normalised(params, batch):
    s = scores(params, batch)
    return entropies(jax.nn.standardize(s, axis=0), batch)


def contrastive(params, batch):
    s = scores(params, batch)
    return -jax.nn.log_softmax(s @ s.T).diagonal()


def by_neighbour(params, batch):
    return good(params, batch) + 0.1 * jnp.roll(batch["x"][:, 0], 1)


def per_total(params, batch):
    return good(params, batch) * batch["x"][:, 0] ** 2 / jnp.sum(batch["x"][:, 0] ** 2)


def weighted_by_position(params, batch):
    return good(params, batch) * ORDER[: len(batch["y"])]


def labels_from_outside(params, batch):
    labels = jnp.asarray(DATA["y"])[: len(batch["y"])]
    return entropies(scores(params, batch), {"y": labels})


def counted():
    counter = itertools.count()
    return lambda params, batch: good(params, batch) + next(counter)


def numpys_random():
    # One number per evaluation, from a seed: two of them are within the tolerance once in 2,000.
    rng = np.random.default_rng(0)
    return lambda params, batch: good(params, batch) + rng.normal()


def broken_at(*examples):
    x = DATA["x"].copy()
    x[list(examples)] = np.nan
    return DATA | {"x": x}


def squeezed(params, batch):
    return jnp.squeeze(good(params, batch)[:, None])


def fixed_size(params, batch):
    return good(params, batch).reshape(SIZE, 1)[:, 0]


def by_size(params, batch):
    return good(params, batch) ** (1 + len(batch["y"]) / SIZE)


def rooted(params, batch):
    return good(params, batch) + jnp.sqrt(jnp.sum(0 * params["w"]))


FOUND = {
    "mean": (lambda p, b: good(p, b).mean(), DATA, "one number for 24 examples", "without mean()"),
    "sum": (lambda p, b: good(p, b).sum(), DATA, "one number for 24 examples", "sum()"),
    "outputs": (scores, DATA, "shape (24, 3)", "axes behind the first"),
    "too few": (lambda p, b: good(p, b)[1:], DATA, "shape (23,) for 24", "loss.per_example"),
    "pair": (lambda p, b: (good(p, b), ()), DATA, "returns a tuple", "statistics"),
    "hits": (lambda p, b: scores(p, b).argmax(1), DATA, "int32", "floating point"),
    "divided": (lambda p, b: good(p, b) / len(b["y"]), DATA, "12 of the 24", "2 times"),
    "batch norm": (normalised, DATA, "on the other examples", "norm"),
    "contrastive": (contrastive, DATA, "on the other examples", "24 examples change"),
    "neighbour": (by_neighbour, DATA, "on the other examples", "on its own example only"),
    "per total": (per_total, DATA, "on the other examples", "on its own example only"),
    "position": (weighted_by_position, DATA, "on the position", "part of the data"),
    "labels": (labels_from_outside, DATA, "on the position", "labels"),
    "counter": (counted(), DATA, "two evaluations", "pure"),
    "numpy's random": (numpys_random(), DATA, "two evaluations", "numpy.random"),
    "NaN": (good, broken_at(3, 17), "nan at 3, nan at 17", "logarithms"),
    "many NaN": (good, broken_at(*range(4, 24)), "nan at 4", "and 12 more"),
    "gradient": (rooted, DATA, "params['w']", "jnp.where"),
    "squeeze": (squeezed, DATA, "batch of 1 it returns shape ()", "axis=-1"),
    "fixed size": (fixed_size, DATA, "fails on a batch of 12", "micro-batches"),
    "size": (by_size, DATA, "how many examples", "half of them"),
}


@pytest.mark.parametrize(("fn", "data", "what", "to_do"), FOUND.values(), ids=FOUND)
def test_what_is_wrong_is_found_and_named(fn, data, what, to_do):
    with pytest.raises(ValueError, match="loss_vector_fn") as caught:
        loss.check(fn, PARAMS, data, KEY)
    assert what in str(caught.value)
    assert to_do in str(caught.value)
    assert max(map(len, str(caught.value).splitlines())) <= 400


def dropped(params, batch, keys):
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 0.8, (5,)))(keys)
    return good(params, batch | {"x": batch["x"] * kept})


def one_key_for_all(params, batch, keys):
    return good(params, batch | {"x": batch["x"] * jax.random.bernoulli(keys[0], 0.8, (1, 5))})


def split_from_one(params, batch, keys):
    return dropped(params, batch, jax.random.split(keys[0], len(batch["y"])))


def at_outputs():
    return loss.with_output_noise(
        lambda params, example: jnp.tanh(example["x"] @ params["w"]), entropies, loss.label_noise(1)
    )


@pytest.mark.parametrize(
    ("fn", "what"),
    [
        (one_key_for_all, "on the other examples"),
        (split_from_one, "on the other examples"),
        (lambda params, batch, keys: good(params, batch), "keys are not used"),
        (lambda p, b, keys: dropped(p, b, keys).mean(), "one number for 24"),
    ],
)
def test_mistakes_with_keys_are_found_and_named(fn, what):
    with pytest.raises(ValueError, match=what) as caught:
        loss.check(fn, PARAMS, DATA, KEY, has_keys=True)
    assert len(str(caught.value)) <= 400


@pytest.mark.parametrize("fn", [dropped, at_outputs()])
def test_good_losses_that_take_keys_pass(fn):
    loss.check(fn, PARAMS, DATA, KEY, has_keys=True)


def test_all_findings_are_told_at_once():
    def twice_wrong(params, batch):
        return weighted_by_position(params, batch) / len(batch["y"])

    with pytest.raises(ValueError, match="position") as caught:
        loss.check(twice_wrong, PARAMS, broken_at(5), KEY)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert "nan at 5" in lines[0]


def test_a_few_coupled_examples_are_found():
    """The first example leaks into the last, and into no other.

    `check` compares with a part of the examples, drawn with the key. Where the two are in the same
    part, the leak is found as a dependence on the position.
    """

    def leaking(params, batch):
        return good(params, batch).at[-1].add(batch["x"][0, 0])

    found = 0
    for seed in range(6):
        try:
            loss.check(leaking, PARAMS, DATA, jax.random.key(seed))
        except ValueError as error:
            found += "examples" in str(error)
    assert found == 6


def test_losses_that_ignore_the_parameters_are_warned_of():
    with pytest.warns(UserWarning, match="exactly zero"):
        loss.check(lambda p, b: good(PARAMS, b) + 0 * p["w"].sum(), PARAMS, DATA, KEY)


class Net(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, train=False):
        for width in (32, 32, 32):
            x = nn.Dense(width, dtype=self.dtype)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x))
        return nn.Dense(3, dtype=self.dtype)(x)


def linen(dtype, train=False, scale=1.0):
    net = Net(dtype)
    variables = net.init(jax.random.key(0), DATA["x"])
    params = jax.tree.map(lambda x: scale * x, variables["params"])

    def losses(params, batch):
        model = {"params": params, "batch_stats": variables["batch_stats"]}
        out = net.apply(model, batch["x"], train=train, mutable=["batch_stats"])[0]
        return entropies(out.astype(jnp.float32), batch)

    return losses, params, DATA


def embedding():
    model = nnx.Sequential(nnx.Embed(50, 8, rngs=nnx.Rngs(0)), nnx.Linear(8, 50, rngs=nnx.Rngs(1)))
    graph, params = nnx.split(model)
    tokens = np.random.default_rng(1).integers(0, 50, (SIZE, 9))

    def of_one(params, tokens):
        logits = nnx.merge(graph, params)(tokens[:-1])
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[1:]).mean()

    return loss.per_example(of_one), params, tokens


def narrow(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), PARAMS)
    return good, params, DATA | {"x": DATA["x"].astype(dtype)}


GOOD = {
    "plain": lambda: (good, PARAMS, DATA),
    "one of each": lambda: (loss.per_example(lambda t, x: (t - x) ** 2), jnp.ones(()), np.ones(2)),
    "squares of zero": lambda: (lambda t, x: (t * x) ** 2, jnp.ones(()), np.zeros(4)),
    "float32 net": lambda: linen(jnp.float32),
    "float32 net, large scores": lambda: linen(jnp.float32, scale=6.0),
    "bfloat16 net": lambda: linen(jnp.bfloat16),
    "bfloat16 net, large scores": lambda: linen(jnp.bfloat16, scale=3.0),
    "float16 net": lambda: linen(jnp.float16),
    "bfloat16 params": lambda: narrow(jnp.bfloat16),
    "tokens": embedding,
}


@pytest.mark.filterwarnings("ignore:The gradient of loss_vector_fn is exactly zero")
@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_good_losses_pass(make):
    fn, params, data = make()
    for seed in range(2):
        loss.check(fn, params, data, jax.random.key(seed))


def test_batch_norm_in_training_mode_is_found_in_bfloat16_too():
    for dtype in (jnp.float32, jnp.bfloat16):
        with pytest.raises(ValueError, match="on the other examples"):
            loss.check(*linen(dtype, train=True), KEY)


def test_small_dependences_are_found_in_float64_and_the_tolerance_allows_them(x64):
    params = {"w": PARAMS["w"].astype(jnp.float64)}
    data = DATA | {"x": DATA["x"].astype(np.float64)}
    loss.check(good, params, data, KEY)

    def slightly(params, batch):
        return good(params, batch) + 2e-4 * batch["x"].mean()

    with pytest.raises(ValueError, match="on the other examples"):
        loss.check(slightly, params, data, KEY)
    loss.check(slightly, params, data, KEY, tolerance=1e-3)


MISTAKES = {
    "function": (lambda: loss.check(3, PARAMS, DATA, KEY), "loss_vector_fn", "function"),
    "keys": (lambda: loss.check(dropped, PARAMS, DATA, KEY), "loss_vector_fn", "has_keys = False"),
    "no keys": (
        lambda: loss.check(good, PARAMS, DATA, KEY, has_keys=True),
        "loss_vector_fn",
        "has_keys = True say, got a function of (params, batch)",
    ),
    "key": (lambda: loss.check(good, PARAMS, DATA, 0), "key", "typed PRNG key"),
    "one example": (
        lambda: loss.check(good, PARAMS, jax.tree.map(lambda x: x[:1], DATA), KEY),
        "data",
        "at least 2",
    ),
    "tolerance": (
        lambda: loss.check(good, PARAMS, DATA, KEY, tolerance=0.0),
        "tolerance",
        "above 0, got 0.0",
    ),
    "params": (lambda: loss.check(good, {"w": 1}, DATA, KEY), "params['w']", "floating point"),
}


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("call", "name", "wrong"), MISTAKES.values(), ids=MISTAKES)
def test_bad_input(call, name, wrong):
    assert_told(call, name, wrong)
