"""Modules of flax NNX that cannot be handled are refused, and those that can are not."""

import sys

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from msgd_jax import flax_nnx, noise, train
from tests.support.flax_nets import DATA, Net, cross_entropy, losses_of
from tests.support.mistakes import assert_told

KEY = jax.random.key(2024)
LAW = noise.cov(16, 4)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


class Count(nnx.Variable):
    """A variable of a kind that NNX does not have."""


class Integers(nnx.Module):
    """A module whose only parameter cannot be trained."""

    def __init__(self):
        self.table = nnx.Param(jnp.arange(3))


class Counting(Net):
    """A net that keeps a sum over its calls in a variable."""

    def __init__(self, rngs, **parts):
        super().__init__(rngs, **parts)
        self.calls = Count(jnp.zeros(()))

    def __call__(self, x):
        self.calls[...] += x.mean()
        return super().__call__(x)


MISTAKES = {
    "no module": (lambda: flax_nnx.trainable(len, cross_entropy), "module", "flax.nnx.Module"),
    "no loss": (lambda: flax_nnx.trainable(Net(nnx.Rngs(0)), 3), "loss_fn", "a function"),
    "nothing to train": (
        lambda: flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy, wrt=nnx.LoRAParam),
        "wrt",
        "picks none",
    ),
    "integers to train": (
        lambda: flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy, wrt=nnx.RngState),
        "wrt",
        "picks none",
    ),
    "unhandled state": (
        lambda: flax_nnx.trainable(Counting(nnx.Rngs(0)), cross_entropy),
        "module",
        "calls (Count). Give their type as mutable=",
    ),
    "a frozen variable changes": (
        lambda: losses_of(flax_nnx.trainable(Counting(nnx.Rngs(0)), cross_entropy, frozen=Count)),
        "loss_fn must not change",
        "calls (Count)",
    ),
    "statistics of single examples": (
        lambda: losses_of(flax_nnx.trainable(Counting(nnx.Rngs(0)), cross_entropy, mutable=Count)),
        "calls (Count)",
        "of_batch=True",
    ),
    "a vector for one example": (
        lambda: losses_of(flax_nnx.trainable(Net(nnx.Rngs(0)), lambda model, e: model(e["x"]))),
        "loss_fn",
        "a scalar for one example, got shape (4,)",
    ),
    "no extra outputs": (
        lambda: losses_of(flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy, has_aux=True)),
        "loss_fn",
        "(loss, aux)",
    ),
    "dropout in a loss of a whole batch": (
        lambda: losses_of(
            flax_nnx.trainable(Net(nnx.Rngs(0), drop=True), cross_entropy, of_batch=True)
        ),
        "drop.rngs",
        "has_keys=True",
    ),
    "a step that was not told what the loss takes": (
        lambda: train.make_step(
            flax_nnx.trainable(Net(nnx.Rngs(0), drop=True), cross_entropy).loss_vector_fn,
            optax.sgd(0.1),
            LAW,
        ),
        "loss_vector_fn",
        "(params, batch, keys)",
    ),
    "parts of another module": (
        lambda: flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy).split(
            Net(nnx.Rngs(0), lora=True)
        ),
        "params",
        "of the module that trainable was given",
    ),
    "statistics left out": (
        lambda: (net := flax_nnx.trainable(Net(nnx.Rngs(0), norm=True), cross_entropy)).merge(
            net.params
        ),
        "model_state",
        "of the module that trainable was given",
    ),
    "equinox's module as parameters": (
        lambda: train.init(eqx.nn.MLP(2, 1, 4, 1, key=KEY), optax.sgd(0.1), KEY),
        "params",
        "equinox.partition(model, equinox.is_inexact_array)",
    ),
    "NNX's module as parameters": (
        lambda: train.init({"net": nnx.gelu}, optax.sgd(0.1), KEY),
        "params['net']",
        "flax.nnx.split",
    ),
}


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_messages_name_the_argument_and_are_short(mistake):
    call, name, wrong = MISTAKES[mistake]
    assert_told(call, name, wrong, hides_frames=True)


def test_batch_norm_and_dropout_may_be_off_in_a_loss_of_a_whole_batch():
    model = Net(nnx.Rngs(0), norm=True, drop=True)
    model.eval()
    net = flax_nnx.trainable(model, cross_entropy, of_batch=True)
    losses, after = losses_of(net)
    np.testing.assert_allclose(losses, cross_entropy(model, DATA), rtol=1e-6)
    assert bits(after) == bits(net.model_state)


def test_variables_of_any_kind_may_be_named_mutable():
    kept = flax_nnx.trainable(Counting(nnx.Rngs(0)), cross_entropy, mutable=Count, of_batch=True)
    _, after = losses_of(kept)
    np.testing.assert_allclose(after.stats["calls"].get_value(), DATA["x"].mean(), rtol=1e-5)


def test_without_flax_the_error_states_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "flax", None)
    with pytest.raises(ImportError, match=r"pip install 'msgd-jax\[flax\]'"):
        flax_nnx.trainable(None, cross_entropy)
