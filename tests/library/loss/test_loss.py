"""The weighted loss: its gradients against dense float64 algebra, statistics, and bad input."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from msgd_jax import loss, noise
from tests.support.noises import ROWS
from tests.support.problems import Regression, loss_vector_fn, regression

pytestmark = pytest.mark.usefixtures("strict_dtypes")


def dense_gradient(problem: Regression, weights: noise.Weights) -> dict[str, np.ndarray]:
    """The product G . W with the dense gradient matrix, in float64."""
    w = np.zeros(weights.num_examples)
    indices = np.arange(weights.num_examples) if weights.indices is None else weights.indices
    np.add.at(w, np.asarray(indices), np.asarray(weights.values, np.float64))
    gradients = problem.gradient_matrix()
    return {name: np.tensordot(w, g, axes=1) for name, g in gradients.items()}


@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    [
        *((name, size) for name in ROWS for size in (None, 7)),
        *(("cov", size) for size in (1, 50, 100, 1000)),
    ],
)
def test_gradient_is_the_dense_product(name, microbatch_size, x64):
    problem = regression(dtype=jnp.float64)
    law = ROWS[name].make(100, 10, dtype=jnp.float64)
    weights = law.sample(jax.random.key(1), 0)
    f = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=microbatch_size)
    value, grads = jax.jit(f)(problem.params, problem.data, weights)
    expected = dense_gradient(problem, weights)
    for leaf in expected:
        np.testing.assert_allclose(grads[leaf], expected[leaf], rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(value, problem.losses() @ np.asarray(weights.dense()), rtol=1e-12)


@pytest.mark.slow
@hypothesis.settings(max_examples=8, deadline=None, derandomize=True)
@hypothesis.given(n=st.integers(1, 30), microbatch_size=st.integers(1, 35))
def test_gradients_of_micro_batches_that_do_not_divide_n(n, microbatch_size):
    problem = regression(n)
    weights = noise.fisher(n, 1).sample(jax.random.key(1), 0)
    f = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=microbatch_size)
    _, grads = f(problem.params, problem.data, weights)
    expected = dense_gradient(problem, weights)
    bound = {k: np.abs(v).sum(0) for k, v in problem.gradient_matrix().items()}
    # Each of n additions in float32 is off by at most a unit of the sum of all terms' sizes.
    for leaf in expected:
        tolerance = 2.0**-22 * n * np.abs(np.asarray(weights.values)).max() * bound[leaf] + 1e-7
        assert (np.abs(grads[leaf] - expected[leaf]) <= tolerance).all()


def test_gd_is_the_gradient_of_the_mean_loss(x64):
    problem = regression(dtype=jnp.float64)
    weights = noise.gd(100, dtype=jnp.float64).sample(jax.random.key(0), 0)
    f = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=30)
    value, grads = f(problem.params, problem.data, weights)
    mean_loss = lambda params: loss_vector_fn(params, problem.data).mean()  # noqa: E731
    expected_value, expected = jax.value_and_grad(mean_loss)(problem.params)
    np.testing.assert_allclose(value, expected_value, rtol=1e-13)
    for leaf in expected:
        np.testing.assert_allclose(grads[leaf], expected[leaf], rtol=1e-12)


def test_only_examples_of_sparse_weights_are_evaluated():
    sizes = []

    def recording(params, batch):
        sizes.append(batch["x"].shape[0])
        return loss_vector_fn(params, batch)

    problem = regression()
    f = loss.weighted_value_and_grad(recording)
    f(problem.params, problem.data, noise.sgd(100, 3).sample(jax.random.key(0), 0))
    assert set(sizes) == {3}


def test_bfloat16_models_accumulate_in_float32():
    """Each of 1,024 micro-batches adds 1/1024: in bfloat16, the sum would stall at 1/4."""
    n = 1024
    params, data = jnp.ones((), jnp.bfloat16), jnp.ones(n, jnp.bfloat16)
    f = loss.weighted_value_and_grad(lambda p, x: p * x, microbatch_size=1)
    weights = noise.gd(n).sample(jax.random.key(0), 0)
    value, grads = f(params, data, weights)
    assert grads.dtype == jnp.bfloat16
    assert float(grads) == 1.0
    assert value.dtype == jnp.float32
    assert float(value) == 1.0
    stalled = jnp.zeros((), jnp.bfloat16)
    for _ in range(n):
        stalled += jnp.bfloat16(1 / n)
    assert float(stalled) < 0.5


def test_losses_are_summed_in_float32():
    """The losses of 4,096 examples are one: the value is the sum of the weights, in float32."""
    n = 4096
    losses = lambda p, x: p * x  # noqa: E731
    weights = noise.fisher(n, 1).sample(jax.random.key(0), 0)
    f = loss.weighted_value_and_grad(losses)
    value, _ = f(jnp.ones((), jnp.bfloat16), jnp.ones(n, jnp.bfloat16), weights)
    exact = np.asarray(weights.values, np.float64).sum()
    assert abs(float(value) - exact) < n * 2.0**-24 * np.abs(np.asarray(weights.values)).sum()


def test_statistics_go_through_the_ghost_batches_in_order():
    """The reference computes a running mean over three ghost batches by hand.

    They have 4, 4 and 2 examples. The last one is filled up with the first 2 examples, which take
    part in its statistics and not in the value.
    """
    x = jnp.arange(10.0)

    def normalised(params, batch, running):
        mean = batch.mean()
        return params * (batch - mean) ** 2, 0.5 * running + 0.5 * mean

    f = loss.weighted_value_and_grad(normalised, microbatch_size=4, has_state=True)
    weights = noise.gd(10).sample(jax.random.key(0), 0)
    (value, running), grads = jax.jit(f)(jnp.ones(()), x, weights, jnp.zeros(()))
    ghosts = [np.array([0, 1, 2, 3]), np.array([4, 5, 6, 7]), np.array([8, 9, 0, 1])]
    expected, total = 0.0, 0.0
    for ghost, real in zip(ghosts, (4, 4, 2), strict=True):
        expected = 0.5 * expected + 0.5 * ghost.mean()
        total += ((ghost - ghost.mean()) ** 2)[:real].sum() / 10
    np.testing.assert_allclose(running, expected, rtol=1e-6)
    np.testing.assert_allclose([value, grads], [total, total], rtol=1e-6)


def test_statistics_of_one_pass_are_those_of_all_examples():
    f = loss.weighted_value_and_grad(lambda p, x, state: (p * x, state + x.sum()), has_state=True)
    weights = noise.gd(4).sample(jax.random.key(0), 0)
    (value, state), grads = f(jnp.ones(()), jnp.arange(4.0), weights, jnp.ones(()))
    assert (float(value), float(state), float(grads)) == (1.5, 7.0, 1.5)


def test_gradients_may_be_mapped_and_scanned():
    problem = regression()
    law = noise.sparse_cov(100, 10, support_size=20)
    f = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=8)
    gradient = lambda step: f(problem.params, problem.data, law.sample(jax.random.key(0), step))[1]  # noqa: E731
    mapped = jax.vmap(gradient)(jnp.arange(3))
    _, scanned = jax.lax.scan(lambda c, step: (c, gradient(step)), None, jnp.arange(3))
    for i in range(3):
        single = gradient(i)
        for many in (mapped, scanned):
            np.testing.assert_allclose(many["w"][i], single["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 24])
def test_data_may_be_sharded_over_devices(microbatch_size):
    """On eight devices, gradients are the dense product up to rounding in float32."""
    problem = regression(104)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    data = jax.device_put(problem.data, NamedSharding(mesh, PartitionSpec("data")))
    params = jax.device_put(problem.params, NamedSharding(mesh, PartitionSpec()))
    f = loss.weighted_value_and_grad(loss_vector_fn, microbatch_size=microbatch_size)
    for law in (noise.cov(104, 8), noise.sparse_fisher(104, 8, support_size=40)):
        weights = law.sample(jax.random.key(1), 0)
        _, grads = jax.jit(f)(params, data, weights)
        for leaf, expected in dense_gradient(problem, weights).items():
            np.testing.assert_allclose(grads[leaf], expected, rtol=1e-4, atol=1e-5)
            assert len(grads[leaf].sharding.device_set) == 8


@pytest.mark.usefixtures("user_errors")
class TestBadInput:
    def setup_method(self):
        self.problem = regression(10)
        self.weights = noise.gd(10).sample(jax.random.key(0), 0)

    def call(self, fn=loss_vector_fn, params=None, data=None, weights=None, **kwargs):
        params = self.problem.params if params is None else params
        data = self.problem.data if data is None else data
        weights = self.weights if weights is None else weights
        return loss.weighted_value_and_grad(fn, **kwargs)(params, data, weights)

    @pytest.mark.parametrize("microbatch_size", [None, 5])
    def test_a_scalar_loss_is_refused(self, microbatch_size):
        with pytest.raises(
            ValueError, match=r"one loss per example, shape \(\d+,\), got shape \(\)"
        ):
            self.call(lambda p, d: loss_vector_fn(p, d).mean(), microbatch_size=microbatch_size)

    def test_a_matrix_of_losses_is_refused(self):
        with pytest.raises(ValueError, match=r"shape \(10,\), got shape \(10, 1\)"):
            self.call(lambda p, d: loss_vector_fn(p, d)[:, None])

    def test_integer_losses_are_refused(self):
        with pytest.raises(TypeError, match="floating-point losses, got int32"):
            self.call(lambda p, d: jnp.arange(10))

    def test_a_tuple_needs_has_state(self):
        with pytest.raises(TypeError, match="array of losses, got tuple"):
            self.call(lambda p, d: (loss_vector_fn(p, d), 0))

    def test_the_loss_of_one_example_must_be_a_scalar(self):
        f = loss.per_example(lambda p, e: e["x"] * p["w"])
        with pytest.raises(ValueError, match=r"scalar for one example, got shape \(5,\)"):
            f(self.problem.params, self.problem.data)

    def test_integer_params_are_refused(self):
        params = {"w": jnp.ones(5), "b": jnp.ones((), jnp.int32)}
        with pytest.raises(TypeError, match=r"params\['b'\] must be floating point.*int32"):
            self.call(params=params)

    def test_empty_params_are_refused(self):
        with pytest.raises(ValueError, match=r"params has no leaves.*got {} of type dict"):
            self.call(params={})

    def test_leaves_of_data_must_have_the_same_length(self):
        data = {"x": jnp.ones((10, 5)), "y": jnp.ones(9)}
        with pytest.raises(ValueError, match=r"share the leading axis.*10.*9"):
            self.call(data=data)

    def test_leaves_of_data_must_have_an_axis(self):
        with pytest.raises(ValueError, match=r"data\['y'\] is a scalar"):
            self.call(data={"x": jnp.ones((10, 5)), "y": jnp.ones(())})

    def test_weights_must_be_for_the_number_of_examples(self):
        for law in (noise.gd(11), noise.sgd(11, 3)):
            with pytest.raises(ValueError, match=r"num_examples = 11.*10 examples"):
                self.call(weights=law.sample(jax.random.key(0), 0))

    def test_weights_must_have_the_right_length(self):
        with pytest.raises(ValueError, match=r"must have shape \(10,\).*got \(9,\)"):
            self.call(weights=noise.Weights(jnp.ones(9), None, 10))
        indices = jnp.arange(3)
        with pytest.raises(ValueError, match="same length"):
            self.call(weights=noise.Weights(jnp.ones(4), indices, 10))

    @pytest.mark.parametrize(
        "values", [jnp.ones(10, int), jnp.ones(10, bool), jnp.ones(10, complex), [0.1] * 10, None]
    )
    def test_weights_must_be_floating_point(self, values):
        with pytest.raises(TypeError, match="values must be a floating-point array, got "):
            noise.Weights(values, None, 10)

    def test_a_plain_array_is_no_weights(self):
        with pytest.raises(TypeError, match=r"noise\.Weights, got ndarray"):
            self.call(weights=np.ones(10))

    @pytest.mark.parametrize("size", [0, -3])
    def test_microbatch_size_must_be_at_least_one(self, size):
        with pytest.raises(ValueError, match=f"microbatch_size must be at least 1, got {size}"):
            self.call(microbatch_size=size)

    def test_loss_vector_fn_must_be_a_function(self):
        with pytest.raises(TypeError, match="loss_vector_fn must be a function"):
            loss.weighted_value_and_grad(None)

    def test_statistics_must_keep_their_shapes(self):
        f = loss.weighted_value_and_grad(
            lambda p, d, state: (loss_vector_fn(p, d), jnp.ones(2)), has_state=True
        )
        with pytest.raises(ValueError, match="state with the structure, shapes and dtypes"):
            f(self.problem.params, self.problem.data, self.weights, jnp.ones(3))
