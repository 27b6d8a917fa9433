"""Paths of the SDE by Euler-Maruyama, on the Brownian path that the discrete iteration follows."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, Key

from msgd_jax import _validate, loss
from msgd_jax._laws import Law
from msgd_jax._typing import Data, Params, PyTree
from msgd_jax.sde import _schedules
from msgd_jax.sde._dynamics import Equation, Scheme


class Path(NamedTuple):
    """A path at the iterations in `save_at`; under `jax.vmap` over keys, one path per key.

    Attributes:
        steps: the iterations, [saved].
        times: t = steps * learning_rate, [saved]; with a schedule, the sum of the rates before.
        params: a pytree like `params` with a leading axis [saved]. NaN from `diverged_at` on.
        diverged_at: the first iteration whose end is not finite, counted from 1; -1 if there is
            none.
        last_params: a pytree like `params`: the last finite point, at iteration `diverged_at` - 1,
            or at the end if the path does not diverge.
    """

    steps: Int[Array, "*paths saved"]
    times: Float[Array, "*paths saved"]
    params: Params
    diverged_at: Int[Array, "*paths"]
    last_params: Params


def euler_maruyama(
    losses: loss.LossVector,
    params: Params,
    law: Law,
    *,
    learning_rate: optax.ScalarOrSchedule,
    num_steps: int | Int[Array, ""],
    key: Key[Array, ""],
    scheme: Scheme = Scheme(),  # noqa: B008 (frozen)
    save_at: Sequence[int] | Int[np.ndarray, " saved"] | None = None,
    first_step: int | Int[Array, ""] = 0,
) -> Path:
    """A path of the SDE of a law, ``dTheta = -grad L dt + sqrt(eta) C dW`` (Eqs. 12 and 68).

    Each of `num_steps` iterations covers the time eta in equal substeps, which take one backward
    pass each. ``C C^T`` is the covariance of ``grad(L . W)``; C is never formed. W has N dimensions
    and is drawn iteration by iteration, by `brownian_increments`: memory holds the increments of
    one iteration and the saved points.

    With one substep this is M-SGD-Gaussian (Eq. 67). With the same key, more substeps follow
    the same Brownian path, and so does training with `noise.fisher` or `noise.cov`::

      law = noise.cov(N, b)
      options = dict(learning_rate=0.1, num_steps=20, key=key)
      sde = euler_maruyama(losses, params, law, scheme=Scheme(substeps=64), **options)
      msgd = euler_maruyama(losses, params, law, scheme=Scheme(substeps=1), **options)

    The path is drawn in the dtype of the law's weights, as in training, for parameters of any
    dtype. (For an `Exchangeable`, which has no dtype, it is drawn in that of the parameters.)

    A schedule gives eta_k to iteration k, as in `transform.msgd`, and with the same key both are on
    the same path. The SDE is the one with varying steps of Li, Tai and E (2017),
    ``dTheta = -grad L dt + sqrt(eta_k) C dW`` over the time eta_k that iteration k takes. The rate
    is constant within an iteration, so the drift of order 2 has no term for the rate's slope.

    Each eager call compiles a program and frees it afterwards. Put the function under `jax.jit` to
    call it more than once::

      walk = jax.jit(lambda losses, params, key: euler_maruyama(losses, params, law, key=key,
                                                                learning_rate=0.1, num_steps=20))

    Args:
        losses: the loss vector.
        params: the starting point of the path: a pytree of float32 or float64 arrays.
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`; only its covariance
            is used.
        learning_rate: eta, above 0, which may be traced; or an optax schedule, a function of the
            iteration from 0, which must be finite and at least 0 at all iterations.
        num_steps: the iteration at which the path ends, at t = num_steps * eta; at least 1. It may
            be traced; `save_at` is then not checked against it.
        key: a typed PRNG key; use `jax.vmap` over keys for several paths.
        scheme: the number of substeps per iteration, and the order of the SDE.
        save_at: the iterations after which the path is saved, in ascending order, from `first_step`
            (the start) to num_steps; None for num_steps only.
        first_step: the iteration of `params`, below num_steps; it may be traced. A path that is
            continued from one of its points is the same path to the last bit.

    Returns:
        The path. If it becomes infinite or NaN, it stops there, and `diverged_at` says when.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64,
            `law` is not a law, `key` is not a typed PRNG key, `num_steps`, `first_step` or an entry
            of `save_at` is not an integer, or `learning_rate` is neither a number nor a function.
        ValueError: if the law is for another number of examples, its steps depend on each other, it
            states no covariance, a number is out of its range, or a schedule is negative or not
            finite at an iteration, which the error names (traced values are not checked).

    Example:
        >>> from msgd_jax import loss, noise, sde
        >>> fn = loss.per_example(lambda theta, x: (theta - x) ** 2 / 2)
        >>> losses = loss.LossVector(fn, jnp.asarray([0.0, 1.0, 3.0, 4.0]))
        >>> law, key = noise.fisher(4, batch_size=2), jax.random.key(0)
        >>> fine = sde.euler_maruyama(
        ...     losses, jnp.asarray(1.0), law, learning_rate=0.1, num_steps=10, key=key
        ... )
        >>> float(fine.times[0]), fine.params.shape, int(fine.diverged_at)
        (1.0, (1,), -1)
    """
    equation = Equation.of(losses, params, law, scheme)
    _validate.prng_key("key", key)
    start, end, targets = check_iterations(first_step, num_steps, save_at)
    _schedules.check(learning_rate, first_step, num_steps)

    def integrate(
        params: Params,
        data: Data,
        number: Any,
        start: Int[Array, ""],
        end: Int[Array, ""],
        key: Key[Array, ""],
    ) -> Path:
        saved = end[None] if targets is None else jnp.asarray(targets)
        rate = learning_rate if number is None else number
        return _integrate(equation.with_data(data), params, rate, start, end, saved, key)

    # Compiled here, so that the program, which holds the loss function, is freed after the call.
    params = jax.tree.map(jnp.asarray, params)
    number = None if callable(learning_rate) else learning_rate
    return jax.jit(integrate)(params, losses.data, number, start, end, key)


def check_iterations(
    first_step: Any, num_steps: Any, save_at: Any
) -> tuple[Int[Array, ""], Int[Array, ""], Int[np.ndarray, " saved"] | None]:
    """The first and the last iteration of a path, and those saved; raises TypeError, ValueError."""
    end = _iteration_number("num_steps", num_steps, minimum=1)
    last_start = 2**31 - 2 if isinstance(num_steps, Tracer) else int(num_steps) - 1
    start = _iteration_number("first_step", first_step, minimum=0, maximum=last_start)
    return start, end, _check_save_at(save_at, first_step, num_steps)


def _iteration_number(
    name: str, value: Any, minimum: int, maximum: int = _validate.MAX_STEP
) -> Int[Array, ""]:
    """The number of an iteration as an int32 scalar, in [minimum, maximum] unless it is traced."""
    if not isinstance(value, Tracer):
        _validate.integer_dtype(name, value)
        if jnp.shape(value) == ():
            _validate.positive_int(name, int(value), maximum, minimum)
    return _validate.step(value, name)


def _check_save_at(
    save_at: Any, first_step: Any, num_steps: Any
) -> Int[np.ndarray, " saved"] | None:
    if save_at is None:
        return None
    one = isinstance(save_at, (str, Tracer)) or getattr(save_at, "ndim", 1) != 1
    if one or not isinstance(save_at, Iterable):
        raise TypeError(
            "save_at must be a sequence of iterations, such as [10, 20], or None for the last "
            f"one only, got {_validate.shown(save_at)}."
        )
    if hasattr(save_at, "dtype"):
        save_at = np.asarray(save_at)
    low = 0 if isinstance(first_step, Tracer) else int(first_step)
    high = _validate.MAX_STEP if isinstance(num_steps, Tracer) else int(num_steps)
    steps = [_validate.positive_int("save_at", step, high, low) for step in save_at]
    if not steps or any(after <= before for before, after in itertools.pairwise(steps)):
        raise ValueError(
            "save_at must name at least one iteration, in ascending order, got "
            f"{_validate.shown(steps)}."
        )
    return np.array(steps, np.int32)


class _State(NamedTuple):
    """A path at `at` after `step` iterations, or at its last finite point."""

    at: PyTree
    step: Int[Array, ""]
    finite: Bool[Array, ""]


def _integrate(
    equation: Equation,
    params: Params,
    learning_rate: optax.ScalarOrSchedule,
    start: Int[Array, ""],
    end: Int[Array, ""],
    targets: Int[Array, " saved"],
    key: Key[Array, ""],
) -> Path:
    rate_at = _schedules.rate_at(learning_rate, equation.dtype)

    def iterate(params: Params, step: Int[Array, ""]) -> Params:
        return equation.iteration(params, equation.increments(key, step), rate_at(step))

    saved, diverged_at, last = walk(iterate, params, start, end, targets)
    times = _schedules.times(learning_rate, equation.dtype, targets)
    return Path(targets, times, saved, diverged_at, last)


def walk(
    iterate: Callable[[PyTree, Int[Array, ""]], PyTree],
    at: PyTree,
    start: Int[Array, ""],
    end: Int[Array, ""],
    targets: Int[Array, " saved"],
) -> tuple[PyTree, Int[Array, ""], PyTree]:
    """Iterates while the state is finite.

    Returns the states at the targets (NaN at targets that are not reached), the iteration in which
    the path diverged (or -1), and the last finite state.
    """

    def advance(state: _State) -> _State:
        moved = iterate(state.at, state.step)
        finite = all_finite(moved)
        kept = jax.tree.map(functools.partial(jnp.where, finite), moved, state.at)
        return _State(kept, state.step + 1, finite)

    def run_to(state: _State, target: Int[Array, ""]) -> tuple[_State, PyTree]:
        state = jax.lax.while_loop(lambda s: s.finite & (s.step < target), advance, state)
        saved = jax.tree.map(lambda p: jnp.where(state.finite, p, jnp.nan), state.at)
        return state, saved

    state, saved = jax.lax.scan(run_to, _State(at, start, jnp.asarray(True)), targets)
    state, _ = run_to(state, end)
    return saved, jnp.where(state.finite, -1, state.step), state.at


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether every number of every leaf is finite."""
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves)
