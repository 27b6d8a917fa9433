"""The problem of N = 40 examples whose gradient noise is known to 15 digits, in float64 numpy."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from msgd_jax import loss
from tests.support.statistics import assert_agree

N, D = 40, 6


class Dense(NamedTuple):
    """Everything about the noise of the problem, by dense algebra of its own in numpy."""

    gradients: np.ndarray  # [N, D]
    hessians: np.ndarray  # [N, D, D]

    @property
    def mean(self) -> np.ndarray:
        return self.gradients.mean(0)

    @property
    def s(self) -> np.ndarray:
        centred = self.gradients - self.mean
        return centred.T @ centred / N

    @property
    def h(self) -> np.ndarray:
        return self.hessians.mean(0)


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays x [N, D], y [N] and theta [D], without a random number."""
    i = np.arange(1, N + 1)
    primes = np.sqrt([2, 3, 5, 7, 11, 13])
    x = np.sqrt(2) * np.sin(2 * np.pi * i[:, None] * primes) * (1 + i[:, None] / 20)
    y = np.sign(x.sum(1) + 2 * np.cos(i))
    return x, y, 0.5 * np.array([1, -1, 0.5, 2, -0.5, 1])


@functools.cache
def dense() -> Dense:
    """Gradients and Hessians of l_i = softplus(-2 y_i tanh(x_i . theta)), by hand."""
    x, y, theta = arrays()
    t = np.tanh(x @ theta)
    slope = 1 - t**2  # of tanh
    p = 1 / (1 + np.exp(2 * y * t))  # softplus'(-2 y t)
    first = -2 * y * p * slope
    second = 4 * p * (1 - p) * slope**2 + 4 * y * p * t * slope
    return Dense(first[:, None] * x, second[:, None, None] * x[:, :, None] * x[:, None, :])


@loss.per_example
def loss_vector_fn(theta, example):
    flat = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(theta)])
    return jax.nn.softplus(-2 * example["y"] * jnp.tanh(example["x"] @ flat))


@functools.cache  # loss vectors own their programs
def problem(dtype=jnp.float32, *, leaves: bool = False, **options) -> tuple[loss.LossVector, Any]:
    """The loss vector and the parameters: an array [6], or with `leaves` two leaves of it."""
    x, y, theta = arrays()
    data = {"x": jnp.asarray(x, dtype), "y": jnp.asarray(y, dtype)}
    params = jnp.asarray(theta, dtype)
    made = loss.LossVector(loss_vector_fn, data, **options)
    return made, {"a": params[:2].reshape(2, 1), "b": params[2:]} if leaves else params


def within(measured, wanted: float, *, comparisons: int = 1) -> None:
    """An estimate is what is wanted, by `assert_agree` with its standard error.

    Args:
        measured: an `Estimate`.
        wanted: what it estimates.
        comparisons: how many there are in the whole test.
    """
    assert_agree(
        measured.value,
        wanted,
        measured.standard_error,
        comparisons=comparisons,
        degrees_of_freedom=measured.degrees_of_freedom,
    )
