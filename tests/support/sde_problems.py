"""Logistic regression on which the SDE is tested.

Its gradients are bounded and Lipschitz, as Theorem 3 asks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msgd_jax import loss


class Problem(NamedTuple):
    """A loss vector function, the start [D], and the examples (features [N, D], labels [N])."""

    loss_vector_fn: loss.LossVectorFn
    params: jax.Array
    data: tuple[jax.Array, jax.Array]

    @property
    def losses(self) -> loss.LossVector:
        """The loss vector of all examples."""
        return loss.LossVector(self.loss_vector_fn, self.data)

    @property
    def num_examples(self) -> int:
        """The number of examples N."""
        return len(self.data[1])


@loss.per_example
def _losses(params, example):
    features, label = example
    return jax.nn.softplus(-label * (features @ params))


def logistic(num_examples: int = 32, dim: int = 5, dtype=jnp.float32) -> Problem:
    """Random features, with labels so noisy that no parameters fit them all."""
    rng = np.random.Generator(np.random.Philox(0))
    features = 2 * rng.standard_normal((num_examples, dim))
    labels = np.sign(features.sum(1) / (2 * np.sqrt(dim)) + 0.7 * rng.standard_normal(num_examples))
    start = np.resize([-1.5, 1.0, -1.0, 0.5, 1.0], dim)
    x, y, start = (jnp.asarray(array, dtype) for array in (features, labels, start))
    return Problem(_losses, start, (x, y))


def at_minimum(problem: Problem) -> Problem:
    """The same problem, started at the minimum of the mean loss, by Newton's method in float64."""
    x, y = (np.asarray(array, np.float64) for array in problem.data)
    theta = np.zeros(x.shape[1])
    for _ in range(30):
        wrong = 1 / (1 + np.exp(y * (x @ theta)))  # the probability of the other label
        gradient = -(y * wrong) @ x
        hessian = (x * (wrong * (1 - wrong))[:, None]).T @ x
        theta = theta - np.linalg.solve(hessian, gradient)
    assert np.linalg.norm(gradient) < 1e-9
    return problem._replace(params=jnp.asarray(theta, problem.params.dtype))
