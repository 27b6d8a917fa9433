"""Modules of flax NNX: dropout, batch norm, frozen parts, and writing back into a module."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msgd_jax import flax_nnx, loss, noise, train, transform
from msgd_jax._streams import Stream, derive
from tests.support.flax_nets import DATA, Net, cross_entropy

KEY = jax.random.key(2024)
N = 16
LAW = noise.cov(N, 4)


def spread(num_devices):
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    return NamedSharding(mesh, PartitionSpec("data"))


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def run(net, num_steps, state=None, optimizer=None, **settings):
    optimizer = optax.adam(0.05) if optimizer is None else optimizer
    step = jax.jit(train.make_step(net.loss_vector_fn, optimizer, LAW, **net.takes, **settings))
    if state is None:
        state = train.init(net.params, optimizer, KEY, net.model_state)
    for _ in range(num_steps):
        state, _ = step(state, DATA)
    return state


# Plain nets --------------------------------------------------------------------------------------


def test_a_plain_net_has_the_losses_of_its_module():
    model = Net(nnx.Rngs(0))
    net = flax_nnx.trainable(model, cross_entropy)
    assert net.takes == {"has_state": False, "has_aux": False, "has_keys": False}
    assert net.model_state == ()
    losses = net.loss_vector_fn(net.params, DATA)
    np.testing.assert_allclose(losses, cross_entropy(model, DATA), rtol=1e-6)
    assert loss.check(net.loss_vector_fn, net.params, DATA, KEY) is None


@pytest.mark.slow
def test_extra_outputs_are_averaged_also_beside_keys_of_the_loss():
    def noisy(model, example, key):
        logits = model(example["x"] + 0.1 * jax.random.normal(key, (3,)))
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, example["y"])
        return losses, {"correct": logits.argmax() == example["y"]}

    net = flax_nnx.trainable(Net(nnx.Rngs(0), drop=True), noisy, has_aux=True, has_keys=True)
    assert net.takes == {"has_state": False, "has_aux": True, "has_keys": True}
    step = train.make_step(net.loss_vector_fn, optax.sgd(0.1), LAW, **net.takes)
    _, metrics = step(train.init(net.params, optax.sgd(0.1), KEY), DATA)
    counted = float(metrics.aux.averaged["correct"]) * N
    assert counted == round(counted)


# Dropout -----------------------------------------------------------------------------------------


class Masks(nnx.Module):
    """Entry i of a vector under two dropout layers: its gradient tells both masks.

    The gradient of each layer is 0 or 2, and the second layer counts four times.
    """

    def __init__(self, rngs):
        self.w = nnx.Param(jnp.ones(N))
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.again = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, index):
        return self.drop(self.w[...])[index] + 4.0 * self.again(self.w[...])[index]


@pytest.mark.optimized
@pytest.mark.parametrize(
    "settings",
    [
        {"microbatch_size": 3},
        {"sharding": spread(8)},
        {"sharding": spread(2), "microbatch_size": 3},
    ],
    ids=["micro-batches", "8 devices", "2 devices and micro-batches"],
)
def test_dropout_has_the_same_bits_on_any_device_and_in_any_micro_batch(settings):
    net = flax_nnx.trainable(Masks(nnx.Rngs(0)), lambda model, index: model(index))
    indices, law = jnp.arange(N), noise.gd(N)

    def gradient(step, **settings):
        found = loss.noisy_value_and_grad(net.loss_vector_fn, law, **net.takes, **settings)
        return np.asarray(found(net.params, indices, KEY, step)[1]["w"].get_value()) * N

    masks = [gradient(step) for step in range(6)]
    np.testing.assert_array_equal(masks[5], gradient(5, **settings))
    # The two masks are independent, and differ between examples and steps.
    assert set(np.concatenate(masks)) == {0.0, 2.0, 8.0, 10.0}
    assert len({mask.tobytes() for mask in masks}) == 6


def test_random_counters_of_the_module_are_not_used_and_do_not_change():
    model = Net(nnx.Rngs(0), drop=True)
    net = flax_nnx.trainable(model, cross_entropy)
    keys = jax.random.split(KEY, N)
    first = net.loss_vector_fn(net.params, DATA, keys)
    assert int(model.drop.rngs.count[...]) == 0
    model(DATA["x"])
    advanced = flax_nnx.trainable(model, cross_entropy)
    np.testing.assert_array_equal(first, advanced.loss_vector_fn(net.params, DATA, keys))
    np.testing.assert_array_equal(first, net.loss_vector_fn(net.params, DATA, keys))
    other = net.loss_vector_fn(net.params, DATA, jax.random.split(jax.random.key(1), N))
    assert not np.isclose(first, other).all()


def test_each_layer_under_vmap_has_its_own_key():
    """A sum tells the masks of three layers apart: all eight combinations must be seen."""

    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def layers(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    class Stack(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.Param(jnp.ones(40))
            self.drops = layers(rngs)

        def __call__(self, x):
            applied = nnx.vmap(lambda drop, w: drop(w), in_axes=(0, None), out_axes=0)
            masks = applied(self.drops, self.w[...])
            return x * (masks[0] + 4.0 * masks[1] + 16.0 * masks[2])

    net = flax_nnx.trainable(Stack(nnx.Rngs(0)), lambda model, x: model(x)[0])
    seen = net.loss_vector_fn(net.params, jnp.ones(60), jax.random.split(KEY, 60))
    assert set(np.asarray(seen)) == {a + b + c for a in (0, 2) for b in (0, 8) for c in (0, 32)}


# Batch norm --------------------------------------------------------------------------------------


def test_batch_norm_takes_the_micro_batch_and_its_statistics_are_those_of_nnx():
    model = Net(nnx.Rngs(0), norm=True)
    net = flax_nnx.trainable(model, cross_entropy)
    found = loss.noisy_value_and_grad(net.loss_vector_fn, noise.gd(N), **net.takes)
    (value, after), grads = jax.jit(found)(net.params, DATA, KEY, 0, net.model_state)

    graph, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)

    def of_whole(params):
        whole = nnx.merge(graph, params, stats, copy=True)
        return cross_entropy(whole, DATA).mean(), nnx.state(whole, nnx.BatchStat)

    reference = jax.jit(jax.value_and_grad(of_whole, has_aux=True))
    (expected, expected_stats), expected_grads = reference(params)
    for got, want in zip(
        jax.tree.leaves((value, after.stats, grads)),
        jax.tree.leaves((expected, expected_stats, expected_grads)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-6)
    assert bits(after.stats) != bits(net.model_state.stats)
    # In ghost batches of 4, the statistics are updated four times, in the order of the step.
    ghost = loss.noisy_value_and_grad(
        net.loss_vector_fn, noise.gd(N), **net.takes, microbatch_size=4
    )
    (_, ghosts), _ = jax.jit(ghost)(net.params, DATA, KEY, 0, net.model_state)
    order = noise.permute(jax.random.fold_in(derive(KEY, Stream.ORDER, 0), 0), jnp.arange(N), N)
    hidden, mean = np.asarray(model.inner(DATA["x"]), np.float64), np.zeros(8)
    for batch in np.asarray(order).reshape(4, 4):
        mean = 0.9 * mean + 0.1 * hidden[batch].mean(0)
    got = np.asarray(ghosts.stats["norm"]["mean"].get_value())
    np.testing.assert_allclose(got, mean, rtol=1e-5, atol=1e-6)


def test_a_loss_of_the_whole_batch_trains_like_a_loss_of_one_example():
    model = Net(nnx.Rngs(0), norm=True)
    nets = [
        flax_nnx.trainable(model, cross_entropy),
        flax_nnx.trainable(model, cross_entropy, of_batch=True),
    ]
    one, whole = [run(net, 3, microbatch_size=8, optimizer=optax.sgd(0.1)) for net in nets]
    for got, want in zip(jax.tree.leaves(one), jax.tree.leaves(whole), strict=True):
        if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# Frozen parts ------------------------------------------------------------------------------------


def pretrained(**parts):
    """A module whose low-rank addition is not 0, as it is after its construction."""
    model = Net(nnx.Rngs(0), lora=True, **parts)
    model.lora.lora_b[...] = jnp.ones_like(model.lora.lora_b[...])
    return model


@pytest.mark.parametrize("settings", [{}, {"microbatch_size": 4}, {"sharding": spread(3)}], ids=str)
def test_frozen_parts_keep_their_bits(settings):
    model = pretrained(norm=True, drop=True)
    net = flax_nnx.trainable(model, cross_entropy, wrt=nnx.LoRAParam)
    assert len(jax.tree.leaves(net.params)) == 2
    before = bits(nnx.state(model, nnx.Param))
    state = run(net, 3, **settings)
    assert bits(state.model_state.frozen) == bits(net.model_state.frozen)
    assert all(a != b for a, b in zip(bits(state.params), bits(net.params), strict=True))
    assert bits(state.model_state.stats) != bits(net.model_state.stats)
    assert bits(nnx.state(model, nnx.Param)) == before
    net.update(model, state.params, state.model_state)
    changed = [a != b for a, b in zip(bits(nnx.state(model, nnx.Param)), before, strict=True)]
    assert sum(changed) == 2


def test_later_changes_of_the_module_change_no_state():
    model = pretrained(norm=True)
    net = flax_nnx.trainable(model, cross_entropy, wrt=nnx.LoRAParam)
    before = bits((net.params, net.model_state))
    for _, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat))):
        variable[...] = variable[...] + 1.0
    assert bits((net.params, net.model_state)) == before


def test_a_part_may_be_picked_by_its_path():
    head = nnx.All(nnx.Param, nnx.PathContains("outer"))
    net = flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy, wrt=head)
    assert set(net.params) == {"outer"}
    value = loss.noisy_value_and_grad(net.loss_vector_fn, LAW, **net.takes)
    _, grads = value(net.params, DATA, KEY, 0, net.model_state)
    whole = flax_nnx.trainable(Net(nnx.Rngs(0)), cross_entropy)
    all_of_them = loss.noisy_value_and_grad(whole.loss_vector_fn, LAW)
    _, expected = all_of_them(whole.params, DATA, KEY, 0)
    for got, want in zip(jax.tree.leaves(grads), jax.tree.leaves(expected["outer"]), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)


# Saving, and writing back ------------------------------------------------------------------------


@pytest.mark.optimized
def test_a_saved_run_continues_with_the_same_bits():
    model = pretrained(norm=True, drop=True)
    net = flax_nnx.trainable(model, cross_entropy, wrt=nnx.LoRAParam)
    through = run(net, 4, microbatch_size=4)
    half = run(net, 2, microbatch_size=4)
    saved = jax.tree.map(np.asarray, half._replace(key=jax.random.key_data(half.key)))
    restored = jax.tree.map(jnp.asarray, saved)
    restored = restored._replace(key=jax.random.wrap_key_data(restored.key))
    # Another process would make the net anew.
    again = flax_nnx.trainable(pretrained(norm=True, drop=True), cross_entropy, wrt=nnx.LoRAParam)
    resumed = run(again, 2, restored, microbatch_size=4)
    data_of = lambda s: bits(s._replace(key=jax.random.key_data(s.key)))  # noqa: E731
    assert data_of(resumed) == data_of(through)


def test_the_state_may_be_donated_after_it_was_written_into_a_module():
    model = Net(nnx.Rngs(0), norm=True)
    net = flax_nnx.trainable(model, cross_entropy)
    step = train.make_step(net.loss_vector_fn, optax.sgd(0.1), LAW, **net.takes)
    step = jax.jit(step, donate_argnums=0)
    state, _ = step(train.init(net.params, optax.sgd(0.1), KEY, net.model_state), DATA)
    # The module gets the state, and gives the same state back, bit for bit.
    net.update(model, state.params, state.model_state)
    params, model_state = net.split(model)
    assert bits((params, model_state)) == bits((state.params, state.model_state))
    merged = net.merge(state.params, state.model_state)
    merged.eval()
    model.eval()
    expected = model(DATA["x"])
    np.testing.assert_array_equal(merged(DATA["x"]), expected)
    # This deletes the arrays of the state, of which the module must have copies.
    step(state, DATA)
    np.testing.assert_array_equal(model(DATA["x"]), expected)


def test_an_optimizer_of_nnx_makes_the_same_steps():
    """A step written with `nnx.Optimizer` agrees with `train` in parameters and statistics."""
    net = flax_nnx.trainable(Net(nnx.Rngs(0), norm=True, drop=True), cross_entropy)
    model = Net(nnx.Rngs(0), norm=True, drop=True)
    optimizer = nnx.Optimizer(model, optax.sgd(0.05, momentum=0.9), wrt=nnx.Param)
    value_and_grad = loss.noisy_value_and_grad(net.loss_vector_fn, LAW, **net.takes)

    @nnx.jit
    def step(model, optimizer, batch, key):
        params, model_state = net.split(model)
        found = value_and_grad(params, batch, key, optimizer.step[...], model_state)
        (value, model_state), grads = found
        optimizer.update(model, grads)
        net.update(model, nnx.state(model, nnx.Param), model_state)
        return value

    for _ in range(3):
        step(model, optimizer, DATA, KEY)
    state = run(net, 3, optimizer=optax.sgd(0.05, momentum=0.9))
    for got, want in zip(
        jax.tree.leaves(net.split(model)),
        jax.tree.leaves((state.params, state.model_state)),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_optax_transformation_makes_the_same_steps():
    net = flax_nnx.trainable(Net(nnx.Rngs(0), norm=True, drop=True), cross_entropy)
    chain = transform.with_noise(
        optax.sgd(0.05), LAW, KEY, model_state=net.model_state, has_keys=True
    )
    params, state = net.params, chain.init(net.params)
    for _ in range(2):
        updates, state = chain.update(
            (), state, params, loss_vector_fn=net.loss_vector_fn, data=DATA
        )
        params = optax.apply_updates(params, updates)
    expected = run(net, 2, optimizer=optax.sgd(0.05))
    for got, want in zip(jax.tree.leaves(params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
