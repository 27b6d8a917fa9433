"""Modules of flax NNX of unusual make: what is trained, kept and shared is what the module says."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from msgd_jax import flax_nnx, loss, noise, train
from tests.support.flax_nets import DATA, Net, cross_entropy
from tests.support.mistakes import assert_told

KEY, N = jax.random.key(2024), 16
SGD = optax.sgd(0.1)


class Shared(nnx.Module):
    """One layer and one vector, each under two names."""

    def __init__(self, rngs):
        self.first = nnx.Linear(3, 3, rngs=rngs)
        self.second = self.first
        self.scale = nnx.Param(jnp.ones(3))
        self.again = self.scale
        self.outer = nnx.Linear(3, 4, rngs=rngs)

    def __call__(self, x):
        return self.outer(self.second(nnx.tanh(self.first(x))) * self.again[...])


class Nested(nnx.Module):
    """Lists and dictionaries of layers, and a dictionary of arrays in one parameter."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(2)])
        heads = {"one": nnx.Linear(3, 4, rngs=rngs), "two": nnx.List([nnx.Linear(3, 4, rngs=rngs)])}
        self.heads: Any = nnx.Dict(heads)
        self.arrays = nnx.Param({"scale": jnp.ones(4), "shift": jnp.zeros(())})

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        arrays = self.arrays.get_value()
        return arrays["scale"] * (self.heads["one"](x) + self.heads["two"][0](x)) + arrays["shift"]


class Scalar(nnx.Module):
    """A parameter without axes, and one that is a Python number."""

    def __init__(self, rngs):
        self.slope, self.number = nnx.Param(jnp.float32(2.0)), nnx.Param(3.0)

    def __call__(self, x):
        return jnp.stack([self.slope[...] * x[..., 0], self.number.get_value() * x[..., 1]], -1)


class Normed(nnx.Module):
    """Batch norm between layers whose parameters have 16 bits."""

    def __init__(self, rngs):
        narrow = {"param_dtype": jnp.bfloat16, "rngs": rngs}
        self.inner, self.norm = nnx.Linear(3, 8, **narrow), nnx.BatchNorm(8, **narrow)
        self.outer = nnx.Linear(8, 4, **narrow)

    def __call__(self, x):
        return self.outer(nnx.tanh(self.norm(self.inner(x))))


class Holding(nnx.Module):
    """A layer, and something else that the loss reads or changes."""

    def __init__(self, held, call=lambda self: 1.0):
        self.layer, self.call = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), call
        self.held = held

    def __call__(self, x):
        return self.layer(x) * self.call(self)


def trained(net, num_steps=2, **settings):
    step = jax.jit(train.make_step(net.loss_vector_fn, SGD, noise.gd(N), **net.takes, **settings))
    state = train.init(net.params, SGD, KEY, net.model_state)
    for _ in range(num_steps):
        state, _ = step(state, DATA)
    return state


def one_by_one(function, model, examples):
    return jax.vmap(lambda example: function(model, example))(examples)


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("kind", [Shared, Nested, Scalar])
def test_gradients_are_those_of_nnx_and_go_back_into_the_module(kind):
    targets = {"x": DATA["x"], "y": DATA["y"] % 2}
    model = kind(nnx.Rngs(0))
    net = flax_nnx.trainable(model, cross_entropy)
    of_mean = loss.noisy_value_and_grad(net.loss_vector_fn, noise.gd(N), **net.takes)
    params = train.init(net.params, SGD, KEY).params  # numbers become arrays
    found = of_mean(params, targets, KEY, 0)[1]
    graph, _ = nnx.split(model, nnx.Param)

    def mean(params):
        return one_by_one(cross_entropy, nnx.merge(graph, params), targets).mean()

    expected = jax.grad(mean)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected(params)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    moved = optax.apply_updates(params, found)
    net.update(model, moved)
    got, want = (one_by_one(cross_entropy, m, targets) for m in (net.merge(moved), model))
    np.testing.assert_array_equal(got, want)


def test_what_is_shared_is_trained_once_and_stays_shared():
    model = Shared(nnx.Rngs(0))
    net = flax_nnx.trainable(model, cross_entropy)
    assert len(jax.tree.leaves(net.params)) == 5
    after = trained(net).params
    net.update(model, after)
    for module in (model, net.merge(after)):
        assert module.first is module.second
        assert module.scale is module.again


def test_narrow_parameters_keep_their_type_and_are_averaged_in_a_wide_one():
    state = trained(flax_nnx.trainable(Normed(nnx.Rngs(0)), cross_entropy), microbatch_size=4)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.dtype for leaf in jax.tree.leaves(state.model_state)} == {jnp.dtype("float32")}


def test_a_module_in_evaluation_mode_is_trained_in_it():
    """Its statistics are used and stay, and nothing is dropped; back in training mode both move."""
    model = Net(nnx.Rngs(0), norm=True, drop=True)
    model.eval()
    net = flax_nnx.trainable(model, cross_entropy)
    state = trained(net)
    assert bits(state.model_state) == bits(net.model_state)
    assert bits(state.params) == bits(trained(net, microbatch_size=N)._replace(key=KEY).params)
    model.train()
    other = flax_nnx.trainable(model, cross_entropy)
    moved = trained(other)
    assert bits(moved.model_state) != bits(net.model_state)
    assert bits(moved.params) != bits(state.params)


def test_one_program_trains_every_module_of_a_structure():
    """Also side by side, each as it is trained alone."""
    one, two = (Net(nnx.Rngs(seed), norm=True) for seed in (0, 7))
    net = flax_nnx.trainable(one, cross_entropy)
    step = train.make_step(net.loss_vector_fn, SGD, noise.cov(N, 4), **net.takes)
    states = [train.init(p, SGD, KEY, s) for p, s in (net.split(one), net.split(two))]
    compiled = jax.jit(step)
    alone = [compiled(state, DATA)[0] for state in states]
    assert compiled._cache_size() == 1
    own = flax_nnx.trainable(two, cross_entropy)
    own_step = jax.jit(train.make_step(own.loss_vector_fn, SGD, noise.cov(N, 4), **own.takes))
    expected = own_step(train.init(own.params, SGD, KEY, own.model_state), DATA)[0]
    assert bits(alone[1].params) == bits(expected.params)
    both = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    together = jax.jit(jax.vmap(step, in_axes=(0, None)))(both, DATA)[0]
    for got, want in zip(
        jax.tree.leaves(together.params), jax.tree.leaves(alone[1].params), strict=True
    ):
        np.testing.assert_allclose(got[1], want, rtol=1e-5, atol=1e-6)


def test_states_are_donated_and_the_module_starts_another_run():
    model = Net(nnx.Rngs(0), norm=True)
    net = flax_nnx.trainable(model, cross_entropy)
    step = train.make_step(net.loss_vector_fn, optax.adam(0.1), noise.gd(N), **net.takes)
    loop = train.make_loop(step, max_steps=2)
    ends = []
    for _ in range(2):
        state = train.init(net.params, optax.adam(0.1), KEY, net.model_state)
        for _ in range(2):
            state, _ = loop(state, DATA, 2)
        ends.append(bits((state.params, state.model_state)))
    assert ends[0] == ends[1]
    assert np.isfinite(model(DATA["x"])).all()


@pytest.mark.parametrize(
    ("held", "options"),
    [
        (nnx.Cache({"a": jnp.full(4, 2.0)}), {"frozen": nnx.Cache}),
        (jnp.full(4, 2.0), {"frozen": jax.Array}),
        (jnp.full(4, 2.0), {"mutable": jax.Array}),
    ],
    ids=["a dictionary", "an array without a variable", "such an array, mutable"],
)
@pytest.mark.parametrize("microbatch_size", [None, 4])
def test_what_is_only_read_keeps_its_bits(held, options, microbatch_size):
    def read(module):
        value = module.held
        return value.get_value()["a"] if isinstance(value, nnx.Cache) else value

    net = flax_nnx.trainable(Holding(held, read), cross_entropy, **options)
    state = trained(net, microbatch_size=microbatch_size)
    assert bits(state.model_state) == bits(net.model_state)
    plain = flax_nnx.trainable(Holding(None, lambda module: 2.0), cross_entropy)
    for got, want in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(trained(plain).params), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


def test_an_array_without_a_variable_may_be_trained():
    model = Holding(jnp.ones(4), lambda module: module.held)
    net = flax_nnx.trainable(model, cross_entropy, wrt=(nnx.Param, jax.Array))
    after = trained(net).params
    net.update(model, after)
    assert np.abs(np.asarray(model.held) - 1).min() > 1e-4
    np.testing.assert_array_equal(model.held, after["held"])


def test_what_a_loss_writes_into_a_parameter_lasts_for_the_call():
    def clip(module):
        module.layer.kernel[...] = jnp.clip(module.layer.kernel[...], -0.1, 0.1)
        return 1.0

    def clipped(module, example):
        clip(module)
        return cross_entropy(module, example)

    net = flax_nnx.trainable(Holding(None), clipped)
    model = net.merge(net.params)
    assert np.abs(model.layer.kernel[...]).max() > 0.2
    losses = net.loss_vector_fn(net.params, DATA)
    clip(model)
    np.testing.assert_allclose(losses, cross_entropy(model, DATA), rtol=1e-6)
    assert np.abs(trained(net).params["layer"]["kernel"].get_value()).max() > 0.2


def deleting(module):
    module.held = nnx.data(None)
    return 1.0


MISTAKES = {
    "no parameters": (
        lambda: flax_nnx.trainable(nnx.Dropout(0.5, rngs=nnx.Rngs(0)), cross_entropy),
        "wrt must pick variables of the module",
        "picks none",
    ),
    "complex parameters": (
        lambda: flax_nnx.trainable(
            nnx.Linear(3, 4, param_dtype=jnp.complex64, rngs=nnx.Rngs(0)), cross_entropy
        ),
        "the parameters that wrt picks, module['bias']",
        "got complex64",
    ),
    "a class": (lambda: flax_nnx.trainable(Net, cross_entropy), "module", "of type ModuleMeta"),
    "an array without a variable": (
        lambda: flax_nnx.trainable(Holding(jnp.ones(4)), cross_entropy),
        "module",
        "held (jax.Array). Give their type as mutable=",
    ),
    "statistics deleted in the loss": (
        lambda: trained(
            flax_nnx.trainable(Holding(nnx.BatchStat(jnp.ones(4)), deleting), cross_entropy)
        ),
        "loss_fn must not delete held (BatchStat)",
        "",
    ),
    "statistics that a step without them was told of": (
        lambda: train.make_step(
            flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy).loss_vector_fn,
            SGD,
            noise.gd(N),
            has_state=True,
        ),
        "has_state = True",
        "got a function of (params, batch)",
    ),
    "a module of shapes": (
        lambda: train.init(
            flax_nnx.trainable(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), cross_entropy).params,
            SGD,
            KEY,
        ),
        "params['inner']['bias'].value must be an array",
        "a shape without values",
    ),
    **{
        f"{name} is no filter": (
            lambda name=name: flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy, **{name: 3}),
            f"{name} must be an NNX filter",
            "got 3 of type int",
        )
        for name in ("wrt", "mutable", "frozen")
    },
}


@pytest.mark.usefixtures("user_errors")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told(mistake):
    call, name, wrong = MISTAKES[mistake]
    assert_told(call, name, wrong, hides_frames=True)
