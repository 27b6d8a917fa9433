"""Training: the state, the compiled loop, donation, and resuming bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from msgd_jax import noise, train
from tests.problems import Regression, loss_vector_fn, regression

PROBLEM = regression()
OPTIMIZER = optax.sgd(0.2, momentum=0.9)
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
    """Three steps against theta - eta G W with momentum, written out in numpy's float64."""
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


def test_loop_is_compiled_once_for_any_number_of_steps():
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
    assert len(traces) == before <= 3  # shapes, loop body; never again


def test_loop_agrees_with_single_compiled_steps():
    state, _ = LOOP(start(), PROBLEM.data, 6)
    single = start()
    step = jax.jit(STEP, donate_argnums=0)
    for _ in range(6):
        single, _ = step(single, PROBLEM.data)
    for leaf, expected in single.params.items():
        np.testing.assert_allclose(state.params[leaf], expected, rtol=1e-5)


def test_donation_deletes_nothing_of_the_callers():
    params = jax.tree.map(jnp.copy, PROBLEM.params)
    aux, key = jnp.zeros(3), jax.random.key(0)
    state = train.init(params, OPTIMIZER, key, aux)
    LOOP(state, PROBLEM.data, 2)
    for leaf in jax.tree.leaves((params, aux, key)):
        assert not leaf.is_deleted()
    assert state.params["w"].is_deleted()  # and donation did take place


def test_seeds_are_vmapped():
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
        with_count, OPTIMIZER, noise.sgd(100, 10), microbatch_size=4, has_aux=True
    )
    state = train.init(PROBLEM.params, OPTIMIZER, jax.random.key(0), jnp.zeros((), jnp.int32))
    state, _ = jax.jit(step)(state, PROBLEM.data)
    assert int(state.aux) == 12  # three ghost batches of 4, the last filled up


def test_optimizers_that_take_the_value():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1))
    step = jax.jit(train.make_step(loss_vector_fn, optimizer, noise.gd(100)))
    state = train.init(PROBLEM.params, optimizer, jax.random.key(0))
    for _ in range(2):
        state, metrics = step(state, PROBLEM.data)
    assert np.isfinite(optax.tree.get(state.opt_state, "best_value"))
    assert float(metrics.loss) == pytest.approx(
        float(optax.tree.get(state.opt_state, "best_value"))
    )


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    @pytest.mark.parametrize("num_steps", [0, -1, 21])
    def test_num_steps(self, num_steps):
        with pytest.raises(
            ValueError, match=f"num_steps must be between 1 and 20, got {num_steps}"
        ):
            LOOP(start(), PROBLEM.data, num_steps)

    def test_max_steps(self):
        with pytest.raises(ValueError, match="max_steps must be between 1 and 2147483647, got 0"):
            train.make_loop(STEP, max_steps=0)

    def test_integer_params(self):
        with pytest.raises(TypeError, match=r"params\['n'\] must be floating point.*int32"):
            train.init({"n": jnp.ones((), jnp.int32)}, OPTIMIZER, jax.random.key(0))

    @pytest.mark.parametrize("key", [None, 0, np.zeros(2, np.uint32)])
    def test_keys(self, key):
        with pytest.raises(TypeError, match="key must be a typed PRNG key"):
            train.init(PROBLEM.params, OPTIMIZER, key)

    def test_noise(self):
        weights = noise.gd(3).sample(jax.random.key(0), 0)
        with pytest.raises(TypeError, match=r"noise must be a noise\.MNoise, got Weights"):
            train.make_step(loss_vector_fn, OPTIMIZER, weights)
