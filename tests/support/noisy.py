"""A problem of N = 40 examples whose gradient noise is known by float64 algebra in numpy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msgd_jax import loss
from tests.support.statistics import assert_agree

N, D = 40, 6


class Dense(NamedTuple):
    """The noise of the problem by dense algebra in numpy, which shares no code with the library."""

    gradients: np.ndarray  # [N, D]
    hessians: np.ndarray  # [N, D, D]

    @property
    def mean(self) -> np.ndarray:
        """The gradient of the mean loss, [D]."""
        return self.gradients.mean(0)

    @property
    def s(self) -> np.ndarray:
        """The covariance of the gradients of single examples, [D, D]."""
        centred = self.gradients - self.mean
        return centred.T @ centred / N

    @property
    def h(self) -> np.ndarray:
        """The Hessian of the mean loss, [D, D]."""
        return self.hessians.mean(0)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays x [N, D], y [N] and theta [D], by formulas and without a random number."""
    i = np.arange(1, N + 1)
    primes = np.sqrt([2, 3, 5, 7, 11, 13])
    x = np.sqrt(2) * np.sin(2 * np.pi * i[:, None] * primes) * (1 + i[:, None] / 20)
    y = np.sign(x.sum(1) + 2 * np.cos(i))
    return x, y, 0.5 * np.array([1, -1, 0.5, 2, -0.5, 1])


@functools.cache
def dense() -> Dense:
    """Gradients and Hessians of ``l_i = softplus(-2 y_i tanh(x_i . theta))``, derived by hand."""
    x, y, theta = arrays()
    t = np.tanh(x @ theta)
    slope = 1 - t**2  # the derivative of tanh
    p = 1 / (1 + np.exp(2 * y * t))  # the derivative of softplus at -2 y t
    # The first and the second derivative of the loss with respect to x . theta.
    first = -2 * y * p * slope
    second = 4 * p * (1 - p) * slope**2 + 4 * y * p * t * slope
    return Dense(first[:, None] * x, second[:, None, None] * x[:, :, None] * x[:, None, :])


@loss.per_example
def loss_vector_fn(theta, example):
    """The same losses in jax, of parameters in any number of leaves."""
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(theta)])
    return jax.nn.softplus(-2 * example["y"] * jnp.tanh(example["x"] @ flat))


@functools.cache  # A loss vector owns its compiled programs: sharing it compiles once.
def problem(dtype=jnp.float32, *, leaves: bool = False, **options) -> tuple[loss.LossVector, Any]:
    """The loss vector and the parameters: an array [6], or two leaves of it with `leaves`."""
    x, y, theta = arrays()
    data = {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}
    params = jnp.asarray(theta, dtype)
    made = loss.LossVector(loss_vector_fn, data, **options)
    return made, {"a": params[:2].reshape(2, 1), "b": params[2:]} if leaves else params


def within(measured, wanted: float, *, comparisons: int = 1) -> None:
    """Asserts that an estimate agrees with a number within its standard error.

    Args:
        measured: an `Estimate`, which has its standard error and its degrees of freedom.
        wanted: the exact value of what it estimates.
        comparisons: the number of comparisons in the whole test, as in `assert_agree`.
    """
    assert_agree(
        measured.value,
        wanted,
        measured.standard_error,
        comparisons=comparisons,
        degrees_of_freedom=measured.degrees_of_freedom,
    )
