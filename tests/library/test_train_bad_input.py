"""Mistakes in training have short messages that name the argument and what is wrong."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from msgd_jax import noise, train, transform
from tests.library.test_train import LOOP, PROBLEM, SGD, STEP, init, one_step, start
from tests.support.mistakes import assert_told
from tests.support.problems import loss_vector_fn

DEEP = {f"layer_{i}": {"mean": jnp.zeros(3), "var": jnp.ones(3)} for i in range(40)}
MODEL = eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(0))
ADVERSARY = optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
MSGD = transform.msgd(0.1, noise.gd(100), jax.random.key(1))


def narrower(params, batch, model_state):
    new = jax.tree.map(lambda x: x, model_state)
    new["layer_31"]["var"] = model_state["layer_31"]["var"].astype(jnp.bfloat16)
    return loss_vector_fn(params, batch), new


# The name of the argument, a call, and what the message says is wrong with it.
MISTAKES: list[tuple[str, Any, str]] = [
    ("params['f']", lambda: init({"f": jnp.tanh, "w": jnp.ones(2)}), "equinox.partition"),
    ("params", lambda: init(MODEL), "equinox.is_inexact_array"),
    ("params['s']", lambda: init({"s": "float32"}), "'float32' of type str"),
    ("params", lambda: init(np.array(["a", "b"])), "got <U1"),
    ("params", lambda: init({}), "no leaves"),
    ("params['" + "x" * 20, lambda: init({"x" * 500: 1}), "must be floating point"),
    ("optimizer", lambda: init(optimizer=optax.adam), "must be an optax.GradientTransformation"),
    ("optimizer", lambda: init(optimizer="adam" * 100), "'adamadam"),
    ("optimizer", lambda: train.make_step(loss_vector_fn, optax.adam, noise.gd(3)), "<function"),
    ("key", lambda: init(key=jax.random.PRNGKey(0)), "wrap_key_data"),
    ("model_state['f']", lambda: init(state={"f": jnp.tanh}), "must be an array"),
    (
        "optimizer.init(params)",
        lambda: init(
            optimizer=optax.GradientTransformation(lambda params: {"name": "a string"}, SGD.update)
        ),
        "['name'] must be an array",
    ),
    ("max_steps", lambda: train.make_loop(STEP, max_steps=2**31), "between 1 and 2147483647"),
    ("max_steps", lambda: train.make_loop(STEP, max_steps=2.0), "must be an integer, got 2.0"),
    ("step", lambda: train.make_loop(3, max_steps=2), "must be a function, got 3"),
    ("num_steps", lambda: LOOP(start(), PROBLEM.data, np.zeros(2000)), "shape (2000,)"),
    ("num_steps", lambda: LOOP(start(), PROBLEM.data, True), "True of type bool"),
    ("microbatch_size", lambda: one_step(microbatch_size=np.uint8(0)), "at least 1"),
    ("loss_vector_fn", lambda: one_step(losses="x" * 999), "must be a function"),
    (
        "model_state",
        lambda: one_step(losses=narrower, state=DEEP, has_state=True),
        "given float32[3] at model_state['layer_31']['var'], returned bfloat16[3]",
    ),
    (
        "model_state",
        lambda: one_step(
            losses=lambda p, b, s: (loss_vector_fn(p, b), {**s, "new": 0}),
            state={"a": jnp.ones(2)},
            has_state=True,
        ),
        "given 1 leaves",
    ),
    (
        "model_state",
        lambda: one_step(
            losses=lambda p, b, s: (loss_vector_fn(p, b), tuple(s)),
            state=[jnp.ones(2)] * 200,
            has_state=True,
        ),
        "returned PyTreeDef",
    ),
    (
        "model_state",
        lambda: one_step(
            losses=lambda p, b, s: (loss_vector_fn(p, b), {"b": s["a"]}),
            state={"a": jnp.ones(2)},
            has_state=True,
        ),
        "float32[2] at model_state['b']",
    ),
    ("data['t']", lambda: one_step(data={"t": "text"}), "must be an array"),
    ("data['t']", lambda: one_step(data={"t": np.array(["a"])}), "numbers or PRNG keys"),
    ("data['f']", lambda: one_step(data={"f": jnp.tanh}), "must be an array"),
    (
        "data",
        lambda: one_step(data={f"leaf_{i}" * 9: np.ones(3 + i) for i in range(99)}),
        "got 3 at",
    ),
    (
        "state",
        lambda: train.make_step(loss_vector_fn, optax.sgd(0.1), noise.gd(6))({"params": 1.0}, {}),
        "must be a train.TrainState",
    ),
    ("train.make_step", lambda: one_step(MSGD), "the optimizer alone"),
    ("train.make_step", lambda: one_step(optax.apply_if_finite(MSGD, 3)), "the optimizer alone"),
    (
        "train.make_step",
        lambda: one_step(optax.conditionally_transform(MSGD, lambda step: jnp.asarray(step) >= 0)),
        "the optimizer alone",
    ),
    ("with_noise", lambda: one_step(optax.contrib.sam(MSGD, ADVERSARY)), "sam"),
]


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize(("name", "call", "wrong"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_messages_name_the_argument_and_are_short(name, call, wrong):
    assert_told(call, name, wrong, hides_frames=True)
