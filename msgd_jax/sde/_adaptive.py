"""The SDE of Adam and RMSprop: paths on the Brownian path that training follows."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Key

from msgd_jax import _validate, loss
from msgd_jax._laws import Law
from msgd_jax._typing import Data, Gradients, Params, PerExampleGradients, PyTree
from msgd_jax.sde import _euler_maruyama, _schedules
from msgd_jax.sde._dynamics import Equation, Scheme
from msgd_jax.sde._rules import Adam, RMSprop


class AdaptiveState(NamedTuple):
    """A point with the averages of an adaptive rule, to start a path from or to continue one.

    Attributes:
        params: a pytree of float32 or float64 arrays.
        mean: Adam's average of the gradients (`mu` in optax), a pytree like `params`. It is not
            used by `RMSprop`, nor by `Adam` with ``b1 = 0``.
        square: the average of the squared gradients (`nu` in optax), a pytree like `params`.
        step: the iteration of this point, at least 0. Adam corrects the bias of averages of so many
            gradients.
    """

    params: Params
    mean: Gradients
    square: Gradients
    step: int | Int[Array, ""] = 0


class AdaptivePath(NamedTuple):
    """A path with its averages at the iterations in `save_at`; under `jax.vmap`, one per key.

    Attributes:
        steps: the iterations, [saved].
        times: t = steps * learning_rate^2, [saved]; with a schedule, the sum of the squared rates
            before.
        params: a pytree like `params` with a leading axis [saved]. NaN from `diverged_at` on.
        mean: the averages of the gradients, in the same form.
        square: the averages of the squared gradients, in the same form.
        diverged_at: the first iteration whose end is not finite, counted from 1; -1 if there is
            none.
        last: the last finite point.
    """

    steps: Int[Array, "*paths saved"]
    times: Float[Array, "*paths saved"]
    params: Params
    mean: Gradients
    square: Gradients
    diverged_at: Int[Array, "*paths"]
    last: AdaptiveState


def adaptive(
    losses: loss.LossVector,
    params: Params | AdaptiveState,
    law: Law,
    rule: Adam | RMSprop,
    *,
    num_steps: int | Int[Array, ""],
    key: Key[Array, ""],
    scheme: Scheme = Scheme(),  # noqa: B008 (frozen)
    save_at: Sequence[int] | Int[np.ndarray, " saved"] | None = None,
) -> AdaptivePath:
    """A path of the SDE of Adam or RMSprop (Malladi, Lyu, Panigrahi and Arora 2022).

    Time is written in iterations, s. For RMSprop, all operations by coordinate::

        dTheta = -eta (grad L ds + C dW)/P,    P = sqrt(v) + eps,
        dv = (1 - decay) (diag(C C^T) + (grad L)^2 - v) ds,

    and for Adam, with averages whose bias is corrected by ``c1 = 1 - b1^s`` and ``c2 = 1 - b2^s``
    (in the limit of small ``1 - b1`` and ``1 - b2``, ``1 - exp(-(1 - b1) s)`` and so on) ::

        dTheta = -eta (m/c1)/P ds,    P = sqrt(v/c2) + eps,
        dm = (1 - b1) (grad L ds + C dW - m ds),
        dv = (1 - b2) (diag(C C^T) + (grad L)^2 - v) ds.

    An average of squares of the noise has no noise in the limit, so that v follows the expectation
    of the squared gradient. In the time ``t = eta^2 s`` these are the equations of Malladi
    et al., but they leave out ``(grad L)^2``, which is smaller by the order eta^2 in their limit.

    **The limit** is that of `Adam.scaled` with a ratio that goes to 0: the learning rate decreases
    and the noise grows, so that their product stays. Then the iteration has weak order 1 in
    eta^2, and on the shared path strong order 1 in eta. At a fixed law, eta to 0 is not this limit,
    and the iteration approaches a flow without noise.

    With one substep, the iteration is that of optax with the squares of the gradient replaced by
    their expectation. With the same key, training with `noise.fisher` or `noise.cov` follows this
    path::

        law, rule = noise.cov(N, b), sde.Adam(1e-3, b1=0.9, b2=0.99)
        path = sde.adaptive(losses, params, law, rule, num_steps=100, key=key)
        optimizer = transform.with_noise(rule.optimizer(), law, key)

    A substep takes one backward pass and the gradient of every example, of one micro-batch at a
    time. As with `euler_maruyama`, each eager call compiles a program and frees it afterwards.

    Args:
        losses: the loss vector.
        params: the starting point: a pytree of float32 or float64 arrays, with averages as in
            optax before the first step; or an `AdaptiveState`.
        law: a `noise.MNoise` with independent steps, or a `noise.Exchangeable`; only its covariance
            is used.
        rule: an `Adam` or an `RMSprop`, whose numbers may be traced.
        num_steps: the iteration at which the path ends.
        key: a typed PRNG key; use `jax.vmap` over keys for several paths.
        scheme: the number of substeps per iteration; its order must be 1.
        save_at: as in `euler_maruyama`.

    Returns:
        The path. If it becomes infinite or NaN, it stops there, and `diverged_at` says when.

    Raises:
        TypeError: if `losses` is not a `loss.LossVector`, `params` are not float32 or float64,
            `law` is not a law, `rule` is neither an `Adam` nor an `RMSprop`, `key` is not a typed
            PRNG key, or a number has the wrong type.
        ValueError: if the law is for another number of examples, its steps depend on each other, it
            states no covariance, a number is out of its range, a schedule is negative or not finite
            at an iteration, `mean` or `square` is not like `params`, a square is negative, or the
            scheme is of order 2.

    Example:
        >>> from msgd_jax import loss, noise, sde
        >>> fn = loss.per_example(lambda theta, x: (theta - x) ** 2 / 2)
        >>> losses = loss.LossVector(fn, jnp.asarray([0.0, 1.0, 3.0, 4.0]))
        >>> path = sde.adaptive(
        ...     losses, jnp.asarray(1.0), noise.fisher(4, batch_size=2), sde.Adam(0.1, b2=0.9),
        ...     num_steps=10, key=jax.random.key(0),
        ... )
        >>> round(float(path.times[0]), 6), path.square.shape
        (0.1, (1,))
    """
    start = _start(params, rule)
    equation = Equation.of(losses, start.params, law, scheme)
    if scheme.order != 1:
        raise ValueError(f"scheme must be of order 1 for adaptive rules, got {scheme.order}.")
    _validate.prng_key("key", key)
    first, end, targets = _euler_maruyama.check_iterations(start.step, num_steps, save_at)
    _schedules.check(rule.learning_rate, start.step, num_steps)
    rate_at = _schedules.rate_at(rule.learning_rate, equation.dtype)

    def squared(step: Any) -> Float[Array, ""]:
        return rate_at(step) ** 2

    def integrate(
        at: _At, data: Data, first: Int[Array, ""], end: Int[Array, ""], key: Key[Array, ""]
    ) -> AdaptivePath:
        saved = end[None] if targets is None else jnp.asarray(targets)
        own = equation.with_data(data)

        def iterate(at: _At, step: Int[Array, ""]) -> _At:
            return adaptive_iteration(own, rule, at, step, own.increments(key, step), rate_at(step))

        points, diverged_at, last = _euler_maruyama.walk(iterate, at, first, end, saved)
        times = _schedules.times(squared, equation.dtype, saved)
        step = jnp.where(diverged_at < 0, end, diverged_at - 1)
        final = AdaptiveState(last.params, last.mean, last.square, step)
        path = points.params, points.mean, points.square
        return AdaptivePath(saved, times, *path, diverged_at, final)

    # Compiled here, so that the program is freed after the call.
    at = _At(start.params, start.mean, start.square)
    return jax.jit(integrate)(at, losses.data, first, end, key)


class _At(NamedTuple):
    """A point of a path and its averages."""

    params: Params
    mean: Gradients
    square: Gradients


def at_rest(params: Params, rule: Adam | RMSprop) -> _At:
    """The point at which training with this rule starts."""
    fill = rule.initial_scale if isinstance(rule, RMSprop) else 0.0
    square = jax.tree.map(lambda p: jnp.full(p.shape, fill, p.dtype), params)
    return _At(params, optax.tree.zeros_like(params), square)


def _start(params: Params | AdaptiveState, rule: Adam | RMSprop) -> AdaptiveState:
    """The state at the start, after checks; raises TypeError or ValueError."""
    if not isinstance(rule, Adam | RMSprop):
        raise TypeError(f"rule must be an sde.Adam or an sde.RMSprop, got {_validate.shown(rule)}.")
    if not isinstance(params, AdaptiveState):
        _validate.floating_params(params)
        return AdaptiveState(*at_rest(jax.tree.map(jnp.asarray, params), rule))
    point, mean, square, step = params
    point, mean, square = (jax.tree.map(jnp.asarray, x) for x in (point, mean, square))
    state = AdaptiveState(point, mean, square, step)
    for name in ("mean", "square"):
        gap = _validate.first_difference(name, state.params, getattr(state, name))
        if gap is not None:
            raise ValueError(f"{name} must be like params, {gap[0]}, got {gap[1]}.")
    leaves = [x for x in jax.tree.leaves(state.square) if not isinstance(x, Tracer) and x.size]
    lowest = min((float(np.asarray(leaf).min()) for leaf in leaves), default=0.0)
    if lowest < 0:
        raise ValueError(f"square must be at least 0, got {lowest:.6g}.")
    return state


def adaptive_iteration(
    equation: Equation,
    rule: Adam | RMSprop,
    at: _At,
    step: Int[Array, ""],
    increments: Float[Array, "substeps N"],
    learning_rate: Float[Array, ""],
) -> _At:
    """One iteration by semi-implicit Euler: the averages first, then the parameters, as in optax.

    With one substep, the averages decay and are corrected for their bias exactly as in optax.
    """
    losses, root, substeps = equation.losses, equation.root, equation.scheme.substeps
    length = 1 / substeps
    decay, decay_of_mean, adam = rule.decays
    # Without momentum the noise reaches the parameters as it is; with b1 = 0 in the equation of m
    # it would be averaged over an iteration.
    with_mean = isinstance(decay_of_mean, Tracer) or float(decay_of_mean) > 0
    lost_square, lost_mean = ((1 - kept) * length for kept in (decay, decay_of_mean))
    eps = jnp.asarray(rule.eps, equation.dtype)

    def unbiased(lost: Float[Array, ""] | float, count: Float[Array, ""]) -> Float[Array, ""]:
        """1 - (1 - lost)^count, also where it is small."""
        return -jnp.expm1(count * jnp.log1p(-jnp.asarray(lost, equation.dtype)))

    def substep(
        carry: tuple[_At, Float[Array, ""]], increment: Float[Array, " N"]
    ) -> tuple[tuple[_At, Float[Array, ""]], None]:
        (params, mean, square), before = carry
        count = before + 1
        expected = _expected_square(equation, params)
        square = _towards(square, expected, lost_square)
        # Gradient and noise over the substep take one backward pass; a unit is an iteration.
        weights = length / losses.num_examples - root(increment)
        kick = losses.gradient(params, weights)
        if with_mean:
            mean = _towards(mean, optax.tree.scale(substeps, kick), lost_mean)
            share = length / unbiased(lost_mean, count)
            push = jax.tree.map(lambda m: _like(share, m) * m, mean)
        else:
            push = kick
        correction = unbiased(lost_square, count) if adam else jnp.ones((), equation.dtype)

        def moved(param: Array, push: Array, square: Array) -> Array:
            size = jnp.sqrt(square / _like(correction, square)) + _like(eps, square)
            # Where a gradient was always 0, as at dead units, nothing moves, also if eps is 0.
            still = (size == 0) & (push == 0)
            return param - _like(learning_rate, param) * push / jnp.where(still, 1, size)

        return (_At(jax.tree.map(moved, params, push, square), mean, square), count), None

    before = step.astype(equation.dtype) * substeps
    return jax.lax.scan(substep, (at, before), increments)[0][0]


def _expected_square(equation: Equation, params: Params) -> Gradients:
    """The expectation of the squared noisy gradient, diag(C C^T) + (grad L)^2."""
    root, size = equation.root, equation.losses.num_examples

    def sums(
        gradients: PerExampleGradients, weights: Float[Array, " B"]
    ) -> tuple[Gradients, Gradients]:
        def total(power: int) -> Gradients:
            return jax.tree.map(
                lambda g: jnp.tensordot(weights.astype(g.dtype), g**power, 1), gradients
            )

        return total(1), total(2)

    total, squares = equation.losses.sum_over_gradients(sums, params)

    def expected(total: Array, squares: Array) -> Array:
        mean = total / size
        spread = jnp.maximum(squares - size * mean**2, 0)  # of N equal gradients, rounding is left
        along = _like(size * root.along + 1, mean)
        return _like(root.across, mean) * spread + along * mean**2

    return jax.tree.map(expected, total, squares)


def _towards(average: PyTree, target: PyTree, share: Float[Array, ""] | float) -> PyTree:
    """The average moved by this share of its distance to the target."""
    return jax.tree.map(lambda a, t: a + _like(share, a) * (t - a), average, target)


def _like(number: Float[Array, ""] | float, array: Array) -> Array:
    return jnp.asarray(number, array.dtype)
