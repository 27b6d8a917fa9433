"""Extra outputs of the forward pass, against the same arrays computed by numpy."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from msgd_jax import loss, noise, sharding
from tests.library.loss.test_keys import spread
from tests.support.mistakes import assert_told

KEY = jax.random.key(31)
N = 13
X = np.random.default_rng(0).normal(size=(N, 3)).astype(np.float32)
DATA = {"x": jnp.asarray(X), "number": jnp.arange(N)}


def with_outputs(theta, batch):
    scores = batch["x"] @ theta
    averaged = {"positive": scores > 0, "x": batch["x"], "number": batch["number"]}
    return scores**2, loss.Outputs(averaged, stacked=(batch["number"], scores.mean()))


SETTINGS = {
    "one pass": {},
    "micro-batches": {"microbatch_size": 5},
    "4 devices": {"sharding": spread(4)},
    "4 devices and micro-batches": {"sharding": spread(4, AxisType.Explicit), "microbatch_size": 3},
}
LAWS = {
    "fisher": noise.fisher(N, 4),  # all weights differ: a weighted mean would be another number
    "sgd": noise.sgd(N, 6),
    "sgd with replacement": noise.sgd(N, 9, replace=True),
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", LAWS)
def test_per_example_arrays_are_averaged_over_the_examples_evaluated(name, settings):
    """The reference is numpy's mean over the examples that the weights list.

    The laws list 13, 6 and 9 examples, which neither micro-batches of 5 nor 4 devices divide.
    """
    law, theta = LAWS[name], jnp.asarray([1.0, -2.0, 0.5])
    f = jax.jit(loss.noisy_value_and_grad(with_outputs, law, has_aux=True, **settings))
    (value, aux), grads = f(theta, DATA, KEY, 1)
    weights = law.sample(KEY, 1)
    listed = np.arange(N) if weights.indices is None else np.asarray(weights.indices)
    scores = X[listed].astype(np.float64) @ np.asarray(theta)
    np.testing.assert_allclose(aux.averaged["positive"], (scores > 0).mean(), rtol=1e-6)
    np.testing.assert_allclose(aux.averaged["x"], X[listed].mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(aux.averaged["number"], listed.mean(), rtol=1e-6)
    assert {x.dtype for x in jax.tree.leaves(aux.averaged)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(value, np.asarray(weights.values) @ scores**2, rtol=1e-4)
    alone = loss.noisy_value_and_grad(lambda p, b: with_outputs(p, b)[0], law, **settings)
    np.testing.assert_array_equal(grads, jax.jit(alone)(theta, DATA, KEY, 1)[1])


@pytest.mark.parametrize(
    ("settings", "shape", "numbers"),
    [
        ("one pass", (1,), [*range(13)]),
        ("micro-batches", (3,), [*range(13), 0, 1]),
        ("4 devices", (4, 1), [*range(13), 12, 12, 12]),
        (
            "4 devices and micro-batches",
            (4, 2),
            [0, 1, 2, 3, 0, 1, 4, 5, 6, 7, 4, 5, 8, 9, 10, 11, 8, 9, 12, 12, 12, 12, 12, 12],
        ),
    ],
)
def test_other_arrays_are_stacked_over_micro_batches_and_devices(settings, shape, numbers):
    f = loss.noisy_value_and_grad(with_outputs, noise.gd(N), has_aux=True, **SETTINGS[settings])
    (_, aux), _ = f(jnp.ones(3), DATA, KEY, 1)
    found, means = aux.stacked
    assert found.shape[:-1] == means.shape == shape
    assert found.ravel().tolist() == numbers
    expected = X.astype(np.float64).sum(1)[np.asarray(found)].mean(-1)
    np.testing.assert_allclose(means, expected, rtol=1e-4, atol=1e-5)


def test_the_function_takes_keys_last_and_returns_outputs_last():
    def everything(theta, batch, state, keys):
        assert keys.shape == batch["number"].shape
        losses, aux = with_outputs(theta, batch)
        return losses, state + 1, aux

    flags = {"has_state": True, "has_aux": True, "has_keys": True}
    f = loss.weighted_value_and_grad(everything, microbatch_size=5, **flags)
    weights = noise.gd(N).sample(KEY, 0)
    (_, state, aux), _ = f(jnp.ones(3), DATA, weights, jnp.zeros(()), key=KEY, step=0)
    assert float(state) == 3
    assert aux.averaged["number"] == 6


@pytest.mark.parametrize("microbatch_size", [None, 25])
def test_keys_and_outputs_stay_on_their_devices(microbatch_size):
    """The program has one reduction, as without outputs, and no keys for all examples."""
    size, rows = 1003, spread(8)

    def per_row(theta, x, keys):
        kept = jax.vmap(jax.random.uniform)(keys) < 0.8
        return x * kept * theta, loss.Outputs({"kept": kept}, x[0])

    f = loss.noisy_value_and_grad(
        per_row,
        noise.fisher(size, 8),
        has_aux=True,
        has_keys=True,
        sharding=rows,
        microbatch_size=microbatch_size,
    )
    data = sharding.shard_examples(jnp.ones(size), rows)
    program = jax.jit(f).lower(jnp.ones(()), data, KEY, 3).compile().as_text() or ""
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == 1
    others = r" (?:all-gather|all-to-all|collective-permute|reduce-scatter)\("
    assert not re.findall(others, program)
    assert max(int(n) for n in re.findall(r"\b[fsu]32\[(\d+)", program)) < 2 * 126


def test_per_example_takes_a_function_with_outputs():
    def loss_fn(theta, x, key):
        return (theta - x) ** 2, {"x": x, "low": theta > x, "drawn": jax.random.uniform(key)}

    losses = loss.per_example(loss_fn, has_aux=True, has_keys=True)
    f = loss.noisy_value_and_grad(losses, noise.gd(4), has_aux=True, has_keys=True)
    (_, aux), _ = f(jnp.asarray(1.0), jnp.asarray([0.0, 1.0, 3.0, 4.0]), KEY, 0)
    assert (float(aux.averaged["x"]), float(aux.averaged["low"])) == (2.0, 0.25)
    assert 0 < float(aux.averaged["drawn"]) < 1
    assert aux.stacked == ()


def test_outputs_in_bfloat16_are_averaged_in_float32():
    def losses(theta, x):
        return theta * x, loss.Outputs(averaged=theta * x)

    f = loss.weighted_value_and_grad(losses, has_aux=True, microbatch_size=1)
    ones = jnp.ones(1024, jnp.bfloat16)
    weights = noise.gd(1024).sample(KEY, 0)
    (_, aux), _ = f(jnp.ones((), jnp.bfloat16), ones, weights)
    assert aux.averaged.dtype == jnp.float32
    assert float(aux.averaged) == 1.0


def aux_of(make, **flags) -> Any:
    def losses(theta, batch):
        return theta * batch, make(batch)

    f = loss.weighted_value_and_grad(losses, **({"has_aux": True} | flags))
    return f(jnp.ones(()), jnp.ones(4), noise.gd(4).sample(KEY, 0))


MISTAKES = [
    ("aux", lambda: aux_of(lambda batch: {"accuracy": batch > 0}), "must be a loss.Outputs("),
    (
        "aux.averaged['mean']",
        lambda: aux_of(lambda b: loss.Outputs({"mean": b.mean()})),
        "shape (4, ...), got ()",
    ),
    ("aux.averaged", lambda: aux_of(lambda b: loss.Outputs(jnp.ones((2, 4)))), "(2, 4)"),
    ("aux.stacked['f']", lambda: aux_of(lambda b: loss.Outputs((), {"f": jnp.tanh})), "an array"),
    ("aux.stacked", lambda: aux_of(lambda b: loss.Outputs((), jax.random.key(0))), "key<fry>"),
    (
        "has_aux",
        lambda: loss.weighted_value_and_grad(
            lambda p, b, state: (p * b, state), has_state=True, has_aux=True
        )(jnp.ones(()), jnp.ones(4), noise.gd(4).sample(KEY, 0), jnp.ones(())),
        "must return (losses, state, aux)",
    ),
    (
        "has_aux",
        lambda: loss.weighted_value_and_grad(lambda p, b: p * b, has_aux=True)(
            jnp.ones(()), jnp.ones(4), noise.gd(4).sample(KEY, 0)
        ),
        "must return (losses, aux)",
    ),
    (
        "has_aux",
        lambda: loss.per_example(lambda p, x: p * x, has_aux=True)(1.0, jnp.ones(3)),
        "must return (loss, aux)",
    ),
    ("losses", lambda: aux_of(lambda b: loss.Outputs(), has_aux=False), "got tuple"),
]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_messages_name_the_argument_and_are_short(name, call, wrong):
    assert_told(call, name, wrong, hides_frames=True)
