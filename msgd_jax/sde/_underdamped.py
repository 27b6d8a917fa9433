"""The SDE of momentum: paths of the underdamped equation, of which heavy-ball M-SGD is a scheme."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate, loss
from msgd_jax._laws import Law
from msgd_jax._typing import Data, Gradients, Params, PyTree, Scalar
from msgd_jax.sde import _dynamics, _euler_maruyama, _schedules
from msgd_jax.sde._dynamics import Equation, Scheme
from msgd_jax.sde._stationary import check_momentum


class Moving(NamedTuple):
    """A starting point that moves, for a path with momentum or for continuing one.

    Attributes:
        params: a pytree of float32 or float64 arrays.
        trace: v, optax's momentum, a pytree like `params`: the velocity dtheta/dt is
            ``-sqrt(learning_rate) v``.
        step: the iteration of this point, at least 0.
    """

    params: Params
    trace: Gradients
    step: int | Int[Array, ""] = 0


class UnderdampedPath(NamedTuple):
    """A path with its momentum at the iterations in `save_at`; under `jax.vmap`, one per key.

    Attributes:
        steps: the iterations, [saved].
        times: t = steps * sqrt(learning_rate), [saved]; with a schedule, the sum of the roots of
            the rates before.
        params: a pytree like `params` with a leading axis [saved]. NaN from `diverged_at` on.
        trace: optax's momentum v in the same form; dtheta/dt is ``-sqrt(learning_rate) v``.
        diverged_at: the first iteration whose end is not finite, counted from 1; -1 if there is
            none.
        last_params: a pytree like `params`: the last finite point.
        last_trace: the momentum at `last_params`.
    """

    steps: Int[Array, "*paths saved"]
    times: Float[Array, "*paths saved"]
    params: Params
    trace: Gradients
    diverged_at: Int[Array, "*paths"]
    last_params: Params
    last_trace: Gradients


def underdamped(
    losses: loss.LossVector,
    params: Params | Moving,
    law: Law,
    *,
    learning_rate: optax.ScalarOrSchedule,
    momentum: Scalar,
    num_steps: int | Int[Array, ""],
    key: Key[Array, ""],
    scheme: Scheme = Scheme(),  # noqa: B008 (frozen)
    save_at: Sequence[int] | Int[np.ndarray, " saved"] | None = None,
) -> UnderdampedPath:
    """A path of the SDE of M-SGD with momentum: a mass with friction, driven by the noise.

    With the time step ``k = sqrt(eta)`` and the friction ``q = (1 - mu)/k`` ::

        dTheta = p dt,    dp = -q p dt - grad L dt + eta^(1/4) C dW,

    and an iteration takes the time ``sqrt(eta)``, not eta. With one substep this is
    ``transform.msgd(eta, law, key, momentum=mu)`` for `noise.fisher` and `noise.cov`: the heavy
    ball is the semi-implicit Euler scheme of this equation, with ``p = -sqrt(eta) v``. More
    substeps follow the same Brownian path, that of `brownian_increments`.

    **There are two limits.** As eta goes to 0 at a fixed friction, ``mu = 1 - q sqrt(eta)`` goes to
    1, and the iteration is close to this SDE path by path, with strong order 1/2 in eta. At a fixed
    mu the mass vanishes, and the limit is the SDE of `euler_maruyama` at the effective learning
    rate ``eta/(1 - mu)``. Nesterov's momentum has, to leading order, the additional friction
    ``sqrt(eta) grad^2 L p`` (Shi, Du, Jordan and Su 2018), which vanishes in both limits.

    A schedule gives eta_k to iteration k, as in `transform.msgd`. In the momentum v, and with the
    time s in iterations, the equation is ::

        dTheta = -eta_k v ds,    dv = (grad L - (1 - mu) v) ds + C dW,

    so that v does not jump where the rate does; the velocity and the friction do, since an
    iteration takes the time ``sqrt(eta_k)``.

    As with `euler_maruyama`, each eager call compiles a program and frees it afterwards.

    Args:
        losses: the loss vector.
        params: the starting point: a pytree of float32 or float64 arrays, at rest at iteration 0;
            or a `Moving`, which also has a momentum and an iteration.
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`.
        learning_rate: eta, above 0, which may be traced; or an optax schedule, a function of the
            iteration from 0, which must be finite and at least 0 at all iterations.
        momentum: mu, in [0, 1); it may be traced.
        num_steps: the iteration at which the path ends.
        key: a typed PRNG key; use `jax.vmap` over keys for several paths.
        scheme: the number of substeps per iteration; its order must be 1.
        save_at: as in `euler_maruyama`.

    Returns:
        The path. If it becomes infinite or NaN, it stops there, and `diverged_at` says when.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64,
            `law` is not a law, `key` is not a typed PRNG key, or a number has the wrong type.
        ValueError: if the law is for another number of examples, its steps depend on each other, it
            states no covariance, a number is out of its range, a schedule is negative or not finite
            at an iteration, `trace` is not like `params`, or the scheme is of order 2.

    Example:
        >>> from msgd_jax import loss, noise, sde
        >>> fn = loss.per_example(lambda theta, x: (theta - x) ** 2 / 2)
        >>> losses = loss.LossVector(fn, jnp.asarray([0.0, 1.0, 3.0, 4.0]))
        >>> path = sde.underdamped(
        ...     losses, jnp.asarray(1.0), noise.fisher(4, batch_size=2), learning_rate=0.01,
        ...     momentum=0.9, num_steps=10, key=jax.random.key(0),
        ... )
        >>> round(float(path.times[0]), 6), path.trace.shape
        (1.0, (1,))
    """
    trace, first_step = None, 0
    if isinstance(params, Moving):
        params, trace, first_step = params
    equation = Equation.of(losses, params, law, scheme)
    if scheme.order != 1:
        raise ValueError(f"scheme must be of order 1 with momentum, got order {scheme.order}.")
    check_momentum(momentum)
    _validate.prng_key("key", key)
    start, end, targets = _euler_maruyama.check_iterations(first_step, num_steps, save_at)
    _schedules.check(learning_rate, first_step, num_steps)
    params = jax.tree.map(jnp.asarray, params)
    trace = optax.tree.zeros_like(params) if trace is None else trace
    trace = jax.tree.map(jnp.asarray, trace)
    if (gap := _validate.first_difference("trace", params, trace)) is not None:
        raise ValueError(f"trace must be like params, {gap[0]}, got {gap[1]}.")

    def integrate(
        at: tuple[Params, Gradients],
        data: Data,
        numbers: tuple[Scalar | None, Scalar],
        start: Int[Array, ""],
        end: Int[Array, ""],
        key: Key[Array, ""],
    ) -> UnderdampedPath:
        saved = end[None] if targets is None else jnp.asarray(targets)
        rate_at = _schedules.rate_at(
            learning_rate if numbers[0] is None else numbers[0], equation.dtype
        )
        own, mu = equation.with_data(data), jnp.asarray(numbers[1], equation.dtype)

        def iterate(at: PyTree, step: Int[Array, ""]) -> PyTree:
            return momentum_iteration(own, at, own.increments(key, step), rate_at(step), mu)

        def pace(step: Any) -> Float[Array, ""]:
            return jnp.sqrt(rate_at(step))

        (points, traces), diverged_at, last = _euler_maruyama.walk(iterate, at, start, end, saved)
        times = _schedules.times(
            pace if callable(learning_rate) else pace(start), equation.dtype, saved
        )
        return UnderdampedPath(saved, times, points, traces, diverged_at, *last)

    # Compiled here, so that the program is freed after the call.
    numbers = None if callable(learning_rate) else learning_rate, momentum
    return jax.jit(integrate)((params, trace), losses.data, numbers, start, end, key)


def momentum_iteration(
    equation: Equation,
    at: tuple[Params, Gradients],
    increments: Float[Array, "substeps N"],
    learning_rate: Float[Array, ""],
    momentum: Float[Array, ""],
) -> tuple[Params, Gradients]:
    """Semi-implicit Euler over one iteration: in each substep first the momentum."""
    root = equation.root

    def substep(
        at: tuple[Params, Gradients], increment: Float[Array, " N"]
    ) -> tuple[tuple[Params, Gradients], None]:
        return momentum_substep(equation, at, root(increment), learning_rate, momentum), None

    return jax.lax.scan(substep, at, increments)[0]


def momentum_substep(
    equation: Equation,
    at: tuple[Params, Gradients],
    coloured: Float[Array, " N"],
    learning_rate: Float[Array, ""],
    momentum: Float[Array, ""],
) -> tuple[Params, Gradients]:
    """One substep; `coloured` is A times the increment, in units where an iteration's is 1."""
    losses, length = equation.losses, 1 / equation.scheme.substeps
    kept = 1 - (1 - momentum) * length
    params, trace = at
    # Gradient and noise take one backward pass.
    kick = losses.gradient(params, length / losses.num_examples - coloured)
    trace = jax.tree.map(lambda v, g: kept.astype(v.dtype) * v + g, trace, kick)
    return _dynamics.step_along(params, trace, -learning_rate * length), trace
