"""One row for every transformation, how to call one, and how to compare results."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from msgd_jax import noise, transform
from tests.support.problems import Regression, loss_vector_fn, regression

PROBLEM = regression()
NOISE = noise.sparse_cov(100, 10, support_size=20)


def fresh_key():
    """The key of all transformations, as a new array: a donated state deletes its own."""
    return jax.random.key(7)


class Row(NamedTuple):
    """A transformation, and how it is called on the regression problem.

    Attributes:
        make: maps a key to the transformation.
        update: maps the transformation, its state and parameters to updates and the next state.
    """

    make: Callable[[Any], Any]
    update: Callable[..., tuple[Any, Any]]


def fast_update(tx, state, params, problem=PROBLEM):
    """The update by one backward pass through the loss vector."""
    return tx.update((), state, params, loss_vector_fn=loss_vector_fn, data=problem.data)


def per_example_gradients(params, problem=PROBLEM):
    """The gradient of each loss, [N, *leaf]."""
    return jax.vmap(jax.grad(Regression.loss_fn), (None, 0))(params, problem.data)


def aggregated_update(tx, state, params, problem=PROBLEM):
    """The update from the gradients of all examples."""
    return tx.update(per_example_gradients(params, problem), state, params)


TRANSFORMS: dict[str, Row] = {
    "multiplicative_noise": Row(
        lambda key: transform.multiplicative_noise(NOISE, key), fast_update
    ),
    "microbatched": Row(
        lambda key: transform.multiplicative_noise(NOISE, key, microbatch_size=7), fast_update
    ),
    "aggregate_per_example": Row(
        lambda key: transform.aggregate_per_example(NOISE, key), aggregated_update
    ),
    "msgd": Row(lambda key: transform.msgd(0.1, NOISE, key), fast_update),
    "msgd_momentum": Row(lambda key: transform.msgd(0.1, NOISE, key, momentum=0.9), fast_update),
    "msgd_nesterov": Row(
        lambda key: transform.msgd(0.1, NOISE, key, momentum=0.9, nesterov=True), fast_update
    ),
    "msgd_schedule": Row(
        lambda key: transform.msgd(optax.linear_schedule(0.1, 0.0, 100), NOISE, key), fast_update
    ),
    "adam_behind": Row(
        lambda key: optax.chain(transform.multiplicative_noise(NOISE, key), optax.adam(1e-2)),
        fast_update,
    ),
    "aggregate_then_adam": Row(
        lambda key: optax.chain(transform.aggregate_per_example(NOISE, key), optax.adam(1e-2)),
        aggregated_update,
    ),
    "injected": Row(
        lambda key: optax.inject_hyperparams(transform.msgd, static_args=("law", "key"))(
            learning_rate=optax.linear_schedule(0.1, 0.0, 100), law=NOISE, key=key, momentum=0.9
        ),
        fast_update,
    ),
    "multi_steps_behind": Row(
        lambda key: optax.chain(
            transform.multiplicative_noise(NOISE, key),
            optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
        ),
        fast_update,
    ),
}
everywhere = pytest.mark.parametrize("row", TRANSFORMS.values(), ids=TRANSFORMS)


def assert_trees_close(a, b, rtol=2e-5, atol=2e-6):
    """Asserts that trees agree up to float32 rounding in another order of the sums.

    A sum of the 100 examples, with their terms, is off by at most ``132 u = 8e-6`` of the sum of
    its sizes (u = 2^-24, see `assert_is_dense_gradient`). The relative tolerance is about twice
    this, and the absolute one allows for sums that cancel.
    """
    chex.assert_trees_all_equal_structs(a, b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)


def assert_trees_identical(a, b):
    """Asserts that trees have the same structure and the same bits, keys included."""
    chex.assert_trees_all_equal_structs(a, b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
