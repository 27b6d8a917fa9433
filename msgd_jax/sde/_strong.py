"""The strong error: how far the iteration is from the SDE, path by path."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax._streams import Stream, derive
from msgd_jax.loss import LossVectorFn
from msgd_jax.noise import MNoise, Weights
from msgd_jax.sde import _dynamics, _euler_maruyama, _fits, _sweeps


def strong_error(
    loss_vector_fn: LossVectorFn,
    params: Any,
    data: Any,
    noise: _dynamics.Law,
    *,
    learning_rates: Sequence[float],
    horizon: float,
    num_paths: int,
    key: Key[Array, ""],
    substeps: int = 8,
    iterate: MNoise | _dynamics.Coupling | None = None,
    order: int = 1,
    microbatch_size: int | None = None,
    paths_per_pass: int | None = None,
) -> _fits.ErrorSweep:
    """The root mean square distance between iteration and SDE at a fixed time (Theorem 3).

    For each eta, the SDE with its own sqrt(eta) C (Eq. 68) is integrated with `substeps` steps an
    iteration, and the iteration follows beside it. By default it is M-SGD-Gaussian on the same
    Brownian path, and the square of the error is a^2 eta^2 + c eta^3 (`ErrorSweep.error_model`):
    a eta is the Euler error of gradient descent, which is there without any noise, and the noise
    adds an order 3/2. So the order is 1 where a dominates and up to 3/2 where the noise does; with
    ``order=2`` the drift's error is gone and it is 3/2. Without a shared path it is 1/2.

    It is compiled anew on each call, once for all learning rates, and nothing is kept.

    The reference being `substeps` Euler steps itself, a is about 1 - 1/substeps of that to the SDE.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: where all paths start: a pytree of float32 or float64 arrays.
        data: a pytree of arrays [N, ...].
        noise: whose covariance the SDE has: a `noise.MNoise` with independent steps, or a
            `noise.Exchangeable`.
        learning_rates: eta, each a whole fraction of `horizon`.
        horizon: T, the time at which the distance is taken, above 0.
        num_paths: paths for each eta, at least 4.
        key: a typed PRNG key; each eta has paths of its own.
        substeps: of the SDE in one iteration, a power of two.
        iterate: the weights of the iteration. None for ``coupling(noise, N)``, M-SGD-Gaussian on
            the SDE's path; a function from the Brownian increment over the iteration [N], in units
            of sqrt(eta), to weights [N], for another coupling; a `noise.MNoise` to be drawn by its
            own sampling, which knows nothing of the path (its steps may depend on each other).
        order: of the SDE, as in `euler_maruyama`.
        microbatch_size: examples in one pass, as in `loss.weighted_value_and_grad`; None for all.
        paths_per_pass: paths in memory at once; None for all.

    Returns:
        The errors with their standard errors, and the order they fit.

    Raises:
        TypeError, ValueError: if an argument is not as described, or a path leaves the finite
            numbers: then with the learning rate and the iteration.
    """
    problem = _sweeps.Problem.of(
        loss_vector_fn, params, data, noise, substeps, order, microbatch_size
    )
    rates, num_steps = _sweeps.whole_steps(learning_rates, horizon)
    _sweeps.check_paths(num_paths, paths_per_pass)
    _validate.prng_key("key", key)
    if isinstance(iterate, MNoise):
        _dynamics.check_size(iterate, problem.num_examples, "iterate")
    elif iterate is not None:
        _validate.function("iterate", iterate)

    # One program for all learning rates, which nobody holds when this call is over.
    @jax.jit
    def distances_of_all(
        params: Any, data: Any, rate: Any, steps: Any, key: Key[Array, ""]
    ) -> tuple[_Distance, Int[Array, " paths"]]:
        one_path = _one_path(problem, iterate, params, data, rate, steps)
        return _sweeps.over_paths(one_path, key, num_paths, paths_per_pass)

    errors, standard_errors = [], []
    for index, (rate, steps) in enumerate(zip(rates, num_steps, strict=True)):
        distances, left_at = distances_of_all(
            problem.params, problem.data, rate, steps, derive(key, Stream.PATHS, index)
        )
        _sweeps.check_finite(left_at, rate, "iteration and SDE")
        error, standard_error = _root_mean_square(distances.on_host(rate))
        errors.append(error)
        standard_errors.append(standard_error)
    return _fits.ErrorSweep(rates, np.array(errors), np.array(standard_errors), num_paths - 1)


class _Distance(NamedTuple):
    """Norms of differences as a product of two numbers: the norm itself may overflow, or vanish."""

    largest: Float[Array, "*paths"]
    ratio: Float[Array, "*paths"]

    @classmethod
    def between(cls, one: Any, other: Any) -> "_Distance":
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

    sde: Any
    msgd: Any
    left_at: Int[Array, ""]


def _one_path(
    problem: _sweeps.Problem, iterate: Any, params: Any, data: Any, rate: Any, num_steps: Any
) -> Callable[[Key[Array, ""]], tuple[_Distance, Int[Array, ""]]]:
    """Of a key: the distance at the end, and when the path left the finite numbers, or -1."""
    field = problem.field(data)
    rate = jnp.asarray(rate, field.dtype)
    root = problem.root(field.dtype)

    def weights(increment: Float[Array, " N"], own_key: Key[Array, ""], step: Any) -> Weights:
        if isinstance(iterate, MNoise):
            return iterate.sample(own_key, step)
        coupled = iterate or (lambda increment: 1 / field.num_examples - root(increment))
        return Weights(coupled(increment), None, field.num_examples)

    def one_path(key: Key[Array, ""]) -> tuple[_Distance, Int[Array, ""]]:
        path_key, own_key = jax.random.split(key)

        def advance(step: Any, pair: _Pair) -> _Pair:
            increments = problem.increments(path_key, step, field.dtype)
            w = weights(increments.sum(0), own_key, step)
            _, gradient = field.value_and_grad(pair.msgd, data, w)
            sde = _euler_maruyama.iteration(field, pair.sde, increments, root, rate, problem.order)
            msgd = _dynamics.step_along(pair.msgd, gradient, -rate)
            finite = _euler_maruyama.all_finite((sde, msgd))
            return _Pair(sde, msgd, _sweeps.left_at(pair.left_at, step, finite))

        pair = _Pair(params, params, jnp.asarray(-1, jnp.int32))
        pair = jax.lax.fori_loop(0, num_steps, advance, pair)
        return _Distance.between(pair.sde, pair.msgd), pair.left_at

    return one_path
