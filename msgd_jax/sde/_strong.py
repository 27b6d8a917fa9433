"""The strong error: how far the iteration is from the SDE, path by path."""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate
from msgd_jax.loss import LossVectorFn
from msgd_jax.noise import MNoise, Weights
from msgd_jax.sde import _brownian, _dynamics, _euler_maruyama, _fits, _sweeps


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

    The reference being `substeps` Euler steps itself, a is about 1 - 1/substeps of that to the SDE.

    Args:
        loss_vector_fn: ``loss_vector_fn(params, batch)`` returns the losses of the batch, [B].
        params: where all paths start: a pytree of float32 or float64 arrays.
        data: a pytree of arrays [N, ...].
        noise: whose covariance the SDE has: a `noise.MNoise` or a `noise.Exchangeable`.
        learning_rates: eta, each a whole fraction of `horizon`.
        horizon: T, the time at which the distance is taken, above 0.
        num_paths: paths for each eta, at least 2.
        key: a typed PRNG key; each eta has paths of its own.
        substeps: of the SDE in one iteration, a power of two.
        iterate: the weights of the iteration. None for ``coupling(noise, N)``, M-SGD-Gaussian on
            the SDE's path; a function from the Brownian increment over the iteration [N], in units
            of sqrt(eta), to weights [N], for another coupling; a `noise.MNoise` to be drawn by its
            own sampling, which knows nothing of the path.
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
        _dynamics.eigenvalues(iterate, _validate.leading_axis("data", data))
    elif iterate is not None:
        _validate.function("iterate", iterate)
    errors, standard_errors = [], []
    for index, (rate, steps) in enumerate(zip(rates, num_steps, strict=True)):
        squares, left_at = _square_distances(
            *problem,
            iterate,
            rate,
            steps,
            jax.random.fold_in(key, index),
            num_paths,
            paths_per_pass,
        )
        _sweeps.check_finite(left_at, rate, "iteration and SDE")
        squares = np.asarray(squares, np.float64)
        error = math.sqrt(squares.mean())
        spread = squares.std(ddof=1) / math.sqrt(num_paths)
        errors.append(error)
        standard_errors.append(spread / (2 * error) if error > 0 else 0.0)
    return _fits.ErrorSweep(rates, np.array(errors), np.array(standard_errors))


class _Pair(NamedTuple):
    """SDE and iteration side by side, and the iteration in which either left the finite numbers."""

    sde: Any
    msgd: Any
    left_at: Int[Array, ""]


@functools.partial(
    jax.jit,
    static_argnames=(
        "loss_vector_fn", "substeps", "order", "microbatch_size", "iterate", "num_paths",
        "paths_per_pass",
    ),
)  # fmt: skip
def _square_distances(
    loss_vector_fn: Any,
    params: Any,
    data: Any,
    eigenvalues: tuple[Any, Any],
    substeps: int,
    order: int,
    microbatch_size: int | None,
    iterate: Any,
    learning_rate: Any,
    num_steps: Any,
    key: Key[Array, ""],
    num_paths: int,
    paths_per_pass: int | None,
) -> tuple[Float[Array, " paths"], Int[Array, " paths"]]:
    """Of every path: the squared distance at the end, and when it left the finite numbers, or -1.

    Learning rate, number of steps and moments are traced: a sweep compiles once.
    """
    field = _dynamics.Field.of(loss_vector_fn, params, data, microbatch_size)
    rate = jnp.asarray(learning_rate, field.dtype)
    root = _dynamics.Root(*(jnp.asarray(value, field.dtype) for value in eigenvalues))

    def weights(increment: Float[Array, " N"], own_key: Key[Array, ""], step: Any) -> Weights:
        if isinstance(iterate, MNoise):
            return iterate.sample(own_key, step)
        coupled = iterate or (lambda increment: 1 / field.num_examples - root(increment))
        return Weights(coupled(increment), None, field.num_examples)

    def one_path(key: Key[Array, ""]) -> tuple[Float[Array, ""], Int[Array, ""]]:
        path_key, own_key = jax.random.split(key)

        def advance(step: Any, pair: _Pair) -> _Pair:
            increments = _brownian.brownian_increments(
                path_key, step, field.num_examples, substeps=substeps, dtype=field.dtype
            )
            w = weights(increments.sum(0), own_key, step)
            _, gradient = field.value_and_grad(pair.msgd, data, w)
            new = _Pair(
                _euler_maruyama.iteration(field, pair.sde, increments, root, rate, order),
                _dynamics.step_along(pair.msgd, gradient, -rate),
                pair.left_at,
            )
            left = (new.left_at < 0) & ~_euler_maruyama.all_finite((new.sde, new.msgd))
            return new._replace(left_at=jnp.where(left, step, new.left_at))

        pair = _Pair(params, params, jnp.asarray(-1, jnp.int32))
        pair = jax.lax.fori_loop(0, num_steps, advance, pair)
        difference = jax.tree.map(jnp.subtract, pair.sde, pair.msgd)
        return optax.tree.norm(difference, squared=True), pair.left_at

    return _sweeps.over_paths(one_path, key, num_paths, paths_per_pass)
