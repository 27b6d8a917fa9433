"""Training: the state, the compiled loop, donation, and resuming bit for bit."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from msgd_jax import _dtypes, loss, noise, train
from tests.support.problems import Regression, loss_vector_fn, regression

PROBLEM = regression()
OPTIMIZER = optax.sgd(0.2, momentum=0.9)
SGD = optax.sgd(0.1)
INTEGERS = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64)
STEP = train.make_step(loss_vector_fn, OPTIMIZER, noise.cov(100, 10), microbatch_size=30)
LOOP = train.make_loop(STEP, max_steps=20)


def start(seed: int = 3) -> train.TrainState:
    return train.init(PROBLEM.params, OPTIMIZER, jax.random.key(seed))


def identical(a, b) -> bool:
    a, b = (jax.tree.map(_bytes, tree) for tree in (a, b))
    return a == b


def _bytes(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def test_steps_follow_the_recursion():
    """The reference is theta - eta G W with momentum, written out in numpy's float64."""
    state, metrics = LOOP(start(), PROBLEM.data, 3)
    law = noise.cov(100, 10)
    params = {k: np.asarray(v, np.float64) for k, v in PROBLEM.params.items()}
    trace = {k: np.zeros_like(v) for k, v in params.items()}
    for step in range(3):
        problem = Regression(dict(params), PROBLEM.data)
        w = np.asarray(law.sample(jax.random.key(3), step).dense(), np.float64)
        gradients = {k: np.tensordot(w, g, 1) for k, g in problem.gradient_matrix().items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        np.testing.assert_allclose(metrics.loss[step], w @ problem.losses(), rtol=1e-4)
        np.testing.assert_allclose(metrics.gradient_norm[step], norm, rtol=1e-4)
        for leaf, gradient in gradients.items():
            trace[leaf] = gradient + 0.9 * trace[leaf]
            params[leaf] = params[leaf] - 0.2 * trace[leaf]
    for leaf, expected in params.items():
        np.testing.assert_allclose(state.params[leaf], expected, rtol=1e-4, atol=1e-6)
    assert int(state.step) == 3


@pytest.mark.parametrize("stop", [1, 2, 7, 19])
def test_stopping_anywhere_changes_no_bit(stop):
    straight, all_metrics = LOOP(start(), PROBLEM.data, 20)
    state, first = LOOP(start(), PROBLEM.data, stop)
    resumed, rest = LOOP(state, PROBLEM.data, 20 - stop)
    assert identical(resumed, straight)
    joined = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first, rest)
    assert identical(joined, all_metrics)


def test_resuming_from_an_orbax_checkpoint_changes_no_bit(tmp_path):
    straight, _ = LOOP(start(), PROBLEM.data, 20)
    state, _ = LOOP(start(), PROBLEM.data, 11)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "state", start())
    resumed, _ = LOOP(restored, PROBLEM.data, 9)
    assert identical(resumed, straight)


def test_the_loop_is_compiled_once_for_any_number_of_steps():
    traces = []

    def counting(state, data):
        traces.append(1)
        return STEP(state, data)

    loop = train.make_loop(counting, max_steps=5)
    state = start()
    for num_steps in (1, 5, 3):
        state, metrics = loop(state, PROBLEM.data, num_steps)
        assert metrics.loss.shape == (num_steps,)
    before = len(traces)
    loop(state, PROBLEM.data, 2)
    assert len(traces) == before <= 3  # traced for the shapes and for the loop, and never again


def test_the_loop_agrees_with_single_compiled_steps():
    state, _ = LOOP(start(), PROBLEM.data, 6)
    single = start()
    step = jax.jit(STEP, donate_argnums=0)
    for _ in range(6):
        single, _ = step(single, PROBLEM.data)
    for leaf, expected in single.params.items():
        np.testing.assert_allclose(state.params[leaf], expected, rtol=1e-5)


def test_donation_deletes_no_array_of_the_caller():
    params = jax.tree.map(jnp.copy, PROBLEM.params)
    model_state, key = jnp.zeros(3), jax.random.key(0)
    state = train.init(params, OPTIMIZER, key, model_state)
    LOOP(state, PROBLEM.data, 2)
    for leaf in jax.tree.leaves((params, model_state, key)):
        assert not leaf.is_deleted()
    assert state.params["w"].is_deleted(), "nothing was donated"


class Keeps(NamedTuple):
    """A state that holds the parameters that it was given, as those of many optimizers do."""

    first: Any
    again: Any
    number: Any
    shared: Any


def keeps_parameters() -> optax.GradientTransformation:
    zero = jnp.zeros(2)

    def init(params):
        return Keeps(params, params, 1.5, (zero, zero))

    return optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))


def buffers(tree) -> list[int]:
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return [s.data.unsafe_buffer_pointer() for leaf in leaves for s in leaf.addressable_shards]


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_every_leaf_of_a_state_is_an_array_of_its_own(wrap):
    """Arrays of the caller, and what an optimizer keeps or has twice, are copied."""
    optimizer, params = keeps_parameters(), jax.tree.map(jnp.copy, PROBLEM.params)
    model_state = {"mean": params["w"], "count": 0, "rate": 0.1}
    state = wrap(lambda p, a: train.init(p, optimizer, jax.random.key(0), a))(params, model_state)
    found = buffers((state, params))
    assert len(set(found)) == len(found)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array)
        assert jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) or not leaf.weak_type
    kept = {"first": params, "again": params, "number": 1.5, "shared": (np.zeros(2), np.zeros(2))}
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, Keeps(**kept))


def test_a_state_keeps_its_shardings():
    mesh = jax.make_mesh((8,), ("model",))
    places = {
        "w": NamedSharding(mesh, PartitionSpec("model")),
        "b": NamedSharding(mesh, PartitionSpec()),
    }
    params = jax.device_put({"w": jnp.ones((8, 2)), "b": jnp.ones(2)}, places)
    state = train.init(params, keeps_parameters(), jax.random.key(0), params)
    found = buffers((state.params, state.opt_state.first, state.opt_state.again, state.model_state))
    assert len(set(found)) == len(found) == 64
    for tree in (state.params, state.opt_state.first, state.opt_state.again, state.model_state):
        for name, place in places.items():
            assert tree[name].sharding.is_equivalent_to(place, tree[name].ndim)


def test_a_loop_from_a_weakly_typed_parameter_is_compiled_once():
    """The parameter ``jnp.asarray(1.0)`` has a weak type, and its updates have not."""
    losses = loss.per_example(lambda theta, x: (theta - x) ** 2)
    x, optimizer, traces = jnp.asarray([0.0, 1.0, 3.0, 4.0]), optax.sgd(0.1), []
    step = train.make_step(losses, optimizer, noise.sgd(4, 2))

    def counting(state, data):
        traces.append(1)
        return step(state, data)

    loop = train.make_loop(counting, max_steps=100)
    state, _ = loop(train.init(jnp.asarray(1.0), optimizer, jax.random.key(0)), x, 60)
    once = len(traces)
    for num_steps in (60, 7):
        state, _ = loop(state, x, num_steps)
    assert int(state.step) == 127
    assert len(traces) == once


def test_an_optimizer_that_returns_numbers_is_compiled_once():
    """Otherwise, from the second step on, a weak type would come in where a strong one did."""
    optimizer = optax.GradientTransformation(
        lambda params: jnp.zeros(()), lambda updates, state, params=None: (updates, 0.5)
    )
    traces = []
    step = train.make_step(loss_vector_fn, optimizer, noise.gd(100))

    @jax.jit
    def counting(state, data):
        traces.append(1)
        return step(state, data)

    state = train.init(PROBLEM.params, optimizer, jax.random.key(0))
    for _ in range(3):
        state, _ = counting(state, PROBLEM.data)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("dtype", "scale", "num"),
    [
        (jnp.float16, 31.6, 256),
        (jnp.float16, 1.9e-6, 256),
        (jnp.float16, 6e-5, 4),
        (jnp.bfloat16, 1e30, 9),
        (jnp.bfloat16, 1e-30, 9),
        (jnp.float32, 1e25, 9),
        (jnp.float32, 1e-25, 9),
        (jnp.float32, 0.0, 9),
        (jnp.float32, np.inf, 2),
    ],
)
def test_gradient_norms_neither_overflow_nor_underflow(dtype, scale, num):
    """The reference is the norm of g in float64, where the loss is g . theta.

    The numbers of g are rounded once to the type.
    """
    g = jnp.full(num, scale, dtype).at[0].mul(-2)
    params = {"a": jnp.zeros(num, dtype), "b": jnp.zeros((), dtype)}
    step = jax.jit(
        train.make_step(lambda p, x: (g * p["a"]).sum()[None] + p["b"] * x, SGD, noise.gd(1))
    )
    _, metrics = step(train.init(params, SGD, jax.random.key(0)), jnp.zeros(1, dtype))
    assert metrics.gradient_norm.dtype == jnp.float32
    expected = np.linalg.norm(np.asarray(g, np.float64))
    rtol = max(1e-5, float(jnp.finfo(dtype).eps))
    np.testing.assert_allclose(metrics.gradient_norm, expected, rtol=rtol)


# On GPUs, CPUs and TPUs.
NORMS = [_dtypes._norm_by_largest, _dtypes._norm_by_plain_squares, _dtypes._norm_by_scaled_squares]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_norms_are_right_over_all_exponents(norm, dtype):
    """Equal numbers at each exponent, and pairs of which one is small beside the other."""
    with jax.enable_x64(dtype == jnp.float64):
        info = jnp.finfo(dtype)
        of_two = jax.jit(jax.vmap(lambda x: norm([x[:1], x[1:]], jnp.dtype(dtype))))
        sizes = 2.0 ** np.arange(int(info.minexp), int(info.maxexp) - 2, dtype=dtype)
        for other in (1.0, 2.0**-3, 2.0**-13, 0.0):
            x = np.stack([1.5 * sizes, other * sizes * (other * sizes >= info.tiny)], 1)
            expected = sizes * np.linalg.norm(x / sizes[:, None], axis=1)
            np.testing.assert_allclose(of_two(jnp.asarray(x, dtype)), expected, rtol=4 * info.eps)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("leaves", [[1.0, np.nan], [np.nan, 1e30], [1e-30, np.nan], [np.inf, 1.0]])
def test_norms_of_what_is_not_finite_are_not(norm, leaves):
    found = norm([jnp.asarray(leaves, jnp.float32), jnp.ones(3)], jnp.dtype("float32"))
    np.testing.assert_equal(np.asarray(found), np.asarray(np.sum(leaves), np.float32))


@pytest.mark.parametrize("norm", NORMS)
def test_many_small_numbers_count(norm):
    """The square of each is below the smallest normal float32, and the root of their sum is not."""
    x = jnp.full(2**20, 2.0**-70, jnp.float32)
    np.testing.assert_allclose(norm([x], jnp.dtype("float32")), 2.0**-60, rtol=1e-6)


@pytest.mark.parametrize("dtype", INTEGERS)
def test_options_may_be_integers_of_any_type(dtype):
    """An int8 cannot hold the numbers that are computed for 100 examples in micro-batches of 7."""
    step = train.make_step(loss_vector_fn, OPTIMIZER, noise.gd(100), microbatch_size=dtype(7))
    loop = train.make_loop(step, max_steps=dtype(3))
    state, metrics = loop(start(), PROBLEM.data, dtype(2))
    assert int(state.step) == 2
    assert metrics.loss.shape == (2,)


def test_seeds_may_be_mapped():
    seeds = jnp.arange(4)
    states = jax.vmap(start)(seeds)
    loop = train.make_loop(jax.vmap(STEP, in_axes=(0, None)), max_steps=5)
    states, metrics = loop(states, PROBLEM.data, 5)
    assert metrics.loss.shape == (5, 4)
    for seed in range(4):
        alone, _ = LOOP(start(seed), PROBLEM.data, 5)
        np.testing.assert_allclose(states.params["w"][seed], alone.params["w"], rtol=1e-4)
    assert np.unique(states.params["w"], axis=0).shape[0] == 4


def test_statistics_are_part_of_the_state():
    def with_count(params, batch, count):
        return loss_vector_fn(params, batch), count + batch["y"].shape[0]

    step = train.make_step(
        with_count, OPTIMIZER, noise.sgd(100, 10), microbatch_size=4, has_state=True
    )
    state = train.init(PROBLEM.params, OPTIMIZER, jax.random.key(0), jnp.zeros((), jnp.int32))
    state, _ = jax.jit(step)(state, PROBLEM.data)
    assert int(state.model_state) == 12  # three ghost batches of 4, the last filled up


@jax.tree_util.register_pytree_node_class
class Statistics:
    """A container of a user, which has no ``__eq__``."""

    def __init__(self, mean, count):
        self.mean, self.count = mean, count

    def tree_flatten(self):
        return (self.mean, self.count), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)


def test_statistics_may_be_in_a_class_of_the_user():
    def with_count(params, batch, old):
        return loss_vector_fn(params, batch), Statistics(0.5 * old.mean, old.count + 1)

    state, _ = one_step(losses=with_count, state=Statistics(1.0, 0), has_state=True)
    assert (float(state.model_state.mean), int(state.model_state.count)) == (0.5, 1)


def test_an_equinox_model_that_is_partitioned_trains():
    model = eqx.nn.MLP(2, 1, 4, 2, key=jax.random.key(0))
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)

    def loss_fn(arrays, example):
        return (eqx.combine(arrays, rest)(example)[0] - 1.0) ** 2

    step = train.make_step(loss.per_example(loss_fn), SGD, noise.sgd(10, 5))
    x = jnp.linspace(-1.0, 1.0, 20).reshape(10, 2)
    loop = train.make_loop(step, max_steps=30)
    _, metrics = loop(train.init(arrays, SGD, jax.random.key(0)), x, 30)
    assert metrics.loss[-5:].mean() < 0.5 * metrics.loss[0]


def test_optimizers_are_given_the_value():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    step = jax.jit(train.make_step(loss_vector_fn, optimizer, noise.gd(100)))
    state = train.init(PROBLEM.params, optimizer, jax.random.key(0))
    for _ in range(2):
        state, metrics = step(state, PROBLEM.data)
    assert np.isfinite(optax.tree.get(state.opt_state, "best_value"))
    assert float(metrics.loss) == pytest.approx(
        float(optax.tree.get(state.opt_state, "best_value"))
    )


def init(params=PROBLEM.params, optimizer=OPTIMIZER, key=None, state=()):
    return train.init(params, optimizer, jax.random.key(0) if key is None else key, state)


def one_step(optimizer=SGD, losses=loss_vector_fn, law=None, state=(), data=None, **options):
    step = train.make_step(losses, optimizer, law or noise.gd(100), **options)
    start = init(optimizer=optimizer, state=state)
    return step(start, PROBLEM.data if data is None else data)


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize("num_steps", [0, -1, 21])
    def test_num_steps_out_of_range(self, num_steps):
        with pytest.raises(
            ValueError, match=f"num_steps must be between 1 and 20, got {num_steps}"
        ):
            LOOP(start(), PROBLEM.data, num_steps)

    def test_max_steps_out_of_range(self):
        with pytest.raises(ValueError, match="max_steps must be between 1 and 2147483647, got 0"):
            train.make_loop(STEP, max_steps=0)

    def test_integer_params_are_refused(self):
        with pytest.raises(TypeError, match=r"params\['n'\] must be floating point.*int32"):
            train.init({"n": jnp.ones((), jnp.int32)}, OPTIMIZER, jax.random.key(0))

    @pytest.mark.parametrize("key", [None, 0, np.zeros(2, np.uint32)])
    def test_wrong_keys_are_refused(self, key):
        with pytest.raises(TypeError, match="key must be a typed PRNG key"):
            train.init(PROBLEM.params, OPTIMIZER, key)

    def test_lookahead_with_plain_parameters_is_refused_with_advice(self):
        optimizer = optax.lookahead(SGD, 2, 0.5)
        with pytest.raises(AttributeError) as caught:
            one_step(optimizer)
        assert "optax.LookaheadParams.init_synced(params)" in caught.value.__notes__[0]

    def test_weights_in_place_of_a_law_are_refused(self):
        weights = noise.gd(3).sample(jax.random.key(0), 0)
        with pytest.raises(TypeError, match=r"law must be a noise\.MNoise or .*Weights"):
            train.make_step(loss_vector_fn, OPTIMIZER, weights)
