"""Gradients of many draws at one point are those of each draw, with one forward pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from msgd_jax import loss, noise
from tests.support import problems
from tests.support.noises import ROWS

N, B, DRAWS = 10, 4, 5


def draws_of(law, key=11):
    return jax.vmap(law.sample, in_axes=(None, 0))(jax.random.key(key), jnp.arange(DRAWS))


@functools.cache
def many(microbatch_size, draws_per_pass=1):
    return jax.jit(
        loss.weighted_values_and_grads(
            problems.loss_vector_fn,
            microbatch_size=microbatch_size,
            draws_per_pass=draws_per_pass,
        )
    )


# The micro-batches divide N or do not, have one example, or have more than there are.
@pytest.mark.parametrize(
    ("name", "microbatch_size"),
    [
        *((name, 3) for name in ("sgd_replace", "sparse_cov", "bernoulli")),
        *(("cov", size) for size in (None, 3, 5)),
        *(("sgd", size) for size in (1, 3, 100)),
    ],
)
@pytest.mark.usefixtures("strict_dtypes")
def test_values_and_gradients_equal_dense_algebra_draw_by_draw(name, microbatch_size):
    problem = problems.regression(N)
    weights = draws_of(ROWS[name].make(N, B))
    values, grads = many(microbatch_size)(problem.params, problem.data, weights)
    dense = np.asarray(jax.vmap(noise.Weights.dense)(weights), np.float64)
    rounding = 20 * np.finfo(np.float32).eps
    losses = problem.losses()
    np.testing.assert_allclose(values, dense @ losses, atol=rounding * np.abs(dense @ losses).max())
    for leaf, rows in problem.gradient_matrix().items():
        wanted = np.tensordot(dense, rows, axes=1)
        scale = np.abs(np.tensordot(np.abs(dense), np.abs(rows), axes=1)).max()
        np.testing.assert_allclose(grads[leaf], wanted, atol=rounding * scale)


# The draws per pass divide the 5 draws or do not, or are more than there are.
@pytest.mark.parametrize(
    ("microbatch_size", "draws_per_pass"), [(None, 2), (None, 5), (3, 2), (3, 100)]
)
@pytest.mark.usefixtures("strict_dtypes")
def test_the_number_of_draws_per_pass_changes_only_the_rounding(microbatch_size, draws_per_pass):
    problem = problems.regression(N)
    weights = draws_of(noise.sgd(N, B))
    args = (problem.params, problem.data, weights)
    found = many(microbatch_size, draws_per_pass)(*args)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(close, found, many(None)(*args))


@pytest.mark.parametrize(("draws_per_pass", "passes"), [(1, 6), (2, 3), (3, 2)])
def test_several_draws_per_pass_save_passes(draws_per_pass, passes):
    """The passes are counted as the length of the loop in the traced program."""
    problem = problems.regression(N)
    weights = noise.Weights(jnp.ones((6, N)), None, N)
    run = loss.weighted_values_and_grads(problems.loss_vector_fn, draws_per_pass=draws_per_pass)
    traced = jax.make_jaxpr(run)(problem.params, problem.data, weights)
    loops = [eqn for eqn in traced.eqns if eqn.primitive.name == "scan"]
    assert [eqn.params["length"] for eqn in loops] == [passes]


def test_parameters_may_be_mapped():
    problem = problems.regression(N)
    weights = draws_of(noise.sgd(N, B))
    scales = jnp.asarray([0.5, 2.0])
    scaled = lambda s: jax.tree.map(lambda p: s * p, problem.params)  # noqa: E731
    values, grads = jax.vmap(lambda s: many(3)(scaled(s), problem.data, weights))(scales)
    for k in range(2):
        value, grad = many(3)(scaled(scales[k]), problem.data, weights)
        np.testing.assert_allclose(values[k], value, rtol=1e-5)
        np.testing.assert_allclose(grads["w"][k], grad["w"], rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("strict_dtypes")
def test_each_draw_is_the_separate_gradient():
    problem = problems.regression(N)
    weights = draws_of(noise.sparse_cov(N, B, support_size=6))
    values, grads = many(None)(problem.params, problem.data, weights)
    one = jax.jit(loss.weighted_value_and_grad(problems.loss_vector_fn))
    for k in range(DRAWS):
        value, grad = one(problem.params, problem.data, jax.tree.map(lambda x: x[k], weights))  # noqa: B023
        np.testing.assert_allclose(values[k], value, rtol=1e-5)
        jax.tree.map(
            lambda got, want: np.testing.assert_allclose(got[k], want, atol=1e-6),  # noqa: B023
            grads,
            grad,
        )


@pytest.mark.parametrize("microbatch_size", [None, 5])
def test_the_forward_pass_is_made_once_for_all_draws(microbatch_size):
    """A callback in the losses counts one evaluation per micro-batch, however many draws."""
    calls = []

    @jax.custom_jvp
    def counted(x):
        jax.debug.callback(lambda _: calls.append(1), x)
        return x

    counted.defjvp(lambda primals, tangents: (counted(*primals), tangents[0]))

    def loss_vector_fn(params, batch):
        return jax.vmap(problems.Regression.loss_fn, (None, 0))(
            {"w": params["w"], "b": counted(params["b"])}, batch
        )

    problem = problems.regression(N)
    run = loss.weighted_values_and_grads(loss_vector_fn, microbatch_size=microbatch_size)
    jax.block_until_ready(run(problem.params, problem.data, draws_of(noise.cov(N, B))))
    jax.effects_barrier()
    assert len(calls) == (1 if microbatch_size is None else 2)


def test_gradients_of_narrow_parameters_are_narrow_and_summed_in_float32():
    params, data = jnp.ones(3, jnp.bfloat16), jnp.ones((512, 3), jnp.bfloat16)
    weights = noise.Weights(jnp.ones((2, 512)), None, 512)
    run = loss.weighted_values_and_grads(lambda p, b: b @ p, microbatch_size=1)
    values, grads = run(params, data, weights)
    assert (values.dtype, grads.dtype) == (jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(values, 3 * 512.0)
    # A sum of ones in bfloat16 would stall at 256.
    np.testing.assert_array_equal(grads.astype(jnp.float32), 512.0)


@pytest.mark.usefixtures("user_errors")
def test_bad_input_is_refused():
    problem = problems.regression(N)
    law = noise.cov(N, B)
    run = loss.weighted_values_and_grads(problems.loss_vector_fn)
    single = law.sample(jax.random.key(0), 0)
    with pytest.raises(ValueError, match=r"shape \(draws, 10\), one for each example, got \(10,\)"):
        run(problem.params, problem.data, single)
    with pytest.raises(ValueError, match=r"must have shape \(10,\), one for each .* got \(5, 10\)"):
        loss.weighted_value_and_grad(problems.loss_vector_fn)(
            problem.params, problem.data, draws_of(law)
        )
    sparse = noise.Weights(jnp.ones((2, 3)), jnp.zeros((2, 4), jnp.int32), N)
    with pytest.raises(ValueError, match="must be stacks of vectors of the same length"):
        run(problem.params, problem.data, sparse)
    with pytest.raises(ValueError, match="num_examples = 9"):
        run(problem.params, problem.data, draws_of(noise.cov(9, B)))
    with pytest.raises(TypeError, match="loss_vector_fn must be a function"):
        loss.weighted_values_and_grads(None)
    with pytest.raises(ValueError, match="microbatch_size must be at least 1, got 0"):
        loss.weighted_values_and_grads(problems.loss_vector_fn, microbatch_size=0)
    with pytest.raises(ValueError, match="draws_per_pass must be at least 1, got 0"):
        loss.weighted_values_and_grads(problems.loss_vector_fn, draws_per_pass=0)
    with pytest.raises(ValueError, match="one loss per example"):
        loss.weighted_values_and_grads(lambda p, b: p["b"])(
            problem.params, problem.data, draws_of(law)
        )
