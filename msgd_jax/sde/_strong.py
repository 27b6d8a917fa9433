"""The strong error: how far the iteration is from the SDE, path by path."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _laws, _validate, loss
from msgd_jax._laws import Law
from msgd_jax._streams import Stream, derive
from msgd_jax._typing import Data, Params, Scalar
from msgd_jax.noise import MNoise, Weights
from msgd_jax.sde import _dynamics, _euler_maruyama, _fits, _schedules, _sweeps
from msgd_jax.sde._dynamics import Equation, Scheme
from msgd_jax.sde._sweeps import Sweep


def strong_error(
    losses: loss.LossVector,
    params: Params,
    law: Law,
    sweep: Sweep,
    *,
    key: Key[Array, ""],
    scheme: Scheme = Scheme(),  # noqa: B008 (frozen)
    iterate: MNoise | _dynamics.Coupling | None = None,
) -> _fits.ErrorSweep:
    """The root mean square distance between iteration and SDE at a fixed time (Theorem 3).

    For each eta, the SDE with its own sqrt(eta) C (Eq. 68) is integrated in substeps, and the
    iteration follows beside it. By default it is M-SGD-Gaussian on the same
    Brownian path, and the square of the error is a^2 eta^2 + c eta^3 (`ErrorSweep.error_model`):
    a eta is the Euler error of gradient descent, which is there without any noise, and the noise
    adds an order 3/2. So the order is 1 where a dominates and up to 3/2 where the noise does; with
    a scheme of order 2 the drift's error is gone and it is 3/2. Without a shared path it is 1/2.

    It is compiled anew on each call, once for all learning rates, and nothing is kept.

    The reference being Euler steps itself, a is about 1 - 1/substeps of that to the SDE.

    Args:
        losses: the loss vector.
        params: where all paths start: a pytree of float32 or float64 arrays.
        law: whose covariance the SDE has: a `noise.MNoise` with independent steps, or a
            `noise.Exchangeable`.
        sweep: the learning rates, their schedule, the time, and how many paths.
        key: a typed PRNG key; each eta has paths of its own.
        scheme: how many substeps of the SDE an iteration has, and its order.
        iterate: the weights of the iteration. None for ``coupling(law, N)``, M-SGD-Gaussian on
            the SDE's path; a function from the Brownian increment over the iteration [N], in units
            of sqrt(eta), to weights [N], for another coupling; a `noise.MNoise` to be drawn by its
            own sampling, which knows nothing of the path (its steps may depend on each other).

    Returns:
        The errors with their standard errors, and the order they fit.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64, or
            another argument is not of the type that is described.
        ValueError: if a law is for another number of examples, has dependent steps or is no
            covariance, or a path leaves the finite numbers: then with the learning rate and the
            iteration.
    """
    equation = Equation.of(losses, params, law, scheme)
    _sweeps.checked(sweep)
    _validate.prng_key("key", key)
    if isinstance(iterate, MNoise):
        _laws.of_size("iterate", iterate, losses.num_examples)
    elif iterate is not None:
        _validate.function("iterate", iterate)
    params = jax.tree.map(jnp.asarray, params)

    # One program for all learning rates, which nobody holds when this call is over.
    @jax.jit
    def distances_of_all(
        params: Params, data: Data, rate: Scalar, steps: Int[Array, ""], key: Key[Array, ""]
    ) -> tuple[_Distance, Int[Array, " paths"]]:
        rate_at = sweep.rate_at(rate, equation.dtype)
        one_path = _one_path(equation.with_data(data), iterate, params, rate_at, steps)
        return sweep.over_paths(one_path, key)

    errors, standard_errors = [], []
    for index, (rate, steps) in enumerate(zip(sweep.rates, sweep.num_steps, strict=True)):
        own_key = derive(key, Stream.PATHS, index)
        distances, left_at = distances_of_all(params, losses.data, rate, steps, own_key)
        _sweeps.check_finite(left_at, rate, "iteration and SDE")
        error, standard_error = _root_mean_square(distances.on_host(rate))
        errors.append(error)
        standard_errors.append(standard_error)
    freedom = sweep.num_paths - 1
    return _fits.ErrorSweep(sweep.rates, np.array(errors), np.array(standard_errors), freedom)


class _Distance(NamedTuple):
    """Norms of differences as a product of two numbers: the norm itself may overflow, or vanish."""

    largest: Float[Array, "*paths"]
    ratio: Float[Array, "*paths"]

    @classmethod
    def between(cls, one: Params, other: Params) -> "_Distance":
        """Of two finite points."""
        # Half of the difference: it never overflows, and halving is exact.
        halves = jax.tree.map(lambda a, b: 0.5 * a - 0.5 * b, one, other)
        largest = optax.tree.norm(halves, ord=jnp.inf)
        divisor = jnp.where(largest > 0, largest, 1)
        ratio = optax.tree.norm(jax.tree.map(lambda x: x / divisor.astype(x.dtype), halves))
        return cls(largest, ratio)

    def on_host(self, learning_rate: float) -> Float[np.ndarray, " paths"]:
        """The norms, in float64."""
        largest, ratio = (np.asarray(x, np.float64) for x in self)
        return _sweeps.check_values(2 * (largest * ratio), learning_rate, "their distance")


def _root_mean_square(distances: Float[np.ndarray, " paths"]) -> tuple[float, float]:
    """With its standard error, by the derivative of the root."""
    scale = float(distances.max())
    if scale == 0:
        return 0.0, 0.0
    square, spread = _sweeps.mean_and_spread((distances / scale) ** 2)
    error = math.sqrt(square)
    return scale * error, scale * spread / (2 * error)


class _Pair(NamedTuple):
    """SDE and iteration side by side, and the iteration in which either left the finite numbers."""

    sde: Params
    msgd: Params
    left_at: Int[Array, ""]


def _one_path(
    equation: Equation,
    iterate: MNoise | _dynamics.Coupling | None,
    params: Params,
    rate_at: _schedules.RateAt,
    num_steps: Int[Array, ""],
) -> Callable[[Key[Array, ""]], tuple[_Distance, Int[Array, ""]]]:
    """Of a key: the distance at the end, and when the path left the finite numbers, or -1."""
    losses, root = equation.losses, equation.root

    def weights(
        increment: Float[Array, " N"], own_key: Key[Array, ""], step: Int[Array, ""]
    ) -> Weights:
        if isinstance(iterate, MNoise):
            return iterate.sample(own_key, step)
        coupled = iterate or (lambda increment: 1 / losses.num_examples - root(increment))
        return Weights(coupled(increment), None, losses.num_examples)

    def one_path(key: Key[Array, ""]) -> tuple[_Distance, Int[Array, ""]]:
        path_key, own_key = jax.random.split(key)

        def advance(step: Int[Array, ""], pair: _Pair) -> _Pair:
            # Both sides over one iteration: the iteration sees the sum of the SDE's increments.
            increments, rate = equation.increments(path_key, step), rate_at(step)
            gradient = losses.gradient(pair.msgd, weights(increments.sum(0), own_key, step))
            sde = equation.iteration(pair.sde, increments, rate)
            msgd = _dynamics.step_along(pair.msgd, gradient, -rate)
            finite = _euler_maruyama.all_finite((sde, msgd))
            return _Pair(sde, msgd, _sweeps.left_at(pair.left_at, step, finite))

        pair = _Pair(params, params, jnp.asarray(-1, jnp.int32))
        pair = jax.lax.fori_loop(0, num_steps, advance, pair)
        return _Distance.between(pair.sde, pair.msgd), pair.left_at

    return one_path
