"""Examples spread over devices have the same weights bit for bit, and gradients up to rounding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from msgd_jax import loss, noise, sharding, train, transform
from msgd_jax._streams import Stream, derive
from tests.support.noises import ROWS
from tests.support.problems import loss_vector_fn, regression
from tests.support.spread import assert_is_dense_gradient, spread

KEY = jax.random.key(314)
N = 1003  # not divisible by any number of devices here


def assert_same_bits(a: jax.Array, b: jax.Array) -> None:
    assert a.dtype == b.dtype
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


# The weights --------------------------------------------------------------------------------------


def weights_used(law: noise.MNoise, step: int, **settings) -> jax.Array:
    """The weights that are used, as the gradient of the losses L_i = theta_i."""
    f = loss.noisy_value_and_grad(lambda theta, i: theta[i], law, **settings)
    examples = jnp.arange(law.num_examples)
    return jax.jit(f)(jnp.ones(law.num_examples), examples, KEY, step)[1]


@pytest.mark.optimized
@pytest.mark.parametrize("name", list(ROWS))
def test_eight_devices_use_the_weights_of_one(name):
    """Copies of the last example fill up the parts, and must add nothing to its weight."""
    law = ROWS[name].make(N, 16)  # multiples of 1/16 add up exactly, in any order
    assert_same_bits(weights_used(law, 3, sharding=spread(8)), law.sample(KEY, 3).dense())


@pytest.mark.optimized
@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["cov", "bernoulli", "sparse_cov"])
def test_any_number_of_devices_uses_the_weights_of_one(name, num_devices, mode):
    law = ROWS[name].make(N, 16)
    used = weights_used(law, 5, sharding=spread(num_devices, mode), microbatch_size=60)
    assert_same_bits(used, law.sample(KEY, 5).dense())


@pytest.mark.parametrize("microbatch_size", [None, 3])
@pytest.mark.parametrize("num_devices", [1, 8])
def test_an_infinite_loss_that_is_not_listed_spoils_nothing(num_devices, microbatch_size):
    """Whichever example it is, since what fills up a device's part is listed, too."""
    settings = {"sharding": spread(num_devices), "microbatch_size": microbatch_size}
    law = noise.mixture([noise.sgd(24, 6), noise.sgd(24, 2)], [0.5, 0.5])
    f = jax.jit(loss.noisy_value_and_grad(lambda theta, x: theta[0] * x, law, **settings))
    for step in range(3):
        listed = law.sample(KEY, step).dense() != 0
        for bad in np.flatnonzero(~listed):
            x = jnp.ones(24).at[bad].set(jnp.inf)
            assert np.isfinite(f(jnp.ones(1), x, KEY, step)[1]), (step, bad)
        spoilt = jnp.ones(24).at[int(np.flatnonzero(listed)[0])].set(jnp.inf)
        assert not np.isfinite(f(jnp.ones(1), spoilt, KEY, step)[1])


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", ["fisher", "cov", "bernoulli", "rademacher"])
def test_each_device_draws_the_weights_of_its_own_part_only(name, mode):
    """The program of a device has no array of length N, and gathers none."""
    law, rows = ROWS[name].make(N, 8), spread(8, mode)
    data = sharding.shard_examples(regression(N).data, rows)
    f = loss.noisy_value_and_grad(loss_vector_fn, law, sharding=rows)
    program = jax.jit(f).lower(regression().params, data, KEY, 3).compile().as_text() or ""
    lengths = {int(n) for n in re.findall(r"\b[fsu]32\[(\d+)", program)}
    assert 126 in lengths  # 1,008 examples, filled up, in 8 parts
    assert max(lengths) == 126
    assert "all-gather" not in program


def test_there_may_be_fewer_examples_than_devices():
    for n in (1, 3, 8):
        assert_same_bits(
            weights_used(noise.gd(n), 0, sharding=spread(8)), noise.gd(n).sample(KEY, 0).values
        )


# The gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("microbatch_size", [None, 50])
@pytest.mark.parametrize("num_devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["cov", "sgd", "sparse_fisher"])
def test_gradients_are_dense_algebra(name, num_devices, microbatch_size):
    problem, law = regression(N), ROWS[name].make(N, 400)
    f = loss.noisy_value_and_grad(
        loss_vector_fn, law, microbatch_size=microbatch_size, sharding=spread(num_devices)
    )
    value, grads = jax.jit(f)(problem.params, problem.data, KEY, 2)
    assert_is_dense_gradient(problem, law.sample(KEY, 2), value, grads)
    assert len(grads["w"].sharding.device_set) == num_devices


def test_given_weights_and_many_draws_have_dense_gradients():
    problem, rows = regression(N), spread(8)
    law = noise.sparse_cov(N, 30, support_size=60)
    weights = law.sample(KEY, 0)
    f = loss.weighted_value_and_grad(loss_vector_fn, sharding=rows)
    assert_is_dense_gradient(problem, weights, *f(problem.params, problem.data, weights))
    many = jax.vmap(law.sample, (None, 0))(KEY, jnp.arange(3))
    f = loss.weighted_values_and_grads(loss_vector_fn, sharding=rows, microbatch_size=40)
    values, grads = f(problem.params, sharding.shard_examples(problem.data, rows), many)
    for k in range(3):
        one = jax.tree.map(lambda leaf, k=k: leaf[k], (values, grads))
        assert_is_dense_gradient(problem, law.sample(KEY, k), *one)


def test_examples_may_be_spread_over_two_axes_of_a_mesh():
    rows = spread(2, fsdp=2, model=2)
    rows = NamedSharding(rows.mesh, PartitionSpec(("data", "fsdp")))
    problem, law = regression(N), noise.cov(N, 8)
    data = sharding.shard_examples(problem.data, rows)
    assert data["x"].addressable_shards[0].data.shape == (251, 5)
    f = loss.noisy_value_and_grad(loss_vector_fn, law, sharding=rows)
    assert_is_dense_gradient(problem, law.sample(KEY, 1), *f(problem.params, data, KEY, 1))


def test_narrow_parameters_are_summed_in_float32():
    """Of 8 devices, the sum in float32 is rounded to bfloat16 once, and not eight times."""
    rows, ones = spread(8), jnp.ones((), jnp.bfloat16)
    examples = jnp.array([256.0] + [1.0] * 7)  # 256 + 1 is 256 in bfloat16
    f = loss.weighted_value_and_grad(lambda theta, x: theta.astype(jnp.float32) * x, sharding=rows)
    weights = noise.Weights(jnp.ones(8), None, 8)
    _, grads = f(ones, examples, weights)
    assert grads.dtype == jnp.bfloat16
    assert float(grads) == float(jnp.bfloat16(263.0)) == 264.0
    # On CPUs, XLA widens reductions by itself. That the library asks for it can only be seen in
    # the program that XLA is given.
    program = jax.jit(lambda theta: f(theta, examples, weights)).lower(ones).as_text()
    reduced = re.findall(r"all_reduce.*?\^bb0\(%\w+: tensor<(\w+)>", program, re.DOTALL)
    assert set(reduced) == {"f32"}


@pytest.mark.parametrize("microbatch_size", [None, 5, 25])
def test_a_step_has_one_reduction(microbatch_size):
    """It reduces gradients and value together, whatever the number of micro-batches."""
    rows = spread(8)
    data = sharding.shard_examples(regression(N).data, rows)
    f = loss.noisy_value_and_grad(
        loss_vector_fn, noise.fisher(N, 8), microbatch_size=microbatch_size, sharding=rows
    )
    program = jax.jit(f).lower(regression().params, data, KEY, 3).compile().as_text() or ""
    assert len(re.findall(r" all-reduce(?:-start)?\(", program)) == 1
    others = r" (?:all-gather|all-to-all|collective-permute|reduce-scatter)\("
    assert not re.findall(others, program)


def test_statistics_are_averaged_over_devices():
    def of_batch(theta, x, model_state):
        mean, calls = model_state
        return theta * x, (0.5 * mean + 0.5 * x.mean(), calls + 1)

    x = jnp.arange(16.0)
    f = loss.noisy_value_and_grad(
        of_batch, noise.gd(16), microbatch_size=2, has_state=True, sharding=spread(4)
    )
    (_, (mean, calls)), _ = f(jnp.ones(()), x, KEY, 0, (jnp.float32(8.0), jnp.int32(3)))
    order = derive(KEY, Stream.ORDER, 0)  # each device has an order of its own, from this key
    per_device = []
    for part, own in enumerate(np.split(np.arange(16.0), 4)):
        visited = own[noise.permute(jax.random.fold_in(order, part), np.arange(4), 4)]
        first, second = visited[:2].mean(), visited[2:].mean()
        per_device.append(0.25 * 8 + 0.25 * first + 0.5 * second)
    assert float(mean) == np.mean(per_device)
    assert int(calls) == 5


# Training -----------------------------------------------------------------------------------------


def train_state(law, rows=None, params=None, optimizer=None, **settings):
    problem = regression(N)
    optimizer = optimizer or optax.sgd(0.5, momentum=0.9)
    state = train.init(params or problem.params, optimizer, KEY)
    step = train.make_step(loss_vector_fn, optimizer, law, sharding=rows, **settings)
    data = problem.data if rows is None else sharding.shard_examples(problem.data, rows)
    return state, train.make_loop(step, max_steps=10), data


def test_training_resumes_on_another_number_of_devices():
    """Five steps on 8 devices and five on 2 are ten on one, up to rounding."""
    law = noise.cov(N, 20)
    state, loop, data = train_state(law)
    expected, metrics = loop(state, data, 10)
    state, loop, data = train_state(law, spread(8), microbatch_size=60)
    state, first = loop(state, data, 5)
    assert len(state.params["w"].sharding.device_set) == 8
    _, loop, data = train_state(law, spread(2))
    state, second = loop(jax.device_get(state), data, 5)
    assert int(state.step) == 10
    losses = np.concatenate([first.loss, second.loss])
    np.testing.assert_allclose(losses, metrics.loss, rtol=1e-4)
    np.testing.assert_allclose(state.params["w"], expected.params["w"], rtol=1e-4)


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
def test_parameters_may_be_spread_over_the_axis_of_the_examples(mode):
    """A layout like that of FSDP is kept, also in the state of the optimizer."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, 8)).astype(np.float32)
    params = {"w": rng.normal(size=(8, 16)).astype(np.float32), "v": np.ones(16, np.float32)}

    def losses(p, x):
        return jnp.tanh(x @ p["w"]) @ p["v"]

    law, optimizer, results = noise.cov(N, 20), optax.adam(0.01), []
    rows = spread(8, mode)
    layout = {
        "w": NamedSharding(rows.mesh, PartitionSpec("data")),
        "v": NamedSharding(rows.mesh, PartitionSpec()),
    }
    for sharded in (None, rows):
        place = params if sharded is None else jax.device_put(params, layout)
        state = train.init(place, optimizer, KEY)
        step = train.make_step(losses, optimizer, law, sharding=sharded)
        examples = x if sharded is None else sharding.shard_examples(x, rows)
        results.append(train.make_loop(step, max_steps=5)(state, examples, 5)[0])
    one, many = results
    for tree in (many.params, many.opt_state[0].mu):
        for leaf in tree:
            assert tree[leaf].sharding.is_equivalent_to(layout[leaf], tree[leaf].ndim)
    assert many.params["w"].addressable_shards[0].data.shape == (1, 16)
    # Adam divides by the root of squares, so that relative errors of the gradient remain.
    np.testing.assert_allclose(many.params["w"], one.params["w"], rtol=1e-4, atol=1e-5)


def test_parameters_may_be_spread_over_another_axis():
    rows = spread(4, model=2)
    problem = regression(N, dim=6)
    layout = {"w": PartitionSpec("model"), "b": PartitionSpec()}
    layout = {k: NamedSharding(rows.mesh, spec) for k, spec in layout.items()}
    law = noise.cov(N, 20)
    f = loss.noisy_value_and_grad(loss_vector_fn, law, sharding=rows)
    params = jax.device_put(problem.params, layout)
    value, grads = jax.jit(f)(params, sharding.shard_examples(problem.data, rows), KEY, 4)
    assert_is_dense_gradient(problem, law.sample(KEY, 4), value, grads)
    assert grads["w"].sharding.is_equivalent_to(layout["w"], 1)


def test_seeds_of_a_transformation_may_be_mapped_over_devices():
    problem, law, rows = regression(N), noise.cov(N, 20), spread(8)
    data = sharding.shard_examples(problem.data, rows)
    updates = []
    for sharded, examples in ((None, problem.data), (rows, data)):

        def of_seed(key, sharded=sharded, examples=examples):
            optimizer = transform.msgd(0.5, law, key, sharding=sharded)
            state = optimizer.init(problem.params)
            extra = {"loss_vector_fn": loss_vector_fn, "data": examples}
            return optimizer.update((), state, problem.params, **extra)[0]

        updates.append(jax.jit(jax.vmap(of_seed))(jax.random.split(jax.random.key(9), 3)))
    np.testing.assert_allclose(updates[1]["w"], updates[0]["w"], rtol=1e-4, atol=1e-6)
    assert np.unique(updates[1]["b"]).size == 3


# Placing examples ---------------------------------------------------------------------------------


def test_examples_are_filled_up_with_copies_of_the_last():
    rows = spread(8)
    images = np.arange(10 * 2, dtype=np.uint8).reshape(10, 2)
    placed = sharding.shard_examples({"x": images, "y": np.arange(10.0)}, rows)
    expected = np.concatenate([images, np.repeat(images[-1:], 6, axis=0)])
    np.testing.assert_array_equal(placed["x"], expected)
    assert placed["x"].dtype == np.uint8
    assert placed["y"].dtype == np.float32  # as jax makes of float64 without x64
    assert [s.data.shape for s in placed["x"].addressable_shards] == [(2, 2)] * 8
    one = sharding.shard_examples(jnp.ones((1, 3)), rows)
    np.testing.assert_array_equal(one, np.ones((8, 3)))


@pytest.mark.parametrize("mode", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_are_placed_like_examples(mode, impl):
    """They are placed in equal parts, and filled up with copies of the last key."""
    rows, keys = spread(8, mode), jax.random.split(jax.random.key(5, impl=impl), 10)
    placed = sharding.shard_examples({"key": keys, "y": np.arange(10.0)}, rows)["key"]
    assert placed.dtype == keys.dtype
    words = np.asarray(jax.random.key_data(jax.random.clone(keys)))
    expected = np.concatenate([words, np.repeat(words[-1:], 6, axis=0)])
    np.testing.assert_array_equal(jax.random.key_data(jax.random.clone(placed)), expected)
    assert [part.data.shape for part in placed.addressable_shards] == [(2,)] * 8
    assert placed.sharding.is_equivalent_to(rows, 1)


@pytest.mark.usefixtures("unchecked_key_reuse")  # a loop over micro-batches reads the same keys
@pytest.mark.parametrize("microbatch_size", [None, 3])
def test_a_loss_draws_the_same_from_keys_that_are_spread(microbatch_size):
    keys, law = jax.random.split(jax.random.key(5), 50), noise.cov(50, 10)
    losses = loss.per_example(lambda theta, key: theta * jax.random.normal(key))
    values = []
    for rows in (None, spread(8)):
        data = keys if rows is None else sharding.shard_examples(keys, rows)
        f = loss.noisy_value_and_grad(losses, law, microbatch_size=microbatch_size, sharding=rows)
        values.append(jax.jit(f)(jnp.ones(()), data, KEY, 0)[1])
    np.testing.assert_allclose(values[1], values[0], rtol=1e-5)


def test_each_device_reads_its_own_part_once():
    class Counted:
        """A source of examples, such as a file, that records which ones are read."""

        shape, dtype, ndim = (1001,), np.dtype(np.float32), 1

        def __init__(self):
            self.reads = []

        def __getitem__(self, rows):
            self.reads.append((rows.start, rows.stop))
            return np.arange(rows.start, rows.stop, dtype=np.float32)

    source = Counted()
    placed = sharding.shard_examples(source, spread(4))
    np.testing.assert_array_equal(placed, np.minimum(np.arange(1004), 1000))
    assert sorted(source.reads) == [(0, 251), (251, 502), (502, 753), (753, 1001)]


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    problem = regression(10)

    @pytest.mark.parametrize("dtype", [np.int64, np.uint64])
    def test_integers_that_jax_would_cut_are_refused(self, dtype):
        """Without x64, jax would make 2^40 a 0."""
        rows, numbers = spread(8), np.arange(8, dtype=dtype)
        message = r"must hold integers that fit u?int32, got u?int64 from \d+ to 1099511627776"
        for place in (sharding.shard_examples, sharding.shard_batch):
            np.testing.assert_array_equal(place(numbers, rows), numbers)
            with pytest.raises(ValueError, match=message) as caught:
                place(np.where(numbers == 7, 2**40, numbers).astype(dtype), rows)
            assert len(str(caught.value)) <= 400
        with jax.enable_x64(True):
            assert int(sharding.shard_examples(numbers + dtype(2**40), rows)[7]) == 2**40 + 7

    @pytest.mark.parametrize(
        "spec", [PartitionSpec(), PartitionSpec(None, "data"), PartitionSpec("data", "model")]
    )
    def test_shardings_must_spread_the_axis_of_the_examples_only(self, spec):
        rows = NamedSharding(spread(4, model=2).mesh, spec)
        for call in (
            lambda: loss.weighted_value_and_grad(loss_vector_fn, sharding=rows),
            lambda: loss.weighted_values_and_grads(loss_vector_fn, sharding=rows),
            lambda: train.make_step(loss_vector_fn, optax.sgd(1), noise.gd(10), sharding=rows),
            lambda: transform.multiplicative_noise(noise.gd(10), KEY, sharding=rows),
            lambda: sharding.shard_examples(self.problem.data, rows),
        ):
            with pytest.raises(ValueError, match="sharding must spread the leading axis"):
                call()

    def test_what_is_no_sharding_is_refused(self):
        with pytest.raises(TypeError, match="sharding must be a jax"):
            loss.weighted_value_and_grad(loss_vector_fn, sharding=PartitionSpec("data"))
        with pytest.raises(TypeError, match="sharding must be a jax"):
            sharding.shard_examples(self.problem.data, None)

    def test_data_must_have_as_many_examples_as_the_weights(self):
        f = loss.weighted_value_and_grad(loss_vector_fn, sharding=spread(8))
        weights = noise.gd(9).sample(KEY, 0)
        with pytest.raises(ValueError, match=r"num_examples = 9 \(16 when filled up .* has 10"):
            f(self.problem.params, self.problem.data, weights)

    def test_keys_in_statistics_are_refused(self):
        f = loss.noisy_value_and_grad(
            lambda p, d, model_state: (loss_vector_fn(p, d), model_state),
            noise.gd(10),
            has_state=True,
            sharding=spread(2),
        )
        with pytest.raises(TypeError, match=r"model_state must be numbers .* PRNG keys"):
            f(self.problem.params, self.problem.data, KEY, 0, jax.random.key(1))

    def test_wrong_keys_and_laws_are_refused(self):
        with pytest.raises(TypeError, match="key must be a typed PRNG key"):
            sharding.check_key_agrees("key", 3)
        with pytest.raises(TypeError, match=r"law must be a noise\.MNoise"):
            loss.noisy_value_and_grad(loss_vector_fn, "sgd")
