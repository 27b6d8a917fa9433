"""Models in float16 and bfloat16: their gradients against float64, up to 10,000,000 examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import loss, noise
from msgd_jax._narrow import wide_sums

NARROW = [jnp.bfloat16, jnp.float16]
KEY = jax.random.key(0)
LAWS = {
    "gd": noise.gd,
    "cov": lambda n: noise.cov(n, 10),
    "sgd": lambda n: noise.sgd(n, min(n // 2, 50_000)),
}


def linear_losses(dtype):
    """Losses that use each parameter once per example, in a way of its own.

    One is looked up, one is added and one is multiplied. All of them have the gradient W . x.
    """

    def losses(params, batch):
        token, x = batch["token"], batch["x"].astype(dtype)
        p = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        looked_up = p["embedding"][token, 0]
        added = (jnp.zeros((x.size, 1), dtype) + p["bias"][None])[:, 0]
        multiplied = (x[:, None] @ p["matrix"])[:, 0]
        return looked_up * x + added * x + multiplied

    return losses


def linear_params(dtype=jnp.float32):
    return {
        "embedding": jnp.ones((1, 1), dtype),
        "bias": jnp.ones(1, dtype),
        "matrix": jnp.ones((1, 1), dtype),
    }


def linear_data(size):
    x = np.random.default_rng(0).uniform(0.5, 1.5, size).astype(np.float32)
    return {"token": np.zeros(size, np.int32), "x": x}


def relative_errors(grads, weights, data):
    expected = np.asarray(weights.dense(), np.float64) @ np.asarray(data["x"], np.float64)
    return {name: abs(float(g.ravel()[0]) / expected - 1) for name, g in grads.items()}


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("size", [1_000, 60_000, 10_000_000])
def test_errors_do_not_grow_with_the_number_of_examples(size, dtype, law):
    """With the default options, errors are at most 2 %, as README and docstrings state."""
    weights = LAWS[law](size).sample(KEY, 0)
    data = linear_data(size)
    step = jax.jit(loss.weighted_value_and_grad(linear_losses(dtype)))
    value, grads = step(linear_params(), data, weights)
    errors = relative_errors(grads, weights, data)
    assert max(errors.values()) < 0.02, errors
    assert abs(float(value) / float(sum(g.ravel()[0] for g in grads.values())) - 1) < 0.01


@pytest.mark.parametrize("dtype", NARROW)
def test_narrow_parameters_have_narrow_gradients_of_the_same_accuracy(dtype):
    weights, data = noise.gd(60_000).sample(KEY, 0), linear_data(60_000)
    step = jax.jit(loss.weighted_value_and_grad(linear_losses(dtype)))
    _, grads = step(linear_params(dtype), data, weights)
    assert all(g.dtype == dtype for g in grads.values())
    assert max(relative_errors(grads, weights, data).values()) < 0.01


@pytest.mark.parametrize("options", [{"microbatch_size": 7_000}, {"sharded": True}], ids=str)
def test_micro_batches_and_devices_have_the_same_accuracy(options):
    options = dict(options)
    if options.pop("sharded", False):
        mesh = jax.make_mesh((4,), ("data",))
        options["sharding"] = jax.NamedSharding(mesh, jax.P("data"))
    weights, data = noise.cov(60_000, 10).sample(KEY, 0), linear_data(60_000)
    step = jax.jit(loss.weighted_value_and_grad(linear_losses(jnp.bfloat16), **options))
    _, grads = step(linear_params(), data, weights)
    assert max(relative_errors(grads, weights, data).values()) < 0.01


@pytest.mark.parametrize("dtype", NARROW)
def test_gradients_of_many_draws_have_the_same_accuracy(dtype):
    size = 20_000
    data = linear_data(size)
    draws = jax.vmap(noise.cov(size, 10).sample, (None, 0))(KEY, jnp.arange(3))
    _, grads = loss.weighted_values_and_grads(linear_losses(dtype))(linear_params(), data, draws)
    for k in range(3):
        weights, own = jax.tree.map(lambda x, k=k: x[k], (draws, grads))
        assert max(relative_errors(own, weights, data).values()) < 0.01


@pytest.mark.usefixtures("x64", "strict_dtypes")
def test_float64_weights_of_a_narrow_model_promote_nothing():
    weights = noise.cov(1000, 10, dtype=jnp.float64).sample(KEY, 0)

    def losses(params, batch):
        return params.astype(jnp.bfloat16)[jnp.zeros(1000, jnp.int32)] * batch.astype(jnp.bfloat16)

    data = linear_data(1000)
    _, gradient = loss.weighted_value_and_grad(losses)(
        jnp.ones(1, jnp.float32), jnp.asarray(data["x"]), weights
    )
    assert max(relative_errors({"p": gradient}, weights, data).values()) < 0.01


def test_gradients_of_a_text_classifier_are_accurate():
    """Words have the law of Zipf, so that almost every example has the commonest one."""
    rng = np.random.default_rng(1)
    size, length, words = 10_000, 10, 1_000
    tokens = np.minimum(rng.zipf(1.3, (size, length)) - 1, words - 1)
    data = {"tokens": tokens, "label": rng.integers(0, 2, size)}
    start = {"table": rng.normal(size=(words, 8)), "head": rng.normal(size=8)}

    def losses_in(dtype):
        def losses(params, batch):
            table, head = params["table"].astype(dtype), params["head"].astype(dtype)
            logits = table[batch["tokens"]].mean(1) @ head
            sign = (1 - 2 * batch["label"]).astype(dtype)
            return jax.nn.softplus(sign * logits)

        return losses

    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, start)
        weights = {name: LAWS[name](size).sample(KEY, 0) for name in ("gd", "cov")}
        exact = loss.weighted_value_and_grad(losses_in(jnp.float64))
        expected = {name: exact(params, data, w)[1] for name, w in weights.items()}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    step = jax.jit(loss.weighted_value_and_grad(losses_in(jnp.bfloat16)))
    for name, w in weights.items():
        _, grads = step(params, data, w)
        for leaf in ("table", "head"):
            true = np.asarray(expected[name][leaf])
            error = np.linalg.norm(np.asarray(grads[leaf]) - true) / np.linalg.norm(true)
            assert error < 0.02, (name, leaf, error)


# The rewriting ------------------------------------------------------------------------------------

INDICES = np.zeros(1000, np.int32)


def looked_up(p):
    return p[INDICES, 0]


def taken(p):
    return jnp.take(p, INDICES, axis=0)[:, 0]


def rematerialised(p):
    return jax.checkpoint(lambda q: q[INDICES, 0])(p)


def mapped(p):
    return jax.vmap(lambda i: jax.nn.relu(p[i, 0]))(INDICES)


def looped(p):
    return jax.lax.map(lambda i: p[i, 0], INDICES)


def in_a_branch(p):
    return jax.lax.cond(p[0, 0] > 0, lambda q: q[INDICES, 0], lambda q: 2 * q[INDICES, 0], p)


def scanned(p):
    def layer(carry, _):
        return carry + p[INDICES, 0], None

    return jax.lax.scan(layer, jnp.zeros(1000, p.dtype), length=2)[0] / 2


def activated(p):
    return jax.nn.relu(p)[INDICES, 0]


def tiled(p):
    return jnp.tile(p[:1], (1000, 1))[:, 0]


def scaled(p):
    return jnp.ones((1000, 1), p.dtype)[:, 0] * p[0]


PLACES = [
    looked_up,
    taken,
    rematerialised,
    mapped,
    looped,
    in_a_branch,
    scanned,
    activated,
    tiled,
    scaled,
]


@pytest.mark.optimized
@pytest.mark.parametrize("place", PLACES, ids=lambda f: f.__name__)
def test_wide_sums_are_found_wherever_they_are_in_a_program(place):
    """The gradient is a mean of a thousand ones, of which a sum in bfloat16 counts about 256.

    XLA sums some of these programs well without being told.
    """

    def mean(p):
        return place(p.astype(jnp.bfloat16)).astype(jnp.float32).sum() / 1000

    p = jnp.ones((3, 1))
    wide, narrow = wide_sums(mean, p)
    assert narrow
    assert float(wide(p)) == float(mean(p))
    gradient = jax.jit(jax.grad(wide))
    np.testing.assert_allclose(gradient(p).sum(), 1, rtol=0.005)
    # Forward mode, forward over reverse mode, and vmap work too.
    np.testing.assert_allclose(jax.jvp(wide, (p,), (jnp.ones_like(p),))[1], 1, rtol=0.005)
    assert jax.jvp(gradient, (p,), (p,))[1].shape == p.shape
    np.testing.assert_array_equal(jax.vmap(gradient)(jnp.stack([p, p]))[1], gradient(p))


def test_a_plain_sum_in_bfloat16_is_wrong():
    def mean(p):
        return looked_up(p.astype(jnp.bfloat16)).astype(jnp.float32).sum() / 1000

    assert jax.grad(mean)(jnp.ones((3, 1))).sum() < 0.6


def test_functions_of_wide_models_are_returned_as_they_are():
    def losses(p):
        return p[INDICES, 0]

    function, narrow = wide_sums(losses, jnp.ones((3, 1)))
    assert function is losses
    assert not narrow
